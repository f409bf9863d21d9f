"""The child's end of the socket."""

import fcntl
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from perseid_server.engine.messages import Abort, StepOutputs
from perseid_server.ipc.codec import HEADER_BYTES, from_engine, to_engine
from perseid_server.ipc.engine_process import EngineSocket

HIGH = 1500  # above what select() can take


@contextmanager
def connected(lowest_descriptor: int = 0) -> Iterator[tuple[socket.socket, EngineSocket]]:
    """The parent's end, and the child's on a descriptor that is not below the given one."""
    parent, child = socket.socketpair()
    with parent, child:
        moved = socket.socket(fileno=fcntl.fcntl(child.fileno(), fcntl.F_DUPFD_CLOEXEC, lowest_descriptor))
        child.close()
        with moved:
            yield parent, EngineSocket(moved)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for descriptors beyond 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= HIGH:
        pytest.skip(f"the system allows {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, HIGH + 1), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_a_parent_with_a_thousand_connections_can_start_an_engine() -> None:
    with connected(HIGH) as (parent, link):
        parent.sendall(to_engine.encode(Abort("r")))
        assert [to_engine.decode(frame) for frame in link.receive(None)] == [Abort("r")]


def test_what_the_parent_does_not_take_yet_is_sent_later() -> None:
    with connected() as (parent, link):
        message = StepOutputs(iteration_tokens=1)
        frame = from_engine.encode(message)
        count = (2 << 20) // len(frame)
        for _ in range(count):
            link.send(message)
        received = bytearray()
        while len(received) < count * len(frame):
            link.receive(0.0)
            received += parent.recv(1 << 20)
        assert received == frame * count
        assert from_engine.decode(bytes(frame[HEADER_BYTES:])) == message


def test_nothing_to_receive_is_no_frames() -> None:
    with connected() as (_, link):
        assert link.receive(0.0) == []
        assert not link.closed


@pytest.mark.parametrize("unread", [False, True])
def test_a_parent_that_is_gone_closes_the_link(unread: bool) -> None:
    with connected() as (parent, link):
        if unread:
            link.send(StepOutputs())
        parent.close()
        assert link.receive(None) == []
        assert link.closed


def test_a_parent_that_is_gone_is_found_out_before_what_it_sent_is_taken() -> None:
    with connected() as (parent, link):
        parent.sendall(to_engine.encode(Abort("r")))
        assert not link.other_end_is_gone()
        parent.close()
        assert link.other_end_is_gone()
        assert [to_engine.decode(frame) for frame in link.receive(None)] == [Abort("r")]
