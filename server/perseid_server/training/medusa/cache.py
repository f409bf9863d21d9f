"""Answers and hidden states on disk, so that the model answers each prompt once, whatever is tried on the answers.

An entry's key is all that decides an answer. Entries lie in shards that are there whole or not at all:

    tokens   int32 [M]       the answers of a shard, one after the other
    hidden   float16 [M, E]  of the token before each (see completions.Answer)
    lengths  int32 [A]
    keys     in the file's metadata, JSON [A]
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from perseid_server.errors import InvalidRequest
from perseid_server.training.completions import Answer
from perseid_server.training.files import write_whole

SHARD_ANSWERS = 64


def key_of(
    base: str, adapter: str | None, token_ids: Sequence[int], max_tokens: int, temperature: float, seed: int
) -> str:
    """SHA-256 over what decides an answer. `base` and `adapter` are content hashes; a greedy one has no seed."""
    decides = [base, adapter, list(token_ids), max_tokens, temperature, seed if temperature else None]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    start: int
    end: int


@dataclass(slots=True)
class AnswerCache:
    """Opened with `AnswerCache.open`; `add` answers, `flush` at the end."""

    folder: Path
    _places: dict[str, _Place] = field(default_factory=dict)
    _tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _new: dict[str, Answer] = field(default_factory=dict)
    _num_shards: int = 0

    @staticmethod
    def open(folder: Path) -> "AnswerCache":
        """What is there. InvalidRequest for a shard that cannot be read."""
        cache = AnswerCache(folder)
        for path in sorted(folder.glob("answers-*.safetensors")):
            cache._index(path)
        return cache

    def __contains__(self, key: str) -> bool:
        return key in self._tokens

    def tokens(self, key: str) -> tuple[int, ...]:
        """The answer."""
        return self._tokens[key]

    def add(self, key: str, answer: Answer) -> None:
        """Remember; a full shard is written at once."""
        self._new[key] = answer
        self._tokens[key] = answer.token_ids
        if len(self._new) == SHARD_ANSWERS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        if not self._new:
            return
        path = self.folder / f"answers-{self._num_shards:05d}.safetensors"
        answers = self._new.values()
        tensors = {
            "tokens": torch.tensor([token for one in answers for token in one.token_ids], dtype=torch.int32),
            "hidden": torch.cat([one.hidden_NE for one in answers]),
            "lengths": torch.tensor([len(one.token_ids) for one in answers], dtype=torch.int32),
        }
        write_whole(path, save(tensors, {"keys": json.dumps(list(self._new))}))
        self._new = {}
        self._index(path)

    def hidden(self, keys: Sequence[str]) -> Tensor:
        """Hidden states of flushed answers one after the other, float16 [M, E], in memory."""
        by_path: dict[Path, list[int]] = {}
        for index, key in enumerate(keys):
            by_path.setdefault(self._places[key].path, []).append(index)
        parts: list[Tensor | None] = [None] * len(keys)
        for path, indexes in by_path.items():
            with safe_open(path, "pt") as shard:
                hidden_ME = shard.get_tensor("hidden")
            for index in indexes:
                place = self._places[keys[index]]
                parts[index] = hidden_ME[place.start : place.end]
        return torch.cat([part for part in parts if part is not None])

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as shard:
                keys = json.loads(shard.metadata()["keys"])
                lengths, tokens = shard.get_tensor("lengths").tolist(), shard.get_tensor("tokens").tolist()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"{path} cannot be read: {error}; remove it, and its prompts are answered again"
            ) from error
        start = 0
        for key, length in zip(keys, lengths, strict=True):
            self._places[key] = _Place(path, start, start + length)
            self._tokens[key] = tuple(tokens[start : start + length])
            start += length
        self._num_shards = max(self._num_shards, int(path.stem.removeprefix("answers-")) + 1)
