"""An engine: many requests through one model, a step at a time, each answered as if it were alone.

    engine = moiety.Engine(model, tokenizer)
    for token in engine.stream("Once upon a time"):
        ...

A step is three calls: `Scheduler.schedule` (who), `Runner.run` (the model), `Scheduler.commit` (what came of it). Any
thread may submit and cancel; whoever waits for a token makes the next step unless another thread is making one.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from moiety.errors import BusyError, ConfigError, MoietyError, UsageError
from moiety.infer.drafts import Drafter
from moiety.infer.offload import StoreStatistics, store_of
from moiety.infer.options import EngineOptions, RequestOptions
from moiety.infer.pace import Paces, Work
from moiety.infer.pages import Pages
from moiety.infer.request import Constraint, Drawn, Reason, Request, State
from moiety.infer.room import AUTOMATIC_BYTES, page_count
from moiety.infer.routed import RoutedExperts
from moiety.infer.runner import Outcome, Runner, imbalance
from moiety.infer.scheduler import Scheduler, Slice
from moiety.infer.stops import AnswerText
from moiety.model.tokenizer import TextStream, Tokenizer
from moiety.model.transformer import Transformer
from moiety.observe.record import Recorder

__all__ = ["Engine", "Event", "Handle", "Result", "Statistics", "check_model"]

WINDOW_STEPS = 256
Listener = Callable[["Event"], None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened to a request: a token, its end, or both at once.

    Args:
        number: Of the request.
        token: What was drawn; None where it ended for another reason than a token.
        text: What may be shown now.
        logprob: ln p of the token, where asked for.
        top: The best tokens and their ln p, where asked for.
        reason: Why the request ended; None while it goes on.
        error: What went wrong, with reason "error".
    """

    number: int
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reason: Reason | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A whole answer.

    Args:
        number: Of the request.
        prompt_tokens: Tokens of the prompt.
        tokens: The answer; a token that ended it is its last.
        text: The answer as text, without what ended it; empty without a tokenizer.
        reason: Why it ended.
        error: What went wrong, with reason "error".
        drawn: The answer's events that have a token.
        scored: Tokens of the prompt with their ln p, where asked for.
        reused_tokens: Tokens whose work was found in pages, after a preemption as well.
        preemptions: How often it had to give its pages back.
        first_token_s: From submission to the first token.
        between_tokens_s: From each token to the next; 0 between tokens that were guessed together.
    """

    number: int
    prompt_tokens: int
    tokens: list[int]
    text: str
    reason: Reason
    error: str
    drawn: list[Event]
    scored: Sequence[Drawn]
    reused_tokens: int
    preemptions: int
    first_token_s: float
    between_tokens_s: list[float]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What an engine does and has done.

    Args:
        running: Requests that are worked on.
        waiting: Requests that wait.
        finished: Requests that ended, by reason.
        pages: Pages there are.
        pages_used: Pages that requests hold.
        pages_kept: Pages that later requests may find, held or not.
        pages_touched: Pages that were ever written to; no other takes memory.
        steps: Steps made.
        computed_tokens: Tokens that went through the model, guesses included.
        reused_tokens: Tokens that did not have to, because pages had them.
        drawn_tokens: Tokens of answers.
        preemptions: How often a request had to give its pages back.
        drafted_tokens: Tokens guessed.
        accepted_tokens: Of these, the right ones.
        drafting: Whether guessing is on, and why.
        tokens_per_s: Tokens of answers over the time of the last steps.
        imbalance: Pairs of the busiest expert over the mean of all, in the last step, the mean over layers.
        experts: What the store of experts has done; None where all are in memory.
    """

    running: int
    waiting: int
    finished: dict[Reason, int]
    pages: int
    pages_used: int
    pages_kept: int
    pages_touched: int
    steps: int
    computed_tokens: int
    reused_tokens: int
    drawn_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    drafting: str
    tokens_per_s: float
    imbalance: float
    experts: StoreStatistics | None = None


