"""What measures time does so with clocks that never jump. The wall clock is for dates, each use of it stands here."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("server/perseid_server", "router/perseid_router", "kernels/perseid_kernels")
WALL = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}
"""By the name they are reached by: `time.time`, `datetime.now`, `date.today`."""

ALLOWED = {
    "access/gate.py": "keys end on a date",
    "access/ledger.py": "quotas are of a day",
    "adapters/store.py": "the manifest tells when something was loaded",
    "cli/keys.py": "lists which keys have ended",
    "frontend/generation.py": "OpenAI's `created`",
    "frontend/metrics/adapters.py": "vLLM's lora_requests_info is the time of its last change",
    "observe/tracing.py": "spans begin and end on dates",
    "frontend/text.py": "chat templates may write today's date",
}


def wall_clock_uses(source: str) -> list[str]:
    """Reads of the wall clock in a module, also those that only pass one on."""
    uses = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in WALL.get(node.value.id, ()):
                uses.append(f"line {node.lineno}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            uses += [f"line {node.lineno}: {one.name}" for one in node.names if one.name in WALL["time"]]
    return uses


def test_the_wall_clock_is_read_for_dates_alone() -> None:
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if uses := wall_clock_uses(path.read_text()):
                found[str(path.relative_to(ROOT / folder))] = uses
    assert set(found) == set(ALLOWED), {name: uses for name, uses in found.items() if name not in ALLOWED}


def test_every_way_to_read_it_is_found() -> None:
    source = "import time\nfrom time import time_ns\nwall = time.time\nnow = datetime.now()\ntime.monotonic()"
    assert wall_clock_uses(source) == ["line 2: time_ns", "line 3: time.time", "line 4: datetime.now"]
