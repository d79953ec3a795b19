"""Fine-tuning: it learns answers and nothing else, by the parameters that were named, and goes on bit for bit."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moiety.errors import ConfigError, FormatError, MoietyError, UsageError
from moiety.formats.policy import policy_named
from moiety.infer.conversation import Conversation
from moiety.infer.open import open_model
from moiety.infer.options import SamplingOptions
from moiety.model import checkpoint
from moiety.model.adapter_options import LoraOptions
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.quant.quantize import quantize
from moiety.train import finetune, run
from moiety.train.finetune import Finetuning, describe, read_plan, resume, shown, start
from moiety.train.finetune_options import FinetuneOptions
from moiety.train.loop import StepRecord
from moiety.train.trainable import GROUPS, group_of, train_only
from tests.tiny import CONFIGS
from tests.train.chatting import CHATML, LLAMA3, QWEN3, chat, lines, model, tokenizer

WORDS = ("cat", "mat", "sat", "one", "two", "the", "uno", "due", "zwei", "eins")


def words(number: int, count: int) -> str:
    """Some words that say nothing about any others."""
    return " ".join(
        WORDS[(number * 7919 + place * 104729 + place * number * 31) % 97 % 10] for place in range(count)
    )


def secrets(count: int = 20) -> list[dict[str, Any]]:
    return [{"messages": chat(f"{n} {words(n, 6)}", words(n + 50, 4))} for n in range(count)]


def options(**changes: Any) -> FinetuneOptions:
    fast: dict[str, Any] = {"learning_rate": 3e-3, "steps": 4, "held_out": 0.0, "batch": 2, "length": 100}
    return FinetuneOptions(**fast | changes)


def carry_out(made: Finetuning, folder: Path, stop_after: int = 0) -> list[StepRecord]:
    """All steps, or so many and then an orderly stop."""
    stop, records = threading.Event(), []
    if made.checkpoint is None:
        made.write(folder)
    if stop_after == 1:
        stop.set()
    for record in made.steps(folder, stop):
        records.append(record)
        if record.state.step + 1 == stop_after:
            stop.set()
    return records


def of_files(
    folder: Path, values: Sequence[Any], template: str | None = CHATML, **changes: Any
) -> tuple[str, str]:
    torch.manual_seed(0)
    return str(model(folder / "parent", template, **changes)), lines(folder / "data.jsonl", values)


@torch.no_grad()
def nats_per_token(model_of: Transformer, made: Finetuning, *, learnt: bool) -> float:
    """Of learnt tokens, or of the others that differ from sample to sample."""
    total = count = 0.0
    for place in range(made.samples.units):
        sample = made.samples.sample(place)
        tokens = torch.tensor(sample.tokens)
        nats = -model_of(tokens[None, :-1]).logits[0].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        mask = torch.tensor(sample.learnt)[1:]
        first = int(mask.int().argmax())
        chosen = mask if learnt else (torch.arange(len(mask)) > 22) & (torch.arange(len(mask)) < first - 7)
        total, count = total + nats[chosen].sum().item(), count + int(chosen.sum())
    return total / count


def test_twenty_answers_are_learnt_and_their_prompts_are_not(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets())
    made = start(tmp_path / "run", parent, [data], options(steps=70, learning_rate=1e-2, batch=8))
    before = nats_per_token(made.model, made, learnt=False)
    records = carry_out(made, tmp_path / "run")
    assert records[0].loss > 4 and records[-1].loss < 0.1
    trained = checkpoint.load(records[-1].checkpoint or "")
    assert nats_per_token(trained, made, learnt=True) < 0.1
    assert nats_per_token(trained, made, learnt=False) > 0.7 * before
    texts = [{"text": shown(made, place).replace("[[", "").replace("]]", "")} for place in range(20)]
    other = start(
        tmp_path / "all",
        parent,
        [lines(tmp_path / "t.jsonl", texts)],
        options(steps=70, learning_rate=1e-2, batch=8),
    )
    carry_out(other, tmp_path / "all")
    assert nats_per_token(other.model, other, learnt=True) < 0.3  # where prompts are learnt, they are

    opened = open_model(tmp_path / "run")
    talk = Conversation(opened, max_tokens=30, sampling=SamplingOptions(temperature=0.0))
    for line in secrets()[:5]:
        asked, answer = (message["content"] for message in line["messages"])
        fresh = Conversation(opened, max_tokens=30, sampling=SamplingOptions(temperature=0.0))
        assert "".join(fresh.answer(asked)) == answer
    assert talk.has_format
    end = opened.tokenizer.special_ids()["<|im_end|>"]
    assert end in opened.ends and opened.tokenizer.chat_template is not None
    assert opened.tokenizer.chat_template.text == CHATML


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """Every number in a checkpoint's files."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.parent.name}/{file.name}/{name}": one
        for file in files
        for name, one in load_file(file).items()
    }


