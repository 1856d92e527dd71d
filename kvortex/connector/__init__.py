"""The vLLM connector. But for the benchmark's engine nothing else imports vLLM."""

import contextlib

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvortex.config import CONNECTOR_MODULE, CONNECTOR_NAME
from kvortex.connector.connector import KVortexConnector

with contextlib.suppress(ValueError):  # it is known already
    # vLLM finds us by the module path; its MultiConnector asks for children's statistics by name
    KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)

__all__ = ["KVortexConnector"]
