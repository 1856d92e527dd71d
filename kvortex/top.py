"""View: one screen of `kvortex top`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvortex.activity import Activity, State
from kvortex.core import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvortex.scrape import Scrape

WIDTH = 78
BAR = 20
HEADING = "{:22}{:>12}{:>14}{}"


@dataclass(frozen=True, slots=True)
class View:
    """What is shown at a time: how a server stands, since its start and of late."""

    state: State
    total: Activity
    recent: Activity | None = None
    """Since the view before; None of the first."""
    seconds: float = 0.0
    """Between the two."""

    @classmethod
    def of(cls, scrape: Scrape, before: Scrape | None = None) -> View:
        """Of one scrape, and of what happened since another."""
        state, total = State.of(scrape), Activity.of(scrape)
        if before is None:
            return cls(state, total)
        return cls(state, total, Activity.of(scrape.since(before)), scrape.at - before.at)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The screen, at most WIDTH wide."""
        parts = (self._tokens(), self._tiers(), self._decisions(), self._failures())
        lines = [line for part in parts for line in ("", *part)]
        return [line[:WIDTH].rstrip() for line in (*self._header(), *lines)]

    def _header(self) -> Iterator[str]:
        state = self.state
        yield f"{state.running:.0f} requests run, {state.waiting:.0f} wait"
        if not state.slots:
            yield "no slots: no request came yet, or KVortex is off for this model (see the log)"
        for what, ranks in (
            ("READING FROM", state.disk_reading_off),
            ("WRITING TO", state.disk_writing_off),
        ):
            if ranks:
                yield f"{what} DISK IS OFF on {ranks:.0f} rank(s): the drive fails (see the log)"
        # Here, as they are neither "per second" nor "since start", the headings of all below.
        yield from _use("host slots in use", state.resident_slots, state.slots)
        yield from _use("disk slots in use", state.disk_resident_slots, state.disk_slots)

    def _tokens(self) -> Iterator[str]:
        yield HEADING.format("PROMPT TOKENS", "per second", "since start", "   share")
        yield self._token_line("asked for", lambda of: of.asked_tokens)
        yield self._token_line("hit on GPU", lambda of: of.gpu_tokens)
        yield self._token_line("hit in host memory", lambda of: of.host_tokens)
        yield self._token_line("hit on disk", lambda of: of.disk_tokens)
        missed = self.total.missed_tokens
        for reason in sorted(missed, key=lambda reason: -missed[reason]):
            if missed[reason]:
                yield self._token_line(printable(f"missed: {reason}"), _missed(reason))

    def _tiers(self) -> Iterator[str]:
        state = self.state
        yield HEADING.format("TIERS AND LINKS", "per second", "since start", "   measured")
        out, back, disk = (
            f"   {short(speed, 'B/s')}" if speed else ""
            for speed in (
                state.store_bytes_per_second,
                state.load_bytes_per_second,
                state.disk_read_bytes_per_second,
            )
        )
        yield self._line("GPU to host", lambda of: of.stored_bytes, "B") + out
        yield self._line("host to GPU", lambda of: of.loaded_bytes, "B") + back
        if state.disk_slots:
            yield self._line("host to disk", lambda of: of.disk_written_bytes, "B")
            yield self._line("disk to host", lambda of: of.disk_read_bytes, "B") + disk
        yield self._line("blocks evicted", lambda of: of.evicted_blocks)
        yield self._line("blocks not admitted", lambda of: of.not_admitted_blocks)
        yield self._line("blocks without slot", lambda of: of.refused_blocks)

    def _decisions(self) -> Iterator[str]:
        state = self.state
        yield HEADING.format("LOAD OR RECOMPUTE", "per second", "since start", "")
        yield self._line("tokens loaded", lambda of: of.host_tokens + of.disk_tokens)
        yield self._line("faster to compute", lambda of: of.unpaid_tokens)
        yield self._line("loads apart", lambda of: of.apart_loads)
        yield self._line("steps loaded by layer", lambda of: of.layered_loads)
        yield self._line("prefill saved", lambda of: of.saved_seconds, "s")
        yield self._line("loads took", lambda of: of.load_seconds, "s")
        yield f"prefill runs at {short(state.prefill_tokens_per_second)} tokens/s"
        yield f"{state.transfers_under_way:.0f} transfers under way"

    def _failures(self) -> Iterator[str]:
        failures = [name for name, number in self.total.failures.items() if number]
        if not failures:
            yield "NO FAILURES"
            return
        yield HEADING.format("FAILURES", "per second", "since start", "")
        for name in failures:
            yield self._line(name.replace("_", " "), _failed(name))

    def _token_line(self, name: str, pick: Callable[[Activity], float]) -> str:
        share = _share(pick(self.total), self.total.asked_tokens)
        return self._line(name.replace("_", " "), pick) + f"   {share:4.0%} {_bar(share)}"

    def _line(self, name: str, pick: Callable[[Activity], float], unit: str = "") -> str:
        lately = "-"
        if self.recent is not None and self.seconds:
            lately = short(pick(self.recent) / self.seconds, unit)
        return f"{name:22.22}{lately:>12}{short(pick(self.total), unit):>14}"


def short(number: float, unit: str = "") -> str:
    """Three digits, a prefix of a thousand and a unit."""
    prefix = ""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or prefix == "P":
            break
        number /= 1000
    whole = number >= 99.5 or (not prefix and number == int(number))
    digits = 0 if whole else 1 if number >= 9.95 else 2
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


def _missed(reason: str) -> Callable[[Activity], float]:
    return lambda of: of.missed_tokens.get(reason, 0.0)


def _failed(name: str) -> Callable[[Activity], float]:
    return lambda of: of.failures[name]


def _use(name: str, used: float, slots: float) -> Iterator[str]:
    if slots:
        share = _share(used, slots)
        yield f"{name:22}{short(used):>12}{'of ' + short(slots):>14}   {share:4.0%} {_bar(share)}"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _bar(share: float) -> str:
    return "#" * round(BAR * min(1.0, max(0.0, share)))
