"""What is written comes back; anything else is told."""

import json
from pathlib import Path

import pytest

from perseid_loadtest.analysis import files
from perseid_loadtest.analysis.slo import Slo
from perseid_loadtest.analysis.summary import summarise
from perseid_loadtest.traffic.record import ChurnRecord
from perseid_server.errors import InvalidRequest
from tests.loadtest.analysis.runs import RUNS, answer, failure, run_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "run.json"


def write(path, run):
    files.write(path, run, summarise(run, Slo(ttft_s=0.5)))
    return path


def test_a_run_comes_back(path):
    churn = (ChurnRecord("load", "x", 1.0, 1.5, "409"),)
    told = {
        "churn": churn,
        "not_put_back": churn,
        "server_before": {"x": 1.0},
        "stopped_early": "why",
        "stops_at_eos": True,
    }
    run = run_of(answer(retry_after_s=1.5), failure(1), **told, window_s=3.0)
    found = files.read(write(path, run))
    assert found == files.Saved(run, summarise(run, Slo(ttft_s=0.5)))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "not measured"])
def test_every_run_comes_back(name, path):
    assert files.read(write(path, RUNS[name])).run == RUNS[name]


def test_nan_becomes_nothing(path):
    found = files.read(write(path, RUNS["not measured"])).run
    assert (found.client_busy, found.most_late_s, found.records) == (0.0, 0.0, RUNS["not measured"].records)


def test_options_of_any_kind_are_written(path):
    found = files.read(write(path, run_of(options={"trace": Path("a/b"), "adapters": ("a",), "rate": None})))
    assert found.run.options == {"trace": "a/b", "adapters": ["a"], "rate": None}


def test_the_schema_is_plain(path):
    told = json.loads(write(path, run_of(answer())).read_bytes())
    assert (told["kind"], told["version"]) == ("perseid loadtest", 1)
    assert told["run"]["records"][0]["arrivals"] == [[1.0, 1], [1.1, 1], [1.3, 1]]
    assert told["summary"]["ttft"]["p50"] == 1.0


def test_an_old_file_is_replaced_and_nothing_is_left_beside(path):
    write(path, run_of(answer()))
    write(path, run_of())
    assert files.read(path).run.records == ()
    assert [one.name for one in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"kind": "other", "version": 1}', b"[" * 100_000])
def test_a_file_of_another_kind(content, path):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="not the file of a load test"):
        files.read(path)


def test_a_file_from_before_the_time_of_sending_was_kept(path):
    """Its rate of requests due was over the time of measuring, which is another figure."""
    told = json.loads(write(path, run_of(answer(), window_s=2.0)).read_bytes())
    del told["run"]["window_s"]
    path.write_text(json.dumps(told))
    found = files.read(path)
    assert (found.run.window_s, found.summary.offered_per_s) == (0.0, None)
    assert found.summary.requests_per_s == 0.1


def test_another_version(path):
    told = json.loads(write(path, run_of()).read_bytes()) | {"version": 2}
    path.write_text(json.dumps(told))
    with pytest.raises(InvalidRequest, match="version 2 and this perseid reads version 1"):
        files.read(path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"records": [{"number": "one"}]}, "number"),
        ({"records": None}, "array"),
        ({"records": [{"arrivals": [[1.0]]}]}, "length 2"),
        ({"seconds": "long"}, "seconds"),
    ],
)
def test_a_damaged_file_names_the_place(change, place, path):
    told = json.loads(write(path, run_of()).read_bytes())
    told["run"] |= change
    path.write_text(json.dumps(told))
    with pytest.raises(InvalidRequest, match="is damaged") as caught:
        files.read(path)
    assert place in caught.value.message


def test_a_file_cut_off_is_told(path):
    content = write(path, run_of(answer())).read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(InvalidRequest, match=r"run\.json"):
        files.read(path)


def test_no_file_and_no_place_for_one(tmp_path):
    with pytest.raises(InvalidRequest, match="No such file"):
        files.read(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot be written"):
        write(tmp_path / "file" / "run.json", run_of())


def test_what_could_not_be_put_in_place_leaves_nothing_beside(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(InvalidRequest, match="cannot be written"):
        write(tmp_path / "run.json", run_of())
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]
