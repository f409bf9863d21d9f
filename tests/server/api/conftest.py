"""Clients of the server that a test module calls `live`."""

from collections.abc import Iterator

import grpc
import httpx
import pytest

from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from tests.server.stack import LiveStack


@pytest.fixture(scope="module")
def http(live: LiveStack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def generation(live: LiveStack) -> Iterator[stubs.GenerationStub]:
    with grpc.insecure_channel(live.grpc) as channel:
        yield stubs.GenerationStub(channel)
