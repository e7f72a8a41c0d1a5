"""The `llm` app: its parameters, and the entry of Serve's config that they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve_apps import template as templates
from serve_apps.llm.parameters import ACCELERATOR_TYPES, LlmParameters, nearest_accelerator
from serve_apps.llm.template import demand, deployment_name, model_source, ray_needs, render

MADE = {"make": "tiny-llama"}
# Apps as earlier releases rendered them.
GOLDEN = json.loads((Path(__file__).parent / "golden/llm-apps.json").read_text())


def parameters(**given: Any) -> LlmParameters:
    return LlmParameters.model_validate({"model_id": "tiny", "model_source": MADE, **given})


def rendered(accelerator: Any = "rocm", **given: Any) -> dict[str, Any]:
    return render(
        name="app",
        route_prefix="/",
        parameters=parameters(**given),
        accelerator=accelerator,
        model_path="/srv/models/tiny",
    )


def llm_config(app: dict[str, Any]) -> dict[str, Any]:
    (config,) = app["args"]["llm_configs"]
    assert isinstance(config, dict)
    return config


def deployments(app: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in app["deployments"]}


def engine_identity(app: dict[str, Any]) -> str:
    """What Serve hashes (ray 2.60.0, get_app_code_version): a change in it restarts every replica."""
    scaled = [item["autoscaling_config"].get("policy") for item in app["deployments"] if item["autoscaling_config"]]
    return json.dumps([app["import_path"], app["runtime_env"], app["args"], scaled], sort_keys=True)


# --------------------------------------------------------------------------- render


def test_the_template_is_found_by_its_name() -> None:
    llm = templates.load("llm")
    assert llm.openai_api
    assert llm.parameters is LlmParameters


def test_a_gpu_app() -> None:
    app = rendered(accelerator_type="AMD-Instinct-MI300X-OAM", tensor_parallel=4, engine_kwargs={"max_model_len": 8192})
    assert (app["name"], app["route_prefix"]) == ("app", "/")
    assert app["import_path"] == "ray.serve.llm:build_openai_app"
    config = llm_config(app)
    assert config["model_loading_config"] == {"model_id": "tiny", "model_source": "/srv/models/tiny"}
    assert config["accelerator_type"] == "AMD-Instinct-MI300X-OAM"
    assert config["engine_kwargs"] == {"max_model_len": 8192, "tensor_parallel_size": 4, "pipeline_parallel_size": 1}
    assert config["placement_group_config"] == {"bundles": [{"GPU": 1}] * 4, "strategy": "STRICT_PACK"}
    assert config["deployment_config"] == {"ray_actor_options": {"num_cpus": 1}}
    assert "accelerator_config" not in config
    json.dumps(app)  # it goes over HTTP


def test_a_cpu_app_fits_a_machine_of_two_cores() -> None:
    app = rendered("cpu", accelerator_type=None)
    config = llm_config(app)
    assert config["accelerator_config"] == {"kind": "cpu"}
    assert "accelerator_type" not in config
    assert config["engine_kwargs"]["enforce_eager"] is True
    cpus = sum(bundle["CPU"] for bundle in config["placement_group_config"]["bundles"])
    cpus += config["deployment_config"]["ray_actor_options"]["num_cpus"]
    cpus += deployments(app)["OpenAiIngress"]["ray_actor_options"]["num_cpus"]
    assert cpus <= 2


def test_the_ingress_cannot_land_on_a_head_without_cpus() -> None:
    assert deployments(rendered())["OpenAiIngress"]["ray_actor_options"]["num_cpus"] > 0


def test_accelerator_type_is_dropped_on_cpu() -> None:
    """Ray LLM refuses it there, and the same app may run on a CPU pool of the lab."""
    assert "accelerator_type" not in llm_config(rendered("cpu", accelerator_type="H100"))


def test_environment_is_offline_and_the_users_wins() -> None:
    app = rendered("cpu", environment={"VLLM_CPU_KVCACHE_SPACE": "8", "NCCL_DEBUG": "INFO"})
    env = app["runtime_env"]["env_vars"]
    assert env["HF_HUB_OFFLINE"] == env["TRANSFORMERS_OFFLINE"] == "1"
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["NCCL_DEBUG"]) == ("8", "INFO")
    assert llm_config(app)["runtime_env"]["env_vars"] == env
    assert rendered("cpu")["runtime_env"]["env_vars"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in rendered("rocm")["runtime_env"]["env_vars"]
    assert (
        llm_config(rendered("cpu", engine_kwargs={"enforce_eager": False}))["engine_kwargs"]["enforce_eager"] is False
    )


def test_cpu_engines_take_the_threads_that_were_set_aside() -> None:
    assert rendered("cpu")["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"
    app = rendered("cpu", cpus_per_replica=6)
    assert app["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "6"
    assert llm_config(app)["placement_group_config"]["bundles"] == [{"CPU": 6}]


@pytest.mark.parametrize(
    ("given", "strategy"),
    [
        ({}, "STRICT_PACK"),
        ({"tensor_parallel": 8}, "STRICT_PACK"),
        ({"tensor_parallel": 8, "pipeline_parallel": 2}, "PACK"),
        ({"gpu_fraction": 0.5}, "STRICT_PACK"),
    ],
)
def test_a_replica_that_fits_a_host_has_to_be_on_one(given: dict[str, Any], strategy: str) -> None:
    assert llm_config(rendered(**given))["placement_group_config"]["strategy"] == strategy


def test_a_share_of_a_gpu_takes_its_share_of_memory() -> None:
    app = rendered(gpu_fraction=0.25)
    config = llm_config(app)
    assert config["placement_group_config"]["bundles"] == [{"GPU": 0.25}]
    assert config["engine_kwargs"]["gpu_memory_utilization"] == pytest.approx(0.225)
    assert app["runtime_env"]["env_vars"]["VLLM_RAY_PER_WORKER_GPUS"] == "0.25"
    own = llm_config(rendered(gpu_fraction=0.25, engine_kwargs={"gpu_memory_utilization": 0.2}))
    assert own["engine_kwargs"]["gpu_memory_utilization"] == 0.2


@pytest.mark.parametrize(
    ("model_id", "server_class", "name"),
    [
        ("tiny", None, "LLMServer:tiny"),
        ("meta-llama/Llama-3.1-8B", None, "LLMServer:meta-llama--Llama-3_1-8B"),
        ("tiny", "own.module:OwnServer", "OwnServer:tiny"),
        ("tiny", "own.module.OwnServer", "OwnServer:tiny"),
    ],
)
def test_the_deployment_has_the_name_that_ray_gives_it(model_id: str, server_class: str | None, name: str) -> None:
    assert deployment_name(model_id, server_class) == name
    app = rendered(model_id=model_id, server_class=server_class)
    assert list(deployments(app)) == [name, "OpenAiIngress"]
    assert llm_config(app).get("server_cls") == server_class


LIGHT_EDITS: list[dict[str, Any]] = [
    {"max_replicas": 8},
    {"min_replicas": 2, "max_replicas": 4, "initial_replicas": 3},
    {"target_ongoing_requests": 5.5},
    {"upscale_delay_s": 1, "downscale_delay_s": 1},
    {"ingress_min_replicas": 2, "ingress_max_replicas": 4},
    {"max_ongoing_requests": 32, "max_queued_requests": 100},
    {"health_check_period_s": 1, "health_check_timeout_s": 99},
    {"graceful_shutdown_wait_loop_s": 1, "graceful_shutdown_timeout_s": 5},
    {"downscale_to_zero_delay_s": 60},
    {"rolling_update_percentage": 1, "max_surge_percent": 100},
]


@pytest.mark.parametrize("edit", LIGHT_EDITS, ids=lambda edit: next(iter(edit)))
def test_an_edit_of_scaling_or_care_restarts_no_engine(edit: dict[str, Any]) -> None:
    before, after = rendered(), rendered(**edit)
    assert before["deployments"] != after["deployments"]
    assert engine_identity(before) == engine_identity(after)
    # Of the ingress neither: other actor options would restart it.
    options = [deployments(app)["OpenAiIngress"]["ray_actor_options"] for app in (before, after)]
    assert options[0] == options[1]


def test_user_config_is_an_edit_that_restarts_nothing() -> None:
    own = {"server_class": "own:Server"}
    before, after = rendered(**own), rendered(**own, user_config={"temperature": 1})
    assert engine_identity(before) == engine_identity(after)
    assert deployments(after)["Server:tiny"]["user_config"] == {"temperature": 1}


def test_everything_about_scaling_is_said() -> None:
    """What is left out falls to Ray LLM's defaults, one of which never scales."""
    server = deployments(rendered())["LLMServer:tiny"]
    assert server["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 1,
        "target_ongoing_requests": 16,
        "upscale_delay_s": 30,
        "downscale_delay_s": 600,
    }
    assert {"max_ongoing_requests", "max_queued_requests"} < set(server)
    assert {"health_check_period_s", "health_check_timeout_s"} < set(server)
    assert server["graceful_shutdown_timeout_s"] == 600


