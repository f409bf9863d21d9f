"""The JSON that clients send, as OpenAI and vLLM define it.

Fields that would change the answer and are not supported are refused by name. Fields that cannot change it are
ignored, as other servers do.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from perseid_server.api.http import field_types as told
from perseid_server.api.http.adaptation import AutoBody, WeightedAdapterBody, adaptation_of
from perseid_server.api.http.bounded import MAX_SHOWN, Bounded, check_fields
from perseid_server.api.http.speculation import TypicalBody, speculation_of
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.adaptation_options import AdaptationOptions, Report
from perseid_server.frontend.requests import (
    ChatInput,
    Input,
    SamplingOptions,
    TextInput,
    TokenInput,
)
from perseid_server.frontend.speculation_options import SpeculationOptions

T = TypeVar("T")

HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "priority", "request_id", "return_tokens_as_token_ids", "spaces_between_special_tokens",
        "parallel_tool_calls", "length_penalty", "early_stopping", "cache_salt",
    }
)  # fmt: skip
"""Bookkeeping, or settings of features that a request does not use."""

_EMPTY: tuple[Any, ...] = (None, False, [], {}, "", "none")
_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "truncation": ("disabled",),
    "use_beam_search": (False,),
}
"""Values of unsupported fields that ask for what happens anyway."""


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            check_fields(fields)
        return fields


class SamplingFields(Body):
    """What both generation routes share."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    adapters: Bounded[WeightedAdapterBody] | None = None
    auto: AutoBody | None = None
    routing: Report | None = None
    speculation: told.SpeculationMode = None
    acceptance: told.Acceptance = None
    typical: TypicalBody | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: told.NumTokens = None
    temperature: told.Temperature = None
    top_p: told.TopP = None
    top_k: told.TopK = None
    min_p: told.MinP = None
    repetition_penalty: told.RepetitionPenalty = None
    presence_penalty: told.Penalty = None
    frequency_penalty: told.Penalty = None
    logit_bias: told.LogitBias = None
    seed: told.Seed = None
    stop: told.Stop = None
    stop_token_ids: Bounded[told.TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: told.LeastTokens = 0
    n: told.NumChoices = None
    skip_special_tokens: bool = True
    timeout: told.Timeout = None  # seconds, from the arrival of the request

    def refuse_unsupported(self) -> None:
        """InvalidRequest names the first unknown field that asks for something."""
        for name, value in (self.model_extra or {}).items():
            if name in HARMLESS or value in _EMPTY or value in _NO_EFFECT.get(name, ()):
                continue
            name, shown = name[:MAX_SHOWN], json.dumps(value)[:MAX_SHOWN]  # noqa: PLW2901
            raise InvalidRequest(f"{name} is not supported; leave it out (it is {shown})", field=name)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: allowed only with stream = true", field="stream_options")

    def adaptation(self, base: str) -> AdaptationOptions | None:
        """What adapts the base."""
        return adaptation_of(self.model, base, self.adapters, self.auto)

    def drafting(self) -> SpeculationOptions:
        """How the request wants to be drafted for."""
        return speculation_of(self.speculation, self.acceptance, self.typical)

    def _sampling(self, max_tokens: int | None, logprobs: int | None, *, echo: bool = False) -> SamplingOptions:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingOptions(
            max_tokens=max_tokens,
            temperature=_default(self.temperature, 1.0),
            top_p=_default(self.top_p, 1.0),
            top_k=_default(self.top_k, 0),
            min_p=_default(self.min_p, 0.0),
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            presence_penalty=_default(self.presence_penalty, 0.0),
            frequency_penalty=_default(self.frequency_penalty, 0.0),
            logit_bias=_logit_bias(self.logit_bias or {}),
            seed=self.seed,
            stop=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            n=_default(self.n, 1),
            echo=echo,
            skip_special_tokens=self.skip_special_tokens,
        )


def _default(value: T | None, default: T) -> T:
    return default if value is None else value


Tokens = Bounded[Annotated[int, Field(ge=0)]]


class CompletionBody(SamplingFields):
    """POST /v1/completions."""

    prompt: str | Tokens | Bounded[str] | Bounded[Tokens]
    logprobs: told.NumLogprobs = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    def inputs(self) -> list[Input]:
        """One input for each prompt."""
        special = self.add_special_tokens is not False
        prompt = self.prompt
        if isinstance(prompt, str):
            return [TextInput(prompt, special)]
        if not prompt:
            raise InvalidRequest("prompt: expected text, tokens, or a non-empty list of them", field="prompt")
        if isinstance(prompt[0], int):
            return [TokenInput(tuple(token for token in prompt if isinstance(token, int)))]
        return [TextInput(item, special) if isinstance(item, str) else TokenInput(tuple(item)) for item in prompt]

    def options(self) -> SamplingOptions:
        """OpenAI's default of 16 tokens holds here, and here only."""
        if self.suffix:
            raise InvalidRequest("suffix is not supported; leave it out", field="suffix")
        if self.best_of is not None and self.best_of != _default(self.n, 1):
            raise InvalidRequest("best_of: expected the same as n; answers are not ranked", field="best_of")
        stated = self._sampling(self.max_tokens, self.logprobs, echo=bool(self.echo))
        return replace(stated, usual_max_tokens=16)


class ChatBody(SamplingFields):
    """POST /v1/chat/completions."""

    messages: told.Messages
    max_completion_tokens: told.NumTokens = None
    logprobs: bool | None = None
    top_logprobs: told.NumLogprobs = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, JsonValue] | None = None

    def input(self) -> ChatInput:
        """The conversation, its contents as text."""
        messages = tuple(_message(index, message) for index, message in enumerate(self.messages))
        arguments = self.chat_template_kwargs or {}
        for name in ("messages", "add_generation_prompt"):
            if name in arguments:
                raise InvalidRequest(f"chat_template_kwargs: {name} cannot be set here", field="chat_template_kwargs")
        return ChatInput(messages, self.add_generation_prompt, self.continue_final_message, arguments)

    def options(self) -> SamplingOptions:
        """`max_completion_tokens` is the newer name of `max_tokens`; `top_logprobs` needs `logprobs`."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs: allowed only with logprobs = true", field="top_logprobs")
        logprobs = _default(self.top_logprobs, 0) if self.logprobs else None
        return self._sampling(_default(self.max_completion_tokens, self.max_tokens), logprobs)


def _message(index: int, message: Mapping[str, JsonValue]) -> Mapping[str, Any]:
    field = f"messages.{index}"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{field}.role: expected a text such as user or assistant", field=f"{field}.role")
    if isinstance(content, list):
        content = "".join(_part(f"{field}.content.{place}", part) for place, part in enumerate(content))
    if content is not None and not isinstance(content, str):
        raise InvalidRequest(f"{field}.content: expected text or a list of text parts", field=f"{field}.content")
    if content is None and role != "assistant":
        raise InvalidRequest(f"{field}.content: expected text", field=f"{field}.content")
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if message.get(name):
            raise InvalidRequest(f"{field}.{name}: tools and audio are not supported", field=f"{field}.{name}")
    return {**message, "content": content or ""}


def _part(field: str, part: JsonValue) -> str:
    if not isinstance(part, dict) or part.get("type") not in {"text", "input_text"}:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise InvalidRequest(f"{field}: parts of type {kind!r} are not supported; expected text", field=field)
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{field}.text: expected text", field=field)
    return text


def _logit_bias(stated: Mapping[str, float]) -> dict[int, float]:
    for token in stated:
        if not token.isascii() or not token.isdigit() or len(token) > 10:
            raise InvalidRequest(f"logit_bias: {token[:20]!r} is not a token id", field="logit_bias")
    return {int(token): bias for token, bias in stated.items()}


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter, as vLLM has it; it loads gate sets and Medusa heads too."""

    lora_name: told.AdapterName
    lora_path: str
    load_inplace: bool = False
    pin: bool = False
    adapter: str | None = None  # name of the adapter that heads are for


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_int_id: int | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: told.Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    def input(self) -> Input:
        """What to tokenize."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("prompt: expected either prompt or messages", field="prompt")
        if self.messages is not None:
            messages = tuple(_message(index, message) for index, message in enumerate(self.messages))
            return ChatInput(messages, self.add_generation_prompt)
        return TextInput(self.prompt or "", self.add_special_tokens is not False)


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens
