"""What answers look like, for the OpenAPI document. They are written by `answers.py` and the routes; `make fuzz` holds
every answer against these."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Answer(BaseModel):
    """No field but these; those with a default may be missing."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """What went wrong, as OpenAI's clients know it."""

    message: str
    type: str
    param: str | None  # the field that is wrong
    code: str | None


class ErrorAnswer(Answer):
    """Every answer that is not one."""

    error: Error


class PromptDetails(Answer):
    """Of usage."""

    cached_tokens: int


class CompletionDetails(Answer):
    """Of usage."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Version(Answer):
    """Of an adapter."""

    name: str
    version: str
    weight: float = 1.0  # in a blend


class Automatic(Answer):
    """How `auto` was served."""

    gate_set: str
    version: str
    tier: Literal["request", "token"]
    joined: list[str]


Shares = dict[str, float]


class RoutingReport(Answer):
    """What `auto` chose."""

    prompt: Shares = {}
    completion: Shares = {}
    tokens: list[list[tuple[str, float]]] = []


class Adapted(Answer):
    """What adapted the base for one prompt."""

    adapter: Version | None
    adapters: list[Version] = []
    auto: Automatic | None = None


class Lossy(Answer):
    """That drafts may have changed the answer."""

    acceptance: str
    lossy: Literal[True]


class PerseidFields(Adapted):
    """What only Perseid tells."""

    cached_tokens: int
    prompts: list[Adapted] = []
    routing: RoutingReport | None = None
    speculation: Lossy | None = None


class CompletionLogprobs(Answer):
    """Four parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[Shares | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class Completion(Answer):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    perseid: PerseidFields


class Message(Answer):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None
    tool_calls: list[JsonValue] = Field(max_length=0)


class TopLogprob(Answer):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was said, and the likely ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class ChatCompletion(Answer):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    perseid: PerseidFields


class Card(Answer):
    """A model, or Medusa heads. `perseid` is of adapters, gate sets and heads; its fields depend on the kind."""

    id: str
    object: Literal["model", "medusa_heads"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    perseid: dict[str, JsonValue] | None = None


class Cards(Answer):
    """Several."""

    object: Literal["list"]
    data: list[Card]


class Status(Answer):
    """Of the server."""

    status: str


class VersionAnswer(Answer):
    """Of the server."""

    version: str


class Tokens(Answer):
    """POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] = []


class Prompt(Answer):
    """POST /detokenize."""

    prompt: str
