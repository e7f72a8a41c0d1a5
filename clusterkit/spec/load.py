"""From what Ansible resolved to a `ClusterSpec`, or to every finding at once."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, Tag, ValidationError

from clusterkit.errors import ClusterkitError
from clusterkit.spec import checks, ingress, scaling
from clusterkit.spec.cluster import App, ClusterSpec, Code, Host, Model, Pool, Registry
from clusterkit.spec.facts import (
    SCOPES,
    AppFacts,
    ClusterFacts,
    Facts,
    HostFacts,
    PoolFacts,
    known_variables,
    scope_of,
)
from clusterkit.spec.findings import Finding, Place, did_you_mean, merge
from clusterkit.spec.raw import Path, RawInventory, RawValue
from clusterkit.spec.stacks import Stack, table
from serve_apps import template as templates

PREFIX = "clusterkit_"
HEAD_GROUP = "ray_head"
WORKER_GROUP = "ray_workers"
MANAGED_GROUP = "managed_hosts"
REGISTRY_GROUP = "registry"
BUILDER_GROUP = "image_builder"

T = TypeVar("T", bound=Facts)

_UNITS = {"_s": "a plain number of seconds", "_gib": "a plain number of GiB", "_mib": "a plain number of MiB"}


# Reads what an app imports; a ClusterkitError says what is wrong with it.
ReadCode = Callable[[templates.AppCode], Code]


def load(raw: RawInventory, read_code: ReadCode | None = None) -> tuple[ClusterSpec | None, list[Finding]]:
    """The spec, or None with all findings. Pure: no file, no network, no clock, but for what `read_code` reads;
    without it, apps are taken to have no code of their own."""
    return _Loader(raw, read_code).load()


class _Loader:
    def __init__(self, raw: RawInventory, read_code: ReadCode | None) -> None:
        self.raw = raw
        self.read_code = read_code
        self.findings: list[Finding] = []
        self.readers: dict[str, tuple[str, ...]] = {}
        self.secrets = raw.secrets

    def load(self) -> tuple[ClusterSpec | None, list[Finding]]:
        if not self.raw.hosts:
            return None, merge(self.raw.broken or checks.empty_inventory(self.raw))
        self.findings += self.raw.broken
        self.findings += checks.groups(self.raw)
        self.findings += checks.unresolved(self.raw)
        self.findings += checks.role_variables(self.raw)
        self._unknown_variables()
        facts, cluster_values = self._cluster()
        pools = self._pools()
        hosts = self._hosts(pools)
        registry = self._registry(facts, hosts or {})
        builders = self.raw.group(BUILDER_GROUP)
        self.findings += checks.image_builder(builders, self.raw)
        stack = self._stack(facts, pools, cluster_values)
        self.findings += checks.autoscaling(pools, hosts or {}, stack, self.raw)
        apps = self._apps(facts, pools, cluster_values)
        self.findings += checks.capacity(apps, pools, cluster_values.get("apps", RawValue()))
        if facts is not None:
            self.findings += checks.ports(facts, cluster_values.get("ports"))
            self.findings += ingress.findings(facts, stack, len(hosts or {}), cluster_values)
            self.findings += ingress.app_findings(facts, stack, apps, cluster_values.get("apps", RawValue()))
            self.findings += scaling.findings(stack, apps, pools, cluster_values.get("apps", RawValue()))
        found = merge(self._told(finding) for finding in self.findings)
        if found or facts is None or stack is None or hosts is None:
            return None, found
        head = self.raw.group(HEAD_GROUP)[0]
        spec = ClusterSpec(
            facts=facts,
            stack=stack,
            head=head,
            hosts=hosts,
            pools=pools,
            apps=tuple(app for _, app in apps),
            registry=registry,
            image_builder=builders[0] if builders else None,
        )
        return spec, []

    def _told(self, finding: Finding) -> Finding:
        """With the hosts that read the cluster's fact, and without any secret."""
        named = [word for word in re.findall(rf"{PREFIX}(\w+)", finding.subject) if word in self.readers]
        if named and not finding.hosts:
            finding = replace(finding, hosts=self.readers[named[0]])
        return finding.without(self.secrets)

    # --- variables -------------------------------------------------------------------------------

    def _unknown_variables(self) -> None:
        known = known_variables()
        for host, variables in self.raw.hosts.items():
            for name, value in variables.items():
                if name.startswith(PREFIX) and name not in known:
                    self.findings.append(
                        Finding(
                            value.place(),
                            name,
                            "no such variable",
                            did_you_mean(name, known) or "remove it; the known ones stand in docs/variables.md",
                            (host,),
                        )
                    )

    def _collect(self, scope: str, hosts: Iterable[str]) -> tuple[dict[str, RawValue], dict[str, tuple[str, ...]]]:
        """The values of one scope over `hosts`, and who reads each; a finding where hosts disagree."""
        values: dict[str, RawValue] = {}
        readers: dict[str, list[str]] = {}
        names = list(hosts)
        for host in names:
            for variable, value in self.raw.hosts.get(host, {}).items():
                field = variable.removeprefix(PREFIX)
                if not variable.startswith(PREFIX) or scope_of(field) != scope:
                    continue
                known = values.setdefault(field, value)
                if known.error is None and value.error is None and known.value != value.value:
                    self._disagreement(scope, variable, value, [host])
                else:
                    readers.setdefault(field, []).append(host)
        for field, having in readers.items():
            lacking = [host for host in names if PREFIX + field not in self.raw.hosts.get(host, {})]
            if lacking:
                self._disagreement(scope, PREFIX + field, values[field], having)
        return values, {field: tuple(having) for field, having in readers.items()}

    def _disagreement(self, scope: str, variable: str, value: RawValue, hosts: list[str]) -> None:
        home = "group_vars/all" if scope == "cluster" else "the pool's group_vars"
        problem = f"differs between hosts, and is a fact of the {scope}"
        self.findings.append(Finding(value.place(), variable, problem, f"set it once, in {home}", tuple(hosts)))

    def _validate(
        self,
        model: type[T],
        values: Mapping[str, RawValue],
        readers: Mapping[str, tuple[str, ...]],
        hosts: tuple[str, ...],
    ) -> T | None:
        """A model of the values that could be resolved; findings for what does not fit."""
        good = {name: value.value for name, value in values.items() if value.error is None}
        failed = {name for name, value in values.items() if value.error is not None}
        try:
            return model.model_validate(good)
        except ValidationError as error:
            for item in error.errors(include_url=False, include_input=False):
                field = str(item["loc"][0]) if item["loc"] else ""
                if field in failed:
                    continue
                self._model_finding(model, item, values.get(field, RawValue()), readers.get(field, hosts))
        return None

    def _model_finding(self, model: type[BaseModel], item: Any, value: RawValue, hosts: tuple[str, ...]) -> None:
        loc, owner = _user_path(model, item["loc"])
        subject = PREFIX + _dotted(loc)
        place = value.place(loc[1:])
        if item["type"] == "missing":
            parent = place if place.file else self._default_place()
            self.findings.append(Finding(parent, subject, "is missing", _missing_fix(owner, loc, subject), hosts))
            return
        problem, fix = _explain(owner, loc, item)
        self.findings.append(Finding(place, subject, problem, fix, hosts))

    def _default_place(self) -> Place:
        return Place(self.raw.sources[0]) if self.raw.sources else Place()

    # --- scopes ----------------------------------------------------------------------------------

    def _members(self) -> list[str]:
        seen = dict.fromkeys((*self.raw.group(HEAD_GROUP), *self.raw.group(WORKER_GROUP)))
        return list(seen) or list(self.raw.hosts)

    def _cluster(self) -> tuple[ClusterFacts | None, dict[str, RawValue]]:
        members = self._members()
        values, self.readers = self._collect("cluster", members)
        return self._validate(ClusterFacts, values, self.readers, tuple(members)), values

    def _pools(self) -> dict[str, Pool]:
        pools: dict[str, Pool] = {}
        for name in self.raw.children.get(WORKER_GROUP, ()):
            hosts = self.raw.group(name)
            if not hosts:
                self.findings.append(
                    Finding(self.raw.place_of(name), name, "the pool has no host", "add hosts, or remove the group")
                )
                continue
            values, readers = self._collect("pool", hosts)
            facts = self._validate(PoolFacts, values, readers, hosts)
            if facts is None:
                continue
            pools[name] = Pool(name=name, facts=facts, hosts=hosts)
            self.findings += checks.pool(pools[name], values, self.raw)
        return pools

    def _hosts(self, pools: Mapping[str, Pool]) -> dict[str, Host] | None:
        hosts: dict[str, Host] = {}
        pool_of = {host: pool for pool in self.raw.children.get(WORKER_GROUP, ()) for host in self.raw.group(pool)}
        complete = True
        for name in self._members():
            values, readers = self._collect("host", [name])
            facts = self._validate(HostFacts, values, readers, (name,))
            if facts is None:
                complete = False
                continue
            node_ip = facts.node_ip or self._ansible_ip(name)
            if node_ip is None:
                complete = False
                self._no_address(name, "Ray's address")
                continue
            hosts[name] = Host(
                name=name,
                node_ip=node_ip,
                head=name in self.raw.group(HEAD_GROUP),
                pool=pool_of.get(name),
                managed=name in self.raw.group(MANAGED_GROUP),
                facts=facts,
            )
        self.findings += checks.addresses(hosts, self.raw)
        return hosts if complete else None

    def _registry(self, facts: ClusterFacts | None, hosts: Mapping[str, Host]) -> Registry | None:
        """The host of the group `registry`; it may be one of the cluster's, or another one."""
        members = self.raw.group(REGISTRY_GROUP)
        if not members:
            return None
        name = members[0]
        # Options of its role, but where it is reached is everybody's business. Their types are checked with the roles'.
        said = {
            option: value.value
            for option in ("port", "tls", "proxy_remote_url")
            if (value := self.raw.hosts.get(name, {}).get(f"registry_{option}")) is not None and value.value is not None
        }
        self.findings += checks.registry(facts, members, said, self.raw)
        node_ip = hosts[name].node_ip if name in hosts else self._own_ip(name)
        if node_ip is None:
            self._no_address(name, "the registry's address")
            return None
        try:
            proxy = bool(said.pop("proxy_remote_url", ""))
            return Registry(host=name, node_ip=node_ip, proxy=proxy, **said)
        except ValidationError:
            return None  # reported with the role's options

    def _own_ip(self, host: str) -> str | None:
        """The address of a host that is not in the cluster."""
        values, readers = self._collect("host", [host])
        facts = self._validate(HostFacts, values, readers, (host,))
        return facts.node_ip or self._ansible_ip(host) if facts is not None else None

    def _no_address(self, host: str, what: str) -> None:
        self.findings.append(
            Finding(
                self.raw.place_of(host),
                "clusterkit_node_ip",
                f"{what} of this host is not known, and `ansible_host` is no IP address",
                "set clusterkit_node_ip to the host's address on the management network",
                (host,),
            )
        )

    def _ansible_ip(self, host: str) -> str | None:
        value = self.raw.hosts.get(host, {}).get("ansible_host")
        for candidate in (value.value if value else None, host):
            try:
                return str(ipaddress.ip_address(str(candidate)))
            except ValueError:
                continue
        return None

    def _stack(
        self, facts: ClusterFacts | None, pools: Mapping[str, Pool], values: Mapping[str, RawValue]
    ) -> Stack | None:
        """The row, with the site's overrides in it; findings where they do not go together."""
        name = values.get("stack")
        if name is None or name.error is not None or not isinstance(name.value, str):
            return None
        row = table().get(name.value)
        if row is None:
            fix = did_you_mean(name.value, table().names()) or f"one of {', '.join(table().names())}"
            self.findings.append(Finding(name.place(), "clusterkit_stack", f"no row {name.value!r}", fix))
            return None
        self.findings += checks.stack_fits_pools(row, pools, name.place())
        changes: dict[str, Any] = {}
        place = name.place()
        for field, key in (("ray", "ray_version"), ("vllm", "vllm_version")):
            value = values.get(key)
            if value is not None and isinstance(value.value, str):
                changes[field] = value.value
                place = value.place()
        driver = values.get("driver_version")
        if driver is not None and isinstance(driver.value, str):
            if row.driver is None:
                fix = "take it out, or choose a row of the version table that is made for GPUs"
                problem_there = f"the row {row.name!r} has no driver"
                self.findings.append(Finding(driver.place(), "clusterkit_driver_version", problem_there, fix))
            else:
                changes["driver"] = row.driver.model_copy(update={"version": driver.value})
        stack = row.model_copy(update=changes)
        problem = table().pair_problem(stack.ray, stack.vllm)
        if problem is not None:
            works = ", ".join(f"Ray {ray} with vLLM {vllm}" for ray, vllm in table().pairs())
            self.findings.append(
                Finding(
                    place,
                    "clusterkit_ray_version, clusterkit_vllm_version",
                    f"Ray {stack.ray} and vLLM {stack.vllm} do not go together: {problem}",
                    f"use a pair that does: {works}",
                )
            )
        if facts is not None and stack.engine is None and facts.runtime == "venv":
            self.findings.append(
                Finding(
                    name.place(),
                    "clusterkit_stack",
                    f"the row {row.name!r} has no wheels for the venv runtime",
                    f"use a row that has: {', '.join(r.name for r in table().rows if r.engine)}",
                )
            )
        if facts is not None and facts.runtime == "container":
            self.findings += checks.container_runtime(facts, stack, self.raw, values)
        return _with_overrides(stack, row)

    # --- apps ------------------------------------------------------------------------------------

    def _apps(
        self, facts: ClusterFacts | None, pools: Mapping[str, Pool], values: Mapping[str, RawValue]
    ) -> list[tuple[int, App]]:
        """The apps that hold, each with its index. Reads the raw list, so one bad app hides no other."""
        value = values.get("apps")
        if value is None or value.error is not None or not isinstance(value.value, list):
            return []
        self.findings += checks.removed_serve_options(value)
        models_root = facts.paths.models if facts is not None else "/"
        apps: list[tuple[int, App]] = []
        named: list[tuple[int, AppFacts]] = []
        for index, entry in enumerate(value.value):
            try:
                app = AppFacts.model_validate(entry)
            except ValidationError:
                continue  # the cluster model has reported it
            named.append((index, app))
            try:
                template = templates.load(app.template)
            except KeyError:
                known = templates.names()
                self.findings.append(
                    Finding(
                        value.place((index, "template")),
                        f"clusterkit_apps[{index}].template",
                        f"no template {app.template!r}",
                        did_you_mean(app.template, known) or f"one of {', '.join(known)}",
                    )
                )
                continue
            parameters = self._parameters(template, index, app, value)
            pool = self._app_pool(index, app, pools, value)
            if parameters is None or pool is None:
                continue
            sources = template.model_sources(parameters)
            models = {role: _model(source, models_root) for role, source in sources.items()}
            code = self._code(template.code(parameters), index, value)
            policies = self._code(scaling.CODE, index, value) if scaling.takes_policies(app, parameters) else None
            whole = App(
                facts=app,
                pool=pool,
                parameters=parameters,
                template=template,
                models=models,
                code=code,
                policies=policies,
            )
            apps.append((index, whole))
        self.findings += checks.unique_apps(named, value)
        return apps

    def _code(self, wanted: templates.AppCode | None, index: int, value: RawValue) -> Code | None:
        if wanted is None or self.read_code is None:
            return None
        try:
            return self.read_code(wanted)
        except ClusterkitError as error:
            path: Path = (index, "parameters", wanted.parameter) if wanted.parameter else (index, "template")
            subject = PREFIX + _dotted(("apps", *path))
            self.findings.append(Finding(value.place(path), subject, error.message, error.hint or "correct the value"))
        return None

    def _parameters(self, template: templates.Template, index: int, app: AppFacts, value: RawValue) -> BaseModel | None:
        try:
            return template.parameters.model_validate(app.parameters)
        except ValidationError as error:
            for item in error.errors(include_url=False, include_input=False):
                if checks.is_removed_option(item["loc"]):
                    continue  # reported by name, with today's
                path, owner = _user_path(template.parameters, item["loc"])
                whole: Path = (index, "parameters", *path)
                subject = PREFIX + _dotted(("apps", *whole))
                if item["type"] == "missing":
                    fix = f"set it; see serve_apps/{template.name}/README.md"
                    self.findings.append(Finding(value.place(whole), subject, "is missing", fix))
                    continue
                problem, fix = _explain(owner, path, item)
                self.findings.append(Finding(value.place(whole), subject, problem, fix))
        return None

    def _app_pool(self, index: int, app: AppFacts, pools: Mapping[str, Pool], value: RawValue) -> str | None:
        if app.pool is None:
            if len(pools) == 1:
                return next(iter(pools))
            if pools:
                self.findings.append(
                    Finding(
                        value.place((index,)),
                        f"clusterkit_apps[{index}].pool",
                        "several pools, and the app names none",
                        f"set pool: to one of {', '.join(pools)}",
                    )
                )
            return None
        if app.pool not in self.raw.children.get(WORKER_GROUP, ()):
            known = list(pools)
            self.findings.append(
                Finding(
                    value.place((index, "pool")),
                    f"clusterkit_apps[{index}].pool",
                    f"no pool {app.pool!r}",
                    did_you_mean(app.pool, known) or f"one of {', '.join(known)}",
                )
            )
            return None
        return app.pool if app.pool in pools else None


