"""The NodeProvider under Ray's own autoscaler v2: its adapter, reconciler and scheduler are the real ones, and so is
the daemon. Only the GCS is missing: what it would report of the cluster is written down here.

Ray is not in the kit's environment: run with one that has ray==2.60.0, pydantic, PyYAML and pytest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import until
from tests.unit.test_fleet_daemon import Lab

ray = pytest.importorskip("ray", reason="Ray is not in this environment")

from ray.autoscaler._private.providers import _get_node_provider  # noqa: E402
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig  # noqa: E402
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager  # noqa: E402
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage  # noqa: E402
from ray.autoscaler.v2.instance_manager.node_provider import (  # noqa: E402
    LaunchNodeError,
    NodeProviderAdapter,
    TerminateNodeError,
)
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler  # noqa: E402
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage  # noqa: E402
from ray.autoscaler.v2.instance_manager.subscribers.cloud_instance_updater import CloudInstanceUpdater  # noqa: E402
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor  # noqa: E402
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler  # noqa: E402
from ray.core.generated.autoscaler_pb2 import (  # noqa: E402
    ClusterResourceState,
    NodeState,
    NodeStatus,
    ResourceRequest,
    ResourceRequestByCount,
)
from ray.core.generated.instance_manager_pb2 import GetInstanceManagerStateRequest, Instance  # noqa: E402

from clusterkit.node_provider.client import FleetAway  # noqa: E402
from clusterkit.node_provider.provider import FleetNodeProvider  # noqa: E402
from clusterkit.render.autoscaler import EMPTY_LISTS  # noqa: E402

HEAD = "h1-1"


def config_of(socket: str, **changes: Any) -> dict[str, Any]:
    return {
        "cluster_name": "test",
        "max_workers": 4,
        "idle_timeout_minutes": 1,
        "provider": {
            "type": "external",
            "module": "clusterkit.node_provider.provider.FleetNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "fleet_socket": socket,
            "head_ip": "192.0.2.10",
        },
        "auth": {},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            "gpus": {"resources": {"CPU": 8, "GPU": 8}, "node_config": {}, "min_workers": 0, "max_workers": 4},
        },
        **{name: [] for name in EMPTY_LISTS},
        "file_mounts": {},
        **changes,
    }


class Ray:
    """One autoscaler, as it lives in one head; a new one has forgotten everything."""

    def __init__(self, socket: str) -> None:
        self.config = AutoscalingConfig(config_of(socket), skip_content_hash=True)
        provider = _get_node_provider(self.config.get_provider_config(), "test", use_cache=False)
        assert isinstance(provider, FleetNodeProvider)
        self.provider = provider
        self.adapter = NodeProviderAdapter(provider, self)
        self.monitor = CloudResourceMonitor()
        storage = InstanceStorage(cluster_id="test", storage=InMemoryStorage())
        subscribers = [CloudInstanceUpdater(cloud_provider=self.adapter), self.monitor]
        self.manager = InstanceManager(storage, instance_status_update_subscribers=subscribers)
        self.scheduler = ResourceDemandScheduler(None)
        self.nodes = {"head": self.node("head", HEAD, "head", {"node:__internal_head__": 1.0})}
        self.demand = 0
        self.version = 0

    def get_cached_autoscaling_config(self) -> AutoscalingConfig:
        return self.config

    @staticmethod
    def node(name: str, instance: str, kind: str, resources: dict[str, float], **more: Any) -> NodeState:
        return NodeState(
            node_id=name.encode(),
            instance_id=instance,
            ray_node_type_name=kind,
            total_resources=resources,
            available_resources=resources,
            **{"status": NodeStatus.RUNNING, **more},
        )

    def joins(self, instance: str, **more: Any) -> None:
        self.nodes[instance] = self.node(instance, instance, "gpus", {"CPU": 8.0, "GPU": 8.0}, **more)
        self.demand = 0

    def loop(self) -> Any:
        """What `Autoscaler.update_autoscaling_state` does, every five seconds."""
        self.version += 1
        asked = ResourceRequestByCount(request=ResourceRequest(resources_bundle={"GPU": 8}), count=self.demand)
        state = ClusterResourceState(
            cluster_resource_state_version=self.version,
            node_states=list(self.nodes.values()),
            pending_resource_requests=[asked] if self.demand else [],
        )
        return Reconciler.reconcile(
            instance_manager=self.manager,
            scheduler=self.scheduler,
            cloud_provider=self.adapter,
            cloud_resource_monitor=self.monitor,
            ray_cluster_resource_state=state,
            non_terminated_cloud_instances=self.adapter.get_non_terminated(),
            cloud_provider_errors=self.adapter.poll_errors(),
            autoscaling_config=self.config,
        )

    def instances(self, kind: str = "gpus") -> list[tuple[str, str]]:
        """(status, cloud instance id), of those that are not over."""
        state = self.manager.get_instance_manager_state(GetInstanceManagerStateRequest()).state
        named = [(Instance.InstanceStatus.Name(item.status), item) for item in state.instances]
        return sorted(
            (status, item.cloud_instance_id)
            for status, item in named
            if item.instance_type == kind and status not in ("TERMINATED", "ALLOCATION_FAILED")
        )

    def loop_until(self, status: str) -> str:
        """The cloud instance of the one that gets there."""

        def once() -> list[str]:
            self.loop()
            return [instance for found, instance in self.instances() if found == status]

        found = until(once, lambda: f"nothing became {status}: {self.instances()}")
        return str(found[0])


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    # What the monitor inherits from the head's own `ray start`.
    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", HEAD)
    monkeypatch.setenv("RAY_NODE_TYPE_NAME", "head")
    lab = Lab(tmp_path)
    yield lab
    lab.stop()


@pytest.fixture
def two(lab: Lab) -> Lab:
    """A daemon with two hosts that are on."""
    for name in ("w1", "w2"):
        lab.host(name)
    lab.start()
    for name in lab.hosts:
        lab.wait_state(name, "idle")
    return lab


def test_demand_brings_a_node_and_idleness_ends_it(two: Lab) -> None:
    autoscaler = Ray(two.config["socket"])
    autoscaler.loop()
    assert autoscaler.instances("head") == [("RAY_RUNNING", HEAD)]
    autoscaler.demand = 1
    instance = autoscaler.loop_until("ALLOCATED")
    for _ in range(3):
        autoscaler.loop()
    assert len(two.nodes()) == 1, "what comes already is asked for once"
    (host,) = until(two.running)
    assert autoscaler.provider.internal_ip(instance) == two.nodes()[host]["ip"]
    tags = autoscaler.provider.node_tags(instance)
    assert (tags["ray-node-type"], tags["ray-user-node-type"]) == ("worker", "gpus")
    assert tags["ray-launch-request"]

    autoscaler.joins(instance)
    autoscaler.loop()
    assert autoscaler.instances() == [("RAY_RUNNING", instance)]
    autoscaler.joins(instance, idle_duration_ms=61_000, status=NodeStatus.IDLE)
    autoscaler.loop()
    assert autoscaler.instances() == [("RAY_STOP_REQUESTED", instance)]
    assert two.hosts[host].node == instance, "Ray drains it first"
    # The drain has ended: the raylet is dead, and `ray start --block` lives on.
    two.hosts[host].set("gone")
    autoscaler.joins(instance, status=NodeStatus.DEAD)
    until(lambda: autoscaler.loop() and not autoscaler.instances())
    two.wait_state(host, "idle")
    assert not two.hosts[host].node


def test_two_demands_at_once_get_two_hosts(two: Lab) -> None:
    autoscaler = Ray(two.config["socket"])
    autoscaler.loop()
    autoscaler.demand = 2
    until(lambda: autoscaler.loop() and len(two.running()) == 2)
    assert all(len(host.lines("starts")) == 1 for host in two.hosts.values())


def test_while_the_daemon_is_away_ray_decides_nothing(two: Lab) -> None:
    autoscaler = Ray(two.config["socket"])
    autoscaler.loop()
    autoscaler.demand = 1
    instance = autoscaler.loop_until("ALLOCATED")
    until(two.running)
    autoscaler.joins(instance)
    autoscaler.loop()
    two.kill()
    autoscaler.demand = 1
    for _ in range(3):
        with pytest.raises(FleetAway, match="does not answer"):
            autoscaler.loop()
    assert autoscaler.instances() == [("RAY_RUNNING", instance)], "nothing vanished, nothing was doubled"
    two.start()
    autoscaler.demand = 0
    autoscaler.loop()
    assert autoscaler.instances() == [("RAY_RUNNING", instance)]


def test_what_an_empty_list_would_do_instead(two: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the provider raises: Ray takes a node that is not listed for gone."""
    autoscaler = Ray(two.config["socket"])
    autoscaler.loop()
    autoscaler.demand = 1
    instance = autoscaler.loop_until("ALLOCATED")
    autoscaler.joins(instance)
    autoscaler.loop()
    two.kill()
    monkeypatch.setattr(autoscaler.provider, "non_terminated_nodes", lambda filters: [])
    autoscaler.loop()
    assert autoscaler.instances() == []


