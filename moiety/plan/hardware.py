"""Devices as published: memory, bandwidth, arithmetic, links and prices, each with its source and date.

Sizes and rates are decimal, arithmetic is dense (without 2:4 sparsity) and accumulates in 32 bits where the maker tells
the two apart. How much of such a limit programs reach is in `Kind`, a wide band on purpose. A machine that was measured
(`moiety plan --measure`) is planned by its own figures instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moiety.errors import ConfigError

__all__ = [
    "API_PRICES",
    "DEVICES",
    "DISK",
    "KINDS",
    "ApiPrice",
    "Band",
    "Device",
    "Kind",
    "Sourced",
    "device_named",
    "flops_of",
]


class Band(NamedTuple):
    """The least and the most that is expected."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Half way."""
        return (self.low + self.high) / 2


class Sourced(NamedTuple):
    """A band, who says so, and when."""

    band: Band
    source: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What programs reach of a device's published limits.

    Args:
        decode: Share of the bandwidth while tokens are drawn.
        prefill: Share of the arithmetic while a prompt is read.
        usable: Share of the memory that a model may take.
        runtime_bytes: What a process takes before any weight.
        source: Where the shares are from.
    """

    decode: Band
    prefill: Band
    usable: float
    runtime_bytes: float
    source: str


KINDS: Mapping[str, Kind] = {
    "gpu": Kind(
        decode=Band(0.35, 0.85),
        prefill=Band(0.25, 0.65),
        usable=0.92,
        runtime_bytes=1.5e9,
        source="assumed; vLLM 0.32 takes 92 % of the memory by default",
    ),
    "mac": Kind(
        decode=Band(0.5, 1.0),
        prefill=Band(0.3, 0.8),
        usable=0.75,
        runtime_bytes=0.5e9,
        source="gpt-oss-20b reaches its limit on an M-series (Hugging Face, 2026-02); the rest is assumed",
    ),
    "desktop": Kind(
        decode=Band(0.45, 0.8),
        prefill=Band(0.1, 0.5),
        usable=0.9,
        runtime_bytes=0.35e9,
        source="llama.cpp on two channels: 50 to 65 % (ik_llama.cpp issue 1075); the rest is assumed",
    ),
    "server": Kind(
        decode=Band(0.15, 0.5),
        prefill=Band(0.05, 0.35),
        usable=0.9,
        runtime_bytes=0.35e9,
        source="15 to 35 % end to end, kernels up to 85 % (SGLang on Xeon 6, 2025-07); the rest is assumed",
    ),
}
# A disk of which nothing is known: 690 MB/s of a cloud volume to 4.1 GB/s of an NVMe at reads of 8 MiB.
DISK = Band(0.7e9, 4.1e9)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device. Bytes and bytes per second are decimal; `flops` are per second by dtype.

    Args:
        name: As the command line takes it.
        kind: Of `KINDS`.
        memory_bytes: Of one device.
        bandwidth: Of its memory.
        flops: By dtype: fp32, bf16, fp8, int8.
        link: To the next device, in one direction.
        network: Of one device to another host, in one direction.
        host_link: To the host's memory.
        price: Dollars per hour.
        source: Of everything but the price.
        date: Of the source.
    """

    name: str
    kind: str
    memory_bytes: float
    bandwidth: float
    flops: Mapping[str, float]
    link: float
    host_link: float
    source: str
    date: str
    price: Sourced | None = None
    network: float = 12.5e9  # 100 Gbit/s Ethernet


# (spot, on demand) of a reseller's list.
_RUNPOD = "deploybase.ai, RunPod spot and on demand"
_PCIE4, _PCIE5 = 32e9, 64e9  # sixteen lanes, one direction


def _gpu(
    name: str,
    memory: float,
    bandwidth: float,
    tera: tuple[float, float, float],
    link: float,
    source: tuple[str, str],
    price: tuple[float, float] | Sourced | None = None,
    host_link: float = _PCIE4,
    network: float = 12.5,
) -> Device:
    """A row: GB, GB/s, TFLOP/s in bf16, fp8 (or int8) and fp32, link in GB/s, source and date, dollars an hour.

    The network is a port for each device in the maker's own system: 400 Gbit/s in DGX H100 and HGX B200 and with eight
    MI300X, 200 in DGX A100; else 100 Gbit/s Ethernet is assumed.
    """
    listed = Sourced(Band(*price), _RUNPOD, "2026-03") if price and not isinstance(price, Sourced) else price
    return Device(
        name=name,
        kind="gpu",
        memory_bytes=memory * 1e9,
        bandwidth=bandwidth * 1e9,
        flops={"bf16": tera[0] * 1e12, "fp8": tera[1] * 1e12, "fp32": tera[2] * 1e12},
        link=link * 1e9,
        host_link=host_link,
        source=source[0],
        date=source[1],
        price=listed,
        network=network * 1e9,
    )


def _host(
    name: str, kind: str, memory: float, bandwidth: float, tera: tuple[float, float], source: str, date: str
) -> Device:
    """A row of a Mac or a CPU: GB, GB/s, TFLOP/s in bf16 (or int8 products) and fp32."""
    return Device(
        name=name,
        kind=kind,
        memory_bytes=memory * 1e9,
        bandwidth=bandwidth * 1e9,
        flops={"bf16": tera[0] * 1e12, "fp8": tera[0] * 1e12, "fp32": tera[1] * 1e12},
        link=12.5e9,  # 100 Gbit/s Ethernet
        host_link=bandwidth * 1e9,
        source=source,
        date=date,
    )


