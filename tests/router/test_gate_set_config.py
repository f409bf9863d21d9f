"""gate_set.json says what it means or is refused by the name of its field."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseid_router.gate_set import CONFIG_FILE, MAX_COLUMNS, Column, GateSetConfig, GateSetError
from perseid_router.gate_set_config import parse_config, read_config, render_config

A, B = "a" * 64, "b" * 64
CONFIG = GateSetConfig(
    (Column("sql", A), Column("org/poems", B)),
    null=False,
    k=1,
    temperature=0.5,
    method="meteora",
    base="tiny",
    request_router={"threshold": 0.5},
    training={"steps": 3, "accuracy": [0.5, 1.0]},
)


def file(**changes: object) -> bytes:
    body = {"format": "perseid-gates", "schema": 1, "adapters": [{"name": "sql", "version": A}]} | changes
    return json.dumps({key: value for key, value in body.items() if value is not ...}).encode()


def adapters(count: int) -> list[dict[str, str]]:
    return [{"name": f"a{index}", "version": f"{index:064x}"} for index in range(count)]


BAD: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "nothing": (b"", ("not valid JSON",)),
    "no object": (b"[1]", ("gate_set.json", "expected an object", "list")),
    "no text": (b"\xff\xfe", ("utf-8",)),
    "deep": (b"[" * 100_000, ("nested too deeply",)),
    "a key twice": (b'{"k": 1, "k": 2}', ("'k' appears twice",)),
    "half a character": (file(base="\ud800"), ("surrogates",)),
    "infinity": (file(training={"loss": float("inf")}), ("Infinity is not a number",)),
    "a number beyond any float": (file().replace(b'"schema": 1', b'"schema": 1e999'), ("1e999", "too large")),
    "an unknown key": (file(top_k=2), ("unknown key 'top_k'", "temperature", "remove it")),
    "no format": (file(format=...), ("'format' is missing",)),
    "another format": (file(format="safetensors"), ("format 'safetensors'", "perseid-gates")),
    "another schema": (file(schema=2), ("schema 2", "reads 1")),
    "a schema that is true": (file(schema=True), ("schema True",)),
    "no adapters": (file(adapters=...), ("'adapters' is missing",)),
    "an empty list": (file(adapters=[]), ("adapters", "1 to 512", "0 of them")),
    "a name for a list": (file(adapters="sql"), ("adapters", "expected a list", "str")),
    "too many": (file(adapters=adapters(MAX_COLUMNS + 1)), ("513 of them",)),
    "one too many with the base": (file(adapters=adapters(MAX_COLUMNS)), ("513 columns with the base", "at most 512")),
    "an adapter that is text": (file(adapters=["sql"]), ("adapters[0]", "expected an object")),
    "an adapter without version": (file(adapters=[{"name": "sql"}]), ("adapters[0]", "'version' is missing")),
    "an adapter with more": (
        file(adapters=[{"name": "sql", "version": A, "rank": 4}]),
        ("adapters[0]", "unknown key 'rank'"),
    ),
    "a name that is a number": (file(adapters=[{"name": 3, "version": A}]), ("adapters[0].name 3",)),
    "an empty name": (file(adapters=[{"name": "", "version": A}]), ("adapters[0].name ''", "1 to 128")),
    "a name of two lines": (file(adapters=[{"name": "a\nb", "version": A}]), ("adapters[0].name", "printable")),
    "a short version": (file(adapters=[{"name": "sql", "version": "abc"}]), ("adapters[0].version 'abc'", "64 digits")),
    "a version in capitals": (file(adapters=[{"name": "sql", "version": "A" * 64}]), ("adapters[0].version",)),
    "a version that is a number": (file(adapters=[{"name": "sql", "version": 7}]), ("adapters[0].version 7",)),
    "a version twice": (
        file(adapters=[{"name": "x", "version": A}, {"name": "y", "version": A}]),
        ("adapters[1].version", "adapters[0]", "once"),
    ),
    "null as text": (file(null="yes"), ("null 'yes'", "true or false")),
    "no choice": (file(k=0), ("k 0", "1 to 512")),
    "a fraction of a choice": (file(k=1.5), ("k 1.5",)),
    "a choice that is true": (file(k=True), ("k True",)),
    "absolute zero": (file(temperature=0), ("temperature 0", "from 0.001")),
    "below it": (file(temperature=-1.0), ("temperature -1.0", "from 0.001")),
    "a temperature as text": (file(temperature="1"), ("temperature '1'", "number")),
    "a temperature beyond any float": (file(temperature=10**400), ("temperature", "finite")),
    "an unknown method": (file(method="magic"), ("method 'magic'", "trained, meteora, arrow")),
    "a method that is a list": (file(method=["trained"]), ("method ['trained']",)),
    "a base that is a number": (file(base=1), ("base 1",)),
    "a request router that is text": (file(request_router="yes"), ("request_router", "object or null", "str")),
    "a training that is a list": (file(training=[1]), ("training", "object or null", "list")),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_the_name_of_its_field(case):
    raw, words = BAD[case]
    with pytest.raises(GateSetError) as caught:
        parse_config(raw)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 600


def test_each_message_is_its_own():
    messages = []
    for raw, _ in BAD.values():
        with pytest.raises(GateSetError) as caught:
            parse_config(raw)
        messages.append(str(caught.value))
    assert len(set(messages)) == len(messages)


def test_what_is_rendered_is_parsed_again():
    assert parse_config(render_config(CONFIG)) == CONFIG


def test_what_is_left_out_has_its_default():
    assert parse_config(file()) == GateSetConfig((Column("sql", A),))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"temperature": float("nan")}, "JSON"),
        ({"k": 0}, "k 0"),
        ({"adapters": ()}, "adapters"),
        ({"training": {"picture": b"png"}}, "JSON"),
        ({"training": {"log": "x" * (5 << 20)}}, "at most"),
    ],
)
def test_what_would_be_refused_is_not_rendered(change, word):
    with pytest.raises(GateSetError, match=word):
        render_config(replace(CONFIG, **change))


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["format", "schema", "adapters", "k", "null", "x"]), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_any_bytes_are_read_or_refused(value):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(GateSetError):
        parse_config(raw)


@given(st.data())
def test_any_value_of_a_key_is_taken_or_refused(data):
    key = data.draw(st.sampled_from(["adapters", "null", "k", "temperature", "method", "base", "training"]))
    value = data.draw(st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.lists(st.integers()))
    with suppress(GateSetError):
        config = parse_config(file(**{key: value}))
        assert render_config(config) == render_config(parse_config(render_config(config)))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(GateSetError, match=r"has no gate_set\.json"):
        read_config(tmp_path)
    (tmp_path / CONFIG_FILE).mkdir()
    with pytest.raises(GateSetError, match="not a regular file"):
        read_config(tmp_path)
    (tmp_path / CONFIG_FILE).rmdir()
    with (tmp_path / CONFIG_FILE).open("wb") as sparse:
        sparse.truncate((4 << 20) + 1)
    with pytest.raises(GateSetError, match="larger than"):
        read_config(tmp_path)