def packed(parent: str, form: str) -> str:
    """A copy of a model whose matrices are packed."""
    net = checkpoint.load(parent)
    quantize(net, policy_named(form))
    checkpoint.save(net, f"{parent}-{form}", tokenizer=Tokenizer.load(parent))
    return f"{parent}-{form}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder).state_dict()


PAIRS = [
    {"prompt": f"say {n}", "chosen": f" {words(n, 3)}", "rejected": f" {words(n + 9, 3)}"} for n in range(9)
]
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any]]] = {
    "full": ({}, {}, secrets(11)),
    "padded, in micro-batches": ({"pack": False, "accumulate": 2, "batch": 1}, {}, secrets(11)),
    "router trained": (
        {"train": ("router=0.01", "full"), "accumulate": 2},
        {"router": "sigmoid", "selection_bias": True},
        secrets(11),
    ),
    "router with noise": ({"train": ("router",)}, {"router": "noisy"}, secrets(11)),
    "bf16": ({"dtype": "bf16"}, {}, secrets(11)),
    "pairs": ({"batch": 1}, {}, PAIRS),
    "adapters": ({"train": ("adapters", "router=0.01")}, {}, secrets(11)),
    "adapters and pairs": ({"train": ("adapters",), "batch": 1}, {}, PAIRS),
}


def stopped_and_not(
    folder: Path, parent: str, data: str, settings: FinetuneOptions, lora: LoraOptions | None = None
) -> tuple[Finetuning, Finetuning]:
    """A run, and the same one stopped and resumed from its folder: losses and files are compared here."""
    whole = start(folder / "a", parent, [data], settings, lora=lora)
    straight = carry_out(whole, folder / "a")
    cut = 7
    assert straight[-1].state.step > cut + 1
    stopped = start(folder / "b", parent, [data], settings, lora=lora)
    first = carry_out(stopped, folder / "b", stop_after=cut)
    units = whole.samples.units
    assert len(first) == cut and first[-1].state.sequences_seen % units  # in the middle of an epoch
    Path(data).unlink()  # the run has all that it needs
    resumed = resume(folder / "b")
    second = carry_out(resumed, folder / "b")
    together = [*first, *second]
    assert [one.loss for one in together] == [one.loss for one in straight]
    assert [one.gradient_norm for one in together] == [one.gradient_norm for one in straight]
    assert [one.router_losses for one in together] == [one.router_losses for one in straight]
    done, again = (everything(one[-1].checkpoint or Path()) for one in (straight, second))
    assert done.keys() == again.keys() and all(torch.equal(done[name], again[name]) for name in done)
    assert straight[-1].state.sequences_seen == 6 * units
    return whole, resumed


@pytest.mark.parametrize("case", RUNS)
def test_a_run_goes_on_bit_for_bit(case: str, tmp_path: Path) -> None:
    changes, kind, values = RUNS[case]
    parent, data = of_files(tmp_path, values, **kind)
    settings = options(steps=0, epochs=6.0, held_out=0.1, save_every=3, **changes)
    stopped_and_not(tmp_path, parent, data, settings)


