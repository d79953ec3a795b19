"""Does an adapter do anything, and does all of it? Logits with and without it, and what each expert's addition is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moiety.backends.adapted import Lora
from moiety.model.adapter_files import Read, apply
from moiety.model.adapters import ACTIVE, activate, places
from moiety.model.transformer import Transformer
from moiety.moe.adapted import OneAdapted

__all__ = ["Addition", "Verdict", "check_adapter", "norms_of"]


class Addition(NamedTuple):
    """What an adapter adds to one matrix.

    Args:
        parameter: Which one.
        group: Part of the model.
        layer: Its block, None for the head.
        expert: Its number; None where there is one matrix.
        norm: Frobenius norm of scale B A.
        tokens: Share of the prompt's (token, expert) pairs that met it; 1 where all tokens do.
    """

    parameter: str
    group: str
    layer: int | None
    expert: int | None
    norm: float
    tokens: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """What an adapter does to some tokens.

    Args:
        additions: Of every matrix that it is for.
        moved: Largest change of a logit.
        agreement: Share of positions whose best token stayed the same.
        kl: Divergence of the answers with it from those without, nats per token.
        routers: Routers that it brings.
    """

    additions: tuple[Addition, ...]
    moved: float
    agreement: float
    kl: float
    routers: tuple[str, ...]

    @property
    def idle(self) -> list[Addition]:
        """Additions that are nothing."""
        return [one for one in self.additions if one.norm == 0]

    @property
    def acts(self) -> str:
        """ "whole", "part" or "nothing"."""
        if not self.moved > 0 or (len(self.idle) == len(self.additions) and not self.routers):
            return "nothing"
        return "part" if self.idle else "whole"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "acts": self.acts,
            "largest_logit_change": self.moved,
            "same_best_token": self.agreement,
            "kl_nats": self.kl,
            "routers": list(self.routers),
            "idle": len(self.idle),
            "additions": [one._asdict() for one in self.additions],
        }


@torch.no_grad()
def norms_of(lora: Lora) -> Tensor:
    """Frobenius norm of scale B A of each expert, (E,), without the product: tr(A^T B^T B A)."""
    found = []
    for expert in range(len(lora.b)):
        a, total = lora.a_of(expert).double(), 0.0
        for _, columns, b_FR in lora.parts(expert):
            b, part = b_FR.double(), a[columns]
            total += float(((b.t() @ b) * (part @ part.t())).sum())
        found.append(abs(lora.scale) * max(total, 0.0) ** 0.5)
    return torch.tensor(found)


@torch.no_grad()
def check_adapter(model: Transformer, read: Read, tokens_BS: Tensor, name: str = ACTIVE) -> Verdict:
    """Put an adapter on a model and see what changes.

    Args:
        model: Without it, in evaluation mode; it has it afterwards.
        read: The adapter.
        tokens_BS: What to look at, (B, S).
        name: What to call it.
    """
    before = model(tokens_BS).logits.float()
    apply(model, read, name)
    activate(model, name)
    output = model(tokens_BS)
    after = output.logits.float()
    shares = {
        layer: routing.counts_E.double() / max(routing.pairs, 1) for layer, routing in output.routing.items()
    }
    log_p, log_q = after.log_softmax(-1), before.log_softmax(-1)
    return Verdict(
        additions=tuple(_additions(model, name, shares)),
        moved=float((after - before).abs().max()),
        agreement=float((after.argmax(-1) == before.argmax(-1)).double().mean()),
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        routers=tuple(sorted(read.routers)),
    )


def _additions(model: Transformer, name: str, shares: Mapping[int, Tensor]) -> list[Addition]:
    found = []
    for place in places(model):
        layer = model.get_submodule(place.path)
        adapter = layer.leaves(name).get(place.leaf) if isinstance(layer, OneAdapted) else None
        if adapter is None:
            continue
        routed = place.group == "experts" and place.layer is not None
        for expert, norm in enumerate(norms_of(adapter.lora(adapter.a.dtype)).tolist()):
            share = float(shares[place.layer][expert]) if routed and place.layer is not None else 1.0
            one = expert if place.group == "experts" else None
            found.append(Addition(place.parameter, place.group, place.layer, one, norm, share))
    return found
