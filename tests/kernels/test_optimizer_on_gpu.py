from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("signed", [True, False])
def test_code_is_the_nearest_for_every_fp32_number_from_minus_one_to_one(signed: bool) -> None:
    from nearest_codes import nearest_codes, thresholds, wanted_codes

    device = torch.device("cuda")
    table = thresholds(device, signed)
    one = int(torch.ones(1).view(torch.int32))
    step = 1 << 27
    for start in range(0, one + 1, step):
        bits = torch.arange(start, min(start + step, one + 1), dtype=torch.int32, device=device)
        for values in (bits.view(torch.float32), *((-bits.view(torch.float32),) if signed else ())):
            assert torch.equal(nearest_codes(values, table, signed), wanted_codes(values, table))
