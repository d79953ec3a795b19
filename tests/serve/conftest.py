"""A tiny model behind a real server on a free port, and the real client of OpenAI."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from moiety.infer.open import Opened
from moiety.infer.options import EngineOptions
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.serve.options import ServeOptions
from moiety.serve.server import Server, served_of
from tests import tiny

TEXT = "the quick brown fox jumps over the lazy dog; it was the best of times. " * 20
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENGINE: dict[str, Any] = {"max_positions": 256, "page_tokens": 4, "step_tokens": 64, "max_requests": 8}
NAME = "tiny-moe"


def opened(template: str | None = TEMPLATE, tokenizer: Tokenizer | None = None, **changes: Any) -> Opened:
    """A random model of two layers with a vocabulary of its own."""
    torch.manual_seed(1)
    tokenizer = tokenizer or train_tokenizer([TEXT], 300)
    tokenizer.chat_template = None if template is None else ChatTemplate(template)
    sizes = {"vocab_size": tokenizer.vocab_size, "layers": 2, "moe": tiny.experts(), "d_ff": 14} | changes
    model = tiny.model("", **sizes).eval()
    return Opened(model, tokenizer, Path("/nowhere") / NAME, frozenset({tokenizer.end_id}))


@contextlib.contextmanager
def serving(
    what: Opened | None = None, *, key: str = "", engine: dict[str, Any] | None = None, **options: Any
) -> Iterator[Server]:
    """A server that listens, in a thread of its own."""
    served = served_of(
        what or opened(), EngineOptions(**ENGINE | (engine or {})), ServeOptions(port=0, **options)
    )
    server = Server(served, key=key, version="1.2.3")
    listening = threading.Event()
    thread = threading.Thread(target=server.run, args=(listening.set,))
    thread.start()
    try:
        assert listening.wait(20), "the server does not listen"
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


def client_of(server: Server, **options: Any) -> openai.OpenAI:
    given = {"api_key": "none", "max_retries": 0, "timeout": 30} | options
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", **given)


def eventually(holds: Any, within_s: float = 5.0) -> None:
    """Wait for something to become true."""
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, "it never became true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made
