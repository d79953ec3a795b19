"""How to generate: the options, apart from the code so that reading them needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from moiety.errors import ConfigError
from moiety.fields import check_types, not_negative, option, positive, require, size_bytes
from moiety.residency import POLICIES

__all__ = [
    "BenchOptions",
    "EngineOptions",
    "RecordOptions",
    "RequestOptions",
    "SamplingOptions",
    "StreamOptions",
    "TaskOptions",
    "adapters_named",
    "biases_named",
]

KV_DTYPES = ("auto", "fp32", "bf16")
MOST_BIASES, MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS = 1024, 64, 1024, 100


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What to draw from. Penalties change logits; then temperature, top-k, top-p and min-p, each on what
    the one before left.
    """

    temperature: float = option(0.8, help="divides the logits; 0 takes the best token every time")
    top_k: int = option(0, help="keep this many best tokens; 0 keeps all")
    top_p: float = option(1.0, help="keep the smallest set of best tokens with this much probability")
    min_p: float = option(0.0, help="keep tokens with at least this share of the best one's probability")
    repetition_penalty: float = option(
        1.0, help="divides positive logits of tokens in prompt or answer, multiplies negative ones"
    )
    presence_penalty: float = option(0.0, help="taken from the logit of every token in the answer")
    frequency_penalty: float = option(0.0, help="taken once for each time that the token is in the answer")
    seed: int = option(0, help="seed of the draw")

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; allowed is 0 to 2**63 - 1")
        not_negative(self, "temperature", "top_k")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; allowed is above 0 to 1")
        require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; allowed is 0 to 1")
        penalty = self.repetition_penalty
        require(0.01 <= penalty <= 100, f"repetition_penalty is {penalty}; allowed is 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            require(
                abs(getattr(self, name)) <= 100, f"{name} is {getattr(self, name)}; allowed is -100 to 100"
            )


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """How one prompt is answered."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions, metadata={"help": "what to draw from"})
    max_tokens: int = option(128, help="most tokens to draw")
    min_tokens: int = option(0, help="before so many are drawn, nothing but max_tokens ends the answer")
    stop: tuple[str, ...] = option((), help="texts that end the answer and are not part of it")
    stop_ids: tuple[int, ...] = option((), help="tokens that end the answer, besides the model's own")
    ignore_end: bool = option(False, help="the model's own end tokens end nothing")
    logprobs: int | None = option(
        None, help="ln p of every token drawn, and of this many best ones; none gives neither"
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "added to the logits of these tokens"}
    )
    prompt_logprobs: int | None = option(
        None, help="ln p of every token of the prompt but the first, and of this many best ones"
    )
    scored_from: int = option(1, help="the first token of the prompt that prompt_logprobs is about")
    record_routing: bool = option(False, help="keep which experts every token went to")
    salt: str = option("", help="work on a prompt's start is shared only among requests of the same salt")
    adapter: str = option("", help="which of the model's adapters answers; empty is the active one, if any")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "max_tokens")
        not_negative(self, "min_tokens")
        require(self.scored_from >= 1, f"scored_from is {self.scored_from}; nothing foresees the first token")
        require(
            self.min_tokens <= self.max_tokens,
            f"min_tokens is {self.min_tokens}, max_tokens is {self.max_tokens}",
            "min_tokens may be at most max_tokens",
        )
        for name in ("stop", "stop_ids"):
            entries = len(getattr(self, name))
            require(entries <= MOST_STOPS, f"{name} has {entries} entries; at most {MOST_STOPS} are allowed")
        for text in self.stop:
            length = len(text)
            require(
                0 < length <= LONGEST_STOP,
                f"a stop text has {length} characters; allowed is 1 to {LONGEST_STOP}",
            )
        require(min(self.stop_ids, default=0) >= 0, f"stop_ids are {self.stop_ids}; tokens are not negative")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            require(
                count is None or 0 <= count <= MOST_LOGPROBS,
                f"{name} is {count}; allowed is none or 0 to {MOST_LOGPROBS}",
            )
        biases = self.logit_bias
        require(
            len(biases) <= MOST_BIASES,
            f"logit_bias has {len(biases)} tokens; at most {MOST_BIASES} are allowed",
        )
        for token, bias in biases.items():
            require(token >= 0, f"logit_bias has token {token}; tokens are not negative")
            require(abs(bias) <= 1000, f"logit_bias of token {token} is {bias}; allowed is -1000 to 1000")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine may use, and how it shares that among requests."""

    kv_bytes: int = option(
        0, help="bytes for keys and values; 0 is 1 GiB, or less where the longest sequences need less"
    )
    kv_dtype: str = option("auto", help="of keys and values: fp32, bf16, or auto, that of the weights")
    page_tokens: int = option(16, help="tokens of one page of keys and values, the unit of sharing")
    max_positions: int = option(
        0, help="longest sequence, prompt and answer together; 0 is the model's, or what 1 GiB holds"
    )
    step_tokens: int = option(512, help="most tokens that go through the model in one step")
    max_requests: int = option(32, help="most requests that are worked on at the same time")
    max_queue: int = option(1024, help="most requests that wait; one more is refused")
    prefix_cache: bool = option(True, help="keep the work on a prompt's start for requests that begin alike")
    draft: int = option(0, help="most tokens to guess ahead from repetitions in the text; 0 is off")

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "kv_bytes", "max_positions", "draft")
        positive(self, "page_tokens", "step_tokens", "max_requests", "max_queue")
        require(
            self.kv_dtype in KV_DTYPES,
            f"kv_dtype is {self.kv_dtype!r}; allowed are {', '.join(KV_DTYPES)}",
        )
        require(
            self.step_tokens >= self.max_requests,
            f"step_tokens is {self.step_tokens}, max_requests is {self.max_requests}",
            "every request takes at least one token of a step: raise step_tokens or lower max_requests",
        )


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a packed model is run in less memory than it has bytes: its experts come from disk when they are wanted."""

    memory: str = option("", help="of the whole process, 12GiB for instance; '' holds all experts")
    expert_policy: str = option("auto", help=f"who makes room: auto, {', '.join(POLICIES)}")
    prefetch: bool = option(True, help="read the next layer's likely experts while the disk is idle")
    resident_bias: float = option(
        0.0, help="score by which experts on disk are set back; above 0 changes answers"
    )
    skip_misses_below: float = option(
        0.0, help="leave out experts on disk of less weight; above 0 changes answers"
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("resident_bias", "skip_misses_below"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; allowed is 0 to 1")
        known = ("auto", *POLICIES)
        require(
            self.expert_policy in known,
            f"expert_policy is {self.expert_policy!r}; allowed are {', '.join(known)}",
        )
        if self.memory:
            size_bytes(self.memory, "memory")
        elif any(getattr(self, item.name) != item.default for item in fields(self)):
            raise ConfigError(
                "options of streaming are given and memory is not", hint="say how much: --memory 12GiB"
            )

    @property
    def memory_bytes(self) -> int:
        """The budget; 0 is none."""
        return size_bytes(self.memory, "memory") if self.memory else 0


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What to keep of a run's routing."""

    record: str = option("", help="write the routing of this run to this file; '' writes none")
    record_level: Literal["counts", "choices", "scores"] = option(
        "choices", help="counts of each expert, choices of each token, or scores too: weights and all scores"
    )
    record_sample: int = option(1, help="keep one stretch of about a thousand tokens in so many")
    record_bytes: int = option(1 << 30, help="largest file; what comes after is dropped, and counted")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "record_sample", "record_bytes")
        require(
            bool(self.record) or all(getattr(self, one.name) == one.default for one in fields(self)),
            "there are options of a record, and no file for it",
            "add --record FILE",
        )


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which part of the tasks of lm-evaluation-harness, and how they are put to the model."""

    limit: int = option(0, help="most examples of each task; 0 takes all")
    include_path: str = option("", help="a folder with tasks of your own, as YAML")
    fewshot: int = option(-1, help="examples before each question; -1 takes each task's own number")
    chat: bool = option(False, help="put questions through the model's chat template")
    run_code: bool = option(
        False, help="let tasks run the programs that the model writes, as you and on this machine"
    )

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "limit")
        require(self.fewshot >= -1, f"fewshot is {self.fewshot}; allowed is -1 and more")


def adapters_named(texts: Sequence[str]) -> dict[str, str]:
    """Folders of adapters by name, from texts like name=folder; one without a name is called default.

    Raises:
        ConfigError: a name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, mark, place = text.partition("=")
        name, place = (name, place) if mark and "/" not in name else ("default", text)
        require(name not in found, f"there are two adapters {name!r}", "write name=folder")
        found[name] = place
    return found


