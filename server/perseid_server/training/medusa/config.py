"""What `perseid train medusa` is asked to do."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

_NOT_DECISIVE = ("model", "out", "prompts", "cache_folder", "resume", "checkpoint_every", "device")


@dataclass(frozen=True, slots=True)
class HeadsOptions:
    """The heads and how they learn."""

    num_heads: int = 4
    num_layers: int = 1
    draft_vocabulary: int = 16_384  # tokens that heads choose among; 0: all
    epochs: float = 3.0  # rounds through all positions
    batch: int = 512  # positions of a step
    learning_rate: float = 1e-3
    warm_up: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the gradient
    decay: float = 0.8  # what head h counts: decay^h
    softness: float = 0.9  # how much the base's own distribution counts, beside the token it chose
    bfloat16: bool = False  # the products with the lm_head, which are nearly all of the work
    seed: int = 0


@dataclass(frozen=True, slots=True)
class MedusaTraining:
    """All of a run. What changes its result is part of `identity`."""

    model: str
    prompts: Path
    out: Path
    adapters: Mapping[str, str] = field(default_factory=dict)  # name → folder or hub id
    options: HeadsOptions = field(default_factory=HeadsOptions)
    held_out_share: float = 0.1  # of the prompts, to judge by
    answer_tokens: int = 128  # of an answer
    max_tokens: int = 1024  # of a prompt and its answer
    temperature: float = 0.0  # of the answers that are sampled
    sampled_share: float = 0.0  # of the prompts whose answers are sampled
    cache_folder: Path | None = None  # of answers and hidden states; None: with the checkpoint
    device: str = "auto"
    checkpoint_every: int = 100  # steps
    resume: bool = False

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished run keeps its state."""
        return self.out / "checkpoint"

    @property
    def cache(self) -> Path:
        """Where answers and hidden states lie. The default goes with the checkpoint when the run is done."""
        return self.cache_folder or self.checkpoint / "cache"

    def identity(self, base: str, versions: Mapping[str, str]) -> str:
        """JSON of everything that decides the result: a run may be resumed only as the same run."""
        fields = asdict(self)
        for name in _NOT_DECISIVE:
            del fields[name]
        with self.prompts.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return json.dumps(fields | {"base": base, "adapters": dict(versions), "prompts": digest}, sort_keys=True)
