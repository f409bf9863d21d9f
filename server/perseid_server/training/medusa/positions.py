"""What heads learn from: a hidden state, and the tokens that came after the next one.

Shape legend: M positions, H heads, E hidden size, V' draft vocabulary.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_server.training.medusa.cache import AnswerCache
from perseid_server.training.medusa.distill import Answered

PAST_END = -1
"""A target behind the answer's end: nothing to learn, and nothing to judge."""
NOT_DRAFTED = -2
"""A target outside the draft vocabulary: nothing to learn, and always a miss."""


@dataclass(frozen=True, slots=True)
class Positions:
    """M positions of answers that lie one after the other: answer i has those from starts[i] to starts[i + 1].

    Row r of an answer is the state that its token r comes from, so head h is to tell its token r + h + 1.
    """

    hidden_ME: Tensor  # float16
    targets_MH: Tensor  # int64, places in the draft vocabulary, or PAST_END, NOT_DRAFTED
    starts: tuple[int, ...]
    sources: tuple[str, ...]  # of each answer

    def __len__(self) -> int:
        return self.hidden_ME.shape[0]

    def told_by(self, chosen_M: Tensor, head: int) -> tuple[Tensor, Tensor]:
        """(rows, known): the positions from whose states this head's targets were told, and whether they are here. The
        state behind an answer's last token is not."""
        starts = torch.tensor(self.starts)
        ends_M = starts[torch.searchsorted(starts, chosen_M, right=True)]
        rows_M = chosen_M + head + 1
        return rows_M.clamp(max=len(self) - 1), rows_M < ends_M

    def of_source(self, source: str) -> Tensor:
        """Its positions, int64."""
        spans = zip(self.starts, self.starts[1:], self.sources, strict=False)
        return torch.tensor([m for start, end, name in spans if name == source for m in range(start, end)])


def draft_vocabulary(answers: Iterable[Sequence[int]], count: int, vocab_size: int) -> tuple[int, ...] | None:
    """The `count` most frequent tokens of the answers, then the tokenizer's first ones, ascending; None: all tokens.

    Byte-pair tokenizers number tokens in the order of their merges, the most frequent first.
    """
    if not 0 < count < vocab_size:
        return None
    seen = Counter(token for answer in answers for token in answer)
    chosen = [token for token, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))][:count]
    held = set(chosen)
    rest = (token for token in range(vocab_size) if token not in held)
    return tuple(sorted([*chosen, *(token for token, _ in zip(rest, range(count - len(chosen)), strict=False))]))


def positions_of(
    cache: AnswerCache,
    answers: Sequence[Answered],
    num_heads: int,
    vocabulary: Sequence[int] | None,
    vocab_size: int,
) -> Positions:
    """Of answers in the cache, in this order. The position before an answer's last token has no target."""
    starts = [0]
    for one in answers:
        starts.append(starts[-1] + len(one.token_ids) - 1)
    hidden_ME = cache.hidden([one.key for one in answers])
    before_last = torch.ones(hidden_ME.shape[0], dtype=torch.bool)
    ends = torch.tensor([len(one.token_ids) for one in answers]).cumsum(0) - 1
    before_last[ends] = False
    drafted_V = _places(vocabulary, vocab_size)
    targets = [_targets(drafted_V[torch.tensor(one.token_ids)], num_heads) for one in answers]
    return Positions(hidden_ME[before_last], torch.cat(targets), tuple(starts), tuple(one.source for one in answers))


def _places(vocabulary: Sequence[int] | None, vocab_size: int) -> Tensor:
    """Place of each token in the draft vocabulary, or NOT_DRAFTED."""
    if vocabulary is None:
        return torch.arange(vocab_size)
    places_V = torch.full((vocab_size,), NOT_DRAFTED)
    places_V[torch.tensor(vocabulary)] = torch.arange(len(vocabulary))
    return places_V


def _targets(answer_N: Tensor, num_heads: int) -> Tensor:
    """[N − 1, H]: row r has the tokens r + 1, r + 2, …"""
    padded = torch.cat([answer_N, answer_N.new_full((num_heads,), PAST_END)])
    return padded[1:].unfold(0, num_heads, 1)[: len(answer_N) - 1]
