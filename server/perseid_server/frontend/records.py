"""What is written down of a request for the operator (`perseid_server.observe`)."""

from collections.abc import Mapping
from typing import Any

from perseid_server.frontend.adaptation import Resolved
from perseid_server.frontend.adaptation_options import MAX_BLEND, AdaptationOptions, AutoOptions, BlendOf, Named
from perseid_server.frontend.loaded import Loaded
from perseid_server.frontend.requests import ChatInput, GenerationRequest, Input, SamplingOptions, TextInput, TokenInput
from perseid_server.observe.line import MOST_TEXT, shortened
from perseid_server.observe.record import GenerationRecord

VERSION_CHARACTERS = 12
"""Of a content hash: enough to tell versions apart."""
_MOST_TOKENS = MOST_TEXT // 3  # each takes three characters at least
_MOST_MESSAGES = MOST_TEXT // 30


def begin_record(request: GenerationRequest, base: str) -> GenerationRecord:
    """A new one, in the record of the request's call. Nothing has been checked yet."""
    keeps_text = request.call.keeps_text
    record = GenerationRecord(
        id=request.request_id,
        operation="chat" if isinstance(request.input, ChatInput) else "text_completion",
        base=base,
        settings=_settings(request.sampling),
        model=_asked(request.adaptation, base),
        prompt=_prompt(request.input) if keeps_text else None,
        keeps_text=keeps_text,
    )
    request.call.generations.append(record)
    return record


def tell_resolved(record: GenerationRecord, resolved: Resolved) -> None:
    """What answers."""
    record.tier = resolved.auto.tier if resolved.auto is not None else None
    if resolved.blend:
        record.adapter = " + ".join(f"{weight:g} {_versioned(adapter)}" for adapter, weight in resolved.blend)
    elif resolved.adapter is not None:
        record.adapter = _versioned(resolved.adapter)
    elif resolved.auto is not None and resolved.auto.tier == "token":
        record.adapter = f"auto:{_versioned(resolved.auto.gate_set)}"


def _asked(options: AdaptationOptions | None, base: str) -> str:
    match options:
        case None:
            return base
        case Named(name):
            return name
        case BlendOf(adapters):
            return " + ".join(f"{weight:g} {name}" for name, weight in adapters[:MAX_BLEND])
        case AutoOptions(gate_set):
            return f"auto:{gate_set}" if gate_set else "auto"


def _settings(options: SamplingOptions) -> dict[str, float]:
    told = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k or None,
        "seed": options.seed,
        "presence_penalty": options.presence_penalty or None,
        "frequency_penalty": options.frequency_penalty or None,
        "choice.count": options.n if options.n > 1 else None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _versioned(loaded: Loaded) -> str:
    return f"{loaded.name}@{loaded.version[:VERSION_CHARACTERS]}"


def _prompt(source: Input) -> str:
    """Hardly more of it than the log has: nothing has been checked yet, and there may be millions of tokens."""
    match source:
        case TextInput(text):
            return text
        case TokenInput(ids):
            return _listed([*ids[:_MOST_TOKENS]], len(ids))
        case ChatInput(messages):
            return _listed([_cut(message) for message in messages[:_MOST_MESSAGES]], len(messages))


def _cut(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: shortened(value, MOST_TEXT) if isinstance(value, str) else value for name, value in message.items()}


def _listed(shown: list[Any], total: int) -> str:
    return repr(shown) + (f" and {total - len(shown)} more" if total > len(shown) else "")
