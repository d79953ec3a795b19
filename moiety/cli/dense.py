"""`moiety dense`: a Mixture-of-Experts made into one dense model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table
from moiety.train.options import HeldOutOptions

if TYPE_CHECKING:
    from moiety.train.dense import DenseReceipt

__all__ = ["app"]

app = command("moiety dense", "Make one dense model of a Mixture-of-Experts, its experts averaged.")


@app.default
def dense(
    model: str,
    target: str,
    /,
    *texts: str,
    steps: Annotated[int, Parameter(help="then distil from the model for so many; 0 only averages")] = 0,
    learning_rate: Annotated[float, Parameter(help="highest of the distillation")] = 1e-4,
    step_batch: Annotated[int, Parameter(help="sequences in a step of the distillation")] = 8,
    text: Annotated[HeldOutOptions, Parameter(name="*")] = HeldOutOptions(),
    json: Annotated[bool, Parameter(negative="", help="print the receipt as JSON")] = False,
) -> int:
    """Experts are weighted by their share of the answers on held-out text; the loss there is told before and after.

    Parameters
    ----------
    model
        A checkpoint or run folder, a .gguf file, or owner/name on the hub.
    target
        A folder that is new or was written by this program.
    texts
        Named as for `moiety train`; none means the default corpus.
    """
    import math

    from moiety.config import to_dict
    from moiety.infer.open import find_checkpoint
    from moiety.model.checkpoint import load_config
    from moiety.model.convert import read_tokenizer
    from moiety.train import dense as work
    from moiety.train.options import TrainOptions
    from moiety.train.run import held_out

    place = find_checkpoint(model)
    work.dense_config(load_config(place))  # refuse before any text is read
    longest = load_config(place).max_positions
    by_domain, _ = held_out(texts, read_tokenizer(place), longest, text)
    distill = None
    if steps:
        distill = TrainOptions(
            steps=steps,
            batch=step_batch,
            length=text.length or min(longest, 512),
            learning_rate=learning_rate,
            warmup=min(50, steps // 10),
            evaluate_every=0,
            evaluate_sequences=1,
        )
    receipt = work.dense(
        place, target, [one for pieces in by_domain.values() for one in pieces], texts=texts, distill=distill
    )
    if json:
        print_json({"path": target, **to_dict(receipt)})
        return 0
    rows = [[name, f"{loss:.4f}", f"{math.exp(min(loss, 700)):.4g}"] for name, loss in _losses(receipt)]
    print_table("held-out text", ["", "nats per token", "perplexity"], rows)
    print(f"written: {target}: {receipt.total_before:,} parameters became {receipt.total_after:,}")
    return 0


def _losses(receipt: DenseReceipt) -> list[tuple[str, float]]:
    return [
        ("the model", receipt.loss_before),
        ("its experts averaged", receipt.loss_averaged),
        ("as written", receipt.loss_after),
    ]
