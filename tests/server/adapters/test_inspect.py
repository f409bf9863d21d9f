"""`inspect` gives a verdict with its reason and raises nothing."""

from perseid_server.adapters.inspect import inspect_adapter
from tests.fakes import tiny_spec
from tests.server.adapters.folders import TARGETS, lora_config, write_adapter
from tests.server.meteora_folder import write_meteora
from tests.server.speculation.heads_folders import write_heads
from tests.server.stack import write_gate_set


def test_a_good_adapter_is_accepted_with_what_it_holds(tmp_path):
    report = inspect_adapter(write_adapter(tmp_path, rank=20), tiny_spec())
    assert report.accepted
    assert report.reason is None
    assert report.info is not None
    assert (report.info.rank, report.info.num_pages, report.info.targets) == (20, 2, TARGETS)


def test_a_bad_adapter_is_refused_with_the_reason(tmp_path):
    report = inspect_adapter(write_adapter(tmp_path, config=lora_config(use_dora=True)), tiny_spec())
    assert not report.accepted
    assert report.info is None
    assert "use_dora" in (report.reason or "")


def test_a_gate_set_is_accepted_with_what_it_holds(tmp_path):
    report = inspect_adapter(write_gate_set(tmp_path, {"a": "0" * 64, "b": "1" * 64}), tiny_spec())
    assert report.accepted
    assert (report.info.kind, report.info.adapters, report.info.num_columns) == ("gates", ("a", "b"), 3)


def test_a_bad_gate_set_is_refused_with_the_reason(tmp_path):
    folder = write_gate_set(tmp_path, {"a": "0" * 64}, base=tiny_spec(num_layers=9))
    assert "layer" in (inspect_adapter(folder, tiny_spec()).reason or "")


def test_a_meteora_checkpoint_is_told_by_the_gate_set_it_becomes(tmp_path):
    report = inspect_adapter(write_meteora(tmp_path / "good"), tiny_spec())
    assert report.accepted
    assert (report.info.method, report.info.adapters, report.info.num_columns) == ("meteora", ("sql", "sums"), 2)
    report = inspect_adapter(write_meteora(tmp_path / "no config", config=False), tiny_spec())
    assert "meteora.json" in (report.reason or "")
    report = inspect_adapter(write_meteora(tmp_path / "broken", spoil="lora_A"), tiny_spec())
    assert "NaN" in (report.reason or "")


def test_heads_are_accepted_with_what_they_hold_or_refused_with_the_reason(tmp_path):
    report = inspect_adapter(write_heads(tmp_path / "good"), tiny_spec())
    assert report.accepted
    assert (report.info.kind, report.info.num_heads, report.info.layout) == ("heads", 3, "Medusa v2")
    report = inspect_adapter(write_heads(tmp_path / "bad"), tiny_spec(hidden_size=16))
    assert "needs [16, 16]" in (report.reason or "")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert not inspect_adapter(tmp_path / "nowhere", tiny_spec()).accepted
