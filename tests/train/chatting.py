# ruff: noqa: E501 (a template's line breaks are part of it)
"""Templates in the styles of families, a vocabulary with their special tokens, and chats, for the tests of fine-tuning."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.model import checkpoint
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.model.transformer import Transformer
from tests.model.chat_templates import CHATML, LLAMA3, MISTRAL

__all__ = [
    "CHATML_MARKED",
    "GPT_OSS",
    "LLAMA3",
    "MISTRAL",
    "QWEN3",
    "STYLES",
    "chat",
    "lines",
    "model",
    "tokenizer",
]

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>",
    "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>",
)  # fmt: skip

CHATML_MARKED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in message.content else '' %}
{%- if loop.index0 > ns.last %}{{ '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

GPT_OSS = """\
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{{- '<|start|>assistant<|channel|>commentary to=' + message.tool_calls[0].function.name + '<|message|>' }}
{{- message.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}
{%- elif message.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""

# Of each style the text of the chat "one" -> "uno", "two" -> "due": pieces, and whether they are learnt.
CHAT = ("one", "uno eins", "two?", "due zwei")
STYLES: dict[str, tuple[str, list[tuple[str, bool]]]] = {
    "chatml": (
        CHATML,
        [
            (
                "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n",
                False,
            ),
            ("uno eins<|im_end|>", True),
            ("\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n", False),
            ("due zwei<|im_end|>", True),
        ],
    ),
    "chatml_marked": (
        CHATML_MARKED,
        [
            ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", False),
            ("uno eins<|im_end|>", True),
            ("\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n", False),
            ("due zwei<|im_end|>", True),
        ],
    ),
    "llama3": (
        LLAMA3,
        [
            (
                "<s><|start_header_id|>system<|end_header_id|>\n\nToday: never<|eot_id|><|start_header_id|>user"
                "<|end_header_id|>\n\none<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                False,
            ),
            ("uno eins<|eot_id|>", True),
            (
                "<|start_header_id|>user<|end_header_id|>\n\ntwo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                False,
            ),
            ("due zwei<|eot_id|>", True),
        ],
    ),
    "mistral": (
        MISTRAL,
        [
            ("<s> [INST] one [/INST]", False),
            (" uno eins</s>", True),
            (" [INST] two? [/INST]", False),
            (" due zwei</s>", True),
        ],
    ),
}


@functools.cache
def _vocabulary() -> str:
    texts = [
        "user assistant system one two uno due eins zwei final think [INST] the cat sat on the mat. " * 20
    ]
    inner = tokenizers.Tokenizer.from_str(train_tokenizer(texts, 330).to_json())
    inner.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    )
    text: str = inner.to_str()
    return text


def tokenizer(template: str | None = CHATML) -> Tokenizer:
    """A small vocabulary with every style's special tokens; its end token is `</s>`."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    chat = None if template is None else ChatTemplate(template, special_tokens=special)
    inner = tokenizers.Tokenizer.from_str(_vocabulary())
    return Tokenizer(inner, end_token="</s>", chat_template=chat, special_tokens=special)


def chat(*words: str, system: str = "") -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(words))]


def lines(file: Path, values: Sequence[Any]) -> str:
    """Write JSON lines; the file's name."""
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(file)


def model(folder: Path, template: str | None = CHATML, *, experts: int = 4, **changes: Any) -> Path:
    """A tiny model with its tokenizer in a folder."""
    vocabulary = tokenizer(template)
    moe = {"experts": experts, "experts_per_token": 2, "d_ff": 24, "balance_loss": 0.01, **changes}
    config = ModelConfig(
        vocab_size=vocabulary.vocab_size,
        d_model=32,
        layers=2,
        d_ff=48,
        max_positions=128,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
        moe=MoEConfig(**moe) if experts else None,
        dense_layers=(0,) if experts else (),
    )
    checkpoint.save(Transformer(config), folder, tokenizer=vocabulary)
    return folder
