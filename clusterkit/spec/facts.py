"""The typed facts of a cluster: `clusterkit_*` in an inventory. Defaults live here and nowhere else.

Three scopes, three models: `ClusterFacts` (group_vars/all), `PoolFacts` (a child group of
`ray_workers`), `HostFacts` (one host). Units stand in the names: `_s` seconds, `_gib` GiB, `_mib` MiB.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictInt, model_validator

from serve_apps.template import LoggingConfig

Accelerator = Literal["rocm", "cuda", "cpu"]

# Unix sockets end at 107 bytes and Ray appends about 65 (`/session_<time>/sockets/plasma_store`).
RAY_TEMP_LIMIT = 40

Port = Annotated[StrictInt, Field(ge=1, le=65535)]
Number = StrictInt | StrictFloat


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return value


def _short(value: str) -> str:
    if len(value) > RAY_TEMP_LIMIT:
        raise ValueError(f"is {len(value)} characters long; Ray's Unix sockets leave room for {RAY_TEMP_LIMIT}")
    return value


def _ip(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be an IP address") from None


def _without_password(value: str) -> str:
    if re.match(r"\w+://[^/@]*:[^/@]*@", value):
        raise ValueError("must not hold a password; give it to git itself (credential helper, .netrc, an SSH key)")
    if not re.fullmatch(r"\S+", value):
        raise ValueError("must be a URL or a path without spaces")
    return value


AbsolutePath = Annotated[str, AfterValidator(_absolute)]
IpAddress = Annotated[str, AfterValidator(_ip)]


class Ports(Facts):
    """TCP ports on every host. Ray refuses a port inside the workers' range.

    All lie below 32768, where Linux takes the ports of outgoing connections.
    """

    gcs: Port = Field(6379, description="head: Ray's control plane, where workers join")
    dashboard: Port = Field(8265, description="head: dashboard and REST API, on 127.0.0.1 only")
    client: Port = Field(10001, description="head: Ray client")
    serve: Port = Field(8000, description="the Serve proxy: the OpenAI API")
    metrics: Port = Field(8090, description="Ray's metrics, for Prometheus; open without a token")
    agent_http: Port = Field(20365, description="Ray's dashboard agent; node health")
    agent_grpc: Port = Field(20366, description="Ray's dashboard agent")
    node_manager: Port = Field(20367, description="raylet")
    object_manager: Port = Field(20368, description="raylet, objects between hosts")
    runtime_env_agent: Port = Field(20369, description="raylet, environments of tasks")
    worker_min: Port = Field(10002, description="first port of Ray's worker processes")
    worker_max: Port = Field(19999, description="last port of Ray's worker processes")
    grpc: Port = Field(9000, description="Serve's gRPC proxy, where `clusterkit_serve.grpc_options` has servicers")
    haproxy_stats: Port = Field(8404, description="ingress haproxy: its statistics page, open to everybody")
    haproxy_metrics: Port = Field(9101, description="ingress haproxy: its metrics, open to everybody")
    fallback: Port = Field(8500, description="ingress haproxy, head: Serve's own proxy, for apps without a replica")
    fallback_grpc: Port = Field(9500, description="the same for gRPC")
    replica_min: Port = Field(30000, description="ingress haproxy: first port of replicas; the upper half is for gRPC")
    replica_max: Port = Field(31999, description="ingress haproxy: last port of replicas")


class Paths(Facts):
    """Where things lie on every host."""

    root: AbsolutePath = Field("/opt/clusterkit", description="programs: the Ray environment, the launcher")
    config: AbsolutePath = Field("/etc/clusterkit", description="what the kit renders")
    state: AbsolutePath = Field("/var/lib/clusterkit", description="the host's record, instance id, generation")
    log: AbsolutePath = Field("/var/log/clusterkit", description="logs of launcher and agent")
    models: AbsolutePath = Field("/var/lib/clusterkit/models", description="weights made or fetched by the kit")
    ray_temp: Annotated[AbsolutePath, AfterValidator(_short)] = Field(
        "/var/lib/clusterkit/ray", description="Ray's session folder: logs, sockets, spilled objects"
    )


class Proxy(Facts):
    """Outgoing proxies, for every step that leaves a host."""

    http: str | None = Field(None, description="URL of the proxy for http")
    https: str | None = Field(None, description="URL of the proxy for https")
    no_proxy: list[str] = Field([], description="hosts and networks that are reached directly")


class Mirrors(Facts):
    """On-prem mirrors; empty means the public original."""

    pypi: str | None = Field(None, description="index URL for pip; none: pip's own configuration")
    huggingface: Annotated[str, Field(pattern=r"^https?://")] | None = Field(
        None, description="of weights: a server that speaks the Hub's API (`HF_ENDPOINT`); none: huggingface.co"
    )


class GrpcOptions(Facts):
    """The gRPC proxy; without servicers there is none."""

    grpc_servicer_functions: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)+$")]] = Field(
        [], description="`package.module.add_…_to_server`, importable in the engine's environment on every host"
    )
    request_timeout_s: Number | None = Field(None, gt=0, description="how long a call may take; none: no limit")


class ServeFacts(Facts):
    """Cluster-wide options of Ray Serve; most are fixed once Serve runs."""

    http_host: str = Field("0.0.0.0", description="address that the proxies listen on; they ask nobody who he is")
    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = Field(
        "EveryNode", description="EveryNode: the head and each node that holds a replica"
    )
    ingress: Literal["proxy", "haproxy"] = Field(
        "proxy",
        description="what takes requests on every host: Serve's proxy, or HAProxy (Ray 2.60); a change restarts Ray",
    )
    direct_streaming: bool = Field(
        False, description="ingress haproxy: `llm` replicas are asked without an ingress of the app's in between"
    )
    root_path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9/_.-]*[A-Za-z0-9_.-])?$")] = Field(
        "", description="what a proxy in front has taken off the path, such as /prefix"
    )
    request_timeout_s: Number | None = Field(None, description="how long a request may take; none: as long as it likes")
    keep_alive_timeout_s: StrictInt = Field(5, description="how long an idle connection is kept")
    ready_timeout_s: StrictInt = Field(
        900, gt=0, description="how long an app may take to become RUNNING, once its hosts are there"
    )
    grpc_options: GrpcOptions = GrpcOptions()
    logging_config: LoggingConfig | None = Field(
        None, description="of Serve and of every app that has none of its own; none: as Ray has it"
    )

    @model_validator(mode="after")
    def _streaming(self) -> ServeFacts:
        if self.direct_streaming and self.ingress != "haproxy":
            raise ValueError("direct_streaming needs ingress: haproxy")
        return self


class LogRotation(Facts):
    """Size and number of the kit's own logs."""

    max_mib: StrictInt = Field(100, gt=0, description="size at which a log is rotated")
    keep: StrictInt = Field(5, ge=1, description="rotated logs that are kept")


