"""Cross entropy from hidden states: value and gradients as torch's, in slices that do not divide the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.model.loss import IGNORED, SLICE_ELEMENTS, cross_entropy
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
def test_several_slices(vocabulary: int, tokens: int, slices: int) -> None:
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
