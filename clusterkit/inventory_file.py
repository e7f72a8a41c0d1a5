"""Put a host into a YAML inventory, or take it out, and leave every other byte of the file as it is.

A round trip through a YAML library keeps comments too, but hangs each on the entry before it: a host added at the
end of a group would land below the next group's comment, and a host removed would take that comment along. So the
entry is cut into the text where the parser says it belongs; then the new text is parsed, and kept only if it says
what it should. What cannot be edited like that (INI files, programs, one-line mappings) is told with the lines to
write by hand.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from clusterkit.errors import UsageError
from clusterkit.spec.findings import Finding, Place

WORKER_GROUP = "ray_workers"
MANAGED_GROUP = "managed_hosts"
YAML_SUFFIXES = {".yml", ".yaml"}
# What Ansible passes over in a folder of inventories: its defaults of INVENTORY_IGNORE_EXTS, and fixed names.
_IGNORED = re.compile(
    r"^\.|^(host_vars|group_vars|vars_plugins)$|(\.pyc|\.pyo|\.swp|\.bak|~|\.rpm|\.md|\.txt|\.rst|\.orig|\.cfg|\.retry)$"
)
# Names of variables that hold a password or a token.
_SECRET = re.compile(r"(^|_)(pass|passwd|password|secret|token)$")
_NULL_TAG = "tag:yaml.org,2002:null"

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Edit:
    """A file as it was read, and as it is to be."""

    path: Path
    before: str
    after: str

    @property
    def diff(self) -> str:
        """What changes, as `diff -u` shows it, with one line around."""
        old, new = self.before.splitlines(), self.after.splitlines()
        return "\n".join(difflib.unified_diff(old, new, str(self.path), str(self.path), n=1, lineterm=""))


@dataclass(frozen=True)
class Candidate:
    """An inventory with its edits, beside the one that it may become. `names` maps its files to theirs."""

    sources: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    def told(self, finding: Finding) -> Finding:
        """A finding about the candidate, with the names of the files that the user knows."""
        for ours, theirs in self.names.items():
            finding = replace(
                finding,
                place=Place(finding.place.file.replace(ours, theirs), finding.place.line),
                problem=finding.problem.replace(ours, theirs),
                fix=finding.fix.replace(ours, theirs),
            )
        return finding


def files(inventory: str) -> list[Path]:
    """What Ansible reads of an inventory: the file itself, or those of its folder, in Ansible's order."""
    home = Path(inventory)
    if home.is_dir():
        return [home / name for name in sorted(os.listdir(home)) if not _IGNORED.search(name)]
    return [home] if home.is_file() else []


def groups(inventory: str) -> set[str]:
    """The names of all groups that stand in YAML files."""
    return {group.name for file in _read(inventory) for group in file.groups}


def place(inventory: str, host: str) -> Place | None:
    """Where a host stands in the YAML files: its first entry in any group."""
    for file in _read(inventory):
        for group in file.groups:
            for key, _ in group.hosts:
                if key.value == host:
                    return Place(str(file.path), key.start_mark.line + 1)
    return None


def differing(inventory: str, host: str, variables: Mapping[str, Any]) -> list[str]:
    """Which of these variables the host's entries in YAML files do not have, or have with another value."""
    entries = [
        value for file in _read(inventory) for group in file.groups for key, value in group.hosts if key.value == host
    ]
    said = {key.value: _expected(inner, {}, set()) for entry in entries for key, inner in _items(entry)}
    return [name for name, value in variables.items() if entries and said.get(name) != _told(value)]


