"""The smallest gRPC client the proofs need: token ids in, token ids out."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from perseid_protos.perseid.v1 import generation_pb2 as messages
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs

TIMEOUT_S = 300


@dataclass(frozen=True)
class Job:
    """One greedy request, adapted by an adapter, a blend or gates; None is the base."""

    prompt: tuple[int, ...]
    adapter: str | messages.Blend | messages.Auto | None
    num_tokens: int
    drafts: bool = True  # as the server likes; False: a token is a step

    def message(self) -> messages.GenerateRequest:
        """The request on the wire."""
        request = messages.GenerateRequest(
            token_ids=messages.TokenIds(ids=self.prompt),
            sampling=messages.SamplingParams(max_tokens=self.num_tokens, temperature=0.0, ignore_eos=True),
        )
        if not self.drafts:
            request.speculation = messages.SPECULATION_OFF
        if isinstance(self.adapter, messages.Auto):
            request.auto.CopyFrom(self.adapter)
        elif isinstance(self.adapter, messages.Blend):
            request.blend.CopyFrom(self.adapter)
        else:
            request.adapter = self.adapter or ""
        return request


def generate(address: str, job: Job) -> messages.GenerateResponse:
    """One request on a channel of its own."""
    with grpc.insecure_channel(address) as channel:
        return stubs.GenerationStub(channel).Generate(job.message(), timeout=TIMEOUT_S)


def generate_all(address: str, jobs: Sequence[Job]) -> list[messages.GenerateResponse]:
    """All requests at the same time."""
    with grpc.insecure_channel(address) as channel:
        stub = stubs.GenerationStub(channel)
        calls = [stub.Generate.future(job.message(), timeout=TIMEOUT_S) for job in jobs]
        return [call.result() for call in calls]


def stream(channel: grpc.Channel, job: Job) -> Iterator[messages.GenerateChunk]:
    """The chunks of one request."""
    return stubs.GenerationStub(channel).GenerateStream(job.message(), timeout=TIMEOUT_S)


def tokens_of(response: messages.GenerateResponse) -> tuple[int, ...]:
    """The token ids of the first choice."""
    return tuple(response.choices[0].token_ids)


class Streams:
    """Many streams read in the background; `results()` waits for all and gives their tokens."""

    def __init__(self, address: str, jobs: Sequence[Job]) -> None:
        self._channel = grpc.insecure_channel(address)
        self._pool = ThreadPoolExecutor(len(jobs))
        self._chunks: list[list[messages.GenerateChunk]] = [[] for _ in jobs]
        self._futures = [self._pool.submit(self._read, index, job) for index, job in enumerate(jobs)]

    def _read(self, index: int, job: Job) -> None:
        for chunk in stream(self._channel, job):
            self._chunks[index].append(chunk)

    def all_started(self) -> bool:
        """Every stream has brought at least one token."""
        return all(any(chunk.token_ids for chunk in chunks) for chunks in self._chunks)

    def any_ended(self) -> bool:
        """Some stream is over."""
        return any(future.done() for future in self._futures)

    def num_tokens_each(self) -> list[int]:
        """Tokens that have come so far, of each stream."""
        return [sum(len(chunk.token_ids) for chunk in list(chunks)) for chunks in self._chunks]

    def results(self) -> list[tuple[int, ...]]:
        """Tokens of each stream; raises what a stream raised."""
        for future in self._futures:
            future.result(TIMEOUT_S)
        return [tuple(token for chunk in chunks for token in chunk.token_ids) for chunks in self._chunks]

    def errors(self) -> list[grpc.RpcError | None]:
        """How each stream failed, None for one that did not."""
        return [future.exception(TIMEOUT_S) for future in self._futures]

    def close(self) -> None:
        """Give the channel and the threads back."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._channel.close()
