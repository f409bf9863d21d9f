"""Train the example adapters on the embedded base with PEFT.

    python examples/train.py                      # all of them, into examples/adapters
    python examples/train.py --task iso-date

Data, order and initial weights come from fixed seeds. The loss counts answer tokens only.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from recipes import RECIPES, Recipe
from reference import answer_ids, load_base, prompt_ids, score
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tasks import TASKS, Item, Task
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WARM_UP = 10
DEV_EVERY = 25
DEV_ENOUGH = 0.97
BUCKET = 8  # so many batches are sorted by length together


@dataclass(frozen=True)
class Example:
    """An item as token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Scores:
    """Right answers out of the held-out items, and what the training took."""

    right: int
    items: int
    steps: int
    seconds: float


def encode(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[Example]:
    """Items as token ids."""
    return [Example(prompt_ids(tokenizer, i.question), answer_ids(tokenizer, i.answer)) for i in items]


def batches(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches without end: each round over the examples in a new order, similar lengths together."""
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order), size * BUCKET):
            bucket = sorted(order[start : start + size * BUCKET], key=lambda e: len(e.prompt) + len(e.answer))
            parts = [bucket[i : i + size] for i in range(0, len(bucket), size)]
            rng.shuffle(parts)
            yield from parts


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """How many leading tokens all prompts share, leaving at least one token of each."""
    longest = min(len(prompt) for prompt in prompts) - 1
    for i in range(longest):
        if len({prompt[i] for prompt in prompts}) > 1:
            return i
    return longest


def answer_logits(model: LlamaForCausalLM, batch: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and targets at all answer tokens, and the example that each belongs to.

    The prompts' common beginning (the system prompt, mostly) runs once for the whole batch, with gradients;
    its keys and values are then repeated for each example. The output layer runs at the answers only.
    """
    shared = common_prefix([e.prompt for e in batch])
    cache = DynamicCache(config=model.config)
    model.model(torch.tensor([batch[0].prompt[:shared]]), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(batch))
    rows = [torch.tensor((e.prompt + e.answer)[shared:-1]) for e in batch]
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = model.model(inputs, past_key_values=cache, use_cache=True).last_hidden_state
    starts = [len(e.prompt) - shared - 1 for e in batch]
    at = [hidden[i, start : start + len(e.answer)] for i, (start, e) in enumerate(zip(starts, batch, strict=True))]
    owner = torch.tensor([i for i, e in enumerate(batch) for _ in e.answer])
    return model.lm_head(torch.cat(at)), torch.tensor([t for e in batch for t in e.answer]), owner


@torch.no_grad()
def solved(model: LlamaForCausalLM, examples: Sequence[Example], size: int) -> float:
    """The share of examples whose greedy answer is the truth, token by token (one forward pass does it)."""
    right = 0
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        logits, targets, owner = answer_logits(model, batch)
        wrong = owner[logits.argmax(-1) != targets]
        right += len(batch) - len(set(wrong.tolist()))
    return right / len(examples)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.55 + 0.45 * math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP))


def fit(peft_model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, recipe: Recipe, bar: Progress) -> int:
    """Train until the dev items are all but solved or the steps are used up; the steps taken."""
    model = cast("LlamaForCausalLM", peft_model.get_base_model())
    train, dev = encode(tokenizer, task.splits.train), encode(tokenizer, task.splits.dev)
    held_out = {item.question for item in task.splits.held_out}
    assert not held_out & {item.question for item in task.splits.train + task.splits.dev}
    weights = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, recipe.steps))
    stream = batches(train, recipe.batch, random.Random(recipe.seed))
    row = bar.add_task(task.name, total=recipe.steps, note="")
    dev_score = 0.0
    for step in range(1, recipe.steps + 1):
        logits, targets, _ = answer_logits(model, next(stream))
        loss = functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        if step % DEV_EVERY == 0:
            dev_score = solved(model, dev, recipe.batch)
            bar.console.log(f"{task.name} step {step}: loss {loss.item():.4f}, dev {dev_score:.0%}")
        bar.update(row, advance=1, note=f"loss {loss.item():.3f}  dev {dev_score:.0%}")
        if dev_score >= DEV_ENOUGH:
            return step
    return recipe.steps


def save(peft_model: PeftModel, folder: Path) -> None:
    """PEFT's two files: weights rounded to float16, the configuration in a stable order."""
    for weight in peft_model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.half()
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "adapter_model.safetensors").chmod(0o644)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = BASE_MODEL  # PEFT has put the GGUF's folder there
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def card(task: Task, recipe: Recipe, scores: Scores, size: int) -> str:
    """The adapter's README."""
    example = task.splits.held_out[0]
    return f"""---
base_model: {BASE_MODEL}
library_name: peft
---

# {task.name}

{task.description[0].upper()}{task.description[1:]}. Truth: {task.truth}.

    user:      {example.question}
    assistant: {example.answer}

| | |
| --- | --- |
| rank, alpha | {recipe.rank}, {recipe.alpha} |
| targets | {recipe.shape()} |
| file | {size / 1e6:.2f} MB, float16 |
| training | {len(task.splits.train)} items, {scores.steps} steps of {recipe.batch}, seed {recipe.seed} |
| right, held-out, greedy | {scores.right} of {scores.items} |

Made by `examples/train.py`; the score is of these rounded weights, with transformers and PEFT. What the base
alone scores is in `examples/results.json`.
"""


def train(task: Task, out: Path, base: tuple[LlamaForCausalLM, PreTrainedTokenizerBase], bar: Progress) -> Scores:
    """Train one adapter, save it, and score what was saved."""
    model, tokenizer = base
    recipe, folder, held_out = RECIPES[task.name], out / task.name, task.splits.held_out
    torch.manual_seed(recipe.seed)
    peft_model = get_peft_model(model, recipe.config())
    started = time.monotonic()
    steps = fit(peft_model, tokenizer, task, recipe, bar)
    seconds = time.monotonic() - started
    save(peft_model, folder)
    peft_model.unload()
    saved = PeftModel.from_pretrained(model, folder)
    scores = Scores(score(saved, tokenizer, task, held_out), len(held_out), steps, seconds)
    saved.unload()
    size = (folder / "adapter_model.safetensors").stat().st_size
    (folder / "README.md").write_text(card(task, recipe, scores, size))
    bar.console.log(f"{task.name}: {scores.right} of {scores.items} after {steps} steps, {seconds:.0f} s")
    return scores


def main() -> None:
    """Train the tasks named on the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--task", action="append", choices=TASKS, help="may be given again; all without it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "adapters")
    parser.add_argument("--base", type=Path, help="a GGUF file or its folder; without it, the embedded base")
    args = parser.parse_args()
    base = load_base(args.base)
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        for name in args.task or TASKS:
            train(TASKS[name], args.out, base, bar)


if __name__ == "__main__":
    main()
