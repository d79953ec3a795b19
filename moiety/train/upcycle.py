"""A dense model, or several of one kind, made into a Mixture-of-Experts, with proof of what the method promises.

Weights go from file to file one tensor at a time, so what is in memory is one tensor of the parent and one of the
child. The proof runs both a block at a time. Nothing is left behind when it fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moiety import cost, storage
from moiety.config import ModelConfig, MoEConfig, require, to_dict
from moiety.errors import CheckFailed, FormatError, UsageError
from moiety.model import checkpoint, hub
from moiety.model.convert import read_tokenizer, write_beside
from moiety.model.families import family_for
from moiety.model.layout import SHARD_BYTES, write_json
from moiety.model.parts import Parts, hollow, run
from moiety.moe.upcycle import Cut, cluster_rows, expert_tensor, random_rows
from moiety.train.expert_options import UpcycleOptions
from moiety.train.options import HeldOutOptions
from moiety.train.run import held_out

__all__ = [
    "RECEIPT",
    "Receipt",
    "checksum",
    "child_config",
    "has_tokenizer",
    "promise",
    "text_tokens",
    "upcycle",
]

RECEIPT = "upcycle.json"
SEQUENCES, POSITIONS = 2, 64  # of random tokens, for the proof
# Where a method promises, logits in float64 may differ by this share of the largest: rounding makes 1e-13 of it.
ROUNDING = 1e-9
# A number of slices that is no power of two rounds the weights that it multiplies, and layers magnify that.
FACTOR_ROUNDING = 256 * 2.0**-23


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What was made, and what it is worth.

    Args:
        parents: Path and sha256 of each parent.
        options: How.
        layers: Those with experts.
        written_as: The layout, and why.
        dtype: Of the weights.
        total_before: Parameters of a parent.
        total_after: Parameters of the child.
        active_after: Parameters of the child that one token uses.
        promised: True if the method keeps the parent's function.
        promise: The reason in words.
        tokens: Positions compared: of random tokens, and of text.
        delta: Largest |logit of the child - logit of the parent| in float32, for each parent; none in a dry run.
        text_delta: The same on the text alone; none without text.
        exact_delta: The same in float64, which rounding cannot excuse; None where nothing is promised.
        floor: Largest |float32 logit of the first parent - its float64 logit|.
        largest_logit: Of the first parent, in absolute value.
    """

    parents: tuple[dict[str, str], ...]
    options: UpcycleOptions
    layers: tuple[int, ...]
    written_as: str
    dtype: str
    total_before: int
    total_after: int
    active_after: int
    promised: bool
    promise: str
    tokens: tuple[int, int] = (0, 0)
    delta: tuple[float, ...] = ()
    text_delta: tuple[float, ...] = ()
    exact_delta: float | None = None
    floor: float = 0.0
    largest_logit: float = 0.0


def upcycle(
    sources: Sequence[str | Path],
    target: str | Path,
    options: UpcycleOptions,
    *,
    tokens_BS: Tensor | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
) -> Receipt:
    """Write the MoE that `options` make of a dense model.

    Args:
        sources: A dense model, or several with one shape and tokenizer: experts come from each in turn, everything else
            is their mean (arXiv 2403.07816).
        target: A folder that is new or was written by this program.
        options: How.
        tokens_BS: Tokens of a text: for router "kmeans", and the first of them for the proof.
        dtype: Of the weights; None keeps each as the parent has it. The proof then rounds the parent too.
        max_shard_bytes: Largest weight file.
        dry_run: Say what would be written.

    Raises:
        CheckFailed: the child is not what the method promises, or its logits are not finite; nothing was written.
        ConfigError: the options do not fit the parent, or it has experts already.
        UsageError: parents of different shapes or tokenizers, or no text where one is needed.
        FormatError, StorageError: as of the loader and of the writer.
    """
    places = [hub.resolve(source) for source in sources]
    require(bool(places), "there is no parent")
    if options.router == "kmeans" and tokens_BS is None:
        raise UsageError("router kmeans goes by hidden states", hint="give a text")
    with contextlib.ExitStack() as stack:
        parents = [stack.enter_context(checkpoint.open_parts(place)) for place in places]
        _check_alike(places, parents)
        config = child_config(parents[0].config, options)
        model = hollow(config, _dtypes(config, parents, dtype))
        receipt = _planned(places, parents[0].config, config, options, model.embed.weight.dtype)
        if dry_run:
            return receipt
        routers = _routers(parents[0], config, options, tokens_BS)
        surgery = _Surgery(parents=parents, options=options, config=config, routers=routers)
        needed_bytes = checkpoint.size_bytes(model) + (1 << 24)
        with storage.new_folder(target, needed_bytes=needed_bytes) as folder:
            write_beside(
                folder,
                model,
                places[0],
                with_tokenizer=has_tokenizer(places[0]),
                fetch=surgery.fetch,
                max_shard_bytes=max_shard_bytes,
            )
            receipt = _proved(receipt, parents, folder, tokens_BS, dtype)
            write_json(folder / RECEIPT, to_dict(receipt))
    return receipt