def add(inventory: str, host: str, pool: str, variables: Mapping[str, Any]) -> list[Edit]:
    """The edits that put `host` into `pool`, and into managed_hosts where that group lists its hosts one by one.

    None where it stands there already. Raises UsageError with the lines to write where the pool stands in no file
    that can be edited.
    """
    found = _read(inventory)
    home = _home(found, pool)
    if home is None:
        raise _elsewhere(inventory, host, pool, variables)
    edits = []
    managed = _listing(found, pool)
    # managed_hosts first: cut off after it, the host is in no pool yet, and the same request goes on.
    if managed is not None and not _shares_hosts(found, managed, pool):
        edits += _added(managed, MANAGED_GROUP, host, {})
    # The same file may hold both.
    home = next((edited for edited in map(_reread, edits) if edited.path == home.path), home)
    edits += _added(home, pool, host, variables)
    return _merged(edits)


def remove(inventory: str, host: str) -> list[Edit]:
    """The edits that take `host` out of every group; a pool that it leaves empty goes too, if there is another.

    None where it stands in no YAML file. Raises UsageError where an entry cannot be cut out.
    """
    found = _read(inventory)
    edits = []
    for file in found:
        keys = [key for group in file.groups for key, _ in group.hosts if key.value == host]
        if not keys:
            continue
        doomed = {id(key) for key in keys}
        doomed |= {id(key) for key in _emptied_pools(found, file, host)}
        edits.append(_cut(file, doomed, f"take {host} out of {file.path}:{keys[0].start_mark.line + 1} by hand"))
    return edits


@contextmanager
def candidate(inventory: str, edits: Sequence[Edit]) -> Iterator[Candidate]:
    """The inventory with its edits, as hidden files beside the originals, which stay as they are.

    Ansible passes over hidden files in a folder, so whoever reads the inventory meanwhile sees no change.
    """
    names: dict[str, str] = {}
    try:
        for edit in edits:
            handle, name = _temporary(edit.path)
            names[name] = str(edit.path)
            with os.fdopen(handle, "wb") as out:
                out.write(edit.after.encode())
        ours = {theirs: name for name, theirs in names.items()}
        sources = [ours.get(str(path), str(path)) for path in files(inventory)] if edits else [inventory]
        shown = {Path(name).name: Path(theirs).name for name, theirs in names.items()}
        yield Candidate(tuple(sources), shown)
    finally:
        for name in names:
            Path(name).unlink(missing_ok=True)


def write(edits: Sequence[Edit]) -> None:
    """Put the new texts in place, each file all or nothing. Raises UsageError where a file has changed since."""
    for edit in edits:
        if _text(edit.path) != edit.before:
            raise UsageError(
                f"{edit.path} was changed by somebody else meanwhile: it was left alone",
                hint="give the same command again",
            )
    for edit in edits:
        # Behind a link: the link stays one.
        target = edit.path.resolve()
        handle, name = _temporary(target)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(edit.after.encode())
                out.flush()
                os.fchmod(out.fileno(), target.stat().st_mode & 0o7777)
                os.fsync(out.fileno())
            os.replace(name, target)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise


def variable(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value read as YAML, like in a file. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise UsageError(f"--var {text!r} is not NAME=VALUE", hint="such as --var clusterkit_fabric_interface=eth1")
    if _SECRET.search(name):
        raise UsageError(
            f"--var {name}: a secret does not belong on a command line, nor in a file that is not encrypted",
            hint="put it into host_vars, with ansible-vault",
        )
    if "{{" in value or "{%" in value:  # a template: text for Ansible, and no YAML
        return name, value
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--var {name}: the value does not parse as YAML", hint="quote it: --var 'x=\"a: b\"'"
        ) from error


