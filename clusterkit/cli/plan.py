"""`clusterkit plan`: what `deploy` would change, per host and role."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

import typer
from rich.markup import escape

from clusterkit import operations, workspace
from clusterkit.cli import output
from clusterkit.cli.options import RUNS, Given, Inventory, Json, takes
from clusterkit.plan import Change, Disruption, HostPlan, Plan

# What a screen takes of one file; --json has all of it.
SHOWN_LINES = 24
SHOWN_WIDTH = 160

STOPS = {
    "node": "Ray is restarted",
    "docker": "dockerd is restarted",
    "host": "the host is rebooted",
    "app": "replicas are replaced",
}


@takes("limit", "tags", "forks", *RUNS)
def plan(
    given: Given,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """What `deploy` would change, wanted against actual, and what it would stop. Touches nothing.

    Exit code 1 where a host failed or could not be reached; the plan of the others is shown all the same.
    """
    with output.Progress(quiet=True) as show:
        found = operations.plan(workspace.inventory(inventory), given.options(), on_event=show)
    if as_json:
        output.data(found.as_dict())
    else:
        _show(found)
    if not found.whole:
        raise typer.Exit(1)


def _show(plan: Plan) -> None:
    for host in dict.fromkeys(change.host for change in plan.changes):
        output.out.print(f"[bold]{escape(host)}[/]")
        for role, changes in groupby(
            (change for change in plan.changes if change.host == host), lambda item: item.role
        ):
            output.out.print(f"  {escape(role or '-')}")
            for change in changes:
                _show_change(change)
    for host, item in plan.hosts.items():
        if item.driver or item.gpus:
            output.out.print(f"[bold]{escape(host)}[/] {escape(_gpu_host(item))}")
    if plan.disruptions:
        output.out.print("[bold]would be disrupted[/]")
        for disruption in plan.disruptions:
            output.out.print(f"  {escape(_disruption(disruption))}")
    _show_end(plan)


def _gpu_host(host: HostPlan) -> str:
    """Driver and GPUs of a host, as they are."""
    driver = host.driver or {}
    models = Counter(str(gpu.get("model")) for gpu in host.gpus)
    firmware = sorted(
        {f"{name} {version}" for gpu in host.gpus for name, version in (gpu.get("firmware") or {}).items()}
    )
    parts = [
        f"kernel {driver['running_kernel']}" if driver.get("running_kernel") else "",
        str(driver.get("summary") or ""),
        ", ".join(f"{number} x {model}" for model, number in models.items()),
        f"firmware {', '.join(firmware[:4])}{' …' if len(firmware) > 4 else ''}" if firmware else "",
    ]
    return "; ".join(part for part in parts if part)


def _show_change(change: Change) -> None:
    mark = "[dim]left:[/] " if change.left else ""
    lines = change.diff.splitlines()
    new = change.actual == "missing or empty"
    if change.what == "step" and lines:
        said = change.name
    elif change.what == "step":
        said = str(change.wanted or change.name)
    elif new or (change.what == "app" and change.actual == "missing"):
        said = f"{change.what} {change.name}: missing"
    elif change.wanted is None and change.actual is None:
        said = f"{change.what} {change.name}"
    else:
        said = f"{change.what} {change.name}: {_against(change)}"
    output.out.print(f"    {mark}{escape(_cut(said))}")
    if change.note:
        output.out.print(f"      {change.note}", markup=False, style="yellow")
    # What is not there yet is in the checkout, or in --json.
    for line in [] if new else lines[:SHOWN_LINES]:
        output.out.print(f"      {_cut(line)}", markup=False, style=_style(line))
    if not new and len(lines) > SHOWN_LINES:
        output.out.print(f"      [dim]… {len(lines) - SHOWN_LINES} more lines; --json has them[/]")


def _against(change: Change) -> str:
    if isinstance(change.wanted, dict) and isinstance(change.actual, dict):
        keys = [*change.wanted, *(key for key in change.actual if key not in change.wanted)]
        return ", ".join(
            f"{key} is {_word(change.actual.get(key))}, wanted {_word(change.wanted.get(key))}" for key in keys
        )
    if change.actual is None:
        return f"wanted {_word(change.wanted)}"
    return f"{_word(change.actual)}, wanted {_word(change.wanted)}"


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_word(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(_word(inner) for inner in value)
    return "nothing" if value is None else str(value)


def _disruption(item: Disruption) -> str:
    replicas = "nobody could say how many replicas" if item.replicas is None else _count(item.replicas)
    if not item.needs_consent:
        fate = "would happen"
    elif item.consent:
        fate = "would happen: clusterkit_allow_disruption is given"
    else:
        fate = "would be left: clusterkit_allow_disruption is not given"
    because = ", ".join(item.because[:3]) + (f" and {len(item.because) - 3} more" if len(item.because) > 3 else "")
    return f"{item.host}: {STOPS.get(item.what, item.what)} ({replicas}); {fate}. Because of: {because}"


def _count(replicas: dict[str, int]) -> str:
    return ", ".join(f"{app}: {number} replica(s)" for app, number in sorted(replicas.items())) or "no replicas"


def _show_end(plan: Plan) -> None:
    for failure in (*plan.failed, *plan.unreachable):
        where = f"{failure.role}: {failure.task}" if failure.role else failure.task
        kind = "unreachable" if failure in plan.unreachable else "failed"
        output.err.print(f"[red]{kind}:[/] {escape(failure.host)}, {escape(where)}")
        output.err.print(f"    {escape(failure.message)}")
    incomplete = [host for host, item in plan.hosts.items() if item.state == "incomplete"]
    if incomplete:
        output.err.print(f"[yellow]not planned to the end:[/] {escape(', '.join(incomplete))}: the run ended early")
    if plan.empty:
        output.out.print("nothing would change")
        return
    changes = sum(item.changes for item in plan.hosts.values())
    hosts = sum(item.changes > 0 for item in plan.hosts.values())
    left = sum(change.left for change in plan.changes)
    more = f"; {left} more would be left, for want of consent" if left else ""
    output.err.print(f"{changes} change(s) on {hosts} host(s){more}")


def _cut(line: str) -> str:
    return line if len(line) <= SHOWN_WIDTH else line[:SHOWN_WIDTH] + " …"


def _style(line: str) -> str:
    return {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
