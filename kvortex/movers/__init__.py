"""Movers: three ways to carry blocks between KV tensors and host slots. Worker side."""

from kvortex.movers.base import Mover
from kvortex.movers.dma import DmaMover
from kvortex.movers.factory import BUFFER_BYTES, open_movers
from kvortex.movers.staged import StagedMover
from kvortex.movers.zero_copy import ZeroCopyMover

__all__ = ["BUFFER_BYTES", "DmaMover", "Mover", "StagedMover", "ZeroCopyMover", "open_movers"]