def test_the_ingress_goes_with_the_model() -> None:
    def scaling(**given: Any) -> dict[str, Any]:
        found = deployments(rendered(**given))["OpenAiIngress"]["autoscaling_config"]
        assert isinstance(found, dict)
        return found

    found = scaling(min_replicas=0, max_replicas=6, target_ongoing_requests=9, initial_replicas=2)
    assert (found["min_replicas"], found["max_replicas"], found["initial_replicas"]) == (0, 6, 2)
    assert found["target_ongoing_requests"] == 9
    assert scaling(ingress_min_replicas=3)["max_replicas"] == 3
    own = scaling(max_replicas=9, initial_replicas=9, ingress_max_replicas=2)
    assert (own["min_replicas"], own["max_replicas"], own["initial_replicas"]) == (1, 2, 2)


def test_a_stream_is_not_cut_at_the_ingress() -> None:
    found = deployments(rendered(graceful_shutdown_timeout_s=1234))
    assert {item["graceful_shutdown_timeout_s"] for item in found.values()} == {1234}


@pytest.mark.parametrize(
    ("kind", "accelerator", "given"),
    [
        (
            "gpu",
            "rocm",
            {
                "accelerator_type": "AMD-Instinct-MI300X-OAM",
                "tensor_parallel": 4,
                "max_replicas": 4,
                "engine_kwargs": {"max_model_len": 32768},
            },
        ),
        ("cpu", "cpu", {"engine_kwargs": {"max_model_len": 1024}}),
        (
            "fraction",
            "cuda",
            {
                "gpu_fraction": 0.5,
                "min_replicas": 0,
                "max_replicas": 6,
                "initial_replicas": 2,
                "server_class": "own:Server",
                "user_config": {"a": 1},
                "environment": {"A": "b"},
            },
        ),
    ],
)
def test_what_runs_already_is_rendered_as_it_was(kind: str, accelerator: Any, given: dict[str, Any]) -> None:
    """Other words in `args` or `runtime_env` would replace the replicas of every cluster that takes this release."""
    app = render(
        name="app",
        route_prefix="/",
        parameters=parameters(**given),
        accelerator=accelerator,
        model_path="/srv/models/tiny",
        cache_path="/kept/abc",
    )
    assert app == GOLDEN[kind]


