"""Checks that need more than one value: groups, pools, capacity, routes, removed names."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clusterkit.spec import ingress
from clusterkit.spec.facts import AppFacts, ClusterFacts
from clusterkit.spec.findings import Finding, Place, did_you_mean
from clusterkit.spec.raw import Path, RawInventory, RawValue
from clusterkit.spec.stacks import Stack, table

if TYPE_CHECKING:
    from clusterkit.spec.cluster import App, Host, Pool
    from serve_apps.template import ReplicaDemand

# Serve took these names away; it ignores or refuses them, depending on where they stand.
REMOVED_SERVE_OPTIONS = {
    "target_num_ongoing_requests_per_replica": "target_ongoing_requests",
    "max_concurrent_queries": "max_ongoing_requests",
}

TOLERANCE = 1e-9

# Ansible's names for the password that ssh logs in with.
LOGIN_PASSWORDS = ("ansible_password", "ansible_ssh_pass", "ansible_ssh_password")

# Where the autoscaler's tests pass.
AUTOSCALED_RAY = ("2.60.0",)


def container_runtime(
    facts: ClusterFacts, stack: Stack, raw: RawInventory, values: Mapping[str, RawValue]
) -> Iterator[Finding]:
    """Containers need root on every host, and an image that can be built or pulled."""
    place = values.get("runtime", RawValue()).place()
    managed = raw.group("managed_hosts")
    without = tuple(host for host in (*raw.group("ray_head"), *raw.group("ray_workers")) if host not in managed)
    if without:
        yield Finding(
            place,
            "clusterkit_runtime",
            "containers need root, and root work is done on managed_hosts only",
            "put the hosts into the group managed_hosts, or set clusterkit_runtime: venv",
            tuple(dict.fromkeys(without)),
        )
    if stack.image is None and facts.image is None:
        built = ", ".join(row.name for row in table().rows if row.image)
        yield Finding(
            place,
            "clusterkit_image",
            f"this release has no recipe for an image of the row {stack.name!r}",
            f"name an image that the hosts pull, set clusterkit_runtime: venv, or use a row that has one: {built}",
        )
    elif facts.image is None and facts.image_base is None and stack.image is not None and stack.image.from_source:
        yield from _unpinned_base(stack, place)
    if facts.image is not None and ":" not in facts.image.rpartition("/")[2]:
        yield Finding(
            values.get("image", RawValue()).place(),
            "clusterkit_image",
            "names no version of the image: what it means would change with every pull",
            "name a tag, or better a digest: registry.example/vllm@sha256:...",
        )


def _unpinned_base(stack: Stack, place: Place) -> Iterator[Finding]:
    """A base without a digest would be another image with every build."""
    if stack.base_image and stack.base_image_digest:
        return
    name = stack.base_image or "NAME"
    problem = f"{stack.base_image} has no digest in the version table"
    if not stack.base_image:
        problem = f"the row {stack.name!r} names no image to build the engine's on"
    yield Finding(
        place,
        "clusterkit_image_base",
        problem,
        f"find it: docker pull {name} && docker image inspect --format '{{{{index .RepoDigests 0}}}}' {name}; then set "
        "clusterkit_image_base: name@sha256:… (or clusterkit_image to an image that the hosts pull)",
    )


def empty_inventory(raw: RawInventory) -> list[Finding]:
    """There is no host, and no file that says why."""
    source = raw.sources[0] if raw.sources else ""
    fix = "add hosts to ray_head and ray_workers, or name another with -i"
    if source:
        fix += f"; what Ansible makes of it: ansible-inventory -i {source} --graph"
    return [Finding(Place(source), "inventory", "no host in it", fix)]


def groups(raw: RawInventory) -> list[Finding]:
    """One head; every worker in exactly one pool."""
    findings = []
    heads = raw.group("ray_head")
    if not heads:
        findings.append(
            Finding(raw.place_of("ray_head"), "ray_head", "no head", "put exactly one host into the group ray_head")
        )
    elif len(heads) > 1:
        findings.append(
            Finding(
                raw.place_of("ray_head"),
                "ray_head",
                f"{len(heads)} heads: {', '.join(heads)}",
                "leave one host in the group; Ray has one head",
                heads,
            )
        )
    if not raw.group("ray_workers"):
        findings.append(
            Finding(
                raw.place_of("ray_workers"),
                "ray_workers",
                "no worker",
                "make a pool: a child group of ray_workers with at least one host",
            )
        )
    pools = raw.children.get("ray_workers", ())
    pooled = Counter(host for pool in pools for host in raw.group(pool))
    for host, count in pooled.items():
        if count > 1:
            among = ", ".join(pool for pool in pools if host in raw.group(pool))
            findings.append(
                Finding(raw.place_of(host), host, f"is in {count} pools: {among}", "leave it in one", (host,))
            )
    for host in raw.group("ray_workers"):
        if host not in pooled:
            findings.append(
                Finding(
                    raw.place_of(host),
                    host,
                    "is in ray_workers, but in no pool",
                    "put it into a child group of ray_workers",
                    (host,),
                )
            )
    return findings


def registry(
    facts: ClusterFacts | None, members: Sequence[str], said: Mapping[str, Any], raw: RawInventory
) -> Iterator[Finding]:
    """One host that root work is done on; a pull-through cache alone is no place to push to.

    `said`: what the first host's variables say of `port`, `tls` and `proxy_remote_url`.
    """
    place = raw.place_of("registry")
    if len(members) > 1:
        fix = "leave one host in the group; more of them are the site's own business (clusterkit_image_registry)"
        yield Finding(place, "registry", f"{len(members)} registries: {', '.join(members)}", fix, tuple(members))
    host = members[0]
    if host not in raw.group("managed_hosts"):
        problem = "the registry needs root, and root work is done on managed_hosts only"
        yield Finding(raw.place_of(host), "registry", problem, "put the host into the group managed_hosts", (host,))
    remote = raw.hosts.get(host, {}).get("registry_proxy_remote_url", RawValue())
    if not said.get("proxy_remote_url") or facts is None or facts.runtime != "container":
        return
    if facts.image is None and facts.image_registry is None:
        yield Finding(
            remote.place(),
            "registry_proxy_remote_url",
            "a pull-through cache cannot be pushed to, and the image that the kit builds has no other registry",
            "take it out, or set clusterkit_image_registry to the registry behind it, or clusterkit_image to an image",
            (host,),
        )


def image_builder(members: Sequence[str], raw: RawInventory) -> Iterator[Finding]:
    """One host, which is logged in to by key: a tunnel to its Docker asks nobody for a password."""
    if len(members) > 1:
        problem = f"{len(members)} builders: {', '.join(members)}"
        fix = "leave one host in the group; the image is built once"
        yield Finding(raw.place_of("image_builder"), "image_builder", problem, fix, tuple(members))
    for host in members[:1]:
        variables = raw.hosts.get(host, {})
        if variables.get("ansible_connection", RawValue()).value == "local":
            continue
        for name in LOGIN_PASSWORDS:
            # Whether there is one is all that is asked.
            if name in variables:
                problem = "the image is built through a tunnel of ssh, which logs in by key and takes no password"
                fix = "let a key in there (ansible_ssh_private_key_file), and take the password off this host"
                yield Finding(variables[name].place(), name, problem, fix, (host,))


def unresolved(raw: RawInventory) -> list[Finding]:
    """Values that Ansible could not give: undefined, or not to be decrypted. Ours only: many a site's own
    variable has a value inside one task and nowhere else."""
    ours = ("clusterkit_", "ansible_host", *(f"{role}_" for role in raw.role_options))
    findings = []
    for host, variables in raw.hosts.items():
        for name, value in variables.items():
            if value.error is None or not name.startswith(ours):
                continue
            if value.undecryptable:
                problem = "cannot be decrypted"
                fix = "give the vault password with --ask-vault-pass or --vault-id, or encrypt the value anew"
            else:
                problem = f"has no value: {value.error}"
                fix = "define what it refers to, or set it directly"
            findings.append(Finding(value.place(), name, problem, fix, (host,)))
    return findings


def role_variables(raw: RawInventory) -> list[Finding]:
    """`<role>_*` names and types against the roles' argument_specs."""
    known = sorted(name for options in raw.role_options.values() for name in options)
    findings = []
    for host, variables in raw.hosts.items():
        for name, value in variables.items():
            if name.startswith("clusterkit_") or name in known:
                continue
            owner = next((role for role in raw.role_options if name.startswith(f"{role}_")), None)
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if owner is None and not near:
                continue
            fix = did_you_mean(name, known) or f"the options of the role stand in roles/{owner}/README.md"
            findings.append(Finding(value.place(), name, "no such role variable", fix, (host,)))
        for role, options in raw.role_options.items():
            for name, option in options.items():
                value_or_none = variables.get(name)
                if value_or_none is None or value_or_none.error is not None:
                    continue
                problem = _role_type_problem(value_or_none.value, option)
                if problem:
                    findings.append(
                        Finding(
                            value_or_none.place(),
                            name,
                            problem,
                            f"see roles/{role}/README.md",
                            (host,),
                        )
                    )
    return findings


