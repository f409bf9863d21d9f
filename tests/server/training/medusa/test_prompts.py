"""Prompt files: what is read, and one clear line for what is wrong."""

import json

import pytest

from perseid_server.errors import InvalidRequest
from perseid_server.training.medusa.prompts import Message, Prompt, read_prompts


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode())
    return path


def test_prompts_and_conversations_are_read(tmp_path):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "and?"},
    ]
    path = write(
        tmp_path, {"prompt": "one"}, "", {"messages": chat, "adapter": "upper"}, {"prompt": "x", "adapter": None}
    )
    turns = (Message("user", "hi"), Message("assistant", None), Message("user", "and?"))
    assert read_prompts(path, ["upper"]) == [
        Prompt((Message("user", "one"),)),
        Prompt(turns, "upper"),
        Prompt((Message("user", "x"),)),
    ]


def test_line_separators_inside_a_text_end_no_line(tmp_path):
    path = write(tmp_path, json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False))
    assert read_prompts(path, []) == [Prompt((Message("user", "one\u2028two"),))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ([1], "expected an object such as"),
        ({}, "expected one of prompt and messages"),
        ({"prompt": "x", "messages": []}, "expected one of prompt and messages"),
        ({"prompt": "x", "completion": "y"}, "completion: no such field"),
        ({"prompt": ""}, 'prompt: expected text, got ""'),
        ({"prompt": 3}, "prompt: expected text, got 3"),
        ({"messages": []}, "messages: expected a list that is not empty"),
        ({"messages": [{"role": "user"}]}, r'messages\[0\]: expected an object with "role" and "content"'),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content: expected text, got null"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last one is the assistant's"),
        ({"prompt": "x", "adapter": "lower"}, r"adapter: \"lower\" is not one of those given \(upper\)"),
        ({"prompt": "x", "adapter": ["upper"]}, r"adapter: \[\"upper\"\] is not one of those given"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_field(tmp_path, line, message):
    path = write(tmp_path, {"prompt": "good"}, line)
    with pytest.raises(InvalidRequest, match=message) as refused:
        read_prompts(path, ["upper"])
    assert str(refused.value.message).startswith(f"{path}:2: ")
    assert refused.value.field == "prompts"


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="no lines; expected JSON lines"):
        read_prompts(write(tmp_path, " "), [])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl", [])
