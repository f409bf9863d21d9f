"""The base and the adapters with transformers and PEFT: for training and to compare the server with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tasks import Item, Task
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

BATCH = 25


def base_file(base: Path | None) -> Path:
    """The GGUF file meant by `--base`: the file, the only one in a folder, or the server's embedded base."""
    if base is None:
        from perseid_server.model.embedded import embedded_base  # noqa: PLC0415 (needed without --base only)

        return Path(embedded_base())
    if base.is_file():
        return base
    files = sorted(base.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{base} holds {len(files)} .gguf files; name the one to use")
    return files[0]


def load_base(base: Path | None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The base's weights in float32, exactly as its 4-bit blocks decode, and its tokenizer."""
    file = base_file(base)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.train(mode=False)
    model.requires_grad_(requires_grad=False)
    return cast("LlamaForCausalLM", model), cast("PreTrainedTokenizerBase", tokenizer)


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What `/v1/chat/completions` makes of one user message: the default system prompt comes first."""
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The prompt as token ids; the template has written the special tokens already."""
    return list(tokenizer(prompt_text(tokenizer, question), add_special_tokens=False)["input_ids"])


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The answer as token ids, ended as the model ends its turns."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, in the questions' order."""
    texts: list[str] = []
    for start in range(0, len(questions), BATCH):
        prompts = [prompt_text(tokenizer, question) for question in questions[start : start + BATCH]]
        batch = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = out[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.decode(new, skip_special_tokens=True)
    return texts


def score(model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item]) -> int:
    """How many items the model answers right."""
    texts = answers(model, tokenizer, [item.question for item in items], task.max_new_tokens)
    return sum(task.check(text, item) for text, item in zip(texts, items, strict=True))