@pytest.mark.parametrize("form", ["", "int4-g32", "nf4-g64"])
@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (LoraOptions(rank=2, targets=("all",)), {"accumulate": 2, "batch": 1}),
        (LoraOptions(rank=3, expert_rank=1, rslora=True), {"train": ("adapters", "router=0.01")}),
        (LoraOptions(rank=2, targets=("experts.down",), share_a=True), {"dtype": "bf16"}),
    ],
)
def test_adapters_go_on_bit_for_bit(
    lora: LoraOptions, changes: dict[str, Any], form: str, tmp_path: Path
) -> None:
    parent, data = of_files(tmp_path, secrets(11), router="sigmoid", selection_bias=True, shared_d_ff=16)
    if form:
        parent = packed(parent, form)
    settings = options(steps=0, epochs=6.0, held_out=0.1, save_every=3, **{"train": ("adapters",), **changes})
    whole, resumed = stopped_and_not(tmp_path, parent, data, settings, lora)
    began = start(tmp_path / "c", parent, [lines(tmp_path / "again.jsonl", secrets(11))], settings, lora=lora)
    ours, true, first = (dict(one.model.named_parameters()) for one in (resumed, whole, began))
    learnt = {name for name, one in true.items() if one.requires_grad}
    assert ours.keys() == true.keys() and any(".adapters." in name for name in learnt)
    assert learnt == {name for name, one in ours.items() if one.requires_grad}
    for name, parameter in true.items():
        assert torch.equal(ours[name], parameter), name
        assert torch.equal(first[name], parameter) != (name in learnt), name
        if name in learnt:
            moments, again = whole.optimizer.state[parameter], resumed.optimizer.state[ours[name]]
            assert moments.keys() == again.keys() >= {"exp_avg", "exp_avg_sq"}
            assert moments["exp_avg"].any(), name
            assert all(torch.equal(moments[kind], again[kind]) for kind in moments), name


@pytest.mark.parametrize(
    "wanted", ["experts", "router", "attention", "shared", "dense", "norm", "embedding", "head", "full"]
)
def test_only_what_was_named_moves(wanted: str, tmp_path: Path) -> None:
    kind = {"router": "sigmoid", "selection_bias": True, "shared_d_ff": 16}
    parent, data = of_files(tmp_path, secrets(6), **kind)
    made = start(tmp_path / "run", parent, [data], options(train=(wanted,)))
    records = carry_out(made, tmp_path / "run")
    old, new = weights(Path(parent)), weights(records[-1].checkpoint or Path())
    bias = {name for name in old if name.endswith("selection_bias")}
    moved = {group_of(name) for name in old.keys() - bias if not torch.equal(old[name], new[name])}
    full = {"experts", "shared", "dense", "attention", "norm", "embedding", "head"}
    groups = full if wanted == "full" else {wanted}
    moved_bias = any(not torch.equal(old[name], new[name]) for name in bias)
    assert bias and moved_bias == (wanted == "router") and moved == groups
    still = {name for name in old if torch.equal(old[name], new[name]) and name not in bias}
    assert not any(group_of(name) in groups for name in still), still
    said = {one.name: one.learning_rate for one in made.groups}
    assert {name for name, rate in said.items() if rate} == groups
    assert sum(one.parameters for one in made.groups) == sum(one.numel() for one in made.model.parameters())


