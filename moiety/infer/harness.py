"""Tasks of lm-evaluation-harness (`lm_eval`, arXiv 2405.14782), worked on by the engine.

A choice is scored by the sum of ln p of its tokens after a context, a text by windows of the longest sequence, and an
answer is drawn until a text ends it. Which tokens a text has, which token comes first and what is cut when something is
too long are those of lm_eval's own model for transformers, so figures can be compared with published ones.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple, final

import yaml
from datasets.exceptions import DatasetsError
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moiety.errors import DataError, MoietyError, UsageError
from moiety.infer.engine import Engine, Event, Result
from moiety.infer.open import Opened
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions, TaskOptions
from moiety.infer.request import Drawn

__all__ = ["EngineModel", "Figure", "figures_of", "run_tasks"]

AT_ONCE = 1024  # requests whose tokens are kept at a time
MOST_NEW_TOKENS = 256  # of an answer, where a task does not say
RESAMPLES = 1000  # for the error of a figure that has no formula
FORCE = 1000.0  # added to the logit of a token that must be drawn; ln p is of the logits as they came
DRAWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What a task's files can raise while they are read, their data fetched and their own Python run.
FAILURES = (
    ArithmeticError,
    AttributeError,
    DatasetsError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)


class Asked(NamedTuple):
    """A prompt and how it is answered."""

    prompt: Sequence[int]
    options: RequestOptions


def run_tasks(
    opened: Opened,
    names: Sequence[str],
    options: TaskOptions,
    engine: EngineOptions,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Work on tasks.

    Args:
        opened: The model.
        names: Of tasks, groups or tags, or paths of YAML files.
        options: Which part of them, and how.
        engine: Of the engine.
        say: Called with a line now and then.

    Returns:
        What lm_eval reports: `results` by task and metric, `n-shot`, `n-samples`, `versions`, ...

    Raises:
        UsageError: no such task, a task that runs code and was not let, or one that asks for what is not here.
        DataError: a task or its data cannot be read.
        ConfigError: a model or options that the engine cannot serve.
    """
    if options.chat and opened.tokenizer.chat_template is None:
        raise UsageError("this model has no chat template", hint="leave out --chat")
    model = EngineModel(opened, engine, say)
    manager, loaded = _found(names, options.include_path)
    unsafe = [name for name, task in loaded["tasks"].items() if task.get_config("unsafe_code")]
    if unsafe and not options.run_code:
        raise UsageError(
            f"{', '.join(unsafe)} runs programs that the model wrote, as you and on this machine",
            hint="where that can do no harm: HF_ALLOW_CODE_EVAL=1 moiety eval ... --run-code",
        )
    inner = {child for children in loaded["group_map"].values() for child in children}
    roots = [one for name, one in {**loaded["groups"], **loaded["tasks"]}.items() if name not in inner]
    with redirect_stdout(sys.stderr):  # lm_eval talks while it works
        found: dict[str, Any] = simple_evaluate(
            model,
            tasks=roots,
            task_manager=manager,
            limit=options.limit or None,
            num_fewshot=None if options.fewshot < 0 else options.fewshot,
            apply_chat_template=options.chat,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
            confirm_run_unsafe_code=options.run_code,
        )
    return found


class Figure(NamedTuple):
    """One metric of one task or group.

    Args:
        task: Its name.
        metric: Its name.
        filter: How the answer was taken from the text; "none" mostly.
        value: None where it is not a finite number.
        stderr: Standard error; None where lm_eval has none.
        examples: How many were asked; None for a group.
        fewshot: Examples before each question.
        version: Of the task.
    """

    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    examples: int | None
    fewshot: int
    version: Any


def figures_of(found: Mapping[str, Any]) -> list[Figure]:
    """The figures in what `run_tasks` returns."""

    def number(value: Any) -> float | None:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, comma, form = name.partition(",")
            if comma and not metric.endswith("_stderr"):
                rows.append(
                    Figure(
                        task,
                        metric,
                        form,
                        number(value),
                        number(values.get(f"{metric}_stderr,{form}")),
                        found["n-samples"].get(task, {}).get("effective"),
                        found["n-shot"][task],
                        found["versions"].get(task),
                    )
                )
    return rows


def _found(names: Sequence[str], folder: str) -> tuple[TaskManager, Any]:
    """Tasks of one's own folder; reading the names of all that lm_eval has takes seconds, so it comes second."""
    if folder:
        with suppress(DataError, UsageError):
            own = TaskManager(include_path=folder, include_defaults=False)
            return own, _loaded(own, names)
    manager = TaskManager(include_path=folder or None)
    return manager, _loaded(manager, names)


def _loaded(manager: TaskManager, names: Sequence[str]) -> Any:
    """The tasks with their data."""
    for name in names:
        if name not in manager.task_index and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UsageError(
                f"there is no task {name!r} among {len(manager.all_tasks):,}",
                hint=f"did you mean {', '.join(close)}?"
                if close
                else "--include-path names a folder of your own",
            )
    try:
        return manager.load(list(names))
    except FAILURES as error:
        said = " ".join(str(error).split())
        raise DataError(
            f"{', '.join(names)} cannot be loaded: {type(error).__name__}: {said[:500]}",
            hint="public tasks fetch their data from the hub once; offline, they must be in its cache",
        ) from error