def _with_overrides(stack: Stack, row: Stack) -> Stack:
    """The engine's requirements follow an overridden version."""
    if row.engine is None or (stack.ray, stack.vllm) == (row.ray, row.vllm):
        return stack
    swapped = tuple(
        requirement.replace(f"=={row.ray}", f"=={stack.ray}")
        if requirement.startswith("ray")
        else requirement.replace(f"=={row.vllm}", f"=={stack.vllm}")
        for requirement in row.engine.requirements
    )
    changes: dict[str, Any] = {"requirements": swapped}
    if row.engine.provides_vllm is not None:
        changes["provides_vllm"] = row.engine.provides_vllm.replace(row.vllm, stack.vllm)
    return stack.model_copy(update={"engine": row.engine.model_copy(update=changes)})


def _model(source: Mapping[str, Any], root: str) -> Model:
    if "folder" in source:
        return Model(**source, path=source["folder"])
    return Model(**source, path=f"{root}/{_slug(_model_name(source))}")


def _model_name(source: Mapping[str, Any]) -> str:
    """What tells one made or fetched folder from another; what is in it never changes under its name, so that
    Serve sees a new model where there is one."""
    if "make" in source:
        return str(source["id"])
    revision = str(source["revision"])
    name = f"{source['hub']}--{revision[:12] if re.fullmatch('[0-9a-f]{40}', revision) else revision}"
    chosen = [list(source["allow_patterns"]), list(source["ignore_patterns"])]
    return f"{name}--{hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:8]}" if any(chosen) else name


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name)


