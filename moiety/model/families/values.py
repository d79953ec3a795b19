"""What a `config.json` says, asked for by kind: every answer has the type that was asked for, or is an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moiety.errors import FormatError

__all__ = ["ACTIVATIONS", "WITHOUT_EFFECT", "Values"]

# Their activation to ours; of several spellings of one the first is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
# Keys of any config.json that say nothing about what the model computes: names, tokens, training, generation, and how
# the weights are packed (which is for who reads the weights).
_NAMES = """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures auto_map dtype model_type name_or_path
    quantization_config tokenizer_class torch_dtype transformers_version use_cache
    bos_token_id decoder_start_token_id eod_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob initializer_range
    output_attentions output_hidden_states output_router_logits pretraining_tp return_dict
    router_aux_loss_coef aux_loss_alpha seq_aux
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task for_llm_compressor forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder top_k top_p torchscript
    typical_p use_bfloat16
"""
WITHOUT_EFFECT = frozenset(_NAMES.split())


class Values:
    """The keys of a file with the defaults of its family behind them.

    Args:
        said: What the file says.
        model_type: Whose file, for messages.
        defaults: For keys that are missing or null; "=other" is the value of another key.
        absent: For keys that are missing, where null means something else.
    """

    def __init__(
        self,
        said: Mapping[str, Any],
        model_type: str,
        defaults: Mapping[str, Any],
        absent: Mapping[str, Any],
    ) -> None:
        self._said, self._model_type = {**absent, **said}, model_type
        self._defaults = {**dict.fromkeys(absent), **defaults}

    def __contains__(self, key: str) -> bool:
        """True if the file says it, and not null."""
        return self._said.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        """The value, or its default.

        Raises:
            FormatError: there is neither.
        """
        value = self._said.get(key)
        if value is not None:
            return value
        if key not in self._defaults:
            raise FormatError(f"config.json lacks {key}, which {self._model_type!r} needs")
        default = self._defaults[key]
        return self[default[1:]] if isinstance(default, str) and default.startswith("=") else default

    def get(self, key: str, default: Any = None) -> Any:
        """The value that the file says, else `default`; the family's defaults are not asked."""
        value = self._said.get(key)
        return default if value is None else value

    def whole(self, key: str) -> int:
        """A whole number that is not negative."""
        return whole(self[key], key)

    def number(self, key: str) -> float:
        """A number."""
        return number(self[key], key)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self[key]
        if not isinstance(value, bool):
            raise FormatError(f"config.json has {key} {value!r}; true or false is wanted")
        return value

    def wholes(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self[key]
        if not isinstance(value, (list, tuple)):
            raise FormatError(f"config.json has {key} {value!r}; a list is wanted")
        return [whole(one, key) for one in value]

    def same(self, key: str) -> Any:
        """The value, or the one of which a list for all layers is made."""
        value = self[key]
        if not isinstance(value, list):
            return value
        if not value or any(one != value[0] for one in value):
            raise FormatError(
                f"config.json has {key} {value!r}; layers that differ in it are not known",
                hint="this program does not compute such a model",
            )
        return value[0]

    def layers(self) -> int:
        """How many layers there are; not absurdly many, because lists are made of them."""
        key = "n_layers" if "n_layers" in self else "num_hidden_layers"
        count = self.whole(key)
        if not 1 <= count <= 10_000:
            raise FormatError(f"config.json has {key} {count}; allowed is 1 to 10000")
        return count

    def activation(self, key: str) -> str:
        """An activation by our name."""
        value = self[key]
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise FormatError(f"config.json has {key} {value!r}; allowed is {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def head_dim(self, options: Mapping[str, Any]) -> int:
        """Width of a head where the file does not say it."""
        width, heads = options.get("d_model"), options.get("attention.heads")
        if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
            raise FormatError(
                f"config.json lacks head_dim, and {width!r} is not a multiple of {heads!r} heads"
            )
        return width // heads


def whole(value: Any, key: str) -> int:
    """`value` of `key` as a whole number that is not negative.

    Raises:
        FormatError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise FormatError(f"config.json has {key} {value!r}; a whole number is wanted")
    return value


def number(value: Any, key: str) -> float:
    """`value` of `key` as a finite number.

    Raises:
        FormatError: it is none.
    """
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or abs(value) > 1e300 or not math.isfinite(value):
        raise FormatError(f"config.json has {key} {value!r}; a number is wanted")
    return float(value)
