"""The suite turns red for real bugs: each is planted in a copy of the package and the tests must notice.

A mutation is one textual change of one file, and the tests that are expected to catch it. On the unchanged copy the
same tests pass, so it is the planted bug that they notice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.backends.builds import build, compiler

ROOT = Path(__file__).resolve().parents[1]
BACKENDS, LAYER, METAMORPHIC = (
    "tests/backends/test_backends.py",
    "tests/moe/test_layer.py",
    "tests/moe/test_metamorphic.py",
)
ROUTERS, BALANCE, LOOP = "tests/moe/test_routers.py", "tests/moe/test_balance.py", "tests/train/test_loop.py"
ROPE, TRANSFORMER, STATE = (
    "tests/model/test_rope.py",
    "tests/model/test_transformer.py",
    "tests/train/test_state.py",
)
ROUTING, LOSS = "tests/test_routing.py", "tests/model/test_loss.py"
ZOO, IN_LAYERS, WRAPPERS = (
    "tests/moe/test_router_zoo.py",
    "tests/moe/test_router_layers.py",
    "tests/moe/test_wrappers.py",
)
TILES, QUANTIZE, QUANTIZED, EXPERT_FILE = (
    "tests/formats/test_tiles.py",
    "tests/quant/test_quantize.py",
    "tests/model/test_quantized.py",
    "tests/model/test_expert_file.py",
)
PAGES, ENGINE, SAMPLING = (
    "tests/infer/test_scheduler.py",
    "tests/infer/test_engine.py",
    "tests/infer/test_sampling.py",
)
UPCYCLE = "tests/moe/test_upcycle.py"
CALIBRATE, PACKED = "tests/quant/test_calibrate.py", "tests/moe/test_packed.py"
ACROSS_LAYER, ACROSS_RUN = "tests/parallel/test_expert_parallel.py", "tests/parallel/test_training.py"
CPU, CPU_ROUTING = "tests/backends/test_cpu.py", "tests/backends/test_cpu_routing.py"


class Mutation(NamedTuple):
    """A bug: in `file`, `right` becomes `wrong`; `tests` must then fail."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


