"""What is decided before a request is sent: moments, adapters, lengths, prompts. All with fixed seeds."""

import itertools
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from perseid_loadtest.traffic.arrivals import Gamma, Trace, parse_arrivals
from perseid_loadtest.traffic.lengths import Between, InTurn, parse_lengths
from perseid_loadtest.traffic.options import LEAST_RATE, MOST_RATE
from perseid_loadtest.traffic.plan import Plan
from perseid_loadtest.traffic.popularity import RoundRobin, hot, parse_popularity, zipf
from perseid_loadtest.traffic.prompts import FilePrompts, RandomPrompts, parse_prompts
from perseid_server.errors import InvalidRequest

NAMES = tuple("abcdefgh")
DRAWS = 20_000


def gaps(burstiness: float, rate: float = 50.0) -> list[float]:
    due = Gamma(rate, burstiness).due(random.Random(7))
    moments = [0.0, *(one.at for one in itertools.islice(due, DRAWS))]
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_variance_of_their_burstiness(burstiness):
    found = gaps(burstiness)
    mean, deviation = statistics.fmean(found), statistics.pstdev(found)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert deviation / mean == pytest.approx(burstiness**-0.5, rel=0.05)


@pytest.mark.parametrize("burstiness", [0.01, 1000.0])
@pytest.mark.parametrize("rate", [LEAST_RATE / 64, MOST_RATE])
def test_moments_are_finite_and_in_order_at_the_bounds(rate, burstiness):
    """A sweep goes down to a 64th of the rate that it began with."""
    found = gaps(burstiness, rate)
    assert min(found) >= 0.0
    assert 0.0 < sum(found) < float("inf")


def test_poisson_counts_vary_as_much_as_their_mean():
    moments = itertools.accumulate(gaps(1.0))
    counts = Counter(int(moment) for moment in moments)
    whole = [counts[second] for second in range(max(counts))]
    assert statistics.pvariance(whole) / statistics.fmean(whole) == pytest.approx(1.0, abs=0.2)


def shares(popularity) -> list[float]:
    draw = random.Random(3)
    counts = Counter(popularity.pick(number, draw) for number in range(DRAWS))
    return [counts[name] / DRAWS for name in NAMES]


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_zipf_shares_fall_with_the_rank(exponent):
    total = sum(rank**-exponent for rank in range(1, 9))
    wanted = [rank**-exponent / total for rank in range(1, 9)]
    assert shares(zipf(NAMES, exponent)) == pytest.approx(wanted, abs=0.012)


def test_one_hot_adapter_and_the_rest_between_the_others():
    assert shares(hot(NAMES, "c", 0.9)) == pytest.approx([0.1 / 7] * 2 + [0.9] + [0.1 / 7] * 5, abs=0.01)
    assert hot(("c",), "c", 0.9).pick(0, random.Random(0)) == "c"


def test_round_robin_takes_turns():
    assert [RoundRobin(NAMES).pick(number, random.Random(0)) for number in range(10)] == [*NAMES, "a", "b"]


def test_popularity_as_it_is_written():
    draw = random.Random(0)
    assert parse_popularity("hot:b=1", NAMES).pick(0, draw) == "b"
    assert parse_popularity("hot:base=1", ("", "a")).pick(0, draw) == ""
    assert parse_popularity("round-robin", NAMES).pick(3, draw) == "d"
    assert shares(parse_popularity("uniform", NAMES)) == pytest.approx([1 / 8] * 8, abs=0.012)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zipf", "expected zipf:S"), ("zipf:-1", "zipf:S with a number"), ("zipf:nan", "zipf:S with a number"),
        ("hot:z", "not among --adapters"), ("hot:a=2", "a share from 0 to 1"), ("even", "expected zipf:S"),
    ],
)  # fmt: skip
def test_popularity_that_cannot_be_read(text, message):
    with pytest.raises(InvalidRequest, match=message):
        parse_popularity(text, NAMES)


def test_a_share_of_nothing_needs_another_name():
    """Without one there would be nobody to ask for, at the first request."""
    for names, text in ((("",), "hot:base=0"), (("a",), "hot:a=0")):
        with pytest.raises(InvalidRequest, match=r"--popularity.*expected a share above 0, or other --adapters beside"):
            parse_popularity(text, names)
    assert parse_popularity("hot:a=0", ("a", "b")).pick(0, random.Random(0)) == "b"


