"""The vLLM connector. Nothing else in KVortex imports vLLM; importing this needs no GPU."""

import contextlib

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvortex.config import CONNECTOR_MODULE, CONNECTOR_NAME
from kvortex.connector.connector import KVortexConnector

with contextlib.suppress(ValueError):  # it is known already
    # vLLM finds us by the module path; its MultiConnector asks for children's statistics by name
    KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)

__all__ = ["KVortexConnector"]
