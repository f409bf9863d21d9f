"""Finding the files of what is to be loaded, on this machine or on the hub.

Downloads have a few threads of their own: however slow the hub is, loads from this machine, unloads and pins go on.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from perseid_server.adapters.hub import HubId
from perseid_server.adapters.source import AdapterFolder, SourcePolicy, from_hub, locate
from perseid_server.adapters.store import AdapterStore
from perseid_server.errors import Unavailable
from perseid_server.frontend.background import on_disk

NUM_DOWNLOADS = 2  # at once; the others wait
LONGEST_DOWNLOAD_S = 3600.0  # its wait for a thread counts


class Fetching:
    """Finds folders for one registry."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(NUM_DOWNLOADS, "hub")

    @asynccontextmanager
    async def files(self, source: str, policy: SourcePolicy) -> AsyncGenerator[AdapterFolder]:
        """A folder with the files, which is there as long as the block runs."""
        found = await asyncio.to_thread(locate, source, policy)
        if isinstance(found, AdapterFolder):
            yield found
        elif policy.sees is None:
            yield await self._result(self._download(found, policy, None), found)
        else:
            scratch = await on_disk(self._store.new_folder)
            download = self._download(found, policy, scratch)
            try:
                yield await self._result(download, found)
            finally:
                if download.done():
                    await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
                else:  # given up, but a thread cannot be stopped, and would make the folder again
                    download.add_done_callback(lambda _: shutil.rmtree(scratch, ignore_errors=True))

    def close(self) -> None:
        """Begin no more downloads. Those that run are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _download(self, at: HubId, policy: SourcePolicy, own_cache: Path | None) -> "Future[AdapterFolder]":
        until = time.monotonic() + LONGEST_DOWNLOAD_S
        return self._threads.submit(partial(from_hub, at, policy, own_cache=own_cache, until=until))

    async def _result(self, download: "Future[AdapterFolder]", at: HubId) -> AdapterFolder:
        try:
            async with asyncio.timeout(LONGEST_DOWNLOAD_S):
                return await asyncio.wrap_future(download)
        except TimeoutError:
            raise Unavailable(
                f"source {at}: the download took more than {LONGEST_DOWNLOAD_S:g} s and was given up; try again"
            ) from None
