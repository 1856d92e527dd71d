"""Judgement: asked once, at the end, of a ticket and of those before it in its copy."""

from __future__ import annotations

import pytest

from kvortex.judgement import Judgement


class Found:
    """What kernels left, which is gone once somebody asked."""

    def __init__(self, *block_ids: int) -> None:
        self._left = list(block_ids)
        self.asked = 0

    def __call__(self) -> list[int]:
        self.asked += 1
        left, self._left = self._left, []
        return left


def test_nobody_is_asked_before_the_end_and_nobody_twice() -> None:
    found = Found(5, 7)
    judgement = Judgement(found)
    assert judgement.bad_block_ids == []
    assert found.asked == 0
    for _ in range(2):
        judgement.settle()
        assert judgement.bad_block_ids == [5, 7]
        assert found.asked == 1


@pytest.mark.parametrize("sooner", [[], [0], [2], [1, 0], [0, 1, 2, 3]])
def test_the_last_of_a_copy_tells_of_all_whoever_was_settled_sooner(sooner: list[int]) -> None:
    found = [Found(1), Found(), Found(2, 3), Found(4)]
    judgements: list[Judgement] = []
    for part in found:
        judgements.append(Judgement(part, judgements[-1] if judgements else None))
    for which in sooner:
        judgements[which].settle()
    judgements[-1].settle()
    assert judgements[-1].bad_block_ids == [1, 2, 3, 4]
    assert judgements[1].bad_block_ids == [1]
    assert [part.asked for part in found] == [1, 1, 1, 1]
