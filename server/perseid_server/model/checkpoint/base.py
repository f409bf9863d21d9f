"""What the decoder asks of a checkpoint, whatever file it comes from."""

from typing import Literal, Protocol

from torch import Tensor

from perseid_kernels.weights import Weight
from perseid_server.model.config import DecoderConfig
from perseid_server.model.spec import BaseSpec

NormName = Literal["input_layernorm", "post_attention_layernorm"]


class Checkpoint(Protocol):
    """A base on disk, opened and checked; nothing but headers is read before a method is called.

    Every method reads one tensor, on the CPU, in a canonical form of `perseid_kernels.weights`, and keeps no copy:
    pack what you get and drop it. Rows of q and k are in Hugging Face's half-split order. Norms and biases are
    float32. `layer` is in 0 … num_layers - 1, `projection` a key of PARENT_OF_PROJECTION.
    """

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def spec(self) -> BaseSpec: ...

    def linear(self, layer: int, projection: str) -> Weight:
        """[out, in] of one projection."""
        ...

    def bias(self, layer: int, projection: str) -> Tensor | None:
        """float32 [out]; None where the projection has no bias."""
        ...

    def norm(self, layer: int, name: NormName) -> Tensor:
        """float32 [hidden]."""
        ...

    def qk_norm(self, layer: int, which: Literal["q", "k"]) -> Tensor:
        """float32 [head_dim]; only where `config.qk_norm`."""
        ...

    def embedding(self) -> Weight:
        """[vocab, hidden]."""
        ...

    def final_norm(self) -> Tensor:
        """float32 [hidden]."""
        ...

    def lm_head(self) -> Weight | None:
        """[vocab, hidden]; None: the embedding serves as the head (tied)."""
        ...
