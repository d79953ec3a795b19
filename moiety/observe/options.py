"""What an inspection is made on: the options, apart from the code so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moiety.fields import check_types, not_negative, option

__all__ = ["AblateOptions", "InspectOptions"]


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What to look at, and what a file does not say itself."""

    data: tuple[str, ...] = option(
        (), help="held-out text: FILE, folder, FILE:domain=NAME or hf:ID; none is a run's own or the default"
    )
    prompt: str = option("", help="text to show token by token; '' takes held-out text")
    paraphrases: str = option("", help='file with ["one", "other"] on each line: does the choice stay?')
    tokenizer: str = option("", help="of a trace: a model whose tokenizer it used")
    experts: int = option(0, help="of others' files that do not say: experts of a layer")
    layers: int = option(0, help="of the same: blocks of the model")
    top_k: int = option(0, help="of the same: experts per token")

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "experts", "layers", "top_k")


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """What a model is tried without."""

    ablate: bool = option(False, help="instead: score text with experts off, another k, other temperatures")
    off: str = option("", help="--ablate: how many experts of each token are off; commas between")
    k: str = option("", help="--ablate: experts per token; commas between")
    temperatures: str = option("", help="--ablate: of the router; commas between")
