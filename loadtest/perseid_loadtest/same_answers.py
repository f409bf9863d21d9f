"""How many greedy answers stay the same when activations are rounded (`--activations int16`, `int8`).

    .venv/bin/python -m perseid_loadtest.same_answers

Random prompts for the base and all adapters, each answered with exact activations and with rounded ones.
"""

from collections.abc import Sequence

from perseid_loadtest.inprocess import load_engine, submit
from perseid_loadtest.offline import example_adapters
from perseid_loadtest.workload import Case, Workload
from perseid_server.engine.config import EngineConfig

PROMPT, TOKENS = 64, 48
CASES = (Case("base", 20), Case("mixed", 80))

Answers = dict[tuple[str, str], tuple[int, ...]]
"""By kind of case and row."""


def answers(adapters: Sequence[str], config: EngineConfig) -> Answers:
    """Every request of the cases, answered by an engine of its own."""
    loaded = load_engine(adapters, config)
    workload = Workload(PROMPT, TOKENS, tuple(loaded.versions))
    found: Answers = {}
    for case in CASES:
        submit(loaded, workload.jobs(case, turn=0))
        while loaded.engine.has_work:
            for output in loaded.engine.step().outputs:
                key = (case.kind, output.request_id)
                found[key] = (*found.get(key, ()), *output.token_ids)
    return found


def main() -> None:
    """Count and print."""
    adapters = example_adapters()
    exact = answers(adapters, EngineConfig())
    for config in (EngineConfig(activations="int16"), EngineConfig(activations="int8")):
        rounded = answers(adapters, config)
        same = sum(rounded[key] == tokens for key, tokens in exact.items())
        print(f"{config.activations}: {same} of {len(exact)} answers are those of exact")


if __name__ == "__main__":
    main()
