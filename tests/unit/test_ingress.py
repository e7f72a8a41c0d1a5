"""Options of Serve for the whole cluster: its ingress, ports, logs and gRPC, and what they ask of everything else."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from clusterkit.render.serve import serve_config
from clusterkit.spec.ingress import RAY_TEMP_LIMIT
from clusterkit.spec.load import load
from tests.support import ROOT, ansible_playbook
from tests.unit.test_spec import Vars, app, findings_of, inventory, spec_of

HAPROXY: Vars = {"ingress": "haproxy"}
DIRECT: Vars = {"ingress": "haproxy", "direct_streaming": True}
ROCM70: Vars = {
    "clusterkit_stack": "rocm70",
    "clusterkit_runtime": "container",
    "clusterkit_image": "registry.example/vllm:1",
}


def serve(*apps: Vars, **options: Any) -> Vars:
    return {"clusterkit_serve": options, "clusterkit_apps": list(apps)}


def chat(**given: Vars) -> Vars:
    classifier = {"model_source": {"folder": "/srv/toxic"}, "block_labels": ["toxic"], **given.get("classifier", {})}
    generator = {"model_source": {"folder": "/srv/chat"}, **given.get("generator", {})}
    parameters = {"model_id": "chat", "classifier": classifier, "generator": generator}
    return {"name": "chat", "template": "pipeline", "route_prefix": "/chat", "parameters": parameters}


def own(*deployments: Vars) -> Vars:
    parameters = {"code": "/srv/shop", "import_path": "main:app", "deployments": list(deployments)}
    return {"name": "shop", "template": "custom", "route_prefix": "/shop", "parameters": parameters}


def test_serves_own_proxy_asks_for_nothing_new() -> None:
    """Another port or environment would be a reason to restart Ray on every cluster that takes this release."""
    fact = spec_of().published()
    assert (fact["ingress_ports"], fact["ingress_environment"]) == ({}, {})
    assert sorted(fact["ports"]) == [
        "agent_grpc",
        "agent_http",
        "client",
        "dashboard",
        "gcs",
        "metrics",
        "node_manager",
        "object_manager",
        "runtime_env_agent",
        "serve",
        "worker_max",
        "worker_min",
    ]
    assert set(serve_config(spec_of())) == {"proxy_location", "http_options", "applications"}
    # Nor are its ports in anybody's way.
    spec_of({"clusterkit_ports": {"metrics": 9101, "dashboard": 8404, "client": 30001}})


def test_haproxy_is_switched_on_where_ray_starts() -> None:
    fact = spec_of({**serve(**HAPROXY), "clusterkit_ports": {"haproxy_stats": 8405}}).published()
    environment = fact["ingress_environment"]
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] == "8405"
    assert fact["ingress_ports"]["haproxy_stats"] == 8405
    assert "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING" not in environment
    assert all(isinstance(value, str) for value in environment.values())
    assert not [value for value in environment.values() if value.startswith("/tmp")]
    assert spec_of(serve(**DIRECT)).published()["ingress_environment"]["RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"] == "1"


def test_a_stream_outlives_a_reload_of_haproxy() -> None:
    """Which happens whenever a replica comes or goes; Ray's own limit is two minutes."""
    for timeout, wanted in ((None, 3600), (60, 3600), (7200, 7200)):
        options = {**HAPROXY, **({"request_timeout_s": timeout} if timeout else {})}
        environment = spec_of(serve(**options)).published()["ingress_environment"]
        assert environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == str(wanted)