def _planned(
    places: Sequence[Path],
    parent: ModelConfig,
    child: ModelConfig,
    options: UpcycleOptions,
    dtype: torch.dtype,
) -> Receipt:
    """The receipt as far as it is known before anything is written."""
    promised, reason = promise(options, len(places))
    counts = cost.parameters(child)
    return Receipt(
        parents=tuple({"path": str(place), "sha256": checksum(place)} for place in places),
        options=options,
        layers=child.moe_layers,
        written_as=family_for(child).reason,
        dtype=str(dtype).removeprefix("torch."),
        total_before=cost.parameters(parent).total,
        total_after=counts.total,
        active_after=counts.active,
        promised=promised,
        promise=reason,
    )


def text_tokens(place: Path, texts: Sequence[str], sequences: int, length: int = 128) -> Tensor:
    """Held-out tokens of texts for `upcycle`, (B, S), domains in turn; errors as of `train.run.held_out`."""
    longest = checkpoint.load_config(place).max_positions
    some = HeldOutOptions(batch=1, length=min(longest, length), sequences=sequences)
    by_domain, _ = held_out(texts, read_tokenizer(place), longest, some)
    pieces = itertools.chain(*itertools.zip_longest(*by_domain.values()))
    return torch.cat([piece.tokens_BS for piece in pieces if piece is not None])


def child_config(parent: ModelConfig, options: UpcycleOptions) -> ModelConfig:
    """The config of the MoE.

    Raises:
        ConfigError: the options do not fit the parent, or it has experts already.
    """
    require(parent.moe is None, "this model has experts already", "upcycling begins with a dense model")
    slices = options.granularity
    require(
        parent.d_ff % slices == 0, f"a feed-forward of width {parent.d_ff} cannot be cut into {slices} slices"
    )
    chosen = options.moe_layers(parent.layers)
    shared = options.shared != "none"
    moe = MoEConfig(
        experts=options.experts,
        experts_per_token=options.top_k,
        d_ff=parent.d_ff // slices,
        activation=parent.activation,
        gated=parent.gated,
        bias=parent.feed_forward_bias,
        renormalize=options.renormalize,
        shared_d_ff=parent.d_ff if shared else 0,
        shared_gate=options.shared == "gated",
        shared_bias=shared and parent.feed_forward_bias,
    )
    dense = tuple(layer for layer in range(parent.layers) if layer not in chosen)
    return dataclasses.replace(parent, moe=moe, dense_layers=dense)


def promise(options: UpcycleOptions, parents: int) -> tuple[bool, str]:
    """Whether the child computes what the parent does before any training, and why or why not."""
    slices, copies = options.granularity, options.experts // options.granularity
    if parents > 1:
        return (
            False,
            f"experts of {parents} parents, and the mean of everything else: another function than any",
        )
    if options.shared != "none":
        return True, "the shared expert is the dense feed-forward, and the routed ones answer zero"
    if options.method == "drop":
        return False, f"{options.drop:.0%} of each expert's columns are drawn anew"
    if options.noise:
        return False, "experts have noise"
    if not options.renormalize and options.top_k < options.experts:
        return False, "the weights of the chosen experts do not sum to 1"
    if slices == 1:
        return True, "every expert is the dense feed-forward, and weights sum to 1"
    if not options.grouped:
        return False, f"a token's {options.top_k} experts are not whole copies of {slices} slices"
    if options.router == "zeros" and options.top_k < options.experts and copies > 1:
        return False, "all experts tie, and which of them a program chooses is open"
    return True, f"a token chooses whole copies, whose {slices} slices have equal weights"


