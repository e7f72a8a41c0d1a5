"""`clusterkit app`: what runs on Serve, what a change of it means, and the way back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from clusterkit import operations, workspace
from clusterkit.cli import output
from clusterkit.cli.options import RUNS, Given, Inventory, Json, takes
from clusterkit.errors import UsageError
from clusterkit.operations import Apps
from clusterkit.spec.findings import did_you_mean

app = typer.Typer(no_args_is_help=True, help="Apps on Ray Serve: look, compare, apply, go back. No node is restarted.")

WIDTH = 160


class Rollout(StrEnum):
    auto = "auto"
    surge = "surge"
    in_place = "in_place"
    one_at_a_time = "one_at_a_time"


@app.command("list")
@takes(*RUNS)
def list_apps(
    given: Given,
    inventory: Inventory = None,
    as_json: Json = False,
    history: Annotated[bool, typer.Option("--history", help="What was applied, too.")] = False,
) -> None:
    """The apps as they run: state, replicas, route, model, since when."""
    seen = _look(given, inventory)
    if as_json:
        output.data({"reachable": seen.reachable, "apps": seen.apps, "history": seen.history, "runs": seen.runs})
        return
    if not seen.reachable:
        output.err.print("[yellow]Ray does not answer: is the cluster deployed?[/]")
    table = Table("app", "state", "replicas", "route", "model", "since", box=None, pad_edge=False)
    for item in seen.apps:
        route = item["route_prefix"] or "-"
        state = item["status"] + ("" if item["declared"] else ", not declared")
        table.add_row(item["name"], state, _replicas(item), route, item["model"] or "-", item["since"] or "-")
    output.out.print(table)
    for item in seen.apps:
        if item["message"]:
            output.out.print(f"{item['name']}: {_cut(item['message'].strip().splitlines()[-1])}", markup=False)
    if history:
        output.out.print(_history(seen))


@app.command()
@takes(*RUNS)
def diff(
    given: Given,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """What `apply` would do to each app, key by key: what only scales, and what replaces replicas, and how."""
    seen = _look(given, inventory)
    if as_json:
        output.data({"reachable": seen.reachable, "changes": seen.changes, "rollouts": seen.rollouts})
        return
    if not seen.reachable:
        output.err.print("[yellow]Ray does not answer: every app counts as added[/]")
    for change in seen.changes:
        for line, style in _told(change):
            output.out.print(line, markup=False, style=style)
    if not seen.changes:
        output.out.print("nothing would change")


@app.command()
@takes(*RUNS)
def apply(
    given: Given,
    inventory: Inventory = None,
    as_json: Json = False,
    rollout: Annotated[
        Rollout | None, typer.Option("--rollout", help="How replicas are replaced; default serve_apps_rollout.")
    ] = None,
    skip_off: Annotated[
        bool, typer.Option("--skip-off", help="Autoscaled: leave hosts that are off without new weights and code.")
    ] = False,
) -> None:
    """Bring weights, code and apps to what the inventory says, and ask for an answer.

    Where an app does not come up, the config that ran before is put back, and the exit code is 1.
    """
    with output.running(as_json) as show:
        done = operations.apply_apps(
            workspace.inventory(inventory),
            given.options(),
            rollout=rollout.value if rollout else None,
            skip_off=skip_off,
            on_event=show,
        )
    hosts = {host: asdict(count) for host, count in done.result.hosts.items()}
    if as_json:
        output.data({"base_url": done.base_url, "answer": done.answer, "hosts": hosts, "log": str(done.result.log)})
        return
    output.summary(done.result)
    output.err.print("[green]done:[/] the apps are as declared" + ("" if done.result.changed else ", as they were"))


@app.command()
@takes(*RUNS)
def rollback(
    given: Given,
    inventory: Inventory = None,
    to: Annotated[
        int | None, typer.Option("--to", min=1, help="Its number in `app list --history`; default the one before.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Apply an earlier config again that ran. The inventory goes on declaring the other one."""
    with output.running(as_json) as show:
        done = operations.rollback_apps(workspace.inventory(inventory), given.options(), number=to, on_event=show)
    if as_json:
        output.data({**asdict(done), "log": str(done.log)})
        return
    for change in done.changes:
        for line, style in _told(change):
            output.out.print(line, markup=False, style=style)
    output.err.print(f"[green]done:[/] config {done.number} runs" + ("" if done.changed else ", as it did"))
    output.err.print("[yellow]the inventory declares what it did:[/] mend it, or the next deploy applies that again")


