"""Others' routing as traces: arrays as vLLM and SGLang send them, transformers' own logits, and drawn from counts."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moiety import traceimport
from moiety.errors import FormatError, UsageError
from moiety.tracefile import Chunk, RoutingTrace
from tests import tiny

ROWS = np.array(  # tokens, blocks, K: block 1 has no experts
    [
        [[3, 1], [0, 0], [6, 0]],
        [[0, 2], [0, 0], [1, 4]],
        [[5, 6], [0, 0], [2, 3]],
    ],
    np.uint8,
)
REAL = ROWS[:, [0, 2]]


def only(trace: RoutingTrace) -> Chunk:
    (chunk,) = trace.chunks()
    return chunk


def as_vllm(array: np.ndarray[Any, Any]) -> str:
    room = io.BytesIO()
    np.save(room, array, allow_pickle=False)
    return base64.b64encode(room.getbuffer()).decode()


def test_vllm_responses() -> None:
    for kind in (np.uint8, np.uint16, np.int32):
        np.testing.assert_array_equal(traceimport.vllm_array(as_vllm(ROWS.astype(kind))), ROWS)
    other = ROWS[:2] % 5
    trace = traceimport.from_routed_experts(
        [ROWS, other], experts=7, prompts=[2, 1], tokens=[[9, 8, 7, 6], [5, 4]], model="m"
    )
    header, chunk = trace.header, only(trace)
    assert (header.layers, header.experts, header.k, header.model, header.source) == (
        (0, 2),
        (7, 7),
        2,
        "m",
        "vllm",
    )
    assert chunk.tokens_S.tolist() == [2, 1, 1, 1] and (header.steps, header.tokens) == (4, 5)
    assert {name: array.tolist() for name, array in chunk.arrays.items() if name[-2:] == "_T"} == {
        "token_T": [9, 8, 7, 5, 4],
        "request_T": [0, 0, 0, 1, 1],
        "position_T": [0, 1, 2, 0, 1],
    }
    assert chunk.expert_TLK is not None
    np.testing.assert_array_equal(chunk.expert_TLK, np.concatenate([REAL, other[:, [0, 2]]]))
    assert trace.drawn_tokens() == 3
    assert next(traceimport.from_routed_experts([ROWS], experts=7).steps()).tokens == 3


def test_sglang_responses() -> None:
    text = base64.b64encode(ROWS.astype("<i4").tobytes()).decode()
    np.testing.assert_array_equal(traceimport.sglang_array(text, layers=3, k=2), ROWS)
    with pytest.raises(FormatError, match="72 bytes"):
        traceimport.sglang_array(text, layers=4, k=2)
    with pytest.raises(FormatError, match="base64"):
        traceimport.sglang_array("no base64!", layers=3, k=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!", "base64"),
        (base64.b64encode(b"hello").decode(), "not an .npy"),
        (as_vllm(np.zeros((2, 3))), "integers"),
        (as_vllm(np.zeros((2, 3, 1))), "integers"),
    ],
)
def test_bad_responses(text: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        traceimport.vllm_array(text)


def test_arrays_that_do_not_fit() -> None:
    with pytest.raises(FormatError, match="experts go up to 6"):
        traceimport.from_routed_experts([ROWS], experts=6)
    with pytest.raises(FormatError, match="wanted"):
        traceimport.from_routed_experts([ROWS, ROWS[:, :2]], experts=7)
    with pytest.raises(FormatError, match="wanted"):
        traceimport.from_routed_experts([ROWS.astype(float)], experts=7)
    with pytest.raises(FormatError, match="2 token ids"):
        traceimport.from_routed_experts([ROWS], experts=7, tokens=[[1, 2]])
    with pytest.raises(UsageError, match="1 requests, 2 prompts"):
        traceimport.from_routed_experts([ROWS], experts=7, prompts=[1, 2])
    with pytest.raises(UsageError, match="0 requests"):
        traceimport.from_routed_experts([], experts=7)
    with pytest.raises(FormatError, match="twice"):
        traceimport.from_routed_experts([np.ones_like(ROWS)], experts=7)


def per_token() -> dict[str, Any]:
    """A dump of mode per_token: 8 physical experts, of which 0 and 7 are replicas of logical 2."""
    logical_of = torch.tensor([2, 0, 1, 3, 4, 5, 6, 2])
    physical_of = np.array([1, 2, 0, 3, 4, 5, 6])
    physical_TLK = physical_of[ROWS]
    physical_TLK[:, 1] = -1
    physical_TLK[physical_TLK == 0] = 7
    wide_LTK = np.full((3, 3, 8), -1)
    wide_LTK[:, :, :2] = physical_TLK.transpose(1, 0, 2)
    records = [
        {
            "forward_pass_id": number,
            "rank": 0,
            "gatherer_key": "primary",
            "input_ids": ids,
            "positions": positions,
            "extend_seq_lens": lengths,
            "forward_mode": 1,
            "topk_ids_of_layer": torch.from_numpy(wide_LTK[:, rows]).int(),
            "misc_objects": [],
        }
        for number, (ids, positions, lengths, rows) in enumerate(
            [([9, 8], [0, 1], [2], slice(0, 2)), ([7], [2], None, slice(2, 3))]
        )
    ]
    return {"records": records, "last_physical_to_logical_map": logical_of.repeat(3, 1)}


def test_sglang_dumps_of_tokens() -> None:
    trace = traceimport.from_sglang_dump(per_token(), experts=7)
    chunk = only(trace)
    assert trace.header.layers == (0, 2) and chunk.tokens_S.tolist() == [2, 1]
    assert chunk.expert_TLK is not None and chunk.request_T is not None
    assert [[sorted(set(row) - {255}) for row in rows] for rows in chunk.expert_TLK.tolist()] == [
        [sorted(row) for row in rows] for rows in REAL.tolist()
    ]
    assert chunk.request_T.tolist() == [0, 0, -1] and trace.drawn_tokens() == 1


def test_sglang_dumps_of_counts() -> None:
    count_SLE = np.random.default_rng(0).integers(0, 9, (4, 3, 7))
    count_SLE[:, 1] = 0
    stat = {"rank": 0, "logical_count": torch.from_numpy(count_SLE).int()}
    trace = traceimport.from_sglang_dump(stat, experts=7)
    np.testing.assert_array_equal(trace.counts(), count_SLE[:, [0, 2]].sum(0))
    # replicas: logical expert 2 is counted in two places
    physical = np.concatenate([count_SLE, count_SLE[:, :, 2:3] * 0 + 1], axis=2)
    passes = {
        "records": [
            {"forward_pass_id": 0, "global_physical_count": torch.from_numpy(one)} for one in physical
        ],
        "last_physical_to_logical_map": torch.tensor([[*range(7), 2]] * 3),
    }
    trace = traceimport.from_sglang_dump(passes, experts=7)
    wanted = count_SLE.sum(0)
    wanted[:, 2] += 4
    np.testing.assert_array_equal(trace.counts(), wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda dump: dump.pop("records"),
        lambda dump: dump["records"].clear(),
        lambda dump: dump["records"][0].pop("positions"),
        lambda dump: dump.update(last_physical_to_logical_map=torch.zeros(3, 2)),
        lambda dump: dump.update(last_physical_to_logical_map=torch.zeros(3, 2, dtype=torch.int64)),
        lambda dump: dump.update(records=5),
        lambda dump: dump.update(logical_count=torch.ones(2, 3, 8)),
    ],
)
def test_bad_dumps(change: Any) -> None:
    dump = per_token()
    change(dump)
    with pytest.raises(FormatError):
        traceimport.from_sglang_dump(dump, experts=7)


def test_transformers_logits_are_our_routing(tmp_path: Path) -> None:
    """The twin of a tiny model in transformers says by its logits what our router chose."""
    for name in ("qwen3_moe", "olmoe"):
        ours = tiny.model(name, dtype=torch.float32).eval()
        theirs = tiny.twin_from(ours, tmp_path / name)
        assert ours.config.moe is not None
        tokens_BS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))
        valid_BS = torch.ones(2, 7, dtype=torch.int64)
        valid_BS[1, 5:] = 0
        with torch.no_grad():
            logits = theirs(tokens_BS, attention_mask=valid_BS, output_router_logits=True).router_logits
            routing = ours(tokens_BS, valid_BS=valid_BS == 1).routing
        trace = traceimport.from_router_logits(
            logits,
            k=ours.config.moe.experts_per_token,
            tokens_BS=tokens_BS,
            valid_BS=valid_BS,
            layers=list(routing),
        )
        chunk = only(trace)
        assert chunk.expert_TLK is not None and chunk.position_T is not None and chunk.token_T is not None
        assert trace.header.layers == tuple(routing)
        for number, one in enumerate(routing.values()):
            mask_TE = torch.zeros(14, 256, dtype=torch.bool)  # 255 is none
            chosen_TK = torch.from_numpy(chunk.expert_TLK[:, number].astype(np.int64))
            mask_TE.scatter_(1, chosen_TK, True)
            assert mask_TE[:, : one.experts].equal(one.mask_TE)
        assert chunk.token_T.tolist()[-3:] == [int(tokens_BS[1, 4]), -1, -1]
        assert chunk.position_T.tolist()[7:12] == [0, 1, 2, 3, 4]


def test_logits_that_do_not_fit() -> None:
    logits = [np.zeros((6, 4)), np.zeros((6, 4))]
    for changes in (
        {"tokens_BS": np.zeros((2, 4))},
        {"tokens_BS": np.zeros(6)},
        {"k": 5},
        {"k": 0},
        {"logits": [*logits, np.zeros((6, 5))]},
        {"logits": []},
    ):
        given: dict[str, Any] = {"logits": logits, "k": 2, "tokens_BS": np.zeros((2, 3))}
        with pytest.raises(FormatError):
            traceimport.from_router_logits(**given | changes)


def test_counts_come_back() -> None:
    """Every expert as often as the counts say, up to one choice for each draw's rounding, never twice in a token."""
    draw = np.random.default_rng(4)
    for experts, k in ((8, 2), (64, 8), (5, 5), (300, 3)):
        counts_LE = draw.random((2, experts)) ** 2
        counts_LE = (
            np.minimum(counts_LE / counts_LE.sum(1, keepdims=True), 0.9 / k)
            if k < experts
            else counts_LE * 0 + 1
        )
        trace = traceimport.from_counts(counts_LE, k=k, tokens=3000, seed=2)
        share_LE = trace.counts() / 3000
        wanted_LE = k * counts_LE / counts_LE.sum(1, keepdims=True)
        spread_LE = np.sqrt(wanted_LE * (1 - wanted_LE) / 3000)
        assert (np.abs(share_LE - wanted_LE) <= 5 * spread_LE + 1e-9).all()
        assert trace.drawn_tokens() == 3000 and all(
            [len(row) for row in step.experts] == [k, k] for step in trace.steps()
        )
    with pytest.raises(UsageError, match=r"1\.60 choices"):
        traceimport.from_counts([[4, 1, 0]], k=2, tokens=5)
    with pytest.raises(UsageError):
        traceimport.from_counts([[1, 1], [0, 0]], k=1, tokens=5)
