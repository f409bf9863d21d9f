"""The operator's files: API keys and settings. Each is taken or refused in one line that names the file, and what is
secret is not repeated."""

from dataclasses import fields
from pathlib import Path
from random import Random

import pytest

from perseid_server.access.key_file import read_keys
from perseid_server.access.keys import HASH_PREFIX, hash_text
from perseid_server.config import ServeConfig
from perseid_server.errors import InvalidRequest
from tests.fuzz.bounds import bounded_memory
from tests.fuzz.campaign import Campaign, fuzzer
from tests.fuzz.served import no_traceback
from tests.fuzz.toml_text import spoiled
from tests.server.cli.running import Perseid

SECRET = "psd_secret-of-the-operator"
KEYS = {
    "keys.web": {
        "hash": f'"{hash_text("a")}"', "roles": '["generate", "admin"]', "tenant": '"acme"', "adapters": '["acme-*"]',
        "weight": "2.0", "requests_per_minute": "600", "tokens_per_day": "5_000_000", "expires": "2027-01-31",
        "enabled": "true",
    },
    "keys.ops": {"hash": f'"{hash_text("b")}"', "roles": '["admin"]', "expires": "2027-01-31T10:00:00Z"},
    "keys.pasted": {"hash": f'"{SECRET}"', "tokens_total": "7"},
}  # fmt: skip
SETTINGS = {
    "serve": {
        "http-port": "0", "grpc_port": "0", "adapter": '["a=x", "b=y"]', "prefix-cache": "false",
        "speculation": '"off"',
        "kv-memory": "64", "grace": "1.5", "log-level": '"error"', "adapter-root": '["/a"]', "max-timeout": "5",
    }
}  # fmt: skip


@fuzzer(short=200, long=2500)
def test_key_files(campaign: Campaign, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"

    def check(random: Random) -> None:
        good = {name: table for name, table in KEYS.items() if name != "keys.pasted" or random.random() < 0.3}
        path.write_bytes(spoiled(random, good, ["hash", "rolls", "weight", "expires"]))
        with bounded_memory():
            try:
                ring = read_keys(path)
            except InvalidRequest as error:
                check_refusal(error.message, path)
                return
        for name, key in ring.keys.items():
            assert key.caller.key == name == key.name
            assert key.caller.roles <= {"generate", "admin"}
            assert 0 < key.caller.weight <= 1000
            assert len(key.digest) == 32
            assert key.expires is None or key.expires.tzinfo is not None
            assert HASH_PREFIX not in repr(key)

    campaign.run(check)


def check_refusal(message: str, path: Path) -> None:
    """One line that names the file and gives no key away."""
    assert message.startswith(f"--api-keys {path}")
    assert message.isprintable()
    assert SECRET not in message


@pytest.fixture
def perseid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Perseid:
    """The command up to its configuration."""
    monkeypatch.setattr("perseid_server.cli.serve.configure_logging", lambda *_: None)
    monkeypatch.setattr("perseid_server.cli.serve._serve", lambda config: config)
    monkeypatch.setattr("uvloop.run", lambda config: None)
    monkeypatch.setenv("COLUMNS", "1000")
    return Perseid(monkeypatch, capsys)


@fuzzer(short=15, long=120)
def test_settings_files(campaign: Campaign, perseid: Perseid, tmp_path: Path) -> None:
    path = tmp_path / "perseid.toml"
    options = [field.name.replace("_", "-") for field in fields(ServeConfig)]

    def check(random: Random) -> None:
        path.write_bytes(spoiled(random, SETTINGS, options))
        done = perseid("--config", str(path), "serve")
        no_traceback(done.err + done.out)
        assert done.status in {0, None} or (done.status in {1, 2} and done.err.startswith("perseid: ")), done.err
        assert done.err.count("\n") <= 1, done.err

    campaign.run(check)


@fuzzer(short=15, long=150)
def test_command_lines(campaign: Campaign, perseid: Perseid) -> None:
    options = [f"--{field.name.replace('_', '-')}" for field in fields(ServeConfig)]
    values = (
        "0", "-1", "1", "70000", "nan", "inf", "1e400", "", "a=b", "=", "true", "off", "/dev/null", "\0", "é",
        "x" * 5000, "[bold]x",
    )  # fmt: skip

    def check(random: Random) -> None:
        words = ["serve"]
        for _ in range(random.randint(1, 4)):
            option = random.choice(options)
            form = random.randrange(4)
            if form == 0:
                words += [option.replace("--", "--no-", 1)]
            elif form == 1:
                words += [f"{option}={random.choice(values)}"]
            else:
                words += [option, random.choice(values)]
        done = perseid(*words)
        no_traceback(done.err + done.out)
        assert done.status in {0, None} or (done.status in {1, 2} and done.err.startswith("perseid: ")), (words, done)

    campaign.run(check)
