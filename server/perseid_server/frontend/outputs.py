"""Outputs of the engine, which may bring several tokens at once, cut where an answer ends."""

from dataclasses import replace

from perseid_server.engine.messages import SequenceOutput


def first_tokens(output: SequenceOutput, count: int) -> SequenceOutput:
    """The output as if it had brought its first `count` tokens only. Drafted tokens come before the one that was not,
    so those accepted stand first."""
    if count >= len(output.token_ids):
        return output
    routing = output.routing
    return replace(
        output,
        token_ids=output.token_ids[:count],
        logprobs=output.logprobs[:count],
        finish_reason=None,  # it ends for another reason
        stop_token_id=None,
        routing=replace(routing, tokens=routing.tokens[:count]) if routing is not None else None,
        accepted_tokens=min(output.accepted_tokens, count),
    )
