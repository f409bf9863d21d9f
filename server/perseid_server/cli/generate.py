"""`perseid generate`: ask a running server over gRPC, printing text as it comes."""

import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter, validators

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.cli.client import HERE, To, connected
from perseid_server.errors import InvalidRequest
from perseid_server.speculation.options import Mode

_REPEATED = Parameter(negative=(), consume_multiple=False, show_default=False)


def generate(
    prompt: str,
    /,
    *,
    to: To = HERE,
    adapter: Annotated[str, Parameter(show_default=False)] = "",
    blend: Annotated[tuple[str, ...], _REPEATED] = (),
    auto: bool = False,
    gates: str | None = None,
    allow: Annotated[tuple[str, ...], _REPEATED] = (),
    join: bool = False,
    routing: bool = False,
    chat: bool = False,
    system: str | None = None,
    max_tokens: Annotated[int | None, Parameter(validator=validators.Number(gte=1, lt=1 << 32))] = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: Annotated[int | None, Parameter(validator=validators.Number(gte=0, lt=1 << 64))] = None,
    stop: Annotated[tuple[str, ...], _REPEATED] = (),
    speculation: Annotated[Mode | None, Parameter(show_default=False)] = None,
) -> None:
    """Generate text with a running server.

    Parameters
    ----------
    prompt
        What to continue; with --chat, what the user says.
    adapter
        Name of a loaded adapter. Default: the base.
    blend
        NAME=WEIGHT: an adapter of a weighted sum. Repeat for more. Default: none.
    auto
        Let a gate set choose among its adapters.
    gates
        Name of the gate set; implies --auto. Default: the one that is loaded, or the server's default.
    allow
        Adapter that --auto may choose. Repeat for more. Default: all of the gate set.
    join
        Let --auto choose also among loaded adapters that the gate set does not know.
    routing
        Tell on stderr what --auto chose.
    chat
        Render the prompt with the base's chat template.
    system
        The conversation's system message; implies --chat. Default: none.
    max_tokens
        Most tokens to generate. Default: what the context has room for.
    temperature
        0 takes the most likely token; larger is more random, at most 2.
    top_p
        Draw from the smallest set of tokens with this total probability, more than 0, at most 1. Default: 1.
    seed
        Makes a random answer reproducible. Default: random.
    stop
        Text that ends the answer. Repeat for more. Default: none.
    speculation
        What drafts tokens ahead; the answer stays the same. Default: the server's.
    """
    with connected(to) as channel:
        sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        mode = f"SPECULATION_{(speculation or 'unspecified').upper()}"
        request = pb.GenerateRequest(sampling=sampling, speculation=mode)
        chosen = _auto(gates, allow, join=join) if auto or gates is not None else None
        _adapt(request, adapter, blend, chosen)
        if routing:
            request.routing_report = pb.ROUTING_REPORT_SUMMARY
        if chat or system is not None:
            turns = [pb.ChatMessage(role="user", content=prompt)]
            if system is not None:
                turns.insert(0, pb.ChatMessage(role="system", content=system))
            request.chat.CopyFrom(pb.Chat(messages=turns))
        else:
            request.prompt = prompt
        chosen_by_gates = pb.Routing()
        for chunk in stubs.GenerationStub(channel).GenerateStream(request):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            chosen_by_gates.MergeFrom(chunk.routing)
    sys.stdout.write("\n")
    if routing:
        sys.stderr.write(f"prompt  {_told(chosen_by_gates.prompt)}\nanswer  {_told(chosen_by_gates.completion)}\n")


def _adapt(request: pb.GenerateRequest, adapter: str, blend: Sequence[str], auto: pb.Auto | None) -> None:
    """At most one of the three."""
    if sum((bool(adapter), bool(blend), auto is not None)) > 1:
        raise InvalidRequest("expected at most one of --adapter, --blend, and --auto or --gates")
    if blend:
        request.blend.CopyFrom(pb.Blend(adapters=[_weighted(text) for text in blend]))
    elif auto is not None:
        request.auto.CopyFrom(auto)
    else:
        request.adapter = adapter


def _auto(gates: str | None, allow: Sequence[str], *, join: bool) -> pb.Auto:
    return pb.Auto(gate_set=gates or "", allow=allow, join=join)


def _weighted(text: str) -> pb.WeightedAdapter:
    name, _, weight = text.rpartition("=")
    try:
        return pb.WeightedAdapter(name=name, weight=float(weight))
    except ValueError:
        raise InvalidRequest(f"--blend: expected NAME=WEIGHT, got {text!r}", field="blend") from None


def _told(shares: Sequence[pb.Share]) -> str:
    return ", ".join(f"{each.name} {each.share:.1%}" for each in shares) or "nothing was computed"
