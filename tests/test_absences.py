"""Why keys are not there: what is remembered, and for how long."""

from __future__ import annotations

from kvortex.absences import LEAST_KEYS, Absences
from kvortex.metrics import MISSED, Counters, MissReason


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_the_newest_reason_is_told_as_often_as_asked() -> None:
    absences = Absences(8)
    for reason in MissReason:
        absences.note(key(1), reason)
        assert [absences.why(key(1)), absences.why(key(1))] == [reason, reason]
    assert absences.why(key(2)) is MissReason.NEVER_STORED


def test_what_is_long_ago_or_cleared_was_never_stored() -> None:
    absences = Absences(8)
    absences.note(key(0), MissReason.EVICTED)
    for number in range(1, 2 * LEAST_KEYS + 1):
        assert absences.why(key(0)) is MissReason.EVICTED or number > LEAST_KEYS
        absences.note(key(number), MissReason.NOT_ADMITTED)
    assert absences.why(key(0)) is MissReason.NEVER_STORED
    assert absences.why(key(LEAST_KEYS + 1)) is MissReason.NOT_ADMITTED
    absences.clear()
    assert absences.why(key(2 * LEAST_KEYS)) is MissReason.NEVER_STORED


def test_every_reason_has_a_counter() -> None:
    counters = Counters()
    for number, reason in enumerate(MissReason, 1):
        counters.miss(reason, number)
        counters.miss(reason, 10)
    counted = {name: n for name, n in counters.as_dict().items() if name.startswith(MISSED)}
    assert counted == {MISSED + reason: n for n, reason in enumerate(MissReason, 11)}
