"""What every fuzzer gets, and what all of them report."""

import re

import pytest

from tests.fuzz.campaign import CASE, SCALE, SEED, SENT, Campaign


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Campaign:
    """The cases of the test that asks."""
    count = max(1, round(request.param * SCALE))
    name = re.sub(r"(short|long)-?", "", request.node.name.removeprefix("test_")).removesuffix("[]")
    return Campaign(name, request.node.nodeid, count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many cases of each fuzzer."""
    if "fuzz" not in config.option.markexpr or not SENT:
        return
    terminalreporter.section(f"hostile cases (seed {SEED}{f', case {CASE}' if CASE else ''})")
    for name, count in sorted(SENT.items()):
        terminalreporter.write_line(f"{count:8,}  {name}")
    terminalreporter.write_line(f"{sum(SENT.values()):8,}  in all")