MUTATIONS = (
    Mutation(
        "zero kernel",
        "backends/grouped.py",
        "return torch.embedding_bag(y_ND, order_N, routing.first_pair_T, False, 0, False, weights)[0]",
        "return y_ND.new_zeros(routing.tokens, y_ND.shape[1])",
        BACKENDS,
    ),
    Mutation(
        "transposed square weights",
        "backends/matmul.py",
        "        torch.mm(x_ND, weight_FD.t(), out=out_NF)",
        "        torch.mm(x_ND, weight_FD if out_NF.shape[1] == x_ND.shape[1] else weight_FD.t(), out=out_NF)",
        BACKENDS,
    ),
    Mutation(
        "swapped gate and up",
        "backends/grouped.py",
        "act.forward(pre[:, : weights.d_ff]).mul_(pre[:, weights.d_ff :])",
        "act.forward(pre[:, weights.d_ff :]).mul_(pre[:, : weights.d_ff])",
        BACKENDS,
    ),
    Mutation(
        "dropped last expert",
        "routing.py",
        "for e, (start, stop) in enumerate(zip(starts, ends, strict=True)) if stop > start\n        ]",
        "for e, (start, stop) in enumerate(zip(starts, ends, strict=True)) if start < stop < ends[-1]\n        ]",
        BACKENDS,
    ),
    Mutation(
        "off-by-one offsets",
        "routing.py",
        "        starts = [0, *ends[:-1]]",
        "        starts = [0, *(max(end - 1, 0) for end in ends[:-1])]",
        BACKENDS,
    ),
    Mutation(
        "detached balance loss",
        "moe/balance.py",
        "    probability_E = _mean_probability(routing)\n",
        "    probability_E = _mean_probability(routing).detach()\n",
        BALANCE,
    ),
    Mutation(
        "double softmax",
        "moe/routers/token_choice.py",
        "        weight_N = pairs.at_pairs(score_TE)\n        if self.renormalize:\n"
        "            weight_N = divided(weight_N, pairs)",
        "        weight_N = pairs.at_pairs(score_TE.softmax(-1))\n        if self.renormalize:\n"
        "            weight_N = divided(weight_N, pairs)",
        ROUTERS,
    ),
    Mutation(
        "doubled gradients of experts in other processes",
        "parallel/expert_parallel.py",
        "return _exchange(grad_MD, ctx.trip.rows, ctx.trip.group)[0], None",
        "return 2 * _exchange(grad_MD, ctx.trip.rows, ctx.trip.group)[0], None",
        ACROSS_LAYER,
    ),
    Mutation(
        "gradients of experts added to those of others",
        "parallel/mesh.py",
        'over = "data" if self._layout(name).along == "expert" else "copies"',
        'over = "copies"',
        ACROSS_RUN,
    ),
    Mutation(
        "a norm of one process's experts",
        "parallel/mesh.py",
        '        dist.all_reduce(parts[1], group=self.groups["expert"])\n',
        "",
        ACROSS_RUN,
    ),
    Mutation(
        "a balance loss by one process's load",
        "train/loop.py",
        "loads = known or world.summed(loads_of(output.routing))",
        "loads = known or loads_of(output.routing)",
        ACROSS_RUN,
    ),
    Mutation(
        "weights applied twice",
        "backends/grouped.py",
        "weights = None if weight_N is None else weight_N.to(y_ND.dtype)[order_N]",
        "weights = None if weight_N is None else weight_N.square().to(y_ND.dtype)[order_N]",
        BACKENDS,
    ),
    Mutation(
        "stale counts after dropping",
        "routing.py",
        "            counts_E=torch.bincount(self.expert_N[keep_N], minlength=self.experts),",
        "            counts_E=self.counts_E,",
        ROUTING,
    ),
    Mutation(
        "wrong rotary layout",
        "model/rope.py",
        "first, second = x_BHSd[..., one], x_BHSd[..., other]",
        "first, second = x_BHSd[..., : 2 * half : 2], x_BHSd[..., 1 : 2 * half : 2]",
        ROPE,
    ),
    Mutation(
        "selection bias in the weights",
        "moe/layer.py",
        "            weight_N = self._weigh(score_TE, pairs, context)",
        "            extra = 0 if self.selection_bias is None else self.selection_bias\n"
        "            weight_N = self._weigh(score_TE + extra, pairs, context)",
        LAYER,
    ),
    Mutation(
        "no gradient to the router",
        "backends/grouped.py",
        "        grad_weight = grad_weight_N[: plan.pairs] if need_weight else None",
        "        grad_weight = torch.zeros_like(grad_weight_N[: plan.pairs]) if need_weight else None",
        BACKENDS,
    ),
    Mutation(
        "padding is routed",
        "moe/layer.py",
        "                valid_T=valid_T,\n                bias_E=",
        "                valid_T=None,\n                bias_E=",
        METAMORPHIC,
    ),
    Mutation(
        "recomputation re-routes",
        "model/transformer.py",
        "again = replace(context, pinned={**context.pinned, **first})",
        "again = context",
        TRANSFORMER,
    ),
    Mutation(
        "ignored targets are scored",
        "model/loss.py",
        "    if not bool(scored_T.all()):",
        "    if False:",
        LOSS,
    ),
    Mutation(
        "steps that are not finite are applied",
        "train/loop.py",
        "    if finite:\n        optimizer.step()",
        "    if True:\n        optimizer.step()",
        LOOP,
    ),
    Mutation(
        "resume repeats a sequence",
        "train/loop.py",
        "        sequences_seen=batches[-1].sequences_seen,",
        "        sequences_seen=batches[-1].sequences_seen - 1,",
        LOOP,
    ),
    Mutation(
        "moments are lost on resume",
        "train/state.py",
        "    _restore_moments(folder, optimizer, world)\n    _restore_random",
        "    _restore_random",
        STATE,
    ),
    Mutation(
        "sparsemixer shrinks its gradient too",
        "moe/routers/token_choice.py",
        "weight_here_N.detach().masked_fill(whole_N, 0.0)",
        "weight_here_N.masked_fill(whole_N, 0.0)",
        ZOO,
    ),
    Mutation(
        "expert choice takes padding",
        "moe/routers/assigned.py",
        '            score_TE = score_TE.masked_fill(~context.valid_T[:, None], float("-inf"))\n',
        "",
        ZOO,
    ),
    Mutation(
        "a dropped second gives its share away",
        "moe/layer.py",
        "        return self.router.weigh(score_TE, pairs.wanted, context)[pairs.kept_N]",
        "        return self.router.weigh(score_TE, pairs, context)",
        IN_LAYERS,
    ),
    Mutation(
        "top-p stops one expert short",
        "moe/routers/token_choice.py",
        "best_TE.cumsum(dim=-1) - best_TE < self.p",
        "best_TE.cumsum(dim=-1) < self.p",
        ZOO,
    ),
    Mutation(
        "base is uneven",
        "moe/routers/assigned.py",
        "    room_E[: tokens % experts] += 1",
        "    room_E += tokens % experts",
        ZOO,
    ),
    Mutation(
        "null experts answer nothing",
        "moe/layer.py",
        'if self.null_experts and self.null_kind == "identity":',
        'if self.null_experts and self.null_kind == "":',
        IN_LAYERS,
    ),
    Mutation(
        "noise that grows with its exponent",
        "moe/layer.py",
        "deviation_TE = F.softplus(noise_TE)",
        "deviation_TE = noise_TE.exp()",
        IN_LAYERS,
    ),
    Mutation(
        "no gradient from experts not chosen",
        "moe/dense_gradient.py",
        "        return grad_TD, grad_N, None, None, None",
        "        return grad_TD, torch.zeros_like(grad_N), None, None, None",
        WRAPPERS,
    ),
    Mutation(
        "exploring outside of training",
        "moe/routers/wrappers.py",
        "self.probability.at(context.step) if context.training else 0.0",
        "self.probability.at(context.step)",
        WRAPPERS,
    ),
    Mutation(
        "dropout blind to the load",
        "moe/routers/wrappers.py",
        "draw_E < (self.rate * load_E).clamp(max=0.9)",
        "draw_E < self.rate",
        WRAPPERS,
    ),
    Mutation(
        "a straight-through that lets nothing through",
        "moe/routers/wrappers.py",
        "        return soft_N + (hard_N - soft_N).detach()",
        "        return hard_N",
        WRAPPERS,
    ),
    Mutation(
        "low and high nibbles exchanged in packing",
        "formats/tiles.py",
        "        tile = low | high << 4\n",
        "        tile = high | low << 4\n",
        TILES,
    ),
    Mutation(
        "gate and up rows on top of each other",
        "quant/quantize.py",
        "            at = start // ROWS * halves\n",
        "            at = start // ROWS\n",
        QUANTIZE,
    ),
    Mutation(
        "an expert's pairs go to its neighbour's weights",
        "moe/packed.py",
        "        counts_E=routing.counts_E[number_G],",
        "        counts_E=routing.counts_E[number_G].flip(0),",
        PACKED,
    ),
    Mutation(
        "packed weights pass no gradient on in silence",
        "moe/packed.py",
        "    return torch.is_grad_enabled() and (training or",
        "    return False and (training or",
        PACKED,
    ),
    Mutation(
        "projections that keep the tiles they had",
        "moe/packed.py",
        "            part.borrow(view.tiles)",
        '            part.borrow(view.tiles if "tiles" in part._buffers else part.tiles)',
        PACKED,
    ),
    Mutation(
        "checksums that are taken and not compared",
        "model/expert_file.py",
        "    if found != wanted:",
        "    if False:",
        EXPERT_FILE,
    ),
    Mutation(
        "experts begin anywhere",
        "model/checkpoint.py",
        "ordered, multiple=EXPERT_MULTIPLE)",
        "ordered, multiple=64)",
        EXPERT_FILE,
    ),
    Mutation(
        "bits to the experts that need them least",
        "quant/calibrate.py",
        "in sorted(order, reverse=True):",
        "in sorted(order):",
        CALIBRATE,
    ),
    Mutation(
        "slices are not scaled",
        "moe/upcycle.py",
        "return cut.slices * _changed(",
        "return _changed(",
        UPCYCLE,
    ),
    Mutation(
        "each matrix draws other columns anew",
        "moe/upcycle.py",
        '_generator(cut.seed, layer, expert, "columns")',
        "_generator(cut.seed, layer, expert, name)",
        UPCYCLE,
    ),
    Mutation(
        "a broken promise is kept silent",
        "train/upcycle.py",
        "    if exact is not None and exact > allowed:",
        "    if False:",
        "tests/train/test_upcycle.py",
    ),
    Mutation(
        "any expert numbers are believed",
        "model/quantized.py",
        "    if not whole or any(part != sorted(part) for part in said):",
        "    if not lists:",
        QUANTIZED,
    ),
    Mutation(
        "a page is free while another request holds it",
        "infer/pages.py",
        "        if self._references[page] == 0:\n            if page in self._key:",
        "        if self._references[page] <= 1:\n            if page in self._key:",
        PAGES,
    ),
    Mutation(
        "what follows a wrong guess is kept",
        "infer/runner.py",
        "        if row == len(piece.drafts) or token != piece.drafts[row]:",
        "        if row == len(piece.drafts):",
        ENGINE,
    ),
    Mutation(
        "a penalty that rewards",
        "infer/sampling.py",
        "        logits_V[seen] -= options.presence_penalty",
        "        logits_V[seen] += options.presence_penalty",
        SAMPLING,
    ),
)

