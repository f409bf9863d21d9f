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

_ANSWERS = "assistant"


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
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--prompts: {path}: cannot be read: {error}", field="prompts") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_prompt(line, adapters))
            except InvalidRequest as error:
                raise InvalidRequest(f"{path}:{number}: {error.message}", field="prompts") from error
    if not found:
        raise InvalidRequest(
            f'--prompts: {path}: no lines; expected JSON lines such as {{"prompt": "…"}}', field="prompts"
        )
    return found


def _prompt(line: str, adapters: Collection[str]) -> Prompt:
    fields = _parse(line)
    if unknown := sorted(set(fields) - {"prompt", "messages", "adapter"}):
        raise InvalidRequest(f"{unknown[0]}: no such field; expected prompt or messages, and perhaps adapter")
    if ("prompt" in fields) == ("messages" in fields):
        raise InvalidRequest("expected one of prompt and messages")
    messages = (
        (Message("user", _text("prompt", fields["prompt"])),)
        if "prompt" in fields
        else _conversation(fields["messages"])
    )
    return Prompt(messages, _adapter(fields.get("adapter"), adapters))


def _parse(line: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest('expected an object such as {"prompt": "…"}')
    return fields


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
    role = _text(f"{where}.role", value["role"])
    if value["content"] is None and role == _ANSWERS:
        return Message(role, None)
    return Message(role, _text(f"{where}.content", value["content"]))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{where}: expected text, got {json.dumps(value)[:60]}")
    return value


def _adapter(value: Any, adapters: Collection[str]) -> str | None:
    if value is None or value in adapters:
        return value  # type: ignore[no-any-return]
    given = ", ".join(adapters) or "none"
    raise InvalidRequest(
        f"adapter: {json.dumps(value)[:60]} is not one of those given ({given}); give --adapter NAME=FOLDER for it"
    )