# fmt: off
_H800 = ("DeepSeek-V3 report, arXiv 2412.19437, and H100 datasheet", "2024-12")
_H100, _A100 = ("NVIDIA H100 datasheet", "2024-02"), ("NVIDIA A100 datasheet", "2021-06")
_DDR5 = "two channels of DDR5-5600, JEDEC JESD79-5; 8 cores assumed"
_ADA, _AMPERE = ("NVIDIA Ada GPU architecture paper", "2023-01"), ("NVIDIA GA102 architecture paper", "2021-01")
_LISTED = (
    _gpu("h100", 80, 3350, (989, 1979, 67), 450, _H100, (2.69, 4.76), _PCIE5, 50),
    _gpu("h100-pcie", 80, 2000, (756, 1513, 51), 64, _H100, (1.99, 3.51), _PCIE5),
    _gpu("h800", 80, 3350, (989, 1979, 67), 200, _H800,
         Sourced(Band(2, 2), "assumed in arXiv 2412.19437", "2024-12"), _PCIE5, 50),
    _gpu("h200", 141, 4800, (989, 1979, 67), 450, ("NVIDIA H200 datasheet", "2024-11"), (3.59, 6.35), _PCIE5, 50),
    _gpu("b200", 180, 7700, (2250, 4500, 75), 900, ("NVIDIA HGX B200 datasheet", "2025-03"), (5.98, 10.57), _PCIE5, 50),
    _gpu("a100", 80, 2039, (312, 624, 19.5), 300, _A100, (1.39, 2.45), network=25),
    _gpu("a100-40", 40, 1555, (312, 624, 19.5), 300, _A100, network=25),
    _gpu("l4", 24, 300, (121, 242, 30.3), 32, ("NVIDIA L4 datasheet", "2023-03"), (0.44, 0.78)),
    _gpu("l40s", 48, 864, (362, 733, 91.6), 32, ("NVIDIA L40S datasheet", "2023-08"), (0.79, 1.40)),
    _gpu("rtx-3090", 24, 936, (71, 284, 35.6), 32, _AMPERE, (0.22, 0.39)),
    _gpu("rtx-4090", 24, 1008, (165, 330, 82.6), 32, _ADA, (0.34, 0.60)),
    _gpu("rtx-5090", 32, 1792, (209, 419, 104.8), 64, ("NVIDIA RTX Blackwell architecture paper", "2025-01"),
         (0.69, 1.22), _PCIE5),
    _gpu("mi300x", 192, 5300, (1307, 2614, 163.4), 448, ("AMD MI300X datasheet", "2023-12"),
         Sourced(Band(1.71, 1.85), "gpu.blog, TensorWave and Vultr", "2025"), _PCIE5, 50),
    _host("m2-ultra", "mac", 192, 800, (27.2, 27.2), "Apple, 2023-06; arithmetic of 76 cores by clock", "2023-06"),
    _host("m3-ultra", "mac", 512, 819, (28.4, 28.4), "Apple, 2025-03; arithmetic of 80 cores by clock", "2025-03"),
    _host("m4-max", "mac", 128, 546, (17.2, 17.2), "Apple, 2024-10; arithmetic of 40 cores by clock", "2024-10"),
    _host("m4-pro", "mac", 64, 273, (8.6, 8.6), "Apple, 2024-10; arithmetic of 20 cores by clock", "2024-10"),
    _host("pc-32", "desktop", 32, 89.6, (2.0, 1.0), _DDR5, "2021-10"),
    _host("pc-64", "desktop", 64, 89.6, (2.0, 1.0), _DDR5, "2021-10"),
    _host("laptop-16", "desktop", 16, 51.2, (0.6, 0.3), "two channels of DDR4-3200, JEDEC JESD79-4; 4 cores assumed",
          "2021-01"),
    _host("server-ddr5", "server", 768, 460.8, (20, 8), "twelve channels of DDR5-4800, AMD EPYC 9004 overview; "
          "arithmetic of 64 cores assumed", "2022-11"),
    _host("server-mrdimm", "server", 768, 844.8, (60, 12), "twelve channels of MRDIMM-8800, Intel Xeon 6 brief; "
          "arithmetic of 128 cores assumed", "2024-09"),
)
# fmt: on
DEVICES: Mapping[str, Device] = {device.name: device for device in _LISTED}


class ApiPrice(NamedTuple):
    """What a hosted model costs: dollars per million tokens."""

    name: str
    prompt: float
    answer: float
    source: str
    date: str


API_PRICES = (
    ApiPrice("deepseek-chat (V3)", 0.27, 1.10, "DeepSeek's list, prompt not cached", "2025-02"),
    ApiPrice("gpt-4-turbo", 10.0, 30.0, "OpenAI's list", "2023-11"),
)


def device_named(name: str) -> Device:
    """The device of this name.

    Raises:
        ConfigError: there is none.
    """
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key in DEVICES:
        return DEVICES[key]
    close = difflib.get_close_matches(key, DEVICES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"there is no device {name!r}", hint=f"{hint}there are cpu, {', '.join(DEVICES)}")


def flops_of(device: Device, bits: float, form: str = "") -> float:
    """Operations per second with weights of so many bits: 8-bit products for fp8 and int8, else bf16; fp32 in full."""
    if form in ("fp32", "f32"):
        return device.flops["fp32"]
    return device.flops["fp8" if form.startswith(("fp8", "int8")) and bits < 10 else "bf16"]
