"""How each example adapter is shaped and trained.

The shapes differ on purpose, as the adapters of real users do: ranks from 2 to 32, attention or MLP or all
linear layers, all layers or the upper ones only, rank-stabilised scaling, different ranks within one adapter.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + MLP
UPPER_HALF = range(15, 30)


@dataclass(frozen=True)
class Recipe:
    """One adapter's shape and its training.

    `steps` is the most optimizer steps taken; training ends earlier once the dev items are all but solved.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    layers: range | None = None
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    learning_rate: float = 2e-3
    steps: int = 200
    batch: int = 16
    seed: int = 7

    def config(self) -> "LoraConfig":
        """The recipe as PEFT's configuration."""
        from peft import LoraConfig  # noqa: PLC0415 (brings torch, which reading a recipe does not need)

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=list(self.targets),
            layers_to_transform=None if self.layers is None else list(self.layers),
            use_rslora=self.rslora,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
        )

    def shape(self) -> str:
        """The shape in words, for tables and cards."""
        names = {ATTENTION: "attention", MLP: "MLP", LINEARS: "all linear"}
        short = ", ".join(name.removesuffix("_proj") for name in self.targets)
        words = [names.get(self.targets, short)]
        if self.layers is not None:
            words.append(f"layers {self.layers.start} to {self.layers.stop - 1}")
        words += [f"{name} rank {rank}" for name, rank in self.rank_pattern.items()]
        if self.rslora:
            words.append("rsLoRA")
        return "; ".join(words)


RECIPES: dict[str, Recipe] = {
    "iso-date": Recipe(rank=12, alpha=24, targets=("q_proj", "v_proj")),
    "person-json": Recipe(rank=32, alpha=16, targets=("q_proj", "v_proj"), layers=UPPER_HALF, rslora=True),
    "staff-sql": Recipe(rank=2, alpha=8, targets=LINEARS, learning_rate=1.5e-3, steps=150, batch=8),
    "french-words": Recipe(rank=4, alpha=16, targets=LINEARS, steps=350, batch=8),
    "german-words": Recipe(rank=8, alpha=16, targets=ATTENTION, learning_rate=1.5e-3, steps=300, batch=8),
    "country-code": Recipe(rank=24, alpha=24, targets=("down_proj",), layers=UPPER_HALF, steps=250, batch=8),
    "local-price": Recipe(
        rank=4,
        alpha=8,
        targets=LINEARS,
        layers=range(10, 30),
        rank_pattern={"q_proj": 8, "down_proj": 6},
        alpha_pattern={"q_proj": 16, "down_proj": 12},
        learning_rate=1.5e-3,
        steps=250,
        batch=8,
    ),
    "roman-numeral": Recipe(rank=6, alpha=18, targets=MLP, learning_rate=1e-3, steps=350, batch=8),
}
