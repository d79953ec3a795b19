"""Cross entropy from hidden states: value and gradients as torch's, in slices that do not divide the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.formats import FORMATS
from moiety.formats.tiles import pack, unpack
from moiety.model.loss import IGNORED, SLICE_ELEMENTS, cross_entropy, head_logits
from moiety.moe.packed import PackedLinear
from tests import tiny
from tests.oracle import assert_all_close_enough

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight_VD: Tensor, target: Tensor) -> Tensor:
    """As anyone would write it, the whole logits matrix at once."""
    logits = F.linear(hidden, weight_VD).flatten(0, -2)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), target.flatten(), ignore_index=-100, reduction="sum")


def solved(
    loss: Loss, hidden: Tensor, weight_VD: Tensor, target: Tensor, scale: float = 1.0
) -> dict[str, Tensor | None]:
    hidden, weight_VD = hidden.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    value = loss(hidden, weight_VD, target)
    (value * scale).backward()
    return {"loss": value.detach(), "hidden": hidden.grad, "weight": weight_VD.grad}


def case(vocabulary: int, width: int, *shape: int, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weights that bfloat16 holds exactly, as float64, and targets of which some do not count."""
    hidden = torch.randn(*shape, width).bfloat16().double()
    weight_VD = torch.randn(vocabulary, width).bfloat16().double()
    target = torch.randint(vocabulary, shape)
    target[torch.rand(shape) < ignored] = IGNORED
    return hidden, weight_VD, target


def assert_equal_in_float64(hidden: Tensor, weight_VD: Tensor, target: Tensor, scale: float = 1.0) -> None:
    ours = solved(cross_entropy, hidden, weight_VD, target, scale)
    true = solved(plain, hidden, weight_VD, target, scale)
    for name, value in true.items():
        tiny.assert_exact(ours[name], value, name)