class PoolScaling(Facts):
    """How many hosts of a pool run Ray. A fixed pool runs all of them."""

    mode: Literal["fixed", "autoscaled"] = Field(
        "fixed", description="fixed: every host runs its node; autoscaled: hosts come and go as Serve needs them"
    )
    min: StrictInt = Field(0, ge=0, description="never fewer hosts")
    max: StrictInt | None = Field(None, ge=0, description="at most the number of hosts in the pool; default all")
    boot_budget_s: StrictInt = Field(
        600, gt=0, description="autoscaled: from power on until the host answers; one that takes longer is quarantined"
    )
    drain_grace_s: StrictInt = Field(
        900, gt=0, le=99999, description="autoscaled: how long work on a node that has to go may take to end or move"
    )
    idle_off_s: StrictInt | None = Field(
        None, gt=0, description="autoscaled: a host that runs no node for so long is switched off; none: stays on"
    )
    warm: StrictInt = Field(
        0, ge=0, description="autoscaled: so many idle hosts are on, whether they are needed or not"
    )
    warm_hours: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")] | None = Field(
        None, description="autoscaled: when warm hosts are kept, such as 07:00-19:00 by the head's clock; none: always"
    )
    idle_watts: StrictInt | None = Field(
        None, gt=0, description="autoscaled: what an idle host burns, measured by the site; for the energy saved"
    )


