"""A server against its plan: what is said before it listens, and the verdict on what was measured while it served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moiety.cli.judged import judge_run, planned
from moiety.cli.output import talk
from moiety.plan.verdict import promise

if TYPE_CHECKING:
    from moiety.infer.engine import Engine
    from moiety.infer.open import Opened

__all__ = ["judge_server", "say_plan"]

ENOUGH_STEPS = 8  # of one kind, to judge a speed by
TOKENS = 512  # of a prompt, and of a sequence that draws, where nobody has asked yet


def say_plan(opened: Opened, engine: Engine, beside_bytes: int) -> None:
    """Say how fast the model should draw, alone and for as many as may be, and what memory that takes at most.

    Args:
        opened: The model.
        engine: That will answer.
        beside_bytes: What the server takes without a model.
    """
    from moiety.plan.weights import read_stored

    config, most, context = (
        opened.model.config,
        engine.options.max_requests,
        min(TOKENS, engine.max_positions),
    )
    found, _, _ = planned(
        config,
        read_stored(opened.path, config),
        batches={1: context, most: context},
        prompts=[context],
        **_how(engine, engine.statistics().pages, most, beside_bytes),
    )
    talk().print(f"{promise(found)}, with every page of keys and values in use")


def judge_server(opened: Opened, engine: Engine, beside_bytes: int) -> None:
    """Say what was measured in steps that a plan speaks of, beside the plan, and keep it.

    Of decoding that is the number of sequences that most time was spent on, of prompts the lengths of most tokens,
    within a factor of two. Time between steps, in which answers are written, is not the engine's and not counted.

    Args:
        opened: The model.
        engine: That answered.
        beside_bytes: What the server takes without a model.
    """
    from moiety.plan.weights import read_stored
    from moiety.train.host import peak_memory_bytes

    now, pace, config = engine.statistics(), engine.paces.now(), opened.model.config
    measured, batches, prompts = {"memory": float(peak_memory_bytes())}, dict[int, int](), list[int]()
    said = []
    batch, drawn = max(pace.drawing.items(), key=lambda one: one[1].seconds, default=(0, None))
    if drawn is not None and drawn.times >= ENOUGH_STEPS:
        batches[batch] = round(drawn.positions / drawn.tokens)
        measured[f"decode, batch {batch}"] = drawn.tokens / drawn.seconds
        if now.experts is not None:
            measured["hit rate"] = drawn.hits / max(drawn.hits + drawn.misses, 1)
            measured["disk"] = drawn.read_bytes / drawn.tokens
        said.append(f"{drawn.times} steps drew for {batch} at {batches[batch]} tokens each")
    else:
        said.append(f"no number of sequences drew alone in {ENOUGH_STEPS} steps")
    read = max(pace.prompts.values(), key=lambda one: one.tokens, default=None)
    if read is not None and read.times:
        prompts.append(round(read.tokens / read.times))
        measured[f"prefill {prompts[0]}"] = read.tokens / read.seconds
        said.append(f"prompts of about {prompts[0]} tokens were read alone: {read.times}")
    else:
        said.append("no second prompt of a length was read alone")
    talk().print(f"of {pace.steps} steps {pace.compared} did one thing: {'; '.join(said)}")
    judge_run(
        str(opened.path),
        config,
        read_stored(opened.path, config),
        measured,
        batches=batches,
        prompts=prompts,
        **_how(engine, now.pages_touched, max(pace.most, 1), beside_bytes),
    )


def _how(engine: Engine, pages: int, sequences: int, beside_bytes: int) -> dict[str, Any]:
    """What a plan of a server is for, with so many pages in use."""
    store = engine.store
    tokens = max(pages, 1) * engine.options.page_tokens
    return {
        "kv_dtype": engine.options.kv_dtype,
        "resident": 1.0 if store is None else store.residency.slots / store.experts,
        "mapped": store is None,
        "room": (-(-tokens // sequences), sequences),
        "beside_bytes": beside_bytes,
    }
