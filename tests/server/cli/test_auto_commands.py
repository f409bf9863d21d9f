"""Blends, `auto` and gate sets from the command line."""

import re
from collections.abc import Iterator

import pytest

from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from tests.fakes import expected
from tests.server.cli.running import Perseid
from tests.server.stack import LiveStack, serving_in_thread, write_gate_set


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """Adapters one and two; gate set g is for them and a third, which is not loaded."""
    with serving_in_thread(tmp_path_factory.mktemp("server"), "one", "two") as live:
        yield live


@pytest.fixture(scope="module")
def versions(live: LiveStack) -> dict[str, str]:
    return {adapter.name: adapter.version for adapter in live.stack.registry.adapters()}


@pytest.fixture
def ask(perseid: Perseid, live: LiveStack, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Perseid:
    """The command, pointed at the server, which has the gate set."""
    monkeypatch.setenv("PERSEID_SERVER", live.grpc)
    if live.stack.registry.find("g") is None:
        write_gate_set(live.stack.root / "g", {**versions, "three": "3" * 64}, k=1)
        assert perseid("adapters", "load", "g", "g").status == 0
    return perseid


def answer(adaptation: Adaptation) -> str:
    return bytes(expected(tuple(b"say"), adaptation.key, 4)).decode() + "\n"


def test_a_blend(ask: Perseid, versions: dict[str, str]) -> None:
    done = ask("generate", "say", "--max-tokens", "4", "--blend", "one=0.5", "--blend", "two=-1e-1")
    weights = tuple(sorted([(versions["one"], 0.5), (versions["two"], -0.1)]))
    assert (done.status, done.out, done.err) == (0, answer(Adaptation(weights)), "")


@pytest.mark.parametrize("options", [["--auto"], ["--gates", "g"], ["--auto", "--gates", "g"]])
def test_auto(ask: Perseid, live: LiveStack, versions: dict[str, str], options: list[str]) -> None:
    done = ask("generate", "say", "--max-tokens", "4", *options)
    gates = live.stack.registry.get("g").version
    routing = Routing(gates, (versions["one"], versions["two"], None, BASE_COLUMN), 1, 1.0)
    assert (done.status, done.out, done.err) == (0, answer(Adaptation(routing=routing)), "")


def test_autos_options_arrive(ask: Perseid, live: LiveStack, versions: dict[str, str]) -> None:
    options = ["--allow", "one", "--allow", "three", "--join"]
    assert ask("generate", "say", "--auto", "--max-tokens", "1", *options).status == 0
    assert live.stack.engine.submitted[-1].adaptation.routing.columns == (versions["one"], None, None, BASE_COLUMN)


def test_what_was_chosen_is_told_beside_the_answer(ask: Perseid) -> None:
    done = ask("generate", "say", "--auto", "--max-tokens", "4", "--routing")
    told = "tiny 72.7%, two 18.2%, one 9.1%"  # the fake gates: 8, 2 and 1 of 11; three is not loaded
    assert done.err == f"prompt  {told}\nanswer  {told}\n"
    assert done.out.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--blend", "one"], "--blend: expected NAME=WEIGHT, got 'one'"),
        (["--blend", "one=much"], "--blend: expected NAME=WEIGHT, got 'one=much'"),
        (["--blend", "one=99"], "INVALID_ARGUMENT: adapters.0.weight is 99"),
        (["--blend", "nobody=1"], "NOT_FOUND: adapters.0.name"),
        (["--blend", "one=1", "--adapter", "one"], "at most one of --adapter, --blend, and --auto or --gates"),
        (["--auto", "--adapter", "one"], "at most one of --adapter, --blend, and --auto or --gates"),
        (["--gates", "g", "--blend", "one=1"], "at most one of --adapter, --blend, and --auto or --gates"),
        (["--gates", "nobody"], "NOT_FOUND: auto.gate_set"),
        (["--auto", "--allow", "three"], "'three' is not loaded"),
        (["--routing"], "INVALID_ARGUMENT: routing"),
        (["--adapter", "g"], "'g' is a gate set, not an adapter"),
    ],
)
def test_errors_are_one_line(ask: Perseid, options: list[str], words: str) -> None:
    done = ask("generate", "say", *options)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done.err
    assert words in done.err


def test_gate_sets_are_listed_and_shown(ask: Perseid, versions: dict[str, str]) -> None:
    assert re.search(r"g +[0-9a-f]{8} +gates +\S+ +disk +2 of 3 adapters loaded", ask("adapters", "list").out)
    shown = ask("adapters", "show", "g").out
    assert re.search(r"kind +gates \(trained\), k 1, temperature 1, the base may be chosen\n", shown)
    assert re.search(rf"adapter +one {versions['one'][:8]}, loaded\n", shown)
    assert re.search(r"adapter +three 33333333, not loaded in this version\n", shown)
    assert re.search(r"targets +q_proj in 2 layers\n", shown)
