"""`clusterkit host`: one host in, one host out, and no other host touched."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from clusterkit import inventory_file, operations, workspace
from clusterkit.cli import output
from clusterkit.cli.options import RUNS, Given, Inventory, Json, takes
from clusterkit.errors import UsageError
from clusterkit.operations import HostChange
from clusterkit.runner import Result

app = typer.Typer(no_args_is_help=True, help="Change a running cluster by one host; no other host is touched.")

Host = Annotated[str, typer.Argument(metavar="NAME", help="The host, by its name in the inventory.")]


@app.command()
@takes(*RUNS)
def add(
    given: Given,
    host: Host,
    pool: Annotated[
        str | None, typer.Option("--pool", help="A child group of ray_workers; needed when there are several.")
    ] = None,
    address: Annotated[str | None, typer.Option("--address", help="Its IP address (ansible_host).")] = None,
    var: Annotated[
        list[str] | None, typer.Option("--var", metavar="NAME=VALUE", help="A variable of the host; no secrets.")
    ] = None,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """Put a host into the inventory and converge it; end its maintenance, if it is there already.

    The inventory is validated with the host in it before its file is changed.
    """
    where = workspace.inventory(inventory)
    variables = dict(inventory_file.variable(text) for text in var or ())
    if address is not None:
        variables = {"ansible_host": inventory_file.address(address), **variables}
    with output.running(as_json) as show:
        change = operations.add_host(
            where, host, pool=pool, variables=variables, options=given.options(), on_event=show
        )
    _tell(change, as_json, f"{host} is in the cluster" + ("" if change.changed else ", as it was"))


Reason = Annotated[str, typer.Option("--reason", help="Why, for whoever looks next; at most 200 characters.")]
Force = Annotated[bool, typer.Option("--force", help="Stop work that cannot move.")]


@app.command(
    "maintain",
    help="The same as drain. A host that the autoscaler has switched off stays off, whatever is asked of it.",
)
@app.command()
@takes(*RUNS)
def drain(
    given: Given,
    host: Host,
    reason: Reason,
    force: Force = False,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """Take a worker out of service: its replicas move away, its node stops and stays off.

    Nothing starts it again, no deploy and no autoscaler, until `host add NAME` ends the maintenance.
    """
    where = workspace.inventory(inventory)
    with output.running(as_json) as show:
        change = operations.drain_host(where, host, reason=reason, force=force, options=given.options(), on_event=show)
    held = change.held or f"in maintenance: {reason}"
    _tell(change, as_json, f"{host} is off, {held}. To put it back: clusterkit host add {host}")


@app.command()
@takes(*RUNS)
def release(
    given: Given,
    host: Host,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """End a host's quarantine or maintenance. Starts nothing: the next deploy, or `host add NAME`, does."""
    where = workspace.inventory(inventory)
    with output.running(as_json) as show:
        change = operations.release_host(where, host, options=given.options(), on_event=show)
    _tell(change, as_json, f"{host} is released" if change.changed else f"{host} was not held")


@app.command()
@takes(*RUNS)
def remove(
    given: Given,
    host: Host,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Out of the inventory, even if the host cannot be reached or drained.")
    ] = False,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """Take a worker out for good: drained, cleaned, and gone from the inventory."""
    where = workspace.inventory(inventory)
    if not yes and not (sys.stdin.isatty() and typer.confirm(f"Take {host} out of {where}?", err=True)):
        raise UsageError("nothing was removed", hint="say --yes to remove without being asked")
    with output.running(as_json) as show:
        change = operations.remove_host(where, host, force=force, options=given.options(), on_event=show)
    _tell(change, as_json, f"{host} is out" if change.changed else f"{host} is not in {where}: nothing to do")
    for line in change.left:
        output.err.print(f"[yellow]left on {escape(host)}:[/] {escape(line)}")


def _tell(change: HostChange, as_json: bool, words: str) -> None:
    if as_json:
        log = str(change.log) if change.log else None
        output.data({**asdict(change), "log": log})
        return
    if change.diff:
        output.err.print(escape(change.diff))
    if change.hosts:
        output.summary(Result(folder=Path(), hosts=change.hosts))
    output.err.print(f"[green]done:[/] {escape(words)}")
