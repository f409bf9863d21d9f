"""Training samples: tokens, and for each token the column that is right for it.

A column is an adapter's place in the gate set; the one after the last adapter is the base (the null column).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens that share a label."""

    token_ids: tuple[int, ...]
    column: int
    train: bool = True  # whether these rows teach the gates
    answer: bool = False  # written by the model, so predicting it right counts


@dataclass(frozen=True, slots=True)
class Sample:
    """T tokens with a label each. `source` is the data set it came from, for the report."""

    token_ids: tuple[int, ...]
    columns: tuple[int, ...]
    train: tuple[bool, ...]
    answer: tuple[bool, ...]
    source: str

    @staticmethod
    def of(spans: Sequence[Span], source: str) -> "Sample":
        """Spans one after the other."""
        return Sample(
            tuple(token for span in spans for token in span.token_ids),
            tuple(span.column for span in spans for _ in span.token_ids),
            tuple(span.train for span in spans for _ in span.token_ids),
            tuple(span.answer for span in spans for _ in span.token_ids),
            source,
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    def only_column(self, null: int) -> int | None:
        """The one adapter that is right somewhere, or `null` where none is; None where several are."""
        wanted = {column for column, trains in zip(self.columns, self.train, strict=True) if trains} - {null}
        return wanted.pop() if len(wanted) == 1 else None if wanted else null

    def explicit(self, null: int) -> "Sample":
        """As a request that names its adapter runs: with it from the first token on."""
        column = self.only_column(null)
        return self if column is None else replace(self, columns=(column,) * len(self))

    def predicts_answer(self, row: int) -> bool:
        """Whether the token after `row` is the model's own: what this row computes decides it."""
        return row + 1 < len(self) and self.answer[row + 1]


def shared_prefix(samples: Sequence[Sample]) -> tuple[int, ...]:
    """The tokens all samples begin with, at least one token of each left over: the template and a system prompt.

    They are the same whatever is asked, so nothing in them tells which adapter is right.
    """
    if not samples:
        return ()
    first = samples[0].token_ids
    longest = min(len(sample) for sample in samples) - 1
    for place in range(longest):
        if any(sample.token_ids[place] != first[place] for sample in samples):
            return first[:place]
    return first[:longest]


def without_labels_before(sample: Sample, length: int, null: int) -> Sample:
    """The same sample with its first `length` tokens on the base, teaching nothing."""
    if length == 0:
        return sample
    return Sample(
        sample.token_ids,
        (null,) * length + sample.columns[length:],
        (False,) * length + sample.train[length:],
        sample.answer,
        sample.source,
    )
