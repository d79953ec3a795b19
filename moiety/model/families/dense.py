"""Dense families."""

from __future__ import annotations

from moiety.model.families.base import Family
from moiety.model.families.names import (
    BIASES,
    COMMON_DEFAULTS,
    COMMON_KEYS,
    COMMON_TENSORS,
    DENSE_TENSORS,
    SWITCHED,
    WHOLE_HEADS,
)
from moiety.model.families.rope import rope
from moiety.model.families.rules import late, windows

__all__ = ["DENSE"]

_LATE_WINDOWS = windows(
    switch="use_sliding_window", default=late, typed=True, more_keys=("max_window_layers",)
)

_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={
        **COMMON_KEYS, "intermediate_size": "d_ff", "hidden_act": "activation", "attention_bias": BIASES,
        "mlp_bias": "feed_forward_bias",
    },
    defaults={**COMMON_DEFAULTS, "mlp_bias": False},
    rules=(rope(),),
    needs=WHOLE_HEADS,
    tensors={**COMMON_TENSORS, **DENSE_TENSORS},
)  # fmt: skip
_MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys={**COMMON_KEYS, "intermediate_size": "d_ff", "hidden_act": "activation"},
    defaults=COMMON_DEFAULTS,
    absent={"sliding_window": 4096},
    rules=(rope(), windows()),
    tensors={**COMMON_TENSORS, **DENSE_TENSORS},
)
_QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys={**COMMON_KEYS, "intermediate_size": "d_ff", "hidden_act": "activation"},
    defaults={**COMMON_DEFAULTS, **SWITCHED},
    absent={"sliding_window": 4096},
    fixed={"attention.qkv_bias": True},
    rules=(rope(), _LATE_WINDOWS),
    tensors={**COMMON_TENSORS, **DENSE_TENSORS},
)
_QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys={
        **COMMON_KEYS, "intermediate_size": "d_ff", "hidden_act": "activation", "attention_bias": BIASES,
    },
    defaults={**COMMON_DEFAULTS, **SWITCHED},
    absent={"sliding_window": 4096, "head_dim": 128},
    fixed={"attention.qk_norm": "head"},
    rules=(rope(), _LATE_WINDOWS),
    tensors={**COMMON_TENSORS, **DENSE_TENSORS},
)  # fmt: skip
DENSE = (_LLAMA, _MISTRAL, _QWEN2, _QWEN3)