def test_lengths_as_they_are_written(tmp_path: Path):
    assert parse_lengths("output_tokens", "12") == Between(12, 12)
    drawn = [parse_lengths("output_tokens", "3..5").pick(n, random.Random(n)) for n in range(200)]
    assert set(drawn) == {3, 4, 5}
    (tmp_path / "lengths").write_text('7\n\n{"output_tokens": 9}\n')
    assert parse_lengths("output_tokens", str(tmp_path / "lengths")) == InTurn((7, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "1 ≤ LO"), ("5..4", "1 ≤ LO"), ("-1", "a number of tokens"), ("", "a number of tokens"),
        ("99999999999", "1 ≤ LO"), ("1..", "a number of tokens"), ("\0", "a number of tokens"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_read(text, message):
    with pytest.raises(InvalidRequest, match=f"--output-tokens.*{message}"):
        parse_lengths("output_tokens", text)


@pytest.mark.parametrize("line", ["x", "0", "1.5", "true", "{}", "[" * 100_000])
def test_a_line_that_is_no_length_is_named(tmp_path: Path, line: str):
    (tmp_path / "file").write_text(f"3\n{line}\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        parse_lengths("output_tokens", str(tmp_path / "file"))


def plan(seed: int = 5, **changed) -> Plan:
    prompts = RandomPrompts(Between(20, 40), range(1000, 2000))
    return Plan(seed, **{"popularity": zipf(NAMES, 1), "prompts": prompts, "output": Between(1, 99)} | changed)


def test_a_plan_with_a_seed_is_the_same_whatever_the_order():
    first = [plan().request(number) for number in range(50)]
    second = [plan().request(number) for number in reversed(range(50))]
    assert first == second[::-1]
    moments = [[one.at for one in itertools.islice(plan(arrivals=Gamma(10.0)).due(), 50)] for _ in range(2)]
    assert moments[0] == moments[1]


def test_another_seed_and_another_trial_are_another_plan():
    prompts = {one.request(0).prompt for one in (plan(5), plan(6), plan(5).fresh(1, Gamma(1.0)))}
    assert len(prompts) == 3


def test_no_two_prompts_begin_alike():
    beginnings = {plan().request(number).prompt[:8] for number in range(500)}
    assert len(beginnings) == 500


def test_a_shared_prefix_is_shared_and_counts():
    prompts = parse_prompts("10", None, 6, seed=1)
    one, two = (prompts.prompt(number, random.Random(number)) for number in (0, 1))
    assert (len(one), one[:6] == two[:6], one[6:] == two[6:]) == (10, True, False)
    assert len(prompts.prompt(0, random.Random(0), tokens=4)) == 4


def test_prompts_of_a_file_take_turns(tmp_path: Path):
    (tmp_path / "prompts").write_text('{"prompt": "hello"}\n{"prompt": [1, 2]}\n')
    prompts = parse_prompts(str(tmp_path / "prompts"), None, 0, seed=1)
    assert prompts == FilePrompts(("hello", (1, 2)))
    assert prompts.prompt(2, random.Random(0)) == "hello"


@pytest.mark.parametrize("line", ["3", '{"prompt": ""}', '{"prompt": [1.5]}', '{"prompt": [true]}', '{"prompt": [-1]}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str):
    (tmp_path / "prompts").write_text(f'{{"prompt": "hello"}}\n{line}\n')
    with pytest.raises(InvalidRequest, match=r"--prompt-tokens.*line 2"):
        parse_prompts(str(tmp_path / "prompts"), None, 0, seed=1)


def test_what_a_trace_states_stands(tmp_path: Path):
    (tmp_path / "trace").write_text('2.5\n{"at": 0.5, "adapter": "h", "prompt_tokens": 3, "output_tokens": 4}\n')
    trace = parse_arrivals(f"trace:{tmp_path / 'trace'}", None)
    traced = plan(arrivals=trace)
    due = list(traced.due())
    assert [one.at for one in due] == [0.5, 2.5]
    request = traced.request(0, due[0])
    assert (request.adapter, len(request.prompt), request.output_tokens) == ("h", 3, 4)
    assert traced.request(1, due[1]) == plan().request(1)
    assert isinstance(trace, Trace)


@pytest.mark.parametrize(
    "line",
    [
        "x", "-1", "null", "{}", '{"at": 1, "when": 2}', '{"at": 1, "prompt_tokens": 0}', "Infinity", '{"at": true}',
        "9" * 400, '{"at": 1, "prompt_tokens": 99999999}', '{"at": 1, "output_tokens": 1' + "0" * 400 + "}",
    ],
)  # fmt: skip
def test_a_line_of_a_trace_that_cannot_be_read_is_named(tmp_path: Path, line: str):
    (tmp_path / "trace").write_text(f"1.0\n{line}\n")
    with pytest.raises(InvalidRequest, match=r"--arrivals trace:.*line 2"):
        parse_arrivals(f"trace:{tmp_path / 'trace'}", None)


@pytest.mark.parametrize("text", ["gamma:0", "gamma:", "gamma:nan", "even", "trace:", "trace:/none"])
def test_arrivals_that_cannot_be_read(text: str):
    with pytest.raises(InvalidRequest, match="--arrivals"):
        parse_arrivals(text, None if text.startswith("trace") else 1.0)
