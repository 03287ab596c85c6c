from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import zero_run

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra"),
]

STRATEGIES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_generic", "zero3_from_ddp")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return zero_run.launch(
        out,
        "ddp=ddp,dtype=bfloat16",
        "zero1=zero1,dtype=bfloat16",
        "zero2=zero2,dtype=bfloat16",
        "zero3=zero3,dtype=bfloat16",
        "zero2_offload=zero2,dtype=bfloat16,distributed_offload=optimizer",
        "zero3_offload=zero3,dtype=bfloat16,distributed_offload=all",
        "zero3_generic=zero3,dtype=bfloat16,fused=no",
        f"zero3_from_ddp=zero3,dtype=bfloat16,resume={out}/ddp/checkpoint-2",
        "ddp_in_fp32=ddp",
        "zero2_offload_in_fp32=zero2,distributed_offload=optimizer",
        "zero3_offload_in_fp32=zero3,distributed_offload=all",
        device="cuda",
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_gpus_have_the_losses_and_norms_of_ddp(strategy, results):
    # In bf16 the generic path rounds elsewhere than the fused block.
    bound = 2e-2 if strategy == "zero3_generic" else 2e-3
    found, wanted = results[strategy], results["ddp"]
    for key in ("losses", "eval_losses"):
        assert found[key] == pytest.approx(wanted[key], rel=bound), key
    assert found["norms"][:2] == pytest.approx(wanted["norms"][:2], rel=bound)
    # The optimizer is ours, PyTorch's on a GPU or PyTorch's on a CPU, so adapters differ in the last places of fp32,
    # and a few fall on the other side of a rounding to bf16. Later norms hang upon those: in 20 runs of this model on a
    # CPU by one process (wide=yes,nudge=1 and so on), the fourth lay up to 0.6% apart, its loss 0.03%; in fp32 the norm
    # was within 1e-6. So an error of the offload would show there, in the next test.
    assert found["norms"][2:] == pytest.approx(wanted["norms"][2:], rel=max(bound, 1e-2))


@pytest.mark.parametrize("strategy", ["zero2_offload_in_fp32", "zero3_offload_in_fp32"])
def test_offload_has_the_losses_and_norms_of_ddp_in_fp32_to_its_rounding(strategy, results):
    for key in ("losses", "norms", "eval_losses"):
        assert results[strategy][key] == pytest.approx(results["ddp_in_fp32"][key], rel=1e-4), key


@pytest.mark.parametrize("strategy", ["ddp", *STRATEGIES])
def test_an_adapter_is_weighed_once_whoever_holds_its_parts(strategy, results):
    assert results[strategy]["weighed"] == {"A": [1.0], "B": [0.5]}


def test_a_gpu_holds_its_share_of_the_base(results):
    whole = results["ddp"]["held"]["base_layer.weight"]
    scales = 512 * 512 // 64
    for strategy in ("zero3", "zero3_offload"):
        assert results[strategy]["held"]["base_layer.weight"] == (whole + scales) // 2
    for strategy in ("zero1", "zero2"):
        assert results[strategy]["held"]["base_layer.weight"] == whole


def test_one_gpu_goes_on_where_two_stopped(out, results):
    checkpoint = out / "zero3" / "checkpoint-2"
    case = f"one=auto,dtype=bfloat16,gradient_accumulation_steps=4,resume={checkpoint}"
    found = zero_run.launch(out / "one", case, processes=1, device="cuda")
    assert found["one"]["losses"] == pytest.approx(results["ddp"]["losses"], rel=2e-3)
