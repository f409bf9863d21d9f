"""Claims and what corrects them."""

import random

import pytest

from perseid_server.speculation.claims import LEAST_FACTOR, MOST_CERTAIN, Claim, Record, Records

CLAIM = Claim(("medusa", 0), 0.6)


def test_an_untried_source_is_believed() -> None:
    assert Records().estimate("a", CLAIM) == 0.6


@pytest.mark.parametrize("truth", [0.1, 0.3, 0.5, 0.7])
def test_estimates_come_near_the_truth(truth: float) -> None:
    records, source = Records(), random.Random(3)
    for _ in range(1500):
        records.add("a", CLAIM, right=source.random() < truth)
    assert records.estimate("a", CLAIM) == pytest.approx(truth, abs=0.08)


def test_adapters_and_kinds_have_records_of_their_own() -> None:
    records = Records()
    for _ in range(300):
        records.add("a", CLAIM, right=False)
    assert records.estimate("a", CLAIM) < 0.1
    assert records.estimate("b", CLAIM) == records.estimate("a", Claim(("medusa", 1), 0.6)) == 0.6
    records.forget("a")
    assert records.estimate("a", CLAIM) == 0.6


def test_old_claims_fade() -> None:
    record = Record()
    for _ in range(3000):
        record.add(0.5, right=False)
    assert record.factor == LEAST_FACTOR
    for _ in range(1500):
        record.add(0.5, right=True)
    assert record.factor > 1.0


def test_nothing_is_certain() -> None:
    records = Records()
    for _ in range(300):
        records.add("a", Claim(("sure", 0), 0.9), right=True)
    assert records.estimate("a", Claim(("sure", 0), 1.0)) == MOST_CERTAIN
    assert records.estimate("a", Claim(("sure", 0), 0.9), of_sequence=0.1) < 0.2
