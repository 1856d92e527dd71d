"""What is read of /metrics, and what is said where there is nothing to read."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from kvortex.cli import main
from kvortex.scrape import Scrape, ScrapeError, metrics_url, scrape

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = """
# HELP vllm:kvortex_hit_tokens_total KVortex: hit tokens since start.
# TYPE vllm:kvortex_hit_tokens_total counter
vllm:kvortex_hit_tokens_total{engine="0",model_name="a, \\"b\\" {c}"} 600.0
vllm:kvortex_hit_tokens_total{engine="1",model_name="a, \\"b\\" {c}"} 1.5e+02
vllm:kvortex_prefill_tokens_per_second{engine="0",model_name="a, \\"b\\" {c}"} 100
vllm:kvortex_prefill_tokens_per_second{engine="1",model_name="a, \\"b\\" {c}"} 0
vllm:kvortex_missed_tokens_total{engine="0",reason="late"} 32 1700000000000
vllm:kvortex_missed_tokens_total{engine="1",reason="late"} 16
vllm:kvortex_missed_tokens_total{engine="0",reason="evicted"} .5
process_seconds_total 3
not_a_number NaN
too_large 1e999
half a line {
"""


@contextmanager
def serving(text: str, status: int = 200) -> Iterator[str]:
    """A server whose /metrics says this; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def saying(*pieces: bytes, again: float = 0) -> Iterator[str]:
    """A server that answers with these bytes, the last of them again and again; its address."""
    over = threading.Event()

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # once nobody listens
            connection.recv(1 << 16)
            connection.sendall(b"".join(pieces))
            while again and not over.wait(again):
                connection.sendall(pieces[-1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


def test_samples_are_summed_and_told_apart() -> None:
    read = Scrape.of(TEXT, 0)
    assert read.total("vllm:kvortex_hit_tokens_total") == 750
    assert read.total("process_seconds_total") == 3
    assert read.total("never heard of") == 0
    assert read.by("vllm:kvortex_missed_tokens_total", "reason") == {"late": 48, "evicted": 0.5}
    assert not {"not_a_number", "too_large", "half"} & read.samples.keys()


def test_a_quotient_is_of_each_engine() -> None:
    """The second has no speed yet."""
    read = Scrape.of(TEXT, 0)
    above, below = "vllm:kvortex_hit_tokens_total", "vllm:kvortex_prefill_tokens_per_second"
    assert read.quotient(above, below) == 6


def test_prometheus_own_client_is_understood() -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    counter = client.Counter("vllm:kvortex_x", 'a "help"\n{', ["name"], registry=registry)
    names = ["", 'quote " and } brace', "back\\slash", "a=1,b=2", "ünicode"]
    for number, name in enumerate(names, 1):
        counter.labels(name).inc(number / 7)
    client.Histogram("seconds", "", registry=registry).observe(3)
    read = Scrape.of(client.generate_latest(registry).decode(), 0)
    assert sorted(read.samples["vllm:kvortex_x_total"].values()) == [n / 7 for n in range(1, 6)]
    assert read.total("seconds_count") == 1
    assert read.by("seconds_bucket", "le")["+Inf"] == 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "line",
    [
        "a " + "1" * 1_000_000 + "x",
        "a{" + "b" * 1_000_000 + "} 1",
        "a{" + "}" * 1_000_000 + "x",
        "a{" + "} 1 " * 250_000 + "x",
        "a" + " " * 1_000_000 + "x",
        'a{b="' + '\\"' * 500_000 + "} 1",
    ],
    ids=["digits", "letters", "braces", "ends", "spaces", "quotes"],
)
def test_no_line_takes_longer_than_others(line: str) -> None:
    Scrape.of(line, 0)


def test_a_label_may_have_what_unicode_takes_for_the_end_of_a_line() -> None:
    read = Scrape.of('a{b="\u2028\x85\x0c"} 3\r\nb 4', 0)
    assert (read.total("a"), read.total("b")) == (3, 4)


@pytest.mark.parametrize("number", ["1e308", "-1e308", "1e-320"])
def test_numbers_that_no_sum_or_quotient_stands_are_passed_over(number: str) -> None:
    assert Scrape.of(f'a{{b="1"}} {number}\na{{b="2"}} 1', 0).total("a") == 1


def test_only_what_was_added_is_since_another() -> None:
    before = Scrape.of('a_total{x="1"} 5\nlevel 3', 0)
    now = Scrape.of('a_total{x="1"} 7\na_total{x="2"} 1\nlevel 2', 2)
    added = Scrape.of('a_total{x="1"} 2\na_total{x="2"} 1\nlevel 2', 2)
    assert now.since(before) == added


def test_a_server_that_was_started_anew_began_at_nothing() -> None:
    before, now = Scrape.of("a_total 5\nb_total 1", 0), Scrape.of("a_total 2\nb_total 4", 2)
    assert now.since(before).samples == now.samples


def test_a_server_that_was_started_anew_may_be_busier_already() -> None:
    before = Scrape.of("a_total 5\nprocess_start_time_seconds 1.7e9", 0)
    now = Scrape.of("a_total 9\nprocess_start_time_seconds 1.70000001e9", 2)
    assert now.since(before).samples == now.samples
    same = Scrape.of("a_total 9\nprocess_start_time_seconds 1.7e9", 2)
    assert same.since(before).total("a_total") == 4


@pytest.mark.parametrize("url", ["host:8000", "http://host:8000/", "http://host:8000/metrics"])
def test_an_address_may_be_short(url: str) -> None:
    assert metrics_url(url) == "http://host:8000/metrics"


def test_a_server_is_read() -> None:
    with serving(TEXT) as address:
        assert scrape(address).total("vllm:kvortex_hit_tokens_total") == 750


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("who are you?", 401, "answers 401: it wants a key"),
        ("who are you?", 403, "answers 403: it wants a key"),
        ("no such page", 404, "answers 404: that is not vLLM's /metrics"),
        ("process_seconds_total 3", 200, "is not vLLM's: no metric there begins with vllm:"),
        ("<html>hello</html>", 200, "is not vLLM's"),
        ("vllm:prompt_tokens_total 3", 200, "runs without KVortex: start it with --kv-transfer-"),
    ],
)
def test_what_is_no_server_of_ours_is_told_in_one_line(
    text: str, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(text, status) as address:
        assert main(["top", address, "--once"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("kvortex: ")
    assert words in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 9999\r\n\r\n" + TEXT.encode(),
        b"Content-Length: 9999\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nfff\r\n" + TEXT.encode(),
    ],
    ids=["text", "nothing", "chunk"],
)
def test_an_answer_that_was_cut_off_is_not_believed(
    body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with saying(b"HTTP/1.1 200 OK\r\n", body) as address:
        assert main(["top", address, "--once"]) == 1
    told = f"kvortex: http://{address}/metrics: the answer was cut off\n"
    assert capsys.readouterr() == ("", told)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pieces",
    [(b"HTTP/1.1 200 OK\r\n", b"x"), (b"HTTP/1.1 200 OK\r\n\r\n", b"x 1\n")],
    ids=["headers", "body"],
)
def test_a_server_that_drips_is_not_waited_for(pieces: tuple[bytes, ...]) -> None:
    with (
        saying(*pieces, again=0.1) as address,
        pytest.raises(ScrapeError, match="not all of it came within"),
    ):
        scrape(address, timeout_s=0.5)


def test_nobody_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["top", address]) == 1
    assert capsys.readouterr().err == (
        f"kvortex: no answer from http://{address}/metrics: [Errno 111] Connection refused; "
        "is a server up there?\n"
    )


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "ftp://host"])
def test_other_addresses_are_a_wrong_question(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", url]) == 2
    use = "use the URL of a server, like http://localhost:8000"
    assert capsys.readouterr().err == f"kvortex: {url}: {use}\n"


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
def test_an_interval_is_a_time(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "localhost:1", f"--interval={interval}"]) == 2
    assert "use a number of seconds above 0" in capsys.readouterr().err
