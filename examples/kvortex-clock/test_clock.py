from kvortex_clock import Clock

from kvortex.testing import check_policy


def test_contract() -> None:
    check_policy(Clock)
