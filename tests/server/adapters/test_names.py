"""Names are safe in paths, URLs and metrics, and never mean the base."""

import pytest

from perseid_server.adapters.names import MAX_LENGTH, check_name
from perseid_server.errors import InvalidRequest


@pytest.mark.parametrize("name", ["a", "7b-sql", "org/name", "A.b_c-d", "v1..2", "x" * MAX_LENGTH])
def test_a_good_name_is_returned(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a/b/c",
        "..",
        "a/..",
        "../a",
        ".a",
        "-a",
        "_a",
        "a b",
        "a\n",
        "a:b",
        "a\0b",
        "é",
        "a@b",
        "a%2",
    ],
)
def test_a_bad_name_is_refused_as_the_field_that_held_it(name):
    with pytest.raises(InvalidRequest) as caught:
        check_name(name, field="adapter")
    assert caught.value.field == "adapter"
    assert caught.value.message.startswith("adapter ")
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("name", ["auto", "base", "SmolLM2"])
def test_a_reserved_name_is_refused(name):
    with pytest.raises(InvalidRequest, match="reserved"):
        check_name(name, taken=frozenset({"SmolLM2"}))


@pytest.mark.parametrize("name", ["x" * (MAX_LENGTH + 1), "\ud800", "x" * 100_000])
def test_a_refusal_quotes_no_more_than_it_can(name):
    with pytest.raises(InvalidRequest) as caught:
        check_name(name)
    assert len(caught.value.message.encode()) < 400
