"""Which of a sequence's drafts come true: the walk down its tree, token by token as without drafts."""

from collections.abc import Callable
from dataclasses import dataclass

from perseid_server.engine.ports import Chunk
from perseid_server.model.sampling import Sampled, Sampler, SampleRequest
from perseid_server.model.sampling_params import TokenLogprobs
from perseid_server.speculation.tree import ROOT


@dataclass(frozen=True, slots=True)
class Walk:
    """Tokens sampled for a chunk: the first from its last row, one more from the row of each accepted node."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # of each token, or none
    accepted: tuple[int, ...]  # nodes of its draft
    error: str | None = None  # there is no first token


Ends = Callable[[Chunk, int], bool]
"""Whether a token ends the chunk's sequence."""


def walk(chunk: Chunk, first_row: int, sampler: Sampler, request_at: Callable[[Chunk, list[int]], SampleRequest],
         ends: Ends) -> Walk:  # fmt: skip
    """Sample after the chunk's last token; where a draft says the same, go on from there.

    Every token is sampled from its row with its own random number, as if there were no drafts (sample and match), so
    what comes is the same, only sooner. `typical` requests take a likely draft as it is. `first_row`: of the logits of
    the chunk's last token; its nodes' rows follow.
    """
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    accepted: list[int] = []
    node = ROOT
    while True:
        request = request_at(chunk, tokens)
        sampled = _typical(chunk, node, first_row, sampler, request) or sampler.sample(first_row + node + 1, request)
        if sampled.error is not None:
            # A draft's row is broken: the token before it stands, and the next step finds the same row without drafts.
            return Walk(tuple(tokens), tuple(logprobs), tuple(accepted[:-1]), None if tokens else sampled.error)
        tokens.append(sampled.token_id)
        if sampled.logprob is not None:
            logprobs.append(sampled.logprob)
        child = None if chunk.draft is None else chunk.draft.tree.child(node, sampled.token_id)
        if child is None or ends(chunk, sampled.token_id):
            return Walk(tuple(tokens), tuple(logprobs), tuple(accepted))
        accepted.append(child)
        node = child


def _typical(chunk: Chunk, node: int, first_row: int, sampler: Sampler, request: SampleRequest) -> Sampled | None:
    wants = chunk.sequence.request.speculation
    if chunk.draft is None or wants.acceptance != "typical":
        return None
    children = chunk.draft.tree.children(node)
    return sampler.accept_typical(first_row + node + 1, request, children, wants.epsilon, wants.delta)
