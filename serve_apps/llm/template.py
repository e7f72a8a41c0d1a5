"""Turns the parameters of an `llm` app into one entry of Serve's `applications`."""

from __future__ import annotations

from typing import Any, Literal

from serve_apps.llm.parameters import LlmParameters
from serve_apps.replicas import LOOKED_AFTER, POLICY, RAY_2_60, policy
from serve_apps.template import RayNeed, ReplicaDemand, entry, offline

PARAMETERS = LlmParameters
OPENAI_API = True
DIRECT_STREAMING = True

IMPORT_PATH = "ray.serve.llm:build_openai_app"
INGRESS = "OpenAiIngress"
# More than nothing, so that no ingress lands on a head that offers no CPU; little, because it only passes
# requests on and a small machine has to hold it beside the model.
INGRESS_CPUS = 0.1
# vLLM's own default share of a GPU's memory, of which a part of a GPU gets its part.
MEMORY_SHARE = 0.9
# Ray LLM's own limit on an answer, or on the beginning of a stream (RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT).
RESPONSE_TIMEOUT_S = 600


def deployment_name(model_id: str, server_class: str | None = None) -> str:
    """The name that Ray LLM gives to the deployment of a model."""
    server = "LLMServer" if server_class is None else server_class.replace(":", ".").rsplit(".", 1)[-1]
    return f"{server}:{model_id.replace('/', '--').replace('.', '_')}"


def model_source(parameters: LlmParameters) -> dict[str, Any]:
    """The weights that the app needs: their id, and what to make, which folder to read, or what to fetch."""
    return {"id": parameters.model_id, **parameters.model_source.model_dump()}


def ray_needs(parameters: LlmParameters) -> list[RayNeed]:
    """What older Rays would refuse."""
    return [RayNeed(name, "2.60.0") for name in (*RAY_2_60, POLICY) if getattr(parameters, name) is not None]


def demand(parameters: LlmParameters) -> ReplicaDemand:
    """What the app asks of a pool."""
    gpus: float = parameters.tensor_parallel * parameters.pipeline_parallel
    if parameters.gpu_fraction is not None:
        gpus = parameters.gpu_fraction
    return ReplicaDemand(
        gpus=gpus,
        gpus_per_host=min(gpus, parameters.tensor_parallel),
        min_replicas=parameters.fewest,
        max_replicas=parameters.most,
        memory_fraction=_memory_fraction(parameters),
        minimum_cpus=parameters.fewest * (parameters.cpus_per_replica or 1) + parameters.ingress_min * INGRESS_CPUS,
    )


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: LlmParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_path: str,
    cache_path: str | None = None,
    code_uri: str | None = None,
    direct_streaming: bool = False,
) -> dict[str, Any]:
    """One entry of `applications`; `cache_path` is where the engine keeps what it compiles, on every host. With
    `direct_streaming` Ray LLM builds no ingress: requests go to the server's replicas at once.

    Serve hashes `args` and `runtime_env` of an app and restarts all its replicas when they change. So what
    the engine is stands there, and how many replicas run and how they are looked after stands under
    `deployments`, where a change is applied to the running ones.
    """
    env_vars = environment(parameters, accelerator, cache_path)
    return entry(
        name=name,
        route_prefix=route_prefix,
        import_path=IMPORT_PATH,
        # For the task that builds the app and for the ingress; the engine gets the same through its config.
        env_vars=env_vars,
        code_uri=code_uri,
        args={"llm_configs": [llm_config(parameters, accelerator, model_path, env_vars)]},
        deployments=[server(parameters)] + ([] if direct_streaming else [ingress(parameters)]),
        logging_config=parameters.logging_config,
    )


def llm_config(
    parameters: LlmParameters, accelerator: str, model_path: str, env_vars: dict[str, str]
) -> dict[str, Any]:
    """Ray LLM's LLMConfig of the model: what the engine is, and where its workers go."""
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": parameters.model_id, "model_source": model_path},
        "engine_kwargs": _engine_kwargs(parameters, accelerator),
        "placement_group_config": _placement(parameters, accelerator),
        "deployment_config": {"ray_actor_options": {"num_cpus": _actor_cpus(parameters, accelerator)}},
        "runtime_env": {"env_vars": env_vars},
    }
    if accelerator == "cpu":
        config["accelerator_config"] = {"kind": "cpu"}
    elif parameters.accelerator_type is not None:
        config["accelerator_type"] = parameters.accelerator_type
    if parameters.server_class is not None:
        config["server_cls"] = parameters.server_class
    if parameters.stream_batching_interval_ms is not None:
        config["experimental_configs"] = {"stream_batching_interval_ms": parameters.stream_batching_interval_ms}
    return config


def _engine_kwargs(parameters: LlmParameters, accelerator: str) -> dict[str, Any]:
    kwargs = dict(parameters.engine_kwargs)
    kwargs["tensor_parallel_size"] = parameters.tensor_parallel
    kwargs["pipeline_parallel_size"] = parameters.pipeline_parallel
    if parameters.gpu_fraction is not None:
        kwargs["gpu_memory_utilization"] = _memory_fraction(parameters)
    if accelerator == "cpu":
        # Compiling takes a C++ compiler on every host and minutes at the start.
        kwargs.setdefault("enforce_eager", True)
    return kwargs


def _memory_fraction(parameters: LlmParameters) -> float | None:
    given = parameters.engine_kwargs.get("gpu_memory_utilization")
    if given is not None:
        return float(given)
    if parameters.gpu_fraction is not None:
        return round(MEMORY_SHARE * parameters.gpu_fraction, 4)
    return None


