"""lm-evaluation-harness through the engine: the figures of its own models, on tasks made here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from moiety.errors import DataError, UsageError
from moiety.infer.engine import Engine
from moiety.infer.harness import EngineModel, _loaded, run_tasks
from moiety.infer.open import Opened, open_model
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions, TaskOptions
from moiety.model import checkpoint
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer, put_before, train_tokenizer
from tests import tiny
from tests.serve.conftest import serving

LONGEST = 48
TEXT = "the quick brown fox jumps over the lazy dog; it was the best of times. " * 20
TASKS = ("choice_task", "answer_task", "text_task")
QUESTIONS = [
    {"question": "the fox jumps over the", "choices": [" dog", " lazy dog", " best of times"], "answer": 1},
    {"question": "it was", "choices": [" the", " the best", " a fox"], "answer": 0},
    {"question": "the quick brown fox jumps " * 8, "choices": ["over", " it"], "answer": 1},  # is cut
    {"question": "x ", "choices": ["y", "zé"], "answer": 0},
]
TEXTS = ["the best", "the lazy dog jumps over it; " * 12, "ü", "it was the quick fox " * 3]


class Made(NamedTuple):
    """A model on disk, as ours and as transformers'."""

    path: Path
    opened: Opened
    twin: HFLM


def tasks(folder: Path) -> Path:
    """Three tasks with their data."""
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    same = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}

    def data(name: str) -> dict[str, Any]:
        given = {"data_files": {"test": str(folder / name)}, "cache_dir": str(folder / "cache")}
        return {**same, "dataset_kwargs": given}

    made: dict[str, dict[str, Any]] = {
        "choice_task": data("choice.jsonl")
        | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "fewshot_split": "test",
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
        },
        "answer_task": data("text.jsonl")
        | {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{text[:3]}}",
            "generation_kwargs": {"until": [" t", "\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "text_task": data("text.jsonl")
        | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
        },
    }
    for name, task in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
    (folder / "all.yaml").write_text(yaml.safe_dump({"group": "all_tasks", "task": list(TASKS)}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks(tmp_path_factory.mktemp("tasks"))


def tokenizer(*, begins: bool) -> Tokenizer:
    """One that wants its end token before every text, or nothing."""
    made = train_tokenizer([TEXT], 300)
    put_before(made._inner, made.end_token if begins else None)
    made.special_tokens = {"bos_token": made.end_token} if begins else {}
    made.chat_template = ChatTemplate(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["nothing first", "a token first"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(3)
    text = tokenizer(begins=request.param)
    sizes: dict[str, Any] = {"vocab_size": text.vocab_size, "max_positions": LONGEST, "d_ff": 14}
    model = tiny.model("", moe=tiny.experts(), **sizes).eval()
    path = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.save(model, path, tokenizer=text)
    twin = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **tiny.EAGER).eval()
    theirs = HFLM(pretrained=twin, tokenizer=AutoTokenizer.from_pretrained(path), batch_size=1, device="cpu")
    return Made(path, open_model(path), theirs)


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }


def requests(kind: str, *given: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=number)  # type: ignore[arg-type]
        for number, one in enumerate(given)
    ]


CHOICES = [
    ("the quick", " brown fox"),
    ("the quick", " brown dog"),
    ("", "the best of times"),
    ("the lazy  ", "dog"),
    ("the fox " * 30, "jumps over it"),
    ("a", "the fox jumps " * 9),
    ("<|endoftext|>the", " fox"),
]
GENERATED = [
    ("the quick", {"until": ["o"], "max_gen_toks": 9}),
    ("it was the best " * 9, {"until": "the", "max_new_tokens": 30, "temperature": 0.0}),
    ("", {"until": [], "max_gen_toks": 5}),
    ("fox", {"max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
]


def test_every_answer_is_that_of_transformers(made: Made) -> None:
    ours = EngineModel(made.opened, EngineOptions(page_tokens=4, step_tokens=16, max_requests=4))
    wanted = requests("loglikelihood", *CHOICES)
    for mine, theirs in zip(ours.loglikelihood(wanted), made.twin.loglikelihood(wanted), strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4) and mine[1] == theirs[1]
    rolling = requests("loglikelihood_rolling", *[(text,) for text in (*TEXTS, "")])
    expected = made.twin.loglikelihood_rolling(rolling)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-4)
    begun = [
        one for one in GENERATED if ours.tok_encode(one[0])
    ]  # transformers cannot go on from no token at all
    generated = requests("generate_until", *begun)
    assert ours.generate_until(generated) == made.twin.generate_until(generated)


def test_greedy_is_said_of_the_best_tokens_alone(made: Made) -> None:
    ours = EngineModel(made.opened)
    context = ours.tok_encode("the quick")
    greedy = RequestOptions(max_tokens=4, ignore_end=True, sampling=SamplingOptions(temperature=0.0))
    tokens = Engine(made.opened.model).generate([context], greedy)[0].tokens
    other = [*tokens[:-1], (tokens[-1] + 1) % 256]
    found = ours._loglikelihood_tokens([(None, context, tokens), (None, context, other)])
    assert [is_best for _, is_best in found] == [True, False] and found[0][0] > found[1][0]


def test_tasks_have_the_figures_of_transformers(made: Made, folder: Path) -> None:
    said: list[str] = []
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for chat, fewshot in ((False, 1), (True, -1)):
        options = TaskOptions(fewshot=fewshot, chat=chat, include_path=str(folder))
        found = run_tasks(made.opened, TASKS, options, EngineOptions(), said.append)
        true = simple_evaluate(
            made.twin,
            tasks=list(TASKS),
            num_fewshot=max(fewshot, 0),
            apply_chat_template=chat,
            task_manager=manager,
            bootstrap_iters=0,
        )
        ours, theirs = figures(found), figures(true)
        assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 5, (ours, theirs)
        assert found["n-samples"]["choice_task"]["effective"] == len(QUESTIONS) and said
    some = TaskOptions(limit=2, include_path=str(folder))
    part = run_tasks(made.opened, ["all_tasks"], some, EngineOptions())
    assert part["n-samples"]["text_task"]["effective"] == 2 and part["group_subtasks"]


@pytest.fixture(scope="module")
def through_server(made: Made) -> Iterator[LocalCompletionsAPI]:
    with serving(made.opened, engine={"max_positions": LONGEST}) as server:
        yield LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{server.port}/v1/completions",
            model=made.path.name,
            tokenizer=str(made.path),
            tokenizer_backend="huggingface",
            add_bos_token=bool(made.opened.tokenizer.around),
            max_length=LONGEST,
            max_retries=1,
        )


def test_the_server_gives_the_same_figures(
    made: Made, through_server: LocalCompletionsAPI, folder: Path
) -> None:
    """lm_eval leaves a server room to draw a token, and gives it the last one too: contexts are two tokens shorter."""
    ours = EngineModel(made.opened, EngineOptions(max_positions=LONGEST - 2))
    wanted = requests("loglikelihood", *[one for one in CHOICES if one[0] and "<|" not in one[0]])
    found = through_server.loglikelihood(wanted)
    for mine, theirs in zip(ours.loglikelihood(wanted), found, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4) and mine[1] == theirs[1]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = ["choice_task", "answer_task"]
    options = TaskOptions(include_path=str(folder))
    true = figures(run_tasks(made.opened, names, options, EngineOptions(max_positions=LONGEST - 2)))
    over = simple_evaluate(through_server, tasks=names, task_manager=manager, bootstrap_iters=0)
    assert figures(over) == pytest.approx(true, rel=1e-4)
    rolling = requests("loglikelihood_rolling", ("the best of times",))
    theirs = through_server.loglikelihood_rolling(rolling)
    assert theirs == pytest.approx(ours.loglikelihood_rolling(rolling), abs=1e-4)


def test_draws_are_repeated_with_the_place_in_the_list(made: Made) -> None:
    ours = EngineModel(made.opened)
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 50, "max_gen_toks": 8}
    given = requests("generate_until", ("the", drawn), ("the", drawn))
    first = ours.generate_until(given)
    assert first == ours.generate_until(given) and first[0] != first[1]


