"""How well trained heads foresee held-out answers: which of their candidates was right, and what trees make of it.

Shape legend: M positions, H heads, R ranks, V' draft vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_server.speculation.grow import Path, grow
from perseid_server.speculation.heads_config import RANKS
from perseid_server.training.medusa.heads import MedusaHeads
from perseid_server.training.medusa.positions import PAST_END, Positions

CHUNK = 256  # positions at once
TREE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
REPLAYED_SIZES = (1, 2, 3, 4, 6, 8, 16)

Table = tuple[tuple[float, ...], ...]
"""[head][rank]: how often that candidate was right, ranks exclusive."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The heads' candidates at every position, most likely first."""

    positions: Positions
    shares_MHR: Tensor  # float32, probability of each candidate
    right_MH: Tensor  # int64, rank of what came; −1: no candidate, PAST_END: nothing came
    came_MH: Tensor  # bool

    def accuracy(self, chosen_M: Tensor | None = None) -> Table:
        """Over some positions, or all."""
        right_MH = self.right_MH if chosen_M is None else self.right_MH[chosen_M]
        came_MH = self.came_MH if chosen_M is None else self.came_MH[chosen_M]
        num_ranks = self.shares_MHR.shape[2]
        hits_HR = torch.stack([(right_MH == rank).logical_and(came_MH).sum(0) for rank in range(num_ranks)], 1)
        shares_HR = hits_HR / came_MH.sum(0).clamp(min=1)[:, None]
        return tuple(tuple(of_head) for of_head in shares_HR.tolist())

    def by_source(self) -> Mapping[str, Table]:
        """For the base and every adapter."""
        return {
            source: self.accuracy(self.positions.of_source(source)) for source in dict.fromkeys(self.positions.sources)
        }

    def tokens_per_step(self, num_nodes: int) -> Mapping[str, float]:
        """What serving would yield: every held-out answer is gone through once, each step with a tree of the
        `num_nodes` likeliest nodes by the heads' own probabilities. By source."""
        tokens: dict[str, int] = {}
        steps: dict[str, int] = {}
        shares, right = self.shares_MHR.tolist(), self.right_MH.tolist()
        spans = zip(self.positions.starts, self.positions.starts[1:], self.positions.sources, strict=False)
        for start, end, source in spans:
            place = start
            while place < end:
                accepted = _accepted(grow(shares[place], num_nodes), right[place])
                place += accepted + 1
                steps[source] = steps.get(source, 0) + 1
            tokens[source] = tokens.get(source, 0) + end - start
        return {source: tokens[source] / steps[source] for source in steps}


def _accepted(nodes: Sequence[Path], right: Sequence[int]) -> int:
    """Drafted tokens that come true."""
    held = set(nodes)
    depth = 0
    while depth < len(right) and right[depth] >= 0 and tuple(right[: depth + 1]) in held:
        depth += 1
    return depth


@torch.inference_mode()
def judge(
    heads: MedusaHeads, positions: Positions, lm_head_VE: Tensor, told: Callable[[int, int], None] = lambda _d, _t: None
) -> Judged:
    """Run the heads, in float32, over all positions."""
    weight_VE = lm_head_VE.float()
    ranks = min(RANKS, weight_VE.shape[0])
    shares, right = [], []
    for start in range(0, len(positions), CHUNK):
        hidden_ME = positions.hidden_ME[start : start + CHUNK].to(weight_VE.device)
        targets_MH = positions.targets_MH[start : start + CHUNK]
        found = [_top(state_ME @ weight_VE.T, ranks) for state_ME in heads.states(hidden_ME)]
        shares.append(torch.stack([of_head for of_head, _ in found], 1))
        candidates_MHR = torch.stack([ids for _, ids in found], 1)
        is_right_MHR = candidates_MHR == targets_MH[:, :, None]
        right.append(torch.where(is_right_MHR.any(2), is_right_MHR.int().argmax(2), -1))
        told(min(start + CHUNK, len(positions)), len(positions))
    return Judged(positions, torch.cat(shares), torch.cat(right), positions.targets_MH != PAST_END)


def _top(logits_MV: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Probabilities and places of the likeliest candidates, on the host."""
    logits_MR, ids_MR = logits_MV.topk(ranks, dim=1)
    shares_MR = (logits_MR - logits_MV.logsumexp(1, keepdim=True)).exp()
    return shares_MR.cpu(), ids_MR.cpu()
