"""What clients are told of an error in a load names no path and no version."""

import pytest

from perseid_server.adapters.state import why
from perseid_server.errors import AdapterRejected


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AdapterRejected("tensor 'x' holds NaN"), "tensor 'x' holds NaN"),
        (PermissionError(13, "Permission denied", "/store/versions/0123"), "Permission denied"),
        (OSError("/store/versions/0123"), "an internal error (OSError)"),
        (ValueError("/store/versions/0123"), "an internal error (ValueError)"),
        (KeyError("0123"), "an internal error (KeyError)"),
    ],
)
def test_an_error_is_told_without_what_it_names(error: Exception, told: str) -> None:
    assert why(error) == told