def check_model(model: Transformer) -> None:
    """Refuse a model whose answer to one request depends on what else is in the batch.

    Raises:
        ConfigError: its routers or its capacity look at a whole batch.
        UsageError: it is in training mode.
    """
    moe = model.config.moe
    if moe is not None and (moe.router == "expert_choice" or moe.eval_capacity_factor > 0):
        what = "a capacity in evaluation" if moe.eval_capacity_factor > 0 else "experts that choose tokens"
        raise ConfigError(
            f"this model has {what}: an answer would depend on the other requests in the batch",
            hint="moiety.generate (`moiety generate --plain`) runs one sequence at a time",
        )
    if model.training:
        raise UsageError(
            "the model is in training mode, where routers may be noisy", hint="call model.eval()"
        )


@final
class Handle:
    """One request as its consumer sees it.

    Args:
        request: What the engine works on.
        listener: Called with every event, by the thread that makes the step; it must not block.
    """

    def __init__(self, request: Request, listener: Listener | None) -> None:
        self.request, self._listener = request, listener
        self.events: list[Event] = []

    @property
    def number(self) -> int:
        """The request's name, for `Engine.cancel`."""
        return self.request.number

    @property
    def is_done(self) -> bool:
        """True once the last event is there."""
        return bool(self.events) and self.events[-1].reason is not None

    def put(self, event: Event) -> None:
        """Take an event."""
        self.events.append(event)
        if self._listener is not None:
            self._listener(event)

    def result(self) -> Result:
        """The whole answer, once it is there."""
        assert self.is_done, (self.number, "is not done")
        request, times_s = self.request, self.request.times_s
        assert request.reason is not None, self.number
        return Result(
            number=self.number,
            prompt_tokens=len(request.prompt),
            tokens=request.answer,
            text="".join(event.text for event in self.events),
            reason=request.reason,
            error=request.error,
            drawn=[event for event in self.events if event.token is not None],
            scored=tuple(request.scored),
            reused_tokens=request.reused,
            preemptions=request.preemptions,
            first_token_s=times_s[0] - request.submitted_s if times_s else 0.0,
            between_tokens_s=[late - early for early, late in itertools.pairwise(times_s)],
        )