def test_haproxys_sockets_fit_below_the_longest_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    fits = "/" + "x" * (RAY_TEMP_LIMIT - 1)
    fact = spec_of({**serve(**HAPROXY), "clusterkit_paths": {"ray_temp": fits}}).published()
    path = Path(fact["ingress_environment"]["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    # As HAProxy binds it, with the id of a node in between: the kernel itself says what is too long.
    bound = f"{path.parent}/{'f' * 56}/{path.name}.4194304.tmp"
    for name, error in ((bound, "No such file or directory"), (f"{bound}x", "too long")):
        with socket.socket(socket.AF_UNIX) as listener, pytest.raises(OSError, match=error):
            listener.bind(name)
    found = findings_of({**serve(**HAPROXY), "clusterkit_paths": {"ray_temp": f"{fits}x"}})
    assert f"leave room for {RAY_TEMP_LIMIT}" in found["clusterkit_paths.ray_temp"]


def test_an_older_ray_is_refused_with_the_rows_that_can() -> None:
    _, findings = load(inventory({**ROCM70, **serve(app(max_surge_percent=50), **HAPROXY)}))
    told = {finding.subject: (finding.problem, finding.fix) for finding in findings}
    assert set(told) == {"clusterkit_serve.ingress", "clusterkit_apps[0].parameters.max_surge_percent"}
    for problem, fix in told.values():
        assert "Ray 2.52.1 of the row 'rocm70'" in problem
        assert "Ray 2.60.0" in problem
        assert fix.endswith("rocm72")
    assert all(finding.place.file for finding in findings)
    spec_of(serve(app(max_surge_percent=50), **HAPROXY))


@pytest.mark.parametrize(
    ("cluster", "subject", "problem"),
    [
        (serve(direct_streaming=True), "clusterkit_serve", "needs ingress: haproxy"),
        (serve(**HAPROXY, http_host="127.0.0.1"), "clusterkit_serve.http_host", "the replicas of another"),
        (
            {**serve(**HAPROXY), "clusterkit_ports": {"metrics": 9101}},
            "clusterkit_ports.haproxy_metrics",
            "metrics's port too",
        ),
        (
            {**serve(**HAPROXY), "clusterkit_ports": {"client": 30500}},
            "clusterkit_ports.client",
            "lies in the replicas' range",
        ),
        (
            {**serve(**HAPROXY), "clusterkit_ports": {"replica_min": 19000}},
            "clusterkit_ports.replica_min",
            "overlaps the workers' range",
        ),
        (
            {**serve(**HAPROXY), "clusterkit_ports": {"replica_max": 30050}},
            "clusterkit_ports.replica_max",
            "fewer than 100 replica ports",
        ),
        (
            {
                **serve(grpc_options={"grpc_servicer_functions": ["own.add_Own_to_server"]}),
                "clusterkit_ports": {"grpc": 8000},
            },
            "clusterkit_ports.grpc",
            "serve's port too",
        ),
        (
            serve(app(ingress_max_replicas=2), **DIRECT),
            "clusterkit_apps[0].parameters.ingress_max_replicas",
            "no ingress of its own",
        ),
        (
            serve({**app(routing={"policy": "prefix"}), "template": "llm_router"}, **DIRECT),
            "clusterkit_apps[0].parameters.routing.policy",
            "leaves it none",
        ),
        (
            serve(app(graceful_shutdown_timeout_s=600), request_timeout_s=601),
            "clusterkit_apps[0].parameters.graceful_shutdown_timeout_s",
            "is 600, and a request may take 601 s",
        ),
        (
            serve(chat(classifier={"graceful_shutdown_timeout_s": 30}), request_timeout_s=601),
            "clusterkit_apps[0].parameters.classifier.graceful_shutdown_timeout_s",
            "is 30, and a request may take 601 s",
        ),
        (
            serve(own({"name": "A"}, {"name": "B", "graceful_shutdown_timeout_s": 30}), request_timeout_s=601),
            "clusterkit_apps[0].parameters.deployments[1].graceful_shutdown_timeout_s",
            "is 30, and a request may take 601 s",
        ),
        (
            serve(app(engine_start_timeout_s=901)),
            "clusterkit_apps[0].parameters.engine_start_timeout_s",
            "given up after 900 s",
        ),
        (serve(root_path="prefix/"), "clusterkit_serve.root_path", "characters"),
        (serve(logging_config={"encoding": "XML"}), "clusterkit_serve.logging_config.encoding", "known values"),
        (
            serve(grpc_options={"grpc_servicer_functions": ["own"]}),
            "clusterkit_serve.grpc_options.grpc_servicer_functions[0]",
            "characters",
        ),
    ],
)
def test_what_does_not_go_together(cluster: Vars, subject: str, problem: str) -> None:
    assert problem in findings_of(cluster)[subject]


def test_what_does_go_together() -> None:
    spec_of(serve(app(graceful_shutdown_timeout_s=601), request_timeout_s=601))
    spec_of(serve(app(engine_start_timeout_s=1800), ready_timeout_s=2000))
    # Where nothing is said, a replica has as long as its requests.
    config = serve_config(spec_of(serve(app(), request_timeout_s=1200)))
    assert {item["graceful_shutdown_timeout_s"] for item in config["applications"][0]["deployments"]} == {1200}
    # One host asks nobody else.
    spec_of(serve(**HAPROXY, http_host="127.0.0.1"), workers={"h1": "gpus"})


def test_every_deployment_has_as_long_as_its_requests() -> None:
    config = serve_config(spec_of(serve(chat(), own({"name": "A"}), request_timeout_s=1200)))
    pipeline, custom = config["applications"]
    assert {item["graceful_shutdown_timeout_s"] for item in pipeline["deployments"]} == {1200}
    # What the site's own code says of it is not known here.
    assert custom["deployments"] == [{"name": "A"}]


def test_the_serve_config_has_the_clusters_options() -> None:
    servicers = ["own.add_Own_to_server"]
    options = {"root_path": "/kit", "grpc_options": {"grpc_servicer_functions": servicers}}
    logs = {"encoding": "JSON", "log_level": "WARNING"}
    own = app("two", logging_config={"log_level": "DEBUG"})
    config = serve_config(spec_of(serve(app("one"), own, **options, logging_config=logs, **DIRECT)))
    assert config["http_options"]["root_path"] == "/kit"
    assert config["grpc_options"] == {"port": 9000, "grpc_servicer_functions": servicers}
    assert config["logging_config"]["encoding"] == "JSON"
    assert [item["logging_config"]["log_level"] for item in config["applications"]] == ["WARNING", "DEBUG"]
    assert [len(item["deployments"]) for item in config["applications"]] == [1, 1], "no ingress"


def test_another_ingress_makes_a_running_node_stale_and_its_ports_are_looked_at(tmp_path: Path) -> None:
    """By the roles: the environment of `ray start`, the generation, and what preflight asks about on a worker."""
    cases = {"proxy": {}, "haproxy": HAPROXY, "direct": DIRECT}
    facts = {name: {**spec_of(serve(**options)).published(), "autoscaler": {}} for name, options in cases.items()}
    wanted = {
        "environment": "__ray_node_environment",
        "generation": "__ray_node_generation",
        "ports": "preflight_ports",
        "ray": "__ray_node_config.ports",
    }
    tasks: list[Vars] = [
        {"name": "Read", "ansible.builtin.include_vars": {"file": f"{ROOT}/roles/{path}/main.yml"}}
        for path in ("ray_node/defaults", "ray_node/vars", "preflight/defaults")
    ]
    for name, fact in facts.items():
        content = "{{ {" + ", ".join(f"'{key}': {value}" for key, value in wanted.items()) + "} | to_json }}"
        given = {"clusterkit": fact, "role_path": f"{ROOT}/roles/ray_node", "inventory_hostname": "w1"}
        dest = {"content": content, "dest": f"{tmp_path}/{name}.json", "mode": "0600"}
        tasks.append({"name": "Render", "ansible.builtin.copy": dest, "vars": given})
    play = {"name": "Test", "hosts": "all", "gather_facts": False, "connection": "local", "tasks": tasks}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    done = ansible_playbook(tmp_path, "-i", "w1,", "play.yml")
    assert done.code == 0, done.text
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in cases}
    assert len({item["generation"] for item in found.values()}) == len(cases)
    assert found["proxy"]["environment"] == {}
    assert found["direct"]["environment"] == facts["direct"]["ingress_environment"]
    # The launcher knows Ray's ports, and no others.
    assert found["proxy"]["ray"] == found["haproxy"]["ray"] == facts["proxy"]["ports"]
    assert set(found["haproxy"]["ports"]) - set(found["proxy"]["ports"]) == {"haproxy_stats", "haproxy_metrics"}
