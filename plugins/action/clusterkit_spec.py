"""Read the cluster from what Ansible resolved; fail with every finding, or return the cluster.

Everything that depends on Ansible's inside is in this file; what the values mean is `clusterkit.spec`.
"""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase

from clusterkit import app_code
from clusterkit.render.autoscaler import autoscaler
from clusterkit.render.serve import serve_config
from clusterkit.spec.checks import LOGIN_PASSWORDS
from clusterkit.spec.files import broken_sources, encrypted, unparsable, variable_files
from clusterkit.spec.findings import Finding, Place, blanked, merge
from clusterkit.spec.load import load
from clusterkit.spec.raw import RawInventory, RawValue

try:  # file and line of a value: not public, so the one place that may break says less, not wrong
    from ansible._internal._datatag._tags import Origin, VaultedValue
except ImportError:  # pragma: no cover
    Origin = VaultedValue = None

# Of Ansible's own variables, what the spec reads.
CONNECTION = ("ansible_host", "ansible_connection")
ROLES = Path(__file__).resolve().parents[2] / "roles"


class ActionModule(ActionBase):
    """Returns `findings`, and on success `cluster`: with `***` for what came out of a vault, unless
    `secrets` asks for it."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        hidden: tuple[str, ...] = ()
        try:
            inventory = self._inventory(task_vars or {})
            hidden = inventory.secrets
            sources = [str(source) for source in (task_vars or {}).get("ansible_inventory_sources") or ()]
            spec, findings = load(inventory, partial(app_code.read, inventories=sources))
        except AnsibleError as error:
            # Files of host_vars and of smaller groups are first read here; one that does not parse hides the rest.
            spec, findings = None, _unreadable(error, task_vars or {})
        result["findings"] = [finding.as_dict() for finding in findings]
        if spec is None:
            lines = "\n".join(f"  {finding}" for finding in findings)
            result.update(failed=True, msg=f"The inventory has {len(findings)} finding(s):\n{lines}")
            return result
        cluster = {**spec.published(), "serve_config": serve_config(spec), "autoscaler": autoscaler(spec)}
        shown = cluster if boolean(self._task.args.get("secrets", False)) else _masked(cluster, hidden)
        # Whether a second reading, unseen, is needed at all.
        result.update(cluster=shown, blanked=shown != cluster)
        return result

    def _inventory(self, task_vars: dict[str, Any]) -> RawInventory:
        hostvars = task_vars["hostvars"]
        tree = hostvars._inventory.groups
        options = _role_options()
        wanted = {name for specs in options.values() for name in specs}
        hosts = {host: self._variables(hostvars, host, options, wanted) for host in _hosts(task_vars["groups"])}
        sources = tuple(str(source) for source in task_vars.get("ansible_inventory_sources") or ())
        shown = tuple(_relative(source) for source in sources)
        return RawInventory(
            hosts=hosts,
            groups={name: tuple(members) for name, members in task_vars["groups"].items()},
            children={name: tuple(c.name for c in group.child_groups) for name, group in tree.items()},
            sources=shown,
            places=_declared(sources),
            role_options=options,
            broken=tuple(broken_sources(shown)),
        )

    def _variables(self, hostvars: Any, host: str, options: dict[str, Any], wanted: set[str]) -> dict[str, RawValue]:
        raw = hostvars.raw_get(host)
        # A context of its own: `hostvars` inside a value (the usual head-address idiom) then resolves too.
        templar = self._templar.copy_with_new_env(available_variables={**raw, "hostvars": hostvars})
        prefixes = ("clusterkit_", *(f"{role}_" for role in options))
        found = {
            str(name): _value(templar, name, source)
            for name, source in raw.items()
            if name.startswith(prefixes) or name in wanted or name in CONNECTION or _might_be_typo(name)
        }
        for name, source in raw.items():
            # Whether there is one, and no more.
            if name in LOGIN_PASSWORDS and source is not None:
                place = _place(name)
                found[str(name)] = RawValue(value=True, places={(): place} if place else {})
        return found


def _masked(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _masked(inner, secrets) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner, secrets) for inner in value]
    return blanked(value, secrets) if isinstance(value, str) else value


def _hosts(groups: dict[str, list[str]]) -> list[str]:
    return list(groups.get("all", ()))


def _might_be_typo(name: str) -> bool:
    """Any plain site variable: the loader compares it with the roles' options."""
    return not name.startswith(("ansible_", "inventory_", "group", "omit", "playbook_", "role_", "hostvars"))


