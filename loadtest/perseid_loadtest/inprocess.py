"""Perseid's engine without API, sockets and client: what a step costs by itself.

Run as a process of its own (`python -m perseid_loadtest.inprocess`). The difference to what a client sees is the
API's overhead. The only file of the benchmark that imports the server.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from perseid_loadtest.lines import serve
from perseid_loadtest.workload import Job, Workload
from perseid_server.adapters.store import version_of
from perseid_server.engine.build import build_engine
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import Submit
from perseid_server.model.sampling_params import SamplingParams


def decode_rate(engine: Engine, jobs: Sequence[Job], versions: dict[str, str]) -> float:
    """Tokens a second from the step in which the last request got its first token to the first request's end."""
    for row, job in enumerate(jobs):
        sampling = SamplingParams(max_tokens=job.tokens, temperature=0.0, ignore_eos=True)
        engine.submit(Submit(str(row), job.prompt, sampling, versions.get(job.adapter)))
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
    folders = {name: Path(folder) for name, _, folder in (named.partition("=") for named in options.adapter)}
    engine = build_engine(EngineConfig()).engine
    versions = {name: version_of(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        engine.register_adapter(versions[name], str(folder.resolve()))
    workload = Workload(options.prompt, options.tokens, tuple(folders))
    serve(lambda case, turn: decode_rate(engine, workload.jobs(case, turn), versions))


if __name__ == "__main__":
    main()