# In the C kernels, which are built anew for each.
MUTATIONS_IN_C = (
    Mutation(
        "a wave that takes every expert along",
        "backends/native/run.c",
        "if (!counts[e] || (mask && !mask[e])) continue;",
        "if (!counts[e]) continue;",
        CPU,
    ),
    Mutation(
        "experts are where they would be without slots",
        "backends/native/run.c",
        "return w->place ? w->place[expert] : expert * w->expert_bytes;",
        "return expert * w->expert_bytes;",
        CPU,
    ),
    Mutation(
        "gate and up exchanged",
        "backends/native/run.c",
        "p->table->activate(p->activation, p->limit, one[i], two[i], one[i]);",
        "p->table->activate(p->activation, p->limit, two[i], one[i], one[i]);",
        CPU,
    ),
    Mutation(
        "the second panel repeats the first",
        "backends/native/run.c",
        "&p->x, p->row_of + start, count, out);",
        "&p->x, p->row_of + p->first[expert], count, out);",
        CPU,
    ),
    Mutation(
        "zero has no code",
        "backends/native/tile.h",
        "? total : -LEVEL(zero_of)(w->kind) * total;",
        "? total : 0;",
        CPU,
    ),
    Mutation(
        "the last columns are left out",
        "backends/native/tile.h",
        "left = columns - first < w->group ? columns - first : w->group;",
        "left = columns - first < w->group ? 0 : w->group;",
        CPU,
    ),
    Mutation(
        "the higher of equal experts wins",
        "backends/native/routing.c",
        "if (!marks[e] && numbers[e] > numbers[best]) best = e;",
        "if (!marks[e] && numbers[e] >= numbers[best]) best = e;",
        CPU_ROUTING,
    ),
)


