"""Rates from arrival times that are known."""

import pytest

from perseid_loadtest.drive import Arrival, Stream, covered, decode_rate, prefill_rate


def stream(moments, tokens=1, started=0.0):
    return Stream(started, tuple(Arrival(moment, tokens) for moment in moments))


def test_only_the_time_in_which_all_decode_counts():
    early = stream([1.0, 2.0, 3.0, 4.0, 5.0])
    late = stream([2.0, 3.0, 4.0, 5.0, 6.0])
    assert decode_rate([early, late]) == pytest.approx(6 / 3)  # tokens at 3, 4 and 5 of both


def test_a_chunk_of_several_tokens_counts_them_all():
    assert decode_rate([stream([1.0, 2.0, 3.0], tokens=4)]) == pytest.approx(8 / 2)


def test_one_stream_leaves_out_its_first_token():
    assert decode_rate([stream([7.0, 7.5, 8.0])]) == pytest.approx(2.0)


def test_requests_run_one_after_the_other_are_counted_over_the_time_that_any_decodes():
    first = stream([1.0, 1.5, 2.0])
    second = stream([5.0, 5.5, 6.0])  # its prefill, from 2 to 5, is not decoding
    assert decode_rate([first, second]) == pytest.approx(4 / 2)


def test_groups_that_follow_each_other_overlap_inside():
    one, two, three = stream([1.0, 2.0, 3.0]), stream([1.0, 2.0, 3.0]), stream([3.0, 4.0, 5.0])
    assert decode_rate([one, two, three]) == pytest.approx(6 / 4)


def test_tokens_that_all_come_at_once_have_no_rate():
    with pytest.raises(ValueError, match="one moment"):
        decode_rate([stream([2.0, 2.0])])


def test_prefill_ends_with_the_first_token():
    assert prefill_rate(stream([3.0, 9.0], started=1.0), 512) == pytest.approx(256.0)


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([(0, 1)], 1), ([(0, 2), (1, 3)], 3), ([(0, 5), (1, 2), (3, 4)], 5), ([(4, 5), (0, 1)], 2), ([], 0)],
)
def test_what_intervals_cover(intervals, length):
    assert covered(intervals) == length