def test_a_fixed_number_of_replicas() -> None:
    fixed = deployments(rendered(num_replicas=3))
    for deployment in fixed.values():
        # Null, and not left out: Ray LLM's own scaling would stay in force beside the number.
        assert (deployment["num_replicas"], deployment["autoscaling_config"]) == (3, None)
    assert engine_identity(rendered(num_replicas=3)) == engine_identity(rendered(num_replicas=1))
    assert engine_identity(rendered(num_replicas=3)) != engine_identity(rendered()), "as the README says"
    found = demand(parameters(num_replicas=3))
    assert (found.min_replicas, found.max_replicas) == (3, 3)
    assert found.minimum_cpus == demand(parameters(min_replicas=3, max_replicas=3)).minimum_cpus


def test_the_last_replica_may_stay_longer() -> None:
    for deployment in deployments(rendered(min_replicas=0, downscale_to_zero_delay_s=3600)).values():
        assert deployment["autoscaling_config"]["downscale_to_zero_delay_s"] == 3600


def test_an_app_behind_haproxy_that_streams_directly_has_no_ingress() -> None:
    """Serve refuses an override of a deployment that is not there."""
    given: dict[str, Any] = {"name": "app", "route_prefix": "/", "parameters": parameters(), "accelerator": "cpu"}
    app = render(**given, model_path="/m", direct_streaming=True)
    assert list(deployments(app)) == ["LLMServer:tiny"]
    assert set(app["args"]) == {"llm_configs"}, "Ray LLM refuses options of an ingress there"
    assert len(app["args"]["llm_configs"]) == 1