def checksum(place: Path) -> str:
    """sha256 over the names and the sha256 of a GGUF file, or of a folder's config and weights."""
    files = [place] if place.is_file() else sorted([place / "config.json", *place.glob("*.safetensors")])
    total = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise FormatError(f"cannot read {file}: {error.strerror}") from error
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Surgery:
    """Where each tensor of the child comes from."""

    parents: Sequence[Parts]
    options: UpcycleOptions
    config: ModelConfig
    routers: Mapping[int, Tensor]

    @functools.cached_property
    def read(self) -> Callable[[int, str], Tensor]:
        """A tensor of a parent; the last one is kept, because experts are made of it one after the other."""

        @functools.lru_cache(maxsize=1)
        def read(parent: int, name: str) -> Tensor:
            return self.parents[parent].read(name)

        return read

    def fetch(self, name: str, expert: int | None) -> Tensor:
        """A tensor of the child, or one matrix of a stack."""
        begin, mark, leaf = name.partition("feed_forward.")
        kind, _, leaf = leaf.partition(".")
        layer = int(begin.split(".")[1]) if mark else -1
        if not mark or layer not in self.config.moe_layers:
            return self.mean(name)
        if kind == "gate":
            return self.routers[layer]
        if kind == "shared_gate":
            return torch.zeros(1, self.config.d_model)
        dense = f"{begin}{mark}{leaf}"
        if kind == "shared":
            factor = (
                2 if self.options.shared == "gated" and leaf.startswith("down") else 1
            )  # sigmoid(0) is 1/2
            return factor * self.mean(dense)
        assert kind == "experts", name
        if expert is not None:
            return self.expert(dense, layer, leaf, expert)
        return torch.stack([self.expert(dense, layer, leaf, one) for one in range(self.options.experts)])

    def expert(self, dense: str, layer: int, leaf: str, expert: int) -> Tensor:
        """One tensor of one expert; copies come from the parents in turn."""
        options = self.options
        cut = Cut(
            slices=options.granularity,
            drop=options.drop if options.method == "drop" else 0.0,
            noise=options.noise,
            silent=options.shared != "none",
            seed=options.seed,
        )
        parent = expert // cut.slices % len(self.parents)
        return expert_tensor(self.read(parent, dense), leaf, cut, layer=layer, expert=expert)

    def mean(self, name: str) -> Tensor:
        """A tensor as it is in the parent, or the mean of several parents'."""
        if len(self.parents) == 1:
            return self.parents[0].read(name)
        total = self.parents[0].read(name).float()
        for parent in self.parents[1:]:
            total += parent.read(name)
        return total / len(self.parents)


