from __future__ import annotations

import itertools

from pairwise import pairwise


def test_any_two_values_of_two_axes_meet_in_far_fewer_cases_than_there_are() -> None:
    axes = ("abcde", [1, 2, 3, 4], (True, False), ("x", "y", "z"))
    cases = pairwise(*axes)
    assert cases == pairwise(*axes)
    for (i, one), (j, other) in itertools.combinations(enumerate(axes), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(one, other))
    assert 20 <= len(cases) <= 24
