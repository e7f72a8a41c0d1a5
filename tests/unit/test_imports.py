"""Who may import whom, held by reading the source of every module of the package and of the app templates."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Lowest first. A module imports what stands in a lower row, and its own package; nothing stands in no row.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"clusterkit"}),
    frozenset({"clusterkit.errors"}),
    # On the head host, without the rest of the kit: what they may need from outside stands in ALONE.
    frozenset({"clusterkit.fleet", "clusterkit.node_provider"}),
    frozenset({f"clusterkit.{name}" for name in ("workspace", "debian", "transfer", "tunnel", "registry")}),
    frozenset({"clusterkit.spec"}),
    frozenset({f"clusterkit.{name}" for name in ("render", "wheels", "stacks", "image_plan", "app_code")}),
    frozenset({"clusterkit.inventory_file", "clusterkit.images"}),
    frozenset({"clusterkit.runner", "clusterkit.lab", "clusterkit.scaffold", "clusterkit.verify", "clusterkit.report"}),
    frozenset({"clusterkit.plan"}),
    frozenset({"clusterkit.operations"}),
    frozenset({"clusterkit.cli"}),
    frozenset({"clusterkit.__main__"}),
)
IN_REPLICAS = (
    *(f"{name}.app" for name in ("embeddings", "pipeline", "vision", "async_tasks", "llm_router", "llm_lora")),
)
# What only some may import, whatever they need it for.
OWNERS = {
    "ansible_runner": ("clusterkit.runner",),
    "ansible": (),
    # Of a template, what runs in replicas.
    "ray": ("clusterkit.node_provider", *(f"serve_apps.{name}" for name in IN_REPLICAS)),
    "sushy": ("clusterkit.fleet.power",),
    "docker": ("clusterkit.lab",),
    "typer": ("clusterkit.cli",),
    "click": ("clusterkit.cli",),
    "rich": ("clusterkit.cli",),
}
# Packages that run in small environments of their own, and what is in those beside the standard library.
ALONE = {
    "clusterkit.fleet": {"clusterkit.errors", "pydantic", "sushy"},
    "clusterkit.node_provider": {"ray"},
}
# What runs as a program of its own, as the command line does.
PROGRAMS = ("clusterkit.cli", "clusterkit.__main__", "clusterkit.fleet.__main__", "clusterkit.node_provider.__main__")
# The spec and what is rendered from it are pure; reading the inventory's files is one module's.
IMPURE = {"os", "pathlib", "shutil", "socket", "subprocess", "tempfile", "urllib", "http", "time", "httpx"}
PURE = ("clusterkit.spec", "clusterkit.render", "clusterkit.plan")
READERS = ("clusterkit.spec.files",)
# The templates of apps know the model's parameters and Serve, and nothing of how a cluster is made.
TEMPLATES = "serve_apps"
SPEC_MAY_USE = ("serve_apps.template",)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def top_of(name: str) -> str:
    return name.partition(".")[0]


def row(name: str) -> int:
    """The layer of a module; -1 where it has none."""
    return max(
        (n for n, layer in enumerate(LAYERS) if within(name, *layer) and (n or name == "clusterkit")), default=-1
    )


def imports(tree: ast.Module, name: str, names: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of everything that is imported when the code runs; what only a type checker reads is not."""
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: -node.level]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                # `from clusterkit import runner` imports the module, `from clusterkit.errors import X` a name in it.
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in names or base == "clusterkit" else base