def address(text: str) -> str:
    """An IP address. Raises UsageError."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        hint = "for a name: --var ansible_host=NAME --var clusterkit_node_ip=IP"
        raise UsageError(f"--address {text!r} is no IP address", hint=hint) from None


def snippet(host: str, variables: Mapping[str, Any], *, column: int = 0, step: int = 2) -> str:
    """A host as it stands below `hosts:`."""
    lines = [f"{' ' * column}{one_line(host)}:"]
    lines += [f"{' ' * (column + step)}{name}: {one_line(value)}" for name, value in variables.items()]
    return "\n".join(lines)


def one_line(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Group:
    name: str
    key: Node
    value: Node
    parent: str | None

    def section(self, name: str) -> tuple[Node, Node] | None:
        return next(((key, value) for key, value in _items(self.value) if key.value == name), None)

    @property
    def hosts(self) -> list[tuple[Node, Node]]:
        section = self.section("hosts")
        return _items(section[1]) if section else []


@dataclass(frozen=True)
class _File:
    path: Path
    text: str
    root: Node | None

    @property
    def groups(self) -> list[_Group]:
        return list(_groups(self.root, None, set())) if self.root is not None else []


def _items(node: Node | None) -> list[tuple[Node, Node]]:
    return node.value if isinstance(node, MappingNode) else []


def _groups(node: Node, parent: str | None, seen: set[int]) -> Iterator[_Group]:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    for key, value in _items(node):
        if not isinstance(key, ScalarNode):
            continue
        yield (group := _Group(str(key.value), key, value, parent))
        if (children := group.section("children")) is not None:
            yield from _groups(children[1], group.name, seen)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _read(inventory: str) -> list[_File]:
    """The files of an inventory that are YAML mappings."""
    found = []
    for path in files(inventory):
        if not path.is_file() or path.suffix not in {*YAML_SUFFIXES, ""}:
            continue
        text = _text(path)
        root = None if text.startswith(("#!", "$ANSIBLE_VAULT")) else _composed(text)
        if isinstance(root, MappingNode):
            found.append(_File(path, text, root))
    return found


def _composed(text: str) -> Node | None:
    with suppress(yaml.YAMLError):
        root: Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        return root
    return None


def _reread(edit: Edit) -> _File:
    return _File(edit.path, edit.after, _composed(edit.after))


def _merged(edits: Sequence[Edit]) -> list[Edit]:
    """One edit a file, in the order in which they are to be written."""
    merged: dict[Path, Edit] = {}
    for edit in edits:
        known = merged.pop(edit.path, None)
        merged[edit.path] = replace(edit, before=known.before) if known else edit
    return list(merged.values())


def _home(found: Sequence[_File], pool: str) -> _File | None:
    """The file to put a host of `pool` into: where hosts of it stand already, else where it is declared."""
    named = [(file, group) for file in found for group in file.groups if group.name == pool]
    ranked = sorted(named, key=lambda item: (not item[1].hosts, item[1].section("hosts") is None))
    return ranked[0][0] if ranked else None


def _listing(found: Sequence[_File], pool: str) -> _File | None:
    """The file where managed_hosts lists hosts one by one, if it does not take in the whole pool."""
    nodes = [(file, group) for file in found for group in file.groups if group.name == MANAGED_GROUP]
    covered = {key.value for _, group in nodes for key, _ in _items((group.section("children") or (None, None))[1])}
    if covered & {pool, WORKER_GROUP, "all"}:
        return None
    return next((file for file, group in nodes if group.hosts), None)


def _shares_hosts(found: Sequence[_File], managed: _File, pool: str) -> bool:
    """Is the list of managed_hosts an alias of the pool's?"""
    lists = {
        id(section[1])
        for group in managed.groups
        if group.name == MANAGED_GROUP and (section := group.section("hosts"))
    }
    return any(
        id(section[1]) in lists
        for file in found
        for group in file.groups
        if group.name == pool and (section := group.section("hosts"))
    )


def _emptied_pools(found: Sequence[_File], file: _File, host: str) -> list[Node]:
    """The keys of this file's pools that have no host but this one, where ray_workers has another pool."""
    pools = {group.name for other in found for group in other.groups if group.parent == WORKER_GROUP}
    left = {
        group.name
        for other in found
        for group in other.groups
        if group.section("children") or any(key.value != host for key, _ in group.hosts)
    }
    gone = [group for group in file.groups if group.parent == WORKER_GROUP and group.name not in left and group.hosts]
    return [group.key for group in gone] if len(pools) > len({group.name for group in gone}) else []


