"""How to train: the options, apart from the loop so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moiety.fields import check_types, not_negative, option, positive, require
from moiety.schedule import Schedule

__all__ = ["SCHEDULES", "HeldOutOptions", "ScheduleName", "TrainOptions"]

ScheduleName = Literal["cosine", "wsd"]
SCHEDULES: tuple[ScheduleName, ...] = ("cosine", "wsd")


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """Which held-out text a model is scored on."""

    batch: int = option(8, help="sequences at a time")
    length: int = option(0, help="tokens in a sequence; 0 takes the model's longest, at most 512")
    sequences: int = option(32, help="most sequences of a domain")
    bytes_per_domain: int = option(1_000_000, help="size of the default corpus")

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "length")
        positive(self, "batch", "sequences", "bytes_per_domain")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train. Everything that decides the result is here; what decides the model is `ModelConfig`."""

    steps: int = option(1000, help="optimizer steps")
    batch: int = option(16, help="sequences in a micro-batch")
    accumulate: int = option(1, help="micro-batches in a step")
    length: int = option(256, help="tokens in a sequence")
    learning_rate: float = option(1e-3, help="highest learning rate")
    schedule: ScheduleName = option("cosine", help="cosine, or wsd: constant, then a linear fall")
    warmup: int = option(50, help="steps of linear rise")
    final_rate: float = option(0.1, help="learning rate at the end, as a share of the highest")
    decay: float = option(0.2, help="share of the run that wsd spends falling")
    weight_decay: float = option(0.1, help="AdamW's, on matrices only")
    beta1: float = option(0.9, help="AdamW's decay of the first moment")
    beta2: float = option(0.95, help="AdamW's decay of the second moment")
    clip: float = option(1.0, help="largest norm of the whole gradient; 0 means no clipping")
    router_rate: float = option(1.0, help="factor on the routers' learning rate")
    down_rate: float = option(
        0.0, help="factor on the learning rate of down projections; 0 takes the number of experts per token"
    )
    freeze_router: bool = option(False, help="leave the routers as they are")
    router_warmup: int = option(0, help="steps in which tokens go to experts drawn evenly")
    explore: str = option("0", help="probability that a token does; a schedule, 0.2:0@1000 for instance")
    router_temperature: str = option(
        "1", help="the routers' logits are divided by it; a schedule that ends at 1"
    )
    soft_steps: int = option(
        0, help="steps over which the experts per token fall from all of them to their number"
    )
    expert_dropout: float = option(0.0, help="chance that an expert of mean load is away for a step")
    losses: tuple[str, ...] = option(
        (),
        help="further losses, NAME=COEFFICIENT, or a schedule as in load=0.05:0.01@1000; `moiety routers losses`",
    )
    balance_groups: int = option(0, help="groups of experts, one a device, for the losses over groups")
    balance_scope: Literal["step", "micro_batch", "sequence"] = option(
        "step",
        help="what the load in the balance loss is counted over; 'step' with accumulate > 1 costs a second forward",
    )
    dtype: Literal["bf16", "fp32"] = option("fp32", help="bf16 is autocast with float32 master weights")
    seed: int = option(0, help="seed of the weights and of the data order")
    evaluate_every: int = option(200, help="steps between evaluations; 0 means only at the end")
    evaluate_sequences: int = option(64, help="most held-out sequences of a domain in one evaluation")
    save_every: int = option(500, help="steps between checkpoints; 0 means only at the end")
    keep: int = option(2, help="checkpoints to keep")
    most_skips: int = option(10, help="non-finite steps in a row after which the run stops")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "steps", "batch", "accumulate", "length", "keep", "most_skips")
        require(self.seed < 2**63, f"seed is {self.seed}; allowed is 0 to 2**63 - 1")
        not_negative(
            self, "warmup", "weight_decay", "clip", "evaluate_every", "evaluate_sequences", "save_every"
        )
        not_negative(self, "seed", "router_warmup", "soft_steps", "balance_groups", "down_rate")
        for name in ("final_rate", "decay"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; allowed is 0 to 1")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; allowed is 0 to below 1")
        positive(self, "learning_rate", "router_rate")
        for text in self.losses:
            require(
                "=" in text, f"losses names {text!r}", "write NAME=COEFFICIENT, for instance importance=0.1"
            )
            Schedule.parse(text.partition("=")[2])
        low, high = Schedule.parse(self.explore).values
        require(0 <= low <= high <= 1, f"explore is {self.explore!r}; a probability is 0 to 1")
        temperature = Schedule.parse(self.router_temperature)
        require(
            temperature.values[0] > 0 and temperature.end == 1,
            f"router_temperature is {self.router_temperature!r}; it must be positive and end at 1",
            "a model with another temperature for good has the option temperature",
        )
        require(
            0 <= self.expert_dropout < 1, f"expert_dropout is {self.expert_dropout}; allowed is 0 to below 1"
        )
        require(
            not (self.freeze_router and self.router_rate != 1.0),
            "freeze_router leaves the routers alone, and router_rate is set as well",
            "set one of the two",
        )