_ROLE_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "path": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}


def _role_type_problem(value: Any, option: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    wanted = str(option.get("type", "str"))
    types = _ROLE_TYPES.get(wanted)
    wrong_bool = isinstance(value, bool) and wanted in {"int", "float"}
    if types is not None and (not isinstance(value, types) or wrong_bool):
        return f"must be of type {wanted}"
    choices = option.get("choices")
    if choices and value not in choices:
        return f"must be one of {', '.join(str(choice) for choice in choices)}"
    return None


def pool(pool: Pool, values: Mapping[str, RawValue], raw: RawInventory) -> list[Finding]:
    """The numbers of one pool against its hosts."""
    findings = []
    scaling = pool.facts.pool
    place = values.get("pool", RawValue()).place
    home = raw.place_of(pool.name)
    if scaling.max is not None and scaling.max > len(pool.hosts):
        findings.append(
            Finding(
                place(("max",)),
                "clusterkit_pool.max",
                f"is {scaling.max}, and the pool {pool.name} has {len(pool.hosts)} hosts",
                f"lower it to {len(pool.hosts)}, or add hosts",
                pool.hosts,
            )
        )
    if scaling.min > pool.max:
        findings.append(
            Finding(
                place(("min",)),
                "clusterkit_pool.min",
                f"is {scaling.min}, above max ({pool.max})",
                "lower min or raise max",
                pool.hosts,
            )
        )
    if pool.facts.accelerator != "cpu" and pool.facts.gpus == 0:
        findings.append(
            Finding(
                values["gpus"].place() if "gpus" in values else home,
                "clusterkit_gpus",
                f"a {pool.facts.accelerator} pool without GPUs",
                "set clusterkit_gpus to the GPUs of each host",
                pool.hosts,
            )
        )
    if pool.facts.accelerator == "cpu" and pool.facts.gpus:
        findings.append(
            Finding(
                values["gpus"].place(),
                "clusterkit_gpus",
                "a cpu pool has no GPUs",
                "remove it, or set clusterkit_accelerator to rocm or cuda",
                pool.hosts,
            )
        )
    return findings


def autoscaling(
    pools: Mapping[str, Pool], hosts: Mapping[str, Host], stack: Stack | None, raw: RawInventory
) -> Iterator[Finding]:
    """What a pool needs before its hosts may come and go by themselves."""
    scaled = [pool for pool in pools.values() if pool.facts.pool.mode == "autoscaled"]
    for pool in scaled:
        value = raw.hosts.get(pool.hosts[0], {}).get("clusterkit_pool", RawValue())
        for key, problem, fix in _unscalable(pool, pools, hosts, stack, raw):
            yield Finding(value.place((key,)), f"clusterkit_pool.{key}", problem, fix, pool.hosts)


def _unscalable(
    pool: Pool, pools: Mapping[str, Pool], hosts: Mapping[str, Host], stack: Stack | None, raw: RawInventory
) -> Iterator[tuple[str, str, str]]:
    """(key of clusterkit_pool, problem, fix)"""
    scaling, managed = pool.facts.pool, raw.group("managed_hosts")
    if stack is not None and stack.ray not in AUTOSCALED_RAY:
        rows = [r.name for r in table().rows if r.ray in AUTOSCALED_RAY and r.accelerator == pool.facts.accelerator]
        problem = f"autoscaled pools were not tried with Ray {stack.ray}, only with {', '.join(AUTOSCALED_RAY)}"
        yield "mode", problem, f"set mode: fixed, or use a row that can: {', '.join(rows)}"
    fixed = sorted(other.name for other in pools.values() if other.facts.pool.mode == "fixed")
    if fixed:
        problem = f"the pool {fixed[0]} is fixed, and Ray's autoscaler would end its nodes when they are idle"
        yield "mode", problem, "make all pools autoscaled (min keeps hosts running), or all fixed"
    if any(hosts[name].head for name in pool.hosts if name in hosts):
        problem = "the head is in this pool, and it cannot come and go: Ray and its autoscaler end with it"
        yield "mode", problem, "take it out (it needs no GPU), or set mode: fixed"
    unmanaged = sorted({*pool.hosts, *raw.group("ray_head")} - set(managed))
    if unmanaged:
        problem = f"{', '.join(unmanaged)}: not in managed_hosts, and only root starts hosts and their nodes"
        yield "mode", problem, "put the head and all hosts of the pool there"
    if pool.facts.cpus is None:
        problem = "Ray has to know what a host offers before it is there, and its CPUs are not declared"
        yield "mode", problem, "set clusterkit_cpus for the pool"
    if scaling.warm > len(pool.hosts):
        yield "warm", f"is {scaling.warm}, and the pool has {len(pool.hosts)} hosts", f"lower it to {len(pool.hosts)}"
    switched = any(hosts[name].facts.power.kind != "none" for name in pool.hosts if name in hosts)
    if scaling.idle_off_s is not None and not switched:
        problem = "no host of the pool can be switched on again"
        yield "idle_off_s", problem, "set clusterkit_power for its hosts, or take idle_off_s out"


def addresses(hosts: Mapping[str, Host], raw: RawInventory) -> list[Finding]:
    """Two hosts on one address: Ray would take them for one."""
    seen: dict[str, str] = {}
    findings = []
    for host in hosts.values():
        other = seen.setdefault(host.node_ip, host.name)
        if other != host.name:
            findings.append(
                Finding(
                    raw.place_of(host.name),
                    "clusterkit_node_ip",
                    f"{host.node_ip} is the address of {other} too",
                    "give each host its own",
                    (host.name,),
                )
            )
    return findings


def stack_fits_pools(row: Stack, pools: Mapping[str, Pool], place: Place) -> list[Finding]:
    findings = []
    for item in pools.values():
        if item.facts.accelerator != row.accelerator:
            rows = [other.name for other in table().rows if other.accelerator == item.facts.accelerator]
            findings.append(
                Finding(
                    place,
                    "clusterkit_stack",
                    f"{row.name!r} is made for {row.accelerator}, and the pool {item.name} is {item.facts.accelerator}",
                    f"use {' or '.join(rows)}",
                    item.hosts,
                )
            )
    return findings


def ports(facts: ClusterFacts, value: RawValue | None) -> list[Finding]:
    """Two services on one port, or one inside a range: Ray refuses to start, or a replica later on."""
    known = {**ingress.ray_ports(facts), **ingress.ports(facts)}
    place = (value or RawValue()).place
    ranges = {
        kind: (known.pop(f"{kind}_min"), known.pop(f"{kind}_max"))
        for kind in ("worker", "replica")
        if f"{kind}_min" in known
    }
    findings = []
    for kind, (low, high) in ranges.items():
        if high - low < 100:
            problem = f"leaves fewer than 100 {kind} ports"
            findings.append(Finding(place((f"{kind}_max",)), f"clusterkit_ports.{kind}_max", problem, "raise it"))
    if len(ranges) > 1 and max(low for low, _ in ranges.values()) <= min(high for _, high in ranges.values()):
        problem = "{}-{} overlaps the workers' range {}-{}".format(*ranges["replica"], *ranges["worker"])
        findings.append(Finding(place(("replica_min",)), "clusterkit_ports.replica_min", problem, "move one of them"))
    taken: dict[int, str] = {}
    for name, port in known.items():
        other = taken.setdefault(port, name)
        if other != name:
            findings.append(
                Finding(place((name,)), f"clusterkit_ports.{name}", f"{port} is {other}'s port too", "choose another")
            )
        for kind, (low, high) in ranges.items():
            if low <= port <= high:
                findings.append(
                    Finding(
                        place((name,)),
                        f"clusterkit_ports.{name}",
                        f"{port} lies in the {kind}s' range {low}-{high}",
                        f"choose one outside, or move {kind}_min and {kind}_max",
                    )
                )
    return findings


def is_removed_option(loc: Sequence[str | int]) -> bool:
    return any(part in REMOVED_SERVE_OPTIONS for part in loc)


def removed_serve_options(apps: RawValue) -> list[Finding]:
    """Names that Serve took away, wherever they stand in an app."""
    findings = []
    for path in _keys(apps.value):
        name = path[-1]
        if name in REMOVED_SERVE_OPTIONS:
            findings.append(
                Finding(
                    apps.place(path),
                    f"clusterkit_apps[{path[0]}] {name}",
                    "Ray Serve has removed this option",
                    f"write {REMOVED_SERVE_OPTIONS[str(name)]} instead",
                )
            )
    return findings


def _keys(value: Any, path: Path = ()) -> Iterator[Path]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from _keys(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _keys(inner, (*path, index))


def unique_apps(apps: Sequence[tuple[int, AppFacts]], value: RawValue) -> list[Finding]:
    """Serve refuses two apps of one name or on one route."""
    findings = []
    names: dict[str, int] = {}
    routes: dict[str, str] = {}
    for index, app in apps:
        first = names.setdefault(app.name, index)
        if first != index:
            findings.append(
                Finding(
                    value.place((index, "name")),
                    f"clusterkit_apps[{index}].name",
                    f"{app.name!r} is the name of clusterkit_apps[{first}] too",
                    "give each app its own name",
                )
            )
        other = routes.setdefault(app.route_prefix, app.name)
        if other != app.name or first != index:
            findings.append(
                Finding(
                    value.place((index, "route_prefix")),
                    f"clusterkit_apps[{index}].route_prefix",
                    f"{app.route_prefix!r} is the route of {other!r} too",
                    f"give each app its own, such as /{app.name}",
                )
            )
    return findings


def capacity(apps: Sequence[tuple[int, App]], pools: Mapping[str, Pool], value: RawValue) -> list[Finding]:
    """Does each app fit a host and its pool, and do the GPUs' memory shares add up?"""
    findings: list[Finding] = []
    asked: dict[str, list[tuple[str, ReplicaDemand]]] = {}
    cpus: Counter[str] = Counter()
    for index, app in apps:
        home = pools[app.pool]
        demands = app.template.demands(app.parameters, home.facts.gpu_memory_gib)
        cpus[app.pool] += sum(demand.minimum_cpus for demand in demands)  # type: ignore[assignment]
        on_gpus = [demand for demand in demands if demand.gpus]
        if home.facts.accelerator == "cpu" or not on_gpus:
            continue
        place = value.place((index, "parameters"))
        subject = f"clusterkit_apps[{index}] {app.name}"
        found = _gpu_memory(index, on_gpus, home, value) or _gpus(on_gpus, home, place, subject)
        findings += found
        if not found:
            asked.setdefault(app.pool, []).extend((app.name, demand) for demand in on_gpus)
        for demand in on_gpus:
            if demand.memory_fraction is not None and demand.gpus < 1:
                findings += _memory_budget(demand.gpus, demand.memory_fraction, place, subject)
            elif demand.memory_fraction is not None and demand.memory_fraction > 1:
                problem = "asks for more than the whole memory of a GPU"
                findings.append(Finding(place, subject, problem, "lower gpu_memory_utilization"))
    for name, together in asked.items():
        total = pools[name].facts.gpus * pools[name].max
        lots = [(f"{owner} {demand.parameter}".strip(), demand, demand.min_replicas) for owner, demand in together]
        needed, parts = _needed(lots)
        if needed > total + TOLERANCE:
            findings.append(
                Finding(
                    value.place(),
                    "clusterkit_apps",
                    f"together the apps of {name} need {needed:g} GPUs at min_replicas, and it has {total}{parts}",
                    "lower min_replicas, or add hosts",
                )
            )
    for name, wanted in cpus.items():
        # What the inventory leaves open is all of a host, and nobody knows yet how much that is.
        offered = (pools[name].facts.cpus or wanted) * pools[name].max
        if wanted > offered + TOLERANCE:
            findings.append(
                Finding(
                    value.place(),
                    "clusterkit_apps",
                    f"together the apps of {name} need {wanted:g} CPUs at min_replicas, ingress included, "
                    f"and it offers {offered}",
                    "lower min_replicas or cpus_per_replica, raise clusterkit_cpus, or add hosts",
                )
            )
    return findings


def _gpus(demands: Sequence[ReplicaDemand], home: Pool, place: Place, subject: str) -> list[Finding]:
    """Do the replicas of one app fit the hosts of its pool, and all of them the pool?"""
    largest = max(demand.gpus_per_host for demand in demands)
    if largest > home.facts.gpus:
        problem = f"one replica needs {largest:g} GPUs on one host, and a host of {home.name} has {home.facts.gpus}"
        return [Finding(place, subject, problem, "lower tensor_parallel, or choose a pool with larger hosts")]
    total = home.facts.gpus * home.max
    needed, parts = _needed([(demand.parameter, demand, demand.max_replicas) for demand in demands])
    if needed <= total + TOLERANCE:
        return []
    fitting = int(total // demands[0].gpus) if len(demands) == 1 else 0
    fix = f"lower max_replicas to {fitting}, or add hosts" if fitting else "use fewer GPUs, or add hosts"
    if parts:
        fix = "lower gpu_memory_gib or max_replicas, or add hosts"
    problem = f"at max_replicas it needs {needed:g} GPUs, and the pool {home.name} has {total}{parts}"
    return [Finding(place, subject, problem, fix)]


def _gpu_memory(index: int, demands: Sequence[ReplicaDemand], home: Pool, value: RawValue) -> list[Finding]:
    """Does one GPU have what a single replica asks of its memory?"""
    findings, card = [], home.facts.gpu_memory_gib
    for demand in demands:
        asked = demand.gpu_memory_gib
        if asked is None or (card is not None and asked <= card):
            continue
        path = (index, "parameters", demand.parameter, "gpu_memory_gib")
        if card is None:
            problem = f"is a share of a GPU, and nothing says what memory those of the pool {home.name} have"
            fix = "set clusterkit_gpu_memory_gib for the pool"
        else:
            problem = f"is {asked:g}, and a GPU of the pool {home.name} has {card:g} GiB"
            fix = "lower it; a model that needs several GPUs is one for the template llm"
        subject = f"clusterkit_apps[{index}].parameters.{demand.parameter}.gpu_memory_gib"
        findings.append(Finding(value.place(path), subject, problem, fix))
    return findings


def _needed(lots: Sequence[tuple[str, ReplicaDemand, int]]) -> tuple[float, str]:
    """The GPUs that so many replicas of each need, and, where some go by memory, what adds up to that: no replica lies
    on two GPUs with parts of its share, so that three of 0.6 need three GPUs. The largest are placed first, each where
    there still is room."""
    if all(demand.gpu_memory_gib is None for _, demand, _ in lots):
        return sum(demand.gpus * count for _, demand, count in lots), ""
    whole = sum(demand.gpus * count for _, demand, count in lots if demand.gpus >= 1)
    shares = sorted((d.gpus for _, d, count in lots for _ in range(count) if d.gpus < 1), reverse=True)
    rooms: list[float] = []
    for share in shares:
        number = next((number for number, room in enumerate(rooms) if share <= room + TOLERANCE), None)
        if number is None:
            rooms.append(1 - share)
        else:
            rooms[number] -= share
    parts = [
        f"{name} {count} x " + (f"{d.gpu_memory_gib:g} GiB" if d.gpu_memory_gib is not None else f"{d.gpus:g} GPU")
        for name, d, count in lots
        if count
    ]
    return whole + len(rooms), f" ({', '.join(parts)})"


def _memory_budget(share: float, memory: float, place: Place, subject: str) -> list[Finding]:
    """Ray packs replicas by their share of a GPU; their memory must add up to no more than the card has."""
    if memory <= share + TOLERANCE:
        return []
    together = int((1 + TOLERANCE) // share)
    problem = f"takes {share:g} of a GPU by gpu_fraction, and asks for {memory:g} of its memory"
    if together > 1:
        problem = (
            f"{together} replicas share one GPU by gpu_fraction {share:g}, and together ask for "
            f"{together * memory:g} of its memory"
        )
    return [
        Finding(
            place,
            subject,
            problem,
            f"lower gpu_memory_utilization to at most {share:g}, or raise gpu_fraction",
        )
    ]
