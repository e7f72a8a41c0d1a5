"""Ray's NodeProvider for bare metal: a thin client of the fleet daemon, for autoscaler v2 of Ray 2.60.

    provider:
      type: external
      module: clusterkit.node_provider.provider.FleetNodeProvider
      fleet_socket: /run/clusterkit/fleet/fleet.sock
      head_ip: 192.0.2.10

It runs in the monitor process of the head, which is killed by an error in the constructor, and the whole head with it
(ray 2.60.0, autoscaler/v2/monitor.py): so nothing is asked there.

Where the daemon does not answer, `non_terminated_nodes` raises. Autoscaler v2 then leaves out that round as a whole
(autoscaler/v2/autoscaler.py, `update_autoscaling_state`: any Exception is logged and None returned): nothing is
launched on a picture that may be old, and no node is taken for gone, as an empty list would have it
(instance_manager/reconciler.py, `_handle_cloud_instance_terminated`). Autoscaler v1 counts such rounds and gives up
after five (_private/autoscaler.py, `update`): it is not supported.

A request that no host can serve yet does not raise: v2 would ask again every five seconds, and tell only its log why.
It stays open in the daemon for as long as Ray waits for it, and is served when a host comes free
(reconciler.py, `_handle_stuck_requested_instance`, after which Ray itself asks again).
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UNINITIALIZED,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from clusterkit.node_provider.client import FleetClient

SOCKET = "/run/clusterkit/fleet/fleet.sock"
HEAD_TYPE = "head"

log = logging.getLogger(__name__)


class FleetNodeProvider(NodeProvider):
    """Node ids are the instance ids that raylets are started with (RAY_CLOUD_INSTANCE_ID)."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.fleet = FleetClient(str(provider_config.get("fleet_socket") or SOCKET))
        # Replaced as a whole by each round, never changed: threads may read it at any time.
        self._nodes: dict[str, dict[str, Any]] = {}

    def _head(self) -> dict[str, Any] | None:
        """The head is not the fleet's, and v2 launches nothing until it is listed (reconciler.py,
        `_is_head_node_running`). This process has its environment from the head's own `ray start`."""
        instance = os.environ.get("RAY_CLOUD_INSTANCE_ID")
        if not instance:
            log.error("clusterkit: the head was started without RAY_CLOUD_INSTANCE_ID: nothing will be scaled")
            return None
        tags = {
            TAG_RAY_NODE_NAME: f"ray-{self.cluster_name}-head",
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: os.environ.get("RAY_NODE_TYPE_NAME") or HEAD_TYPE,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
        return {"id": instance, "ip": str(self.provider_config.get("head_ip", "")), "tags": tags, "running": True}

    def _refresh(self) -> dict[str, dict[str, Any]]:
        found = {}
        for node in self.fleet.nodes():
            status = STATUS_UP_TO_DATE if node["running"] else STATUS_UNINITIALIZED
            # A node that somebody else started has no tags of Ray's.
            tags = {
                TAG_RAY_NODE_NAME: f"ray-{self.cluster_name}-worker",
                **node["tags"],
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: node["type"],
                TAG_RAY_NODE_STATUS: status,
            }
            found[node["id"]] = {**node, "tags": tags}
        head = self._head()
        if head is not None:
            found[head["id"]] = head
        self._nodes = found
        return found

    def _node(self, node_id: str) -> dict[str, Any]:
        """From the last round; one that is not in it may be newer."""
        node = self._nodes.get(node_id) or self._refresh().get(node_id)
        if node is None:
            raise ValueError(f"there is no node {node_id}")
        return node

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        nodes = self._refresh()
        return [name for name, node in nodes.items() if tag_filters.items() <= node["tags"].items()]

    def is_running(self, node_id: str) -> bool:
        node = self._nodes.get(node_id)
        return bool(node and node["running"])

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._nodes

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(self._node(node_id)["tags"])

    def internal_ip(self, node_id: str) -> str:
        return str(self._node(node_id)["ip"])

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self.fleet.tags(node_id, tags)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Which host it will be, and whether one can come now, is the daemon's to say."""
        answer = self.fleet.create(tags[TAG_RAY_USER_NODE_TYPE], count, tags)
        for instance in answer["given"]:
            log.info("clusterkit: %s comes", instance)
        if answer["open"]:
            log.warning("clusterkit: %d of %d wait: %s", answer["open"], count, answer.get("why"))
        return {instance: {} for instance in answer["given"]}

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> dict[str, Any]:
        """What a host offers is what its own launcher was configured with, from the same inventory."""
        return self.create_node(node_config, tags, count)

    def terminate_node(self, node_id: str) -> dict[str, Any]:
        return self.terminate_nodes([node_id])

    def terminate_nodes(self, node_ids: list[str]) -> dict[str, Any]:
        """Ray has drained the node before; one that is gone already is no error."""
        mine = os.environ.get("RAY_CLOUD_INSTANCE_ID")
        self.fleet.terminate([node for node in node_ids if node != mine])
        self._nodes = {name: node for name, node in self._nodes.items() if name not in node_ids or name == mine}
        return {node: {} for node in node_ids}

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config