def _value(templar: Any, name: Any, source: Any) -> RawValue:
    places: dict[tuple[str | int, ...], Place] = {}
    key, found = _place(name), _place(source)
    # The key's line reads best. Where a later file replaced the value, the key is still the first file's.
    home = found if found is not None and (key is None or found.file != key.file) else key
    if home is not None:
        places[()] = home
    secrets = _secrets(source)
    try:
        value = templar.template(source)
        secrets |= _secrets(value)
        _collect_places(value, (), places)
        _collect_places(source, (), places)
        return RawValue(value=_plain(value), places=places, secrets=secrets)
    except (AnsibleError, KeyError, TypeError, ValueError) as error:
        _collect_places(source, (), places)
        undecryptable = type(source).__name__ == "EncryptedString" or "decrypt" in str(error)
        return RawValue(places=places, error=_first_line(error), undecryptable=undecryptable)


def _secrets(value: Any) -> frozenset[str]:
    """Texts that came out of a vault: encrypted by themselves, or in a file that is."""
    if isinstance(value, dict):
        return frozenset().union(*map(_secrets, value.values()))
    if isinstance(value, (list, tuple)):
        return frozenset().union(*map(_secrets, value))
    # What is still encrypted here shows up in the rendered value, or stays unknown.
    if Origin is None or value is None or isinstance(value, bool) or type(value).__name__ == "EncryptedString":
        return frozenset()
    origin = Origin.get_tag(value)
    hidden = VaultedValue.is_tagged_on(value) or (origin is not None and origin.path and _from_vault(str(origin.path)))
    return frozenset({str(value)}) if hidden else frozenset()


@cache
def _from_vault(path: str) -> bool:
    return encrypted(Path(path))


def _unreadable(error: AnsibleError, task_vars: dict[str, Any]) -> list[Finding]:
    """The variable files that do not parse; Ansible's own words where none is found."""
    sources = [_relative(str(source)) for source in task_vars.get("ansible_inventory_sources") or ()]
    found = [finding for source in sources for finding in unparsable(variable_files(source))]
    problem = f"cannot be read: {_first_line(error)}"
    return merge(found) or [Finding(Place(*sources[:1]), "inventory", problem, "mend the file that this is about")]


def _collect_places(value: Any, path: tuple[str | int, ...], places: dict[tuple[str | int, ...], Place]) -> None:
    place = _place(value)
    if place is not None and path:
        places.setdefault(path, place)
    if isinstance(value, dict):
        for key, inner in value.items():
            key_place = _place(key)
            if key_place is not None:
                places[(*path, str(key))] = key_place
            _collect_places(inner, (*path, str(key)), places)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _collect_places(inner, (*path, index), places)


def _plain(value: Any) -> Any:
    """Plain Python data, without Ansible's tags."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return value if kind is bool else kind(value)
    return None if value is None else str(value)


def _place(value: Any) -> Place | None:
    if Origin is None or value is None:
        return None
    origin = Origin.get_tag(value)
    if origin is None:
        return None
    if not origin.path:
        return Place("-e") if "'-e'" in str(origin.description) else None
    return Place(_relative(str(origin.path)), origin.line_num or 0)


def _declared(sources: tuple[str, ...]) -> dict[str, Place]:
    """Where each host and group stands in a YAML inventory; Ansible keeps places of values only."""
    places: dict[str, Place] = {}
    for source in sources:
        path = Path(source)
        files = sorted(path.glob("*.y*ml")) if path.is_dir() else [path] if path.is_file() else []
        for file in files:
            try:
                root = yaml.compose(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                continue
            if isinstance(root, yaml.MappingNode):
                _declared_below(root, _relative(str(file)), places)
                places.setdefault("", Place(_relative(str(file)), 1))
    return places


def _declared_below(node: yaml.MappingNode, file: str, places: dict[str, Place]) -> None:
    for key, value in node.value:
        places.setdefault(str(key.value), Place(file, key.start_mark.line + 1))
        for section, inner in value.value if isinstance(value, yaml.MappingNode) else ():
            if section.value == "children" and isinstance(inner, yaml.MappingNode):
                _declared_below(inner, file, places)
            elif section.value == "hosts" and isinstance(inner, yaml.MappingNode):
                for host, _facts in inner.value:
                    places.setdefault(str(host.value), Place(file, host.start_mark.line + 1))


def _relative(path: str) -> str:
    """As the user would write it: relative to where the command was given, if below it."""
    here = os.getcwd()
    return os.path.relpath(path, here) if path.startswith(here + os.sep) else path


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].removeprefix("Error rendering template: ")


def _role_options() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(ROLES.glob("*/meta/argument_specs.yml")):
        specs = yaml.safe_load(file.read_text(encoding="utf-8"))
        found[file.parents[1].name] = specs["argument_specs"]["main"].get("options", {})
    return found
