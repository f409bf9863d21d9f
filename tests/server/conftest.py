"""A server over the fake engine, for the tests of the API process."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import settings

from tests.server.stack import LiveStack, Stack, make_stack, serving

settings.register_profile("perseid", deadline=None)  # machines differ; the suite's timeout is the limit
settings.load_profile("perseid")


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """A server that does not listen."""
    return make_stack(tmp_path)


@pytest_asyncio.fixture
async def live(stack: Stack) -> AsyncIterator[LiveStack]:
    """The same, listening on both ports."""
    async with serving(stack) as live:
        yield live
