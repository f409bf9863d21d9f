"""Each connection takes a file descriptor, and a process may have few of them unless it asks for more.

At the limit nothing can be accepted, and no adapter be read either. So each transport has less than half of them.
"""

import logging
import resource

logger = logging.getLogger(__name__)

ENOUGH = 4096
KEPT_FOR_FILES = 256  # or a quarter, where there are few


def allow_connections() -> int:
    """Raise the limit of open files as far as the system allows; returns it, −1 where there is none. An operator is
    told where it is low."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            allowed = most
        except (OSError, ValueError) as error:
            logger.debug("the limit of open files stays: %s", error)
    if 0 <= allowed < ENOUGH:
        logger.warning(
            "at most %d files and connections may be open at once; raise it with `ulimit -n` or LimitNOFILE", allowed
        )
    return allowed


def connections_of_each(allowed: int) -> int | None:
    """How many connections a transport may have beside the other one, of so many descriptors; None: no limit."""
    if allowed < 0:  # RLIM_INFINITY
        return None
    return max((allowed - min(KEPT_FOR_FILES, allowed // 4)) // 2, 1)
