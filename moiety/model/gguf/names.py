"""What GGUF files call things: their architectures, and where each of their tensors lies in ours.

An architecture is one row of `ARCHITECTURES`; what a row does not say follows from the metadata. No torch here.
llama.cpp stores queries and keys of `llama` with the rows of each head reordered, so that dimensions 2 i and 2 i + 1
turn together instead of i and i + half: `Link.turned` undoes it. A file read without that loads, and is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moiety.config import AttentionConfig, ModelConfig
from moiety.errors import UsageError

__all__ = ["ARCHITECTURES", "Architecture", "Link", "links"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture of llama.cpp.

    Args:
        name: What `general.architecture` says.
        pairs: How its rotary dimensions pair up, in our words; "permuted" is half with reordered rows.
        experts: True if it always has experts, False if never, None if `expert_count` decides.
        expert_width: The key of an expert's inner width.
        renormalize: Whether chosen weights are divided by their sum; None if the metadata says.
        shared: Whether there is a shared expert, and whether it has a gate.
        qk_norm: Norm of queries and keys.
        qkv_bias: True if queries, keys and values always have biases, None if they may, and outputs and dense
            feed-forwards too.
        latent: Multi-head latent attention.
        own_output: It has an output head of its own even where that is the embedding.
        whole_width: Its query heads together are as wide as the model.
        equal_heads: It has as many key heads as query heads.
    """

    name: str
    pairs: Literal["permuted", "half", "interleaved"] = "half"
    experts: bool | None = False
    expert_width: str = "expert_feed_forward_length"
    renormalize: bool | None = True
    shared: Literal["none", "gated", "plain"] = "none"
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool | None = False
    latent: bool = False
    own_output: bool = False
    whole_width: bool = False
    equal_heads: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(name="qwen2", qkv_bias=True, whole_width=True),
        Architecture(
            name="llama", pairs="permuted", experts=None, expert_width="feed_forward_length", qkv_bias=None
        ),
        Architecture(name="qwen3", qk_norm="head"),
        Architecture(
            name="qwen2moe", experts=True, renormalize=False, shared="gated", qkv_bias=True, whole_width=True
        ),
        Architecture(name="qwen3moe", experts=True, qk_norm="head"),
        Architecture(
            name="olmoe",
            experts=True,
            expert_width="feed_forward_length",
            renormalize=False,
            qk_norm="full",
            own_output=True,
            whole_width=True,
            equal_heads=True,
        ),
        Architecture(
            name="deepseek2", pairs="interleaved", experts=None, renormalize=None, shared="plain", latent=True
        ),
    )
}


class Link(NamedTuple):
    """A tensor of theirs: rows `start` to `stop` of ours.

    Args:
        theirs: Its name in the file.
        ours: Our tensor.
        start: First row of ours, counted within each expert where ours is a stack.
        stop: One after the last row.
        stacked: Theirs is a stack of experts too.
        expert: Theirs is one expert of our stack.
        turned: In how many heads its rows are reordered; 0 means they are not.
        part: Theirs is the key or the value half of each head of `kv_b`, or a row of ours without its axis.
    """

    theirs: str
    ours: str
    start: int
    stop: int
    stacked: bool = False
    expert: int | None = None
    turned: int = 0
    part: Literal["", "key", "value", "row"] = ""


# Ours to theirs where one is the other; `blocks.N.` is `blk.N.`.
_WHOLE: Mapping[str, str] = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "attention_norm.weight": "attn_norm.weight",
    "feed_forward_norm.weight": "ffn_norm.weight",
    "attention.out.weight": "attn_output.weight",
    "attention.out.bias": "attn_output.bias",
    "attention.q_norm.weight": "attn_q_norm.weight",
    "attention.k_norm.weight": "attn_k_norm.weight",
    "attention.q.weight": "attn_q.weight",
    "attention.q_a.weight": "attn_q_a.weight",
    "attention.q_a_norm.weight": "attn_q_a_norm.weight",
    "attention.q_b.weight": "attn_q_b.weight",
    "attention.kv_a.weight": "attn_kv_a_mqa.weight",
    "attention.kv_a_norm.weight": "attn_kv_a_norm.weight",
    "feed_forward.down": "ffn_down.weight",
    "feed_forward.down_bias": "ffn_down.bias",
    "feed_forward.gate.weight": "ffn_gate_inp.weight",
    "feed_forward.selection_bias": "exp_probs_b.bias",
    "feed_forward.shared.down": "ffn_down_shexp.weight",
}
# Ours to theirs where ours is several of theirs, one below the other.
_STACKED_ROWS: Mapping[str, tuple[str, ...]] = {
    "feed_forward.gate_up": ("ffn_gate.weight", "ffn_up.weight"),
    "feed_forward.gate_up_bias": ("ffn_gate.bias", "ffn_up.bias"),
    "feed_forward.shared.gate_up": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
}


