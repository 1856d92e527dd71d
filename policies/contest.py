"""Contest: which rule of admission is in force, by how miniature pools fare with each."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from .miniature import Miniature, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence


class Rule(IntEnum):
    """What is stored of that which is not there."""

    SELDOM = 0
    """What comes again, now and then; nothing of what is new."""
    AGAIN = 1
    """What comes again; nothing of what is new."""
    FITTING = 2
    """What comes again; of what is new, what was reckoned to fit."""
    ALL = 3


LEADS = (1.1, 1.03, 1.0, 1.06)
"""By which factor each rule must have more hits than FITTING has, the more so the more it departs
from it."""
MEMORY = 0.95
"""What a miniature's hits weigh after each decision. Both were found on four synthetic traces and
one real one; on others of the same kinds, drawn anew, the loss against the best was up to 3 %."""
LATELY = 0.5
"""The same, of hits of late."""
STAYS, LEAST_SHARE = 0.9, 0.1
"""Hits that the pool must have for SELDOM to stay in force: of FITTING's, and of SELDOM's own
miniature, or else it holds something else and by this rule would go on to do so."""


class Contest:
    """A miniature pool for each rule sees a sample of the keys, and one rule is in force.

    That is FITTING, or another while it has clearly more hits. SELDOM must have them of late, too,
    and by the hits of the pool itself while it is in force: its miniature may have kept what the
    pool has not.
    """

    def __init__(self, capacity: int) -> None:
        self.sample = Sample(capacity)
        self.in_force = Rule.FITTING
        self.rivals = [Miniature(self.sample.blocks) for _ in Rule]
        self._hits = [0.0] * len(Rule)
        self._hits_lately = [0.0] * len(Rule)
        self._own_hits = self._own_hits_lately = 0.0

    def access(self, key: bytes, stored: Sequence[bool], *, hit: bool) -> None:
        """A key of the sample was asked for.

        Args:
            key: in `sample`.
            stored: by each rule, whether it is stored where it is not there.
            hit: whether the pool itself has it.
        """
        self._own_hits += hit
        for rival, admitted in zip(self.rivals, stored, strict=True):
            rival.access(key, admitted)

    def decide(self) -> None:
        """See who is ahead."""
        self._count()
        hits, fitting = self._hits, self._hits[Rule.FITTING]
        ahead = [rule for rule in Rule if hits[rule] > LEADS[rule] * fitting]
        if Rule.SELDOM in ahead and not self._seldom_pays():
            ahead.remove(Rule.SELDOM)
        best = max(ahead, key=lambda rule: hits[rule], default=Rule.FITTING)
        lasting = self.in_force != Rule.SELDOM and hits[self.in_force] > fitting
        if best != Rule.FITTING or not lasting:
            self.in_force = best

    def _count(self) -> None:
        for rule, rival in enumerate(self.rivals):
            self._hits[rule] = MEMORY * self._hits[rule] + rival.hits
            self._hits_lately[rule] = LATELY * self._hits_lately[rule] + rival.hits
            rival.hits = 0
        self._own_hits_lately = LATELY * self._own_hits_lately + self._own_hits
        self._own_hits = 0

    def _seldom_pays(self) -> bool:
        fitting, seldom = self._hits_lately[Rule.FITTING], self._hits_lately[Rule.SELDOM]
        if self.in_force == Rule.SELDOM:
            return self._own_hits_lately > max(STAYS * fitting, LEAST_SHARE * seldom)
        return seldom > LEADS[Rule.SELDOM] * fitting