@pytest.mark.parametrize("shape", [(1,), (13,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_value_and_gradients_in_float64(shape: tuple[int, ...], ignored: float) -> None:
    assert_equal_in_float64(*case(37, 8, *shape, ignored=ignored), scale=-0.37)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "slices"),
    [
        (SLICE_ELEMENTS // 3, 7, 3),
        (SLICE_ELEMENTS // 2 - 1, 5, 3),
        (SLICE_ELEMENTS // 4, 4, 1),
        (SLICE_ELEMENTS + 3, 2, 2),
    ],
)
def test_several_slices(vocabulary: int, tokens: int, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moiety.model.loss.FEWEST_ROWS", 1)
    assert -(-tokens // max(SLICE_ELEMENTS // vocabulary, 1)) == slices
    hidden, weight_VD, target = case(vocabulary, 2, tokens, ignored=0.0)
    target[1] = IGNORED
    assert_equal_in_float64(hidden, weight_VD, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "tokens"), [(300, 65), (SLICE_ELEMENTS // 8, 19)])
def test_no_noisier_than_twice_torch(dtype: torch.dtype, vocabulary: int, tokens: int) -> None:
    hidden, weight_VD, target = case(vocabulary, 6, tokens)
    narrow = hidden.to(dtype), weight_VD.to(dtype), target
    true = solved(plain, hidden, weight_VD, target)
    assert_all_close_enough(solved(cross_entropy, *narrow), solved(plain, *narrow), true, dtype=dtype)


def test_the_sum_is_over_scored_tokens_alone() -> None:
    hidden, weight_VD, target = case(11, 4, 9, ignored=0.0)
    whole = cross_entropy(hidden, weight_VD, target)
    target[::2] = IGNORED
    rest = cross_entropy(hidden[1::2], weight_VD, target[1::2])
    result = solved(cross_entropy, hidden, weight_VD, target)
    assert result["loss"] == pytest.approx(float(rest), rel=1e-14) and float(rest) < float(whole)
    gradient = result["hidden"]
    assert gradient is not None
    assert not gradient[::2].any() and gradient[1::2].any(dim=-1).all()


def test_uniform_logits_cost_log_v() -> None:
    loss = cross_entropy(torch.zeros(5, 3), torch.randn(17, 3), torch.arange(5))
    assert float(loss) == pytest.approx(5 * torch.tensor(17.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_score(tokens: int) -> None:
    hidden, weight_VD, target = torch.randn(tokens, 3), torch.randn(7, 3), torch.full((tokens,), IGNORED)
    result = solved(cross_entropy, hidden, weight_VD, target)
    for name, like in (("loss", torch.zeros(())), ("hidden", hidden), ("weight", weight_VD)):
        assert torch.equal(result[name], torch.zeros_like(like)), name  # type: ignore[arg-type]


def test_large_logits_do_not_overflow() -> None:
    hidden, weight_VD = torch.tensor([[3e3], [-3e3]]), torch.tensor([[1.0], [0.0], [-1.0]])
    result = solved(cross_entropy, hidden, weight_VD, torch.tensor([0, 0]))
    assert float(result["loss"]) == pytest.approx(6e3)  # type: ignore[arg-type]
    assert torch.equal(result["hidden"], torch.tensor([[0.0], [-2.0]]))  # type: ignore[arg-type]


def test_without_gradients() -> None:
    hidden, weight_VD, target = case(19, 4, 6)
    with torch.no_grad():
        loss = cross_entropy(hidden.requires_grad_(), weight_VD.requires_grad_(), target)
    assert not loss.requires_grad and torch.equal(loss, cross_entropy(hidden, weight_VD, target).detach())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen: str) -> None:
    hidden, weight_VD, target = case(19, 4, 6)
    true = solved(plain, hidden, weight_VD, target)
    leaves = {"hidden": hidden, "weight": weight_VD}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    cross_entropy(hidden, weight_VD, target).backward()
    assert leaves.pop(frozen).grad is None
    for name, leaf in leaves.items():
        tiny.assert_exact(leaf.grad, true[name], name)


def test_dtypes_with_and_without_autocast() -> None:
    hidden, weight_VD, target = case(300, 6, 50)
    true = solved(plain, hidden, weight_VD, target)
    narrow = solved(cross_entropy, hidden.bfloat16(), weight_VD.bfloat16(), target)
    assert narrow["loss"] is not None and narrow["loss"].dtype == torch.float32
    wide = hidden.float(), weight_VD.float(), target
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = solved(cross_entropy, *wide)
        plainly = solved(plain, *wide)
    assert_all_close_enough(cast, plainly, true, dtype=torch.bfloat16)
    assert torch.equal(narrow["loss"], cast["loss"])  # type: ignore[arg-type]


def test_inputs_are_left_as_they_were() -> None:
    hidden, weight_VD, target = case(19, 4, 6)
    before = hidden.clone(), weight_VD.clone(), target.clone()
    solved(cross_entropy, hidden, weight_VD, target)
    for now, then in zip((hidden, weight_VD, target), before, strict=True):
        assert torch.equal(now, then)


HEADS: dict[str, dict[str, float]] = {
    "bias": {},
    "multiplied": {"multiplier": 0.3},
    "capped": {"cap": 2.5},
    "multiplied_then_capped": {"multiplier": -1.7, "cap": 0.8},
}


def whole_head(
    hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target: Tensor, *, multiplier: float, cap: float
) -> Tensor:
    """The formula on the whole logits matrix."""
    logits = F.linear(hidden, weight_VD, bias_V) * multiplier
    logits = cap * (logits / cap).tanh() if cap else logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.flatten(0, -2).to(wide), target.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def all_gradients(
    loss: Callable[..., Tensor], leaves: dict[str, Tensor], target: Tensor, **head: float
) -> dict[str, Tensor | None]:
    leaf = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    value = loss(leaf, target, **head)
    (value * -0.7).backward()
    return {"loss": value.detach()} | {name: one.grad for name, one in leaf.items()}


def by_slices(leaf: dict[str, Tensor], target: Tensor, **head: float) -> Tensor:
    return cross_entropy(leaf["hidden"], leaf["weight"], target, bias_V=leaf.get("bias"), **head)


def by_whole(leaf: dict[str, Tensor], target: Tensor, **head: float) -> Tensor:
    said = {"multiplier": 1.0, "cap": 0.0, **head}
    return whole_head(leaf["hidden"], leaf["weight"], leaf.get("bias"), target, **said)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("slice_elements", [SLICE_ELEMENTS, 2 * 37 + 1])
def test_a_head_with_bias_multiplier_and_cap(
    head: str, bias: bool, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moiety.model.loss.SLICE_ELEMENTS", slice_elements)
    monkeypatch.setattr("moiety.model.loss.FEWEST_ROWS", 1)
    hidden, weight_VD, target = case(37, 8, 3, 5)
    leaves = {"hidden": hidden, "weight": weight_VD}
    if bias:
        leaves["bias"] = torch.randn(37).bfloat16().double()
    true = all_gradients(by_whole, leaves, target, **HEADS[head])
    for name, value in all_gradients(by_slices, leaves, target, **HEADS[head]).items():
        right = true[name]
        assert value is not None and right is not None
        torch.testing.assert_close(value, right, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for dtype in (torch.float32, torch.bfloat16):
        narrow = {name: value.to(dtype) for name, value in leaves.items()}
        fast, noisy = (all_gradients(one, narrow, target, **HEADS[head]) for one in (by_slices, by_whole))
        assert_all_close_enough(fast, noisy, true, dtype=dtype)


def test_a_bias_of_the_head_alone_can_be_trained() -> None:
    hidden, weight_VD, target = case(19, 4, 6)
    bias_V = torch.zeros(19, dtype=torch.float64, requires_grad=True)
    cross_entropy(hidden, weight_VD, target, bias_V=bias_V).backward()
    scored = target != IGNORED
    share = (hidden @ weight_VD.T).softmax(-1)[scored].sum(0)
    tiny.assert_exact(bias_V.grad, share - torch.bincount(target[scored], minlength=19))


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_such_a_head(head: str) -> None:
    hidden, weight_VD, _ = case(19, 4, 2, 3)
    bias_V, said = torch.randn(19).double(), {"multiplier": 1.0, "cap": 0.0, **HEADS[head]}
    true = (hidden @ weight_VD.T + bias_V) * said["multiplier"]
    if said["cap"]:
        true = said["cap"] * (true / said["cap"]).tanh()
    tiny.assert_exact(head_logits(hidden, weight_VD, bias_V, **HEADS[head]), true)


def test_a_head_with_bias_under_autocast() -> None:
    hidden, weight_VD, target = case(300, 6, 50)
    leaves: dict[str, Any] = {"hidden": hidden, "weight": weight_VD, "bias": torch.randn(300).double()}
    true = all_gradients(by_whole, leaves, target, cap=3.0)
    wide = {name: value.float() for name, value in leaves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, plainly = (all_gradients(one, wide, target, cap=3.0) for one in (by_slices, by_whole))
    assert_all_close_enough(cast, plainly, true, dtype=torch.bfloat16)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("slice_elements", [1, 4 * 50, 1 << 20])
def test_a_packed_head_some_rows_at_a_time(
    head: str, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 16 rows, and slices of one token, of some and of all; nothing scored is a loss of nothing."""
    monkeypatch.setattr("moiety.model.loss.UNPACKED_ELEMENTS", slice_elements)
    monkeypatch.setattr("moiety.model.loss.FEWEST_ROWS", 1)
    monkeypatch.setattr("moiety.backends.unpacked.PART_BYTES", 1)
    hidden, weight_VD, target = case(50, 8, 3, 5)
    bias_V = torch.randn(50).bfloat16()
    packed = PackedLinear(pack(weight_VD[None].float(), FORMATS["int8-g32"]), bias_V).train()
    leaves = {"hidden": hidden}
    fixed = {"weight": unpack(packed.weight)[0].double(), "bias": bias_V.double()}

    def ours(leaf: dict[str, Tensor], target: Tensor, **said: float) -> Tensor:
        return cross_entropy(leaf["hidden"], packed, target, **said)

    def plainly(leaf: dict[str, Tensor], target: Tensor, **said: float) -> Tensor:
        return by_whole(leaf | {n: one.to(leaf["hidden"].dtype) for n, one in fixed.items()}, target, **said)

    true = all_gradients(plainly, leaves, target, **HEADS[head])
    for dtype in (torch.float32, torch.bfloat16):
        narrow = {"hidden": hidden.to(dtype)}
        fast, noisy = (all_gradients(one, narrow, target, **HEADS[head]) for one in (ours, plainly))
        assert_all_close_enough(fast, noisy, true, dtype=dtype)
    nothing = torch.full_like(target, IGNORED)
    assert float(ours({"hidden": hidden.float().requires_grad_()}, nothing).detach()) == 0
