"""Ray's autoscaling config and the daemon's, from the spec; and what an autoscaled pool has to have."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clusterkit.fleet.config import FleetConfig
from clusterkit.render.autoscaler import autoscaler, autoscaler_environment, autoscaling_config, fleet_config
from clusterkit.spec.cluster import ClusterSpec
from clusterkit.spec.load import load
from tests.unit.test_spec import GPUS, Vars, findings_of, inventory, spec_of

ROOT = Path(__file__).resolve().parents[2]
SCALED: Vars = {
    **GPUS,
    "clusterkit_gpu_model": "AMD-Instinct-MI300X-OAM",
    "clusterkit_cpus": 96,
    "clusterkit_labels": {"rack": "a1"},
    "clusterkit_pool": {
        "mode": "autoscaled",
        "min": 1,
        "boot_budget_s": 900,
        "idle_off_s": 1200,
        "warm": 1,
        "warm_hours": "07:00-19:00",
    },
}
BMC: Vars = {"clusterkit_power": {"kind": "redfish", "address": "https://bmc-w1"}}
WAKE: Vars = {"clusterkit_power": {"kind": "wol", "mac": "02:00:00:00:00:02"}}


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
    gpus = config.pools["gpus"]
    assert (gpus.boot_budget_s, gpus.warm, gpus.warm_hours) == (900, 1, "07:00-19:00")
    assert config.socket == autoscaling_config(spec())["provider"]["fleet_socket"]


def test_a_pool_that_was_not_changed_is_fixed() -> None:
    assert spec_of().autoscaled is False
    assert spec().autoscaled is True


def test_roles_read_all_of_it_in_one_place_and_nothing_where_pools_are_fixed() -> None:
    made = spec()
    assert autoscaler(spec_of()) is None
    assert autoscaler(made) == {
        "config": autoscaling_config(made),
        "environment": autoscaler_environment(made),
        "fleet": fleet_config(made),
    }
    hosts = made.published()["hosts"]
    assert {name: host["autoscaled"] for name, host in hosts.items()} == {"h1": False, "w1": True, "w2": True}
    assert not any(host["autoscaled"] for host in spec_of().published()["hosts"].values())


def test_an_app_may_wait_for_its_host_on_top_of_what_it_needs_itself() -> None:
    own = {"clusterkit_serve": {"ready_timeout_s": 100}}
    assert spec_of(own).published()["serve"]["ready_timeout_s"] == 100
    published = spec(cluster=own).published()
    start = fleet_config(spec())["pools"]["gpus"]["start_timeout_s"]
    assert published["node_timeout_s"] > SCALED["clusterkit_pool"]["boot_budget_s"] + start
    assert published["serve"]["ready_timeout_s"] == 100 + published["node_timeout_s"]


def changed(**scaling: Any) -> dict[str, Vars]:
    return {"gpus": {**SCALED, "clusterkit_pool": {**SCALED["clusterkit_pool"], **scaling}}}


@pytest.mark.parametrize(
    ("changes", "subject", "words"),
    [
        ({"pools": {"gpus": {**SCALED, "clusterkit_cpus": None}}}, "mode", "its CPUs are not declared"),
        ({"cluster": {"clusterkit_stack": "rocm70"}}, "mode", "not tried with Ray 2.52.1, only with 2.60.0"),
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


def test_a_row_that_cannot_is_told_with_those_that_can() -> None:
    _, found = load(inventory({"clusterkit_stack": "rocm70"}, {"gpus": SCALED}, hosts={"w1": BMC}))
    (fix,) = [finding.fix for finding in found if finding.subject == "clusterkit_pool.mode"]
    assert fix == "set mode: fixed, or use a row that can: rocm72"


@pytest.mark.parametrize("ours", [("w1", "w2"), ("h1", "w2")])
def test_root_has_to_own_the_head_and_every_host_of_the_pool(ours: tuple[str, ...]) -> None:
    raw = inventory(pools={"gpus": SCALED}, hosts={"w1": BMC})
    assert load(raw)[1] == []
    _, found = load(dataclasses.replace(raw, groups={**raw.groups, "managed_hosts": ours}))
    (missing,) = {"h1", "w1", "w2"} - set(ours)
    assert [finding.problem.partition(":")[0] for finding in found] == [missing]


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


def test_the_roles_check_needs_nothing_but_ray_and_its_stdin(tmp_path: Path) -> None:
    """As the role runs it: what is asked lies nowhere yet."""
    pytest.importorskip("ray", reason="Ray is not in this environment")
    package = ROOT / "clusterkit"
    modules = [package / "__init__.py", *package.glob("node_provider/*.py")]
    lib = {f"/etc/x/autoscaler/lib/{path.relative_to(ROOT)}": path.read_text() for path in modules}
    words = [sys.executable, "-c", (ROOT / "roles/autoscaler/files/check.py").read_text(), "/etc/x/autoscaler"]
    good = autoscaling_config(spec())
    for config, code, said in ((good, 0, ""), ({**good, "max_workers": "many"}, 1, "'many' is not")):
        files = {**lib, "/etc/x/autoscaler/autoscaling.yaml": json.dumps(config)}
        done = subprocess.run(words, input=json.dumps(files), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        problems = json.loads(done.stdout.splitlines()[-1])["problems"]
        assert bool(problems) == bool(said)
        assert said in "".join(problems)
    assert list(tmp_path.iterdir()) == []