def test_rates_of_groups() -> None:
    net = Transformer(CONFIGS["shared"])
    groups, factors = train_only(net, ("router=1e-4", "full", "experts=3e-3"), 1e-3)
    assert {one.name: one.learning_rate for one in groups} == {
        "experts": 3e-3, "shared": 1e-3, "attention": 1e-3, "norm": 1e-3, "embedding": 1e-3, "head": 1e-3,
        "router": 1e-4,
    }  # fmt: skip
    trained = {name for name, one in net.named_parameters() if one.requires_grad}
    assert trained == set(factors)
    for name, factor in factors.items():
        assert factor == pytest.approx({"experts": 3.0, "router": 0.1}.get(group_of(name), 1.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_group(name: str) -> None:
    net = Transformer(CONFIGS[name])
    groups, factors = train_only(net, ("full",), 1.0)
    assert sum(one.parameters for one in groups) == sum(one.numel() for one in net.parameters())
    assert all(one.name in GROUPS for one in groups)
    gates = {own for own, _ in net.named_parameters() if ".gate." in own}
    assert set(factors) == {own for own, _ in net.named_parameters()} - gates


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (("shared",), "'shared', and this model has no such"),
        (("adapters",), "'adapters', and this model has no such"),
        (("heads",), "train names 'heads'"),
        (("router", "router=1"), "'router' twice"),
        (("router=fast",), "'fast' is no learning rate"),
        (("router=0",), "'0' is no learning rate"),
        (("router=nan",), "'nan' is no learning rate"),
        (("router=",), "'' is no learning rate"),
    ],
)
def test_refused_groups(wanted: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train_only(Transformer(CONFIGS["mixtral"]), wanted, 1e-3)


def test_the_balance_loss_is_off_with_frozen_routers(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets(4))
    for number, (changes, expected, said) in enumerate(
        [
            ({}, 0.0, "frozen; balance loss: off"),
            ({"train": ("full", "router")}, 0.01, "trained; balance loss: 0.01"),
            ({"balance": "0.5"}, 0.5, "frozen; balance loss: 0.5"),
            ({"train": ("router",), "balance": "0"}, 0.0, "trained; balance loss: off"),
        ]
    ):
        made = start(tmp_path / f"run{number}", parent, [data], options(**changes))
        assert f"load={expected}" in made.plan.train.losses and said in describe(made)


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_padding_moves_no_selection_bias(rule: str, tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets(9), router="sigmoid", selection_bias=True, bias_rule=rule)
    found = []
    for pack in (True, False):
        settings = options(steps=3, batch=20, pack=pack, train=("full", "router"), learning_rate=1e-4)
        made = start(tmp_path / str(pack), parent, [data], settings)
        records = carry_out(made, tmp_path / str(pack))
        assert records[0].state.sequences_seen == 9
        moved = [one for name, one in made.model.named_buffers() if name.endswith("selection_bias")]
        found.append(([one.loss for one in records], torch.cat(moved), records[0].health[1].numbers()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    assert found[0][1].abs().max() > 0
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-4)


def test_preferences_are_learnt(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, PAIRS)
    settings = options(steps=40, batch=4, held_out=0.5, learning_rate=2e-3, beta=0.5)
    made = start(tmp_path / "run", parent, [data], settings)
    records = carry_out(made, tmp_path / "run")
    assert records[0].loss == pytest.approx(math.log(2), rel=1e-5)
    assert records[-1].loss < 0.05
    found = records[-1].evaluation
    assert found is not None and set(found.preferred) == {"data"} and found.losses["data"] > 0
    assert "preference loss (DPO) with beta 0.5" in describe(made)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("form", "dtype", "off"), [("nf4", "fp32", 1e-6), ("int8", "fp32", 1e-6), ("", "bf16", 5e-3)]
)
def test_the_first_step_finds_every_pair_where_it_was(
    form: str, dtype: str, off: float, pack: bool, tmp_path: Path
) -> None:
    """Packed weights multiply in training by other products than in an evaluation."""
    parent, data = of_files(tmp_path, PAIRS)
    parent = packed(parent, form) if form else parent
    settings = options(train=("adapters",), steps=1, batch=4, dtype=dtype, pack=pack)
    made = start(tmp_path / "run", parent, [data], settings)
    (record,) = carry_out(made, tmp_path / "run")
    assert record.loss == pytest.approx(math.log(2), rel=off)


def test_evaluation_is_a_mean_over_answer_tokens(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets(30))
    made = start(tmp_path / "run", parent, [data, f"{data}:domain=again"], options(steps=2, held_out=0.3))
    found = carry_out(made, tmp_path / "run")[-1].evaluation
    assert found is not None and set(found.losses) == {"data", "again"} and not found.preferred
    total, count = 0.0, 0
    made.model.eval()
    for batch in made.samples.evaluation("data", B=1, S=1):
        assert batch.valid_BS is not None and len(batch.tokens_BS) == 1
        with torch.no_grad():
            total += made.model(batch.tokens_BS).cross_entropy(batch.targets_BS).item()
        count += batch.scored
    assert found.losses["data"] == pytest.approx(total / count, rel=1e-5)
    assert found.losses["data"] == pytest.approx(found.losses["again"], rel=1e-6)


def test_a_model_without_a_template(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets(4), template=None)
    with pytest.raises(MoietyError, match=r"data.jsonl, line 1: .*no chat template"):
        start(tmp_path / "run", parent, [data], options())
    made = start(tmp_path / "run", parent, [data], options(), template="plain")
    assert shown(made).startswith("<s>user: 0 ") and shown(made).endswith("</s>]]")
    assert "\nassistant:[[ " in shown(made)
    carry_out(made, tmp_path / "run")
    assert open_model(tmp_path / "run").tokenizer.chat_template is not None
    file = tmp_path / "own.jinja"
    file.write_text(LLAMA3)
    other = start(tmp_path / "other", parent, [data], options(), template=str(file))
    assert shown(other).count("[[") == 1 and shown(other).endswith("<|eot_id|>]]")
    assert any("answers end with <|eot_id|>" in note for note in other.notes)
    with pytest.raises(UsageError, match="cannot read the template"):
        start(tmp_path / "x", parent, [data], options(), template=str(tmp_path / "none"))
    file.write_bytes(b"\xff")
    with pytest.raises(FormatError, match="not UTF-8"):
        start(tmp_path / "x", parent, [data], options(), template=str(file))


def test_a_sample_is_shown_with_what_is_learnt(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, [{"messages": chat("one", "uno è", "two", "due")}])
    made = start(tmp_path / "run", parent, [data], options())
    assert shown(made) == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
        "[[uno è<|im_end|>]]\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n[[due<|im_end|>]]"
    )


