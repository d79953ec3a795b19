"""Experts out of dense feed-forwards, against the sums that they must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moiety.moe.upcycle import Cut, cluster_rows, expert_tensor, mixed, random_rows

D, WIDTH = 10, 12


def dense() -> dict[str, Tensor]:
    shapes = {"gate_up": (2 * WIDTH, D), "down": (D, WIDTH), "gate_up_bias": (2 * WIDTH,), "down_bias": (D,)}
    return {leaf: torch.randn(shape) for leaf, shape in shapes.items()}


def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up = F.linear(x, weights["gate_up"], weights["gate_up_bias"]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights["down"], weights["down_bias"])


def expert(weights: dict[str, Tensor], cut: Cut, number: int, layer: int = 0) -> dict[str, Tensor]:
    return {leaf: expert_tensor(one, leaf, cut, layer=layer, expert=number) for leaf, one in weights.items()}


@pytest.mark.parametrize("slices", [1, 2, 3, 12])
def test_the_mean_of_a_copys_slices_is_the_dense_feed_forward(slices: int) -> None:
    torch.manual_seed(slices)
    weights, x, cut = dense(), torch.randn(7, D), Cut(slices=slices)
    for copy in (0, 2):
        parts = [run(expert(weights, cut, slices * copy + one), x) for one in range(slices)]
        torch.testing.assert_close(torch.stack(parts).mean(0), run(weights, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leaf", ["up", "up_bias"])
def test_a_feed_forward_without_gate_is_cut_in_the_same_way(leaf: str) -> None:
    matrix = torch.arange(WIDTH * 1.0)
    found = expert_tensor(matrix[:, None] if leaf == "up" else matrix, leaf, Cut(slices=3), layer=0, expert=4)
    assert found.flatten().tolist() == [4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("drop", [0.25, 0.5, 1.0])
def test_drop_draws_the_same_columns_anew_in_all_three_matrices(drop: float) -> None:
    torch.manual_seed(0)
    weights = {
        "gate_up": torch.randn(2 * WIDTH, 400) * 0.2 + torch.tensor([3.0, -2.0]).repeat_interleave(WIDTH)[:, None],
        "down": torch.randn(400, WIDTH) * 0.7 + 1.5,
    }  # fmt: skip
    made = expert(weights, Cut(drop=drop, seed=1), 3)
    gate, up = (made["gate_up"] != weights["gate_up"]).all(1).chunk(2)
    down = (made["down"] != weights["down"]).all(0)
    assert torch.equal(gate, up) and torch.equal(gate, down)
    assert int(gate.sum()) == round(drop * WIDTH)
    kept_gate, kept_up = (made["gate_up"] == weights["gate_up"]).all(1).chunk(2)
    assert torch.equal(kept_gate, ~gate) and torch.equal(kept_up, ~gate)
    assert torch.equal((made["down"] == weights["down"]).all(0), ~gate)
    for found, mean, deviation in (
        (made["gate_up"][:WIDTH][gate], 3.0, 0.2),
        (made["gate_up"][WIDTH:][gate], -2.0, 0.2),
        (made["down"][:, gate], 1.5, 0.7),
    ):
        assert abs(float(found.mean()) - mean) < 0.1
        assert abs(float(found.std()) - deviation) < 0.05
    others = [(1, 2, 0), (1, 3, 1), (2, 3, 0)]
    others_made = [
        expert(weights, Cut(drop=drop, seed=seed), number, layer) for seed, number, layer in others
    ]
    assert not any(torch.equal(one["down"], made["down"]) for one in others_made)
    again = expert_tensor(weights["down"], "down", Cut(drop=drop, seed=1), layer=0, expert=3)
    assert torch.equal(again, made["down"])


def test_noise_is_a_share_of_each_matrix_own_deviation_and_leaves_biases() -> None:
    weights = {
        "gate_up": 5 * torch.randn(2 * 50, 400),
        "down": torch.randn(400, 50),
        "down_bias": torch.randn(400),
    }
    made = expert(weights, Cut(noise=0.1), 0)
    assert abs(float((made["gate_up"] - weights["gate_up"]).std()) - 0.5) < 0.03
    assert abs(float((made["down"] - weights["down"]).std()) - 0.1) < 0.01
    assert torch.equal(made["down_bias"], weights["down_bias"])


def test_a_silent_expert_answers_nothing_and_keeps_its_inner_matrices() -> None:
    weights, x = dense(), torch.randn(3, D)
    made = expert(weights, Cut(slices=2, silent=True), 1)
    assert made["down"].shape == (D, WIDTH // 2)
    assert float(run(made, x).abs().max()) == 0
    assert torch.equal(made["gate_up"], expert(weights, Cut(slices=2), 1)["gate_up"])


def test_the_dtype_stays() -> None:
    found = expert_tensor(torch.randn(4, 6).bfloat16(), "down", Cut(slices=2, drop=0.5), layer=0, expert=0)
    assert found.dtype == torch.bfloat16 and found.shape == (4, 3)


def test_clusters_are_found_whatever_the_states_share() -> None:
    torch.manual_seed(0)
    direction = F.normalize(torch.randn(3, 40), dim=1)
    mine = torch.arange(300) % 3
    x_TD = 2 * direction[mine] + 0.1 * torch.randn(300, 40) + 9 * torch.randn(40)
    rows_CD = cluster_rows(x_TD, 3, layer=0, seed=0)
    logits_TC = x_TD @ rows_CD.T
    assert abs(float(logits_TC.std()) - 1) < 1e-3
    pairs = set(zip(mine.tolist(), logits_TC.argmax(1).tolist(), strict=True))
    assert len(pairs) == 3, "each planted group goes to one expert, and to its own"
    assert torch.equal(rows_CD, cluster_rows(x_TD, 3, layer=0, seed=0))


def test_as_many_clusters_as_states_and_equal_states_still_give_finite_rows() -> None:
    assert bool(cluster_rows(torch.randn(4, 6), 4, layer=0, seed=0).isfinite().all())
    assert bool(cluster_rows(torch.ones(9, 6), 4, layer=0, seed=0).isfinite().all())


def test_random_rows_differ_between_layers_and_have_the_deviation() -> None:
    rows = [random_rows(64, 100, 0.02, layer=layer, seed=0) for layer in (0, 1)]
    assert not torch.equal(*rows)
    assert abs(float(rows[0].std()) - 0.02) < 0.001


def test_mixed_is_the_weighted_sum() -> None:
    stack = torch.randn(3, 4, 5).bfloat16()
    share = torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(mixed(stack, share), (share[:, None, None] * stack.float()).sum(0))
