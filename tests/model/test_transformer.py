"""The decoder: as transformers', causal, the same in pieces, in batches and recomputed; or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moiety
from moiety.errors import ConfigError, UsageError
from moiety.model import checkpoint
from moiety.model.context import KVCache
from moiety.model.transformer import ModelOutput, Transformer
from moiety.moe.balance import load_balance_loss
from moiety.moe.layer import MoE
from moiety.moe.routers import Needs, Router, RouterContext
from moiety.routing import Routing
from tests import tiny

every_config = pytest.mark.parametrize("name", tiny.CONFIGS)
every_moe = pytest.mark.parametrize("name", [n for n, config in tiny.CONFIGS.items() if config.moe])


def moe_of(model: Transformer, layer: int) -> MoE:
    feed_forward = model.blocks[layer].feed_forward
    assert isinstance(feed_forward, MoE)
    return feed_forward


def losses(output: ModelOutput, target: Tensor) -> Tensor:
    """Cross entropy and a term through every router."""
    total = output.cross_entropy(target) / target.numel()
    for routing in output.routing.values():
        total = total + 0.1 * load_balance_loss(routing)
    return total


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    reached = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad for name, grad in reached.items() if grad is not None}


def assert_same_gradients(
    ours: dict[str, Tensor], true: dict[str, Tensor], *, rtol: float = 0, atol: float = 0
) -> None:
    """Bit for bit, unless a tolerance is given."""
    assert ours.keys() == true.keys()
    for name, value in true.items():
        assert torch.allclose(ours[name], value, rtol=rtol, atol=atol), name


def assert_close_in_float32(ours: Tensor, true: Tensor) -> None:
    """1e-5 where logits are of the size of 1."""
    size = float(true.abs().mean())
    assert 0.3 < size < 10, size
    assert (ours - true).abs().max() <= 1e-5 * max(size, 1.0)


class TestTwins:
    @pytest.mark.parametrize("name", tiny.TWINS)
    @torch.no_grad()
    def test_transformers_computes_the_same_from_our_checkpoint(self, name: str, tmp_path: Path) -> None:
        model = tiny.model(name)
        twin, tokens = tiny.twin_from(model, tmp_path / "ours"), tiny.tokens(model, 3, 50)
        assert (twin.config._attn_implementation, twin.config._experts_implementation) == ("eager", "eager")
        assert_close_in_float32(model(tokens).logits, twin(tokens).logits)

    @pytest.mark.parametrize("name", tiny.TWINS)
    @torch.no_grad()
    def test_we_compute_the_same_from_theirs(self, name: str, tmp_path: Path) -> None:
        twin = tiny.twin(name)
        twin.save_pretrained(tmp_path / "theirs")
        model = moiety.load(tmp_path / "theirs")
        assert model.config == tiny.CONFIGS[name]
        tokens = tiny.tokens(model, 3, 50)
        assert_close_in_float32(model(tokens).logits, twin(tokens).logits)

    @pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "llama"])
    def test_gradients_are_those_of_transformers(self, name: str, tmp_path: Path) -> None:
        model = tiny.model(name)
        twin, tokens = tiny.twin_from(model, tmp_path / "ours"), tiny.tokens(model, 2, 20)
        target = tiny.tokens(model, 2, 20)
        output = model(tokens)
        ours = gradients(model, output.cross_entropy(target))
        logits = twin(tokens).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, target.flatten(), reduction="sum").backward()
        theirs = {"embed.weight": twin.model.embed_tokens.weight, "norm.weight": twin.model.norm.weight}
        for layer, block in enumerate(twin.model.layers):
            theirs[f"blocks.{layer}.attention.out.weight"] = block.self_attn.o_proj.weight
            theirs[f"blocks.{layer}.attention_norm.weight"] = block.input_layernorm.weight
            if layer in model.config.moe_layers:
                theirs[f"blocks.{layer}.feed_forward.gate.weight"] = block.mlp.gate.weight
        for ours_name, parameter in theirs.items():
            error = (ours[ours_name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 2e-5, (ours_name, float(error))


class TestPositions:
    @every_config
    @torch.no_grad()
    def test_decoding_in_uneven_pieces_equals_the_full_forward(self, name: str) -> None:
        model = tiny.model(name, dtype=torch.float64)
        tokens = tiny.tokens(model, 2, 19)
        whole = model(tokens)
        cache = KVCache(model.config, 2, 19, dtype=torch.float64)
        parts, start = [], 0
        for positions in (5, 1, 1, 7, 2, 3):
            parts.append(model(tokens[:, start : start + positions], cache=cache))
            start += positions
            assert cache.length == start
        logits = torch.cat([part.logits for part in parts], dim=1)
        tiny.assert_exact(logits, whole.logits)
        for layer, routing in whole.routing.items():
            assert torch.equal(sum(part.routing[layer].counts_E for part in parts), routing.counts_E)

    @every_config
    @torch.no_grad()
    def test_a_later_token_changes_nothing_before_it(self, name: str) -> None:
        model = tiny.model(name, dtype=torch.float64)
        tokens = tiny.tokens(model, 2, 12)
        changed = tokens.clone()
        changed[0, 8] = (changed[0, 8] + 1) % model.config.vocab_size
        before, after = model(tokens).logits, model(changed).logits
        tiny.assert_exact(after[0, :8], before[0, :8])
        tiny.assert_exact(after[1], before[1])
        moved = (after[0, 8:] - before[0, 8:]).abs().amax(-1)
        assert bool((moved > 1e-4).all()), "every later position sees it"

    @every_config
    @torch.no_grad()
    def test_a_sequence_does_not_see_its_batch(self, name: str) -> None:
        model = tiny.model(name, dtype=torch.float64)
        tokens = tiny.tokens(model, 5, 9)
        together = model(tokens).logits
        for sequence in range(5):
            alone = model(tokens[sequence : sequence + 1]).logits[0]
            tiny.assert_exact(alone, together[sequence])

    @torch.no_grad()
    def test_order_matters(self) -> None:
        model = tiny.model("mixtral", dtype=torch.float64)
        tokens = torch.arange(8)[None]
        swapped = tokens[:, [1, 0, *range(2, 8)]]
        assert (model(tokens).logits[:, -1] - model(swapped).logits[:, -1]).abs().max() > 1e-4


class TestPadding:
    @every_config
    @torch.no_grad()
    def test_padding_at_the_end_changes_nothing_before_it(self, name: str) -> None:
        model = tiny.model(name, dtype=torch.float64)
        tokens, lengths = tiny.tokens(model, 3, 10), (10, 6, 1)
        valid = torch.arange(10) < torch.tensor(lengths)[:, None]
        output = model(tokens, valid_BS=valid)
        for sequence, length in enumerate(lengths):
            alone = model(tokens[sequence : sequence + 1, :length]).logits[0]
            tiny.assert_exact(output.logits[sequence, :length], alone)
        assert set(output.routing) == set(model.config.moe_layers)
        for routing in output.routing.values():
            assert model.config.moe is not None
            assert bool(valid.flatten()[routing.token_N].all()), "padding was routed"
            assert (
                routing.pairs == sum(lengths) * model.config.moe.experts_per_token == routing.counts_E.sum()
            )

    @torch.no_grad()
    def test_nothing_but_padding(self) -> None:
        model = tiny.model("shared")
        output = model(tiny.tokens(model, 2, 3), valid_BS=torch.zeros(2, 3, dtype=torch.bool))
        assert bool(output.logits.isfinite().all())
        assert [routing.pairs for routing in output.routing.values()] == [0, 0, 0]

    @pytest.mark.parametrize("shape", [(1, 1), (0, 4), (3, 0), (0, 0)])
    @pytest.mark.parametrize("name", ["mixtral", "llama", "sigmoid"])
    def test_one_token_and_none(self, name: str, shape: tuple[int, int]) -> None:
        model = tiny.model(name)
        output = model(torch.zeros(shape, dtype=torch.int64))
        assert output.logits.shape == (*shape, 61)
        for routing in output.routing.values():
            assert routing.tokens == shape[0] * shape[1]
        output.logits.sum().backward()


class Fickle:
    """A router that answers otherwise every second time it is asked, as a near-tie may on a device."""

    def __init__(self, inner: Router) -> None:
        self.inner, self.asked = inner, 0

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def check(self, experts: int) -> None:
        self.inner.check(experts)

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return self.inner.score(logits_TE, context)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        self.asked += 1
        return self.inner.choose(score_TE if self.asked % 2 else score_TE.flip(0), context)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        return self.inner.weigh(score_TE, pairs, context)


class TestRecomputation:
    @every_config
    def test_same_loss_and_the_same_bits_of_every_gradient(self, name: str) -> None:
        model = tiny.model(name, dtype=torch.float64)
        again = tiny.clone(model, checkpointing=True)
        tokens, target = tiny.tokens(model, 2, 9), tiny.tokens(model, 2, 9)
        loss, recomputed = losses(model(tokens), target), losses(again(tokens), target)
        assert torch.equal(loss, recomputed)
        ours, true = gradients(again, recomputed), gradients(model, loss)
        assert_same_gradients(ours, true, rtol=0, atol=0)
        assert len(true) == len(list(model.parameters()))
        assert all(bool(value.any()) for name, value in true.items() if "feed_forward" not in name)

    @every_moe
    def test_a_router_is_asked_once_and_its_first_answer_is_repeated(self, name: str) -> None:
        model = tiny.model(name, dtype=torch.float64)
        again = tiny.clone(model, checkpointing=True)
        for layer in model.config.moe_layers:
            moe = moe_of(again, layer)
            moe.router = Fickle(moe.router)
        tokens, target = tiny.tokens(model, 2, 9), tiny.tokens(model, 2, 9)
        ours = gradients(again, losses(again(tokens), target))
        asked = [moe_of(again, layer).router.asked for layer in model.config.moe_layers]  # type: ignore[attr-defined]
        assert asked == [1] * len(model.config.moe_layers)
        assert_same_gradients(ours, gradients(model, losses(model(tokens), target)), rtol=0, atol=0)
        first, second = again(tokens).routing, again(tokens).routing
        for layer in model.config.moe_layers:
            chosen = [routing[layer].dense() != 0 for routing in (first, second)]
            assert not torch.equal(*chosen), "the second answer is another one, or this proves nothing"

    @pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_plain", "sigmoid"])
    def test_ties_that_fall_the_other_way_in_the_recomputation(self, name: str) -> None:
        """Experts 0 and 1 tie exactly; between forward and backward noise of 1e-12 parts them."""
        model = tiny.model(name, dtype=torch.float64)
        layers = model.config.moe_layers
        with torch.no_grad():
            for layer in layers:
                moe = moe_of(model, layer)
                moe.gate.weight[1] = moe.gate.weight[0]
                if moe.selection_bias is not None:
                    moe.selection_bias.zero_()
        again = tiny.clone(model, checkpointing=True)
        tokens, target = tiny.tokens(model, 6, 20), tiny.tokens(model, 6, 20)
        true = gradients(model, losses(model(tokens), target))
        output = again(tokens)
        for layer in layers:  # through `.data`: to autograd the weight is as it was saved
            moe_of(again, layer).gate.weight.data[1] += 1e-12 * torch.randn(model.config.d_model).double()
        ours = gradients(again, losses(output, target))
        assert_same_gradients(ours, true, rtol=1e-8, atol=1e-10)
        with torch.no_grad():
            anew = again(tokens)
        fallen = [not torch.equal(anew.routing[n].token_N, output.routing[n].token_N) for n in layers]
        assert any(fallen), "no tie stood at the edge of a choice, so this proves nothing"

    def test_padding_and_pins_hold_in_the_recomputation(self) -> None:
        model = tiny.model("mixtral", dtype=torch.float64)
        again = tiny.clone(model, checkpointing=True)
        tokens, target = tiny.tokens(model, 2, 7), tiny.tokens(model, 2, 7)
        valid = torch.arange(7) < torch.tensor([7, 4])[:, None]
        pinned = {1: model(tiny.tokens(model, 2, 7), valid_BS=valid).routing[1].pinned()}
        given: dict[str, Any] = {"valid_BS": valid, "pinned": pinned}
        ours, true = (gradients(m, losses(m(tokens, **given), target)) for m in (again, model))
        assert_same_gradients(ours, true, rtol=0, atol=0)
        assert torch.equal(again(tokens, **given).routing[1].token_N, pinned[1].token_N)

    def test_activations_are_not_kept(self) -> None:
        """Bytes that autograd holds between forward and backward."""
        held = {}
        for checkpointing in (False, True):
            model = tiny.model("mixtral", checkpointing=checkpointing)
            seen: dict[int, int] = {}

            def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
                seen[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(tiny.tokens(model, 4, 64))
            held[checkpointing] = sum(seen.values())
        assert held[True] < held[False] / 3, held


class TestPinning:
    @every_moe
    @torch.no_grad()
    def test_a_pinned_routing_is_repeated_layer_by_layer(self, name: str) -> None:
        model = tiny.model(name, dtype=torch.float64)
        tokens = tiny.tokens(model, 2, 9)
        first = model(tokens)
        pinned = {layer: routing.pinned() for layer, routing in first.routing.items()}
        torch.testing.assert_close(model(tokens, pinned=pinned).logits, first.logits, rtol=0, atol=0)
        for layer in pinned:
            moe_of(model, layer).gate.weight.normal_()
        free, repeated = model(tokens).routing, model(tokens, pinned=pinned).routing
        for layer, routing in first.routing.items():
            assert not torch.equal(free[layer].token_N, routing.token_N), layer
            assert torch.equal(repeated[layer].token_N, routing.token_N), layer
            assert torch.equal(repeated[layer].counts_E, routing.counts_E), layer
            weights = [weight.weight_N for weight in (repeated[layer], routing)]
            assert not torch.allclose(weights[0], weights[1]), "weights are made anew"

    @torch.no_grad()
    def test_other_layers_stay_free(self) -> None:
        model = tiny.model("mixtral", dtype=torch.float64)
        tokens = tiny.tokens(model, 1, 30)
        free, other = model(tokens).routing, model(tokens.flip(1)).routing
        mixed = model(tokens, pinned={1: other[1].pinned()}).routing
        assert torch.equal(mixed[0].token_N, free[0].token_N), "before the pinned layer nothing changes"
        assert torch.equal(mixed[1].token_N, other[1].token_N)
        assert not torch.equal(mixed[2].token_N, other[2].token_N)


class TestRefusals:
    def test_an_unknown_backend(self) -> None:
        with pytest.raises(ConfigError, match="no backend 'fast'"):
            Transformer(tiny.CONFIGS["mixtral"], backend="fast")

    @pytest.mark.parametrize("shape", [(5,), (), (1, 2, 3)])
    def test_tokens_of_a_wrong_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(UsageError, match=r"\(sequences, positions\) is wanted"):
            tiny.model("mixtral")(torch.zeros(shape, dtype=torch.int64))

    @torch.no_grad()
    def test_a_full_cache_and_the_cache_stays_usable(self) -> None:
        model = tiny.model("mixtral", dtype=torch.float64)
        tokens, cache = tiny.tokens(model, 1, 8), KVCache(model.config, 1, 6, dtype=torch.float64)
        model(tokens[:, :4], cache=cache)
        with pytest.raises(UsageError, match="6 positions, 4 are used and 3 more"):
            model(tokens[:, 4:7], cache=cache)
        assert cache.length == 4
        last = model(tokens[:, 4:6], cache=cache).logits
        tiny.assert_exact(last, model(tokens[:, :6]).logits[:, 4:])
        with pytest.raises(UsageError, match="6 are used and 1 more"):
            model(tokens[:, :1], cache=cache)


class TestWeights:
    @every_config
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_save_and_load_give_equal_logits(self, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
        model = tiny.model(name, dtype=dtype)
        model.save(tmp_path / "model")
        back = moiety.load(tmp_path / "model")
        assert back.config == model.config
        tokens = tiny.tokens(model, 2, 13)
        assert torch.equal(back(tokens).logits, model(tokens).logits)
        assert {n: t.dtype for n, t in back.state_dict().items()} == {
            n: t.dtype for n, t in model.state_dict().items()
        }

    @pytest.mark.parametrize("convert", ["bfloat16", "half", "double"])
    def test_the_selection_bias_stays_float32(self, convert: str) -> None:
        model = tiny.model("sigmoid")
        before = {name: b.clone() for name, b in model.named_buffers() if name.endswith("selection_bias")}
        getattr(model, convert)()
        assert len(before) == len(model.config.moe_layers)
        assert model.embed.weight.dtype != torch.float32
        for name, buffer in model.named_buffers():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name]), name
            assert buffer.any()

    @every_config
    def test_bfloat16_runs_and_routes_in_float32(self, name: str) -> None:
        model = tiny.model(name, dtype=torch.bfloat16)
        output = model(tiny.tokens(model, 2, 9))
        assert output.logits.dtype == torch.bfloat16
        for routing in output.routing.values():
            assert routing.logits_TE is not None
            assert routing.logits_TE.dtype == torch.float32

    def test_first_weights(self) -> None:
        model = Transformer(tiny.config(moe=tiny.experts(bias=True), d_model=64, vocab_size=500))
        for name, tensor in model.named_parameters():
            parameter = tensor.detach()
            small = name.endswith(("attention.out.weight", ".down"))
            deviation = (2 / (5 * 64)) ** 0.5 / (6**0.5 if small else 1)
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif name.endswith("norm.weight"):
                assert bool((parameter == 1).all()), name
            else:
                assert float(parameter.std()) == pytest.approx(deviation, rel=0.15), name
                assert abs(float(parameter.mean())) < 4 * deviation / parameter.numel() ** 0.5, name

    @pytest.mark.parametrize("name", ["llama", "llama_biases"])
    def test_a_tied_head_is_the_embedding(self, name: str) -> None:
        model = tiny.model(name)
        output = model(tiny.tokens(model, 1, 2))
        assert (output.head_weight is model.embed.weight) == model.config.tied
        assert ("head.weight" in model.state_dict()) != model.config.tied

    def test_logits_are_hidden_times_head(self) -> None:
        model = tiny.model("olmoe", dtype=torch.float64)
        output = model(tiny.tokens(model, 2, 3))
        assert output.hidden.shape == (2, 3, 24)
        tiny.assert_exact(output.logits, output.hidden @ output.head_weight.T)

    @torch.no_grad()
    def test_a_loaded_checkpoint_can_change_dtype(self, tmp_path: Path) -> None:
        model = tiny.model("sigmoid")
        model.save(tmp_path / "model")
        wide = checkpoint.load(tmp_path / "model", dtype=torch.float64)
        tokens = tiny.tokens(model, 1, 9)
        assert wide.embed.weight.dtype == torch.float64
        assert (wide(tokens).logits - model(tokens).logits).abs().max() < 1e-4
