"""Is an autoscaling config one that Ray takes? A wrong one kills the head, so it is asked before: needs no cluster."""

from __future__ import annotations

import copy
from typing import Any

from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig


def problems(config: dict[str, Any]) -> list[str]:
    """What Ray's own reading of it says; empty where it is good. The config is left as it was."""
    try:
        read = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
        types = read.get_node_type_configs()
        if read.get_head_node_type() not in types:
            return [f"head_node_type {read.get_head_node_type()!r} is no node type"]
        if not read.disable_node_updaters():
            return ["provider.disable_node_updaters must be true: else Ray logs in to hosts by itself"]
        provider = _get_node_provider_cls(read.get_provider_config())
        if not issubclass(provider, NodeProvider):
            return [f"provider.module {provider} is no NodeProvider"]
        provider(read.get_provider_config(), read.get_config("cluster_name"))
    except Exception as error:
        # Of jsonschema, of Ray's asserts, of the import of the provider: the head would die of each.
        first = str(error).strip().splitlines()
        return [f"{type(error).__name__}: {first[0] if first else 'no more is said'}"]
    return []
