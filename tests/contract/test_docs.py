"""Documents that are written from the code agree with it, and the tree keeps its promises about itself."""

from __future__ import annotations

from pathlib import Path

from clusterkit.cli.main import app
from clusterkit.render.variables import variables
from clusterkit.spec.facts import known_variables

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_variables_is_the_models() -> None:
    page = (ROOT / "docs/variables.md").read_text(encoding="utf-8")
    assert page == variables(), "write it anew: python -m clusterkit render variables > docs/variables.md"
    assert all(f"`{name}`" in page for name in known_variables())


def test_every_variable_has_a_meaning() -> None:
    empty = [line for line in variables().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert empty == []


def test_every_verb_stands_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    groups = [app.registered_commands, *(group.typer_instance.registered_commands for group in app.registered_groups)]
    verbs = {command.name or command.callback.__name__ for group in groups for command in group}
    assert {"deploy", "up", "serve"} <= verbs
    assert not [verb for verb in verbs if verb not in text]
