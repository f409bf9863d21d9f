"""What a client asks for, whichever transport it came by, and the one place that checks it."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from perseid_server.access.caller import ANYONE, Caller
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.adaptation_options import AdaptationOptions, Report, check_adaptation
from perseid_server.frontend.speculation_options import SpeculationOptions, check_speculation
from perseid_server.observe.record import CallRecord, current_call

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_REQUEST_ID = 128
NUM_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class TextInput:
    """Text, continued as it is."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenInput:
    """Tokens of the base's vocabulary."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation. Messages are what the chat template is given: at least `role` and `content`."""

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


Input = TextInput | TokenInput | ChatInput


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """As a client states them. `max_tokens` None: what the context has room for, up to `usual_max_tokens`."""

    max_tokens: int | None = None
    usual_max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    n: int = 1
    echo: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call. `adaptation` None is the base; `timeout_s` counts from its arrival.

    `arrived` is on the machine's monotonic clock, s.
    """

    request_id: str
    input: Input
    adaptation: AdaptationOptions | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    report: Report = "none"  # what to tell of an automatic choice
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    timeout_s: float | None = None
    caller: Caller = ANYONE
    call: CallRecord = field(default_factory=current_call, compare=False)  # that it is a part of
    arrived: float = field(default_factory=time.monotonic)


def check_request(request: GenerationRequest, vocab_size: int) -> None:
    """InvalidRequest names the first field that is out of range. The input is checked when it is encoded."""
    check_request_id(request.request_id)
    check_timeout(request.timeout_s)
    check_sampling(request.sampling, vocab_size)
    check_adaptation(request.adaptation, request.report, request.sampling.n)
    check_speculation(request.speculation)


def check_timeout(timeout_s: float | None) -> None:
    """A time that a client waits, if it states one."""
    if timeout_s is not None and not 0.0 < timeout_s < math.inf:
        raise InvalidRequest(f"timeout is {timeout_s:g}; expected a number of seconds above 0", field="timeout")


def check_sampling(options: SamplingOptions, vocab_size: int) -> None:
    """InvalidRequest names the first field that is out of range and what was expected."""
    _in_range("temperature", options.temperature, 0.0, 2.0)
    _in_range("top_p", options.top_p, 0.0, 1.0, above=True)
    _in_range("min_p", options.min_p, 0.0, 1.0)
    _in_range("repetition_penalty", options.repetition_penalty, 0.01, 2.0)
    _in_range("presence_penalty", options.presence_penalty, -2.0, 2.0)
    _in_range("frequency_penalty", options.frequency_penalty, -2.0, 2.0)
    _whole("top_k", options.top_k, -1, vocab_size)
    _whole("n", options.n, 1, MAX_CHOICES)
    if options.n > 1 and options.temperature == 0.0:
        raise InvalidRequest("n: greedy answers (temperature 0) are all the same; expected n = 1", field="n")
    if options.seed is not None:
        _whole("seed", options.seed, -(NUM_SEEDS // 2), NUM_SEEDS - 1)
    if options.logprobs is not None:
        _whole("logprobs", options.logprobs, 0, MAX_LOGPROBS)
    if options.max_tokens is not None:
        _whole("max_tokens", options.max_tokens, 0 if options.echo else 1, 1 << 31)
    _whole("min_tokens", options.min_tokens, 0, options.max_tokens if options.max_tokens is not None else 1 << 31)
    _check_stops(options.stop)
    check_token_ids("stop_token_ids", options.stop_token_ids, vocab_size)
    check_token_ids("logit_bias", tuple(options.logit_bias), vocab_size)
    for token, bias in options.logit_bias.items():
        _in_range(f"logit_bias[{token}]", bias, -100.0, 100.0, field="logit_bias")


def check_token_ids(field_name: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Every id must be in the base's vocabulary."""
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"{field_name}: token {token} is not in 0 … {vocab_size - 1}", field=field_name)


def check_request_id(request_id: str) -> str:
    """Ids go into headers and logs: short, printable, no spaces."""
    if not 0 < len(request_id) <= MAX_REQUEST_ID or not request_id.isascii() or not request_id.isprintable():
        raise InvalidRequest(
            f"request_id: expected 1 to {MAX_REQUEST_ID} printable ASCII characters", field="request_id"
        )
    return request_id


def _in_range(
    name: str, value: float, low: float, high: float, *, above: bool = False, field: str | None = None
) -> None:
    inside = low < value <= high if above else low <= value <= high
    if not math.isfinite(value) or not inside:
        interval = f"({low:g}, {high:g}]" if above else f"[{low:g}, {high:g}]"
        raise InvalidRequest(f"{name} is {value:g}; expected a number in {interval}", field=field or name)


def _whole(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; expected an integer from {low} to {high}", field=name)


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(stops)} texts; expected at most {MAX_STOP_STRINGS}", field="stop")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequest(f"stop: each text needs 1 to {MAX_STOP_LENGTH} characters", field="stop")
