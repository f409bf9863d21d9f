"""Every message crosses as it was, in frames that may come in any pieces."""

import dataclasses
import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseid_server.adapters.state import Resident
from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.messages import (
    Abort,
    AdapterState,
    DescribeState,
    EngineFailed,
    EngineStats,
    ForgetAdapter,
    ForgetGateSet,
    ForgetHeads,
    FromEngine,
    PinAdapter,
    Ping,
    RegisterAdapter,
    RegisterGateSet,
    RegisterHeads,
    SequenceOutput,
    Shutdown,
    SpeculationStats,
    StepOutputs,
    Submit,
    ToEngine,
)
from perseid_server.engine.state import EngineState, SequenceState
from perseid_server.ipc.codec import Codec, frame_length, from_engine, split_frames, to_engine
from perseid_server.model.sampling_params import SamplingParams, TokenLogprobs
from perseid_server.speculation.options import Speculation
from tests.fakes import fake_ready

FULL_PARAMS = SamplingParams(
    max_tokens=7, temperature=0.3, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, presence_penalty=-1.0,
    frequency_penalty=2.0, logit_bias=((3, -1.5), (4, 100.0)), seed=2**64 - 1, stop_token_ids=(1, 2), ignore_eos=True,
    min_tokens=3, logprobs=5, prompt_logprobs=0,
)  # fmt: skip
TO_ENGINE = [
    Submit("é", (1, 2, 3), FULL_PARAMS, Adaptation.of("v" * 64), -1),
    Submit("g", (1,), FULL_PARAMS, Adaptation((), Routing("g", ("a", None, BASE_COLUMN), 2, 0.5)), report_routing=True),
    RegisterGateSet("g", None, ("a",), null=True),
    ForgetGateSet("g"),
    Submit("d", (1,), FULL_PARAMS, speculation=Speculation("medusa", "h" * 64, "typical", 0.1, 1.0)),
    Submit("t", (1,), FULL_PARAMS, deadline=12.5, tenant="acme", weight=2.0, cache_salt="acme"),
    RegisterHeads("h", "/a b/é"),
    ForgetHeads("h"),
    Submit("r", (), SamplingParams(max_tokens=1, seed=-(2**63))),
    Abort("r"),
    RegisterAdapter("v", "/a b/é", pinned=True),
    PinAdapter("v", pinned=False),
    ForgetAdapter("v"),
    Shutdown(),
    Ping(),
    DescribeState(7),
]
OUTPUT = SequenceOutput(
    "r", (1, 2), (TokenLogprobs(1, -0.5, 1, ((1, -0.5), (2, -math.inf))),), (None, TokenLogprobs(2, -1.0, 2)), "stop",
    256, "why", "deadline", 4, 0.25, 1e-9, 0.125, drafted_tokens=7, accepted_tokens=1,
)  # fmt: skip
STATS = EngineStats(
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    ("a",),
    ("b", "c"),
    speculation=(SpeculationStats("", 1, 2, 3, 1, -0.5),),
    draft_budget=4,
)
FROM_ENGINE = [
    StepOutputs((OUTPUT, SequenceOutput("s")), STATS, (AdapterState("v", "host", "why"),), 5),
    StepOutputs(),
    fake_ready(),
    EngineFailed("why\nnot"),
    EngineState(
        1, 2, (SequenceState("r", "acme", "adapters", ("a", "b"), 3, 2, 1, 4, 0.5),), (("disk", 1),), 1, 0,
        (Resident("v", "gate_set", "host", 1, 2, True, True, "why"),), 3, 4, 5, 6, 7, 8,
    ),
]  # fmt: skip
BOTH = [(to_engine, message) for message in TO_ENGINE] + [(from_engine, message) for message in FROM_ENGINE]


@pytest.mark.parametrize(("codec", "message"), BOTH, ids=[type(message).__name__ for _, message in BOTH])
def test_messages_cross_as_they_are(codec: Codec[Any], message: Any) -> None:
    frame = codec.encode(message)
    assert frame_length(frame[:4]) == len(frame) - 4
    assert codec.decode(frame[4:]) == message


def test_no_message_and_no_field_of_a_request_is_left_out_above() -> None:
    assert {type(message) for message in TO_ENGINE} == set(get_args(ToEngine))
    assert {type(message) for message in FROM_ENGINE} == set(get_args(FromEngine))
    default = SamplingParams(max_tokens=1)
    for one in dataclasses.fields(SamplingParams):
        assert getattr(FULL_PARAMS, one.name) != getattr(default, one.name)


@given(st.lists(st.sampled_from(TO_ENGINE), max_size=6), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_frames_come_out_whole_however_the_bytes_come(messages: list[ToEngine], sizes: list[int]) -> None:
    stream = b"".join(to_engine.encode(message) for message in messages)
    buffer, taken, start, place = bytearray(), [], 0, 0
    while start < len(stream):
        size = sizes[place % len(sizes)]
        buffer += stream[start : start + size]
        taken += [to_engine.decode(frame) for frame in split_frames(buffer)]
        start, place = start + size, place + 1
    assert taken == messages
    assert not buffer


@given(st.binary(max_size=40))
def test_bytes_that_are_no_message_are_an_error(body: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, IndexError)):
        to_engine.decode(b"\xc1" + body)


def test_a_message_of_another_shape_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError):
        to_engine.decode(msgspec.msgpack.encode((1, {"request_id": 5})))
