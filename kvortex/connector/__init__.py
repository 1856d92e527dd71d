"""The vLLM connector. Nothing else in KVortex imports vLLM; importing this needs no GPU."""

from kvortex.connector.connector import KVortexConnector

__all__ = ["KVortexConnector"]
