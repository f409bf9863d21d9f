"""What a user can set about the training of gates."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Of `GateTrainer`. The learning rate is that of inputs scaled to a mean square of 1."""

    steps: int = 400
    seed: int = 0
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient of one linear's gates
    init_std: float = 0.02
    warm_up: int = 20  # steps

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return self.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2
