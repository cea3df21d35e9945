"""The schedule on paper, against cases worked by hand."""

import pytest

from cupyllama.parallel.simulate import side_by_side, simulate


def test_one_stage_has_no_bubble():
    run = simulate([2.0], [], 5)
    assert run.seconds == 10 and run.bubble == 0


def test_equal_stages_fill_and_drain():
    # the last of m micro-batches leaves s stages after m + s - 1 steps
    run = simulate([1.0] * 4, [0.0] * 3, 10)
    assert run.seconds == 13
    assert run.bubble == pytest.approx(1 - 10 / 13)


def test_the_slowest_stage_sets_the_pace():
    # it begins after 1, and computes 3 at a time; behind it 1 more
    run = simulate([1.0, 3.0, 1.0], [0.0, 0.0], 10)
    assert run.seconds == 1 + 30 + 1
    assert run.busy == [10, 30, 10]


def test_links_are_hidden_behind_computation_but_for_the_first():
    # one micro-batch under way while the other is computed
    run = simulate([1.0, 1.0], [0.5], 10)
    assert run.seconds == pytest.approx(1 + 0.5 + 10)


def test_a_slow_link_sets_the_pace():
    run = simulate([1.0, 1.0], [2.0], 10)
    assert run.seconds == pytest.approx(1 + 20 + 1)


def test_a_buffer_is_used_again_only_when_it_has_been_sent_on():
    # Stage 1 takes 4 for each. Its two buffers hold numbers 0 and 1; number 2 can come once 0 is
    # done at 1 + 4 = 5, and is there long before it is wanted at 9: the pace is stage 1's.
    run = simulate([1.0, 4.0], [1.0], 3)
    assert run.seconds == pytest.approx(1 + 1 + 12)
    # With a link of 5, number 2 leaves the link at 1 + 5 · 3, and is computed by 20.
    assert simulate([1.0, 4.0], [5.0], 3).seconds == pytest.approx(1 + 15 + 4)


def test_replicas_side_by_side_end_with_the_last_one():
    # 4 + 1 against 3 + 1: of 2 · 2 · 5 stage seconds, 8 + 6 are computed
    run = side_by_side(simulate([1.0, 1.0], [0.0], count) for count in (4, 3))
    assert run.seconds == 5 and run.busy == [4, 4, 3, 3]
    assert run.bubble == pytest.approx(1 - 14 / 20)
    assert side_by_side([simulate([1.0], [], 0), simulate([1.0], [], 2)]).bubble == 0.5


def test_nothing_to_do():
    assert simulate([1.0, 1.0], [0.0], 0).seconds == 0
