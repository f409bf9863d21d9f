"""PEFT is the oracle: for every module, the rank pages multiply to PEFT's own delta weight, and nothing else moves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from perseid_server.adapters.lora import PAGE_RANK, WEIGHTS_FILE, Site, check_adapter
from perseid_server.adapters.lowering import LoweredLinear, lower
from perseid_server.model.spec import FUSED_LINEARS, PARENT_OF_PROJECTION, BaseSpec, LinearShape

ALL = tuple(PARENT_OF_PROJECTION)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FULL_NAME = "model.layers.1.self_attn.q_proj"

# PEFT sorts a pattern's keys when it saves and takes the first that matches when it loads: they are sorted here too.
CASES: dict[str, dict[str, object]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": list(ALL)},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": list(ATTENTION)},
    "rank 1": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    "rank 17": {"r": 17, "lora_alpha": 5, "target_modules": ["gate_proj", "v_proj"]},
    "rank 256": {"r": 256, "lora_alpha": 512, "target_modules": ["k_proj", "up_proj"]},
    "one slice of a fused linear": {"r": 4, "target_modules": ["up_proj"]},
    "negative alpha": {"r": 4, "lora_alpha": -7, "target_modules": ["o_proj"]},
    "rank pattern by name": {
        "r": 8,
        "rank_pattern": {FULL_NAME: 33, "q_proj": 3, "self_attn.v_proj": 20},  # the first that matches wins
        "target_modules": list(ATTENTION),
    },
    "alpha pattern by name": {
        "r": 6,
        "lora_alpha": 9,
        "alpha_pattern": {"mlp.up_proj": 1, "layers.0.self_attn.q_proj": 100, "down.proj": 2},
        "target_modules": list(ALL),
    },
    "patterns as expressions": {
        "r": 5,
        "lora_alpha": 9,
        "rank_pattern": {".*(gate|down)_proj$": 11, "^model.layers.1.mlp.up_proj": 19, r"layers\.0\..*(q|v)_proj": 2},
        "alpha_pattern": {r"[a-z.]*layers\.\d+\.self_attn\.k_proj": 31, "(gate|up)_proj": 4, "layers.1.*": 77},
        "target_modules": list(ALL),
    },
    "a pattern that is anchored where it cannot match": {
        "r": 4,
        "rank_pattern": {"^layers.0.self_attn.q_proj": 9, "proj": 7, "layers.0": 3},
        "target_modules": ["q_proj"],
    },
    "patterns with rslora": {
        "r": 7,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 12},
        "alpha_pattern": {"v_proj": 40},
        "target_modules": ["q_proj", "v_proj"],
    },
    "one layer": {"r": 4, "layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj"]},
    "targets as an expression": {"r": 4, "target_modules": r".*\.0\.mlp\.(gate|down)_proj"},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "excluded modules": {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "gaussian start": {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["q_proj"]},
    "mica start": {"r": 4, "init_lora_weights": "mica", "target_modules": ["q_proj"]},
    "different ranks on one fused linear": {
        "r": 2,
        "rank_pattern": {"k_proj": 40, "v_proj": 16},
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    },
}


@pytest.fixture(scope="module")
def model_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=64,
        max_position_embeddings=64,
    )


@pytest.fixture
def new_model(model_config: LlamaConfig) -> Callable[[], LlamaForCausalLM]:
    def build() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(model_config)

    return build


@pytest.fixture(scope="module")
def base(model_config: LlamaConfig) -> BaseSpec:
    layer = LlamaForCausalLM(model_config).model.layers[0]
    shapes = {
        name: LinearShape(*reversed(getattr(getattr(layer, parent), name).weight.shape))
        for name, parent in PARENT_OF_PROJECTION.items()
    }
    return BaseSpec("tiny", "0" * 64, "LlamaForCausalLM", 2, 64, 2, 16, 64, 64, shapes)


def train(model: LlamaForCausalLM, folder: Path, fields: dict[str, object], dtype: torch.dtype) -> Path:
    """Save an adapter with random matrices, in a type."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**fields))
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight.data, std=0.5)
    wrapped.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def peft_deltas(model: LlamaForCausalLM, folder: Path) -> dict[str, torch.Tensor]:
    """Module name → PEFT's own delta weight."""
    wrapped = PeftModel.from_pretrained(model, folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A")
    }


