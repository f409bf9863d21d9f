"""The rows of a step that gates route: which of them belong together, and what the gates chose for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from perseid_kernels.routing import GateTable, RoutedRows
from perseid_kernels.segments import PageList
from perseid_server.engine.adaptation import Routing
from perseid_server.engine.ports import Chunk, RoutedChunk
from perseid_server.model.batch import HostRouted


class Tables(Protocol):
    """Where adapters and gate sets are on the device."""

    def pages(self, version: str) -> PageList: ...

    def gates(self, version: str) -> GateTable: ...


@dataclass(slots=True)
class _Group:
    """Chunks of one gate set."""

    table: GateTable
    pages: list[Sequence[int]]  # of each column
    chunks: list[int] = field(default_factory=list)  # places in the step
    rows: list[int] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    allowed: list[list[bool]] = field(default_factory=list)

    def add(self, place: int, rows: range, routing: Routing) -> None:
        allowed = [column is not None for column in routing.columns]
        self.chunks.append(place)
        self.rows += rows
        self.k += [routing.k] * len(rows)
        self.temperature += [routing.temperature] * len(rows)
        self.allowed += [allowed] * len(rows)

    def host(self) -> HostRouted:
        return HostRouted(self.table, self.rows, self.k, self.temperature, self.allowed, self.pages)


def group_routed(chunks: Sequence[Chunk], tables: Tables) -> "RoutedGroups":
    """The routed chunks of a step by gate set, their rows in the batch's order."""
    groups: dict[str, _Group] = {}
    first = 0
    for place, chunk in enumerate(chunks):
        routing = chunk.sequence.adaptation.routing
        if routing is not None:
            group = groups.get(routing.gate_set)
            if group is None:
                group = groups[routing.gate_set] = _new_group(routing, tables)
            for column, version in enumerate(routing.columns):
                if version and not group.pages[column]:
                    group.pages[column] = tables.pages(version).pages
            group.add(place, range(first, first + chunk.num_rows), routing)
        first += chunk.num_rows
    return RoutedGroups(tuple(groups.values()))


def _new_group(routing: Routing, tables: Tables) -> _Group:
    table = tables.gates(routing.gate_set)
    if table.num_columns != len(routing.columns):
        raise ValueError(
            f"gate set {routing.gate_set[:12]} has {table.num_columns} columns, not {len(routing.columns)}"
        )
    return _Group(table, [()] * table.num_columns)


@dataclass(frozen=True, slots=True)
class RoutedGroups:
    """All routed rows of a step."""

    groups: tuple[_Group, ...]

    def host(self) -> tuple[HostRouted, ...]:
        """As the batch takes them."""
        return tuple(group.host() for group in self.groups)

    def results(
        self, routed: Sequence[RoutedRows], chunks: Sequence[Chunk], accepted: Mapping[int, Sequence[int]]
    ) -> dict[int, RoutedChunk]:
        """What the gates chose, by the chunk's place, as are `accepted` nodes. Reads the tallies back."""
        found: dict[int, RoutedChunk] = {}
        for group, rows in zip(self.groups, routed, strict=True):
            shares_RC = rows.tally.cpu() / max(group.table.num_gated, 1)
            first = 0
            for place in group.chunks:
                chunk = chunks[place]
                nodes = [chunk.count + node for node in accepted.get(place, ())]
                of_chunk_RC = shares_RC[first : first + chunk.num_rows]
                found[place] = _chunk_result(chunk, of_chunk_RC[: chunk.count], of_chunk_RC[nodes])
                first += chunk.num_rows
        return found


def _chunk_result(chunk: Chunk, shares_RC: Tensor, accepted_AC: Tensor) -> RoutedChunk:
    """Of the chunk's tokens and of accepted drafts. The last column is the entropy."""
    of_prompt = max(min(chunk.sequence.num_prompt - chunk.start, chunk.count), 0)
    *shares, entropy = (shares_RC.sum(dim=0) + accepted_AC.sum(dim=0)).tolist()
    sampled = [shares_RC[-1, :-1].tolist(), *accepted_AC[:, :-1].tolist()]
    return RoutedChunk(
        shares=tuple(shares),
        prompt_shares=tuple(shares_RC[:of_prompt, :-1].sum(dim=0).tolist()),
        sampled=tuple(map(tuple, sampled)),
        entropy=entropy,
    )
