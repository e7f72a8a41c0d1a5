"""Roles, their argument_specs, defaults and READMEs agree; sizes and borders hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
NAMES = [role.name for role in ROLES]

roles = pytest.mark.parametrize("role", ROLES, ids=NAMES)


def options(role: Path) -> dict[str, dict[str, Any]]:
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = specs["argument_specs"]["main"]["options"]
    return found


def code(role: Path) -> dict[Path, str]:
    return {
        path: path.read_text(encoding="utf-8")
        for folder in ("tasks", "defaults", "vars", "handlers", "templates")
        for path in (role / folder).glob("*")
    }


@roles
def test_every_option_has_a_default_and_every_default_is_an_option(role: Path) -> None:
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text(encoding="utf-8"))
    assert set(defaults) == set(options(role))
    # Two homes for a default would drift apart.
    assert not [name for name, option in options(role).items() if "default" in option]
    assert all(name.startswith(f"{role.name}_") for name in defaults)


@roles
def test_the_readme_lists_exactly_the_options(role: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", (role / "README.md").read_text(encoding="utf-8"), re.M)
    wanted = [(name, option["type"], option["description"]) for name, option in options(role).items()]
    assert rows == wanted


@roles
def test_no_role_reads_another_roles_variables(role: Path) -> None:
    for path, text in code(role).items():
        for other in NAMES:
            if other == role.name or role.name.startswith(other):
                continue
            names = {name for name in options(ROOT / "roles" / other) if re.search(rf"\b{name}\b", text)}
            assert not names, f"{path.relative_to(ROOT)} reads {', '.join(sorted(names))} of {other}"
        assert "include_role" not in text
        assert "import_role" not in text


@roles
def test_files_stay_small(role: Path) -> None:
    limits = {"tasks/main.yml": 40, "defaults/main.yml": 60}
    for path in [*role.glob("tasks/*.yml"), role / "defaults/main.yml"]:
        limit = limits.get(str(path.relative_to(role)), 80)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines, {limit} are allowed"


@roles
def test_what_a_role_makes_it_takes_away(role: Path) -> None:
    assert (role / "tasks/remove.yml").exists()


@roles
def test_every_notified_handler_is_there(role: Path) -> None:
    notified = {name for text in code(role).values() for name in re.findall(r"notify: (.+)", text)}
    file = role / "handlers/main.yml"
    there = {handler["name"] for handler in yaml.safe_load(file.read_text())} if file.exists() else set()
    assert notified <= there


@roles
def test_templates_say_that_they_are_managed(role: Path) -> None:
    for template in role.glob("templates/*"):
        # A program's first line is the kernel's.
        text = re.sub(r"\A#!.*\n", "", template.read_text(encoding="utf-8"))
        assert text.startswith("{{ ansible_managed | comment }}"), template


def test_remove_is_never_called_with_its_extension() -> None:
    """With `.yml` Ansible skips the validation of arguments, in silence."""
    for file in [ROOT / "site.yml", *(ROOT / "playbooks").glob("*.yml")]:
        assert not re.search(r"tasks_from: \w+\.yml", file.read_text(encoding="utf-8")), file


def test_no_group_vars_lie_beside_a_playbook() -> None:
    """They would override the site's own."""
    assert not (ROOT / "group_vars").exists()
    assert not (ROOT / "playbooks/group_vars").exists()


def test_no_newline_is_written_inside_a_template() -> None:
    """Ansible doubles the backslash there: the message would show `\\n`, and its `Fix:` would not be found."""
    files = [*(ROOT / "playbooks").rglob("*.yml"), *(ROOT / "roles").rglob("*.yml")]
    assert files
    for file in files:
        assert not re.search(r'\{\{ "\\n" \}\}', file.read_text(encoding="utf-8")), file
