"""`perseid train`: from files to a gate set or to Medusa heads, and one line for what is wrong."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from perseid_router.gate_set import GateSet
from tests.server.cli.running import Perseid
from tests.server.training.benches import write_folders


def test_a_gate_set_from_the_command_line(perseid: Perseid, tmp_path: Path) -> None:
    folders = write_folders(tmp_path)
    arguments = ["--model", str(folders.base), "--out", str(tmp_path / "out"), "--steps", "2", "--max-tokens", "128"]
    for name, folder in folders.adapters.items():
        lines = [{"prompt": f"{name} {number}", "completion": "x" * number} for number in range(1, 8)]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(line) for line in lines))
        arguments += ["--adapter", f"{name}={folder}", "--data", f"{name}={data}"]
    generic = tmp_path / "generic.jsonl"
    generic.write_text("\n".join(json.dumps({"prompt": f"hello {n}", "completion": "yes"}) for n in range(5)))
    arguments += ["--generic", str(generic), "--generic-held-out", str(generic), "--no-plot", "--float16"]
    done = perseid("train", "gates", *arguments)
    assert done.status == 0, done.err
    assert "2 steps" in done.out
    written = GateSet.read(tmp_path / "out")
    assert [column.name for column in written.config.adapters] == list(folders.adapters)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 2
    assert (tmp_path / "out" / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", "a", "--data", "a=x"), "--adapter: expected NAME=SOURCE, got 'a'"),
        (("--adapter", "a=x", "--adapter", "a=y", "--data", "a=x"), "--adapter: a name is given twice"),
        (("--adapter", "a=x", "--data", "a=none.jsonl"), "none.jsonl: no such file; expected JSON lines"),
    ],
)
def test_what_is_wrong_is_one_line(perseid: Perseid, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = perseid("train", "gates", *arguments, "--no-plot", "--out", str(tmp_path / "out"))
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("perseid: ")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_medusa_heads_from_the_command_line(perseid: Perseid, tmp_path: Path) -> None:
    folders = write_folders(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"hello {n}", "adapter": "upper" if n % 2 else None} for n in range(8)]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "out"
    arguments = ["--model", str(folders.base), "--adapter", f"upper={folders.adapters['upper']}", "--heads", "2"]
    arguments += ["--prompts", str(prompts), "--out", str(out), "--answer-tokens", "6", "--max-tokens", "128"]
    arguments += ["--held-out-share", "0.25", "--draft-vocabulary", "0", "--batch", "8", "--no-plot"]
    done = perseid("train", "medusa", *arguments)
    assert done.status == 0, done.err
    assert "first candidates of the heads right: " in done.out
    written = json.loads((out / "perseid_heads.json").read_text())
    assert (written["draft_vocabulary"], len(written["accuracy"])) == (None, 2)
    assert set(load_file(out / "medusa_lm_head.safetensors")) == {
        f"{head}.0.linear.{name}" for head in (0, 1) for name in ("weight", "bias")
    }
    assert json.loads((out / "report.json").read_text())["answers"] == {"train": 6, "held_out": 2}
    assert (out / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "none.jsonl: no such file; expected JSON lines"),
        (("--adapter", "a"), "--adapter: expected NAME=SOURCE, got 'a'"),
        (("--temperature", "0.5"), "--temperature and --sampled-share belong together"),
    ],
)
def test_what_is_wrong_with_heads_is_one_line(
    perseid: Perseid, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}')
    prompts = tmp_path / ("prompts.jsonl" if arguments else "none.jsonl")
    done = perseid(
        "train", "medusa", *arguments, "--no-plot", "--prompts", str(prompts), "--out", str(tmp_path / "out")
    )
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("perseid: ")
    assert message in done.err
    assert done.err.count("\n") == 1
