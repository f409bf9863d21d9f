"""What the model is asked so that heads can learn from its answers: JSON lines.

{"prompt": "…"}                                one user message, through the base's chat template
{"messages": [{"role", "content"}, …]}         a conversation that ends with a question; an assistant's content of
                                               null is answered by the model first
{…, "adapter": "name"}                         answered with this adapter; without it, or null, by the base
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perseid_server.errors import InvalidRequest
from perseid_server.training.json_lines import read_lines, text_field

_ANSWERS = "assistant"
_EXAMPLE = '{"prompt": "…"}'


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is None where the model is to answer."""

    role: str
    content: str | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation, and the adapter (None: the base) that goes on with it."""

    messages: tuple[Message, ...]
    adapter: str | None = None


def read_prompts(path: Path, adapters: Collection[str]) -> list[Prompt]:
    """Every line. InvalidRequest names file, line and field, and what was expected."""
    return read_lines(path, "prompts", _EXAMPLE, lambda fields: _prompt(fields, adapters))


def _prompt(fields: Mapping[str, Any], adapters: Collection[str]) -> Prompt:
    if unknown := sorted(set(fields) - {"prompt", "messages", "adapter"}):
        raise InvalidRequest(f"{unknown[0]}: no such field; expected prompt or messages, and perhaps adapter")
    if ("prompt" in fields) == ("messages" in fields):
        raise InvalidRequest("expected one of prompt and messages")
    messages = (
        (Message("user", text_field(fields, "prompt")),) if "prompt" in fields else _conversation(fields["messages"])
    )
    return Prompt(messages, _adapter(fields.get("adapter"), adapters))


def _conversation(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages: expected a list that is not empty")
    messages = tuple(_message(f"messages[{place}]", message) for place, message in enumerate(value))
    if messages[-1].role == _ANSWERS:
        raise InvalidRequest("messages: the last one is the assistant's; expected a message that it answers")
    return messages


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        raise InvalidRequest(f'{where}: expected an object with "role" and "content"')
    role = text_field(value, "role", f"{where}.role")
    if value["content"] is None and role == _ANSWERS:
        return Message(role, None)
    return Message(role, text_field(value, "content", f"{where}.content"))


def _adapter(value: Any, adapters: Collection[str]) -> str | None:
    if value is None or value in adapters:
        return value  # type: ignore[no-any-return]
    given = ", ".join(adapters) or "none"
    raise InvalidRequest(
        f"adapter: {json.dumps(value)[:60]} is not one of those given ({given}); give --adapter NAME=FOLDER for it"
    )