def test_a_launch_and_a_stop_that_nobody_takes_are_told_to_ray(two: Lab) -> None:
    autoscaler = Ray(two.config["socket"])
    two.kill()
    autoscaler.adapter.launch({"gpus": 1}, "r1")
    (error,) = until(autoscaler.adapter.poll_errors)
    assert isinstance(error, LaunchNodeError)
    autoscaler.adapter.terminate(["w1-1"], "r2")
    (error,) = until(autoscaler.adapter.poll_errors)
    assert isinstance(error, TerminateNodeError)


def test_a_request_waits_in_the_daemon_where_no_host_can_come(two: Lab) -> None:
    for host in two.hosts.values():
        host.set("held", "new fan (by kim)")
    for name in two.hosts:
        two.wait_state(name, "maintenance")
    autoscaler = Ray(two.config["socket"])
    autoscaler.loop()
    autoscaler.demand = 1
    until(lambda: autoscaler.loop() and two.client.status()["open"])
    state = None
    for _ in range(5):
        state = autoscaler.loop()
    assert autoscaler.instances() == [("REQUESTED", "")], "asked once, and no failure every five seconds"
    assert state is not None
    assert not state.failed_instance_requests
    assert "new fan (by kim)" in two.client.status()["open"][0]["why"]
    two.hosts["w2"].clear("held")
    instance = autoscaler.loop_until("ALLOCATED")
    assert instance.startswith("w2-")


