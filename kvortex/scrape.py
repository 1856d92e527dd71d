"""Scrape: what a server's /metrics said at one time, read over HTTP."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Self

from kvortex.core import ConfigError, KVortexError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Labels = frozenset[tuple[str, str]]
# A server may send anything: repetitions are possessive, so that no line takes longer than others.
NUMBER = r"[-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?"
SAMPLE = re.compile(rf"([a-zA-Z_:][\w:]*+)(?:\{{(.*)\}})?\s++({NUMBER})(?:\s++-?\d++)?", re.ASCII)
LABEL = re.compile(r'\b(\w++)="((?:[^"\\]++|\\.)*+)"')
SMALLEST, LARGEST = 1e-100, 1e100
"""No metric is beyond; within, sums and quotients stay finite."""
MOST_BYTES = 64 << 20
WANT_KEY = {401, 403}
STARTED = "process_start_time_seconds"
"""Of the server's process; one that has several tells none."""


class ScrapeError(KVortexError, RuntimeError):
    """There is no server, or it is not one that serves with KVortex."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """Samples by name and labels. Those whose name ends with `_total` only grow."""

    at: float
    """In seconds, on a clock that is not set."""
    samples: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def of(cls, text: str, at: float) -> Self:
        """Read Prometheus' text format; what is no sample of a sane number is passed over."""
        samples: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
        for line in text.split("\n"):
            found = SAMPLE.fullmatch(line.strip())
            if found is None:
                continue
            number = float(found[3])
            if number == 0 or SMALLEST <= abs(number) <= LARGEST:
                samples[found[1]][frozenset(LABEL.findall(found[2] or ""))] = number
        return cls(at, dict(samples))

    def since(self, before: Scrape) -> Scrape:
        """What was added to totals since an earlier one; all else as it is now.

        If the server was started anew in between, it began at 0.
        """
        if self._began_after(before):
            return self
        samples = dict(self.samples)
        for name, values in self._totals():
            earlier = before.samples.get(name, {})
            samples[name] = {key: value - earlier.get(key, 0) for key, value in values.items()}
        return Scrape(self.at, samples)

    def total(self, name: str) -> float:
        """The sum over all labels, so of all engines; 0 if there is none."""
        return sum(self.samples.get(name, {}).values())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by the value of one label, in the order in which the server tells them."""
        sums: defaultdict[str, float] = defaultdict(float)
        for labels, value in self.samples.get(name, {}).items():
            sums[dict(labels).get(label, "")] += value
        return dict(sums)

    def quotient(self, above: str, below: str) -> float:
        """The sum of one over the other, engine by engine, of those where the other is not 0."""
        divisors = self.samples.get(below, {})
        return sum(
            value / divisors[labels]
            for labels, value in self.samples.get(above, {}).items()
            if divisors.get(labels)
        )

    def _began_after(self, before: Scrape) -> bool:
        """By the time of its start, if it tells that; or, as totals only grow, if one fell."""
        started, earlier = self.samples.get(STARTED), before.samples.get(STARTED)
        if started and earlier and started != earlier:
            return True
        return any(
            value < before.samples.get(name, {}).get(labels, 0)
            for name, values in self._totals()
            for labels, value in values.items()
        )

    def _totals(self) -> Iterable[tuple[str, Mapping[Labels, float]]]:
        return [item for item in self.samples.items() if item[0].endswith("_total")]


def scrape(url: str, timeout_s: float = 10) -> Scrape:
    """Ask a vLLM server that runs with KVortex.

    Args:
        url: of the server, or of its /metrics; http:// may be left out.
        timeout_s: how long the whole answer may take.

    Raises:
        ConfigError: a URL that cannot be a server's.
        ScrapeError: in one line, why nothing can be told.
    """
    where = metrics_url(url)
    try:
        text = _within(timeout_s, lambda: _read(where, timeout_s)).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        error.close()
        what = "it wants a key" if error.code in WANT_KEY else "that is not vLLM's /metrics"
        raise ScrapeError(f"{where} answers {error.code}: {what}") from None
    except IncompleteRead:
        raise ScrapeError(f"{where}: the answer was cut off") from None
    except (OSError, HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise ScrapeError(f"no answer from {where}: {why}; is a server up there?") from None
    result = Scrape.of(text, time.monotonic())
    if not any(name.startswith("vllm:") for name in result.samples):
        raise ScrapeError(f"{where} is not vLLM's: no metric there begins with vllm:")
    if not any(name.startswith("vllm:kvortex_") for name in result.samples):
        raise ScrapeError(
            f"the vLLM at {where} runs without KVortex: start it with --kv-transfer-config "
            '"$(kvortex config)"'
        )
    return result


def _read(where: str, timeout_s: float) -> bytes:
    with urllib.request.urlopen(where, timeout=timeout_s) as response:
        body: bytes = response.read(MOST_BYTES)
        if response.length and len(body) < MOST_BYTES:  # http.client lets that pass
            raise IncompleteRead(body, response.length)
    return body


def _within(timeout_s: float, ask: Callable[[], bytes]) -> bytes:
    """What it returns or raises, or TimeoutError.

    A socket's own timeout begins anew with every byte, in headers as well. So a thread asks, and is
    left to itself if it is late: it keeps no process from ending.
    """
    answers: SimpleQueue[bytes | Exception] = SimpleQueue()

    def put() -> None:
        try:
            answers.put(ask())
        except Exception as error:  # noqa: BLE001  (it is raised by who asked)
            answers.put(error)

    Thread(target=put, name="kvortex-scrape", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except Empty:
        raise TimeoutError(f"not all of it came within {timeout_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def metrics_url(url: str) -> str:
    """Where a server that was named in short has its metrics.

    Raises:
        ConfigError: a scheme other than http and https.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "http", url
    if scheme not in {"http", "https"} or not rest.strip("/"):
        raise ConfigError(f"{url}: use the URL of a server, like http://localhost:8000")
    return f"{scheme}://{rest.rstrip('/').removesuffix('/metrics')}/metrics"
