"""The one line that the log has of each call.

Names, ids and paths are what clients sent: they are shortened here, and whoever writes the line escapes what would
break it (`perseid_server.logs`).
"""

import logging
from collections.abc import Iterable, Mapping
from http import HTTPStatus

from perseid_server.observe.record import ABORTED, CallRecord

logger = logging.getLogger("perseid_server.calls")

MOST_CHARACTERS = 200
MOST_NAMES = 8
MOST_TEXT = 1 << 15  # characters of prompts, and of answers, where they are wanted
_USUAL = frozenset({None, ABORTED, HTTPStatus.SERVICE_UNAVAILABLE.name.lower()})
"""How health checks end, every few seconds: answered, left (who watches does so), or told that it is not ready."""
_PRECISION = 6  # digits behind the point: microseconds


def log_line(call: CallRecord, more: Mapping[str, object]) -> None:
    """Write the line of a call that is over; `more` ends it. Health checks and scrapes are for those who debug, unless
    they are refused."""
    level = logging.DEBUG if call.is_probe and call.error in _USUAL else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(level, "call", extra={"fields": {**fields_of(call), **more}})


def fields_of(call: CallRecord) -> dict[str, object]:
    """What the line says, in that order. What does not apply is left out; times are in seconds."""
    generations = call.generations
    told = {
        "request_id": call.request_id,
        "transport": call.transport,
        "route": shortened(call.route),
        "status": call.status,
        "error": call.error,
        "error_field": _short(call.error_field),
        "tenant": call.tenant or None,
        "key": call.key or None,
        "name": _short(call.subject),
        "version": call.version,
        "model": _joined(one.model for one in generations),
        "adapter": _joined(one.adapter for one in generations),
        "tier": _joined(one.tier for one in generations),
        "answer": _joined((one.id for one in generations), most=1),
        "prompt_tokens": call.prompt_tokens if generations else None,
        "cached_tokens": sum(one.cached_tokens for one in generations) or None,
        "generated_tokens": call.generated_tokens if generations else None,
        "finish_reason": ",".join(call.finish_reasons) or None,
        "queue_s": _rounded(call.queue_s),
        "ttft_s": _rounded(call.ttft_s),
        "duration_s": _rounded(call.duration_s),
        **_texts(call),
    }
    return {name: value for name, value in told.items() if value is not None}


def _texts(call: CallRecord) -> dict[str, object]:
    """Records hold them only where they are wanted."""
    prompts = [shortened(one.prompt, MOST_TEXT) for one in call.generations if one.prompt is not None]
    answers = [shortened("".join(one.texts), MOST_TEXT) for one in call.answers if one.texts is not None]
    return {"prompts": prompts or None, "answers": answers or None}


def _joined(names: Iterable[str | None], most: int = MOST_NAMES) -> str | None:
    """Each name once."""
    found = list(dict.fromkeys(name for name in names if name))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(shortened(name) for name in found[:most]) + more or None


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text of a client, as much of it as an operator needs."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _short(text: str | None) -> str | None:
    return None if text is None else shortened(text)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, _PRECISION)