def copy_of_the_repository(folder: Path) -> Path:
    """The package and its tests, to be damaged."""
    for name in ("moiety", "tests", "tools", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """pytest in a copy, stopping at the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def plant(mutation: Mutation, folder: Path) -> None:
    """Put the bug into a copy of the repository."""
    path = folder / "moiety" / mutation.file
    source = path.read_text(encoding="utf-8")
    assert source.count(mutation.right) == 1, f"{mutation.file} no longer has the line that this bug changes"
    path.write_text(source.replace(mutation.right, mutation.wrong), encoding="utf-8")


def assert_noticed(mutation: Mutation, folder: Path) -> None:
    result = run_tests(folder, mutation.tests)
    assert result.returncode == 1 and " failed" in result.stdout, (
        result.stdout[-2000:] + result.stderr[-2000:]
    )


@pytest.mark.timeout_s(600)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_planted_bug_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    plant(mutation, copy_of_the_repository(tmp_path))
    assert_noticed(mutation, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout_s(600)
@pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize("mutation", MUTATIONS_IN_C, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_bug_planted_in_c_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    plant(mutation, copy_of_the_repository(tmp_path))
    build(tmp_path / "moiety" / "backends" / f"_native{EXTENSION_SUFFIXES[0]}", root=tmp_path)
    assert_noticed(mutation, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout_s(600)
def test_the_unharmed_copy_passes(tmp_path: Path) -> None:
    folder = copy_of_the_repository(tmp_path)
    result = run_tests(folder, *sorted({mutation.tests for mutation in MUTATIONS + MUTATIONS_IN_C}))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
