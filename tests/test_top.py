"""The screen of `kvortex top`, of what a server might say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.scrape import Scrape
from kvortex.top import WIDTH, View, short

FIRST = """
vllm:prefix_cache_queries_total 1000
vllm:prefix_cache_hits_total 300
vllm:kvortex_hit_tokens_total 400
vllm:kvortex_disk_hit_tokens_total 100
vllm:kvortex_missed_tokens_total{reason="evicted"} 200
vllm:kvortex_missed_tokens_total{reason="late"} 0
vllm:kvortex_prefill_tokens_per_second 200
vllm:kvortex_loaded_bytes_total 4000000
vllm:kvortex_slots 8
vllm:kvortex_resident_slots 6
vllm:kvortex_failed_loads_total 3
"""
SECOND = FIRST.replace("queries_total 1000", "queries_total 2000").replace(
    "loaded_bytes_total 4000000", "loaded_bytes_total 14000000"
)


def lines_of(view: View) -> dict[str, str]:
    """By what they begin with."""
    return {line[:22].strip(): " ".join(line[22:].split()) for line in view.lines()}


def test_since_start() -> None:
    lines = lines_of(View.of(Scrape.of(FIRST, 5)))
    assert lines["asked for"] == "- 1.00 k 100% " + "#" * 20
    assert lines["hit on GPU"] == "- 300 30% ######"
    assert lines["hit in host memory"] == "- 300 30% ######"
    assert lines["hit on disk"] == "- 100 10% ##"
    assert lines["missed: evicted"] == "- 200 20% ####"
    assert "missed: late" not in lines
    assert lines["host slots in use"] == "6 of 8 75% " + "#" * 15
    assert "disk slots in use" not in lines
    assert lines["prefill saved"] == "- 2 s"
    assert lines["failed loads"] == "- 3"
    assert "NO FAILURES" not in lines


def test_slots_stand_under_no_heading_that_is_not_theirs() -> None:
    lines = View.of(Scrape.of(FIRST + "vllm:kvortex_disk_slots 9\n", 5)).lines()
    headings = next(number for number, line in enumerate(lines) if "per second" in line)
    (host, disk) = (number for number, line in enumerate(lines) if "slots in use" in line)
    assert host < disk < headings


def test_of_late() -> None:
    lines = lines_of(View.of(Scrape.of(SECOND, 10), Scrape.of(FIRST, 5)))
    assert lines["asked for"].startswith("200 2.00 k")
    assert lines["host to GPU"] == "2.00 MB 14.0 MB"
    assert lines["failed loads"] == "0 3"


def test_a_disk_that_is_off_is_seen_first() -> None:
    text = FIRST + "vllm:kvortex_disk_reading_off 0\nvllm:kvortex_disk_writing_off 2\n"
    lines = View.of(Scrape.of(text, 5)).lines()
    assert "WRITING TO DISK IS OFF on 2 rank(s)" in lines[1]
    assert "READING" not in "".join(lines)


def test_a_server_that_was_not_asked_yet_divides_nothing_by_nothing() -> None:
    view = View.of(Scrape.of("vllm:kvortex_slots 0", 1), Scrape.of("vllm:kvortex_slots 0", 1))
    assert "no slots" in view.lines()[1]
    assert "NO FAILURES" in view.lines()


@pytest.mark.fuzz
@given(st.floats(0, 1e30))
def test_any_number_is_short(number: float) -> None:
    shown = short(number)
    assert len(shown) <= 6 or number >= 1e18
    assert short(number, "B") == shown + ("B" if " " in shown else " B")
    value, _, unit = shown.partition(" ")
    power = 1000.0 ** " kMGTP".index(unit or " ")
    assert float(value) * power == pytest.approx(number, rel=0.006, abs=0.006)


def test_a_server_does_not_steer_the_terminal() -> None:
    text = 'vllm:kvortex_missed_tokens_total{reason="\x1b[2J"} 3'
    assert all(line.isprintable() for line in View.of(Scrape.of(text, 1)).lines())


def test_lines_fit() -> None:
    huge = FIRST.replace("1000", "9" * 40).replace(" 300", " " + "9" * 40)
    assert max(len(line) for line in View.of(Scrape.of(huge, 1)).lines()) <= WIDTH
