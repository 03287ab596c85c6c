"""What a run that runs out of memory tells, frees and leaves."""

from __future__ import annotations

import gc
import weakref

import pytest
import tiny
import torch
from torch import Tensor

from fourfold.training.out_of_memory import OutOfMemory, compare_parts, let_go, standing_parts


def test_frames_of_a_failed_step_let_go_of_their_tensors() -> None:
    held: list[weakref.ref[Tensor]] = []

    def inner() -> None:
        tensor = torch.ones(10)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("out of memory")

    def outer() -> None:
        try:
            inner()
        except torch.OutOfMemoryError:
            tensor = torch.ones(10)
            held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("again") from None

    with pytest.raises(torch.OutOfMemoryError) as caught:
        outer()
    error = caught.value
    del caught
    let_go(error)
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_planned_parts_stand_beside_those_in_use() -> None:
    gib = 2**30
    planned = {"weights, 16 bits": gib, "weights, quantized": 3 * gib, "adapters": gib, "working memory": gib}
    rest = "activations, gradients and what is worked in"
    lines = compare_parts(planned, {"weights": 4 * gib, "adapters": gib, "optimizer state": 0, rest: 2 * gib})
    table = {line[:46].strip(): line[46:].split() for line in lines}
    assert table["weights"] == ["4.00", "4.00"]
    assert table[rest] == ["1.00", "2.00"]
    assert table["together"] == ["6.00", "7.00"]


def test_the_error_names_the_step_and_what_took_the_memory() -> None:
    error = OutOfMemory(4, None, {"weights": 2**30}, "CUDA out of memory")
    assert "step 5" in str(error)
    assert "weights 1.00 GiB" in str(error)


def test_standing_parts_are_those_of_the_model_and_its_adapters() -> None:
    model = tiny.peft_model()
    parts = standing_parts(model, None)
    trained = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    assert parts["adapters"] == trained
    assert parts["weights"] == sum(value.nbytes for value in model.parameters()) - trained
    assert parts["optimizer state"] == 0