def talks(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that prints or ends the program."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in {"print", "exit", "quit", "SystemExit"}:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text in {"sys.exit", "sys.stdout", "sys.stderr", "os._exit"}:
                yield node.lineno, text


def problems(sources: Mapping[str, str]) -> list[str]:
    """What breaks the order in these modules (name → text)."""
    found = []
    names = frozenset(sources)
    for name, text in sources.items():
        tree = ast.parse(text)
        ours = within(name, "clusterkit")
        if ours and row(name) < 0:
            found.append(f"{name}: has no place in the order")
        for line, target in imports(tree, name, names):
            bad = ""
            if name == "clusterkit":
                bad = "the package itself imports nothing"
            elif within(target, "clusterkit"):
                lower = 0 <= row(target) < row(name)
                family = ".".join(name.split(".")[:2]) == ".".join(target.split(".")[:2])
                if not ours:
                    bad = "an app template knows nothing of the kit"
                elif not (lower or family):
                    bad = "stands higher, or beside it"
            elif within(target, TEMPLATES) and ours and not within(target, *SPEC_MAY_USE):
                bad = "the kit sees templates through serve_apps.template only"
            elif (top := target.split(".")[0]) in OWNERS and not within(name, *OWNERS[top]):
                bad = f"only {' and '.join(OWNERS[top]) or 'the targets'} may"
            elif top in IMPURE and within(name, *PURE) and not within(name, *READERS):
                bad = "it is pure"
            lonely = next((package for package in ALONE if within(name, package)), None)
            known = top_of(target) in sys.stdlib_module_names
            if lonely and not bad and not known and not within(target, lonely, *ALONE[lonely]):
                bad = f"{lonely} runs without it"
            if bad:
                found.append(f"{name}:{line} imports {target}: {bad}")
        if not within(name, *PROGRAMS):
            found += [f"{name}:{line} uses {what}: only clusterkit.cli prints or exits" for line, what in talks(tree)]
    return found


def shipped() -> dict[str, str]:
    found = {}
    for package in ("clusterkit", TEMPLATES):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def test_the_order_holds() -> None:
    assert problems(shipped()) == []


def test_every_module_is_looked_at() -> None:
    assert {
        "clusterkit",
        "clusterkit.runner",
        "clusterkit.spec.load",
        "clusterkit.cli.main",
        "serve_apps.llm.template",
    } <= (shipped().keys())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("clusterkit.spec.load", "from clusterkit import runner", "imports clusterkit.runner"),
        ("clusterkit.spec.load", "from clusterkit.render.serve import serve_config", "stands higher"),
        ("clusterkit.spec.load", "def late():\n    import clusterkit.operations", "spec.load:2"),
        ("clusterkit.errors", "from clusterkit.spec.findings import Finding", "stands higher"),
        ("clusterkit.runner", "from clusterkit.cli import output", "stands higher"),
        ("clusterkit.runner", "from clusterkit import lab", "beside it"),
        ("clusterkit.render.serve", "from ..operations import deploy", "imports clusterkit.operations"),
        ("clusterkit.render.serve", "from .. import runner", "imports clusterkit.runner"),
        ("clusterkit.operations", "import ansible_runner", "only clusterkit.runner may"),
        ("clusterkit.wheels", "from ansible.errors import AnsibleError", "only the targets may"),
        ("clusterkit.operations", "from rich.table import Table", "only clusterkit.cli may"),
        ("clusterkit.operations", "import docker.errors", "only clusterkit.lab may"),
        ("clusterkit.spec.checks", "from pathlib import Path", "it is pure"),
        ("clusterkit.render.serve", "import subprocess", "it is pure"),
        ("clusterkit.spec.load", "from serve_apps.llm.parameters import LlmParameters", "serve_apps.template only"),
        ("clusterkit", "import json", "imports nothing"),
        ("clusterkit.helpers", "", "has no place in the order"),
        ("clusterkit.lab", "print('up')", "only clusterkit.cli prints or exits"),
        ("clusterkit.lab", "import sys\nsys.exit(1)", "uses sys.exit"),
        ("clusterkit.lab", "import sys\nsys.stderr.write('x')", "uses sys.stderr"),
        ("clusterkit.lab", "raise SystemExit", "uses SystemExit"),
        ("clusterkit.fleet.daemon", "from clusterkit.spec.facts import Accelerator", "stands higher"),
        ("clusterkit.fleet.daemon", "import httpx", "clusterkit.fleet runs without it"),
        ("clusterkit.fleet.daemon", "import sushy", "only clusterkit.fleet.power may"),
        ("clusterkit.fleet.daemon", "print('up')", "only clusterkit.cli prints or exits"),
        ("clusterkit.node_provider.client", "from clusterkit.errors import UsageError", "runs without it"),
        ("clusterkit.node_provider.client", "import pydantic", "clusterkit.node_provider runs without it"),
        ("clusterkit.node_provider.client", "from clusterkit.fleet import config", "beside it"),
        ("clusterkit.render.serve", "import ray", "imports ray: only clusterkit.node_provider"),
        ("serve_apps.llm.template", "from clusterkit.spec.facts import Accelerator", "knows nothing of the kit"),
        ("serve_apps.llm.template", "import ansible", "only the targets may"),
    ],
)
def test_what_would_break_it_is_seen(name: str, text: str, words: str) -> None:
    (found,) = problems({**dict.fromkeys(shipped(), ""), name: text})
    assert found.startswith(name)
    assert words in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("clusterkit.cli.main", "from clusterkit import operations\nprint(operations)"),
        ("clusterkit.spec.load", "from clusterkit.spec import checks\nfrom serve_apps import template"),
        (
            "clusterkit.errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import clusterkit.spec.findings",
        ),
        ("clusterkit.lab", "import docker"),
        ("clusterkit.fleet.config", "import json\nfrom pydantic import BaseModel\nfrom clusterkit import errors"),
        ("clusterkit.fleet.power.redfish", "import sushy"),
        ("clusterkit.fleet.__main__", "import sys\nsys.exit(1)"),
        ("clusterkit.node_provider.provider", "from ray.autoscaler.node_provider import NodeProvider"),
        ("clusterkit.spec.files", "from pathlib import Path"),
    ],
)
def test_what_is_allowed_passes(name: str, text: str) -> None:
    assert problems({**dict.fromkeys(shipped(), ""), name: text}) == []
