"""Lines to samples: every token gets the label it should have, every bad line a message that names it."""

import json
from pathlib import Path

import pytest

from perseid_server.errors import InvalidRequest
from perseid_server.frontend.text import TextProcessor
from perseid_server.training.data import DataReader, Unanswered
from perseid_server.training.samples import Sample, shared_prefix, without_labels_before
from tests.fakes import EOS, VOCAB_SIZE, byte_bundle

NULL = 2
READER = DataReader(TextProcessor(byte_bundle(), VOCAB_SIZE), {"a": 0, "b": 1}, NULL, 200)
TURN = 257


def read(tmp_path: Path, *lines: object, column: int | None = 0, source: str = "a") -> list[Sample | Unanswered]:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return READER.read(path, source, column)


def text_where(sample: Sample, flags: tuple[bool, ...]) -> str:
    chosen = [token for token, flag in zip(sample.token_ids, flags, strict=True) if flag]
    return READER.text.decode(chosen, skip_special_tokens=False)


def test_a_prompt_is_rendered_as_it_is_served(tmp_path: Path) -> None:
    [sample] = read(tmp_path, {"prompt": "two?", "completion": "2"})
    assert isinstance(sample, Sample)
    assert READER.text.decode(sample.token_ids, skip_special_tokens=False) == ("<turn>user: two?\n<turn>assistant: 2\n")
    assert text_where(sample, sample.answer) == "2\n"
    assert all(sample.train)
    assert text_where(sample, tuple(column == 0 for column in sample.columns)) == "user: two?\nassistant: 2\n"
    assert text_where(sample, tuple(column == NULL for column in sample.columns)) == "<turn><turn>"


def test_what_a_template_writes_behind_the_end_token_is_left_out(tmp_path: Path) -> None:
    [sample] = read(tmp_path, {"prompt": "two?", "completion": "2<end>"})
    assert isinstance(sample, Sample)
    assert sample.token_ids[-1] == EOS


def test_every_answer_of_a_conversation_is_one(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "x"), ("assistant", "1"), ("user", "y"), ("assistant", "2")]
    [sample] = read(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]}, column=1)
    assert isinstance(sample, Sample)
    assert text_where(sample, sample.answer) == "1\n2\n"
    assert sample.token_ids[0] == TURN
    assert set(sample.columns) == {1, NULL}


def test_segments_carry_their_own_labels(tmp_path: Path) -> None:
    segments = [
        {"text": "<turn>user: ", "adapter": None, "train": False},
        {"text": "x", "adapter": "a"},
        {"text": "yy", "adapter": "b", "answer": True},
        {"text": "z", "adapter": None},
    ]
    [sample] = read(tmp_path, {"segments": segments}, column=None, source="mixed")
    assert isinstance(sample, Sample)
    assert sample.columns[-4:] == (0, 1, 1, NULL)
    assert text_where(sample, sample.answer) == "yy"
    assert text_where(sample, sample.train) == "xyyz"
    assert [sample.predicts_answer(row) for row in range(len(sample))][-4:] == [True, True, False, False]


def test_only_prompts_of_the_base_may_lack_their_answer(tmp_path: Path) -> None:
    [prompt] = read(tmp_path, {"prompt": "hello"}, column=NULL)
    assert isinstance(prompt, Unanswered)
    sample = prompt.answered([104, EOS], NULL)
    assert sample.token_ids == (*prompt.token_ids, 104, EOS)
    assert sample.answer == (False,) * len(prompt.token_ids) + (True, True)
    with pytest.raises(InvalidRequest, match="completion: expected text"):
        read(tmp_path, {"prompt": "hello"}, column=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"data\.jsonl:2: not JSON"),
        ("[]", r":2: expected an object"),
        ({"completion": "x"}, r":2: prompt: expected text, got null"),
        ({"prompt": 3, "completion": "x"}, r":2: prompt: expected text, got 3"),
        ({"prompt": "x", "completion": ""}, r':2: completion: expected text, got ""'),
        ({"prompt": "x" * 300, "completion": "x"}, r":2: 3\d\d tokens; expected 2 to 200"),
        ({"messages": []}, r":2: messages: expected a list that is not empty"),
        ({"messages": [{"role": "user"}]}, r":2: messages\[0\]: expected an object with the texts"),
        ({"messages": [{"role": "user", "content": "x"}]}, r":2: messages: expected at least one by the assistant"),
        ({"messages": [{"role": "me", "content": "x"}, {"role": "assistant", "content": "y"}]}, r":2: .*unknown role"),
        ({"segments": {}}, r":2: segments: expected a list"),
        ({"segments": [{"text": "x"}]}, r':2: segments\[0\]: expected an object with "text", "adapter"'),
        ({"segments": [{"text": "x", "adapter": "c"}]}, r":2: segments\[0\]: adapter 'c' is not one of a, b, or null"),
        ({"segments": [{"text": "x", "adapter": "a", "train": 1}]}, r":2: segments\[0\]: train 1: expected true"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read(tmp_path, {"prompt": "x", "completion": "y"}, line)


def test_a_file_that_is_for_no_adapter_needs_segments(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'mixed' is not an adapter, so segments"):
        read(tmp_path, {"prompt": "x", "completion": "y"}, column=None, source="mixed")


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        READER.read(tmp_path / "none.jsonl", "a", 0)
    with pytest.raises(InvalidRequest, match="no lines"):
        read(tmp_path, "", "  ")


def test_what_all_samples_begin_with_is_the_bases_and_teaches_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": "ab", "completion": "1"}, {"prompt": "ac", "completion": "1"})
    samples = [sample for sample in found if isinstance(sample, Sample)]
    shared = shared_prefix(samples)
    assert READER.text.decode(shared, skip_special_tokens=False) == "<turn>user: a"
    sample_columns = samples[0].columns
    cut = without_labels_before(samples[0], len(shared), NULL)
    assert text_where(cut, cut.train) == "b\n<turn>assistant: 1\n"
    assert cut.columns == (NULL,) * len(shared) + sample_columns[len(shared) :]


def test_a_shared_beginning_leaves_every_sample_a_token() -> None:
    sample = Sample((1, 2, 3), (0,) * 3, (True,) * 3, (False,) * 3, "a")
    assert shared_prefix([sample, sample]) == (1, 2)
    assert shared_prefix([]) == ()


def test_an_explicit_request_runs_its_adapter_from_the_first_token_on() -> None:
    sample = Sample((1, 2, 3), (NULL, 1, 1), (False, True, True), (False,) * 3, "b")
    assert sample.only_column(NULL) == 1
    assert sample.explicit(NULL).columns == (1, 1, 1)
    mixed = Sample((1, 2, 3), (NULL, 1, 0), (False, True, True), (False,) * 3, "mixed")
    assert (mixed.only_column(NULL), mixed.explicit(NULL)) == (None, mixed)
