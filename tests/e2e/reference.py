"""The oracle of the end-to-end proofs: PEFT + transformers in float32 on the embedded base's dequantised weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft import get_peft_model as add_adapter
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class AdapterRecipe:
    """A random adapter, strong enough that leaving it out changes the answer."""

    name: str
    rank: int
    targets: tuple[str, ...]
    seed: int
    rslora: bool = False
    layers: tuple[int, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, int], ...] = ()


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

RECIPES = (
    AdapterRecipe("r1-all", 1, ATTENTION + MLP, seed=1),
    AdapterRecipe("r4-qv", 4, ("q_proj", "v_proj"), seed=2),
    AdapterRecipe("r8-attention-rslora", 8, ATTENTION, seed=3, rslora=True),
    AdapterRecipe("r16-all", 16, ATTENTION + MLP, seed=4),
    AdapterRecipe("r17-mlp", 17, MLP, seed=5),
    AdapterRecipe(
        "r8-patterns",
        8,
        ("q_proj", "o_proj", "down_proj"),
        seed=6,
        rank_pattern=(("o_proj", 3), ("down_proj", 24)),
        alpha_pattern=(("q_proj", 40),),
    ),
    AdapterRecipe("r32-some-layers", 32, ("v_proj", "up_proj"), seed=7, layers=(0, 7, 8, 29)),
    AdapterRecipe("r64-down", 64, ("down_proj",), seed=8),
)
"""Eight adapters that differ in everything an adapter may differ in."""


def load_reference(gguf: Path) -> PreTrainedModel:
    """The base as transformers sees it: float32, dequantised from the same file that Perseid serves."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval()


def write_adapter(model: PreTrainedModel, recipe: AdapterRecipe, folder: Path, strength: float = 0.03) -> Path:
    """Save a random adapter the way PEFT saves a trained one."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        layers_to_transform=list(recipe.layers) if recipe.layers else None,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        task_type="CAUSAL_LM",
    )
    peft = add_adapter(model, config)
    generator = torch.Generator().manual_seed(recipe.seed)
    tensors = {}
    for name, tensor in get_peft_model_state_dict(peft).items():
        # Keep |ΔW| alike over ranks and widths, so that every adapter matters and none drowns the base.
        width = tensor.shape[1] ** 0.5 if "lora_A" in name else 1.0 / strength
        tensors[name] = torch.randn(tensor.shape, generator=generator) / width
    folder.mkdir(parents=True)
    peft.peft_config["default"].save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    peft.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return folder


@dataclass(frozen=True)
class ReferenceAnswer:
    """Greedy tokens, and at each the gap between the two largest logits."""

    token_ids: tuple[int, ...]
    margins: tuple[float, ...]


_KEEP = "keep the adapters that are active"


@dataclass(frozen=True)
class ReferenceGates:
    """Gates of all linears, by the tensor names of a gate set's file; columns name adapters, None is the base."""

    columns: tuple[str | None, ...]
    tensors: Mapping[str, torch.Tensor]
    k: int
    temperature: float
    allowed: frozenset[str | None]

    def hook(self, module_name: str) -> Callable[..., torch.Tensor]:
        """Adds the routed sum to what a module of that name gives."""
        parts = module_name.split(".")
        weight = self.tensors.get(f"layers.{parts[-3]}.{parts[-1]}.weight")

        def add(module: LoraLayer, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if weight is None:
                return output
            x = inputs[0][0].double()
            rows = [self._delta(module, row, weight.double() @ row) for row in x]
            return output + torch.stack(rows)[None].float()

        return add

    def _delta(self, module: LoraLayer, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        candidates = [c for c, name in enumerate(self.columns) if name in self.allowed]
        chosen = sorted(candidates, key=lambda c: (-float(logits[c]), c))[: self.k]
        weights = torch.softmax(logits[chosen] / self.temperature, dim=0)
        delta = torch.zeros(module.get_base_layer().out_features, dtype=torch.float64)
        for column, weight in zip(chosen, weights, strict=True):
            name = self.columns[column]
            if name is not None and name in module.lora_A:
                a, b = module.lora_A[name].weight.double(), module.lora_B[name].weight.double()
                delta += weight * module.scaling[name] * (b @ (a @ x))
        return delta


class Reference:
    """One PEFT model that holds all adapters; answers one request at a time."""

    def __init__(self, model: PreTrainedModel, adapters: dict[str, Path]) -> None:
        names = list(adapters)
        self._model = PeftModel.from_pretrained(model, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self._model.load_adapter(adapters[name], adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], adapter: str | None, num_tokens: int) -> ReferenceAnswer:
        """`num_tokens` greedy tokens after `prompt`, end tokens ignored."""
        if adapter is None:
            with self._model.disable_adapter():
                return self._greedy(prompt, num_tokens)
        if adapter != _KEEP:
            self._model.set_adapter(adapter)
        return self._greedy(prompt, num_tokens)

    def greedy_blend(self, prompt: Sequence[int], weights: Mapping[str, float], num_tokens: int) -> ReferenceAnswer:
        """As `greedy`, with Σ w_i · Δ_i: PEFT's own sum over several active adapters, their scales multiplied."""
        with self._scaled(weights):
            self._model.base_model.set_adapter(list(weights))
            return self.greedy(prompt, _KEEP, num_tokens)

    def greedy_routed(self, prompt: Sequence[int], gates: "ReferenceGates", num_tokens: int) -> ReferenceAnswer:
        """As `greedy`, every linear routed by `gates`: the equation of perseid_kernels.routing, in hooks on PEFT's
        modules, a token at a time and in float64."""
        hooks = [
            module.register_forward_hook(gates.hook(name))
            for name, module in self._model.named_modules()
            if isinstance(module, LoraLayer)
        ]
        try:
            return self.greedy(prompt, None, num_tokens)
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _scaled(self, weights: Mapping[str, float]) -> Iterator[None]:
        layers = [module for module in self._model.modules() if isinstance(module, LoraLayer)]
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            for name, weight in weights.items():
                if name in layer.scaling:
                    layer.scaling[name] *= weight
        try:
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)

    def _greedy(self, prompt: Sequence[int], num_tokens: int) -> ReferenceAnswer:
        tokens: list[int] = []
        margins: list[float] = []
        cache = None
        inputs = torch.tensor([list(prompt)])
        while len(tokens) < num_tokens:
            output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            inputs = best.indices[None, :1]
        return ReferenceAnswer(tuple(tokens), tuple(margins))