class PowerFacts(Facts):
    """How a host is switched on and off. Users and passwords are options of the role `fleet`, from a vault."""

    kind: Literal["none", "wol", "ipmi", "redfish"] = Field("none", description="none: people switch it")
    address: str | None = Field(None, description="of its BMC; redfish: https://…")
    mac: Annotated[str, Field(pattern=r"^([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}$")] | None = Field(
        None, description="wol: of the interface that wakes it"
    )
    broadcast: IpAddress = Field("255.255.255.255", description="wol: where the magic packet goes")
    system: str | None = Field(None, description="redfish: path of the system; default the only one of the BMC")

    @model_validator(mode="after")
    def _complete(self) -> PowerFacts:
        needed = {"wol": "mac", "ipmi": "address", "redfish": "address"}.get(self.kind)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"kind {self.kind} needs {needed}")
        if self.kind == "redfish" and not str(self.address).startswith("https://"):
            raise ValueError("the address of a redfish BMC starts with https://")
        return self


class AutoscalerFacts(Facts):
    """How fast autoscaled pools follow what Serve asks for."""

    idle_timeout_s: StrictInt = Field(300, gt=0, description="a node without work for so long leaves Ray")
    upscaling_speed: Number = Field(1.0, gt=0, description="nodes that may come at once, per running node of a pool")
    power_ons: StrictInt = Field(4, gt=0, description="hosts that are switched on at the same time")
    cycles_per_day: StrictInt = Field(12, gt=0, description="how often a host may be switched on within a day")


class AppScaling(Facts):
    """One decision for all deployments of an app."""

    ratio: dict[str, Annotated[Number, Field(gt=0)]] | None = Field(
        None, description="deployments that keep these proportions, as the one asks that needs most: `{A: 1, B: 4}`"
    )
    policy_function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")] | None = Field(
        None, description="of the app's own code, `module:name`: Serve's policy of an application"
    )
    policy_kwargs: dict[str, Any] = Field({}, description="for `policy_function`, where it is a class")

    @model_validator(mode="after")
    def _one_of_them(self) -> AppScaling:
        if (self.ratio is None) == (self.policy_function is None):
            raise ValueError("has either ratio or policy_function")
        if self.policy_kwargs and self.policy_function is None:
            raise ValueError("policy_kwargs is for a policy_function")
        if self.ratio is not None and len(self.ratio) < 2:
            raise ValueError("a ratio is between two deployments at least")
        return self


