"""--trace-endpoint: what is wrong with it is told before anything is loaded."""

import builtins
import subprocess
import sys

import pytest

from perseid_server.cli.tracing import check_tracing, traced
from perseid_server.config import ServeConfig
from perseid_server.errors import InvalidRequest
from perseid_server.observe.record import CallRecord
from tests.server.cli.running import Perseid
from tests.server.observe.collector import collecting


@pytest.mark.parametrize(
    "endpoint", ["localhost:4317", "ftp://x:1", "http://", "http://x:0", "http://[x", "http://x:y"]
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(InvalidRequest, match="expected the address of an OpenTelemetry collector") as refused:
        check_tracing(ServeConfig(trace_endpoint=endpoint))
    assert refused.value.field == "trace_endpoint"


def test_without_the_extra_the_command_says_what_to_install(
    perseid: Perseid, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    for name in [name for name in sys.modules if name.startswith(("opentelemetry", "perseid_server.observe.tracing"))]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def missing(name: str, *more, **others):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="opentelemetry")
        return real(name, *more, **others)

    monkeypatch.setattr(builtins, "__import__", missing)
    done = perseid("serve", "--trace-endpoint", "http://127.0.0.1:4317", "--store", str(tmp_path), "--model", "none")
    assert done.status == 1
    assert 'pip install "perseid[tracing]"' in done.err
    assert done.err.count("\n") == 1


async def test_calls_are_told_to_the_collector() -> None:
    with collecting() as collector:
        async with traced(ServeConfig(trace_endpoint=collector.endpoint, trace_sample=1.0)) as tell:
            assert tell is not None
            tell(CallRecord("http", "GET /"))
        assert [span.name for span in collector.spans] == ["GET /"]
    async with traced(ServeConfig()) as tell:
        assert tell is None


def test_without_the_option_nothing_of_ours_is_imported() -> None:
    """FastAPI imports OpenTelemetry's interface where it finds it."""
    code = (
        "import asyncio, sys, perseid_server.cli.serve as serve\n"
        "async def main():\n    async with serve.traced(serve.ServeConfig()): pass\n"
        "asyncio.run(main())\n"
        "serve.check_tracing(serve.ServeConfig())\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
