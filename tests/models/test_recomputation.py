"""What a block keeps from its forward to its backward pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fourfold.errors import ConfigError
from fourfold.models.recomputation import POLICIES, HostOffload, SavedTensors, offloaded_bytes, policies_of


def test_one_name_is_a_policy_for_all_layers_and_a_list_is_one_for_each() -> None:
    assert policies_of("full", 3) == ["full"] * 3
    assert policies_of(["none", "full"], 2) == ["none", "full"]


def test_an_unknown_policy_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="selective_offload"):
        policies_of("all", 2)
    with pytest.raises(ConfigError, match="2 names"):
        policies_of(["none", "none"], 3)


def test_gate_and_up_never_wait_in_host_memory() -> None:
    assert all("gate_up" not in policy.keeps for policy in POLICIES.values() if policy.offload)


def test_saved_tensors_are_given_once_and_not_held_after_it() -> None:
    tensor = torch.ones(3)
    held = weakref.ref(tensor)
    saved = SavedTensors([tensor])
    del tensor
    taken = saved.take()
    with pytest.raises(RuntimeError, match="twice"):
        saved.take()
    del taken
    gc.collect()
    assert held() is None


def test_off_cuda_offloaded_tensors_stay_where_they_are() -> None:
    tensors = [torch.randn(4), torch.randn(2, 2)]
    assert all(a is b for a, b in zip(HostOffload().save(tensors).take(), tensors, strict=True))


@pytest.mark.gpu
def test_many_layers_tensors_come_back_bit_for_bit_while_the_gpu_is_busy() -> None:
    offload = HostOffload()
    for _ in range(3):
        kept, saved = [], []
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(12):
            tensors = [torch.randn(1 << 20, device="cuda"), torch.randn(3, 5, device="cuda").bfloat16()]
            kept.append([tensor.cpu() for tensor in tensors])
            saved.append(offload.save(tensors))
            del tensors
            busy = busy @ busy * 1e-3
        for copies, one in zip(reversed(kept), reversed(saved), strict=True):
            back = one.take()
            busy = busy @ busy * 1e-3
            assert all(torch.equal(a.cpu(), b) for a, b in zip(back, copies, strict=True))


@pytest.mark.gpu
def test_rows_of_any_length_take_one_buffer_a_layer_as_large_as_the_longest() -> None:
    offload, layers = HostOffload(), 3
    for length in (1000, 3001, 17, 3001, 2048):
        kept = [
            [torch.randn(length, 7, device="cuda"), torch.randn(length, device="cuda").bfloat16()] for _ in range(3)
        ]
        copies = [[tensor.cpu() for tensor in tensors] for tensors in kept]
        saved = [offload.save(kept.pop(0)) for _ in range(layers)]
        for expected, one in zip(reversed(copies), reversed(saved), strict=True):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(one.take(), expected, strict=True))
        assert len(offload._free) == layers
        assert max(buffer.data.nbytes for buffer in offload._free) <= offloaded_bytes([3001 * 28, 3001 * 2])


@pytest.mark.gpu
def test_a_forward_pass_without_a_backward_pass_leaves_nothing_behind() -> None:
    offload = HostOffload()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        offload.save([torch.randn(1 << 22, device="cuda")])
    gc.collect()
    torch.cuda.synchronize()
    # The last two are still on their way.
    assert torch.cuda.memory_allocated() - before <= 2 * (1 << 24)
    taken = offload.save([torch.ones(8, device="cuda")]).take()
    assert float(taken[0].sum()) == 8.0
