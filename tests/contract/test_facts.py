"""What roles and playbooks read of the fact `clusterkit` is what validation publishes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterkit.render.autoscaler import autoscaler
from clusterkit.spec.load import load
from clusterkit.spec.raw import RawInventory, RawValue

ROOT = Path(__file__).resolve().parents[2]
# What lies in `files` is copied as it is.
ROLES = [path for path in ROOT.glob("roles/*/*/*") if path.parent.name != "files"]
READERS = sorted([*ROLES, *ROOT.glob("playbooks/*.yml"), ROOT / "site.yml"])

# `clusterkit.hosts[inventory_hostname].pool` and the like, but no name of a file and no module that Python runs; an
# index stands for any entry.
READ = re.compile(r"(?<![\w/.-])(?<!-m )clusterkit((?:\.\w+|\[[^\]]+\])+)")
# Methods of the data, not keys in it.
METHODS = {"items", "keys", "values"}


@pytest.fixture(scope="module")
def fact() -> dict[str, Any]:
    """As published for a head and an autoscaled worker; beside the spec, the action adds what is rendered."""
    common = {"clusterkit_name": "test", "clusterkit_stack": "cpu"}
    worker = {**common, "clusterkit_accelerator": "cpu", "ansible_host": "192.0.2.11"}
    worker |= {"clusterkit_cpus": 1, "clusterkit_pool": {"mode": "autoscaled"}}
    raw = RawInventory(
        hosts={
            "h1": {name: RawValue(value) for name, value in {**common, "ansible_host": "192.0.2.10"}.items()},
            "w1": {name: RawValue(value) for name, value in worker.items()},
        },
        groups={
            **dict.fromkeys(("all", "managed_hosts"), ("h1", "w1")),
            "ray_head": ("h1",),
            "ray_workers": ("w1",),
            "cpus": ("w1",),
        },
        children={"ray_workers": ("cpus",)},
        sources=(),
    )
    spec, findings = load(raw)
    assert spec is not None, findings
    return {**spec.published(), "serve_config": {}, "autoscaler": autoscaler(spec)}


def reads(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each expression with its keys; `[]` is an index."""
    for match in READ.finditer(text):
        yield match.group(0), [word or "[]" for word in re.findall(r"\.(\w+)|\[[^\]]+\]", match.group(1))]


def missing(fact: Any, path: list[str]) -> str:
    """The first key of a path that is not there; nothing where all are."""
    for key in path:
        if key in METHODS:
            return ""
        if key == "[]":
            fact = next(iter(fact.values() if isinstance(fact, dict) else fact), None)
        elif not isinstance(fact, dict) or key not in fact:
            return key
        else:
            fact = fact[key]
        if fact is None:
            return ""  # empty in this cluster: what would be in it is not known
    return ""


def test_everything_that_is_read_is_published(fact: dict[str, Any]) -> None:
    found = [
        f"{path.relative_to(ROOT)} reads {words}: there is no {gone}"
        for path in READERS
        if path.is_file()
        for words, keys in reads(path.read_text(encoding="utf-8"))
        if (gone := missing(fact, keys))
    ]
    assert found == []


def test_the_roles_do_read_it() -> None:
    """Else the test above would look at nothing."""
    count = sum(len(list(reads(path.read_text(encoding="utf-8")))) for path in READERS if path.is_file())
    assert count > 50


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("{{ clusterkit.ports.gcs }}", ""),
        ("{{ clusterkit.port.gcs }}", "port"),
        ("{{ clusterkit.hosts[inventory_hostname].managed }}", ""),
        ("{{ clusterkit.hosts[inventory_hostname].manged }}", "manged"),
        ("{{ clusterkit.paths.values() | list }}", ""),
    ],
)
def test_what_is_not_published_is_seen(fact: dict[str, Any], text: str, gone: str) -> None:
    ((_, keys),) = reads(text)
    assert missing(fact, keys) == gone


def test_the_fact_is_published_before_any_role_reads_it() -> None:
    """Each playbook validates first: alone it must hold, too."""
    for path in (ROOT / "playbooks").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        if path.name != "validate.yml":
            first = text.index("import_playbook: validate.yml")
            assert first < text.index("hosts:"), path.name
