"""The first inventory of a cluster: a few answers in, commented files out, in the shape of inventory/mi300x."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from clusterkit.errors import UsageError
from clusterkit.inventory_file import one_line, snippet
from clusterkit.spec.facts import Accelerator, ClusterFacts
from clusterkit.spec.findings import did_you_mean
from clusterkit.spec.stacks import Stack, table
from serve_apps import template as templates

Runtime = Literal["venv", "container"]

# Names that Ansible and the kit give to groups: a host of the same name would be taken for all of them.
RESERVED = ("all", "ungrouped", "localhost", "ray_head", "ray_workers", "managed_hosts", "registry", "image_builder")
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
USER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.@-]{0,63}")
MADE_MODEL = "tiny-llama"
# Where upstream keeps the engine's wheels of a row, as inventory/mi300x names it.
WHEEL_INDEX = {"rocm72": "https://wheels.vllm.ai/rocm/0.29.0/rocm72"}


@dataclass(frozen=True)
class Member:
    """A host and its address."""

    name: str
    address: str


@dataclass(frozen=True)
class Request:
    """What the inventory is to describe. `workers` is empty on one box, where the head does the work."""

    name: str
    folder: Path
    head: Member
    workers: tuple[Member, ...]
    accelerator: Accelerator
    gpu_model: str | None = None
    gpus: int = 0
    user: str | None = None
    model_id: str | None = None
    model_source: str | None = None
    stack: str | None = None
    runtime: Runtime = "venv"
    image: str | None = None

    @property
    def pool(self) -> str:
        """The name of the pool: the GPU's, as people call it."""
        model = (self.gpu_model or "gpus").lower().removeprefix("amd-instinct-").split("-")[0]
        name = "cpus" if self.accelerator == "cpu" else re.sub(r"[^a-z0-9_]", "_", model) or "gpus"
        taken = {host.name for host in (self.head, *self.workers)}
        return name if name[0].isalpha() and name not in taken else f"pool_{name}"


def member(text: str) -> Member:
    """`NAME=IP`, or an IP address alone. Raises UsageError."""
    name, equals, address = (part.strip() for part in text.partition("="))
    if not equals:
        address = name
    try:
        address = str(ipaddress.ip_address(address))
    except ValueError:
        if equals:
            raise UsageError(f"{text!r}: {address!r} is no IP address", hint=f"write {name}=192.0.2.10") from None
        hint = f"Ray needs the address: write {name}=192.0.2.10, with the host's own on the management network"
        raise UsageError(f"{text!r} has no IP address", hint=hint) from None
    if not equals:
        return Member(address, address)
    if not HOST_NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no host name", hint="letters, digits, '.', '_' and '-', at most 63 of them")
    if name in RESERVED:
        raise UsageError(f"{name!r} has a meaning of its own in an inventory", hint="give the host another name")
    return Member(name, address)


def cluster_name(text: str) -> str:
    """A name for the cluster. Raises UsageError."""
    try:
        return ClusterFacts.model_validate({"name": text, "stack": "any"}).name
    except ValidationError:
        raise UsageError(
            f"{text!r} is no name for a cluster", hint="lower case letters, digits and dashes, at most 32 of them"
        ) from None


def check(request: Request) -> None:
    """Everything that can be known to be wrong before a file is written. Raises UsageError with all of it."""
    wrong = [*_hosts_wrong(request), *_pool_wrong(request), *_model_wrong(request), *_stack_wrong(request)]
    if request.user is not None and not USER_NAME.fullmatch(request.user):
        wrong.append(f"--user: {request.user!r} is no user name")
    if request.image is not None and request.runtime != "container":
        wrong.append("--image: is for --runtime container")
    if os.path.lexists(request.folder):
        wrong.append(
            f"{request.folder} is there already, and nothing is overwritten: "
            "name another with --directory, or go on with that one"
        )
    if wrong:
        raise UsageError(wrong[0] if len(wrong) == 1 else "\n  ".join([f"{len(wrong)} things are wrong:", *wrong]))


def rows(request: Request) -> list[Stack]:
    """The rows of the version table that could be meant, in its order."""
    return [row for row in table().rows if row.accelerator == request.accelerator and request.stack in (None, row.name)]


def render(request: Request, stack: Stack) -> dict[str, str]:
    """The files, by their path in the folder."""
    return {
        "hosts.yml": _hosts(request),
        "group_vars/all/main.yml": _main(request, stack),
        "group_vars/all/apps.yml": _apps(request),
        f"group_vars/{request.pool}.yml": _pool(request),
    }


