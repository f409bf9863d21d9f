"""`generate` and `adapters` against a server, and what they say when there is none."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.fakes import expected
from tests.server.cli.running import Perseid
from tests.server.stack import LiveStack, serving_in_thread, write_adapter


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with serving_in_thread(tmp_path_factory.mktemp("server"), "one") as live:
        yield live


@pytest.fixture
def ask(perseid: Perseid, live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> Perseid:
    """The command, pointed at the server."""
    monkeypatch.setenv("PERSEID_SERVER", live.grpc)
    return perseid


def answer(prompt: str, num_tokens: int, version: str | None = None) -> str:
    return bytes(expected(tuple(prompt.encode()), version, num_tokens)).decode()


def test_generate_prints_the_answer(ask: Perseid) -> None:
    done = ask("generate", "say", "--max-tokens", "6")
    assert (done.status, done.out, done.err) == (0, answer("say", 6) + "\n", "")


def test_generate_with_an_adapter(ask: Perseid, live: LiveStack) -> None:
    version = live.stack.registry.get("one").version
    assert ask("generate", "say", "--adapter", "one", "--max-tokens", "6").out == answer("say", 6, version) + "\n"


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ([], "hi"),
        (["--chat"], "<turn>user: hi\n<turn>assistant: "),
        (["--system", "Be."], "<turn>system: Be.\n<turn>user: hi\n<turn>assistant: "),
    ],
)
def test_generate_with_a_conversation(ask: Perseid, live: LiveStack, options: list[str], prompt: str) -> None:
    assert ask("generate", "hi", "--max-tokens", "1", *options).status == 0
    sent = live.stack.engine.submitted[-1].prompt_token_ids
    assert live.stack.service.text.decode(sent, skip_special_tokens=False) == prompt


def test_generate_hands_its_options_on(ask: Perseid, live: LiveStack) -> None:
    ask("generate", "hi", "--max-tokens", "9", "--temperature", "0.5", "--top-p", "0.5", "--seed", "7", "--stop", "zzz")
    sampling = live.stack.engine.submitted[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (9, 0.5, 0.5, 7)


@pytest.mark.parametrize(
    ("options", "mode"), [([], "auto"), *((["--speculation", mode], mode) for mode in ("ngram", "off"))]
)
def test_generate_says_what_shall_draft(ask: Perseid, live: LiveStack, options: list[str], mode: str) -> None:
    assert ask("generate", "hi", "--max-tokens", "1", *options).status == 0
    assert live.stack.engine.submitted[-1].speculation.mode == mode


@pytest.mark.parametrize("sizes", [(1,), (3, 2)], ids=str)
def test_generate_prints_all_tokens_of_a_step(ask: Perseid, live: LiveStack, sizes: tuple[int, ...]) -> None:
    live.stack.engine.sizes = sizes
    done = ask("generate", "say", "--max-tokens", "8")
    live.stack.engine.sizes = (1,)
    assert (done.status, done.out) == (0, answer("say", 8) + "\n")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["generate", "x", "--adapter", "nobody"], 1, "NOT_FOUND: no adapter 'nobody' is loaded"),
        (["generate", "x", "--temperature", "9"], 1, "INVALID_ARGUMENT: temperature is 9"),
        (["generate", "x", "--max-tokens", "-1"], 2, "--max-tokens"),
        (["generate", "x", "--max-tokens", str(1 << 32)], 2, "--max-tokens"),
        (["generate", "x", "--seed", str(1 << 64)], 2, "--seed"),
        (["generate", "x", "--speculation", "medusa"], 1, "INVALID_ARGUMENT: speculation: no Medusa heads"),
        (["generate", "x", "--speculation", "fast"], 2, "--speculation"),
        (["generate", "x" * 300], 1, "300 tokens"),
        (["generate", ""], 1, "prompt"),
        (["generate", "\udcff"], 1, "not valid UTF-8"),
        (["adapters", "show", "nobody"], 1, "NOT_FOUND"),
        (["adapters", "unload", "nobody"], 1, "NOT_FOUND"),
        (["adapters", "pin", "nobody"], 1, "NOT_FOUND"),
        (["adapters", "load", "one", "one-0"], 1, "ALREADY_EXISTS"),
        (["adapters", "load", "new", "/etc"], 1, "PERMISSION_DENIED"),
        (["adapters", "load", "../new", "one-0"], 1, "INVALID_ARGUMENT"),
        (["adapters", "load", "\udcff", "one-0"], 1, "not valid UTF-8"),
    ],
)
def test_errors_are_one_line(ask: Perseid, arguments: list[str], status: int, words: str) -> None:
    done = ask(*arguments)
    assert (done.status, done.out, done.err.count("\n")) == (status, "", 1), done.err
    assert words in done.err


def test_adapters_are_loaded_shown_pinned_and_unloaded(ask: Perseid, live: LiveStack) -> None:
    write_adapter(live.stack.root / "two", seed=2)
    loaded = ask("adapters", "load", "two", "two").out
    assert re.search(r"name +two\n", loaded)
    assert re.search(r"kind +LoRA, rank 2\n", loaded)
    assert ask("adapters", "show", "two").out == loaded
    assert "pinned" in ask("adapters", "pin", "two").out
    assert "pinned" not in ask("adapters", "unpin", "two").out
    listed = ask("adapters", "list").out
    assert re.search(r"one +[0-9a-f]{8} +2 ", listed)
    assert re.search(r"two +[0-9a-f]{8} +2 ", listed)
    done = ask("adapters", "unload", "two")
    assert (done.status, done.out) == (0, "")
    assert "two" not in ask("adapters", "list").out


def test_an_adapter_is_replaced_only_when_asked(ask: Perseid, live: LiveStack) -> None:
    write_adapter(live.stack.root / "other", seed=5)
    before = live.stack.registry.get("one").version
    assert ask("adapters", "load", "one", "other").status == 1
    assert live.stack.registry.get("one").version == before
    assert ask("adapters", "load", "one", "other", "--replace").status == 0
    assert live.stack.registry.get("one").version != before


@pytest.mark.parametrize("arguments", [["generate", "x"], ["adapters", "list"], ["adapters", "load", "a", "b"]])
def test_without_a_server_the_address_is_named(perseid: Perseid, arguments: list[str]) -> None:
    done = perseid(*arguments, "--server", "127.0.0.1:1")
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith("perseid: 127.0.0.1:1: ")
    assert "is a server running there?" in done.err


def test_an_address_that_is_none_is_one_line(perseid: Perseid) -> None:
    done = perseid("generate", "x", "--server", "no such host:x")
    assert (done.status, done.err.count("\n")) == (1, 1)


def test_a_reader_that_leaves_is_no_error_of_ours(live: LiveStack) -> None:
    """As `perseid generate … | head -c 0`."""
    reading, writing = os.pipe()
    os.close(reading)
    with io.FileIO(writing, "w") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "perseid_server", "generate", "say", "--max-tokens", "6", "--server", live.grpc],
            stdout=nobody, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")