@app.command()
@takes(*RUNS)
def scale(
    given: Given,
    name: Annotated[str, typer.Argument(metavar="APP", help="An app with external_scaler.")],
    deployment: Annotated[str, typer.Argument(help="As `app list` names it.")],
    replicas: Annotated[int, typer.Argument(help="How many, within min_replicas and max_replicas.")],
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """Set how many replicas a deployment has, and wait until they run. No later deploy changes the number."""
    with output.running(as_json) as show:
        done = operations.scale_app(
            workspace.inventory(inventory), name, deployment, replicas, given.options(), on_event=show
        )
    if as_json:
        output.data({"app": name, "deployment": deployment, "replicas": replicas, "changed": done.changed})
        return
    word = "had them" if not done.changed else f"{'runs' if replicas == 1 else 'run'}"
    output.err.print(f"[green]done:[/] {replicas} of {deployment} {word}", markup=True)


@app.command()
@takes(*RUNS)
def effective(
    given: Given,
    name: Annotated[str | None, typer.Argument(metavar="APP", help="Only this app.")] = None,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """The options that run, with every default that Ray adds."""
    seen = _look(given, inventory)
    found = seen.effective
    if name is not None:
        apps = found.get("applications", {})
        if name not in apps:
            raise UsageError(f"no app {name!r} runs", hint=did_you_mean(name, apps) or f"one of {', '.join(apps)}")
        found = apps[name]
    if as_json:
        output.data(found)
    else:
        sys.stdout.write(yaml.safe_dump(found, sort_keys=False))


def _look(given: Given, inventory: str | None) -> Apps:
    with output.Progress(quiet=True) as show:
        return operations.apps(workspace.inventory(inventory), given.options(), on_event=show)


def _replicas(item: dict[str, Any]) -> str:
    """Running and wanted, of the deployment with the most to do first."""
    deployments = item["deployments"].items()
    words = [f"{name} {one['running_replicas']}/{one['target_replicas']}" for name, one in deployments]
    return ", ".join(words) or "-"


def _history(seen: Apps) -> Table:
    table = Table("number", "applied", "outcome", "apps", "what", box=None, pad_edge=False)
    for entry in seen.history:
        outcome = entry["outcome"] + (", runs now" if entry["number"] == seen.runs else "")
        why = entry["message"].strip().splitlines()[0] if entry["message"] else entry["why"]
        back = f"; number {entry['restored']} was put back" if entry["restored"] else ""
        table.add_row(str(entry["number"]), entry["time"], outcome, ", ".join(entry["apps"]), escape(_cut(why + back)))
    return table


def _told(change: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """One change, as lines with their colour."""
    what, name, wanted, actual = (change.get(key) for key in ("what", "name", "wanted", "actual"))
    if what != "app":
        consent = "; it takes a restart of Serve, by clusterkit_allow_disruption" if change.get("left") else ""
        yield f"{what} {name} is {actual}, declared is {wanted}{consent}", "yellow"
    elif actual == "missing":
        yield f"+ {name}", "green"
    elif wanted == "gone":
        yield f"- {name}: stopped, its replicas with it", "red"
    elif isinstance(wanted, dict) and isinstance(actual, dict):
        yield f"~ {name}: " + ("replicas are replaced" if change.get("disrupts") else "no replica is replaced"), "bold"
        for key in wanted:
            yield f"    {key}: {_word(actual.get(key))} -> {_word(wanted.get(key))}", ""
    else:
        yield f"~ {name}: {actual}, then {wanted}", "bold"
    if change.get("note"):
        yield f"    {change['note']}", "yellow"


def _word(value: Any) -> str:
    return "nothing" if value is None else _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else text[:WIDTH] + " …"
