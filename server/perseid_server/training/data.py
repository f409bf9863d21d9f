"""Training data: JSON lines, as text, to samples of tokens with labels.

    {"prompt": "…", "completion": "…"}     one user message and its answer, through the base's chat template
    {"messages": [{"role", "content"}, …]} a conversation; what the assistant says is the answer
    {"segments": [{"text": "…", "adapter": "name" or null, "train": true, "answer": false}, …]}
                                           text rendered already, with its own label piece by piece

All but the last are labelled with the adapter that the file is for, or the base; the template's markers always with
the base. A prompt without a completion is
allowed where the base can answer it: its answer is what the base itself writes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from perseid_server.errors import InvalidRequest
from perseid_server.frontend.requests import ChatInput
from perseid_server.frontend.text import TextProcessor
from perseid_server.training.json_lines import read_lines, text_field
from perseid_server.training.samples import Sample, Span

_EXAMPLE = '{"prompt": "…", "completion": "…"}'
_SEGMENT_KEYS = {"text", "adapter", "train", "answer"}


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A prompt whose answer the base is to write."""

    token_ids: tuple[int, ...]
    source: str

    def answered(self, answer: Sequence[int], column: int) -> Sample:
        """The sample that the answer makes of it."""
        return Sample.of([Span(self.token_ids, column), Span(tuple(answer), column, answer=True)], self.source)


@dataclass(frozen=True, slots=True)
class DataReader:
    """Reads files for a set of columns."""

    text: TextProcessor
    columns: Mapping[str, int]  # adapters by name
    null: int
    max_tokens: int  # longest sample

    def read(self, path: Path, source: str, column: int | None) -> list[Sample | Unanswered]:
        """Every line of a file, labelled `column`; None: only segments have labels. InvalidRequest names file and
        line."""
        return read_lines(path, "data", _EXAMPLE, lambda fields: self._line(fields, source, column))

    def _line(self, fields: Mapping[str, Any], source: str, column: int | None) -> Sample | Unanswered:
        if "segments" in fields:
            sample = Sample.of(self._segments(fields["segments"]), source)
        elif column is None:
            raise InvalidRequest(f"{source!r} is not an adapter, so segments have to say what is right where")
        elif "messages" in fields:
            sample = Sample.of(self._conversation(_messages(fields["messages"]), column), source)
        else:
            messages = [{"role": "user", "content": text_field(fields, "prompt")}]
            if column == self.null and fields.get("completion") is None:
                return Unanswered(self._tokens(self._rendered(messages, open_end=True)), source)
            messages.append({"role": "assistant", "content": text_field(fields, "completion")})
            sample = Sample.of(self._conversation(messages, column), source)
        if not 2 <= len(sample) <= self.max_tokens:
            raise InvalidRequest(f"{len(sample)} tokens; expected 2 to {self.max_tokens}")
        return sample

    def _conversation(self, messages: list[dict[str, str]], column: int) -> list[Span]:
        """Tokenized turn by turn, as it is when each answer was generated."""
        spans: list[Span] = []
        done = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._rendered(messages[:place], open_end=True)
            told = self._rendered(messages[: place + 1], open_end=False)
            if not (asked.startswith(done) and told.startswith(asked)):
                raise InvalidRequest(
                    "messages: the chat template changes earlier turns when later ones follow; give segments instead"
                )
            spans += self._spans(self._tokens(asked[len(done) :]), column)
            answer = self._tokens(told[len(asked) :])
            if place + 1 == len(messages):
                answer = self._up_to_its_end(answer)
            spans += self._spans(answer, column, answer=True)
            done = told
        if not spans:
            raise InvalidRequest("messages: expected at least one by the assistant")
        return spans

    def _spans(self, token_ids: tuple[int, ...], column: int, *, answer: bool = False) -> list[Span]:
        """The template's markers (special tokens, and white space between two of them) are the base's: they are the
        same for all adapters, so nothing is lost, and a gate that sees little but the token itself can be right."""
        marks = self._markers(token_ids)
        return [
            Span((token,), self.null if mark else column, answer=answer)
            for token, mark in zip(token_ids, marks, strict=True)
        ]

    def _markers(self, token_ids: tuple[int, ...]) -> list[bool]:
        added = self.text.tokenizer.get_added_tokens_decoder()
        special = [token in added and added[token].special for token in token_ids]
        marks = list(special)
        places = [place for place, is_special in enumerate(special) if is_special]
        for start, end in pairwise(places):
            if not self.text.decode(token_ids[start + 1 : end], skip_special_tokens=False).strip():
                marks[start:end] = [True] * (end - start)
        return marks

    def _up_to_its_end(self, answer: tuple[int, ...]) -> tuple[int, ...]:
        """Generation stops at the end token; what a template writes behind it is never an input."""
        ends = [place for place, token in enumerate(answer) if token in self.text.stop_token_ids]
        return answer[: ends[-1] + 1] if ends else answer

    def _segments(self, segments: Any) -> list[Span]:
        if not isinstance(segments, list) or not segments:
            raise InvalidRequest("segments: expected a list that is not empty")
        return [self._segment(f"segments[{place}]", segment) for place, segment in enumerate(segments)]

    def _segment(self, where: str, segment: Any) -> Span:
        if not isinstance(segment, dict) or not {"text", "adapter"} <= set(segment) <= _SEGMENT_KEYS:
            raise InvalidRequest(f'{where}: expected an object with "text", "adapter" and perhaps "train", "answer"')
        name = segment["adapter"]
        if name is not None and name not in self.columns:
            raise InvalidRequest(f"{where}: adapter {name!r} is not one of {', '.join(self.columns)}, or null")
        flags = {key: segment.get(key, default) for key, default in (("train", True), ("answer", False))}
        for key, value in flags.items():
            if not isinstance(value, bool):
                raise InvalidRequest(f"{where}: {key} {value!r}: expected true or false")
        column = self.null if name is None else self.columns[name]
        return Span(self._tokens(text_field(segment, "text")), column, **flags)

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, open_end: bool) -> str:
        return self.text.render(ChatInput(tuple(messages), add_generation_prompt=open_end))

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.text.tokenizer.encode(text, add_special_tokens=False).ids)


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages: expected a list that is not empty")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequest(f'messages[{place}]: expected an object with the texts "role" and "content"')
    return messages
