"""Types of fields with their limits, for the OpenAPI document alone: the frontend checks them, for both transports in
the same words. A keyword counts for values of its own type only, so null and lists go by."""

from typing import Annotated, Any, TypeAlias

from pydantic import Field, JsonValue

from perseid_server.adapters.names import MAX_LENGTH, PATTERN
from perseid_server.api.http.bounded import Bounded, OnlyNumbers
from perseid_server.frontend.requests import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    NUM_SEEDS,
)
from perseid_server.frontend.speculation_options import ACCEPTANCES, MODES


def _told(**keywords: Any) -> Any:
    return Field(json_schema_extra=keywords)


NumTokens: TypeAlias = Annotated[int | None, _told(minimum=0, maximum=1 << 31)]
LeastTokens: TypeAlias = Annotated[int, _told(minimum=0, maximum=1 << 31)]
Temperature: TypeAlias = Annotated[float | None, _told(minimum=0, maximum=2)]
TopP: TypeAlias = Annotated[float | None, _told(exclusiveMinimum=0, maximum=1)]
TopK: TypeAlias = Annotated[int | None, _told(minimum=-1)]
MinP: TypeAlias = Annotated[float | None, _told(minimum=0, maximum=1)]
RepetitionPenalty: TypeAlias = Annotated[float | None, _told(minimum=0.01, maximum=2)]
Penalty: TypeAlias = Annotated[float | None, _told(minimum=-2, maximum=2)]
LogitBias: TypeAlias = Annotated[
    dict[str, Annotated[float, _told(minimum=-100, maximum=100)]] | None,
    OnlyNumbers,
    _told(propertyNames={"pattern": "^[0-9]{1,10}$"}),
]
Seed: TypeAlias = Annotated[int | None, _told(minimum=-(NUM_SEEDS // 2), exclusiveMaximum=NUM_SEEDS)]
Stop: TypeAlias = Annotated[
    str | Bounded[Annotated[str, _told(minLength=1, maxLength=MAX_STOP_LENGTH)]] | None,
    _told(minLength=1, maxLength=MAX_STOP_LENGTH, maxItems=MAX_STOP_STRINGS),
]
TokenId: TypeAlias = Annotated[int, _told(minimum=0)]
NumChoices: TypeAlias = Annotated[int | None, _told(minimum=1, maximum=MAX_CHOICES)]
NumLogprobs: TypeAlias = Annotated[int | None, _told(minimum=0, maximum=MAX_LOGPROBS)]
Timeout: TypeAlias = Annotated[float | None, _told(exclusiveMinimum=0)]
SpeculationMode: TypeAlias = Annotated[str | None, _told(enum=[*MODES, None])]
Acceptance: TypeAlias = Annotated[str | None, _told(enum=[*ACCEPTANCES, None])]
AdapterName: TypeAlias = Annotated[str, _told(pattern=f"^{PATTERN}$", maxLength=MAX_LENGTH)]
Share: TypeAlias = Annotated[float | None, _told(exclusiveMinimum=0, maximum=1)]
_ChatMessage: TypeAlias = Annotated[
    dict[str, JsonValue],
    _told(
        required=["role"],
        properties={"role": {"type": "string", "minLength": 1}, "content": {"type": ["string", "array", "null"]}},
    ),
]
Messages: TypeAlias = Annotated[Bounded[_ChatMessage], _told(minItems=1)]
