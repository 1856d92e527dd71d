"""hooked_layers: which layers of a forward will tell the connector when they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.forward_context import ForwardContext


def hooked_layers(forward_context: ForwardContext) -> Collection[str]:
    """The layers with attention metadata; none where a graph of the whole model is replayed.

    A batch cut into several (its metadata is a list) runs the hooks once for each part: it counts
    as one without them.
    """
    metadata = forward_context.attn_metadata
    whole_graph = forward_context.cudagraph_runtime_mode.name == "FULL"
    return metadata.keys() if isinstance(metadata, dict) and not whole_graph else ()
