"""Trees as a recorded step has them: no other rows, and padding."""

import torch
from torch import Tensor

from perseid_kernels.backend import AttentionBatch, TreeRows
from perseid_kernels.bench.sections import CheckFailed
from perseid_kernels.triton_backend import TritonBackend


def check_only_trees(
    backend: TritonBackend,
    q_RHD: Tensor,
    caches: tuple[Tensor, Tensor],
    block_table: Tensor,
    masks: list[list[int]],
    contexts: list[int],
    expected_RHD: Tensor,
) -> None:
    """The rows of some trees have the bits that they were given beside other rows, and a padding row is not written.
    `block_table` [S, max blocks] is of these sequences, as are `masks` and `contexts`. Raises CheckFailed."""
    device, num_rows = q_RHD.device, q_RHD.shape[0]
    of_rows = [mask for of_tree in masks for mask in of_tree]
    sequences = [sequence for sequence, of_tree in enumerate(masks) for _ in of_tree]
    starts = [0, *torch.tensor([len(of_tree) for of_tree in masks]).cumsum(0).tolist(), num_rows]

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    batch = AttentionBatch(
        query_start=ints(starts),
        context_len=ints([*contexts, 0]),  # the last sequence has no row: the padding is its
        block_table=torch.cat([block_table, block_table[:1]]),
        max_query_len=1,
        max_context_len=max(contexts),
        trees=TreeRows(
            ancestors=torch.tensor([*of_rows, 0], device=device),
            rows=ints(list(range(num_rows + 1))),
            sequences=ints([*sequences, len(masks)]),
        ),
    )
    out = torch.full((num_rows + 1, *q_RHD.shape[1:]), 7.0, dtype=q_RHD.dtype, device=device)
    backend.attention(torch.cat([q_RHD, q_RHD[:1]]), *caches, batch, q_RHD.shape[2] ** -0.5, out)
    if not torch.equal(out[:num_rows], expected_RHD):
        raise CheckFailed("attention of trees: rows have other bits without other rows beside them")
    if not (out[num_rows] == 7.0).all():
        raise CheckFailed("attention of trees: padding was written")
