"""What a test of faults is run against: the fake model at once, or the real small one with its examples in the long
forms. Either is a real server in processes of its own.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perseid_server.adapters.store import version_of
from tests.chaos.serve_under_test import BASE
from tests.e2e.prompts import TEXTS
from tests.e2e.running import RunningServer, start_server, stop_server
from tests.server.stack import write_adapter, write_gate_set

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "tests.chaos.serve_under_test", "serve")
ENVIRONMENT = {"PERSEID_HTTP_PORT": "0", "PERSEID_GRPC_PORT": "0", "PERSEID_TEST_BACKOFF_S": "0.1"}
EXAMPLES = ("german-words", "iso-date", "staff-sql")
FAKE_ENGINE = "tests.chaos.engines:build"


@dataclass(frozen=True)
class Site:
    """A base, its adapters and gates, and what to ask them."""

    arguments: tuple[str, ...]
    engine: str | None  # None: the real one
    models: tuple[str, ...]  # the base first, `auto` last
    prompts: tuple[str, ...]
    max_tokens: int
    step_timeout_s: float  # far above what a step takes
    num_faults: int
    passing: tuple[Path, Path]  # adapters that are not loaded, from below an --adapter-root

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of those that are loaded."""
        return self.models[1:-1]


def fake_site(folder: Path) -> Site:
    """The fake model with two adapters and gates over them."""
    folders = {name: write_adapter(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))}
    gates = write_gate_set(folder / "gates", {name: version_of(path) for name, path in folders.items()})
    return Site(
        arguments=_arguments({**folders, "gates": gates}, folder),
        engine=FAKE_ENGINE,
        models=(BASE, *folders, "auto"),
        prompts=tuple(f"say {number} {'again ' * number}" for number in range(3)),
        max_tokens=60,
        step_timeout_s=2.0,
        num_faults=3,
        passing=(write_adapter(folder / "a", seed=21), write_adapter(folder / "b", seed=22)),
    )


def real_site(folder: Path) -> Site:
    """The embedded base with example adapters, their gates and heads: drafts are part of what must not go wrong."""
    examples = ROOT / "examples/adapters"
    folders = {name: examples / name for name in EXAMPLES}
    others = {"gates": ROOT / "examples/gates/examples", "heads": ROOT / "examples/heads/base"}
    return Site(
        arguments=_arguments({**folders, **others}, folder),
        engine=None,
        models=("SmolLM2-135M-Instruct", *folders, "auto"),
        prompts=TEXTS[:4],
        max_tokens=32,
        step_timeout_s=10.0,
        num_faults=8,
        passing=(_stronger(examples / "roman-numeral", folder), _stronger(examples / "country-code", folder)),
    )


def _stronger(adapter: Path, folder: Path) -> Path:
    """Another version. The gates know the one that is shipped, and would choose it as soon as it is loaded."""
    copy = shutil.copytree(adapter, folder / adapter.name)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    return copy


def _arguments(named: dict[str, Path], root: Path) -> tuple[str, ...]:
    return (*(f"--adapter={name}={path}" for name, path in named.items()), "--adapter-root", str(root))


def import_path() -> list[str]:
    """The children find the tests' engines, and the same packages as the tests."""
    return [str(ROOT), *filter(None, sys.path)]


@contextmanager
def running_site(
    site: Site, store: Path, *arguments: str, wait: bool = True, inside: Sequence[str] = (), **environment: str
) -> Iterator[RunningServer]:
    """Its server, stopped at the end. `wait`: until it is ready. `inside`: a command that runs it as its last words."""
    told = {"PYTHONPATH": os.pathsep.join(import_path()), **ENVIRONMENT}
    if site.engine is not None:
        told["PERSEID_TEST_ENGINE"] = site.engine
    command = (*inside, *COMMAND)
    server = start_server(*site.arguments, *arguments, store=store, command=command, **(told | environment))
    try:
        if wait:
            server.wait_until_ready()
        yield server
    finally:
        stop_server(server)
