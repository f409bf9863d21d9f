"""The report of a run: report.json, report.md, and accuracy and tokens per step as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perseid_server.training.files import write_whole
from perseid_server.training.tables import percent, table


def write_report(report: Mapping[str, Any], out: Path, *, plot: bool) -> None:
    """All three files; the picture if `plot`."""
    write_whole(out / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    write_whole(out / "report.md", as_markdown(report).encode())
    if plot:
        draw(report, out / "accuracy.png")


def as_markdown(report: Mapping[str, Any]) -> str:
    """For people."""
    heads = range(len(report["accuracy"]["all"]))
    sizes = list(report["replayed"])
    summary = (
        f"{len(heads)} heads, {report['steps']} steps over {report['positions']['train']} positions of "
        f"{report['answers']['train']} answers, seed {report['seed']}, {report['minutes']} minutes. "
        f"Figures: {report['answers']['held_out']} held-out answers, {report['positions']['held_out']} positions."
    )
    drafted = (
        f"{percent(report['drafted_share'], 2)} of held-out targets are in the draft vocabulary of "
        f"{report['draft_vocabulary']} tokens."
    )
    lines = [
        f"# Medusa heads for {report['base']}",
        "",
        summary,
        "",
        "## How often a head's first candidate is right",
        "",
        "Head h drafts the token h + 2 places after the one whose hidden state it sees. In brackets: any of ten.",
        "",
        *table(
            ["answers of", *(f"head {head}" for head in heads)],
            [[source, *map(_first_and_any, of_source)] for source, of_source in report["accuracy"].items()],
        ),
        "",
        "## Tokens per step, by nodes of the tree",
        "",
        "Held-out answers gone through as serving would, each tree grown by the heads' own probabilities.",
        "",
        *table(
            ["answers of", *sizes],
            [
                [source, *(f"{report['replayed'][size][source]:.2f}" for size in sizes)]
                for source in report["replayed"][sizes[0]]
            ],
        ),
        "",
        "The accuracy table alone, one tree for every position, expects: "
        + ", ".join(f"{size} nodes {tokens:.2f}" for size, tokens in report["expected"].items())
        + ".",
        "",
        drafted,
    ]
    return "\n".join(lines) + "\n"


def _first_and_any(of_head: Sequence[float]) -> str:
    return f"{percent(of_head[0], 1)} ({percent(sum(of_head))})"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Left: accuracy by head and rank. Right: tokens per step by tree size."""
    import matplotlib as mpl  # noqa: PLC0415  slow to import, and absent from a server's installation

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for head, of_head in enumerate(report["accuracy"]["all"]):
        left.plot(range(1, len(of_head) + 1), [100 * share for share in of_head], marker="o", label=f"head {head}")
    left.set_xlabel("candidate")
    left.set_ylabel("right, percent of held-out positions")
    left.set_yscale("log")
    left.legend()
    for source in next(iter(report["replayed"].values())):
        points = [(int(size), shares[source]) for size, shares in report["replayed"].items()]
        right.plot(*zip(*points, strict=True), marker="o", label=source, linewidth=2.5 if source == "base" else 1)
    expected = [(int(size), tokens) for size, tokens in report["expected"].items()]
    right.plot(*zip(*expected, strict=True), color="black", linestyle="--", label="accuracy table")
    right.set_xscale("log", base=2)
    right.set_xlabel("nodes of the tree")
    right.set_ylabel("tokens per step")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
