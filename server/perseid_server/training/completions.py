"""Answers of the served model: what a null column has to leave as it is, and what Medusa heads learn to foresee.

As many prompts run at once as the cache has room for; where one ends the next begins. Which prompts run together
changes no answer on a backend whose rows do not see their neighbours.

Shape legend: N rows of an answer, R sequences of a pass, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from perseid_kernels.segments import PageList
from perseid_server.model.batch import HostBatch
from perseid_server.training.workbench import Workbench

CONCURRENT = 48  # more rows share each weight; the step's fixed cost is then small


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt, who answers it, and how."""

    token_ids: tuple[int, ...]
    max_tokens: int  # of the answer, the end token included
    pages: PageList | None = None  # None: the base
    temperature: float = 0.0  # 0: greedy
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came, and the hidden states that it came from."""

    token_ids: tuple[int, ...]  # [N]
    hidden_NE: Tensor  # float16, after the final norm: of the prompt's last token and of all answer tokens but the last


def complete(
    bench: Workbench, prompts: Sequence[Sequence[int]], max_tokens: int, told: Callable[[int], None] = lambda _: None
) -> list[tuple[int, ...]]:
    """The base's greedy answers in the prompts' order. `told` hears how many are done."""
    answers: dict[int, tuple[int, ...]] = {}
    for index, answer in answers_of(bench, [Ask(tuple(prompt), max_tokens) for prompt in prompts]):
        answers[index] = answer.token_ids
        told(len(answers))
    return [answers[index] for index in range(len(prompts))]


def answers_of(bench: Workbench, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
    """(place in `asks`, answer) as they come to their end."""
    if not asks:
        return
    width = -(-max(len(ask.token_ids) + ask.max_tokens for ask in asks) // bench.block_size)
    num_blocks = int(bench.kv.keys[0].shape[0])
    free = [range(start, start + width) for start in range(0, num_blocks - width + 1, width)][:CONCURRENT]
    waiting = list(enumerate(asks))[::-1]
    running: list[_Sequence] = []
    while waiting or running:
        while waiting and free:
            running.append(_Sequence.of(*waiting.pop(), free.pop(), bench.decoder.device))
        _step(bench, running)
        for ended in [one for one in running if one.ended(bench.spec.eos_token_ids)]:
            running.remove(ended)
            free.append(ended.blocks)
            yield ended.index, ended.answer()


@dataclass(eq=False, slots=True)
class _Sequence:
    index: int
    ask: Ask
    blocks: range
    random: torch.Generator
    tokens: list[int]
    stored: int = 0  # tokens whose K and V are in the cache
    hidden: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(index: int, ask: Ask, blocks: range, device: torch.device) -> "_Sequence":
        return _Sequence(index, ask, blocks, torch.Generator(device).manual_seed(ask.seed), list(ask.token_ids))

    def ended(self, end_tokens: Sequence[int]) -> bool:
        return self.tokens[-1] in end_tokens or len(self.tokens) - len(self.ask.token_ids) == self.ask.max_tokens

    def answer(self) -> Answer:
        return Answer(tuple(self.tokens[len(self.ask.token_ids) :]), torch.stack(self.hidden))

    def extend(self, hidden_E: Tensor, logits_V: Tensor) -> None:
        """Choose the next token."""
        self.stored = len(self.tokens)
        self.hidden.append(hidden_E.to("cpu", torch.float16))
        if self.ask.temperature:
            shares_V = (logits_V / self.ask.temperature).softmax(-1)
            self.tokens.append(int(torch.multinomial(shares_V, 1, generator=self.random)))
        else:
            self.tokens.append(int(logits_V.argmax()))


def _step(bench: Workbench, running: Sequence[_Sequence]) -> None:
    """One more token for each."""
    size = bench.block_size
    rows = [(one, place) for one in running for place in range(one.stored, len(one.tokens))]
    starts = [0, *accumulate(len(one.tokens) - one.stored for one in running)]
    last = [start - 1 for start in starts[1:]]
    host = HostBatch(
        token_ids=[one.tokens[place] for one, place in rows],
        positions=[place for _, place in rows],
        slots=[one.blocks[0] * size + place for one, place in rows],
        query_start=starts,
        context_len=[len(one.tokens) for one in running],
        blocks=[one.blocks for one in running],
        pages=[one.ask.pages for one, _ in rows],
        logits_rows=last,
    )
    batch = host.on(bench.decoder.device)
    hidden_RE = bench.decoder.hidden(batch, bench.kv, bench.pool)[batch.logits_rows]
    logits_RV = bench.decoder.logits(hidden_RE)
    for one, hidden_E, logits_V in zip(running, hidden_RE, logits_RV, strict=True):
        one.extend(hidden_E, logits_V)
