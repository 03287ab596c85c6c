from __future__ import annotations

import pytest
import torch

from fourfold.inference.transfers import Arriving, to_device


def test_numbers_arrive_as_they_were() -> None:
    sent = to_device([[1, 2], [3, -4]], torch.int64, "cpu")
    one, two = Arriving(sent, sent.float()).wait()
    assert one.tolist() == [[1, 2], [3, -4]]
    assert two.dtype == torch.float32
    assert Arriving().wait() == []


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device_and_reads_what_it_had_computed() -> None:
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(400_000_000)
    sent = to_device([1, 2, 3], torch.int64, "cuda")
    arriving = Arriving(sent * 2)
    busy.record()
    assert not busy.query()
    sent.zero_()
    assert arriving.wait()[0].tolist() == [2, 4, 6]
