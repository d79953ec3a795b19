"""Tokens per second of a whole training step: our MoE, its dense twin, and the same models in transformers.

A step is forward, losses, backward, clipping left out on both sides, fused AdamW; 4,096 tokens of random text;
width 256, 6 layers, 8 experts top-2 of width 704, 4,096 vocabulary entries, tied head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from _harness import Row, arguments, compare, finish, time_in_turn
from torch import Tensor, nn

from moiety import cost
from moiety.config import ModelConfig
from moiety.model.transformer import Transformer
from moiety.moe import balance
from moiety.train.model_options import ModelOptions

SEQUENCES, LENGTH, VOCABULARY = 16, 256, 4096
MODEL = ModelOptions(d_model=256, layers=6, heads=4, d_ff=704, experts=8, experts_per_token=2)


def our_loss(model: Transformer, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross entropy, and for an MoE the balance and z losses."""
    output = model(tokens_BS)
    loss = output.cross_entropy(targets_BS) / targets_BS.numel()
    for routing in output.routing.values():
        even, small = balance.load_balance_loss(routing), balance.z_loss(routing)
        loss = loss + (0.01 * even + 0.001 * small) / len(output.routing)
    return loss


def transformers_model(config: ModelConfig, implementation: str) -> nn.Module:
    """The same model there, its balance loss on."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.attention.kv_heads,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": config.tied,
    }
    if config.moe is None:
        return LlamaForCausalLM(LlamaConfig(intermediate_size=config.d_ff, **shape))
    model = MixtralForCausalLM(
        MixtralConfig(
            intermediate_size=config.moe.d_ff,
            num_local_experts=config.moe.experts,
            num_experts_per_tok=config.moe.experts_per_token,
            sliding_window=None,
            output_router_logits=True,
            **shape,
        )
    )
    model.set_experts_implementation(implementation)
    return model


def step_of(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], dtype: str, device: str
) -> Callable[[], None]:
    """One training step on fresh random tokens."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        text = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            value = loss(text[:, :-1], text[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(dtype: str, device: str, seconds: float) -> list[Row]:
    """The rows of one dtype."""
    config = replace(MODEL.config(VOCABULARY, LENGTH))
    dense_config = cost.dense_twin(config)
    methods: dict[str, Callable[[], None]] = {}
    for name, one in (("moe", config), ("dense twin", dense_config)):
        model = Transformer(one)
        methods[name] = step_of(model, lambda x, y, model=model: our_loss(model, x, y), dtype, device)
    for name in ("grouped_mm", "eager"):
        peer = transformers_model(config, name)
        methods[f"transformers {name}"] = step_of(
            peer, lambda x, y, peer=peer: peer(input_ids=x, labels=x).loss, dtype, device
        )
    peer_dense = transformers_model(dense_config, "eager")
    methods["transformers dense"] = step_of(
        peer_dense, lambda x, y: peer_dense(input_ids=x, labels=x).loss, dtype, device
    )
    times = time_in_turn(methods, seconds=seconds, cuda=device == "cuda")
    active, tokens = cost.parameters(config).active, SEQUENCES * LENGTH
    note = f"{tokens} tokens a step, {active / 1e6:.1f}M active parameters"
    return [
        compare(
            f"step, {dtype}: MoE against its dense twin",
            times,
            ours="moe",
            peers=["dense twin"],
            bar=0.75,
            note=note,
        ),
        compare(
            f"step, {dtype}: MoE against transformers",
            times,
            ours="moe",
            peers=["transformers grouped_mm", "transformers eager"],
            bar=1.5,
            note=note,
        ),
        compare(
            f"step, {dtype}: dense against transformers",
            times,
            ours="dense twin",
            peers=["transformers dense"],
            bar=None,
        ),
    ]


def main() -> int:
    """Both dtypes, or with --quick bf16 alone."""
    options = arguments(__doc__ or "")
    torch.manual_seed(0)
    dtypes = ("bf16",) if options.quick else ("bf16", "fp32")
    rows: list[Row] = []
    for dtype in dtypes:
        rows += measure(dtype, options.device, seconds=10.0 if options.quick else 60.0)
    return finish("train", rows)


if __name__ == "__main__":
    sys.exit(main())