@final
class Engine:
    """Answers many requests at once with one model.

    Args:
        model: In evaluation mode.
        tokenizer: For prompts and answers as text, and for where an answer ends; None works on tokens alone.
        ends: Tokens that end an answer; None is the tokenizer's.
        options: Memory, steps and limits.
        recorder: Takes the routing of every step.

    Attributes:
        runner: Who has the model.
        store: Where experts come from that are not in memory; None where all are.
        paces: How long steps took, apart by what they did.
        computed_tokens: That went through the model so far.

    Raises:
        ConfigError: options that do not fit the model, or a model that cannot be batched.
        UsageError: the model is in training mode.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        ends: frozenset[int] | None = None,
        options: EngineOptions | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        check_model(model)
        self.options = options = EngineOptions() if options is None else options
        dtype = self.kv_dtype(model, options)
        self.store = store_of(model)
        automatic_bytes = AUTOMATIC_BYTES if self.store is None else self.store.kv_bytes
        count, self.max_positions = page_count(model.config, options, dtype, automatic_bytes)
        self._tokenizer, self._vocabulary = tokenizer, model.config.vocab_size
        self._ends = ends if ends is not None else frozenset({tokenizer.end_id} if tokenizer else ())
        self.runner = Runner(model, count, options.page_tokens, dtype, recorder)
        self.adapters = self.runner.adapters
        self._drafter = Drafter(model.config, options.draft) if options.draft else None
        self._scheduler = Scheduler(
            Pages(count, options.page_tokens, prefix_cache=options.prefix_cache),
            step_tokens=options.step_tokens,
            max_requests=options.max_requests,
            max_queue=options.max_queue,
            draft=self._drafter,
        )
        self._stepping = threading.Lock()  # the scheduler and the runner belong to whoever holds it
        self._inbox = threading.Condition()  # guards the three below, and is held for an instant only
        self._coming: list[Request] = []
        self._cancelled: list[int] = []
        self._live: dict[int, Handle] = {}
        self._submitted = 0
        self._made: list[Event] = []
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW_STEPS)
        self._finished: dict[Reason, int] = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self.paces = Paces()
        self.computed_tokens = self._steps = self._drawn = self._reused = self._drafted = self._accepted = 0

    @staticmethod
    def kv_dtype(model: Transformer, options: EngineOptions) -> torch.dtype:
        """What keys and values of a model will be in: what the options say, or the dtype of its weights."""
        dtypes = {"auto": model.embed.weight.dtype, "fp32": torch.float32, "bf16": torch.bfloat16}
        return dtypes[options.kv_dtype]

    def submit(
        self,
        prompt: str | Sequence[int],
        options: RequestOptions | None = None,
        *,
        listener: Listener | None = None,
        constraint: Constraint | None = None,
        shown: Mapping[int, str] | None = None,
    ) -> Handle:
        """Take in a request; it is worked on by the steps from now on.

        Args:
            prompt: Text, or token ids.
            options: How to answer it.
            listener: Called with every event, by the thread that makes the step; it must not block.
            constraint: What the answer may be, for this request alone.
            shown: Special tokens whose letters belong to the answer's text.

        Raises:
            UsageError: a prompt or options that this model or these pages can never serve.
            BusyError: too many requests wait.
        """
        tokens = self._checked(prompt, options := options or RequestOptions())
        options = replace(options, adapter=self.runner.adapter(options.adapter))
        words = None if self._tokenizer is None else TextStream(self._tokenizer, shown)
        text = None if words is None else AnswerText(words, options.stop)
        with self._inbox:
            request = Request(
                self._submitted,
                tokens,
                options,
                ends=self._ends,
                longest=self.max_positions,
                text=text,
                constraint=constraint,
                routed=RoutedExperts() if options.record_routing else None,
            )
            self._scheduler.refuse(request, coming=len(self._coming))
            request.submitted_s = time.perf_counter()
            handle = Handle(request, listener)
            self._submitted += 1
            self._coming.append(request)
            self._live[request.number] = handle
            self._inbox.notify_all()
        return handle

    def _checked(self, prompt: str | Sequence[int], options: RequestOptions) -> Sequence[int]:
        """The prompt's tokens, if it and the options fit the model."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise UsageError("a prompt as text needs a tokenizer", hint="give the engine one, or tokens")
            prompt = self._tokenizer.encode_prompt(prompt)
        if options.stop and self._tokenizer is None:
            raise UsageError("stop texts need a tokenizer", hint="give the engine one, or use stop_ids")
        if not len(prompt):
            raise UsageError(
                "the prompt has no token", hint="give at least one, such as the end-of-text token"
            )
        last = self._vocabulary - 1
        named = {
            "the prompt": prompt,
            "stop_ids": options.stop_ids,
            "logit_bias": options.logit_bias,
        }
        for what, tokens in named.items():
            if tokens and not 0 <= min(tokens) <= max(tokens) <= last:
                raise UsageError(
                    f"{what} has tokens outside 0 to {last}", hint="is this the model's tokenizer?"
                )
        if len(prompt) > self.max_positions:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens; with its answer there is room for {self.max_positions}",
                hint="shorten it, or raise the engine's max_positions if the model allows more",
            )
        return prompt

    def cancel(self, number: int) -> bool:
        """End a request, whatever it is doing; False if it has ended already or never was."""
        with self._inbox:
            if number not in self._live:
                return False
            self._cancelled.append(number)
        if self._stepping.acquire(
            blocking=False
        ):  # otherwise the step that runs is followed by one that sees it
            try:
                self._take_in()
            finally:
                self._stepping.release()
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until there is something to do; False if there was nothing in that time."""
        with self._inbox:
            return self._inbox.wait_for(lambda: bool(self._live), timeout_s)

    def step(self) -> list[Event]:
        """Make one step; what happened since the last one. Empty when there is nothing to do.

        Where the model cannot be run for a reason that has words, such as a disk that fails, they end every request of
        the step.

        Raises:
            RuntimeError: the model could not be run for another reason; every request of the step has ended too.
        """
        with self._stepping:
            self._step()
            events, self._made = self._made, []
        return events

    def stream(self, prompt: str | Sequence[int], options: RequestOptions | None = None) -> Iterator[int]:
        """The answer's tokens as they are drawn; leaving the loop cancels the request. Raises like `events`."""
        return (event.token for event in self.events(self.submit(prompt, options)) if event.token is not None)

    def stream_text(
        self, prompt: str | Sequence[int], options: RequestOptions | None = None
    ) -> Iterator[str]:
        """The answer's text in pieces as they are drawn; leaving the loop cancels the request. Raises like `events`."""
        return (event.text for event in self.events(self.submit(prompt, options)) if event.text)

    def events(self, handle: Handle) -> Iterator[Event]:
        """What happens to a request, making steps where nobody else does; leaving the loop cancels it.

        Raises:
            MoietyError: the request ended with an error.
        """
        seen = 0
        try:
            while True:
                while seen < len(handle.events):
                    event = handle.events[seen]
                    seen += 1
                    if event.reason == "error":
                        raise MoietyError(event.error)
                    yield event
                    if event.reason is not None:
                        return
                with self._stepping:
                    if seen == len(handle.events):
                        self._step()
                        self._made.clear()
        finally:
            self.cancel(handle.number)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: RequestOptions | Sequence[RequestOptions] | None = None,
    ) -> list[Result]:
        """All answers, in the order of the prompts; of one that failed the result says so.

        Args:
            prompts: Any number, more than may wait too.
            options: For all of them, or one for each.

        Raises:
            UsageError: as in `submit`; nothing is left behind.
        """
        if options is None or isinstance(options, RequestOptions):
            options = [options or RequestOptions()] * len(prompts)
        if len(options) != len(prompts):
            raise UsageError(f"there are {len(prompts)} prompts and {len(options)} options for them")
        handles: list[Handle] = []
        try:
            while len(handles) < len(prompts) or not all(handle.is_done for handle in handles):
                while len(handles) < len(prompts):
                    try:
                        handles.append(self.submit(prompts[len(handles)], options[len(handles)]))
                    except BusyError:
                        break
                with self._stepping:
                    self._step()
                    self._made.clear()
        finally:
            for handle in handles:
                self.cancel(handle.number)
        return [handle.result() for handle in handles]

    def statistics(self) -> Statistics:
        """How things stand; exact between steps."""
        scheduler, pages = self._scheduler, self._scheduler.pages
        recent = list(self._recent)
        busy_s = sum(duration_s for duration_s, _ in recent)
        return Statistics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._coming),
            finished=dict(self._finished),
            pages=pages.count,
            pages_used=pages.count - pages.available,
            pages_kept=pages.kept,
            pages_touched=pages.touched,
            steps=self._steps,
            computed_tokens=self.computed_tokens,
            reused_tokens=self._reused,
            drawn_tokens=self._drawn,
            preemptions=scheduler.preemptions,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            drafting="off: not asked for" if self._drafter is None else self._drafter.reason,
            tokens_per_s=sum(tokens for _, tokens in recent) / busy_s if busy_s else 0.0,
            imbalance=imbalance(list(self.runner.counts.values())),
            experts=None if self.store is None else self.store.statistics(),
        )

    def expert_counts(self) -> Mapping[int, Tensor]:
        """Pairs of each expert in the last step, (E,), by layer; none in a dense model."""
        return self.runner.counts

    def expert_totals(self) -> Mapping[int, Tensor]:
        """The same in all steps so far."""
        return dict(self.runner.totals)

    def check(self) -> None:
        """Assert that no page leaked and nobody was overtaken; for tests."""
        with self._stepping:
            self._scheduler.check()

    def _take_in(self) -> None:
        """Move what other threads left into the scheduler."""
        with self._inbox:
            coming, self._coming = self._coming, []
            cancelled, self._cancelled = self._cancelled, []
        self._scheduler.waiting.extend(coming)
        for number in cancelled:
            if (handle := self._live.get(number)) is not None:
                self._end(handle.request, "cancelled")

    def _step(self) -> None:
        """One step, by whoever holds `_stepping`."""
        begun_s = time.perf_counter()
        self._take_in()
        slices = self._scheduler.schedule()
        if not slices:
            return
        before = None if self.store is None else self.store.statistics()
        drew = self.paces.is_drawing(slices)
        try:
            outcomes = self.runner.run(slices)
        except MoietyError as error:
            self._fail(slices, str(error))
            return
        except BaseException as error:
            self._fail(slices, f"the step failed: {type(error).__name__}")
            raise
        now_s, drawn, cost = time.perf_counter(), 0, Work()
        if self.store is not None and before is not None:
            cost = Work.between(before, self.store.statistics())
            for piece in slices:
                if isinstance(piece.request.routed, RoutedExperts):
                    piece.request.routed.read(cost.hits, cost.misses)
        for piece, outcome in zip(slices, outcomes, strict=True):
            drawn += self._settle(piece, outcome, now_s)
        self._steps += 1
        self.computed_tokens += sum(len(piece.tokens) for piece in slices)
        self._drawn += drawn
        seconds = time.perf_counter() - begun_s
        self._recent.append((seconds, drawn))
        self.paces.add(slices, cost._replace(seconds=seconds), drew=drew)

    def _fail(self, slices: Sequence[Slice], words: str) -> None:
        for piece in slices:
            self._end(piece.request, "error", words)

    def _settle(self, piece: Slice, outcome: Outcome, now_s: float) -> int:
        """Take what came of a slice; how many tokens that was."""
        request, appended = piece.request, 0
        request.scored[max(piece.start + 1 - request.options.scored_from, 0) :] = outcome.scored
        for drawn in outcome.drawn:
            try:
                text = request.append(drawn.token, now_s)
            except MoietyError as error:  # a token that the tokenizer does not know
                outcome = outcome._replace(error=str(error))
                break
            appended += 1
            self._tell(request, drawn, text)
            if request.reason is not None:
                break
        if outcome.error and request.reason is None:
            self._end(request, "error", outcome.error)
        else:
            self._scheduler.commit(piece, appended)
            if request.state is State.FINISHED:
                self._forget(request)
        return appended

    def _tell(self, request: Request, drawn: Drawn, text: str) -> None:
        self._put(
            Event(
                number=request.number,
                token=drawn.token,
                text=text,
                logprob=drawn.logprob,
                top=drawn.top,
                reason=request.reason,
            )
        )

    def _end(self, request: Request, reason: Reason, error: str = "") -> None:
        """End a request that no token ended."""
        rest = "" if request.text is None else request.text.finish()
        self._scheduler.finish(request, reason, error)
        self._put(Event(number=request.number, text=rest, reason=reason, error=error))
        self._forget(request)

    def _put(self, event: Event) -> None:
        self._made.append(event)
        self._live[event.number].put(event)

    def _forget(self, request: Request) -> None:
        """Count a finished request and let go of it."""
        assert request.reason is not None, request.number
        self._finished[request.reason] += 1
        self._reused += request.reused
        self._drafted += request.drafted
        self._accepted += request.accepted
        with self._inbox:
            del self._live[request.number]
