"""A body with a million faults is answered for the first one."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from perseid_server.api.http.bounded import MAX_ENTRIES, MAX_FIELDS, MAX_NUMBERS
from perseid_server.api.http.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from perseid_server.errors import InvalidRequest

MANY = 2000
A_FEW = 8  # a union has an error for each of its members


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "p"} | fields


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionBody, completion(prompt=[-1] * MANY)),
        (CompletionBody, completion(prompt=["a", *[1] * MANY])),
        (CompletionBody, completion(prompt=[[1], *[[-1, None]] * MANY])),
        (CompletionBody, completion(prompt=[[None] * MANY] * MANY)),
        (CompletionBody, completion(stop=[1] * MANY)),
        (CompletionBody, completion(stop_token_ids=["a"] * MANY)),
        (CompletionBody, completion(logit_bias={str(token): "a" for token in range(MANY)})),
        (CompletionBody, completion(logit_bias={str(token): True for token in range(MANY)})),
        (CompletionBody, completion(adapters=[{}] * MANY)),
        (CompletionBody, completion(adapters=[{f"a{number}": 1 for number in range(MANY)}])),
        (CompletionBody, completion(auto={f"a{number}": 1 for number in range(MANY)})),
        (CompletionBody, completion(auto={"allow": [1] * MANY})),
        (CompletionBody, completion(typical={f"a{number}": 1 for number in range(MANY)})),
        (ChatBody, {"model": "m", "messages": [1] * MANY}),
        (TokenizeBody, {"messages": [1] * MANY}),
        (DetokenizeBody, {"tokens": [-1] * MANY}),
    ],
)
def test_validation_ends_with_the_first_fault(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    assert raised.value.error_count() <= A_FEW


@pytest.mark.parametrize(
    ("fields", "told", "field"),
    [
        ({"prompt": [1] * (MAX_NUMBERS + 1)}, f"prompt: {MAX_NUMBERS + 1} entries; expected at most", "prompt"),
        ({"prompt": ["a"] * (MAX_ENTRIES + 1)}, f"prompt: {MAX_ENTRIES + 1} entries; expected at most", "prompt"),
        ({str(number): None for number in range(MAX_FIELDS)}, f"expected at most {MAX_FIELDS}", None),
        ({"x" * MANY: 1}, "xxx", "x" * 80),
        ({"prompt": "\ud800"}, "prompt: the text is not valid Unicode", "prompt"),
        ({"\ud800": 1}, "not valid Unicode", "\\ud800"),
    ],
    ids=["numbers", "texts", "fields", "name", "half a pair", "half a name"],
)
def test_what_is_too_much_is_told_in_a_few_words(fields: dict[str, Any], told: str, field: str | None) -> None:
    with pytest.raises(InvalidRequest, match=told) as raised:
        CompletionBody.model_validate(completion(**fields)).refuse_unsupported()
    assert raised.value.field == field
    assert len(raised.value.message) < 300


def test_what_is_long_and_good_is_taken() -> None:
    body = CompletionBody.model_validate(completion(prompt=[5] * MAX_NUMBERS, logit_bias={"7": 1, "8": -0.5}))
    assert body.options().logit_bias == {7: 1.0, 8: -0.5}
    assert len(body.prompt) == MAX_NUMBERS
