"""What an engine that drafts sends: the same tokens in fewer outputs."""

from collections.abc import Sequence
from dataclasses import replace

from perseid_server.engine.messages import SequenceOutput


def joined(outputs: Sequence[SequenceOutput]) -> SequenceOutput:
    """Outputs of one sequence as one, the drafts being all tokens but the last and as many that were wrong."""
    first, last = outputs[0], outputs[-1]
    tokens = tuple(token for output in outputs for token in output.token_ids)
    routing = first.routing
    if routing is not None:
        shares = tuple(token for output in outputs if output.routing for token in output.routing.tokens)
        routing = replace(routing, tokens=shares)
    num_drafted = len(outputs) - 1
    return replace(
        first,
        token_ids=tokens,
        logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        error=last.error,
        routing=routing,
        drafted_tokens=2 * num_drafted,
        accepted_tokens=num_drafted,
    )
