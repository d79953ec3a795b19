"""A model and its tokenizer from one name: a checkpoint, a run's newest one, a GGUF file, or a model of the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moiety.errors import ConfigError, UsageError
from moiety.fields import size_bytes
from moiety.infer.hosting import load_on_device
from moiety.infer.offload import silent
from moiety.infer.options import EngineOptions, StreamOptions, adapters_named
from moiety.infer.streaming import load_streamed
from moiety.model import checkpoint, hub
from moiety.model import load as any_model
from moiety.model.adapter_files import family_at, load_adapter
from moiety.model.adapters import activate
from moiety.model.convert import end_tokens, read_tokenizer
from moiety.model.switch import SwitchTransformer
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.moe.layer import MoE
from moiety.moe.routers import with_k

__all__ = ["Opened", "find_checkpoint", "load", "open_model", "set_experts_per_token"]


class Opened(NamedTuple):
    """What can be generated from; any of the tokens `ends` ends an answer."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path
    ends: frozenset[int]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder or GGUF file that a path means; a model of the hub is fetched.

    Raises:
        UsageError: there is neither a checkpoint nor a run with one, or the hub has no such model.
        StorageError: the hub cannot be reached.
    """
    folder = Path(path)
    if (folder / "config.json").is_file() or (folder.suffix == ".gguf" and folder.is_file()):
        return folder
    if hub.is_hub_name(path):
        return hub.resolve(path)
    steps = sorted((folder / "checkpoints").glob("step-*")) if (folder / "checkpoints").is_dir() else []
    whole = [step for step in steps if (step / "manifest.json").is_file()]
    if not whole:
        raise UsageError(
            f"{folder} is neither a checkpoint (no config.json) nor a run with one (no checkpoints/step-*)",
            hint="give a folder that training wrote, such as runs/demo/moe (`make demo` makes one), a .gguf file, "
            "or owner/name on the hub",
        )
    return whole[-1]


def set_experts_per_token(model: Transformer, k: int) -> None:
    """Let every router of a trained model choose `k` experts per token instead of its own number.

    Raises:
        ConfigError: a dense model, a router without a k, or one that cannot choose so many; nothing has changed.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ConfigError("this model is dense: it has no experts per token to change")
    routers = [with_k(layer.router, k) for layer in layers]
    for layer, router in zip(layers, routers, strict=True):
        router.check(layer.choices)
    for layer, router in zip(layers, routers, strict=True):
        layer.router = router


def load(
    path: str | Path,
    *,
    memory: str | int = "",
    device: str = "",
    engine: EngineOptions | None = None,
    revision: str | None = None,
    say: Callable[[str], None] = silent,
    **options: Any,
) -> Transformer | SwitchTransformer:
    """Read a model; a packed one within a budget of memory, if one is given (docs/streaming.md).

    Args:
        path: As for `moiety.model.load.load`, whose other options are taken too.
        memory: Of the whole process, in bytes or as 12GiB; experts that do not fit are read when they are wanted.
        device: "cuda", or "cuda:1": the memory is that device's, for a plain model's weights; experts that do not fit
            wait in the host's memory.
        engine: What the engine will be given, whose memory is counted.
        revision: Branch, tag or commit on the hub.
        say: Told how the memory is divided.

    Raises:
        BudgetError: the model cannot be run within so little.
        UsageError: a budget, and a model that is not packed; a device, and one that is, no budget, or
            options of the engine.
        MoietyError: as `moiety.model.load.load`.
    """
    if device and (not memory or engine is not None):
        raise UsageError(
            f"device is {device!r}, {'and there is no memory' if not memory else 'with options of the engine'}",
            hint="how much of the device's memory? The engine keeps its pages elsewhere: moiety.generate",
        )
    if device:
        place, budget = hub.resolve(path, revision=revision), size_bytes(str(memory), "memory")
        return load_on_device(place, budget, device, say=say, **options)
    if not memory:
        return any_model.load(path, revision=revision, **options)
    place = hub.resolve(path, revision=revision)
    return load_streamed(place, StreamOptions(memory=str(memory)), engine=engine, say=say, **options)


def open_model(
    path: str | Path,
    *,
    backend: str = "auto",
    experts_per_token: int = 0,
    stream: StreamOptions | None = None,
    engine: EngineOptions | None = None,
    say: Callable[[str], None] = silent,
    adapters: Sequence[str] = (),
) -> Opened:
    """Load a model and the tokenizer beside it, ready to generate.

    Args:
        path: A checkpoint or run folder, a GGUF file, or `owner/name` on the hub.
        backend: Who multiplies the experts.
        experts_per_token: Use this many instead of the model's own; 0 keeps its own.
        stream: With its `memory`, the model is loaded within so much.
        engine: What the engine will be given, whose memory is counted.
        say: Told how the memory is divided.
        adapters: Folders of adapters, or name=folder; a single one acts on everything, of several none unasked.

    Raises:
        BudgetError: the model cannot be run within so little memory.
        ConfigError: that many experts per token are not possible.
        UsageError: nothing to load there.
        FormatError: a file is missing, damaged or of an unknown layout.
    """
    folder = find_checkpoint(path)
    if stream is None or not stream.memory:
        model = checkpoint.load(folder, backend=backend)
    else:
        model = load_streamed(folder, stream, engine=engine, backend=backend, say=say)
    if experts_per_token:
        set_experts_per_token(model, experts_per_token)
    for name, place in adapters_named(adapters).items():
        load_adapter(model, place, name, family=family_at(folder))
    if len(adapters) > 1:
        activate(model, "")
    tokenizer = read_tokenizer(folder)
    return Opened(model.eval(), tokenizer, folder, frozenset({tokenizer.end_id, *end_tokens(folder)}))
