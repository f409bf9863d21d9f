"""Where a setting comes from: command line, then PERSEID_* variables, then the file, then the default."""

from pathlib import Path

import pytest

from perseid_server.config import NamedSource, ServeConfig
from tests.server.cli.running import Done, Perseid


@pytest.fixture
def served(perseid: Perseid, monkeypatch: pytest.MonkeyPatch):
    """Runs `perseid serve` up to its configuration."""
    seen: list[ServeConfig] = []
    monkeypatch.setattr("perseid_server.cli.serve._serve", lambda config: config)
    monkeypatch.setattr("uvloop.run", seen.append)

    def serve(*arguments: str) -> ServeConfig:
        done = perseid(*arguments)
        assert (done.status, done.err) == (0, "")
        return seen[-1]

    return serve


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "perseid.toml"
    path.write_text(
        '[serve]\nhttp-port = 1\ngrpc_port = 2\nadapter = ["a=x", "b=y"]\nprefix-cache = false\nspeculation = "off"\n'
    )
    return str(path)


def test_without_anything_the_defaults_hold(served) -> None:
    assert served("serve") == ServeConfig()


def test_a_file_wins_over_the_defaults(served, file: str) -> None:
    config = served("--config", file, "serve")
    assert (config.http_port, config.grpc_port, config.prefix_cache, config.speculation) == (1, 2, False, "off")
    assert config.adapter == ("a=x", "b=y")


def test_variables_win_over_the_file(served, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSEID_HTTP_PORT", "11")
    monkeypatch.setenv("PERSEID_CONFIG", file)
    config = served("serve")
    assert (config.http_port, config.grpc_port) == (11, 2)


def test_the_command_line_wins_over_all(served, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSEID_HTTP_PORT", "11")
    config = served("--config", file, "serve", "--http-port", "111", "--prefix-cache", "--adapter", "c=z")
    assert (config.http_port, config.grpc_port, config.prefix_cache, config.adapter) == (111, 2, True, ("c=z",))


def test_the_file_may_be_named_behind_the_command(served, file: str) -> None:
    assert served("serve", "--config", file).http_port == 1


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MODEL", "org/name", "org/name"),
        ("ADAPTER_ROOT", "/a", (Path("/a"),)),
        ("ALLOW_HUB", "true", True),
        ("KV_MEMORY", "64", 64),
        ("GRACE", "0", 0.0),
        ("LOG_FORMAT", "json", "json"),
        ("SPECULATION", "ngram", "ngram"),
    ],
)
def test_every_kind_of_setting_can_be_a_variable(
    served, monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"PERSEID_{name}", text)
    assert getattr(served("serve"), name.lower()) == value


def is_one_line(done: Done) -> bool:
    """What an error looks like: no traceback, no frame."""
    return done.err.startswith("perseid: ") and done.err.count("\n") == 1 and done.out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--http-port", "99999"], ["99999", "--http-port"]),
        (["--http-port", "-1"], ["-1", "--http-port"]),
        (["--grpc-port", "abc"], ["abc", "--grpc-port"]),
        (["--kv-memory", "0"], ["0", "--kv-memory"]),
        (["--max-num-seqs", "many"], ["many", "--max-num-seqs"]),
        (["--grace", "-1"], ["-1", "--grace"]),
        (["--device", "tpu"], ["tpu", "--device"]),
        (["--log-level", "loud"], ["loud", "--log-level"]),
        (["--speculation", "fast"], ["fast", "--speculation"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_options_are_one_line_and_status_2(perseid: Perseid, arguments: list[str], words: list[str]) -> None:
    done = perseid("serve", *arguments)
    assert (done.status, is_one_line(done)) == (2, True), done.err
    assert all(word in done.err for word in words)


@pytest.mark.parametrize("arguments", [["nonsense"], ["adapters", "nonsense"], ["adapters", "load"], ["generate"]])
def test_bad_commands_are_one_line_and_status_2(perseid: Perseid, arguments: list[str]) -> None:
    done = perseid(*arguments)
    assert (done.status, is_one_line(done)) == (2, True), done.err


def test_a_bad_variable_is_named(perseid: Perseid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSEID_HTTP_PORT", "abc")
    done = perseid("serve")
    assert (done.status, is_one_line(done), "PERSEID_HTTP_PORT" in done.err) == (2, True, True), done.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[serve]\nhttp-port = 'abc'\n", ["http-port", "abc"]),
        ("[serve]\nhttpx-port = 1\n", ["httpx-port"]),
        ("[serve]\nhttp-port = 70000\n", ["70000"]),
        ("[serve\n", ["TOML"]),
        ("\xff", ["bad.toml"]),
        ("a = " + "[" * 5000, ["TOML"]),
    ],
    ids=["bad value", "unknown name", "out of range", "not TOML", "not UTF-8", "nested"],
)
def test_a_bad_file_is_one_line(perseid: Perseid, tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content.encode("latin-1"))
    done = perseid("--config", str(path), "serve")
    assert (done.status != 0, is_one_line(done)) == (True, True), done.err
    assert all(word in done.err for word in words), done.err


@pytest.mark.parametrize("path", ["/nonexistent.toml", "/"])
def test_a_missing_file_is_one_line(perseid: Perseid, path: str) -> None:
    done = perseid("--config", path, "serve")
    assert (done.status, is_one_line(done), path in done.err) == (1, True, True), done.err


@pytest.mark.parametrize("text", ["name", "=source", "name=", "="])
def test_an_adapter_needs_a_name_and_a_source(text: str) -> None:
    with pytest.raises(ValueError, match="expected NAME=SOURCE"):
        NamedSource.parse(text)


def test_a_source_may_hold_an_equals_sign() -> None:
    assert NamedSource.parse("a=/x=y") == NamedSource("a", "/x=y")