def test_refused_runs(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets(4), template=QWEN3)
    with pytest.raises(UsageError, match="nothing to train on"):
        start(tmp_path / "run", parent, [], options())
    with pytest.raises(ConfigError, match="longest sequence is 128"):
        start(tmp_path / "run", parent, [data], options(length=129))
    made = start(tmp_path / "run", parent, [data], options())
    made.write(tmp_path / "run")
    with pytest.raises(UsageError, match="already holds a run"):
        start(tmp_path / "run", parent, [data], options())
    with pytest.raises(UsageError, match="holds a run of `moiety finetune`"):
        run.read_plan(tmp_path / "run")
    with pytest.raises(UsageError, match="holds no run"):
        resume(tmp_path)
    (tmp_path / "run" / "samples.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="not what the run was started with"):
        resume(tmp_path / "run")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "run.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(UsageError, match="holds a run of `moiety train`"):
        read_plan(tmp_path / "text")
    with pytest.raises(UsageError, match="without a whole checkpoint"):
        (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
        start(tmp_path / "x", str(tmp_path / "empty"), [data], options())


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0.0}, {"steps": -1}, {"length": -1}, {"held_out": 1.0}, {"warmup": 1.0}, {"beta": 0.0},
        {"train": ()}, {"balance": "some"}, {"balance": "-1"}, {"balance": "nan"}, {"balance": "inf"},
        {"turns": "first"}, {"too_long": "keep"}, {"learning_rate": 0.0}, {"batch": 0}, {"seed": -1},
    ],
)  # fmt: skip
def test_refused_options(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FinetuneOptions(**changes)


@pytest.mark.parametrize("form", ["", "int8"])
def test_adapters_are_trained_and_act(form: str, tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets(8))
    if form:
        parent = packed(parent, form)
        with pytest.raises(UsageError, match="packed weights do not learn"):
            start(tmp_path / "x", parent, [data], options())
    settings = options(train=("adapters",), steps=60, learning_rate=2e-2, batch=8)
    made = start(tmp_path / "run", parent, [data], settings, lora=LoraOptions(rank=6, targets=("all",)))
    records = carry_out(made, tmp_path / "run")
    assert records[0].loss > 4 and records[-1].loss < 0.5
    folder = (records[-1].checkpoint or Path()) / "adapter"
    opened = open_model(parent, adapters=(str(folder),))
    base = open_model(parent).model
    stored = nats_per_token(opened.model, made, learnt=True)
    assert stored == pytest.approx(nats_per_token(made.model.eval(), made, learnt=True), rel=1e-4)
    assert stored < 1
    assert nats_per_token(base, made, learnt=True) > 3
    moved = {one.name for one in made.groups if one.learning_rate}
    assert moved == {"adapters"} and "routers are frozen; balance loss: off" in describe(made)


def test_adapters_and_what_they_freeze(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets(4))
    for train, lora in ((("adapters", "full"), LoraOptions()), (("adapters",), LoraOptions(router=True))):
        with pytest.raises(ConfigError, match="weights under adapters are frozen"):
            start(tmp_path / "x", parent, [data], options(train=train), lora=lora)
    with pytest.raises(ConfigError, match="'shared' is nowhere in this model"):
        start(
            tmp_path / "x",
            parent,
            [data],
            options(train=("adapters",)),
            lora=LoraOptions(targets=("shared",)),
        )


def test_a_run_from_a_run(tmp_path: Path) -> None:
    parent, data = of_files(tmp_path, secrets(4))
    carry_out(start(tmp_path / "a", parent, [data], options(steps=1)), tmp_path / "a")
    second = start(tmp_path / "b", str(tmp_path / "a"), [data], options(steps=1))
    assert second.tokenizer.answer_ends == resume(tmp_path / "a").tokenizer.answer_ends != ()
    assert not any("answers end with" in note for note in second.notes)
    assert isinstance(second.tokenizer, Tokenizer) and tokenizer().fingerprint == second.tokenizer.fingerprint
    assert replace(second.plan.options, steps=1) == second.plan.options
    assert finetune.describe(second).startswith("data: 4 samples")
