"""The stubs in the repository are what the protos give, and the protos are as buf wants them."""

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from perseid_protos.generate import ROOT, generate
from perseid_protos.perseid.v1 import adapter_admin_pb2, generation_pb2
from tests.tools import require_tool


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    fresh = {path.relative_to(tmp_path): path.read_bytes() for path in generate(tmp_path)}
    stored = {path.relative_to(ROOT): path.read_bytes() for path in ROOT.glob("perseid/**/*_pb2*.py*")}
    assert set(fresh) == {path for path in stored if path.suffix in {".py", ".pyi"}}
    assert all(fresh[path] == stored[path] for path in fresh)


@pytest.mark.parametrize("command", [["lint"], ["build"], ["format", "--diff", "--exit-code"]], ids=lambda one: one[0])
def test_buf_finds_nothing_to_complain_about(command: list[str]) -> None:
    buf = require_tool("buf", "pip install buf-bin")
    done = subprocess.run([buf, *command], cwd=ROOT.parent, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("file", "service", "methods"),
    [
        (generation_pb2, "Generation", ["Generate", "GenerateStream"]),
        (
            adapter_admin_pb2,
            "AdapterAdmin",
            ["LoadAdapter", "UnloadAdapter", "GetAdapter", "ListAdapters", "PinAdapter"],
        ),
    ],
)
def test_services_are_named_as_clients_know_them(file: ModuleType, service: str, methods: list[str]) -> None:
    found = file.DESCRIPTOR.services_by_name[service]
    assert found.full_name == f"perseid.v1.{service}"
    assert [method.name for method in found.methods] == methods
