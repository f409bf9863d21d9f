"""Some requests whose answers are kept: given in the middle of a run, they must be those given alone."""

import asyncio
import contextlib

import grpc

from perseid_loadtest.traffic.grpc_target import message_of
from perseid_loadtest.traffic.plan import Plan, Request
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs

EVERY_S = 1.0
FIRST = 1_000_000_000
"""Numbers that no other request of the plan has."""
TIMEOUT_S = 60.0


class Probes:
    """Greedy requests of a plan, over gRPC, since that tells the tokens."""

    def __init__(self, address: str, plan: Plan) -> None:
        self._address = address
        self._plan = plan
        self._answers: dict[int, tuple[int, ...]] = {}

    async def ask_meanwhile(self) -> None:
        """One after the other, until cancelled. What fails has no answer; the run's own records tell such errors."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub, number = stubs.GenerationStub(channel), FIRST
            while True:
                await asyncio.sleep(EVERY_S)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    self._answers[number] = await _tokens(stub, self._plan.request(number))
                number += 1

    async def ask_alone(self) -> tuple[int, int]:
        """All again, with nothing beside them: how many are the same, and how many there are. The first that fails
        ends it: the server is not well, or gone."""
        same = 0
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = stubs.GenerationStub(channel)
            with contextlib.suppress(grpc.aio.AioRpcError):
                for number, answer in self._answers.items():
                    same += await _tokens(stub, self._plan.request(number)) == answer
        return same, len(self._answers)


async def _tokens(stub: stubs.GenerationStub, request: Request) -> tuple[int, ...]:
    answer = await stub.Generate(message_of(request), timeout=TIMEOUT_S)
    return tuple(answer.choices[0].token_ids)
