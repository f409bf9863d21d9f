"""Every family against transformers: the same float32 logits, whole, in chunks, step by step and beside another."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perseid_server.model.decoder import Decoder
from tests.server.model.passes import Part, Passes, assert_logits, backend_named, decoder_of
from tests.server.model.tiny import Base, logits_by, random_prompt, write_tiny

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SMOLLM2 = {
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}


def rope(scaling: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": scaling | {"rope_theta": 10000.0}}


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama-untied": ("llama", torch.float16, {"tie_word_embeddings": False}),
    "llama-tied": ("llama", torch.bfloat16, {"tie_word_embeddings": True}),
    "llama-biases": ("llama", torch.float32, {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", torch.float32, rope(LLAMA3)),
    "llama-linear": ("llama", torch.bfloat16, rope({"rope_type": "linear", "factor": 4.0})),
    "llama-dynamic": ("llama", torch.float32, rope({"rope_type": "dynamic", "factor": 4.0})),
    "llama-yarn": ("llama", torch.float32, rope(YARN)),
    "mistral": ("mistral", torch.bfloat16, {"sliding_window": 512}),
    "mistral-wide-heads": ("mistral", torch.float32, {"head_dim": 64}),
    "qwen2": ("qwen2", torch.bfloat16, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", torch.float16, {"head_dim": 64}),
    "smollm2": ("llama", torch.bfloat16, SMOLLM2),
}
LONG, SHORT = random_prompt(1, 330), random_prompt(2, 211)


@dataclass(frozen=True)
class Case:
    """One base on one backend, and what transformers says to the prompts."""

    base: Base
    decoder: Decoder
    long: Tensor
    short: Tensor

    def passes(self, *prompts: list[int]) -> Passes:
        return Passes(self.decoder, self.base.checkpoint, prompts)


@pytest.fixture(scope="module", params=CASES)
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Tensor, Tensor]:
    family, dtype, changes = CASES[request.param]
    base = Base(write_tiny(tmp_path_factory.mktemp(request.param), family, dtype, **changes))
    return base, logits_by(base.oracle, LONG), logits_by(base.oracle, SHORT)


@pytest.fixture(scope="module", params=["eager", "native"])
def case(request: pytest.FixtureRequest, judged: tuple[Base, Tensor, Tensor]) -> Case:
    base, long, short = judged
    return Case(base, decoder_of(base.checkpoint, backend_named(request.param), len(LONG)), long, short)


def test_whole_prompt(case: Case) -> None:
    (logits,) = case.passes(LONG).run(Part(0, 0, len(LONG)))
    assert_logits(logits, case.long)


def test_prompt_in_chunks(case: Case) -> None:
    # Chunks of one row, within a block, to its very end, over several, and one that ends in the middle.
    cuts = [0, 1, 7, 16, 48, 113, 300, len(LONG)]
    passes = case.passes(LONG)
    logits = [passes.run(Part(0, start, end))[0] for start, end in pairwise(cuts)]
    assert_logits(torch.cat(logits), case.long)


def test_decode_step_by_step(case: Case) -> None:
    passes, first = case.passes(LONG), len(LONG) - 35  # over two block borders
    passes.run(Part(0, 0, first))
    steps = [passes.run(Part(0, at, at + 1))[0] for at in range(first, len(LONG))]
    assert_logits(torch.cat(steps), case.long[first:])


def test_two_sequences_in_one_batch(case: Case) -> None:
    passes = case.passes(LONG, SHORT)
    first = passes.run(Part(0, 0, 150), Part(1, 0, 210))
    second = passes.run(Part(1, 210, 211), Part(0, 150, len(LONG)))  # a decode beside a chunk, in another order
    assert_logits(torch.cat((first[0], second[1])), case.long)
    assert_logits(torch.cat((first[1], second[0])), case.short)


def test_a_backends_whole_pass_is_its_ops_one_by_one(case: Case) -> None:
    """Bit by bit: prefill, chunks and decodes."""
    bound, by_ops = case.passes(LONG, SHORT), case.passes(LONG, SHORT)
    for parts in ((Part(0, 0, 150), Part(1, 0, 210)), (Part(1, 210, 211), Part(0, 150, 300)), (Part(0, 300, 301),)):
        for one, other in zip(bound.run(*parts), by_ops.run_op_by_op(*parts), strict=True):
            assert torch.equal(one, other)


def test_triton_in_its_interpreter(tmp_path: Path) -> None:
    """The interpreter is slow: one layer, few tokens, and the family with the most ops."""
    small = {"head_dim": 32, "num_hidden_layers": 1}
    base = Base(write_tiny(tmp_path, "qwen3", torch.bfloat16, **small))
    decoder = decoder_of(base.checkpoint, backend_named("triton"), 32)
    prompts = [LONG[:21], SHORT[:9]]
    passes = Passes(decoder, base.checkpoint, prompts)
    first = passes.run(Part(0, 0, 20), Part(1, 0, 9))
    (last,) = passes.run(Part(0, 20, 21))
    assert_logits(torch.cat((first[0], last)), logits_by(base.oracle, prompts[0]))
    assert_logits(first[1], logits_by(base.oracle, prompts[1]))
