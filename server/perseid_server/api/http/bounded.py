"""What is wrong with a body is told of its first fault: a body has room for millions of them, and each would be written
down before one is shown, while nobody else is answered."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from perseid_server.errors import InvalidRequest

T = TypeVar("T")

MAX_NUMBERS = 1 << 20
"""Of one list: token ids. No prompt is longer."""
MAX_ENTRIES = 1 << 16
"""Of one list or object of anything else, such as messages."""
MAX_FIELDS = 256
"""Of a body, and of one object of options."""
MAX_SHOWN = 80
"""Characters of a name or a value that an error shows."""

Bounded = Annotated[list[T], Field(fail_fast=True)]
"""A list whose validation ends with the first entry that is wrong."""


def _numbers(stated: Any) -> Any:
    """Objects have no such end."""
    for name, value in stated.items() if isinstance(stated, Mapping) else ():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PydanticCustomError("number", "expected a number for {name}", {"name": repr(name[:MAX_SHOWN])})
    return stated


OnlyNumbers = BeforeValidator(_numbers)
"""For an object of numbers."""


class Options(BaseModel):
    """An object of a body whose fields are all known."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_many(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise PydanticCustomError("many_fields", "expected at most {most} fields", {"most": MAX_FIELDS})
        return fields


def check_fields(fields: Mapping[str, Any]) -> None:
    """InvalidRequest for a body of too many fields, and for a field that is too long or holds what is no text: JSON can
    write half a surrogate pair, such as \\ud800, which cannot be sent back either."""
    if len(fields) > MAX_FIELDS:
        raise InvalidRequest(f"the body has {len(fields)} fields; expected at most {MAX_FIELDS}")
    for name, value in fields.items():
        shown = ascii(name[:MAX_SHOWN])[1:-1]
        most = _most_entries(value)
        if isinstance(value, list | dict) and len(value) > most:
            raise InvalidRequest(f"{shown}: {len(value)} entries; expected at most {most}", field=shown)
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise InvalidRequest(f"{shown}: the text is not valid Unicode, or nested too deep", field=shown) from error


def _most_entries(value: Any) -> int:
    return MAX_NUMBERS if isinstance(value, list) and value and isinstance(value[0], int) else MAX_ENTRIES
