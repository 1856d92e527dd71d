"""What a client asks of one request: taken as it was meant, or ignored and logged in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from junk import VALUES, is_one_line, spoiled

if TYPE_CHECKING:
    from kvortex.connector.request_params import RequestParams

pytestmark = [pytest.mark.vllm, pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]

ASKED = {"max_load_tokens": 3, "max_offload_tokens": 0, "explain": True, "do_remote_decode": False}


def read(params: object) -> RequestParams:
    from kvortex.connector.request_params import RequestParams

    return RequestParams.of(params)


@example(params="vLLM's own server lets a client say this in vllm_xargs")
@given(params=spoiled(ASKED) | VALUES)
def test_what_a_client_asks_of_a_request(params: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    asked = read(params)
    told = params if isinstance(params, dict) else {}
    for name in ("max_load_tokens", "max_offload_tokens"):
        value = told.get(name)
        assert getattr(asked, name) == (value if type(value) is int and value >= 0 else None)
    assert asked.explain is (told.get("explain") is True)
    assert all(is_one_line(record.getMessage()) for record in caplog.records)
