"""What `perseid train gates` is asked to do."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from perseid_router.training.options import TrainingOptions

_NOT_DECISIVE = ("model", "out", "generic", "generic_held_out", "resume", "checkpoint_every", "device", "float16")


@dataclass(frozen=True, slots=True)
class GateTraining:
    """All of a run. What changes its result is part of `identity`."""

    model: str
    adapters: Mapping[str, str]  # name → folder or hub id, in the order of the columns
    data: tuple[tuple[str, Path], ...]  # (adapter, or any name for lines with segments; file)
    out: Path
    held_out: tuple[tuple[str, Path], ...] = ()
    held_out_share: float = 0.1  # of each file of `data` that no file of `held_out` stands beside
    generic: Path | None = None  # None: the prompts that come with Perseid
    generic_held_out: Path | None = None
    generic_tokens: int = 64  # the longest answer of the base to a generic prompt
    options: TrainingOptions = field(default_factory=TrainingOptions)
    epochs: float | None = None  # rounds through the largest data set, instead of options.steps
    samples_per_step: int = 2  # of each data set
    generic_per_step: int = 8
    null_weight: float = 3.0  # what the base's tokens count, beside an adapter's
    own_routing: float = 0.3  # share of the steps, the last ones, whose passes the gates route themselves
    k: int = 2
    temperature: float = 1.0
    request_router: bool = True
    joint_steps: int = 0  # of the second stage (joint.py)
    joint_beta: float = 1.0  # what the gates' own loss counts there
    float16: bool = False
    device: str = "auto"
    max_tokens: int = 1024  # of a sample
    checkpoint_every: int = 25  # steps
    resume: bool = False

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished run keeps its state."""
        return self.out / "checkpoint"

    def identity(self, base: str, versions: Mapping[str, str], files: tuple[Path, ...]) -> str:
        """JSON of everything that decides the result: a run may be resumed only as the same run."""
        fields = asdict(self)
        for name in _NOT_DECISIVE:
            del fields[name]
        fields |= {
            "base": base,
            "adapters": list(versions.items()),  # their order is that of the columns
            "data": [name for name, _ in self.data],
            "held_out": [name for name, _ in self.held_out],
            "files": [_sha256(path) for path in files],
        }
        return json.dumps(fields, sort_keys=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
