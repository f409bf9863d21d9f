"""`perseid generate`: ask a running server over gRPC, printing text as it comes."""

import sys
from typing import Annotated

from cyclopts import Parameter, validators

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.cli.client import DEFAULT_SERVER, ServerAddress, connected


def generate(
    prompt: str,
    /,
    *,
    server: ServerAddress = DEFAULT_SERVER,
    adapter: Annotated[str, Parameter(show_default=False)] = "",
    chat: bool = False,
    system: str | None = None,
    max_tokens: Annotated[int | None, Parameter(validator=validators.Number(gte=1, lt=1 << 32))] = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: Annotated[int | None, Parameter(validator=validators.Number(gte=0, lt=1 << 64))] = None,
    stop: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=False, show_default=False)] = (),
) -> None:
    """Generate text with a running server.

    Parameters
    ----------
    prompt
        What to continue; with --chat, what the user says.
    adapter
        Name of a loaded adapter. Default: the base.
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
    """
    with connected(server) as channel:
        sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        request = pb.GenerateRequest(adapter=adapter, sampling=sampling)
        if chat or system is not None:
            turns = [pb.ChatMessage(role="user", content=prompt)]
            if system is not None:
                turns.insert(0, pb.ChatMessage(role="system", content=system))
            request.chat.CopyFrom(pb.Chat(messages=turns))
        else:
            request.prompt = prompt
        for chunk in stubs.GenerationStub(channel).GenerateStream(request):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