def delta_of_pages(linear: LoweredLinear) -> torch.Tensor:
    """Σ over pages of B A, per slice: [slices, d_out, d_in]."""
    a, b = torch.from_numpy(linear.a), torch.from_numpy(linear.b)
    pages, _, d_in = a.shape
    by_slice = a.reshape(pages, -1, PAGE_RANK, d_in).double()
    return torch.einsum("psri,pro->soi", by_slice, b.double()).float()


def our_deltas(folder: Path, base: BaseSpec) -> dict[str, torch.Tensor]:
    """Module name → what the rank pages add to it; every module of every fused linear that was lowered."""
    deltas = {}
    for linear in lower(check_adapter(folder, base), base):
        products = delta_of_pages(linear)
        start = 0
        for index, projection in enumerate(FUSED_LINEARS[linear.fused]):
            end = start + base.projections[projection].out_features
            module = f"model.layers.{linear.layer}.{PARENT_OF_PROJECTION[projection]}.{projection}"
            deltas[module] = products[index, start:end]
            start = end
    return deltas


def assert_equal_deltas(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert theirs
    assert set(theirs) <= set(ours)
    for module, delta in ours.items():
        if module in theirs:
            assert (delta - theirs[module]).abs().max() <= 1e-6 * theirs[module].abs().max(), module
        else:
            assert not delta.any(), f"{module} is not adapted"


@pytest.mark.parametrize("case", CASES)
def test_rank_pages_multiply_to_pefts_delta(case, new_model, base, tmp_path):
    folder = train(new_model(), tmp_path, CASES[case], torch.float32)
    assert_equal_deltas(our_deltas(folder, base), peft_deltas(new_model(), folder))


def test_of_two_patterns_that_match_the_one_that_peft_takes_on_loading_wins(new_model, base, tmp_path):
    """In training it was the other one: PEFT's file does not tell."""
    fields = {"r": 4, "alpha_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 50}, "target_modules": ["q_proj"]}
    folder = train(new_model(), tmp_path, fields, torch.float32)
    assert_equal_deltas(our_deltas(folder, base), peft_deltas(new_model(), folder))
    assert check_adapter(folder, base).pairs[Site(0, "q_proj")].scale == 50 / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_are_widened_exactly(dtype, new_model, base, tmp_path):
    folder = train(new_model(), tmp_path, CASES["patterns with rslora"], dtype)
    assert_equal_deltas(our_deltas(folder, base), peft_deltas(new_model(), folder))


def test_an_adapter_of_the_bare_model_fits_with_its_own_module_names(new_model, base, tmp_path):
    """Trained on LlamaModel, names begin with `layers`: an anchored pattern means something else there."""
    fields = {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": ["q_proj"],
        "alpha_pattern": {"^layers.0.self_attn.q_proj": 50},
    }
    folder = train(new_model().model, tmp_path, fields, torch.float32)
    theirs = {f"model.{module}": delta for module, delta in peft_deltas(new_model().model, folder).items()}
    assert_equal_deltas(our_deltas(folder, base), theirs)


def test_info_tells_what_the_adapter_holds(new_model, base, tmp_path):
    info = check_adapter(train(new_model(), tmp_path, CASES["patterns with rslora"], torch.float16), base).info
    assert (info.kind, info.rank, info.num_pages) == ("rsLoRA", 12, 1)
    assert (info.targets, info.layers) == (("q_proj", "v_proj"), (0, 1))
    assert info.num_parameters == 2 * (12 * (64 + 64) + 7 * (64 + 32))
    assert info.nbytes == (tmp_path / WEIGHTS_FILE).stat().st_size


def test_pages_beyond_a_modules_rank_are_zero(new_model, base, tmp_path):
    folder = train(new_model(), tmp_path, CASES["different ranks on one fused linear"], torch.float32)
    (first, *_) = lower(check_adapter(folder, base), base)
    ranks = first.a.reshape(3, 3, PAGE_RANK, 64).any(axis=-1).sum(axis=(0, 2))
    assert ranks.tolist() == [2, 40, 16]
