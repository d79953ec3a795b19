"""What clients get: the shapes of answers and of chunks, for types and for the description in /openapi.json."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

__all__ = [
    "ChatChoice",
    "ChatReply",
    "Completion",
    "CompletionChoice",
    "Health",
    "Model",
    "Models",
    "ResponseReply",
    "RoutingTotals",
    "Usage",
    "Version",
]


class PromptDetails(TypedDict):
    """Tokens whose work was found and not done again."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens; a prompt counts once for all its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Expert(TypedDict):
    """An expert and its share of a layer's pairs."""

    expert: int
    share: float


class LayerLoad(TypedDict):
    """How the pairs of a layer are spread; see `moiety.infer.routed.load_summary`."""

    layer: int
    entropy_bits: float
    uniform_bits: float
    imbalance: float
    unused: int
    top: list[Expert]


class RoutingSummary(TypedDict):
    """Where an answer's tokens went, prompt included."""

    tokens: int
    dropped_tokens: int
    layers: list[LayerLoad]
    expert_hits: NotRequired[int]
    expert_misses: NotRequired[int]


class RoutingTotals(TypedDict):
    """Where all tokens went since the start."""

    layers: list[LayerLoad]
    counts: dict[str, list[int]]
    tokens: int
    steps: int


class CompletionLogprobs(TypedDict):
    """ln p of tokens; None of a prompt's first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One answer, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    routed_experts: NotRequired[str]
    routing: NotRequired[RoutingSummary]


class Completion(TypedDict):
    """The answers, or a chunk of their stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    """A token that could have been drawn."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was drawn, and the best ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """ln p of the answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    """A name, and arguments as JSON."""

    name: str
    arguments: str


class Call(TypedDict):
    """A function that the model calls."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: NotRequired[int]


class ChatMessage(TypedDict, total=False):
    """A message, or a piece of one."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call]


ChatReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatReason
    routed_experts: NotRequired[str]
    routing: NotRequired[RoutingSummary]


class ChatReply(TypedDict):
    """The answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class OutputText(TypedDict):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(TypedDict):
    """An answer."""

    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class ResponseReply(TypedDict):
    """What `/v1/responses` gives, and what its events carry."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str
    tools: list[Any]
    top_p: float
    truncation: str
    usage: dict[str, Any] | None
    routed_experts: NotRequired[str]
    routing: NotRequired[RoutingSummary]


class Model(TypedDict):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(TypedDict):
    """All models: one."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """Well; or of several replicas, counted from 0, some are down and the others answer."""

    status: Literal["ok", "degraded"]
    down: NotRequired[list[int]]


class Version(TypedDict):
    """Of the program."""

    version: str
