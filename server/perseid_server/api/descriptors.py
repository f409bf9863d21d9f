"""Each connection takes a file descriptor, and a process may have few of them unless it asks for more."""

import logging
import resource

logger = logging.getLogger(__name__)

ENOUGH = 4096


def allow_connections() -> int:
    """Raise the limit as far as the system allows; returns it. An operator is told where it is low."""
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
