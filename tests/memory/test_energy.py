"""The energy meter against a library that counts as NVML does; no card is needed."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fourfold.memory.energy import EnergyMeter


@pytest.fixture
def nvml(monkeypatch) -> types.SimpleNamespace:
    """A card of one UUID that has used `millijoules`."""
    library = types.ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.millijoules = 5_000
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-1234": "card"}[uuid]

    def energy(handle: str) -> int:
        if library.millijoules is None:
            raise library.NVMLError("not supported")
        return {"card": library.millijoules}[handle]

    library.nvmlDeviceGetTotalEnergyConsumption = energy
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1234"))
    return library


def test_joules_are_those_since_the_meter_was_made(nvml) -> None:
    meter = EnergyMeter("cuda:0")
    nvml.millijoules += 2_500
    assert meter.joules() == 2.5


def test_a_card_that_does_not_tell_and_a_cpu_and_no_library_tell_nothing(nvml, monkeypatch) -> None:
    nvml.millijoules = None
    assert EnergyMeter("cuda").joules() is None
    assert EnergyMeter("cpu").joules() is None

    def no_driver() -> None:
        raise nvml.NVMLError("no driver")

    nvml.nvmlInit = no_driver
    assert EnergyMeter("cuda").joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter("cuda").joules() is None
