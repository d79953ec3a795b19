"""The table of devices: every figure is there, with a source and a date, and names that nobody has are refused."""

from __future__ import annotations

import re

import pytest

from moiety.errors import ConfigError
from moiety.plan.hardware import API_PRICES, DEVICES, DISK, KINDS, Band, device_named, flops_of

DATE = re.compile(r"20\d\d(-\d\d)?$")


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_has_a_source_and_a_date(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name and device.kind in KINDS
    assert len(device.source) > 5 and DATE.match(device.date), device
    assert 1e9 < device.memory_bytes < 1e12 and 1e10 < device.bandwidth < 1e13
    assert 1e9 < device.link <= device.bandwidth and device.host_link > 1e9
    assert 0 < device.flops["fp32"] <= device.flops["bf16"] <= device.flops["fp8"]
    if device.price is not None:
        assert 0 < device.price.band.low <= device.price.band.high < 50, device.price
        assert device.price.source and DATE.match(device.price.date)


def test_what_datasheets_say() -> None:
    assert DEVICES["h100"].bandwidth == 3.35e12 and DEVICES["h100"].memory_bytes == 80e9
    assert DEVICES["h200"].memory_bytes == 141e9 and DEVICES["mi300x"].memory_bytes == 192e9
    assert DEVICES["a100-40"].memory_bytes == 40e9 and DEVICES["a100"].bandwidth == 2.039e12
    assert DEVICES["l4"].bandwidth == 300e9 and DEVICES["l4"].memory_bytes == 24e9
    assert {"l40s", "rtx-3090", "rtx-4090", "rtx-5090", "m4-max", "m3-ultra", "pc-32"} <= DEVICES.keys()


def test_shares_are_shares() -> None:
    for kind in KINDS.values():
        assert 0 < kind.decode.low < kind.decode.high <= 1 and 0 < kind.prefill.low < kind.prefill.high <= 1
        assert 0 < kind.usable <= 1 and kind.runtime_bytes > 0 and kind.source
    assert DISK.low < DISK.high and Band(1, 3).middle == 2
    assert all(one.source and DATE.match(one.date) and one.prompt <= one.answer for one in API_PRICES)


def test_names() -> None:
    assert device_named("RTX 4090") is device_named("rtx_4090") is DEVICES["rtx-4090"]
    with pytest.raises(ConfigError, match="no device 'h10'") as failed:
        device_named("h10")
    assert "did you mean 'h100'" in (failed.value.hint or "") and "mi300x" in (failed.value.hint or "")


def test_arithmetic_by_format() -> None:
    h100 = DEVICES["h100"]
    assert flops_of(h100, 8, "fp8") == flops_of(h100, 8.5, "int8-g32") == h100.flops["fp8"]
    assert flops_of(h100, 16, "bf16") == flops_of(h100, 4.5, "int4-g32") == h100.flops["bf16"]
    assert flops_of(h100, 32, "fp32") == h100.flops["fp32"]