class AppFacts(Facts):
    """One entry of `clusterkit_apps`; `parameters` are typed by the template."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = Field(description="unique")
    template: str = Field(description="a folder of serve_apps/")
    route_prefix: Annotated[str, Field(pattern=r"^/[A-Za-z0-9/_.-]*$")] = Field(
        "/", description="unique; below it stands /v1"
    )
    pool: str | None = Field(None, description="the pool it runs in; needed when there are several")
    scaling: AppScaling | None = Field(None, description="one policy for all deployments: serve_apps/policy/README.md")
    external_scaler: bool = Field(
        False, description="replicas are set from outside, as by `clusterkit app scale`; Serve scales nothing"
    )
    parameters: dict[str, Any] = Field({}, description="typed by the template: serve_apps/<template>/README.md")


class ClusterFacts(Facts):
    """Facts of the whole cluster: the same on every host."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")] = Field(
        description="of the cluster: lower case, digits, dashes"
    )
    stack: str = Field(description="a row of the version table: `clusterkit stacks`")
    ray_version: str | None = Field(None, description="overrides the stack's")
    vllm_version: str | None = Field(None, description="overrides the stack's")
    driver_version: str | None = Field(
        None, description="of the kernel driver, such as 30.30.3 (never ROCm's own number); overrides the stack's"
    )
    runtime: Literal["venv", "container"] = Field(
        "venv", description="what Ray runs in; `container` needs root and Docker on the hosts"
    )
    image: str | None = Field(
        None, description="container runtime: an image that the hosts pull, best by digest; default: built by the kit"
    )
    image_base: Annotated[str, Field(pattern=r"^[^@\s]+@sha256:[0-9a-f]{64}$")] | None = Field(
        None, description="image that the engine's is built on, by digest: name@sha256:…; default the stack's"
    )
    image_source: Annotated[str, AfterValidator(_without_password)] = Field(
        "https://github.com/vllm-project/vllm.git",
        description="vLLM's git repository, or a mirror or folder on the controller; git's own credentials, none here",
    )
    image_ref: Annotated[str, Field(pattern=r"^[\w][\w./+-]*$")] | None = Field(
        None, description="tag, branch or commit of vLLM's source; default the tag of the stack's version"
    )
    image_archs: list[Annotated[str, Field(pattern=r"^(gfx[0-9a-f]+|\d+\.\d+[af]?)$")]] = Field(
        [], description="GPU architectures that the image is built for; default those of the pools' GPU models"
    )
    image_arguments: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Annotated[str, Field(pattern=r"^.*$")]] = (
        Field({}, description="environment of vLLM's build, such as NVCC_THREADS; no secrets: the image names them")
    )
    image_patches: AbsolutePath | None = Field(
        None, description="folder on the controller with *.patch files for vLLM's source, applied by name"
    )
    image_registry: str | None = Field(
        None, description="registry that the engine's image moves through; default the host of the group `registry`"
    )
    service_user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] = Field(
        "ray", description="the user that runs Ray; made by the role baseline"
    )
    ports: Ports = Ports()
    paths: Paths = Paths()
    proxy: Proxy = Proxy()
    mirrors: Mirrors = Mirrors()
    ca_bundle: AbsolutePath | None = Field(None, description="PEM file on the controller, copied to every host")
    environment: dict[str, str] = Field({}, description="for every Ray process, such as NCCL_SOCKET_IFNAME")
    object_store_gib: Number | None = Field(None, gt=0, description="Ray's own default is 30 % of memory")
    serve: ServeFacts = ServeFacts()
    log_rotation: LogRotation = LogRotation()
    autoscaler: AutoscalerFacts = AutoscalerFacts()
    # Not strict: `-e clusterkit_allow_disruption=true` arrives as text.
    allow_disruption: bool = Field(False, description="consent to stop replicas where a change needs it")
    max_unavailable: StrictInt = Field(
        1, gt=0, description="how many hosts at once may be out of service for a reboot or a restart of dockerd"
    )
    apps: list[AppFacts] = Field([], description="what is served; one entry a model")


class PoolFacts(Facts):
    """Facts of a pool: the same on every host of it."""

    accelerator: Accelerator = Field(description="what its engines run on")
    gpu_model: str | None = Field(None, description="Ray's accelerator type, such as AMD-Instinct-MI300X-OAM")
    gpus: StrictInt = Field(0, ge=0, description="GPUs of each host")
    gpu_memory_gib: Number | None = Field(None, gt=0, description="memory of each GPU")
    cpus: StrictInt | None = Field(None, gt=0, description="CPUs that Ray may hand out; default all of the host")
    labels: dict[str, str] = Field({}, description="Ray node labels")
    pool: PoolScaling = PoolScaling()


class HostFacts(Facts):
    """Facts of one host."""

    node_ip: IpAddress | None = Field(None, description="Ray's address; default `ansible_host` if that is an IP")
    fabric_interface: str | None = Field(None, description="for NCCL, RCCL and Gloo")
    power: PowerFacts = PowerFacts()


SCOPES: dict[str, type[Facts]] = {"cluster": ClusterFacts, "pool": PoolFacts, "host": HostFacts}


def scope_of(field_name: str) -> str | None:
    """The scope that owns a fact; None for an unknown one."""
    for scope, model in SCOPES.items():
        if field_name in model.model_fields:
            return scope
    return None


def known_variables() -> list[str]:
    """Every `clusterkit_*` name there is."""
    return sorted(f"clusterkit_{name}" for model in SCOPES.values() for name in model.model_fields)