# --------------------------------------------------------------------------- editing


def _added(file: _File, name: str, host: str, variables: Mapping[str, Any]) -> list[Edit]:
    """The edit that adds a host to the group `name` of this file; none where it is in it."""
    nodes = [group for group in file.groups if group.name == name]
    if any(key.value == host for group in nodes for key, _ in group.hosts):
        return []
    group = sorted(nodes, key=lambda item: (not item.hosts, item.section("hosts") is None))[0]
    lines, step = file.text.split("\n"), _step(file)
    by_hand = f"add this below {name} > hosts, by hand:\n{snippet(host, variables, column=4)}"
    section = group.section("hosts")
    value: Any = [(_told(host), _told(dict(variables)))]
    if section is not None:
        key, target = section
        column = group.hosts[0][0].start_mark.column if group.hosts else key.start_mark.column + step
        block = snippet(host, variables, column=column, step=step)
    else:
        key, target = group.key, group.value
        inner = _items(target)
        column = inner[0][0].start_mark.column if inner else key.start_mark.column + step
        block = f"{' ' * column}hosts:\n{snippet(host, variables, column=column + step, step=step)}"
        value = [(_told("hosts"), value)]
    if isinstance(target, MappingNode) and (target.flow_style or not target.value):
        raise _unsafe(file, key, by_hand)
    if isinstance(target, SequenceNode) or (isinstance(target, ScalarNode) and target.tag != _NULL_TAG):
        raise _unsafe(file, key, by_hand)
    items = _items(target)
    last = _last_line(*items[-1], lines) if items else key.end_mark.line
    after = _past_comments(lines, last, column)
    ending = "\r" if "\r\n" in file.text else ""
    lines[after + 1 : after + 1] = [line + ending for line in block.split("\n")]
    return [_checked(file, "\n".join(lines), _expected(file.root, {id(target): value}, set()), key, by_hand)]


def _cut(file: _File, doomed: set[int], by_hand: str) -> Edit:
    """The edit that takes these entries out, each with its own comments."""
    lines = file.text.split("\n")
    ranges: list[tuple[int, int]] = []
    first: Node | None = None
    for key, value in _pairs(file.root, set()):
        if id(key) not in doomed:
            continue
        first = first or key
        start = key.start_mark.line
        if lines[start][: key.start_mark.column].strip():
            raise _unsafe(file, key, by_hand)
        last = _last_line(key, value, lines)
        ranges.append((start, _past_comments(lines, last, key.start_mark.column + 1)))
    gone = {number for start, end in ranges for number in range(start, end + 1)}
    text = "\n".join(line for number, line in enumerate(lines) if number not in gone)
    return _checked(file, text, _expected(file.root, {}, doomed), first, by_hand)


def _pairs(node: Node | None, seen: set[int]) -> Iterator[tuple[Node, Node]]:
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    for key, value in _items(node):
        yield key, value
        yield from _pairs(value, seen)


def _checked(file: _File, text: str, expected: Any, key: Node | None, by_hand: str) -> Edit:
    """The edit, if the new text says exactly what it should."""
    if _composed(text) is None or _expected(_composed(text), {}, set()) != expected:
        raise _unsafe(file, key, by_hand)
    return Edit(file.path, file.text, text)


def _expected(node: Node | None, more: Mapping[int, list[Pair]], doomed: set[int]) -> Any:
    """What a tree says, with `more` at the end of some mappings and without the `doomed` keys."""
    if isinstance(node, MappingNode):
        pairs = [
            (_expected(key, more, doomed), _expected(value, more, doomed))
            for key, value in node.value
            if id(key) not in doomed
        ]
        return [*pairs, *more.get(id(node), [])] or None
    if isinstance(node, SequenceNode):
        return ("sequence", [_expected(item, more, doomed) for item in node.value])
    if node is None or node.tag == _NULL_TAG:
        return more.get(id(node)) or None
    return (node.tag, node.value)


