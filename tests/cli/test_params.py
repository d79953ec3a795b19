"""`moiety params`: the counts of `moiety.cost`, for names and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiety import cost, registry
from moiety.model import checkpoint
from moiety.model.transformer import Transformer
from tests import tiny
from tests.cli.conftest import Call


def test_json_is_what_cost_says(call: Call) -> None:
    counts = cost.parameters(registry.lookup("mixtral-8x7b"))
    said = call("params", "mixtral-8x7b", "--json")
    assert said.code == 0 and said.err == ""
    assert said.json["total"] == counts.total == 46_702_792_704
    assert said.json["active"] == counts.active
    assert said.json["components"] == dict(counts.components)
    assert sum(said.json["components"].values()) == counts.total
    assert said.json["active_percent"] == pytest.approx(27.6, abs=0.1)


@pytest.mark.parametrize("columns", [40, 70, 100])
def test_the_table_fits(columns: int, call: Call) -> None:
    said = call("params", "mixtral-8x7b", columns=columns)
    assert said.code == 0 and said.err == ""
    assert "46,702,792,704" in said.out.replace("\n", "")
    table = said.out.partition("active per token")[0]
    assert max(map(len, table.splitlines())) <= columns


def test_a_checkpoint_folder(call: Call, trained: Path) -> None:
    (folder,) = (trained / "checkpoints").iterdir()
    said = call("params", folder, "--json")
    from moiety.model.checkpoint import load

    assert said.code == 0 and said.json["total"] == sum(p.numel() for p in load(folder).parameters())


def test_a_folder_that_holds_no_model(call: Call, tmp_path: Path) -> None:
    call("params", tmp_path).assert_refused(1, "config.json")
    (tmp_path / "config.json").write_text("{")
    call("params", tmp_path).assert_refused(1, "config.json")


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "mixtral-8x7"])
def test_an_unknown_name(name: str, call: Call) -> None:
    said = call("params", name)
    said.assert_refused(2, name)
    assert "hint: " in said.err


def test_what_is_known_but_not_countable_says_why(call: Call) -> None:
    for name in [*registry.UNDISCLOSED, *registry.NOT_YET]:
        said = call("params", name)
        assert said.code == 2 and name in said.err and said.out == "", said


def test_every_known_model_can_be_counted(call: Call) -> None:
    assert len(registry.REGISTRY) > 20
    for name in registry.REGISTRY:
        assert call("params", name, "--json").json["total"] > 0, name


def test_the_three_conventions_are_named(call: Call) -> None:
    said = call("params", "gpt-oss-20b")
    for words in ("as Mixtral", "as gpt-oss", "as MiniMax", "4,187,440,704", "3,608,307,264"):
        assert words in said.out, words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtral-8x7b", ["Why 8 x 7B is not 56B", "45.1B", "1.6B", "46.7B", "2 of the 8 experts", "12.9B"]),
        ("mixtral-8x22b-instruct", ["Why 8 x 22B is not 176B", "140.6B", "39.2B"]),
        ("flexolmo-7x7b", ["Why 7 x 7B is not 49B", "33.3B", "5 of the 7 experts"]),
    ],
)
@pytest.mark.parametrize("columns", [40, 100])
def test_why_the_name_says_another_number(name: str, words: list[str], columns: int, call: Call) -> None:
    said = call("params", name, columns=columns)
    text = " ".join(said.out.split())
    for word in words:
        assert word in text, (word, text)
    assert call("params", name, "--json").json["why"]


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mistral-7b", "switch-base-8", "dbrx"])
def test_other_names_need_no_such_words(name: str, call: Call) -> None:
    assert "Why" not in call("params", name).out and call("params", name, "--json").json["why"] == ""


MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def test_a_config_alone(call: Call, tmp_path: Path) -> None:
    """A folder or a file of any name, without weights; the name of the folder is explained, too."""
    folder = tmp_path / "My-Mixtral-8x7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    (tmp_path / "other.json").write_text(json.dumps(MIXTRAL))
    for place in (folder, folder / "config.json", tmp_path / "other.json"):
        said = call("params", place, "--json")
        assert said.code == 0 and said.json["total"] == 46_702_792_704, said.err
    assert "8 x 7B" in call("params", folder, "--json").json["why"]
    (tmp_path / "bad.json").write_text(json.dumps({**MIXTRAL, "num_local_experts": 0}))
    call("params", tmp_path / "bad.json").assert_refused(2, "bad.json", "experts")
    call("params", tmp_path / "absent.json").assert_refused(2, "absent.json")


def test_a_switch_transformer_and_a_gguf(call: Call, tmp_path: Path) -> None:
    from transformers import SwitchTransformersConfig

    from moiety.model.gguf import save_gguf

    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "num_experts": 8}
    sizes |= {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
    SwitchTransformersConfig(**sizes).save_pretrained(tmp_path)
    said = call("params", tmp_path, "--json")
    assert said.code == 0 and said.json["total"] == 619_339_008, said.err
    model = tiny.model("mixtral")
    save_gguf(model, tmp_path / "small.gguf")
    said = call("params", tmp_path / "small.gguf", "--json")
    assert said.json["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_names_of_the_hub_that_are_known_need_no_network(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def resolve(name: str, **given: object) -> Path:
        assert (name, given) == ("owner/model", {"weights": False})
        return tmp_path

    monkeypatch.setattr("moiety.model.hub.resolve", resolve)
    for name in ("mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B"):
        assert call("params", name, "--json").json["total"] > 3e10
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert call("params", "owner/model", "--json").json["total"] == 46_702_792_704


def test_it_says_which_layers_differ(tmp_path: Path, call: Call) -> None:
    config = tiny.config(layers=4, moe=tiny.experts(per_layer=((0, 3, 1), (2, 7, 4))))
    checkpoint.save(Transformer(config), tmp_path / "model")
    said = call("params", tmp_path / "model", "--json")
    assert said.code == 0 and said.json["per_layer"] == [[0, 3, 1], [2, 7, 4]]
    assert said.json["total"] == cost.parameters(config).total
    assert "2 of 5, but 1 of 3 in layer 0, 4 of 7 in layer 2" in " ".join(
        call("params", tmp_path / "model").out.split()
    )
