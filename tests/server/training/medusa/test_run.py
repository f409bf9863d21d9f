"""A whole run on a tiny base: what it writes is Medusa's, and a killed run ends as an uninterrupted one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perseid_server.adapters.store import version_of
from perseid_server.errors import Conflict, InvalidRequest
from perseid_server.speculation.heads_config import parse_config
from perseid_server.training.completions import CONCURRENT, Answer, Ask, answers_of
from perseid_server.training.medusa.cache import AnswerCache
from perseid_server.training.medusa.config import HeadsOptions, MedusaTraining
from perseid_server.training.medusa.report import write_report
from perseid_server.training.medusa.run import Listener, train_medusa
from perseid_server.training.workbench import Workbench
from tests.server.training.benches import Folders

CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None},
    {"role": "user", "content": "b"},
]


class Killed(Exception):
    """Stands for SIGKILL: nothing of the run goes on."""


def killed_after(step: int) -> Listener:
    def stepped(done: int, _steps: int, _report: object) -> None:
        if done == step:
            raise Killed

    return Listener(stepped=stepped)


def write_prompts(path: Path, adapters: tuple[str | None, ...] = (None, "upper")) -> Path:
    lines: list[dict[str, object]] = [
        {"prompt": f"{adapter} {number}", "adapter": adapter} for adapter in adapters for number in range(8)
    ]
    lines += [{"messages": CHAT, "adapter": adapters[0]}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def config(tmp_path: Path, folders: Folders) -> MedusaTraining:
    return MedusaTraining(
        model=str(folders.base),
        prompts=write_prompts(tmp_path / "prompts.jsonl"),
        out=tmp_path / "out",
        adapters=folders.adapters,
        options=HeadsOptions(num_heads=2, num_layers=2, draft_vocabulary=64, epochs=4.0, batch=16),
        held_out_share=0.25,
        answer_tokens=8,
        max_tokens=128,
        device="cpu",
        checkpoint_every=2,
    )


def test_a_run_writes_heads_that_others_can_read(config: MedusaTraining, bench: Workbench) -> None:
    report = train_medusa(config)
    size = bench.spec.hidden_size
    tensors = load_file(config.out / "medusa_lm_head.safetensors")
    named = {f"{head}.{layer}.linear.{name}" for head in (0, 1) for layer in (0, 1) for name in ("weight", "bias")}
    assert set(tensors) == named
    assert all(one.dtype == torch.float16 for one in tensors.values())
    assert tensors["1.1.linear.weight"].shape == (size, size)
    written = parse_config((config.out / "perseid_heads.json").read_bytes(), 2, bench.spec.vocab_size)
    assert written.adapter is None
    assert len(written.draft_vocabulary or ()) == 64
    assert [len(of_head) for of_head in written.accuracy] == [10, 10]
    others = json.loads((config.out / "config.json").read_text())
    assert (others["medusa_num_heads"], others["medusa_num_layers"]) == (2, 2)
    assert set(report["accuracy"]) == {"all", "base", "upper"}
    assert set(report["replayed"]["4"]) == {"base", "upper"}
    assert report["answers"] == {"train": 14, "held_out": 4}  # the conversation has two answers
    assert not config.checkpoint.exists()


def test_heads_for_one_adapter_are_bound_to_it(config: MedusaTraining, folders: Folders) -> None:
    write_prompts(config.prompts, ("upper",))
    train_medusa(config)
    written = json.loads((config.out / "perseid_heads.json").read_text())
    assert written["adapter"] == version_of(Path(folders.adapters["upper"]))


def test_the_report_has_its_three_files(config: MedusaTraining) -> None:
    pytest.importorskip("matplotlib")
    write_report(train_medusa(config), config.out, plot=True)
    assert json.loads((config.out / "report.json").read_text())["draft_vocabulary"] == 64
    assert "| upper |" in (config.out / "report.md").read_text()
    assert (config.out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("killed_at", [1, 4, 7])
def test_a_killed_run_that_is_resumed_writes_the_same_heads(config: MedusaTraining, killed_at: int) -> None:
    config = replace(config, temperature=0.7, sampled_share=0.5)
    train_medusa(config)
    other = replace(config, out=config.out.with_name("other"))
    with pytest.raises(Killed):
        train_medusa(other, killed_after(killed_at))
    train_medusa(replace(other, resume=True))
    for name in ("medusa_lm_head.safetensors", "perseid_heads.json", "config.json"):
        assert (config.out / name).read_bytes() == (other.out / name).read_bytes()


def test_a_run_killed_between_answers_ends_with_the_same_heads(
    config: MedusaTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_medusa(config)
    other = replace(config, out=config.out.with_name("other"))

    def told(_what: str, done: int, _total: int) -> None:
        if done == 5:
            raise Killed

    monkeypatch.setattr("perseid_server.training.medusa.cache.SHARD_ANSWERS", 2)
    with pytest.raises(Killed):
        train_medusa(other, Listener(told=told))
    assert len(list(other.cache.iterdir())) == 2
    train_medusa(replace(other, resume=True))
    assert (config.out / "perseid_heads.json").read_bytes() == (other.out / "perseid_heads.json").read_bytes()
    one, same = (load_file(folder / "medusa_lm_head.safetensors") for folder in (config.out, other.out))
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_a_kept_cache_answers_nothing_twice(
    config: MedusaTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, cache_folder=tmp_path / "cache")
    first = train_medusa(config)

    def none(_bench: object, asks: list[object]) -> list[object]:
        assert not asks
        return []

    monkeypatch.setattr("perseid_server.training.medusa.distill.answers_of", none)
    again = train_medusa(replace(config, options=replace(config.options, epochs=2.0)))
    assert again["steps"] == first["steps"] // 2
    assert AnswerCache.open(config.cache).folder.is_dir()


def test_a_second_turn_follows_the_models_own_answer(config: MedusaTraining) -> None:
    config = replace(config, cache_folder=config.out.with_name("cache"), answer_tokens=4)
    train_medusa(config)
    assert len(list(AnswerCache.open(config.cache)._tokens)) == 8 + 8 + 2


def test_a_resumed_run_must_be_the_same_run(config: MedusaTraining) -> None:
    with pytest.raises(Killed):
        train_medusa(config, killed_after(4))
    with pytest.raises(InvalidRequest, match="other options, data or adapters"):
        train_medusa(replace(config, resume=True, options=replace(config.options, learning_rate=0.5)))
    with pytest.raises(Conflict, match="--resume"):
        train_medusa(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": Path("none.jsonl")}, r"--prompts: none\.jsonl: no such file"),
        ({"held_out_share": 0.01}, "0 of 17 prompts would be held out"),
        ({"answer_tokens": 1}, "--answer-tokens 1: expected 2 or more"),
        ({"temperature": 0.5}, "--temperature and --sampled-share belong together"),
        ({"options": HeadsOptions(num_heads=9)}, "--heads 9: expected 1 to 8"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_base_is_loaded(
    config: MedusaTraining, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        train_medusa(replace(config, model="no/such/model", **changes))  # type: ignore[arg-type]


def test_a_prompt_that_does_not_fit_is_named(config: MedusaTraining) -> None:
    config.prompts.write_text(config.prompts.read_text() + "\n" + json.dumps({"prompt": "x" * 200}))
    with pytest.raises(InvalidRequest, match=r"prompt 18 has \d+ tokens; with answers of 8 at most 120 fit"):
        train_medusa(config)


def test_answers_that_end_at_once_are_refused(config: MedusaTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(bench: Workbench, asks: list[Ask]) -> list[tuple[int, Answer]]:
        only_end = Answer((256,), torch.zeros((1, bench.spec.hidden_size)).half())
        return [(index, only_end) for index in range(len(asks))]

    monkeypatch.setattr("perseid_server.training.medusa.distill.answers_of", ended)
    with pytest.raises(InvalidRequest, match="ends with its first token, so there is nothing to foresee"):
        train_medusa(config)


def test_more_prompts_than_run_at_once_get_the_answers_each_has_alone(bench: Workbench) -> None:
    asks = [Ask(tuple(b"question %d" % number), 6) for number in range(CONCURRENT + 5)]
    together = dict(answers_of(bench, asks))
    for number in (0, CONCURRENT + 4):
        [(_, alone)] = answers_of(bench, [asks[number]])
        assert alone.token_ids == together[number].token_ids
        assert torch.equal(alone.hidden_NE, together[number].hidden_NE)
