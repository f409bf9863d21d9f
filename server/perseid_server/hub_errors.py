"""What goes wrong with the Hugging Face hub, told without addresses, paths or tokens."""

import errno
import os
import re

from perseid_server.errors import Unavailable

_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})
_IN_RUST = re.compile(r"\(os error (\d{1,4})\)")  # how hf_xet, which writes large files, tells an error of the system


def hub_failed(what: str, error: Exception) -> Unavailable:
    """What is told of any error of huggingface_hub that says nothing of `what` itself. Those of its HTTP client and of
    its storage have no base of their own."""
    if number := _error_of_the_disk(error):
        return Unavailable(f"{what}: what the hub sends cannot be written: {os.strerror(number)}")
    return Unavailable(f"{what}: the Hugging Face hub cannot be reached ({_kind(error)}); try again")


def _error_of_the_disk(error: BaseException | None) -> int | None:
    """The first in what led to an error; links of a chain can be a ring."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (told := _IN_RUST.search(str(error))):
            number = int(told[1])
        if number in _OF_THE_DISK:
            return number
        error = error.__cause__ or error.__context__
    return None


def _kind(error: Exception) -> str:
    """By its class, or by its status where the hub answered: texts hold addresses, and these hold signatures."""
    known = error.__cause__ or error  # "not in the cache" hides why the hub was not asked
    status = getattr(getattr(known, "response", None), "status_code", None)
    return f"HTTP status {status}" if isinstance(status, int) else type(known).__name__
