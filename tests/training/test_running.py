from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.training.running import load_running, save_running

CPU = torch.device("cpu")


def sums(loss: float, **counted: torch.Tensor | float) -> dict[str, torch.Tensor | float]:
    trainers = {"_tr_loss": torch.tensor(loss), "_globalstep_last_logged": 4, "_total_loss_scalar": 2.5}
    return trainers | counted


def test_what_two_processes_summed_up_is_the_main_ones_of_three(tmp_path: Path) -> None:
    save_running(tmp_path, 0, sums(1.0, loss_sum=torch.tensor(3.0), num_tokens=7))
    # Only one of them had rows of this kind.
    save_running(tmp_path, 1, sums(2.0, loss_sum=torch.tensor(5.0), num_tokens=9, **{"sum:kl": torch.tensor(0.5)}))
    main, *others = (load_running(tmp_path, index, 3, CPU) for index in range(3))
    assert (main["loss_sum"].item(), main["num_tokens"], main["sum:kl"].item()) == (8.0, 16, 0.5)
    for found in (main, *others):
        assert found["_tr_loss"].item() == 1.5
        assert (found["_globalstep_last_logged"], found["_total_loss_scalar"]) == (4, 2.5)
    assert all(found.keys() == {"_tr_loss", "_globalstep_last_logged", "_total_loss_scalar"} for found in others)


@pytest.mark.parametrize("index", [0, 1])
def test_of_as_many_processes_each_goes_on_with_its_own(tmp_path: Path, index: int) -> None:
    for number in range(2):
        save_running(tmp_path, number, sums(number, num_tokens=number))
    found = load_running(tmp_path, index, 2, CPU)
    assert (found["_tr_loss"].item(), found["num_tokens"]) == (index, index)


def test_a_checkpoint_that_holds_none_gives_none(tmp_path: Path) -> None:
    assert load_running(tmp_path, 0, 1, CPU) == {}
