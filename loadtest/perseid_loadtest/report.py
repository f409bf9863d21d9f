"""What a run of the benchmark leaves: tables, a file of figures, a plot."""

import importlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from perseid_loadtest.rounds import Rates, Summary, ratio
from perseid_loadtest.workload import KINDS, Case

PERSEID = "perseid"
BARE = "perseid without adapters"
GRPC = "perseid over gRPC"
ENGINE = "engine alone"
OWN = (PERSEID, BARE, GRPC, ENGINE)
"""Our own engines; all others are peers."""

_VECTORS = {"avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
"""What the kernel calls them → what they are called; the best first."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A ratio of two of our own figures, the same round's each."""

    what: str
    batch: int
    value: Summary


def peers(rates: Rates) -> list[str]:
    """The names of the engines that are not ours, in the order of the run."""
    return list(dict.fromkeys(name for name, _ in rates if name not in OWN))


def cases_of(rates: Rates) -> list[Case]:
    """What was measured through Perseid's API, in order."""
    return [case for name, case in rates if name == PERSEID]


def comparisons(rates: Rates) -> list[Comparison]:
    """What Perseid is held to by itself: the API's share, unused adapters, mixed against base."""
    found: list[Comparison] = []

    def compare(what: str, case: Case, ours: tuple[str, Case], theirs: tuple[str, Case]) -> None:
        value = ratio(rates, ours, theirs)
        if value is not None:
            found.append(Comparison(what, case.batch, value))

    for case in cases_of(rates):
        if case.phase == "prefill":
            continue
        for transport, name in (("SSE", PERSEID), ("gRPC", GRPC)):
            compare(f"step seen over {transport} ÷ engine's own, {case.kind}", case, (ENGINE, case), (name, case))
        compare("base, with ÷ without adapters loaded", case, (PERSEID, case), (BARE, case))
        if case.kind == "mixed":
            base = (PERSEID, Case("base", case.batch))
            compare("mixed ÷ base", case, (PERSEID, case), base)
    return found


def show(rates: Rates, extra: Mapping[str, float], console: Console) -> None:
    """Print everything."""
    console.print(rate_table(rates))
    own = comparisons(rates)
    if own:
        console.print(own_table(own))
    for name, value in extra.items():
        console.print(f"{name}: {value:.1f}")


def rate_table(rates: Rates) -> Table:
    """A row per case: Perseid, then each peer with Perseid's ratio to it."""
    table = Table(title=f"tokens/s, median (spread) · {machine()}", caption="× = Perseid ÷ peer, median of the rounds")
    for column in ("adapters", "requests", "Perseid"):
        table.add_column(column, justify="right")
    for peer in peers(rates):
        table.add_column(peer, justify="right")
        table.add_column("×", justify="right")
    for case in cases_of(rates):
        cells = [_cell(rates, (PERSEID, case))]
        for peer in peers(rates):
            compared = ratio(rates, (PERSEID, case), (peer, case))
            cells += [_cell(rates, (peer, case)), f"{compared.median:.2f}" if compared else "–"]
        table.add_row(case.kind, str(case), *cells)
    return table


def own_table(own: Sequence[Comparison]) -> Table:
    """A row per comparison of our own figures."""
    table = Table(title="Perseid by itself, the same round's figures")
    for column in ("ratio", "requests", "median", "spread"):
        table.add_column(column, justify="left" if column == "ratio" else "right")
    for one in own:
        table.add_row(one.what, str(one.batch), f"{one.value.median:.3f}", f"{100 * one.value.spread:.0f} %")
    return table


def _cell(rates: Rates, key: tuple[str, Case]) -> str:
    if key not in rates:
        return "–"
    summary = Summary.of(rates[key])
    return f"{summary.median:.0f} ({100 * summary.spread:.0f} %)"


def figures(rates: Rates, extra: Mapping[str, float], workload: Mapping[str, Any]) -> dict[str, Any]:
    """All of it as JSON: every round's rate, and every ratio."""
    return {
        "machine": machine(),
        "workload": dict(workload),
        **extra,
        "rates": [
            {**_key(name, case), **_summary(Summary.of(values)), "rounds": list(values)}
            for (name, case), values in rates.items()
        ],
        "ratios": [
            {**_key(peer, case), **_summary(compared)}
            for case in cases_of(rates)
            for peer in peers(rates)
            if (compared := ratio(rates, (PERSEID, case), (peer, case)))
        ],
        "own": [{"what": one.what, "batch": one.batch, **_summary(one.value)} for one in comparisons(rates)],
    }


def _key(engine: str, case: Case) -> dict[str, Any]:
    return {"engine": engine, "phase": case.phase, "kind": case.kind, "batch": case.batch}


def _summary(summary: Summary) -> dict[str, float]:
    return {"median": summary.median, "spread": summary.spread}


def machine() -> str:
    """The processor, how many cores of it are ours, and its widest vectors."""
    about = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"model name\s*:\s*(.+)", about) or [platform.machine()]
    vectors = next((name for flag, name in _VECTORS.items() if re.search(rf"\b{flag}\b", about)), "no AVX2")
    return f"{names[0]}, {len(os.sched_getaffinity(0))} cores, {vectors}"


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write offline.json into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "offline.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def plot(folder: Path, rates: Rates) -> Path | None:
    """Draw offline.png: a panel per kind, a group of bars per batch size. None where matplotlib is missing."""
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        return None
    shown = [case for case in cases_of(rates) if case.phase == "decode"]
    kinds = [kind for kind in KINDS if any(case.kind == kind for case in shown)]
    figure = figure_module.Figure(figsize=(4.5 * len(kinds), 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        _bars(axes, rates, [case for case in shown if case.kind == kind])
        axes.set_title({"base": "base", "one": "one adapter", "mixed": "mixed adapters"}[kind])
        axes.set_xlabel("requests at once")
    figure.axes[0].set_ylabel("decode tokens/s (median; bars: smallest to largest)")
    figure.axes[0].legend()
    figure.suptitle(machine())
    path = folder / "offline.png"
    figure.savefig(path, dpi=120)
    return path


def _bars(axes: Any, rates: Rates, cases: Sequence[Case]) -> None:
    names = [PERSEID, *peers(rates)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        found = [(at, rates[name, case]) for at, case in enumerate(cases) if (name, case) in rates]
        medians = [Summary.of(values).median for _, values in found]
        below = [median - min(values) for median, (_, values) in zip(medians, found, strict=True)]
        above = [max(values) - median for median, (_, values) in zip(medians, found, strict=True)]
        at = [index + (place - (len(names) - 1) / 2) * width for index, _ in found]
        axes.bar(at, medians, width, yerr=[below, above], label=name)
    axes.set_xticks(range(len(cases)), [str(case.batch) for case in cases])
