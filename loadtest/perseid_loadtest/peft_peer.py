"""The peer that is always at hand: transformers + PEFT on the same weights, float32, one padded batch.

Run as a process of its own (`python -m perseid_loadtest.peft_peer GGUF …`) so that its memory is its own; it answers
the cases that `lines` brings. PEFT mixes adapters in a batch through `adapter_names`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from perseid_loadtest.lines import serve
from perseid_loadtest.workload import Case, Job, Workload

BASE = "__base__"
"""PEFT's name for "no adapter" in `adapter_names`."""

Model = PreTrainedModel | PeftModel


def load(gguf: Path, adapters: Sequence[str]) -> Model:
    """The dequantised base with every NAME=FOLDER adapter, ready to mix."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    peft = None
    for named in adapters:
        name, _, folder = named.partition("=")
        if peft is None:
            peft = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            peft.load_adapter(folder, adapter_name=name)
    return (model if peft is None else peft).eval()


@torch.inference_mode()
def decode_rate(model: Model, jobs: Sequence[Job], *, mixes: bool) -> float:
    """Decode tokens a second of the whole batch, prefill left out."""
    inputs, mixed = _inputs(jobs, mixes=mixes)
    output = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **mixed)
    steps, started = jobs[0].tokens, 0.0
    for step in range(steps + 1):
        if step == 1:  # the first decode step warms allocators
            started = time.perf_counter()
        tokens = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=tokens, past_key_values=output.past_key_values, use_cache=True, **mixed)
    return len(jobs) * steps / (time.perf_counter() - started)


@torch.inference_mode()
def prefill_rate(model: Model, jobs: Sequence[Job], *, mixes: bool) -> float:
    """Prompt tokens a second of the first forward pass."""
    inputs, mixed = _inputs(jobs, mixes=mixes)
    started = time.perf_counter()
    model(input_ids=inputs, use_cache=True, logits_to_keep=1, **mixed)
    return inputs.numel() / (time.perf_counter() - started)


def _inputs(jobs: Sequence[Job], *, mixes: bool) -> tuple[torch.Tensor, dict[str, Any]]:
    mixed = {"adapter_names": [job.adapter or BASE for job in jobs]} if mixes else {}
    return torch.tensor([job.prompt for job in jobs]), mixed


def main() -> None:
    """Load, then answer cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    model = load(options.gguf, options.adapter)
    names = tuple(named.partition("=")[0] for named in options.adapter)
    workload = Workload(options.prompt, options.tokens, names)

    def rate(case: Case, turn: int) -> float:
        measure = prefill_rate if case.phase == "prefill" else decode_rate
        return measure(model, workload.jobs(case, turn), mixes=bool(names))

    serve(rate)


if __name__ == "__main__":
    main()