@final
class EngineModel(TemplateLM):  # type: ignore[misc]
    """The engine as a model of lm_eval.

    Args:
        opened: The model, its tokenizer and what ends an answer.
        options: Of the engine.
        say: Called with a line now and then.

    Raises:
        ConfigError: a model or options that the engine cannot serve.
    """

    def __init__(
        self,
        opened: Opened,
        options: EngineOptions | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        super().__init__()
        self._text, self._say = opened.tokenizer, say
        self._engine = Engine(opened.model, opened.tokenizer, ends=opened.ends, options=options)
        self.max_length = self._engine.max_positions
        written = self._text.special_tokens.get("bos_token", self._text.end_token)
        self._first, self._first_id = written, self._text.special_ids().get(written, self._text.end_id)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._text.end_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text with nothing before it: the token that begins texts, else the one that ends them."""
        return self._first_id

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of prompts."""
        return self._text.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, after those that `tokenizer.json` wants before every text unless it begins with them."""
        assert not kwargs, kwargs
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._first)
        return [*(self._text.around if add_special_tokens else ()), *self._text.encode_with_special(string)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of messages; without a generation prompt the last one is to be gone on with."""
        assert self._text.chat_template is not None, "checked in run_tasks"
        said = self._text.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return said
        last = chat_history[-1]["content"].strip()
        return said[: said.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """ln p of each continuation after its context, and whether every token of it is the best one.

        The last token is drawn by force, so it never goes through the model, and choices of one token are one prompt.
        """
        asked, lengths = [], []
        for _, context, continuation in requests:
            count = len(continuation)
            if not 0 < count <= self.max_length or not context:
                raise DataError(
                    f"a text of {count} tokens after {len(context)} cannot be scored",
                    hint=f"at least one token comes before it, and this model has {self.max_length} positions",
                )
            *prompt, last = [*context, *continuation][-(self.max_length + 1) :]
            options = RequestOptions(
                max_tokens=1,
                sampling=SamplingOptions(temperature=0.0),
                logprobs=1,
                logit_bias={last: FORCE},
                prompt_logprobs=1 if count > 1 else None,
                scored_from=len(prompt) - count + 1 if count > 1 else 1,
            )
            asked.append(Asked(prompt, options))
            lengths.append(count)
        found = []
        for result, one, count in zip(self._answers(asked), asked, lengths, strict=True):
            assert result.tokens == [*one.options.logit_bias], (result.tokens, one.options.logit_bias)
            parts: list[Drawn | Event] = [*result.scored, *result.drawn]
            assert len(parts) == count, (len(parts), count)
            logprobs = [part.logprob for part in parts if part.logprob is not None]
            found.append((sum(logprobs), all(part.token == part.top[0][0] for part in parts)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts: each token once, in windows of the longest sequence."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, without the text that ended it."""
        asked = [self._asked(*request.args, seed=seed) for seed, request in enumerate(requests)]
        return [result.text for result in self._answers(asked)]

    def _asked(self, context: str, given: dict[str, Any], *, seed: int) -> Asked:
        """How an answer is drawn: the best tokens, unless the task says otherwise."""
        wanted = normalize_gen_kwargs(given, MOST_NEW_TOKENS)
        most, until = wanted.pop("max_gen_toks"), wanted.pop("until")
        samples, one_beam = wanted.pop("do_sample"), wanted.pop("num_beams", 1) == 1
        drawn: dict[str, Any] = {name: wanted.pop(name) for name in DRAWN if name in wanted}
        if wanted or not one_beam:
            raise UsageError(
                f"a task wants {', '.join([*wanted, *([] if one_beam else ['num_beams'])])} for its answers",
                hint=f"the engine takes do_sample, until, max_gen_toks, {', '.join(DRAWN)}",
            )
        drawn["temperature"] = drawn.get("temperature", 1.0) if samples else 0.0
        drawn = {name: int(value) if name == "top_k" else float(value) for name, value in drawn.items()}
        room = self.max_length - most
        if room < 1:
            raise UsageError(
                f"a task wants answers of up to {most} tokens, and this model has {self.max_length} positions",
                hint="in a task of your own, lower generation_kwargs: max_gen_toks",
            )
        sampling = SamplingOptions(seed=seed, **drawn)
        stop = tuple(dict.fromkeys(text for text in (*until, self._text.end_token) if text))
        prompt = self.tok_encode(context)[-room:] or [self._first_id]
        return Asked(prompt, RequestOptions(max_tokens=most, stop=stop, sampling=sampling))

    def _answers(self, asked: Sequence[Asked]) -> Iterator[Result]:
        """What came of each, in order."""
        for begin in range(0, len(asked), AT_ONCE):
            part = asked[begin : begin + AT_ONCE]
            for result in self._engine.generate([one.prompt for one in part], [one.options for one in part]):
                if result.reason == "error":
                    raise MoietyError(result.error)
                yield result
            self._say(f"{begin + len(part):,} of {len(asked):,} requests")
