"""What `router_eval.py` found, as tables."""

from statistics import fmean

from router_scores import AUTO, BASE, EXPLICIT, GATES, UNIFORM, CompositeScore, Results
from sheets import Sheet

NAMED_WAYS = (BASE.name, AUTO.name, GATES.name, UNIFORM)


def sheets(results: Results) -> list[Sheet]:
    """One table for each kind of prompt."""
    return [_tasks(results), _composites(results), _outside(results)]


def _tasks(results: Results) -> Sheet:
    ways = list(dict.fromkeys(score.way for score in results.tasks))
    names = list(dict.fromkeys(score.task for score in results.tasks))
    right = {(score.task, score.way): score.right for score in results.tasks}
    mean = {way: fmean(right[name, way] for name in names) for way in ways}
    rows = [[name, *(f"{right[name, way]:.0f}" for way in ways)] for name in names]
    rows.append(["mean", *(f"{mean[way]:.1f}" for way in ways)])
    whole = [score.whole_request or 0.0 for score in results.tasks if score.way == AUTO.name]
    own = [score.own_share or 0.0 for score in results.tasks if score.way == GATES.name]
    parts = {way: _share_of(mean[way], mean[EXPLICIT]) for way in (AUTO.name, GATES.name)}
    return Sheet(
        f"One task in a prompt: exact answers to {results.items} held-out items of each",
        ["task", *ways],
        rows,
        f"Of the adapters' own mean, auto reaches {parts[AUTO.name]}, the gates alone {parts[GATES.name]}. "
        f"The request-level router answered {fmean(whole):.0f} % of auto's requests. "
        f"Where the gates chose, the task's own adapter had {fmean(own):.0f} % of the weight over the answers.",
    )


def _composites(results: Results) -> Sheet:
    rows = []
    for n in sorted({score.n for score in results.composites}):
        by_way = {score.way: score for score in results.composites if score.n == n}
        best = max((score for way, score in by_way.items() if way not in NAMED_WAYS), key=lambda score: score.problems)
        ratio = _times(by_way[AUTO.name].problems, best.problems)
        rows.append([str(n), *(_composite(by_way[way]) for way in NAMED_WAYS), f"{_composite(best)} {best.way}", ratio])
    return Sheet(
        f"Several tasks in a prompt, solved in one answer: {results.prompts} prompts of each size",
        ["problems in a prompt", *NAMED_WAYS, "best single adapter", "auto ÷ best single"],
        rows,
        "Problems solved; in brackets, prompts with all of them solved. All adapters are run, the best is shown.",
    )


def _outside(results: Results) -> Sheet:
    rows = [
        [score.way, *(f"{value:.0f}" for value in (score.same, score.null_prompt, score.null_answer, score.to_base))]
        for score in results.outside
    ]
    return Sheet(
        "Prompts outside all tasks",
        [
            "way",
            "same answer as the base",
            "weight of the base, prompt",
            "weight of the base, answer",
            "left to the base",
        ],
        rows,
        "The last column: requests that the request-level router left to the base as a whole.",
    )


def _composite(score: CompositeScore) -> str:
    return f"{score.problems:.0f} ({score.prompts:.0f})"


def _share_of(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _times(one: float, other: float) -> str:
    return f"{one / other:.1f} ×" if other else "–"
