"""The peer of the offline benchmark: transformers + PEFT on the same weights, float32, one padded batch.

Run as a process of its own (`python -m perseid_loadtest.peft_peer GGUF …`) so that its memory is its own. Prints
one JSON line a measurement. PEFT mixes adapters in a batch through `adapter_names`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

BASE = "__base__"
"""PEFT's name for "no adapter" in `adapter_names`."""


def load(gguf: Path, adapters: Sequence[str]) -> PreTrainedModel | PeftModel:
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
def decode_rate(
    model: PreTrainedModel | PeftModel, names: Sequence[str] | None, batch: int, prompt: int, steps: int
) -> float:
    """Decode tokens a second of the whole batch, prefill left out."""
    generator = torch.Generator().manual_seed(batch)
    inputs = torch.randint(1000, 20000, (batch, prompt), generator=generator)
    mixed = {"adapter_names": list(names)} if names is not None else {}
    output = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **mixed)
    started = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first decode step warms allocators
            started = time.perf_counter()
        tokens = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=tokens, past_key_values=output.past_key_values, use_cache=True, **mixed)
    return batch * steps / (time.perf_counter() - started)


def adapters_of(kind: str, names: Sequence[str], batch: int) -> list[str] | None:
    """Which adapter each row of the batch uses."""
    if not names:
        return None
    if kind == "base":
        return [BASE] * batch
    if kind == "one":
        return [names[0]] * batch
    return [names[row % len(names)] for row in range(batch)]


def main() -> None:
    """Measure every (kind, batch) asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--kinds", nargs="+", default=["base", "one", "mixed"])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    model = load(options.gguf, options.adapter)
    names = [named.partition("=")[0] for named in options.adapter]
    for kind in options.kinds:
        for batch in options.batches:
            rate = decode_rate(model, adapters_of(kind, names, batch), batch, options.prompt, options.steps)
            print(json.dumps({"kind": kind, "batch": batch, "tokens_per_s": rate}), flush=True)


if __name__ == "__main__":
    main()