def links(
    config: ModelConfig,
    row: Architecture,
    shapes: Mapping[str, Sequence[int]],
    names: frozenset[str] = frozenset(),
) -> Iterator[Link]:
    """Where the tensors of a file lie in ours, in the order of `shapes`.

    Args:
        config: The model's.
        row: The architecture.
        shapes: Our tensors' names and shapes.
        names: Tensors of the file, for layouts that older files have; empty for the layout that is written.

    Raises:
        UsageError: one of ours has no name there.
    """
    turn = row.pairs == "permuted" and config.attention.rope_pairs == "half"
    for ours, shape in shapes.items():
        prefix, leaf = "", ours
        if ours.startswith("blocks."):
            layer, leaf = ours.removeprefix("blocks.").split(".", 1)
            prefix = f"blk.{layer}."
        rows = shape[0]
        if leaf in _WHOLE:
            yield Link(prefix + _WHOLE[leaf], ours, 0, rows)
        elif leaf in _STACKED_ROWS:
            for number, theirs in enumerate(_STACKED_ROWS[leaf]):
                yield Link(prefix + theirs, ours, rows // 2 * number, rows // 2 * (number + 1))
        elif leaf.startswith("attention.qkv."):
            yield from _query_key_value(config.attention, ours, prefix, turn)
        elif leaf in ("feed_forward.experts.gate_up", "feed_forward.experts.down"):
            yield from _experts(ours, prefix, shape, names)
        elif leaf == "feed_forward.shared_gate.weight":
            yield Link(f"{prefix}ffn_gate_inp_shexp.weight", ours, 0, 1, part="row")
        elif leaf == "attention.kv_b.weight" and f"{prefix}attn_kv_b.weight" in names:
            yield Link(f"{prefix}attn_kv_b.weight", ours, 0, rows)
        elif leaf == "attention.kv_b.weight":
            yield Link(f"{prefix}attn_k_b.weight", ours, 0, rows, part="key")
            yield Link(f"{prefix}attn_v_b.weight", ours, 0, rows, part="value")
        else:
            raise UsageError(f"{ours} has no name in GGUF files of architecture {row.name!r}")


def _query_key_value(attention: AttentionConfig, ours: str, prefix: str, turn: bool) -> Iterator[Link]:
    leaf, at = ours.rsplit(".", 1)[1], 0
    for part, heads in (("q", attention.heads), ("k", attention.kv_heads), ("v", attention.kv_heads)):
        rows = heads * attention.head_dim
        turned = heads if turn and part != "v" else 0
        yield Link(f"{prefix}attn_{part}.{leaf}", ours, at, at + rows, turned=turned)
        at += rows


def _experts(ours: str, prefix: str, shape: Sequence[int], names: frozenset[str]) -> Iterator[Link]:
    """Stacks of experts; in old files one tensor an expert, in some gate and up in one."""
    parts = ("gate", "up") if ours.endswith("gate_up") else ("down",)
    if len(parts) == 2 and f"{prefix}ffn_gate_up_exps.weight" in names:
        parts = ("gate_up",)
    rows = shape[1] // len(parts)
    for number, part in enumerate(parts):
        start, stop = rows * number, rows * (number + 1)
        if f"{prefix}ffn_{part}.0.weight" in names:
            for expert in range(shape[0]):
                yield Link(f"{prefix}ffn_{part}.{expert}.weight", ours, start, stop, expert=expert)
        else:
            yield Link(f"{prefix}ffn_{part}_exps.weight", ours, start, stop, stacked=True)
