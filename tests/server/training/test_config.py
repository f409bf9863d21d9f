"""What makes a run the same run."""

from pathlib import Path

from perseid_server.training.config import GateTraining


def identity(tmp_path: Path, *names: str) -> str:
    """Of a run over adapters in this order, all else alike."""
    config = GateTraining(model="m", adapters={"a": "", "b": ""}, data=(), out=tmp_path)
    return config.identity("base", {name: name * 64 for name in names}, ())


def test_another_order_of_adapters_is_another_run(tmp_path):
    """Their order is that of the columns: a resumed run would give each the gates of another."""
    assert identity(tmp_path, "a", "b") == identity(tmp_path, "a", "b")
    assert identity(tmp_path, "a", "b") != identity(tmp_path, "b", "a")
