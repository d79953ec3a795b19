"""What another engine made of a model of ours, held against the model: the same measure for every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from moiety.model.transformer import Transformer


class Found(NamedTuple):
    """Greedy tokens that are ours too, of how many, and the largest difference of a log probability."""

    equal: int
    tokens: int
    worst: float

    def show(self, engine: str, what: str) -> None:
        """A row of the table in docs/interop.md."""
        print(f"\n| {engine} | {what} | {self.equal} of {self.tokens} | {self.worst:.1e} |")


def compare(
    model: Transformer,
    prompt: Sequence[int],
    tokens: Sequence[int],
    steps: Sequence[Mapping[str, float]],
    tolerance: float,
) -> Found:
    """Hold an engine's log probabilities and its greedy tokens against ours at the same places.

    A token counts as equal where it is our best; one that is not must be as good as ours to the tolerance.

    Args:
        model: Ours.
        prompt: Tokens it was given.
        tokens: Tokens it went on with.
        steps: Log probability by token, for the last places of prompt and tokens.
        tolerance: Largest difference allowed.
    """
    assert len(tokens) > 0 and len(steps) >= len(tokens)
    with torch.no_grad():
        logits_SV = model(torch.tensor([[*prompt, *tokens]])).logits[0, -len(steps) - 1 : -1]
    ours_SV = logits_SV.float().log_softmax(-1)
    largest = []
    for ours_V, theirs in zip(ours_SV, steps, strict=True):
        assert len(theirs) > 100, f"log probabilities of {len(theirs)} tokens only"
        at = torch.tensor([int(token) for token in theirs])
        largest.append((ours_V[at] - torch.tensor(list(theirs.values()))).abs().max())
    worst = float(torch.stack(largest).max())
    assert worst < tolerance, f"a log probability differs by {worst:.2g}"  # not a number fails too
    chosen_SV = ours_SV[-len(tokens) :]
    behind_S = chosen_SV.max(-1).values - chosen_SV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    behind = float(behind_S.max())
    assert behind < 2 * tolerance, f"a greedy token is behind ours by {behind:.2g}"
    return Found(int((behind_S == 0).sum()), len(tokens), worst)
