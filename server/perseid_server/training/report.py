"""The report of a run: report.json, report.md and the confusion matrix as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perseid_server.errors import InvalidRequest
from perseid_server.training.files import write_whole
from perseid_server.training.tables import percent, table


def check_plotting() -> None:
    """InvalidRequest where the picture cannot be drawn: said before hours of training, not after."""
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415  needed for the picture only
    except ImportError:
        raise InvalidRequest(
            "the report's picture needs matplotlib: pip install 'perseid[train]', or give --no-plot", field="plot"
        ) from None


def write_report(report: Mapping[str, Any], out: Path, *, plot: bool) -> None:
    """All three files; the picture if `plot`."""
    write_whole(out / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    write_whole(out / "report.md", as_markdown(report).encode())
    if plot:
        draw_confusion(report["routing"]["all"]["confusion"], report["columns"], out / "confusion.png")


def as_markdown(report: Mapping[str, Any]) -> str:
    """For people."""
    ways = list(report["out_of_domain"])
    lines = [
        f"# Gates for {len(report['columns']) - 1} adapters of {report['base']}",
        "",
        f"{report['steps']} steps, seed {report['seed']}, {report['minutes']} minutes. Figures: held-out samples.",
        "",
        "## Answers",
        "",
        "Share of answers that are right token by token under teacher forcing, which is the greedy answer.",
        "",
        *table(
            ["data", *ways, "weight on its adapter"],
            [
                [name, *(percent(scores[way]["exact"]) for way in ways), _own(name, scores)]
                for name, scores in report["tasks"].items()
            ],
        ),
        "",
        "Prompts outside of all tasks: " + _out_of_domain(report["out_of_domain"]),
        "",
        "## Decisions",
        "",
        "A decision is one gate's largest logit on one token. Every column counts the same.",
        "",
        *table(["tokens", "right"], [[kind, percent(share, 1)] for kind, share in report["accuracy"].items()]),
        "",
        *_per_layer(report["routing"]["all"]["accuracy_per_projection_and_layer"]),
    ]
    if report["request_router"] is not None:
        lines += ["", "## Request-level router", "", *_router(report["request_router"])]
    return "\n".join(lines) + "\n"


def _own(name: str, scores: Mapping[str, Any]) -> str:
    """Weight that gates gave the data's own adapter."""
    shares = [score["shares"].get(name) for score in scores.values() if "shares" in score]
    return percent(shares[-1], 1) if shares and shares[-1] is not None else ""


def _out_of_domain(scores: Mapping[str, Any]) -> str:
    told = [
        f"{way}: {percent(score['shares']['base'], 1)} of the weight on the base, {percent(score['tokens'], 1)} of "
        "the base's tokens kept"
        for way, score in scores.items()
        if "shares" in score
    ]
    return "; ".join(told) + "."


def _per_layer(accuracy: Mapping[str, Sequence[float | None]]) -> list[str]:
    """A row for each layer."""
    layers = range(max(len(of_layers) for of_layers in accuracy.values()))
    rows = [[str(layer), *(percent(accuracy[name][layer]) for name in accuracy)] for layer in layers]
    return table(["layer", *(name.removesuffix("_proj") for name in accuracy)], rows)


def _router(judged: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [[name, str(each["prompts"]), str(each["decided"]), str(each["right"])] for name, each in judged.items()]
    return table(["data", "prompts", "decided", "right"], rows)


def draw_confusion(confusion: Sequence[Sequence[int]], columns: Sequence[str], path: Path) -> None:
    """Rows: what is right; columns: what gates chose; each row in percent."""
    import matplotlib as mpl  # noqa: PLC0415  slow to import, and absent from a server's installation

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    shares = [[100 * count / max(sum(row), 1) for count in row] for row in confusion]
    figure, axes = plt.subplots(figsize=(2.5 + 0.6 * len(columns), 2 + 0.6 * len(columns)), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(columns)), columns)
    axes.set_xlabel("chosen")
    axes.set_ylabel("right")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share >= 0.5:
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", color="white" if share > 50 else "black")
    axes.set_title("Decisions of all gates, percent of each row")
    figure.savefig(path, dpi=110)
    plt.close(figure)
