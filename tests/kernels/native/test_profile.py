"""The profile of a forward pass: every op is counted, and only while somebody listens."""

from pathlib import Path

import pytest
import torch

from perseid_kernels.native.backend import NativeBackend
from perseid_kernels.native.build import build_library
from perseid_kernels.native.profile import OPS
from tests.server.model.passes import Part, Passes, decoder_of
from tests.server.model.tiny import Base, write_tiny


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Passes:
    base = Base(write_tiny(tmp_path_factory.mktemp("base"), "llama", torch.float32))
    return Passes(decoder_of(base.checkpoint, NativeBackend(build_library()), 64), base.checkpoint, [list(range(40))])


def test_every_op_of_a_pass_is_counted_while_somebody_listens(passes: Passes) -> None:
    with NativeBackend(build_library()).profiling() as profile:
        passes.run(Part(0, 0, 30))
        first = profile.by_op()
        passes.run(Part(0, 30, 40))
        both = profile.by_op()
        profile.reset()
        assert not any(profile.by_op().values())
    assert set(first) == set(OPS)
    for op in OPS:
        assert op in ("route", "lora") or 0 < first[op] < both[op], op
    assert first["route"] == first["lora"] == 0, "no row has an adapter"
    passes.run(Part(0, 0, 10))
    assert not any(profile.by_op().values())


def test_the_names_are_those_of_the_library() -> None:
    """In the same order: a name in the wrong place would tell of another op."""
    header = Path(build_library.__code__.co_filename).with_name("decoder.h").read_text()
    names = header[header.index("enum Op {") :].split("{")[1].split("}")[0]
    assert tuple(name.strip().lower() for name in names.split(",")) == (*OPS, "num_ops")
