"""What the cost model decides from speeds that were measured."""

from __future__ import annotations

import pytest

from kvortex.cost_model import LEAST_TOKENS, CostModel

TOKEN_BYTES = 128 << 10


def model(prefill: float = 10_000, link: float = 50e9) -> CostModel:
    return CostModel(TOKEN_BYTES, prefill, link)


def test_loading_pays_until_something_is_known() -> None:
    assert CostModel(TOKEN_BYTES).pays(1, 1, 10**9)
    assert CostModel(TOKEN_BYTES, prefill_tokens_per_s=1e9).pays(1, 1)
    assert CostModel(TOKEN_BYTES, load_bytes_per_s=1.0).pays(1, 1)


@pytest.mark.parametrize(
    ("tokens", "ahead", "pays"),
    [
        (16, 0, False),  # 1.6 ms of computing against 2 ms of overhead
        (32, 0, True),
        (1000, 0, True),
        (1000, 30_000, True),  # 100 ms against 2 + 81
        (1000, 40_000, False),  # 100 ms against 2 + 107
    ],
)
def test_what_pays(tokens: int, ahead: int, pays: bool) -> None:
    assert model().pays(tokens, tokens, ahead) is pays


def test_a_slow_link_never_pays() -> None:
    assert not model(link=1e9).pays(8192, 8192)


def test_speed_is_learnt_from_large_steps_only() -> None:
    costs = CostModel(TOKEN_BYTES)
    costs.observe_step(LEAST_TOKENS - 1, 1e-6)
    costs.observe_step(8192, 0.0)
    assert costs.prefill_tokens_per_s is None
    costs.observe_step(8192, 1.0)
    assert costs.prefill_tokens_per_s == 8192
    for _ in range(50):
        costs.observe_step(8192, 0.5)
    assert costs.prefill_tokens_per_s == pytest.approx(2 * 8192, rel=0.01)


def test_only_long_loads_pause_others() -> None:
    assert not model().pauses(512)  # 1.3 ms
    assert model().pauses(1024)
    assert not CostModel(TOKEN_BYTES).pauses(10**6)


def test_a_load_is_hidden_behind_enough_compute() -> None:
    assert model().hides(16_384, 8192)
    assert not model().hides(32_768, 16)  # 1.6 ms behind 86
    assert CostModel(TOKEN_BYTES).hides(1000, 100)
    assert not CostModel(TOKEN_BYTES).hides(1000, 99)


def test_a_window_makes_a_long_hit_cheap() -> None:
    assert not model(link=1e9).pays(8192, 8192)
    assert model(link=1e9).pays(8192, 1024)
