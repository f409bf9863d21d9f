"""Perseid's engine without API, sockets and client: what a step costs by itself.

Run as a process of its own (`python -m perseid_loadtest.inprocess`). The difference to what a client sees is the
API's overhead. `step_profile` uses it too; no other file of the benchmark imports the server.
"""

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perseid_loadtest.lines import serve
from perseid_loadtest.workload import Job, Workload
from perseid_server.adapters.store import version_of
from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.build import build_engine
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import Submit
from perseid_server.model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that knows adapters."""

    engine: Engine
    versions: Mapping[str, str]  # by name, in the order given


def load_engine(adapters: Sequence[str], config: EngineConfig | None = None) -> Loaded:
    """The engine as the server builds it, with NAME=FOLDER adapters."""
    folders = {name: Path(folder) for name, _, folder in (named.partition("=") for named in adapters)}
    engine = build_engine(config or EngineConfig()).engine
    versions = {name: version_of(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        engine.register_adapter(versions[name], str(folder.resolve()))
    return Loaded(engine, versions)


def submit(loaded: Loaded, jobs: Sequence[Job]) -> None:
    """All requests at once, named by their place."""
    for row, job in enumerate(jobs):
        sampling = SamplingParams(max_tokens=job.tokens, temperature=0.0, ignore_eos=True)
        loaded.engine.submit(Submit(str(row), job.prompt, sampling, Adaptation.of(loaded.versions.get(job.adapter))))


def decode_rate(loaded: Loaded, jobs: Sequence[Job]) -> float:
    """Tokens a second from the step in which the last request got its first token to the first request's end."""
    submit(loaded, jobs)
    engine = loaded.engine
    answered: Counter[str] = Counter()
    while len(answered) < len(jobs):
        _step(engine, answered)
    before, started = answered.total(), time.perf_counter()
    while not any(answered[str(row)] == job.tokens for row, job in enumerate(jobs)):
        _step(engine, answered)
    tokens, ended = answered.total() - before, time.perf_counter()
    while engine.has_work:
        _step(engine, answered)
    return tokens / (ended - started)


def _step(engine: Engine, answered: Counter[str]) -> None:
    for output in engine.step().outputs:
        if output.error is not None:
            raise RuntimeError(output.error)
        if output.token_ids:
            answered[output.request_id] += len(output.token_ids)


def main() -> None:
    """Build the engine as the server does, then answer cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    loaded = load_engine(options.adapter)
    workload = Workload(options.prompt, options.tokens, tuple(loaded.versions))
    serve(lambda case, turn: decode_rate(loaded, workload.jobs(case, turn)))


if __name__ == "__main__":
    main()