def test_what_cannot_be_is_refused(made: Made, folder: Path, tmp_path: Path) -> None:
    ours = EngineModel(made.opened)
    with pytest.raises(DataError, match="a text of 49 tokens"):
        ours._loglikelihood_tokens([(None, [1], [2] * (LONGEST + 1))])
    with pytest.raises(DataError, match="a text of 0 tokens"):
        ours._loglikelihood_tokens([(None, [1], [])])
    for given, named in (({"max_gen_toks": LONGEST}, "up to 48 tokens"), ({"num_beams": 4}, "num_beams")):
        with pytest.raises(UsageError, match=named):
            ours.generate_until(requests("generate_until", ("the", {"max_gen_toks": 4} | given)))
    with pytest.raises(UsageError, match="penalty_alpha"):
        ours.generate_until(requests("generate_until", ("the", {"penalty_alpha": 0.5})))
    broken = {"task": "broken_task", "dataset_path": "json", "test_split": "test"}
    coding = {**yaml.safe_load((folder / "answer_task.yaml").read_text()), "unsafe_code": True}
    absent = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "absent.jsonl")}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(broken | absent))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(coding | {"task": "coding_task"}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(DataError, match=r"broken_task cannot be loaded: .*absent\.jsonl"):
        _loaded(manager, ["broken_task"])
    with pytest.raises(UsageError, match="no task 'coding_tusk'") as refused:
        _loaded(manager, ["coding_tusk"])
    assert refused.value.hint == "did you mean coding_task?"

    def run(opened: Opened, **options: bool) -> Any:
        some = TaskOptions(limit=1, include_path=str(tmp_path), **options)
        return run_tasks(opened, ["coding_task"], some, EngineOptions())

    with pytest.raises(UsageError, match="coding_task runs programs that the model wrote"):
        run(made.opened)
    assert figures(run(made.opened, run_code=True))
    with pytest.raises(UsageError, match="no chat template"):
        run(made.opened._replace(tokenizer=train_tokenizer([TEXT], 300)), chat=True)