def test_a_slow_engine_gets_its_time() -> None:
    environment = rendered(engine_start_timeout_s=1800)["runtime_env"]["env_vars"]
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "1800"
    assert int(environment["RAYLLM_ENGINE_START_TIMEOUT_S"]) > 1800
    # Who woke the engine waits for it, and then for the answer.
    assert environment["RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT"] == "2400"
    own = rendered(engine_start_timeout_s=1800, response_timeout_s=90)["runtime_env"]["env_vars"]
    assert own["RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT"] == "90"


def test_what_is_about_streams_logs_and_rollouts() -> None:
    app = rendered(stream_batching_interval_ms=0, logging_config={"log_level": "DEBUG"}, max_surge_percent=50)
    assert llm_config(app)["experimental_configs"] == {"stream_batching_interval_ms": 0}
    assert app["logging_config"]["log_level"] == "DEBUG"
    assert {item["max_surge_percent"] for item in app["deployments"]} == {50}
    assert not {"rolling_update_percentage", "logging_config"} & set(app["deployments"][0])
    json.dumps(app)


def test_only_what_is_said_needs_a_newer_ray() -> None:
    assert ray_needs(parameters()) == []
    needs = ray_needs(parameters(max_surge_percent=0, rolling_update_percentage=0.5))
    assert {(need.parameter, need.ray) for need in needs} == {
        ("rolling_update_percentage", "2.60.0"),
        ("max_surge_percent", "2.60.0"),
    }


# --------------------------------------------------------------------------- demand and source


@pytest.mark.parametrize(
    ("given", "gpus", "per_host", "memory"),
    [
        ({}, 1, 1, None),
        ({"tensor_parallel": 4}, 4, 4, None),
        ({"tensor_parallel": 8, "pipeline_parallel": 2}, 16, 8, None),
        ({"gpu_fraction": 0.5}, 0.5, 0.5, 0.45),
        ({"engine_kwargs": {"gpu_memory_utilization": 0.7}}, 1, 1, 0.7),
    ],
)
def test_demand(given: dict[str, Any], gpus: float, per_host: float, memory: float | None) -> None:
    found = demand(parameters(**given, min_replicas=0, max_replicas=3))
    assert (found.gpus, found.gpus_per_host, found.memory_fraction) == (gpus, per_host, memory)
    assert (found.min_replicas, found.max_replicas) == (0, 3)


def test_model_source() -> None:
    assert model_source(parameters()) == {"id": "tiny", "make": "tiny-llama"}
    folder = parameters(model_source={"folder": "/srv/weights/"})
    assert model_source(folder) == {"id": "tiny", "folder": "/srv/weights"}
    hub = {"hub": "org/name", "revision": "v1", "ignore_patterns": ["consolidated*"]}
    assert model_source(parameters(model_source=hub)) == {
        **hub,
        "id": "tiny",
        "allow_patterns": (),
        "ignore_patterns": ("consolidated*",),
    }


