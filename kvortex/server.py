"""Server: a real vLLM API server in a process of its own, and a streaming client for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import httpx

from kvortex.core import KVortexError
from kvortex.vllm_log import VllmLog

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # spinning threads of two processes on few cores starve each other
    "TRITON_F32_DEFAULT": "ieee",  # so that float32 models attend in float32 on a GPU too
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class ServerError(KVortexError, RuntimeError):
    """The server did not start, or died; below its first line is the end of the server's log."""

    __str__ = RuntimeError.__str__


@dataclass(frozen=True, slots=True)
class Answer:
    """What a streamed completion brought: its token ids, and seconds to the first of them."""

    token_ids: tuple[int, ...]
    first_token_s: float


class Server:
    """`vllm serve` on a free port of this machine, up for the length of a `with` block.

    It runs in `folder`, where it leaves its log, so that no checkout's folders are on its path.

    Args:
        model: folder of the model, or a name that vLLM knows.
        folder: where it runs.
        arguments: for vLLM's command line.
        kv_transfer_config: the connector, if any.

    Raises:
        ServerError: on entering, if it does not become ready.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        arguments: Sequence[str] = (),
        kv_transfer_config: dict[str, Any] | None = None,
        start_timeout_s: float = 900,
    ) -> None:
        self._model = model
        self._folder = folder
        self._arguments = list(arguments)
        if kv_transfer_config is not None:
            self._arguments += ["--kv-transfer-config", json.dumps(kv_transfer_config)]
        self._start_timeout_s = start_timeout_s
        self._log = VllmLog(folder / "server.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(timeout=600)

    def __enter__(self) -> Self:
        port = _free_port()
        self._client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--model", self._model]
        command += ["--served-model-name", "model", *self._arguments]
        with self._log.path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=SETTINGS | dict(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def url(self) -> str:
        """Of the API, without a path."""
        return str(self._client.base_url).rstrip("/")

    def complete(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Greedy completion of exactly `max_tokens` tokens, streamed.

        Raises:
            ServerError: the server refused it or died.
        """
        body = {
            "model": "model",
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        token_ids: list[int] = []
        first = None
        began = time.perf_counter()
        try:
            with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise ServerError(f"vLLM refused a request: {response.read().decode()}")
                for chunk in _events(response):
                    first = first or time.perf_counter() - began
                    token_ids += chunk["choices"][0].get("token_ids") or ()
        except httpx.HTTPError as error:
            raise ServerError(f"vLLM broke off ({error}):\n{self.log_tail()}") from error
        return Answer(tuple(token_ids), first or 0.0)

    def reset_prefix_cache(self) -> None:
        """Forget the GPU's cached blocks; needs VLLM_SERVER_DEV_MODE=1 in the environment."""
        self._client.post("/reset_prefix_cache").raise_for_status()

    def counter(self, name: str) -> int:
        """The sum of a Prometheus counter of /metrics over its labels, 0 if it is not there."""
        text = self._client.get("/metrics").text
        values = re.findall(rf"^{re.escape(name)}_total(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        return int(sum(float(value) for value in values))

    def log_tail(self) -> str:
        """The last lines of the server's log."""
        return self._log.tail()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                code = self._process.returncode
                why = self._log.refusal() or f"vLLM ended with code {code} at start"
                raise ServerError(f"{why}\n{self.log_tail()}")
            try:
                if self._client.get("/health", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.2)
        raise ServerError(f"vLLM is not up after {self._start_timeout_s} s:\n{self.log_tail()}")

    def _stop(self) -> None:
        """End the server and the engine process it started, politely first."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        finally:  # also where ctrl-c comes a second time
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whoever is left of its session
            process.wait()
        self._client.close()
        self._process = None


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