def _user_path(model: type[BaseModel], loc: Iterable[str | int]) -> tuple[Path, type[BaseModel] | None]:
    """The path as a user writes it, and the model that owns its last key.

    pydantic names the chosen member of a union inside the path; in the inventory there is no such key.
    """
    parts = list(loc)
    while len(parts) > 1 and parts[-1] in {"int", "float", "str", "bool"}:
        parts.pop()
    path: list[str | int] = []
    owner: type[BaseModel] | None = model
    inner: type[BaseModel] | None = model
    members: dict[str, type[BaseModel]] = {}
    for part in parts:
        if part in members:
            inner = members[str(part)]
        elif isinstance(part, int):
            path.append(part)
        else:
            path.append(part)
            owner = inner
            field = owner.model_fields.get(part) if owner is not None else None
            inner = _inner_model(field.annotation) if field is not None else None
            members = _members(field.annotation) if field is not None else {}
            continue
        members = {}
    return tuple(path), owner


def _members(annotation: Any) -> dict[str, type[BaseModel]]:
    """The members of a tagged union by their tags."""
    found: dict[str, type[BaseModel]] = {}
    for member in get_args(annotation):
        for mark in getattr(member, "__metadata__", ()):
            if isinstance(mark, Tag):
                found[mark.tag] = get_args(member)[0]
    return found