def test_engines_never_ask_outside_unless_told() -> None:
    environment = llm_config(rendered())["runtime_env"]["env_vars"]
    assert (environment["HF_HUB_OFFLINE"], environment["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    asking = llm_config(rendered(environment={"HF_HUB_OFFLINE": "0"}))["runtime_env"]["env_vars"]
    assert asking["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize("accelerator", ["rocm", "cuda", "cpu"])
def test_what_an_engine_compiles_stays_in_its_folder(accelerator: Any) -> None:
    given = {"name": "app", "route_prefix": "/", "parameters": parameters(), "model_path": "/srv/models/tiny"}
    app = render(**given, accelerator=accelerator, cache_path="/kept/abc")
    environment = llm_config(app)["runtime_env"]["env_vars"]
    assert app["runtime_env"]["env_vars"] == environment
    caches = {name: value for name, value in environment.items() if value.startswith("/kept")}
    assert caches == {
        "VLLM_CACHE_ROOT": "/kept/abc/vllm",
        "TORCHINDUCTOR_CACHE_DIR": "/kept/abc/inductor",
        "TRITON_CACHE_DIR": "/kept/abc/triton",
        **({"FLASHINFER_WORKSPACE_BASE": "/kept/abc/flashinfer"} if accelerator == "cuda" else {}),
    }
    assert "VLLM_CACHE_ROOT" not in llm_config(render(**given, accelerator=accelerator))["runtime_env"]["env_vars"]


# --------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model_source": {"folder": "relative"}}, "absolute path"),
        (
            {"model_source": {"download": "x"}},
            "must be {hub: org/name, revision: commit}, {folder: /path} or {make: tiny-llama}",
        ),
        ({"model_source": {"make": "other"}}, "tiny-llama"),
        ({"model_source": {"hub": "org/name"}}, "revision"),
        ({"model_source": {"hub": "https://huggingface.co/org/name", "revision": "main"}}, "hub"),
        ({"model_source": {"hub": "org/name", "revision": "../main"}}, "revision"),
        ({"model_source": {"make": "tiny-llama", "folder": "/x"}}, "Extra inputs"),
        (
            {"model_source": "tiny-llama"},
            "must be {hub: org/name, revision: commit}, {folder: /path} or {make: tiny-llama}",
        ),
        ({"model_id": "white space"}, "model_id"),
        ({"accelerator_type": "MI300X"}, "did you mean 'AMD-Instinct-MI300X-OAM'"),
        ({"engine_kwargs": {"max-model-len": 1}}, "write 'max_model_len'"),
        ({"engine_kwargs": {"tensor_parallel_size": 2}}, "the parameter tensor_parallel"),
        ({"engine_kwargs": {"served_model_name": "x"}}, "the parameter model_id"),
        ({"gpu_fraction": 1}, "less than 1"),
        ({"gpu_fraction": 0}, "greater than 0"),
        ({"gpu_fraction": 0.5, "tensor_parallel": 2}, "gpu_fraction is for one GPU"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas (3) is above max_replicas (2)"),
        ({"initial_replicas": 2}, "initial_replicas (2) is above max_replicas (1)"),
        ({"min_replicas": 2, "max_replicas": 2, "initial_replicas": 1}, "min_replicas (2) is above initial_replicas"),
        ({"ingress_min_replicas": 3, "ingress_max_replicas": 2}, "ingress_min_replicas (3)"),
        ({"max_ongoing_requests": 8}, "never scale up"),
        ({"user_config": {"a": 1}}, "needs a server_class"),
        ({"max_replicas": "2"}, "valid integer"),
        ({"health_check_timeout_s": "30s"}, "health_check_timeout_s"),
        ({"target_num_ongoing_requests_per_replica": 3}, "Extra inputs"),
        ({"max_queued_requests": -2}, "greater than or equal to -1"),
        ({"num_replicas": 2, "min_replicas": 1, "upscale_delay_s": 1}, "take out min_replicas and upscale_delay_s"),
        ({"num_replicas": 0}, "greater than or equal to 1"),
        ({"max_replicas_per_node": 1}, "Serve refuses it for replicas with a placement group"),
        ({"max_surge_percent": 101}, "less than or equal to 100"),
        ({"rolling_update_percentage": 20}, "less than or equal to 1"),
        ({"logging_config": {"log_level": "LOUD"}}, "log_level"),
    ],
)
def test_mistakes_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parameters(**given)
    assert says in str(caught.value)


def test_parameters_are_frozen_and_all_of_them_explained() -> None:
    with pytest.raises(ValidationError):
        parameters().max_replicas = 5  # type: ignore[misc]
    assert [name for name, field in LlmParameters.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("mi300x", "AMD-Instinct-MI300X-OAM"),
        ("AMD Instinct MI325X", "AMD-Instinct-MI325X-OAM"),
        ("amd-instinct-mi355x-oam", "AMD-Instinct-MI355X-OAM"),
        ("MI308X", "AMD-Instinct-MI308X"),
        ("nvidia-h100", "H100"),
        ("Tesla T4", "T4"),
        ("a100", "A100"),
        ("RTX PRO 6000", "RTX-PRO-6000"),
        ("abacus", None),
    ],
)
def test_nearest_accelerator(written: str, meant: str | None) -> None:
    assert nearest_accelerator(written) == meant
    assert meant is None or meant in ACCELERATOR_TYPES


def test_the_readme_lists_every_parameter_with_its_default() -> None:
    text = (Path(templates.__file__).parent / "llm/README.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    told = {name.strip("`"): default.strip("`") for name, default, _ in rows}
    fields = LlmParameters.model_fields
    expected = {
        name: "" if field.is_required() or field.default is None else json.dumps(field.default)
        for name, field in fields.items()
    }
    assert told == expected
