"""Ray's autoscaling config and the daemon's, from the spec; and what an autoscaled pool has to have."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from clusterkit.fleet.config import FleetConfig
from clusterkit.render.autoscaler import autoscaler_environment, autoscaling_config, fleet_config
from clusterkit.spec import checks
from clusterkit.spec.cluster import ClusterSpec
from tests.unit.test_spec import GPUS, Vars, findings_of, spec_of

SCALED: Vars = {
    **GPUS,
    "clusterkit_gpu_model": "AMD-Instinct-MI300X-OAM",
    "clusterkit_cpus": 96,
    "clusterkit_labels": {"rack": "a1"},
    "clusterkit_pool": {"mode": "autoscaled", "min": 1, "boot_budget_s": 900, "idle_off_s": 1200, "warm": 1},
}
BMC: Vars = {"clusterkit_power": {"kind": "redfish", "address": "https://bmc-w1"}}
WAKE: Vars = {"clusterkit_power": {"kind": "wol", "mac": "02:00:00:00:00:02"}}


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it will be once the roles are there."""
    monkeypatch.setattr(checks, "AUTOSCALED_OFFERED", True)


def spec(**changes: Any) -> ClusterSpec:
    return spec_of(**{"pools": {"gpus": SCALED}, "hosts": {"w1": BMC, "w2": WAKE}, **changes})


def test_node_types_say_what_the_launchers_offer() -> None:
    config = autoscaling_config(spec())
    assert config["available_node_types"] == {
        "head": {"resources": {"CPU": 0}, "labels": {}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "gpus": {
            "resources": {"CPU": 96, "GPU": 8, "accelerator_type:AMD-Instinct-MI300X-OAM": 8},
            "labels": {"rack": "a1"},
            "node_config": {},
            "min_workers": 1,
            "max_workers": 2,
        },
    }
    assert (config["max_workers"], config["idle_timeout_minutes"]) == (2, 5)
    assert config["provider"]["head_ip"] == "192.0.2.10"
    assert config["provider"]["disable_node_updaters"] is True


def test_ray_waits_longer_than_the_slowest_host_may_take() -> None:
    slow = {**SCALED, "clusterkit_pool": {"mode": "autoscaled", "boot_budget_s": 1800}}
    made = spec(pools={"gpus": SCALED, "slow": slow}, workers={"w1": "gpus", "w2": "slow"})
    environment = autoscaler_environment(made)
    daemon = fleet_config(made)
    waits = int(environment["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"])
    assert waits > 1800 + daemon["pools"]["slow"]["start_timeout_s"]
    assert waits < 3600, "Ray's own: a worker that died with its head would count as coming for an hour"
    asks_again = int(environment["RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S"])
    assert daemon["limits"]["request_s"] < asks_again
    assert environment["RAY_enable_autoscaler_v2"] == "1"


def test_the_daemon_takes_its_part() -> None:
    """The role adds paths, the key and credentials."""
    made = fleet_config(spec())
    assert set(made["hosts"]) == {"w1", "w2"}, "the head starts and stops by hand"
    made["hosts"]["w1"]["power"].update(credentials="/etc/x", ca="/etc/ca.pem")
    ssh = {"identity": "/etc/key", "known_hosts": "/etc/known", "control_dir": "/run/clusterkit/fleet"}
    config = FleetConfig.model_validate({**json.loads(json.dumps(made)), "record": "/var/lib/x", "ssh": ssh})
    assert (config.hosts["w1"].power.kind, config.hosts["w2"].power.mac) == ("redfish", "02:00:00:00:00:02")
    assert (config.pools["gpus"].boot_budget_s, config.pools["gpus"].warm) == (900, 1)
    assert config.socket == autoscaling_config(spec())["provider"]["fleet_socket"]


def test_a_pool_that_was_not_changed_is_fixed() -> None:
    assert spec_of().autoscaled is False
    assert spec().autoscaled is True


def test_this_release_does_not_offer_it_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "AUTOSCALED_OFFERED", False)
    found = findings_of(pools={"gpus": SCALED}, hosts={"w1": BMC})
    assert found == {"clusterkit_pool.mode": "this release runs fixed pools only"}


def changed(**scaling: Any) -> dict[str, Vars]:
    return {"gpus": {**SCALED, "clusterkit_pool": {**SCALED["clusterkit_pool"], **scaling}}}


@pytest.mark.parametrize(
    ("changes", "subject", "words"),
    [
        ({"pools": {"gpus": {**SCALED, "clusterkit_cpus": None}}}, "mode", "its CPUs are not declared"),
        ({"cluster": {"clusterkit_stack": "rocm70"}}, "mode", "not tried with Ray 2.52.1"),
        (
            {"pools": {"gpus": SCALED, "more": GPUS}, "workers": {"w1": "gpus", "w2": "more"}},
            "mode",
            "the pool more is fixed",
        ),
        ({"workers": {"h1": "gpus", "w1": "gpus"}}, "mode", "the head is in this pool"),
        ({"pools": changed(warm=3)}, "warm", "is 3, and the pool has 2 hosts"),
        ({"hosts": {}}, "idle_off_s", "no host of the pool can be switched on again"),
        ({"pools": changed(min=3)}, "min", "above max"),
        ({"pools": changed(boot_budget_s=0)}, "boot_budget_s", "greater than 0"),
        ({"pools": changed(boot_budget_s="10m")}, "boot_budget_s", "must be a plain number of seconds"),
    ],
)
def test_a_pool_that_cannot_be_scaled_is_told(changes: dict[str, Any], subject: str, words: str) -> None:
    found = findings_of(**{"pools": {"gpus": SCALED}, "hosts": {"w1": BMC, "w2": WAKE}, **changes})
    assert words in found[f"clusterkit_pool.{subject}"]


@pytest.mark.parametrize(
    ("power", "words"),
    [
        ({"kind": "wol"}, "kind wol needs mac"),
        ({"kind": "ipmi"}, "kind ipmi needs address"),
        ({"kind": "redfish", "address": "http://bmc-w1"}, "starts with https://"),
    ],
)
def test_power_that_cannot_work_is_told(power: Vars, words: str) -> None:
    found = findings_of(pools={"gpus": SCALED}, hosts={"w1": {"clusterkit_power": power}, "w2": WAKE})
    assert words in found["clusterkit_power"]


# --------------------------------------------------------------------------- Ray's own word


def test_ray_takes_the_config_and_refuses_what_would_kill_the_head() -> None:
    pytest.importorskip("ray", reason="Ray is not in this environment")
    from clusterkit.node_provider.check import problems

    good = autoscaling_config(spec())
    before = copy.deepcopy(good)
    assert problems(good) == []
    assert good == before
    for key in ("setup_commands", "head_node_type", "max_workers", "available_node_types"):
        assert problems({name: value for name, value in good.items() if name != key}), key
    for change in (
        {"provider": {**good["provider"], "module": "clusterkit.node_provider.provider.Nothing"}},
        {"provider": {**good["provider"], "module": "json.JSONDecoder"}},
        {"provider": {**good["provider"], "disable_node_updaters": False}},
        {"head_node_type": "nothing"},
        {"max_workers": 0},
        {"bogus": 1},
        {"idle_timeout_minutes": "5"},
    ):
        assert problems({**good, **change}), change