def _told(value: Any) -> Any:
    """What a plain value says once it is written."""
    return _expected(_composed(one_line(value)), {}, set())


def _step(file: _File) -> int:
    """By how many columns this file indents."""
    for group in file.groups:
        for key, _ in _items(group.value):
            return max(1, int(key.start_mark.column - group.key.start_mark.column))
    return 2


def _last_line(key: Node, value: Node, lines: Sequence[str]) -> int:
    """The last line with something of this entry on it; the parser's own end lies past blank lines and comments."""
    last = int(key.end_mark.line)
    if isinstance(value, MappingNode) and not value.flow_style:
        for inner_key, inner_value in value.value:
            last = max(last, _last_line(inner_key, inner_value, lines))
        return last
    if isinstance(value, SequenceNode) and not value.flow_style:
        for item in value.value:
            last = max(last, _last_line(item, item, lines))
        return last
    end = int(value.end_mark.line)
    if isinstance(value, ScalarNode) and value.style in {"|", ">"}:
        # Its end is the beginning of what follows.
        end = min(end, len(lines) - 1)
        while end > value.start_mark.line and _indent(lines[end]) <= key.start_mark.column:
            end -= 1
    return max(last, end)


def _indent(line: str) -> int:
    """The column of the first sign of a line; -1 for a blank one."""
    return len(line) - len(line.lstrip()) if line.strip() else -1


def _past_comments(lines: Sequence[str], last: int, column: int) -> int:
    """The last of the comments right below that are indented at least so far."""
    while last + 1 < len(lines) and lines[last + 1].lstrip().startswith("#") and _indent(lines[last + 1]) >= column:
        last += 1
    return last


def _temporary(path: Path) -> tuple[int, str]:
    """A hidden file beside `path`. Without a suffix: Ansible reads it as YAML where it is named, and a folder's
    reader passes over one that a killed run has left."""
    try:
        return tempfile.mkstemp(prefix=f".{path.stem.replace('.', '-')}-", dir=path.parent)
    except OSError as error:
        raise UsageError(f"cannot write in {path.parent}: {error.strerror}", hint="check whose folder it is") from error


# --------------------------------------------------------------------------- refusals


def _unsafe(file: _File, key: Node | None, by_hand: str) -> UsageError:
    where = f"{file.path}:{key.start_mark.line + 1}" if key is not None else str(file.path)
    return UsageError(
        f"{where} is written in a way that clusterkit does not edit (on one line, or with aliases)",
        hint=f"{by_hand}\nThen give the same command again",
    )


def _elsewhere(inventory: str, host: str, pool: str, variables: Mapping[str, Any]) -> UsageError:
    """The pool stands in no YAML file: say where it does, and what to write there."""
    words = " ".join(f"{name}={_ini(value)}" for name, value in variables.items())
    again = "Then give the same command again"
    for path in files(inventory):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if text.startswith("#!"):
            message = f"the hosts come from the program {path}"
            hint = f"let it give the host {host} to the group {pool}{', with ' + words if words else ''}. {again}"
            return UsageError(message, hint=hint)
        if (ini := re.search(rf"^\[{re.escape(pool)}\]", text, re.MULTILINE)) is not None:
            line = text.count("\n", 0, ini.start()) + 1
            message = f"the pool {pool} stands in {path}:{line}, which is no YAML file: clusterkit does not edit it"
            return UsageError(
                message, hint=f"add this line below [{pool}]:\n    {host} {words}".rstrip() + f"\n{again}"
            )
    return UsageError(
        f"the pool {pool} stands in no YAML file of {inventory}",
        hint=f"add this to its hosts, by hand:\n{snippet(host, variables, column=4)}\n{again}",
    )


def _ini(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if re.fullmatch(r"[\w.:/@%+,-]+", text) else "'" + text.replace("'", "\\'") + "'"