def _placement(parameters: LlmParameters, accelerator: str) -> dict[str, Any]:
    # A replica without pipeline stages fits one host, and there it has to be. STRICT_PACK also keeps
    # Serve's packing of replicas alive, which any other strategy switches off.
    strategy = "STRICT_PACK" if parameters.pipeline_parallel == 1 else "PACK"
    if accelerator == "cpu":
        # One bundle for the whole replica: its engine starts its workers as its own processes.
        return {"bundles": [{"CPU": parameters.cpus_per_replica or 1}], "strategy": strategy}
    # One a worker, written out: Ray 2.52.1 knows no `bundle_per_worker`.
    workers = parameters.tensor_parallel * parameters.pipeline_parallel
    return {"bundles": [{"GPU": parameters.gpu_fraction or 1}] * workers, "strategy": strategy}


def _actor_cpus(parameters: LlmParameters, accelerator: str) -> float:
    # Ray LLM adds the actor's CPUs to its first bundle; on CPU that bundle has them all already.
    return 0 if accelerator == "cpu" else parameters.cpus_per_replica or 1


def environment(parameters: LlmParameters, accelerator: str, cache_path: str | None) -> dict[str, str]:
    """The environment of the app's tasks and replicas, its engine included."""
    found = offline({})
    if cache_path is not None:
        # vLLM puts its own and Inductor's below the first; the others are for what compiles before or beside it,
        # and would go with the node's scratch folder.
        found["VLLM_CACHE_ROOT"] = f"{cache_path}/vllm"
        found["TORCHINDUCTOR_CACHE_DIR"] = f"{cache_path}/inductor"
        found["TRITON_CACHE_DIR"] = f"{cache_path}/triton"
        if accelerator == "cuda":
            found["FLASHINFER_WORKSPACE_BASE"] = f"{cache_path}/flashinfer"
    if accelerator == "cpu":
        found["VLLM_CPU_KVCACHE_SPACE"] = "1"
        # Left alone, every engine of a host binds itself to the same first cores.
        found["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        found["OMP_NUM_THREADS"] = str(max(1, int(parameters.cpus_per_replica or 1)))
    if parameters.gpu_fraction is not None:
        found["VLLM_RAY_PER_WORKER_GPUS"] = f"{parameters.gpu_fraction:g}"
    return {**found, **_timeouts(parameters), **parameters.environment}


def _timeouts(parameters: LlmParameters) -> dict[str, str]:
    """Nothing where nothing is said, so that no engine is replaced for a default."""
    start, answer = parameters.engine_start_timeout_s, parameters.response_timeout_s
    found: dict[str, str] = {}
    if start is not None:
        # vLLM waits for its engine process, and Ray LLM for vLLM.
        found["VLLM_ENGINE_READY_TIMEOUT_S"] = str(start)
        found["RAYLLM_ENGINE_START_TIMEOUT_S"] = str(start + 60)
        answer = answer or RESPONSE_TIMEOUT_S + start
    if answer is not None:
        found["RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT"] = f"{answer:g}"
    return found


def _replicas(parameters: LlmParameters, low: int, high: int) -> dict[str, Any]:
    """How many: a number, or what scaling goes by."""
    if parameters.num_replicas is not None:
        # Null, and not left out: Ray LLM's own scaling would stay in force beside the number.
        return {"num_replicas": parameters.num_replicas, "autoscaling_config": None}
    scaling: dict[str, Any] = {
        "min_replicas": low,
        "max_replicas": high,
        "target_ongoing_requests": parameters.target_ongoing_requests,
        "upscale_delay_s": parameters.upscale_delay_s,
        "downscale_delay_s": parameters.downscale_delay_s,
    }
    if parameters.initial_replicas is not None:
        scaling["initial_replicas"] = min(max(parameters.initial_replicas, low), high)
    if parameters.downscale_to_zero_delay_s is not None:
        scaling["downscale_to_zero_delay_s"] = parameters.downscale_to_zero_delay_s
    return {"autoscaling_config": scaling}


def _rollout(parameters: LlmParameters) -> dict[str, Any]:
    given = {name: getattr(parameters, name) for name in RAY_2_60}
    return {name: value for name, value in given.items() if value is not None}


def server(parameters: LlmParameters) -> dict[str, Any]:
    """The entry of `deployments` for the model's replicas."""
    found: dict[str, Any] = {
        "name": deployment_name(parameters.model_id, parameters.server_class),
        **_replicas(parameters, parameters.min_replicas, parameters.max_replicas),
        **{name: getattr(parameters, name) for name in LOOKED_AFTER},
        **_rollout(parameters),
    }
    if parameters.scaling_policy is not None:
        found["autoscaling_config"].update(policy(parameters.scaling_policy))
    if parameters.user_config:
        found["user_config"] = parameters.user_config
    return found


def ingress(parameters: LlmParameters) -> dict[str, Any]:
    """The entry for the ingress: one replica of it per model replica, scaled by the same load. Ray LLM's default is
    one for all, whose host would take the whole app along. Its requests last as long as the model's, so it gets as
    long to end them."""
    return {
        "name": INGRESS,
        **_replicas(parameters, parameters.ingress_min, parameters.ingress_max),
        "ray_actor_options": {"num_cpus": INGRESS_CPUS},
        "graceful_shutdown_wait_loop_s": parameters.graceful_shutdown_wait_loop_s,
        "graceful_shutdown_timeout_s": parameters.graceful_shutdown_timeout_s,
        **_rollout(parameters),
    }
