"""The benchmark's command line."""

from pathlib import Path

import pytest

from perseid_loadtest.offline import parse


def test_defaults():
    options = parse([])
    assert (options.batches, options.rounds, options.peer, options.peer_base) == ([1, 4, 16], 5, [], {})
    assert options.out == Path("build/bench")


def test_peers_are_named():
    options = parse(["--peer", "llama=http://127.0.0.1:8080", "--peer", "vllm=http://h:1/x=y", "--peer-base", "vllm=m"])
    assert options.peer == [("llama", "http://127.0.0.1:8080"), ("vllm", "http://h:1/x=y")]
    assert options.peer_base == {"vllm": "m"}


def test_options_for_the_server_come_after_two_dashes():
    assert parse(["--skip-peft", "--", "--threads", "1"]).server_args == ["--threads", "1"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--peer", "http://127.0.0.1:8080"], "expected NAME=VALUE"),
        (["--peer", "=http://127.0.0.1:8080"], "expected NAME=VALUE"),
        (["--peer", "perseid=http://h"], "'perseid' is taken"),
        (["--peer", "a=http://h", "--peer", "a=http://i"], "'a' is taken"),
        (["--peer-base", "a=model"], "there is no --peer 'a'"),
        (["--rounds", "0"], "at least 1"),
        (["--batches", "4", "-1"], "at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, says, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert says in capsys.readouterr().err