def test_after_a_head_restart_a_dead_worker_stands_in_nobody_s_way(two: Lab) -> None:
    """The worker exits when it lost its head; a new head asks for what it needs, and gets it at once."""
    old = Ray(two.config["socket"])
    old.loop()
    old.demand = 1
    instance = old.loop_until("ALLOCATED")
    (host,) = until(two.running)
    old.joins(instance)
    old.loop()
    two.hosts[host].set("gone")
    until(lambda: instance not in [node["id"] for node in two.client.nodes()])

    new = Ray(two.config["socket"])
    new.loop()
    assert new.instances() == [], "nothing that counts as coming, and never comes"
    new.demand = 1
    assert new.loop_until("ALLOCATED") != instance


def test_after_a_head_restart_a_living_worker_is_taken_over(two: Lab) -> None:
    old = Ray(two.config["socket"])
    old.loop()
    old.demand = 1
    instance = old.loop_until("ALLOCATED")
    (host,) = until(two.running)

    new = Ray(two.config["socket"])
    new.joins(instance)
    new.loop()
    new.loop()
    assert new.instances() == [("RAY_RUNNING", instance)]
    assert two.hosts[host].node == instance


def test_without_the_head_s_own_id_nothing_is_scaled(two: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why the launcher sets it: Ray itself says nothing."""
    monkeypatch.delenv("RAY_CLOUD_INSTANCE_ID")
    autoscaler = Ray(two.config["socket"])
    autoscaler.nodes["head"] = autoscaler.node("head", "", "head", {"node:__internal_head__": 1.0})
    autoscaler.demand = 1
    for _ in range(5):
        autoscaler.loop()
    assert two.nodes() == {}


def test_a_boot_that_fails_is_asked_for_again_and_another_host_comes(lab: Lab) -> None:
    lab.config["pools"]["gpus"]["boot_budget_s"] = 1
    lab.host("a-dead", off=True, bmc=True).set("dead")
    lab.host("b-well", off=True, bmc=True)
    lab.start()
    for name in lab.hosts:
        lab.wait_state(name, "off")
    autoscaler = Ray(lab.config["socket"])
    autoscaler.loop()
    autoscaler.demand = 1
    assert autoscaler.loop_until("ALLOCATED").startswith("a-dead-")
    until(lambda: autoscaler.loop() and set(lab.running()) == {"b-well"})
    assert lab.state("a-dead") == "quarantined"


def test_the_rest_of_the_contract(two: Lab) -> None:
    provider = FleetNodeProvider({"fleet_socket": two.config["socket"], "head_ip": "192.0.2.10"}, "test")
    assert provider.non_terminated_nodes({}) == [HEAD]
    assert provider.non_terminated_nodes({"ray-node-type": "worker"}) == []
    assert (provider.internal_ip(HEAD), provider.is_running(HEAD)) == ("192.0.2.10", True)
    made = provider.create_node_with_resources_and_labels({}, {"ray-user-node-type": "gpus"}, 1, {}, {})
    (instance,) = made
    assert set(provider.non_terminated_nodes({})) == {HEAD, instance}
    assert provider.non_terminated_nodes({"ray-node-type": "head"}) == [HEAD]
    until(two.running)
    provider.non_terminated_nodes({})
    assert (provider.is_running(instance), provider.is_terminated(instance)) == (True, False)
    assert provider.node_tags(instance)["ray-node-status"] == "up-to-date"
    assert provider.external_ip(instance) == provider.internal_ip(instance)
    assert provider.get_node_id(provider.internal_ip(instance), use_internal_ip=True) == instance
    provider.set_node_tags(instance, {"ray-runtime-config": "x"})
    provider.non_terminated_nodes({})
    assert provider.node_tags(instance)["ray-runtime-config"] == "x"
    provider.terminate_nodes([HEAD, instance])
    assert provider.is_terminated(instance)
    assert not provider.is_running(instance)
    assert provider.non_terminated_nodes({}) == [HEAD], "the head is nobody's to end"
    provider.terminate_node(instance)
    with pytest.raises(ValueError, match="there is no node"):
        provider.node_tags(instance)


def test_the_constructor_asks_nobody(tmp_path: Path) -> None:
    """An error in it would end the monitor, and the head with it."""
    FleetNodeProvider({"fleet_socket": str(tmp_path / "nobody")}, "test")
    FleetNodeProvider({}, "test")


def test_it_answers_in_milliseconds_with_a_host_that_hangs(two: Lab) -> None:
    two.hosts["w1"].set("hang")
    two.wait_state("w1", "unreachable")
    provider = FleetNodeProvider({"fleet_socket": two.config["socket"]}, "test")
    times = []
    for _ in range(20):
        began = time.monotonic()
        provider.non_terminated_nodes({})
        times.append(time.monotonic() - began)
    assert sorted(times)[10] < 0.1
