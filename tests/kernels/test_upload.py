"""Many small arrays in one copy."""

import torch

from perseid_kernels.upload import Layout, staging, upload, upload_packed

CPU = torch.device("cpu")
ARRAYS = (
    torch.arange(5, dtype=torch.int64) << 40,
    torch.tensor([1, -2, 3], dtype=torch.int32),
    torch.empty(0, dtype=torch.int64),
    torch.tensor([[0.5, -1.5, 2.5]], dtype=torch.float32),
    torch.arange(6, dtype=torch.int32).view(2, 3),
)


def test_every_array_arrives_with_its_dtype_and_shape() -> None:
    for sent, came in zip(ARRAYS, upload_packed(ARRAYS, CPU), strict=True):
        assert came.dtype == sent.dtype
        assert torch.equal(came, sent)


def test_all_lie_in_one_buffer_at_aligned_addresses() -> None:
    """One buffer is one copy; Triton would compile a kernel again for an address of another alignment."""
    came = upload_packed(ARRAYS, CPU)
    assert len({tensor.untyped_storage().data_ptr() for tensor in came}) == 1
    assert all(tensor.data_ptr() % 16 == 0 for tensor in came)


def test_the_cpu_copies_nothing() -> None:
    assert all(came is sent for came, sent in zip(upload(ARRAYS, CPU), ARRAYS, strict=True))


def test_nothing_is_read_back() -> None:
    """A meta tensor can be written and never be read: any wait for a value would raise."""
    came = upload(ARRAYS, torch.device("meta"))
    assert [(tensor.dtype, tensor.shape) for tensor in came] == [(tensor.dtype, tensor.shape) for tensor in ARRAYS]


def test_fields_do_not_overlap() -> None:
    layout = Layout.of(ARRAYS)
    buffer = staging(layout.nbytes, CPU)
    for index, view in enumerate(layout.views(buffer)):
        view.fill_(index)
    assert all((view == index).all() for index, view in enumerate(layout.views(buffer)))
