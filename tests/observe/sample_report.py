"""A made-up comparison that looks real: an MoE, its dense twin, five domains, four layers of eight experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from moiety.observe.report import (
    CorpusDomain,
    EvaluationPoint,
    ExpertTokens,
    Generation,
    HealthPoint,
    ReportData,
    RoutedText,
    RoutedToken,
    Run,
    TrainingPoint,
)
from moiety.observe.stats import Specialization, specialization_of_sequences

FINAL = {"arithmetic": 1.31, "code": 1.62, "dialogue": 2.31, "prose": 2.28, "reference": 2.12}
LAYERS, EXPERTS, STEPS = 4, 8, 400
TEXT = (
    'def total(prices):\n    """Add up what a basket costs."""\n    return sum(prices)\n\n'
    "Q: What is 17 + 25?\nA: 42. That was easy!\n"
)


def run(
    kind: str,
    factor: float,
    *,
    name: str | None = None,
    step_s: float = 0.15,
    active: int = 1_240_000,
    tokens: int = 2048,
) -> Run:
    """One run whose bits/byte end at `FINAL` times `factor`."""
    generator = np.random.default_rng(len(kind))

    def fall(step: int) -> float:
        return 1 + 2.4 * math.exp(-step / 45) + 0.35 * math.exp(-step / 220) - 0.35 * math.exp(-STEPS / 220)

    moe = kind == "moe"
    final_bits = {d: bits * factor * (0.97 if moe and d == "code" else 1) for d, bits in FINAL.items()}
    steps = range(10, STEPS + 1, 10)
    training = tuple(
        TrainingPoint(
            step=step,
            tokens=step * tokens,
            seconds=step * step_s,
            loss=2.2 * factor * fall(step) + generator.normal(0, 0.05),
        )
        for step in steps
    )
    evaluation = tuple(
        EvaluationPoint(step=step, domain=domain, bits_per_byte=final * fall(step) / fall(STEPS))
        for step in range(40, STEPS + 1, 40)
        for domain, final in final_bits.items()
    )
    return Run(
        name=name or ("MoE, 8 experts, 2 active" if moe else "dense twin"),
        kind="moe" if moe else "dense",
        parameters_total=3_950_000 if moe else active,
        parameters_active=active,
        flops_per_token=2_480_000,
        training=training,
        evaluation=evaluation,
        final_bits_per_byte=final_bits,
        train_tokens_per_s=tokens / step_s,
        decode_tokens_per_s=212.0 if moe else 305.0,
        peak_memory_bytes=612_000_000 if moe else 455_000_000,
    )


def health(layers: int = LAYERS, experts: int = EXPERTS) -> tuple[HealthPoint, ...]:
    generator = np.random.default_rng(3)
    found = []
    tilt_LE = generator.normal(0, 1, (layers, experts))
    for step in range(20, STEPS + 1, 20):
        for layer in range(layers):
            share_E = np.exp(tilt_LE[layer] * (0.12 + 0.7 * math.exp(-step / 60)))
            share_E /= share_E.sum()
            load_E = share_E * experts
            entropy = -(share_E * np.log(share_E)).sum() / math.log(experts)
            found.append(
                HealthPoint(
                    step=step,
                    layer=layer,
                    load_E=tuple(load_E.tolist()),
                    max_vio=float(load_E.max() - 1),
                    load_entropy=float(entropy),
                    dead=0,
                )
            )
    return tuple(found)


def specialization(domains: tuple[str, ...] = tuple(FINAL)) -> Specialization:
    generator = np.random.default_rng(5)
    sequences = 120
    domain_S = np.arange(sequences) % len(domains)
    lean_DLE = (
        generator.normal(0, 1, (len(domains), LAYERS, EXPERTS)) * np.array([0.05, 0.35, 0.6, 0.8])[:, None]
    )
    share_SLE = np.exp(lean_DLE[domain_S] + generator.normal(0, 0.25, (sequences, LAYERS, EXPERTS)))
    share_SLE /= share_SLE.sum(-1, keepdims=True)
    return specialization_of_sequences(generator.multinomial(256, share_SLE), domain_S, domains, shuffles=100)


def routed_text(text: str = TEXT) -> RoutedText:
    generator = np.random.default_rng(7)
    tokens = []
    for piece in re.findall(r" ?\w+|\n|[^\w\n]", text):
        choices = []
        for layer in range(LAYERS):
            favourite = (
                (len(piece) * 3 + layer) % EXPERTS
                if generator.random() < 0.7
                else int(generator.integers(EXPERTS))
            )
            other = (favourite + int(generator.integers(1, EXPERTS))) % EXPERTS
            weight = float(generator.uniform(0.5, 0.95))
            choices.append(((favourite, weight), (other, 1 - weight)))
        tokens.append(RoutedToken(text=piece, choices_L=tuple(choices)))
    return RoutedText(layers=tuple(range(LAYERS)), tokens=tuple(tokens))


def top_tokens() -> tuple[ExpertTokens, ...]:
    words = [
        "def",
        " return",
        "self",
        " =",
        " 17",
        " +",
        "?",
        "!",
        " the",
        " and",
        "\n",
        "    ",
        " you",
        " is",
        ".",
        ",",
    ]
    generator = np.random.default_rng(11)
    return tuple(
        ExpertTokens(
            layer=layer,
            expert=expert,
            tokens=tuple(
                (str(word), share, int(generator.integers(20, 900)))
                for word, share in zip(
                    generator.choice(words, 6, replace=False),
                    sorted(generator.uniform(0.3, 1, 6).tolist())[::-1],
                    strict=True,
                )
            ),
        )
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    )


def sample_report(
    *,
    moe: float = 0.965,
    dense: float = 1.0,
    moe_step_s: float = 0.18,
    changes: Mapping[str, object] | None = None,
) -> ReportData:
    """The whole thing; `moe` and `dense` scale how good they get, `changes` replaces fields."""
    fields: dict[str, object] = {
        "title": "MoE against its dense twin",
        "host": "An example processor, 2 cores, torch 2.13.0, float32",
        "command": "moiety compare --seed 0 --minutes 2 --out runs/demo",
        "runs": (run("moe", moe, step_s=moe_step_s), run("dense", dense)),
        "corpus": tuple(
            CorpusDomain(name=d, size_bytes=1_500_000 + 10_000 * i, documents=320 * (i + 1))
            for i, d in enumerate(FINAL)
        ),
        "health": health(),
        "specialization": specialization(),
        "top_tokens": top_tokens(),
        "routed_text": routed_text(),
        "generations": (
            Generation(
                run="MoE, 8 experts, 2 active",
                prompt="def ",
                text="get_name(self):\n        return self._name\n",
            ),
            Generation(run="dense twin", prompt="def ", text="set(self, name):\n        self.name = self\n"),
            Generation(run="MoE, 8 experts, 2 active", prompt="12 + 30 = ", text="42\n18 + 21 = 39\n"),
        ),
        "notes": ("These are tiny models trained for a minute: ratios may differ at scale.",),
    }
    fields.update(changes or {})
    return ReportData(**fields)  # type: ignore[arg-type]
