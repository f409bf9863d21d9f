"""Errors of the tokenizers library, told as errors of the file that it was given. Standard library only."""

from collections.abc import Iterator
from contextlib import contextmanager

from perseid_server.errors import UnsupportedModel, quoted


@contextmanager
def library_errors(field: str) -> Iterator[None]:
    """What the tokenizers library says of a vocabulary, which it raises as a bare Exception, is said of the file."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:  # the library has no type of its own
        raise UnsupportedModel(
            f"{field}: the tokenizer cannot be made of it: {quoted(str(error))}", field=field
        ) from error