def write(request: Request, stack: Stack) -> list[Path]:
    """The files, in a folder that appears all at once. Raises UsageError where there is one already."""
    folder = request.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        draft(scratch / "new", request, stack)
        if os.path.lexists(folder):
            raise UsageError(f"{folder} is there already", hint="nothing was overwritten")
        os.rename(scratch / "new", folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [folder / name for name in render(request, stack)]


def draft(folder: Path, request: Request, stack: Stack) -> None:
    """The files in a folder that is made for them."""
    for name, text in render(request, stack).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------- checks


def _hosts_wrong(request: Request) -> list[str]:
    wrong: list[str] = []
    if not request.workers:
        return wrong
    members = [("--head", request.head), *(("--worker", worker) for worker in request.workers)]
    names: dict[str, str] = {}
    addresses: dict[str, str] = {}
    for flag, host in members:
        if host.name in names:
            also = " (one host that does both: --one-box)" if names[host.name] != flag else ""
            wrong.append(f"{flag} {host.name}: is named twice{also}")
            continue
        names[host.name] = flag
        other = addresses.setdefault(host.address, host.name)
        if other != host.name:
            wrong.append(f"{flag} {host.name}: {host.address} is the address of {other} too")
    return wrong


def _pool_wrong(request: Request) -> list[str]:
    if request.accelerator == "cpu":
        given = [flag for flag, value in (("--gpus", request.gpus), ("--gpu-model", request.gpu_model)) if value]
        return [f"{' and '.join(given)}: a cpu cluster has no GPUs"] if given else []
    wrong = ["--gpus: each host of the pool has at least one"] if request.gpus < 1 else []
    return wrong if request.gpu_model else [*wrong, "--gpu-model: is missing"]


def _model_wrong(request: Request) -> list[str]:
    """The template's own words about model and GPU."""
    if request.model_id is not None and request.model_source is None:
        return ["--model-id: needs --model-source too"]
    if request.model_source is not None and request.model_id is None:
        return ["--model-source: needs --model-id too"]
    asked = {**_model(request), "accelerator_type": request.gpu_model}
    try:
        templates.load("llm").parameters.model_validate(asked)
    except ValidationError as error:
        flags = {"model_id": "--model-id", "model_source": "--model-source", "accelerator_type": "--gpu-model"}
        words = [str(item["msg"]).removeprefix("Value error, ") for item in error.errors()]
        return [f"{flags[str(item['loc'][0])]}: {text}" for item, text in zip(error.errors(), words, strict=True)]
    return []


def _stack_wrong(request: Request) -> list[str]:
    if request.stack is None:
        return []
    row = table().get(request.stack)
    fitting = [row.name for row in table().rows if row.accelerator == request.accelerator]
    if row is None:
        return [f"--stack: no row {request.stack!r}; {did_you_mean(request.stack, fitting) or ', '.join(fitting)}"]
    if row.accelerator != request.accelerator:
        return [f"--stack: {row.name} is made for {row.accelerator}; for {request.accelerator}: {', '.join(fitting)}"]
    return []


# --------------------------------------------------------------------------- files


def _hosts(request: Request) -> str:
    if request.workers:
        first = "# A head that runs no model, and the hosts that do."
        workers = [_entry(worker, 12) for worker in request.workers]
    else:
        first = "# One host: head and worker in one. Its death is the cluster's death."
        workers = [f"            {one_line(request.head.name)}:"]
    if request.user:
        login = f"""\
  vars:
    # Who logs in. Root work goes through sudo: run with -K if sudo asks for a password.
    ansible_user: {one_line(request.user)}"""
    else:
        login = """\
  # Who logs in is left to ssh. Root work goes through sudo: run with -K if sudo asks for a password.
  # vars:
  #   ansible_user: ops"""
    members = "\n".join(workers)
    return f"""\
{first}
all:
{login}
  children:
    # Exactly one host.
    ray_head:
      hosts:
{_entry(request.head, 8)}
    ray_workers:
      children:
        # A pool: hosts of one kind. Its facts stand in group_vars/{request.pool}.yml.
        {request.pool}:
          hosts:
{members}
    # Where root work is done, and systemd runs Ray.
    managed_hosts:
      children:
        ray_head:
        ray_workers:
"""


def _entry(host: Member, column: int) -> str:
    return snippet(host.name, {} if host.name == host.address else {"ansible_host": host.address}, column=column)


def _main(request: Request, stack: Stack) -> str:
    engine = ""
    if request.runtime == "venv" and stack.engine is not None:
        if len(stack.engine.python) == 1:
            engine += f"""
# The interpreter on the hosts that the engine's wheels are made for.
ray_env_python: python{stack.engine.python[0]}
"""
        if stack.name in WHEEL_INDEX:
            engine += f"""
# The engine's wheels: upstream's index, or your mirror of it.
ray_env_extra_index_urls:
  - {WHEEL_INDEX[stack.name]}
"""
    image = (
        f"""
# The image that the hosts pull, best by digest.
clusterkit_image: {one_line(request.image)}
"""
        if request.image
        else ""
    )
    return f"""\
# Facts of the whole cluster. Every variable stands in docs/variables.md; what is not set here has a default.
clusterkit_name: {request.name}

# A row of the version table (`clusterkit stacks`): Ray {stack.ray} with vLLM {stack.vllm}.
clusterkit_stack: {stack.name}

# What Ray runs in: `venv` (a Python environment on each host) or `container`.
clusterkit_runtime: {request.runtime}
{image}{engine}
# Outgoing proxies, if your racks need one.
# clusterkit_proxy:
#   http: http://proxy.example:3128
#   https: http://proxy.example:3128
#   no_proxy: [192.0.2.0/24, localhost]

# Ray takes 30 % of a host's memory for its object store by default; inference needs far less.
# clusterkit_object_store_gib: 32

# A change that has to stop replicas is listed and left, until you consent (here, or with -e).
clusterkit_allow_disruption: false
"""


def _pool(request: Request) -> str:
    facts = f"clusterkit_accelerator: {request.accelerator}\n"
    if request.accelerator == "cpu":
        facts += """\
# What Ray may hand out on each host; all of its CPUs, unless you say.
# clusterkit_cpus: 16
"""
    else:
        facts += f"""\
clusterkit_gpu_model: {one_line(request.gpu_model)}
clusterkit_gpus: {request.gpus}
# Memory of each GPU.
# clusterkit_gpu_memory_gib: 80
"""
    return f"""\
# Facts of the pool: every host of it has them. What Ray is told is what stands here.
{facts}
# Ray node labels, for placement.
# clusterkit_labels:
#   rack: a1

# The interface of the fabric, for NCCL, RCCL and Gloo between hosts.
# clusterkit_fabric_interface: eth1
"""


def _apps(request: Request) -> str:
    made = request.model_id is None
    if made and request.accelerator != "cpu":
        return _comment_out(_app(request, "my-model", {"folder": "/srv/models/My-Model"}), "clusterkit_apps: []\n")
    model = _model(request)
    return _app(request, model["model_id"], model["model_source"])


def _app(request: Request, model_id: str, source: dict[str, str]) -> str:
    gpus = request.accelerator != "cpu"
    shape = ""
    if gpus:
        shape = f"      accelerator_type: {one_line(request.gpu_model)}\n"
        shape += "      # GPUs of one host that one replica spans.\n      tensor_parallel: 1\n"
    about = (
        "Random weights, made on the hosts: the answers are real tokens and complete nonsense."
        if "make" in source
        else "Weights in Hugging Face's layout, at this path on every host (a shared mount is read in place)."
    )
    name = re.sub(r"[^a-z0-9]+", "-", model_id.lower()).strip("-")[:63].strip("-") or "model"
    engine = "      # Arguments of the vLLM engine, by the names of its Python API.\n"
    if "make" in source:
        engine += "      engine_kwargs:\n        max_model_len: 1024\n        max_num_seqs: 8\n"
    elif gpus:
        engine += "      engine_kwargs:\n        gpu_memory_utilization: 0.9\n        # max_model_len: 32768\n"
    else:
        engine += "      # engine_kwargs:\n      #   max_model_len: 32768\n"
    return f"""\
# What is served: one entry a model. The parameters stand in serve_apps/llm/README.md.
clusterkit_apps:
  - name: {name}
    template: llm
    route_prefix: /
    parameters:
      # The name that clients send.
      model_id: {one_line(model_id)}
      # {about}
      model_source: {one_line(source)}
{shape}      min_replicas: 1
      max_replicas: {max(1, len(request.workers)) * max(1, request.gpus)}
      # Requests that one replica works on at a time, before another replica is started.
      target_ongoing_requests: 16
{engine}"""


def _comment_out(text: str, instead: str) -> str:
    """An example, with what holds until it is put in its place."""
    first, *rest = text.splitlines()
    example = "\n".join(f"# {line}" for line in rest)
    return f"{first}\n# Nothing yet. Take the line below away, and this example in:\n{instead}\n{example}\n"


def _model(request: Request) -> dict[str, Any]:
    if request.model_id is None:
        return {"model_id": MADE_MODEL, "model_source": {"make": MADE_MODEL}}
    source = request.model_source or ""
    kind = "make" if source == MADE_MODEL else "folder"
    return {"model_id": request.model_id, "model_source": {kind: source}}
