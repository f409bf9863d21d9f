"""A gate set: gates for an ordered list of adapters, and the file it lives in.

A folder with two files:

    gate_set.json       what follows, as JSON (`GateSetConfig`)
    gates.safetensors   layers.{layer}.{projection}.weight  [C, d_in]   a row for each column
                        layers.{layer}.{projection}.bias    [C]         optional, zero where missing
                        request_router.*                                optional, see request_router.py

Columns are the adapters in the order of `adapters`, then the base (the null column) if `null` is true. A projection
without a weight is not gated: routed rows get the base there. How gates decide stands in
`perseid_kernels.routing`. Neither torch nor the server is imported here.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

CONFIG_FILE = "gate_set.json"
WEIGHTS_FILE = "gates.safetensors"
FORMAT = "perseid-gates"
SCHEMA = 1
MAX_COLUMNS = 512

Method = Literal["trained", "meteora", "arrow"]
"""Where the gates come from: trained by Perseid, taken from a MeteoRA checkpoint, or computed without training."""


@dataclass(frozen=True, slots=True)
class Column:
    """An adapter that gates can choose: the version they were made for, and a name for people."""

    name: str
    version: str  # content hash, as `adapters.store.version_of` computes it


@dataclass(frozen=True, slots=True)
class GateSetConfig:
    """The JSON file."""

    adapters: tuple[Column, ...]
    null: bool = True  # whether the last column is the base
    k: int = 2  # columns a gate chooses, unless a request says otherwise
    temperature: float = 1.0  # of the softmax over the chosen ones, unless a request says otherwise
    method: Method = "trained"
    base: str = ""  # name of the base the gates were trained on
    request_router: dict[str, Any] | None = None  # see request_router.py
    training: dict[str, Any] = field(default_factory=dict)  # what the training reports; for people

    @property
    def num_columns(self) -> int:
        """C, the null column included."""
        return len(self.adapters) + self.null
