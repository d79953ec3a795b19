"""Latency and bytes over a rate: fits that find what made the figures, rows that leave, exchanges, and a step's sum."""

from __future__ import annotations

import itertools
import math

import pytest

from moiety import cost, registry
from moiety.errors import ConfigError
from moiety.plan.hardware import DEVICES
from moiety.plan.links import (
    EXCHANGE,
    LATENCY_BETWEEN,
    REACHED_BETWEEN,
    REACHED_INSIDE,
    Cluster,
    Copies,
    Link,
    Sample,
    exchange,
    fit,
    leaving,
    sent,
)
from moiety.plan.speed import TRAINING_SHARE, Machine, training

H800 = DEVICES["h800"]
V3 = registry.lookup_decoder("deepseek-v3")


def on(ranks: int, nodes: int = 1, device: str = "h800") -> Cluster:
    return Cluster(device=DEVICES[device], ranks=ranks, nodes=nodes)


def test_a_fit_finds_the_link() -> None:
    link = Link(3e-5, 2e9)
    samples = [
        Sample(messages, size, link.seconds(size, messages))
        for messages, size in itertools.product((2, 12), (1e3, 1e5, 1e7))
    ]
    found = fit(samples)
    assert found.latency_s == pytest.approx(3e-5) and found.bytes_per_s == pytest.approx(2e9)
    assert found.seconds(4e9) == pytest.approx(2 + 3e-5)


def test_a_fit_weighs_by_ratio_and_is_never_negative() -> None:
    """A tenth too much at each end moves the fit by no more than that; a line through less than nothing is cut."""
    noisy = fit([Sample(1, 1e3, 1.1 * 1e-5), Sample(1, 1e9, 0.9 * 1.0)])
    assert noisy.seconds(1e3) == pytest.approx(1.1e-5) and noisy.seconds(1e9) == pytest.approx(0.9)
    steep = fit([Sample(1, 1e6, 1e-4), Sample(1, 2e6, 4e-4)])
    assert steep.latency_s == 0 and 2.5e9 < steep.bytes_per_s < 1e10
    falling = fit([Sample(1, 1e6, 4e-4), Sample(1, 2e6, 1e-4)])
    assert falling.latency_s > 0 and math.isfinite(falling.bytes_per_s) and falling.seconds(1e6) < 4e-4
    for wrong in ([], [Sample(1, 1e6, 1e-4)], [Sample(1, 1e6, 1e-4), Sample(1, 1e6, 2e-4)]):
        with pytest.raises(ConfigError, match="at least two sizes"):
            fit(wrong)


@pytest.mark.parametrize(("ranks", "nodes"), [(4, 3), (0, 1), (4, 0), (2, 4)])
def test_clusters_that_cannot_be(ranks: int, nodes: int) -> None:
    with pytest.raises(ConfigError, match=f"{ranks} ranks on {nodes} nodes"):
        on(ranks, nodes)


def test_rows_that_leave() -> None:
    """Pairs add up to K (1 - 1/ranks) in each layer, as of `estimate.communication`; one node sends nothing away."""
    layers = len(V3.moe_layers)
    for ranks, nodes in ((64, 8), (64, 1), (8, 8), (1, 1)):
        assert sum(sent(V3, on(ranks, nodes), "pair")) == pytest.approx(layers * 8 * (1 - 1 / ranks))
    assert sent(V3, on(8), "node") == sent(V3, on(8), "rank") and sent(V3, on(8)).between == 0
    assert sent(V3, on(1)) == Copies(0, 0) == sent(registry.lookup_decoder("llama-3-70b"), on(8))
    limited = sent(V3, on(64, 8), "node").between / layers
    assert 0.85 * 4 * 7 / 8 < limited < 4 * 7 / 8, "at most four of eight nodes"
    assert leaving(8, 7, 4, on(64, 8), "node") == pytest.approx((7 * 7 / 8, 4 * 7 / 8))
    assert leaving(8, 7, 4, on(64, 8), "rank") == pytest.approx((7 * (1 / 8 - 1 / 64), 7 * 7 / 8))


def test_an_exchange_by_hand() -> None:
    found = exchange(on(64, 8), Copies(2e9, 1e9), 3)
    inside = [
        3 * late + 2e9 / share / 200e9 for late, share in zip(EXCHANGE, reversed(REACHED_INSIDE), strict=True)
    ]
    between = [
        3 * late + 1e9 / share / 50e9
        for late, share in zip(LATENCY_BETWEEN, reversed(REACHED_BETWEEN), strict=True)
    ]
    assert found == pytest.approx((max(inside[0], between[0]), inside[1] + between[1]))
    assert exchange(on(8), Copies(0.0, 0.0), 9) == (0, 0)


def test_a_step_by_hand() -> None:
    """DeepSeek-V3 on 2,048 H800: computing, four exchanges a layer and two passes over gradients."""
    step = 15_360 * 4096
    machine = Machine(device=H800, count=2048)
    words = {"cluster": on(64, 8), "step_tokens": step, "row_bytes": 1.5, "stages": 16}
    found = training(V3, machine, 14.8e12, 4096, **words)  # type: ignore[arg-type]
    flops = step * cost.training_flops_per_token(V3, 2048).total / 2048 / 989e12
    assert found["computing_seconds"] == pytest.approx(
        (flops / TRAINING_SHARE.high, flops / TRAINING_SHARE.low)
    )
    mine = step / 2048
    size = sent(V3, on(64, 8)).times(4 * 1.5 * 7168 * mine)
    assert found["exchange_seconds"] == exchange(on(64, 8), size, 4 * 58 * mine / 4096)
    parts = [found[f"{name}_seconds"] for name in ("computing", "exchange", "gradient")]
    assert found["step_seconds"] == (max(one.low for one in parts), sum(one.high for one in parts))
    assert found["days"].low == pytest.approx(found["step_seconds"].low * 14.8e12 / step / 86_400)
    # gradients: 2 bytes, twice, of what a device holds, 671B experts and the rest over 64 ranks and 16 stages
    counts = cost.parameters(V3)
    experts = counts.components["routed_experts"]
    held = experts / 64 * (1 - 1 / 2) + (counts.total - experts) * (1 - 1 / 128)
    assert found["gradient_seconds"].low == pytest.approx(4 * held / 16 / (0.86 * 50e9), rel=1e-3)


def test_what_makes_a_step_longer() -> None:
    machine, olmoe = Machine(device=DEVICES["h100"], count=16), registry.lookup_decoder("olmoe-1b-7b")
    cluster = on(16, 2, "h100")

    def high(**words: object) -> float:
        return training(olmoe, machine, 1e9, 4096, **({"cluster": cluster} | words))["step_seconds"].high  # type: ignore[arg-type]

    base = high()
    assert base < high(once="rank") < high(once="pair") and base > high(row_bytes=1.0)
    assert base > high(cluster=None)
    alone = training(olmoe, machine, 1e9, 4096)
    assert alone.keys() == {"device_hours", "days", "step_seconds", "computing_seconds"}
    one = training(olmoe, Machine(device=DEVICES["h100"]), 1e9, 4096, cluster=on(1))
    assert one.keys() == alone.keys() and one["device_hours"] == pytest.approx(alone["device_hours"])
    inside = training(
        olmoe, Machine(device=DEVICES["h100"], count=8), 1e9, 4096, cluster=on(8, device="h100")
    )
    assert inside["gradient_seconds"].high < 0.1, "one host sums gradients over its own links"
