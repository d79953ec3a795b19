"""What is to be planned: the options of `moiety plan`, and counts as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moiety.errors import ConfigError
from moiety.fields import check_types, not_negative, option, positive, require, size_bytes
from moiety.plan.estimate import KV_BYTES

__all__ = ["PlanOptions", "count_named"]

COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def count_named(text: str, name: str) -> float:
    """A count from a text such as 14.8T or 300B.

    Raises:
        ConfigError: another form, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmbt]?)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"{name} is {text!r}; allowed is a positive number and a unit of k, m, b, t",
            hint="14.8T or 300B for instance",
        )
    return float(found[1]) * COUNTS[found[2].lower()]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to plan a model for. Sizes have units: 12GiB, 24GB, 14.8T."""

    device: str = option(
        "cpu", help="cpu, this machine as measured; or a name such as h100, l4, rtx-4090, m4-max"
    )
    devices: int = option(1, help="how many of it")
    memory: str = option("", help="most that may be used, of all devices together; '' is what there is")
    batch: int = option(1, help="sequences that are answered together")
    context: int = option(4096, help="tokens for which each has room, prompt and answer")
    prompt: int = option(512, help="tokens of a prompt")
    format: str = option(
        "", help="of the weights: bf16, fp32, or as for `moiety quantize`; '' compares, or is as stored"
    )
    kv_dtype: str = option("", help="of keys and values: fp32, bf16, fp8; '' is bf16")
    hit_rate: float | None = option(
        None, help="of the experts that a token needs, the share in memory; none is as uniform routing"
    )
    disk_rate: str = option("", help="bytes per second of the disk, 3GB for instance; '' is as measured")
    price: float = option(0.0, help="dollars per hour of one device; 0 is the table's, if it has one")
    tokens_per_s: float = option(0.0, help="a claimed speed to check and to price; 0 is none")
    train_tokens: str = option("", help="tokens to train on, 14.8T for instance: hours, days, memory, cost")
    train_context: int = option(4096, help="tokens of a training sequence")
    capacity_factor: float = option(
        0.0, help="buffers of experts with this capacity, for a prompt; 0 is none"
    )
    train_step: str = option(
        "", help="tokens of a training step, 60M for instance; '' is 4 sequences a device"
    )
    ranks: int = option(1, help="over which experts are spread: bytes on the links, who holds what")
    nodes: int = option(1, help="that these ranks are on, as many on each")
    redundant: int = option(0, help="slots in each layer for copies of busy experts")
    placement: Literal["auto", "hierarchical", "global"] = option(
        "auto", help="pack experts by groups and nodes first, or over all ranks"
    )
    node_limit: int = option(0, help="as if no token were sent to more nodes than that; 0 is as routed")
    against: str = option("", help="another model, to say what is saved")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "devices", "batch", "context", "prompt", "ranks", "nodes", "train_context")
        not_negative(self, "price", "tokens_per_s", "capacity_factor", "redundant", "node_limit")
        require(
            self.hit_rate is None or 0 <= self.hit_rate <= 1,
            f"hit_rate is {self.hit_rate}; allowed is 0 to 1",
        )
        require(
            not self.kv_dtype or self.kv_dtype in KV_BYTES,
            f"kv_dtype is {self.kv_dtype!r}; allowed are {', '.join(KV_BYTES)}",
        )
        require(
            self.prompt <= self.context,
            f"prompt is {self.prompt}, context is {self.context}",
            "the context holds the prompt and the answer",
        )
        for name in ("memory", "disk_rate"):
            if getattr(self, name):
                size_bytes(getattr(self, name), name)
        for name in ("train_tokens", "train_step"):
            if getattr(self, name):
                count_named(getattr(self, name), name)
        require(
            self.train_tokens != "" or not self.train_step,
            "there is a training step and nothing to train on",
            "add --train-tokens",
        )
        require(
            self.ranks > 1
            or (self.nodes, self.redundant, self.placement, self.node_limit) == (1, 0, "auto", 0),
            f"nodes is {self.nodes}, redundant {self.redundant}, and ranks is 1",
            "nodes, redundant, placement and node_limit say how experts are spread: add --ranks",
        )
        require(
            self.ranks % self.nodes == 0,
            f"ranks is {self.ranks}, nodes is {self.nodes}",
            "the nodes must divide the ranks evenly",
        )
        require(
            not self.train_tokens or self.devices == 1 or self.devices % self.ranks == 0,
            f"devices is {self.devices}, ranks is {self.ranks}",
            "devices to train on must be as many as the ranks, or a multiple",
        )
        require(
            self.device == "cpu" or self.devices < 10**6,
            f"devices is {self.devices}; that many there are not",
        )
