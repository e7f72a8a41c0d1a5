"""What makes a cluster autoscaled: Ray's autoscaling config, the head's environment, and the fleet daemon's hosts."""

from __future__ import annotations

from typing import Any

from clusterkit.spec.cluster import HEAD_NODE_TYPE, START_TIMEOUT_S, ClusterSpec, Pool

PROVIDER = "clusterkit.node_provider.provider.FleetNodeProvider"
SOCKET = "/run/clusterkit/fleet/fleet.sock"
# How long Ray waits for a host that it asked for before it asks again. The daemon gives up a little sooner: a
# request that lived on there would be served twice.
REQUEST_TIMEOUT_S = 600
REQUEST_MARGIN_S = 10
# Ray 2.60 has no defaults for these with `type: external`, and its head dies without some of them.
EMPTY_LISTS = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "initialization_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


def autoscaler(spec: ClusterSpec) -> dict[str, Any] | None:
    """What roles read of it in the fact `clusterkit`; None where pools are fixed."""
    if not spec.autoscaled:
        return None
    return {
        "config": autoscaling_config(spec),
        "environment": autoscaler_environment(spec),
        "fleet": fleet_config(spec),
    }


def autoscaling_config(spec: ClusterSpec) -> dict[str, Any]:
    """For `ray start --head --autoscaling-config`, as plain data. Check it with `clusterkit.node_provider` before."""
    asked = spec.facts.autoscaler
    return {
        "cluster_name": spec.facts.name,
        "max_workers": sum(pool.max for pool in spec.pools.values()),
        "upscaling_speed": float(asked.upscaling_speed),
        "idle_timeout_minutes": asked.idle_timeout_s / 60,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            # Else Ray logs in to hosts by itself.
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "fleet_socket": SOCKET,
            "head_ip": spec.hosts[spec.head].node_ip,
        },
        "auth": {},
        "head_node_type": HEAD_NODE_TYPE,
        "available_node_types": {
            HEAD_NODE_TYPE: _node_type({"CPU": 0}, {}, 0, 0),
            **{
                name: _node_type(_resources(pool), pool.facts.labels, pool.facts.pool.min, pool.max)
                for name, pool in spec.pools.items()
            },
        },
        "file_mounts": {},
        **{name: [] for name in EMPTY_LISTS},
    }


def _node_type(resources: dict[str, int], labels: dict[str, str], least: int, most: int) -> dict[str, Any]:
    return {"resources": resources, "labels": labels, "node_config": {}, "min_workers": least, "max_workers": most}


def _resources(pool: Pool) -> dict[str, int]:
    """What a node of the pool will offer: the launcher is configured with the same. A difference makes Ray launch
    node after node."""
    facts = pool.facts
    offered = {"CPU": facts.cpus or 0}
    if facts.gpus:
        offered["GPU"] = facts.gpus
        if facts.gpu_model:
            offered[f"accelerator_type:{facts.gpu_model}"] = facts.gpus
    return offered


def autoscaler_environment(spec: ClusterSpec) -> dict[str, str]:
    """For the head's `ray start`: its autoscaler, and how long that waits."""
    return {
        "RAY_enable_autoscaler_v2": "1",
        # Serve's own default spreads replicas, and no host would ever be without one. With this it moves them together,
        # too (ray 2.60.0, serve/_private/deployment_scheduler.py).
        "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1",
        "RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S": str(REQUEST_TIMEOUT_S),
        # Ray's own hour is how long a worker that died with the old head would count as coming.
        "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": str(spec.node_timeout_s),
    }


def fleet_config(spec: ClusterSpec) -> dict[str, Any]:
    """The part of the daemon's configuration that the spec knows; paths, keys and credentials are the role's."""
    asked = spec.facts.autoscaler
    return {
        "cluster": spec.facts.name,
        "socket": SOCKET,
        "limits": {
            "power_ons": asked.power_ons,
            "cycles_per_day": asked.cycles_per_day,
            "request_s": REQUEST_TIMEOUT_S - REQUEST_MARGIN_S,
        },
        "pools": {name: _fleet_pool(pool) for name, pool in spec.pools.items()},
        "hosts": {
            host.name: {
                "address": host.node_ip,
                "node_ip": host.node_ip,
                "pool": host.pool,
                "power": host.facts.power.model_dump(),
            }
            for host in spec.hosts.values()
            if host.worker
        },
    }


def _fleet_pool(pool: Pool) -> dict[str, Any]:
    scaling = pool.facts.pool
    return {
        "max": pool.max,
        "gpus": pool.facts.gpus,
        "boot_budget_s": scaling.boot_budget_s,
        "start_timeout_s": START_TIMEOUT_S,
        "drain_grace_s": scaling.drain_grace_s,
        "idle_off_s": scaling.idle_off_s,
        "warm": scaling.warm,
        "warm_hours": scaling.warm_hours,
        "idle_watts": scaling.idle_watts,
    }
