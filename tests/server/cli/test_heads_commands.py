"""Medusa heads from the command line."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from perseid_server.adapters.source import OPERATOR
from perseid_server.cli.serve import _client_policy, _operator_policy
from perseid_server.config import ServeConfig
from perseid_server.speculation.heads_config import HeadsConfig
from tests.server.cli.running import Perseid
from tests.server.speculation.heads_folders import medusa_v1, medusa_v2, write_heads
from tests.server.stack import LiveStack, serving_in_thread


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with serving_in_thread(tmp_path_factory.mktemp("server"), "one") as live:
        write_heads(live.stack.root / "v2", medusa_v2(2))
        config = HeadsConfig("a" * 64, (1, 4, 5), ((0.5, 0.25), (0.25,)))
        write_heads(live.stack.root / "v1", medusa_v1(2, 2, rows=3), config=config)
        yield live


@pytest.fixture
def ask(perseid: Perseid, live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> Perseid:
    """The command, pointed at the server."""
    monkeypatch.setenv("PERSEID_SERVER", live.grpc)
    return perseid


def rows(out: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S+(?: \S+)*) {2,}(.*)$", out, re.MULTILINE))


def test_heads_are_loaded_for_an_adapter_shown_and_unloaded(ask: Perseid, live: LiveStack) -> None:
    done = ask("adapters", "load", "h", "v2", "--for", "one")
    told = rows(done.out)
    version = live.stack.registry.get("one").version
    assert (done.status, told["kind"]) == (0, "heads (Medusa v2), 2 of one block")
    assert (told["for"], told["lm_head"]) == (f"one {version[:8]}", "that of the base, 258 tokens")
    assert told["head 1"] == "56.0%, 12.3%, 8.2%, 6.2% right by rank"
    assert told["accuracy"] == "that of published heads, not measured with these"
    assert ask("adapters", "show", "h").out == done.out
    assert re.search(rf"h +[0-9a-f]{{8}} +heads .*2 heads for one {version[:8]}", ask("adapters", "list").out)
    assert ask("adapters", "unload", "h").status == 0
    assert "heads" not in ask("adapters", "list").out


def test_heads_with_a_config_of_their_own(ask: Perseid) -> None:
    told = rows(ask("adapters", "load", "i", "v1").out)
    assert told["kind"] == "heads (Medusa v1), 2 of 2 blocks"
    assert told["for"] == "aaaaaaaa, which is not loaded"
    assert told["lm_head"] == "their own, 3 tokens"
    assert (told["head 1"], told["accuracy"]) == ("50.0%, 25.0% right by rank", "measured")
    base = rows(ask("adapters", "load", "j", "v2").out)
    assert base["for"] == "the base"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["adapters", "load", "k", "v2", "--for", "nobody"], "NOT_FOUND: adapter: no adapter 'nobody' is loaded"),
        (["adapters", "load", "k", "one-0", "--for", "one"], "INVALID_ARGUMENT: adapter: only Medusa heads"),
    ],
)
def test_errors_are_one_line(ask: Perseid, arguments: list[str], words: str) -> None:
    done = ask(*arguments)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done.err
    assert words in done.err


def test_pickles_are_read_only_where_the_operator_says_so(tmp_path: Path) -> None:
    assert not ServeConfig().allow_pickle_heads
    assert _operator_policy(ServeConfig()) == OPERATOR
    allowed = ServeConfig(allow_pickle_heads=True)
    assert _operator_policy(allowed).allow_pickle_heads
    assert _client_policy(allowed).allow_pickle_heads
    assert not _client_policy(ServeConfig()).allow_pickle_heads
