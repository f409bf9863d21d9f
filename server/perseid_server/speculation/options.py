"""How a request wants to be drafted for. Standard library only: it crosses between the processes."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["auto", "medusa", "ngram", "off"]
"""Where drafts come from: heads and prompt lookup, one of them, or nowhere."""

Acceptance = Literal["exact", "typical"]
"""`exact`: every token is the one that would have come without drafts. `typical`: likely drafts are taken as they are
(Medusa, arXiv:2401.10774, section 3.3.1), which changes what sampled requests say."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a request asks for. The server drafts less, or nothing, where it does not pay."""

    mode: Mode = "off"
    heads: str | None = None  # version of the Medusa heads, registered before; drafts wait for nobody to load them
    acceptance: Acceptance = "exact"
    epsilon: float = 0.09  # typical: p(x) > min(epsilon, delta · e^(−H)) is accepted, H the entropy of p
    delta: float = 0.3

    @property
    def uses_heads(self) -> bool:
        """Whether Medusa heads may draft."""
        return self.heads is not None and self.mode in {"auto", "medusa"}

    @property
    def uses_ngrams(self) -> bool:
        """Whether the sequence's own tokens may draft."""
        return self.mode in {"auto", "ngram"}


OFF = Speculation()
