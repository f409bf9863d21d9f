"""How fast this machine decodes: base, one adapter and mixed adapters at 1, 4 and 16 requests, peers beside it.

    make bench                                          # Perseid and PEFT, some minutes
    make bench ARGS="--peer llama=http://127.0.0.1:8080"   # and a server that already runs
    make bench ARGS="--skip-peft --skip-own"            # Perseid alone

Starts Perseid on free ports, puts every peer beside it in the same rounds, and drives all servers the same way:
token-id prompts over /v1/completions, read as they stream. loadtest/README.md has the commands for the peers.
Prints tables with ratios; writes offline.json and offline.png.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
from rich.console import Console

from perseid_loadtest import report
from perseid_loadtest.engines import (
    Engine,
    GrpcEngine,
    OpenAIEngine,
    discover,
    end_with_servers,
    peak_memory_mib,
    perseid,
)
from perseid_loadtest.lines import line_engine
from perseid_loadtest.rounds import measure
from perseid_loadtest.workload import Case, Workload, cases
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs

PEFT_TOKENS = 16
"""PEFT's steps are all alike and slow, so fewer of them say as much."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(arguments)
    end_with_servers()
    console, progress = Console(), Console(stderr=True)
    names = tuple(adapter.partition("=")[0] for adapter in options.adapter)
    workload = Workload(options.prompt, options.tokens, names)
    asked = cases(options.batches, adapters=bool(names))
    with ExitStack() as stack:
        server = stack.enter_context(perseid(options.adapter, options.server_args))
        engines: list[Engine] = [_openai(report.PERSEID, server.http_url, workload)]
        engines += [_openai(name, url, workload, options.peer_base.get(name)) for name, url in options.peer]
        if not options.skip_peft:
            engines.append(stack.enter_context(_peft(options, asked)))
        if not options.skip_own:
            engines += stack.enter_context(_own(options, server.grpc_address, workload, asked))
        with progress.status("starting") as status:
            rates = measure(engines, asked, options.rounds, status.update)
        extra = {"time_to_ready_s": server.ready_s, "peak_memory_mib": peak_memory_mib(server.pid)}
    report.show(rates, extra, console)
    sizes = {"prompt": options.prompt, "tokens": options.tokens, "adapters": len(names), "rounds": options.rounds}
    console.print(f"written: {report.write(options.out, report.figures(rates, extra, sizes))}")
    drawn = report.plot(options.out, rates)
    console.print(f"written: {drawn}" if drawn else "no plot: matplotlib is not installed")


def _openai(name: str, url: str, workload: Workload, base: str | None = None) -> OpenAIEngine:
    return OpenAIEngine(name, url, discover(url, workload.adapters, base), workload)


@contextmanager
def _peft(options: argparse.Namespace, asked: Sequence[Case]) -> Iterator[Engine]:
    arguments = [str(embedded_gguf()), *_named(options.adapter)]
    arguments += ["--prompt", str(options.prompt), "--tokens", str(PEFT_TOKENS)]
    with line_engine("peft", "perseid_loadtest.peft_peer", arguments, asked) as engine:
        yield engine


@contextmanager
def _own(
    options: argparse.Namespace, grpc_address: str, workload: Workload, asked: Sequence[Case]
) -> Iterator[list[Engine]]:
    """What Perseid is compared with by itself: gRPC, the bare engine, and a server that has no adapters."""
    most = max(options.batches)
    full = frozenset(case for case in asked if case.phase == "decode" and case.batch == most and case.kind != "one")
    sizes = ["--prompt", str(options.prompt), "--tokens", str(options.tokens)]
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(grpc_address))
        alone = line_engine(report.ENGINE, "perseid_loadtest.inprocess", [*_named(options.adapter), *sizes], full)
        engines: list[Engine] = [
            GrpcEngine(report.GRPC, stubs.GenerationStub(channel), workload, full),
            stack.enter_context(alone),
        ]
        if workload.adapters:
            bare = stack.enter_context(perseid([], options.server_args))
            engines.append(_openai(report.BARE, bare.http_url, workload))
        yield engines


def _named(adapters: Sequence[str]) -> list[str]:
    return [part for adapter in adapters for part in ("--adapter", adapter)]


def embedded_gguf() -> Path:
    """Where the embedded base lies; asked of the command so that this module needs no server code."""
    command = [sys.executable, "-m", "perseid_server.model.embedded"]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


def example_adapters() -> list[str]:
    """NAME=FOLDER of the example adapters of a source checkout, if this runs in one."""
    return [f"{folder.name}={folder}" for folder in sorted(Path("examples/adapters").glob("*")) if folder.is_dir()]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. `peer` is a list of (name, URL), `peer_base` a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", action="append", metavar="NAME=FOLDER", help="default: examples/adapters/*")
    parser.add_argument("--batches", type=_positive, nargs="+", default=[1, 4, 16], help="concurrent requests")
    parser.add_argument("--prompt", type=_positive, default=64, help="prompt length, tokens")
    parser.add_argument("--tokens", type=_positive, default=64, help="completion length, tokens")
    parser.add_argument("--rounds", type=_positive, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--peer", type=_pair, action="append", default=[], metavar="NAME=URL", help=_PEER_HELP)
    parser.add_argument(
        "--peer-base", type=_pair, action="append", default=[], metavar="NAME=MODEL", help=_PEER_BASE_HELP
    )
    parser.add_argument("--skip-peft", action="store_true", help="leave PEFT out")
    parser.add_argument("--skip-own", action="store_true", help="leave gRPC, the bare engine and its kin out")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the figures and the plot")
    parser.add_argument("server_args", nargs="*", help="options for perseid serve, after --")
    options = parser.parse_args(arguments)
    options.adapter = options.adapter or example_adapters()
    options.peer_base = dict(options.peer_base)
    _check_names(parser, options)
    return options


_PEER_HELP = "an OpenAI-compatible server to put beside Perseid; repeat for more"
_PEER_BASE_HELP = "what a peer calls the base; default: the first model it lists"


def _check_names(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    names = [name for name, _ in options.peer]
    taken = {*report.OWN, "peft"}
    for name in names:
        if names.count(name) > 1 or name in taken:
            parser.error(f"--peer: the name {name!r} is taken")
    for name in options.peer_base:
        if name not in names:
            parser.error(f"--peer-base: there is no --peer {name!r}")


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    main()