def _routers(
    parent: Parts, config: ModelConfig, options: UpcycleOptions, tokens_BS: Tensor | None
) -> dict[int, Tensor]:
    """The first weights of every router, (E, D)."""
    copies = options.experts // options.granularity if options.grouped else options.experts
    rows: dict[int, Tensor] = {}
    if options.router == "kmeans":
        assert tokens_BS is not None
        require(
            tokens_BS.numel() >= copies,
            f"{tokens_BS.numel()} tokens cannot form {copies} clusters",
            "give more text",
        )

        def cluster(layer: int, module: nn.Module, x_TD: Tensor, routing: object) -> None:
            if config.is_moe(layer):
                rows[layer] = cluster_rows(x_TD, copies, layer=layer, seed=options.seed)

        run(parent, [(tokens_BS, None)], cluster, dtype=torch.float32)
    for layer in config.moe_layers if options.router != "kmeans" else ():
        deviation = options.router_deviation if options.router == "random" else 0.0
        rows[layer] = random_rows(copies, config.d_model, deviation, layer=layer, seed=options.seed)
    return {layer: one.repeat_interleave(options.experts // copies, dim=0) for layer, one in rows.items()}


def _dtypes(
    config: ModelConfig, parents: Sequence[Parts], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Of each tensor of the child: its parents', or those of the layer's norm for what no parent has."""
    kinds = {}
    for name in hollow(config).state_dict():
        found = name.replace(".experts.", ".").replace(".shared.", ".")
        if found not in parents[0].dtypes:
            found = name.split("feed_forward")[0] + "attention.out.weight"
        kinds[name] = dtype or functools.reduce(torch.promote_types, (one.dtypes[found] for one in parents))
    return kinds


def _check_alike(places: Sequence[Path], parents: Sequence[Parts]) -> None:
    """Several parents must be of one shape, and give their tokens the same meaning."""
    if len(parents) == 1:
        return
    have = [has_tokenizer(place) for place in places]
    words = {
        read_tokenizer(place).fingerprint if has else "" for place, has in zip(places, have, strict=True)
    }
    for place, parent in zip(places, parents, strict=True):
        if parent.config != parents[0].config:
            raise UsageError(
                f"{places[0]} and {place} differ: {parents[0].config} and {parent.config}",
                hint="merge fine-tunes of one model",
            )
    if len(words) > 1:
        raise UsageError(
            f"{', '.join(map(str, places))} have different tokenizers, or some have none",
            hint="merge fine-tunes of one model",
        )


def has_tokenizer(place: Path) -> bool:
    """True if a tokenizer stands in the folder, or the file may hold one."""
    return place.is_file() or (place / "tokenizer.json").is_file()


@torch.no_grad()
def _proved(
    receipt: Receipt,
    parents: Sequence[Parts],
    folder: Path,
    tokens_BS: Tensor | None,
    dtype: torch.dtype | None,
) -> Receipt:
    """The receipt with the differences that were found.

    Raises:
        CheckFailed: they break the promise.
    """
    vocabulary = parents[0].config.vocab_size
    text_BS = (
        torch.empty(0, POSITIONS, dtype=torch.int64)
        if tokens_BS is None
        else tokens_BS[:SEQUENCES, :POSITIONS]
    )
    draw = torch.Generator().manual_seed(0)
    random_BS = torch.randint(vocabulary, (SEQUENCES, text_BS.shape[1]), generator=draw)
    both = [(torch.cat([random_BS, text_BS]), None)]
    exact, deltas, floor, largest = None, [], 0.0, 0.0
    with checkpoint.open_parts(folder) as stored:
        child = run(stored, both, dtype=torch.float32)[0].logits
        for number, parent in enumerate(parents):
            logits = run(parent, both, dtype=torch.float32, stored_as=dtype)[0].logits
            deltas.append((child - logits).abs())
            if number == 0:
                true = run(parent, both, dtype=torch.float64, stored_as=dtype)[0].logits
                floor, largest = float((true - logits).abs().max()), float(true.abs().max())
                if receipt.promised:
                    exact = float((run(stored, both, dtype=torch.float64)[0].logits - true).abs().max())
                del true
    worst = [float(one.max()) for one in deltas]
    receipt = dataclasses.replace(
        receipt,
        tokens=(random_BS.numel(), text_BS.numel()),
        delta=tuple(worst),
        text_delta=tuple(float(one[SEQUENCES:].max()) for one in deltas) if len(text_BS) else (),
        exact_delta=exact,
        floor=floor,
        largest_logit=largest,
    )
    if not all(map(math.isfinite, (*worst, largest))):
        raise CheckFailed(
            "logits of the parent or of the child are not finite, so nothing was written",
            hint="look at the parent with `moiety eval`",
        )
    slices = receipt.options.granularity
    allowed = largest * (FACTOR_ROUNDING if slices & (slices - 1) else ROUNDING)
    if exact is not None and exact > allowed:
        raise CheckFailed(
            f"the method promises the parent's function ({receipt.promise}), but logits in float64 differ by "
            f"{exact:.3g} of at most {largest:.3g}; nothing was written",
            hint="weights of few bits cannot hold every factor: try --dtype fp32",
        )
    return receipt
