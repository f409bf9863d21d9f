"""A scraper that holds every exposition against the one before."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, tuple[tuple[str, str], ...]]
_GROWING = {"counter", "histogram"}
_EVERY_S = 0.1


@dataclass
class Scrapes:
    """What the scraper has seen."""

    count: int = 0
    values: dict[Series, float] = field(default_factory=dict)
    seen_up: set[float] = field(default_factory=set)

    def take(self, text: str) -> None:
        """AssertionError when something that only grows has fallen, or is gone."""
        families = list(text_string_to_metric_families(text))
        grown = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            if family.type in _GROWING
            for sample in family.samples
        }
        for series, value in self.values.items():
            assert grown[series] >= value, f"{series} fell from {value} to {grown[series]}"
        self.values = grown
        self.seen_up |= {one.value for family in families for one in family.samples if one.name == "perseid_engine_up"}
        self.count += 1


@asynccontextmanager
async def scraping(http: str) -> AsyncIterator[Scrapes]:
    """Scrape all the time, on connections that are kept and on fresh ones; every scrape must come off."""
    scrapes, stopping = Scrapes(), asyncio.Event()

    async def scrape() -> None:
        async with httpx.AsyncClient(timeout=60) as kept:
            while not stopping.is_set():
                if scrapes.count % 2:
                    answer = await kept.get(f"{http}/metrics")
                else:
                    async with httpx.AsyncClient(timeout=60) as fresh:
                        answer = await fresh.get(f"{http}/metrics")
                assert answer.status_code == 200, answer.text
                scrapes.take(answer.text)
                await asyncio.sleep(_EVERY_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(scrape())
        try:
            yield scrapes
        finally:
            stopping.set()