def _dotted(loc: Path) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _inner_model(inner)
        if found is not None:
            return found
    return None


def _missing_fix(owner: type[BaseModel] | None, loc: Path, subject: str) -> str:
    field = owner.model_fields.get(str(loc[-1])) if owner is not None else None
    what = f" ({field.description})" if field is not None and field.description else ""
    return f"set {subject}{what}"


def _explain(owner: type[BaseModel] | None, loc: Path, item: Any) -> tuple[str, str]:
    """Problem and fix of one pydantic error, in words; never the value itself."""
    leaf = next((str(part) for part in reversed(loc) if isinstance(part, str)), "")
    kind = item["type"]
    if kind == "extra_forbidden":
        known = sorted(owner.model_fields) if owner is not None else []
        return "no such key", did_you_mean(leaf, known) or f"one of {', '.join(known)}"
    for suffix, unit in _UNITS.items():
        if leaf.endswith(suffix) and kind.split("_")[0] in {"int", "float"}:
            return f"must be {unit}, without a unit", "write the number alone, such as 30"
    if kind == "literal_error":
        return "is not one of the known values", f"one of {item['ctx']['expected']}"
    if kind == "string_pattern_mismatch":
        return "has characters that are not allowed", f"must match {item['ctx']['pattern']}"
    if kind.split("_")[0] in {"int", "float"} and kind.endswith(("_type", "_parsing", "_from_float")):
        return "must be a number", "write the number alone, without quotes or a unit"
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    message = re.sub(r" or instance of \w+", "", message)
    if kind.endswith("_type"):
        return message, f"give {_type_name(kind)}"
    return message, "correct the value"


def _type_name(kind: str) -> str:
    names = {
        "int": "a whole number, without quotes",
        "float": "a number, without quotes",
        "bool": "true or false",
        "string": "a text in quotes",
        "dict": "a mapping",
        "list": "a list",
        "model": "a mapping",
    }
    return names.get(kind.split("_")[0], "a value that fits")


__all__ = ["HEAD_GROUP", "MANAGED_GROUP", "PREFIX", "SCOPES", "WORKER_GROUP", "load"]
