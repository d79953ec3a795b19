"""Models in GGUF files, which llama.cpp and what is built on it read: in, whatever their quantisation, and out."""

from __future__ import annotations

from moiety.model.gguf.files import (
    KINDS,
    load_config,
    load_gguf,
    open_gguf,
    read_chat_template,
    read_ends,
    read_special_tokens,
    read_tokenizer,
    save_gguf,
)

__all__ = [
    "KINDS",
    "load_config",
    "load_gguf",
    "open_gguf",
    "read_chat_template",
    "read_ends",
    "read_special_tokens",
    "read_tokenizer",
    "save_gguf",
]
