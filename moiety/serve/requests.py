"""What clients may ask: OpenAI's request bodies as far as they are served, checked field by field.

An unknown field is refused. Fields of the protocol that change no answer here (`user`, `metadata`, `store`, ...) are
taken and have no effect; those that would change it and cannot be served are refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from moiety.infer.options import LONGEST_STOP, MOST_BIASES, MOST_STOPS
from moiety.serve.options import MOST_LOGPROBS, MOST_MESSAGES, MOST_N, MOST_PROMPTS, MOST_TOOLS

__all__ = [
    "NOT_SERVED",
    "ChatRequest",
    "CompletionRequest",
    "Format",
    "InputItem",
    "Message",
    "ResponsesRequest",
    "Tool",
]

INPUTS = "it reads text alone"
NOT_SERVED: dict[str, str] = {
    "suffix": "the model writes on from the end of a text, and does not fill gaps",
    "best_of": "ask for n answers with logprobs and choose",
    "audio": INPUTS,
    "prediction": "guesses come from the text itself (moiety serve --draft)",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "web_search_options": "nothing is fetched for a request",
    "previous_response_id": "responses are not kept; send the messages",
    "conversation": "conversations are not kept; send the messages",
    "background": "responses are not kept; stream instead",
    "prompt": "prompts are not kept; send the messages",
    "logits_processors": "nothing that a request names is run",
    "chat_template": "a request may not bring a program",
}

Text = Annotated[str, StringConstraints(max_length=4 * 2**20)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
TokenName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,64}$")]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Best = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Metadata = Annotated[dict[str, str], Field(max_length=16)]


CLOSED: dict[str, Any] = {
    "additionalProperties": False
}  # pydantic says what keys may be, and not that others may not
Tokens = Annotated[list[Token], Field(min_length=1)]
PROMPTS = "a text, token ids, or several of either"


def _kind(value: Any) -> str | None:
    """Which kind of prompt a value is meant to be."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "lists" if isinstance(first, list) else "tokens" if isinstance(first, int) else "texts"


class Strict(BaseModel):
    """No field too many, no number from a text."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream has besides the answer."""

    include_usage: bool | None = Field(None, description="a last chunk with usage and no choice")
    include_obfuscation: bool | None = Field(None, description="no effect")


class Sampled(Strict):
    """What all requests share."""

    model: Name = Field(description="the served model's id")
    stream: bool | None = False
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the best token; none is 1")
    top_p: float | None = Field(None, ge=0, le=1, description="0 takes the best token; none is 1")
    user: str | None = Field(None, description="no effect")
    metadata: Metadata | None = Field(None, description="no effect on the answer")
    store: bool | None = Field(None, description="no effect: nothing is kept")
    service_tier: str | None = Field(None, description="no effect")
    safety_identifier: str | None = Field(None, description="no effect")
    prompt_cache_key: Name | None = Field(
        None, description="work on a prompt's start is shared only among requests with the same key"
    )
    parallel_tool_calls: bool | None = Field(None, description="no effect")
    return_routed_experts: bool | None = Field(False, description="which experts the tokens went to")
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="0 and none keep all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)


class Drawn(Sampled):
    """What completions and chat share."""

    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=MOST_N)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="none draws one")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    logit_bias: (
        Annotated[dict[TokenName, Bias], Field(max_length=MOST_BIASES, json_schema_extra=CLOSED)] | None
    ) = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _usage_of_streams(self) -> Drawn:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self


class CompletionRequest(Drawn):
    """`/v1/completions`."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS), Tag("texts")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS), Tag("lists")],
        Discriminator(_kind, custom_error_type="prompt", custom_error_message=PROMPTS),
    ] = Field(description=PROMPTS)
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        16, description="0 draws nothing: for echo with logprobs"
    )
    echo: bool | None = Field(False, description="the prompt comes before the answer, with its logprobs")
    logprobs: Best | None = None


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: Text
    annotations: list[Any] | None = Field(None, description="no effect")
    logprobs: list[Any] | None = Field(None, description="no effect")

    @field_validator("type", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        if value in ("image_url", "input_image", "input_audio", "file", "input_file", "video_url"):
            raise ValueError(f"{value} is not taken: this model reads text, and nothing is fetched")
        return value


class CalledFunction(Strict):
    """A function that an assistant called."""

    name: FunctionName
    arguments: Text


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: Name
    type: Literal["function"]
    function: CalledFunction


class Message(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=256)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = Field(None, description="no effect")
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, description="no effect")

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self


class Function(Strict):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of an object")
    strict: bool | None = Field(None, description="no effect: a call that is asked for always fits")


class Tool(Strict):
    """A tool; functions are served."""

    type: Literal["function"]
    function: Function


class Named(Strict):
    """The name of a function."""

    name: FunctionName


class NamedTool(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: Named


class JsonSchema(Strict):
    """A JSON schema under a name."""

    name: FunctionName
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="no effect: the answer always fits")


class Format(Strict):
    """What an answer must be: text, any JSON object, or what a schema says."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Format:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is for the type json_schema, and needed there")
        return self


class ChatRequest(Drawn):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Count | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: Count | None = Field(None, description="none is what there is room for")
    logprobs: bool | None = False
    top_logprobs: Best | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: Format | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = Field(None, description="handed to the chat template")
    verbosity: str | None = Field(None, description="no effect")
    chat_template_kwargs: (
        Annotated[
            dict[VariableName, bool | int | float | Name | None],
            Field(max_length=16, json_schema_extra=CLOSED),
        ]
        | None
    ) = Field(None, description="variables of the chat template, enable_thinking for instance")

    @model_validator(mode="after")
    def _fit(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = {tool.function.name for tool in self.tools or ()}
        if len(names) != len(self.tools or ()):
            raise ValueError("tools: two functions have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: tools has no function {self.tool_choice.function.name}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, and there are no tools")
        return self


class InputItem(Strict):
    """A message of `/v1/responses`."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    id: Name | None = None
    status: str | None = None
    phase: str | None = None


class TextFormat(Strict):
    """The same as `Format`, in the words of `/v1/responses`."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="no effect: the answer always fits")


class TextOptions(Strict):
    """How the text should be."""

    format: TextFormat | None = None
    verbosity: str | None = Field(None, description="no effect")


class ResponsesRequest(Sampled):
    """`/v1/responses`."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = Field(None, description="none is what there is room for")
    text: TextOptions | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    truncation: Literal["disabled"] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(None, description="no effect: there are no tools")
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning: dict[str, Any] | None = Field(None, description="no effect")
    stream_options: StreamOptions | None = Field(None, description="no effect")
