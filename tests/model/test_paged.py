"""Paged steps: many sequences in one row are what each is alone, in every family, whatever pages it has."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moiety.config import ModelConfig
from moiety.errors import UsageError
from moiety.model.context import KVCache
from moiety.model.families import FAMILIES
from moiety.model.paged import PagedStep, PagePool
from moiety.model.transformer import Transformer
from tests import tiny
from tests.families import FAMILY_SETTINGS, random_settings

# Tokens of each sequence in every step; the third begins with the first pages of the first.
SCHEDULE = ((16, 19, 0), (1, 4, 5), (0, 1, 1), (6, 1, 1), (1, 1, 2))
SHARED = 16
BY_PAGE = {4: "torch", 16: "cpu"}  # who computes attention over pages of so many tokens


def family_config(name: str, seed: int) -> ModelConfig:
    said = transformers.AutoConfig.for_model(name, **random_settings(name, seed)).to_dict()
    return FAMILIES[name].read(said)


def made(config: ModelConfig) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(config)
    tiny.fill(model)
    return model.eval()


def alone(model: Transformer, tokens: Tensor, counts: list[int]) -> Tensor:
    """Logits of one sequence in the pieces of the schedule, with a cache of its own."""
    cache = KVCache(model.config, 1, len(tokens))
    pieces = [model(piece[None], cache=cache).logits[0] for piece in tokens.split(counts)]
    return torch.cat(pieces)


@torch.no_grad()
def paged_error(model: Transformer, page: int, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference between the ragged run and each sequence alone, in units of the logits' spread."""
    totals = [sum(step[one] for step in SCHEDULE) for one in range(3)]
    tokens = [torch.randint(model.config.vocab_size, (total,)) for total in totals]
    tokens[2] = torch.cat([tokens[0][:SHARED], tokens[2]])
    free = random.Random(2).sample(range(40), 40)
    tables = [[free.pop() for _ in range(-(-len(row) // page))] for row in tokens]
    tables[2][: SHARED // page] = tables[0][: SHARED // page]
    pool, starts = PagePool(model.config, 40, page, dtype=dtype), [0, 0, SHARED]
    for part in pool.parts:
        part.fill_(float("nan"))  # nobody may look at what nobody wrote
    found: list[list[Tensor]] = [[], [], []]
    for counts in SCHEDULE:
        present = [one for one in range(3) if counts[one]]
        step = PagedStep(
            pool, [tables[i] for i in present], [starts[i] for i in present], [counts[i] for i in present]
        )
        if model.config.attention.mla is None:
            assert step.choice(torch.empty(0), model.config.attention.head_dim).name == BY_PAGE[page]
        row = torch.cat([tokens[i][starts[i] : starts[i] + counts[i]] for i in present])
        output = model(row[None], cache=step)
        ends = torch.tensor([counts[i] for i in present]).cumsum(0)
        assert torch.allclose(output.at(ends - 1), output.logits[0, ends - 1], atol=1e-5)
        for one, logits in zip(present, output.logits[0].split([counts[i] for i in present]), strict=True):
            found[one].append(logits)
            starts[one] += counts[one]
    worst = 0.0
    for one in range(3):
        pieces = [step[one] for step in SCHEDULE if step[one]]
        old = SHARED if one == 2 else 0  # in one piece, as the first sequence wrote them
        wanted = alone(model, tokens[one], [old, *pieces] if old else pieces)[old:]
        worst = max(worst, float((torch.cat(found[one]) - wanted).abs().max() / wanted.std()))
    return worst


@pytest.mark.parametrize("page", BY_PAGE)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FAMILY_SETTINGS)
def test_every_family_in_pages_is_every_sequence_alone(name: str, seed: int, page: int) -> None:
    config = family_config(name, seed)
    assert paged_error(made(config), page) < 2e-4, config


@pytest.mark.parametrize("page", BY_PAGE)
@pytest.mark.parametrize(
    "changes",
    [
        {"sinks": True, "logit_cap": 2.0, "window": 3, "window_layers": (1,)},
        {"window": 5, "chunked": True, "rope_layers": (0, 2), "query_scale": 0.3, "query_scale_floor": 2},
        {"qk_norm": "head_rotated", "clip_qkv": 0.8, "rope_fraction": 0.7, "rope_pairs": "interleaved"},
        {"qk_norm": "l2_rotated", "scale": 0.7, "rope_layers": (1,), "kv_heads": 1},
    ],
)
def test_options_that_few_families_have(changes: dict[str, Any], page: int) -> None:
    model = made(tiny.config(attention=tiny.attention(**changes), moe=tiny.experts()))
    assert paged_error(model, page) < 2e-4


def test_sizes() -> None:
    config = tiny.config(attention=tiny.attention(head_dim=32))
    pool = PagePool(config, 7, 16, dtype=torch.bfloat16)
    assert pool.size_bytes == KVCache(config, 7, 16, dtype=torch.bfloat16).size_bytes == 7 * pool.page_bytes


@torch.no_grad()
def test_tokens_that_do_not_fit_the_step_are_refused() -> None:
    model = made(tiny.config())
    step = PagedStep(PagePool(model.config, 3), [[2], [0, 1]], [3, 17], [2, 1])
    assert step.positions().tolist() == [3, 4, 17]
    with pytest.raises(UsageError, match=r"for 3 tokens in one row and \(1, 4\) were given"):
        model(tiny.tokens(model, 1, 4), cache=step)
    with pytest.raises(UsageError, match="no padding"):
        model(tiny.tokens(model, 1, 3), cache=step, valid_BS=torch.ones(1, 3, dtype=torch.bool))


def test_two_sequences_never_write_one_page() -> None:
    pool = PagePool(tiny.config(), 4, 4)
    PagedStep(pool, [[0, 1], [0, 2]], [4, 5], [2, 1])
    with pytest.raises(AssertionError, match="same page"):
        PagedStep(pool, [[0, 1], [1, 2]], [4, 3], [2, 1])
    with pytest.raises(AssertionError):
        PagedStep(pool, [[0, 1]], [4], [5])