def biases_named(text: str) -> dict[int, float]:
    """Biases from a text such as 17=-5,42=3: tokens and what is added to their logits.

    Raises:
        ConfigError: another form, or a token twice.
    """
    found: dict[int, float] = {}
    for word in filter(None, map(str.strip, text.split(","))):
        token, _, bias = word.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError:
            raise ConfigError(
                f"logit_bias has {word!r}",
                hint="write token=bias with commas between, 17=-5,42=3 for instance",
            ) from None
        require(number not in found, f"logit_bias names token {number} twice")
        found[number] = value
    return found


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Different positive numbers, in ascending order, from a text with commas between them."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    require(
        all(word.isascii() and word.isdigit() and 0 < int(word) < 10**6 for word in words),
        f"{name} is {text!r}",
        "positive whole numbers with commas between",
    )
    return tuple(sorted(set(map(int, words))))


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure of a model's speed."""

    batches: str = option("1,8,32,128", help="sequences that are decoded together; commas between")
    most: int = option(0, help="instead of batches 1, 2, 4, ... up to so many sequences")
    prompt: int = option(16, help="tokens of each sequence's prompt")
    tokens: int = option(32, help="that each sequence draws")
    prefill: str = option(
        "512,2048", help="lengths of single prompts, cut to the model's longest; '' is none"
    )
    kv_dtype: str = option("auto", help="of keys and values: fp32, bf16, or auto, that of the weights")
    requests: int = option(0, help="--url: with each number of clients; 0 is four of each client")

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "requests", "most")
        positive(self, "prompt")
        require(self.tokens >= 2, f"tokens is {self.tokens}; from one token to the next there are at least 2")
        EngineOptions(kv_dtype=self.kv_dtype)
        _numbers("batches", self.batches)
        _numbers("prefill", self.prefill)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many sequences at a time."""
        powers = tuple(2**power for power in range(self.most.bit_length()))
        return powers or _numbers("batches", self.batches)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the single prompts."""
        return _numbers("prefill", self.prefill)
