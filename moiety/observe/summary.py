"""From a finished race to what a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from time import perf_counter

import numpy as np
import torch

from moiety import cost
from moiety.infer.generate import generate
from moiety.infer.options import SamplingOptions
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.observe.report import (
    CorpusDomain,
    EvaluationPoint,
    ExpertTokens,
    Generation,
    HealthPoint,
    RoutedText,
    RoutedToken,
    Run,
    TrainingPoint,
)
from moiety.observe.stats import Specialization, counts_by_group, specialization_of_sequences, top_tokens
from moiety.train.compare import Contender
from moiety.train.data import TokenData
from moiety.train.evaluate import Evaluation, real_tokens
from moiety.train.loop import StepRecord

__all__ = [
    "corpus_of",
    "decode_speed",
    "favourite_tokens",
    "generations",
    "health_of",
    "route_text",
    "run_of",
    "specialization_of",
]

POINTS = 200  # a curve is thinned to about this many
HEALTH_POINTS = 40
SEQUENCES_PER_DOMAIN = 16  # read for the favourite tokens


def corpus_of(data: TokenData) -> tuple[CorpusDomain, ...]:
    """The training text by domain."""
    return tuple(
        CorpusDomain(name=name, size_bytes=size["size_bytes"], documents=size["documents"])
        for name, size in data.sizes().items()
    )


def run_of(contender: Contender) -> Run:
    """One contender's curves and figures; measures its decoding speed."""
    counts = contender.parameters
    records = [record for record in contender.records if not record.skipped]
    return Run(
        name=contender.name,
        kind="dense" if contender.config.moe is None else "moe",
        parameters_total=counts.total,
        parameters_active=counts.active,
        flops_per_token=cost.flops_per_token(contender.config, contender.options.length // 2).total,
        training=tuple(
            TrainingPoint(
                step=record.state.step,
                tokens=record.state.tokens_seen,
                loss=record.loss,
                seconds=record.state.seconds,
            )
            for record in _thinned(records, POINTS)
        ),
        evaluation=tuple(
            EvaluationPoint(step=record.state.step, domain=domain, bits_per_byte=bits)
            for record in contender.records
            if record.evaluation is not None
            for domain, bits in record.evaluation.bits_per_byte.items()
        ),
        final_bits_per_byte=contender.evaluation.bits_per_byte,
        train_tokens_per_s=contender.tokens_per_second,
        decode_tokens_per_s=decode_speed(contender.build()),
    )


def _thinned(records: Sequence[StepRecord], points: int) -> list[StepRecord]:
    """About `points` records, the last one always among them."""
    some = list(records[:: max(len(records) // points, 1)])
    return some if not records or some[-1] is records[-1] else [*some, records[-1]]


def decode_speed(model: Transformer, *, tokens: int = 64) -> float:
    """Tokens per second of plain generation at batch 1, the first eighth left out as warm-up."""
    stream = generate(model, [0], max_tokens=tokens, sampling=SamplingOptions(temperature=0))
    for _ in range(tokens // 8):
        next(stream)
    begun = perf_counter()
    count = sum(1 for _ in stream)
    return count / (perf_counter() - begun)


def health_of(contender: Contender) -> tuple[HealthPoint, ...]:
    """The router's health over the run, thinned."""
    records = [record for record in contender.records if record.health]
    return tuple(
        HealthPoint(
            step=record.state.step,
            layer=layer,
            load_E=tuple(float(load) for load in health.load_E),
            max_vio=health.max_vio,
            load_entropy=health.load_entropy,
            dead=health.dead,
        )
        for record in _thinned(records, HEALTH_POINTS)
        for layer, health in record.health.items()
    )


def specialization_of(evaluation: Evaluation, data: TokenData, layers: Sequence[int]) -> Specialization:
    """Which expert takes which domain in an evaluation of an MoE."""
    assert evaluation.counts_SLE is not None, "a dense model has no routing"
    return specialization_of_sequences(
        evaluation.counts_SLE,
        evaluation.domain_S,
        data.domains,
        layers=list(layers),
        experts_L=evaluation.experts_L,
    )


@torch.no_grad()
def favourite_tokens(model: Transformer, data: TokenData, tokenizer: Tokenizer) -> tuple[ExpertTokens, ...]:
    """For every expert of every MoE layer the tokens it gets most, on held-out text."""
    length, seen_V = model.config.max_positions, np.zeros(model.config.vocab_size, np.int64)
    counts: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
    held_out = data.sizes("held_out")
    for domain in (name for name in data.domains if held_out[name]["documents"]):
        for batch in data.evaluation(domain, B=8, S=length, limit=SEQUENCES_PER_DOMAIN):
            valid_BS = real_tokens(batch.targets_BS)
            tokens_T = batch.tokens_BS.reshape(-1)
            seen_V += np.bincount(batch.tokens_BS[valid_BS].numpy(), minlength=len(seen_V))
            for layer, routing in model(batch.tokens_BS, valid_BS=valid_BS).routing.items():
                found = counts_by_group(routing, tokens_T, len(seen_V))
                counts[layer] = counts[layer] + found if layer in counts else found
    return tuple(
        ExpertTokens(
            layer=layer,
            expert=expert,
            tokens=tuple((tokenizer.decode([one.token_id]), one.share, one.occurrences) for one in shares),
        )
        for layer, counts_VE in counts.items()
        for expert, shares in enumerate(top_tokens(counts_VE, seen_V, best=8))
    )


@torch.no_grad()
def route_text(model: Transformer, tokenizer: Tokenizer, text: str) -> RoutedText:
    """A text token by token with the experts and weights of every MoE layer."""
    ids = tokenizer.encode(text)[: model.config.max_positions]
    routing = model(torch.tensor([ids])).routing
    dense = [one.dense() for one in routing.values()]
    tokens = []
    for place, token in enumerate(ids):
        choices = []
        for weight_TE in dense:
            experts = weight_TE[place].nonzero()[:, 0].tolist()
            choices.append(tuple((expert, float(weight_TE[place, expert])) for expert in experts))
        tokens.append(RoutedToken(text=tokenizer.decode([token]), choices_L=tuple(choices)))
    return RoutedText(layers=tuple(routing), tokens=tuple(tokens))


def generations(
    contenders: Sequence[Contender], tokenizer: Tokenizer, prompts: Sequence[str], *, tokens: int = 40
) -> tuple[Generation, ...]:
    """What each contender writes after each prompt."""
    sampling = SamplingOptions(temperature=0.6, top_p=0.9)
    written = []
    for prompt in prompts:
        for contender in contenders:
            stream = generate(
                contender.build(),
                tokenizer.encode(prompt),
                max_tokens=tokens,
                sampling=sampling,
                end_id=tokenizer.end_id,
            )
            text = tokenizer.decode(list(islice(stream, tokens)))
            written.append(Generation(run=contender.name, prompt=prompt, text=text))
    return tuple(written)
