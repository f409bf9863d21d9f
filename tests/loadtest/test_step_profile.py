"""The table of a step's milliseconds, from made-up steps."""

import io

from rich.console import Console

from perseid_kernels.native.profile import OPS
from perseid_loadtest.step_profile import StepProfile, table_of
from perseid_loadtest.workload import Case


def test_what_no_op_took_is_outside_the_pass() -> None:
    one = StepProfile(Case("base", 4), 2.0, dict.fromkeys(OPS, 0.125))
    assert one.outside_ms == 2.0 - len(OPS) * 0.125


def test_the_table_has_a_column_for_each_case() -> None:
    profiles = [StepProfile(Case(kind, 4), 2.0, dict.fromkeys(OPS, 0.125)) for kind in ("base", "mixed")]
    out = io.StringIO()
    Console(file=out, width=100).print(table_of(profiles))
    text = out.getvalue()
    assert "base 4" in text
    assert "mixed 4" in text
    assert text.count("2000") == 2, "4 tokens in 2 ms"
