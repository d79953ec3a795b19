"""Which experts deserve more bits: what each one's rounding does to the prediction, measured on text.

An expert whose weights are rounded moves its layer's output by d. To first order that moves a token's loss by g d, g
the gradient of the loss with respect to that output, and the mean of (g d)^2 is about twice the KL divergence from the
model as it was: the Fisher information takes the place of the second derivative. An expert that is chosen often,
weighs much, and rounds badly where the model is sensitive has a large sum of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moiety.errors import ConfigError, UsageError
from moiety.formats import format_named
from moiety.formats.tiles import shape_of
from moiety.model.slots import Slot, pair_of, room, slots
from moiety.model.transformer import Transformer
from moiety.moe.experts import Experts
from moiety.quant.quantize import Policy, pack_stack
from moiety.routing import Routing

__all__ = ["Calibration", "LayerCalibration", "MixedPolicy", "calibrate"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCalibration:
    """The experts of one layer.

    Args:
        pairs_E: How often each was chosen.
        moved_E: Squared change of the layer's output by an expert in the lower format, over the output's square.
        gain_E: What the higher format takes away from the summed squared change of the loss.
        weights: Of one expert.
        bytes_low: Of one expert in the lower format.
        bytes_high: Of one expert in the higher format.
    """

    pairs_E: Tensor
    moved_E: Tensor
    gain_E: Tensor
    weights: int
    bytes_low: int
    bytes_high: int


@dataclass(frozen=True, kw_only=True)
class MixedPolicy:
    """A policy with a format for each routed expert: `experts` has them by the path of the layer's experts."""

    base: Policy
    experts: Mapping[str, tuple[str, ...]]

    def __call__(self, name: str, shape: tuple[int, ...]) -> str | tuple[str, ...] | None:
        """A format, or one for each expert."""
        choice = self.base(name, shape)
        return self.experts.get(name.rpartition(".")[0], choice) if choice else choice


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What was measured of every layer, by the path of its experts."""

    low: str
    high: str
    layers: Mapping[str, LayerCalibration]

    def policy(self, base: Policy, *, bits: float) -> MixedPolicy:
        """Give the higher format where it removes most error per byte, until the budget of all experts is used up.

        Args:
            base: What everything else is packed in.
            bits: Of a weight of the routed experts, on average, scales and padded tiles included, but not the zeros that
                fill an expert up to a page.

        Raises:
            ConfigError: less than all experts take in the lower format.
        """
        order = [
            (float(gain) / max(one.bytes_high - one.bytes_low, 1), path, expert)
            for path, one in self.layers.items()
            for expert, gain in enumerate(one.gain_E)
        ]
        weights = sum(len(one.gain_E) * one.weights for one in self.layers.values())
        least = sum(len(one.gain_E) * one.bytes_low for one in self.layers.values())
        left = bits * weights / 8 - least
        if left < 0:
            raise ConfigError(
                f"{bits:g} bits are too few: all experts in {self.low} take {8 * least / weights:.2f}",
                hint="give more, or a smaller format",
            )
        formats = {path: [self.low] * len(one.gain_E) for path, one in self.layers.items()}
        for gain, path, expert in sorted(order, reverse=True):
            more = self.layers[path].bytes_high - self.layers[path].bytes_low
            if gain > 0 and more <= left:
                formats[path][expert] = self.high
                left -= more
        return MixedPolicy(base=base, experts={path: tuple(names) for path, names in formats.items()})


@contextmanager
def _outputs(model: Transformer) -> Iterator[list[tuple[str, Tensor, Routing, Tensor]]]:
    """Path, input, routing and output of experts run inside with gradients on; outputs keep their gradients."""
    seen: list[tuple[str, Tensor, Routing, Tensor]] = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]

    def keeper(path: str) -> Any:
        def keep(module: nn.Module, given: tuple[Tensor, Routing], output: Tensor) -> None:
            if torch.is_grad_enabled():
                output.requires_grad_().retain_grad()
                seen.append((path, given[0].detach(), given[1], output))

        return keep

    model.requires_grad_(False)
    handles = [module.register_forward_hook(keeper(path)) for path, module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_()


def calibrate(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    low: str = "int4-g32",
    high: str = "int8-g32",
) -> Calibration:
    """Measure every routed expert of a model that is not packed.

    Args:
        model: On the CPU, as it is used (in evaluation mode).
        batches: Tokens and targets, int64 (B, S); some thousand tokens that nothing is evaluated on later.
        low: The format that experts have by default.
        high: The one that some get instead.

    Raises:
        ConfigError: no such format.
        UsageError: a model without experts, or no text.
    """
    groups = slots(model)
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
    experts = {path: (module, list(groups[path])) for path, module in modules}
    nothing = UsageError(
        "there is nothing to calibrate", hint="give an MoE that is not packed, and some text for it"
    )
    if not experts:
        raise nothing
    sums = {path: torch.zeros(4, module.count, dtype=torch.float64) for path, (module, _) in experts.items()}
    size = dict.fromkeys(experts, 0.0)
    with _outputs(model) as seen:
        for tokens_BS, targets_BS in batches:
            with torch.enable_grad():
                loss = model(tokens_BS).cross_entropy(targets_BS)
                loss.backward()
            for path, x_TD, routing, y_TD in seen:
                module, group = experts[path]
                sums[path] += _changes(module, group, (low, high), x_TD, routing, y_TD)
                size[path] += float(y_TD.detach().square().sum())
            seen.clear()
    if not all(size.values()):
        raise nothing
    return Calibration(
        low=format_named(low).name,
        high=format_named(high).name,
        layers={
            path: LayerCalibration(
                pairs_E=sums[path][0],
                moved_E=sums[path][1] / size[path],
                gain_E=sums[path][2] - sums[path][3],
                weights=sum(slot.rows * slot.columns for slot in group),
                bytes_low=_bytes(group, low),
                bytes_high=_bytes(group, high),
            )
            for path, (_, group) in experts.items()
        },
    )


def _bytes(group: list[Slot], form: str) -> int:
    """Of one expert's tiles."""
    shapes = [
        shape_of(
            format_named(form), experts=1, rows=slot.rows, columns=slot.columns, interleaved=slot.interleaved
        )
        for slot in group
    ]
    return sum(math.prod(shape) for shape in shapes)


@torch.no_grad()
def _changes(
    module: Experts, group: list[Slot], formats: tuple[str, str], x_TD: Tensor, routing: Routing, y_TD: Tensor
) -> Tensor:
    """Of each expert: pairs, squared movement in the lower format, squared change of the loss in both, (4, E)."""
    assert y_TD.grad is not None
    alone = Routing(
        token_N=torch.arange(routing.pairs),
        weight_N=routing.weight_N.detach(),
        counts_E=routing.counts_E,
        tokens=routing.pairs,
    )
    x_ND, grad_ND = routing.gather(x_TD), routing.gather(y_TD.grad)
    true_ND = module(x_ND, alone)
    found = torch.zeros(4, module.count, dtype=torch.float64)
    found[0] = routing.counts_E
    everyone = list(range(module.count))
    for place, name in enumerate(formats):
        form = format_named(name)
        packed = room(group, [form] * len(group))
        for slot in group:
            pack_stack(module.get_parameter(slot.leaf), everyone, packed.weights[slot.leaf])
        change_ND = pair_of(module, packed)(x_ND, alone) - true_ND
        if place == 0:
            found[1].index_add_(0, routing.expert_N, change_ND.square().sum(1).double())
        found[2 + place].index_add_(0, routing.expert_N, (change_ND * grad_ND).sum(1).square().double())
    return found
