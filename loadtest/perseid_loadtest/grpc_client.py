"""Many streaming generations at once over gRPC."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from perseid_loadtest.drive import Arrival, Stream
from perseid_loadtest.workload import Job
from perseid_protos.perseid.v1 import generation_pb2 as messages
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs


def generate(stub: stubs.GenerationStub, jobs: Sequence[Job]) -> list[Stream]:
    """Run all jobs at once, each in a thread of its own."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: _stream(stub, job), jobs))


def request(job: Job) -> messages.GenerateRequest:
    """A greedy request that goes on after the end token."""
    return messages.GenerateRequest(
        token_ids=messages.TokenIds(ids=job.prompt),
        adapter=job.adapter,
        sampling=messages.SamplingParams(max_tokens=job.tokens, temperature=0.0, ignore_eos=True),
    )


def _stream(stub: stubs.GenerationStub, job: Job) -> Stream:
    message = request(job)
    started = time.perf_counter()
    arrivals = tuple(
        Arrival(time.perf_counter(), len(chunk.token_ids)) for chunk in stub.GenerateStream(message) if chunk.token_ids
    )
    return Stream(started, arrivals)
