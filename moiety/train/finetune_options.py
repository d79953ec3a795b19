"""How to fine-tune: the options, apart from the code so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moiety.fields import check_types, not_negative, option, positive, require
from moiety.train.options import ScheduleName, TrainOptions

__all__ = ["FinetuneOptions", "TooLong", "Turns"]

Turns = Literal["all", "last", "each"]
TooLong = Literal["drop", "cut", "refuse"]
BALANCE = 1e-3  # of the balance loss where the router trains and the model's config names none


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """What is learnt of which samples, by which parameters, and how fast."""

    train: tuple[str, ...] = option(
        ("full",),
        help="what trains, as NAME or NAME=LEARNING_RATE: full (all but routers), experts, shared, dense, attention, "
        "norm, embedding, head, router, adapters (LoRA)",
    )
    epochs: float = option(1.0, help="times that each sample is seen; --steps counts instead")
    steps: int = option(0, help="optimizer steps; 0 takes the epochs")
    batch: int = option(
        8, help="room of a micro-batch: as many whole samples as fit into so many times --length"
    )
    accumulate: int = option(1, help="micro-batches in a step")
    length: int = option(0, help="most tokens in a sample; 0 takes the model's longest, at most 1024")
    pack: bool = option(True, help="samples behind each other, none seeing another; otherwise padded rows")
    turns: Turns = option(
        "all", help="which answers of a chat are learnt: all, last, or each as its own sample"
    )
    too_long: TooLong = option("drop", help="what becomes of longer samples: drop, cut or refuse")
    held_out: float = option(0.05, help="share of the samples to evaluate on, chosen by their content")
    learning_rate: float = option(1e-5, help="highest learning rate of what has none of its own")
    schedule: ScheduleName = option("cosine", help="cosine, or wsd: constant, then a linear fall")
    warmup: float = option(0.03, help="share of the steps with a linear rise")
    final_rate: float = option(0.1, help="learning rate at the end, as a share of the highest")
    weight_decay: float = option(0.0, help="AdamW's, on matrices only")
    clip: float = option(1.0, help="largest norm of the whole gradient; 0 means no clipping")
    balance: str = option(
        "auto",
        help="coefficient of the balance loss; auto is 0 for frozen routers, else the model's own or 0.001",
    )
    beta: float = option(0.1, help="of pairs: how much the answers' odds may leave the model's before (DPO)")
    dtype: Literal["bf16", "fp32"] = option("fp32", help="bf16 is autocast with float32 master weights")
    seed: int = option(0, help="seed of the order of samples")
    evaluate_every: int = option(0, help="steps between evaluations; 0 means only at the end")
    save_every: int = option(0, help="steps between checkpoints; 0 means only at the end")
    keep: int = option(2, help="checkpoints to keep")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "epochs")
        not_negative(self, "steps", "length")
        for name in ("held_out", "warmup"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; allowed is 0 to below 1")
        positive(self, "beta")
        require(bool(self.train), "train names nothing", "--train full, for instance")
        if self.balance != "auto":
            try:
                value = float(self.balance)
            except ValueError:
                value = -1.0
            require(
                0 <= value < float("inf"),
                f"balance is {self.balance!r}; allowed is auto or a number from 0 on",
            )
        self.of_training(
            steps=1, length=1, balance=0.0, z=0.0, routers_train=True
        )  # the rest is checked there

    @property
    def adapts(self) -> bool:
        """True if an adapter is trained."""
        return any(text.partition("=")[0] == "adapters" for text in self.train)

    def balance_of(self, own: float, routers_train: bool) -> float:
        """The coefficient of the balance loss.

        Args:
            own: The one in the model's config.
            routers_train: Whether routers do.
        """
        if self.balance != "auto":
            return float(self.balance)
        return (own or BALANCE) if routers_train else 0.0

    def of_training(
        self, *, steps: int, length: int, balance: float, z: float, routers_train: bool
    ) -> TrainOptions:
        """The options of the loop."""
        return TrainOptions(
            steps=steps,
            batch=self.batch,
            accumulate=self.accumulate,
            length=length,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=round(self.warmup * steps),
            final_rate=self.final_rate,
            weight_decay=self.weight_decay,
            clip=self.clip,
            down_rate=1.0,
            freeze_router=not routers_train,
            losses=(f"load={balance}", f"z={z}"),
            balance_scope="step" if balance else "micro_batch",
            dtype=self.dtype,
            seed=self.seed,
            evaluate_every=self.evaluate_every,
            save_every=self.save_every,
            keep=self.keep,
        )
