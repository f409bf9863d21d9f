"""`perseid train medusa`, from prompts to heads with their report."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perseid_server.errors import InvalidRequest
from perseid_server.speculation.grow import expected_tokens, grow
from perseid_server.speculation.heads_config import MAX_HEADS, HeadsConfig
from perseid_server.training.checkpoints import load_checkpoint, refuse_unfinished, save_checkpoint
from perseid_server.training.completions import CONCURRENT
from perseid_server.training.medusa.accuracy import REPLAYED_SIZES, TREE_SIZES, Judged, judge
from perseid_server.training.medusa.cache import AnswerCache
from perseid_server.training.medusa.config import MedusaTraining
from perseid_server.training.medusa.distill import Answered, distill, held_out_prompts
from perseid_server.training.medusa.files import write_heads
from perseid_server.training.medusa.heads import HeadsTrainer, StepReport
from perseid_server.training.medusa.positions import NOT_DRAFTED, Positions, draft_vocabulary, positions_of
from perseid_server.training.medusa.prompts import Prompt, read_prompts
from perseid_server.training.workbench import Workbench, open_workbench

TABLE_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Listener:
    """Hears how a run goes on."""

    stepped: Callable[[int, int, StepReport], None] = lambda _step, _steps, _report: None
    told: Callable[[str, int, int], None] = lambda _what, _done, _total: None


def train_medusa(config: MedusaTraining, listener: Listener = Listener()) -> dict[str, Any]:
    """Let the model answer, train heads on its hidden states, judge them, write them into `config.out`. Returns the
    report.

    Killed, it goes on with `config.resume` and ends with the same heads.
    """
    _check(config)
    prompts = read_prompts(config.prompts, config.adapters)
    held_out = held_out_prompts(prompts, config)
    if not held_out or len(held_out) == len(prompts):
        raise InvalidRequest(
            f"--prompts: {len(held_out)} of {len(prompts)} prompts would be held out; expected some to learn from and "
            "some to judge by: give more prompts, or another --held-out-share",
            field="prompts",
        )
    if not config.resume:
        refuse_unfinished(config.checkpoint)
    bench = open_workbench(
        config.model,
        config.adapters,
        device=config.device,
        max_rows=min(len(prompts), CONCURRENT) * config.max_tokens,
        max_tokens=config.max_tokens,
    )
    answers = distill(bench, prompts, held_out, config, listener.told)
    return _Run(config, bench, prompts, held_out, answers, listener).run()


def _check(config: MedusaTraining) -> None:
    """What would be refused later, before hours are spent on it."""
    if not config.prompts.is_file():
        raise InvalidRequest(f"--prompts: {config.prompts}: no such file; expected JSON lines", field="prompts")
    if not 1 <= config.options.num_heads <= MAX_HEADS:
        raise InvalidRequest(f"--heads {config.options.num_heads}: expected 1 to {MAX_HEADS}", field="heads")
    if config.answer_tokens < 2:
        raise InvalidRequest(
            f"--answer-tokens {config.answer_tokens}: expected 2 or more: heads tell what follows an answer's first "
            "token",
            field="answer-tokens",
        )
    if bool(config.sampled_share) != bool(config.temperature):
        raise InvalidRequest(
            "--temperature and --sampled-share belong together: how answers are sampled, and how many of them",
            field="temperature",
        )


@dataclass(frozen=True, slots=True)
class _Run:
    config: MedusaTraining
    bench: Workbench
    prompts: Sequence[Prompt]
    held_out: frozenset[int]
    answers: Sequence[Answered]
    listener: Listener

    def run(self) -> dict[str, Any]:
        train = [one for one in self.answers if one.prompt not in self.held_out]
        kept = [one for one in self.answers if one.prompt in self.held_out]
        vocab_size = self.bench.spec.vocab_size
        vocabulary = draft_vocabulary(
            (one.token_ids for one in train), self.config.options.draft_vocabulary, vocab_size
        )
        cache = AnswerCache.open(self.config.cache)
        learned, judged_by = (
            positions_of(cache, part, self.config.options.num_heads, vocabulary, vocab_size) for part in (train, kept)
        )
        if not (len(learned) and len(judged_by)):
            raise InvalidRequest(
                "--prompts: every answer to learn from, or to judge by, ends with its first token, so there is nothing "
                "to foresee; give other prompts",
                field="prompts",
            )
        lm_head_VE = self._lm_head(vocabulary)
        trainer, seconds = self._trained(learned, lm_head_VE)
        judged = judge(
            trainer.heads, judged_by, lm_head_VE, lambda done, total: self.listener.told("judging", done, total)
        )
        report = self._report(learned, judged, len(train), len(kept), lm_head_VE.shape[0], seconds, trainer)
        told = {name: report[name] for name in ("base", "steps", "seed", "positions", "adapters")}
        heads_config = HeadsConfig(self._only_adapter(), vocabulary, judged.accuracy())
        write_heads(self.config.out, trainer.heads, heads_config, self.bench.spec.name, told)
        shutil.rmtree(self.config.checkpoint, ignore_errors=True)
        return report

    def _lm_head(self, vocabulary: Sequence[int] | None) -> Tensor:
        """Its rows for the draft vocabulary, on the device."""
        checkpoint = self.bench.checkpoint
        weight_VE = (checkpoint.lm_head() or checkpoint.embedding()).dequantize()
        if vocabulary is not None:
            weight_VE = weight_VE[torch.tensor(vocabulary)]
        dtype = torch.bfloat16 if self.config.options.bfloat16 else torch.float32
        return weight_VE.to(self.bench.decoder.device, dtype)

    def _trained(self, positions: Positions, lm_head_VE: Tensor) -> tuple[HeadsTrainer, float]:
        """All steps taken, from the last checkpoint on; and the seconds they took, before a kill as well."""
        config, options = self.config, self.config.options
        steps = max(1, round(options.epochs * len(positions) / min(options.batch, len(positions))))
        trainer = HeadsTrainer(options, positions, lm_head_VE, steps)
        versions = {one.name: one.version for one in self.bench.adapters}
        identity = config.identity(self.bench.spec.hash, versions)
        seconds = 0.0
        state = load_checkpoint(config.checkpoint, identity) if config.resume else None
        if state is not None:
            trainer.load_state(state["trainer"])
            seconds = state["seconds"]
        while trainer.step_number < steps:
            started = time.monotonic()
            report = trainer.step()
            seconds += time.monotonic() - started
            self.listener.stepped(trainer.step_number, steps, report)
            if trainer.step_number % config.checkpoint_every == 0 or trainer.step_number == steps:
                save_checkpoint(config.checkpoint, identity, {"trainer": trainer.state(), "seconds": seconds})
        return trainer, seconds

    def _only_adapter(self) -> str | None:
        """Version of the adapter that all prompts name; None where the base or a second one answers too."""
        [*names] = {prompt.adapter for prompt in self.prompts}
        versions = {one.name: one.version for one in self.bench.adapters}
        return versions[names[0]] if len(names) == 1 and names[0] is not None else None

    def _report(
        self,
        learned: Positions,
        judged: Judged,
        num_train: int,
        num_kept: int,
        num_draft_tokens: int,
        seconds: float,
        trainer: HeadsTrainer,
    ) -> dict[str, Any]:
        accuracy = judged.accuracy()
        targets_MH = judged.positions.targets_MH
        return {
            "base": self.bench.spec.name,
            "adapters": {one.name: one.version for one in self.bench.adapters},
            "steps": trainer.step_number,
            "seed": self.config.options.seed,
            "minutes": round(seconds / 60, 1),
            "answers": {"train": num_train, "held_out": num_kept},
            "positions": {"train": len(learned), "held_out": len(judged.positions)},
            "draft_vocabulary": num_draft_tokens,
            "drafted_share": 1 - float((targets_MH == NOT_DRAFTED).sum() / judged.came_MH.sum()),
            "accuracy": {"all": _rounded(accuracy)} | {name: _rounded(of) for name, of in judged.by_source().items()},
            "expected": {
                str(size): round(expected_tokens(accuracy, grow(accuracy, size)), TABLE_DIGITS) for size in TREE_SIZES
            },
            "replayed": {
                str(size): {name: round(of, TABLE_DIGITS) for name, of in judged.tokens_per_step(size).items()}
                for size in REPLAYED_SIZES
            },
        }


def _rounded(table: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(share, TABLE_DIGITS) for share in of_head] for of_head in table]
