"""What the formats of matrices in a Hugging Face folder have in common."""

from collections.abc import Mapping
from typing import Protocol

from perseid_kernels.weights import Weight
from perseid_server.model.checkpoint.layout import Shapes
from perseid_server.model.checkpoint.safetensors import TensorReader
from perseid_server.model.headers.safetensors import SafeTensor


class LinearFormat(Protocol):
    """One way to store a matrix [N, K]. It claims the tensors it reads, so that what nobody claims can be refused.

    `name` is the matrix's usual name, ending in ".weight", whether or not such a tensor exists.
    """

    def fits(self, name: str, tensors: Mapping[str, SafeTensor]) -> bool:
        """Whether the file holds this matrix in this format."""
        ...

    def claims(self, name: str, shape: tuple[int, int], tensors: Mapping[str, SafeTensor]) -> Shapes:
        """The tensors it reads, with the shapes they must have."""
        ...

    def check(self, name: str, shape: tuple[int, int], reader: TensorReader) -> None:  # noqa: ARG002
        """Look into small tensors for what headers cannot tell; UnsupportedModel names what is wrong."""
        return

    def read(self, name: str, shape: tuple[int, int], reader: TensorReader) -> Weight:
        """The canonical weight [N, K]."""
        ...
