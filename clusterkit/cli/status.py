"""`clusterkit status`: hosts, nodes and apps; with --watch again and again."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from clusterkit import operations, workspace
from clusterkit.cli import output
from clusterkit.cli.options import RUNS, Given, Inventory, Json, takes
from clusterkit.errors import RunFailed, UsageError
from clusterkit.operations import Status


@takes(*RUNS)
def status(
    given: Given,
    inventory: Inventory = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    every: Annotated[int, typer.Option("--every", min=1, help="Seconds between two looks.")] = 5,
) -> None:
    """What runs: hosts with their state and why, nodes, apps with their replicas."""
    if watch and as_json:
        raise UsageError("--watch is for people", hint="call --json as often as you like")
    where, options = workspace.inventory(inventory), given.options()

    def look() -> Status:
        with output.Progress(quiet=True) as show:
            return operations.status(where, options, on_event=show)

    if as_json:
        output.data(look().as_dict())
    elif not watch:
        output.out.print(screen(look()))
    else:
        shown = screen(look())
        with Live(shown, console=output.out, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                try:
                    shown = screen(look())
                    live.update(shown, refresh=True)
                except RunFailed as error:
                    # Whoever watches wants to see it come back.
                    live.update(Group(shown, f"[red]as it was; now: {escape(str(error))}[/]"), refresh=True)


def screen(seen: Status) -> Group:
    """All of it, as one thing to print."""
    return Group(*(_fleet(seen) if seen.fleet is not None else [_hosts(seen)]), _apps(seen))


def _hosts(seen: Status) -> Table:
    table = Table("host", "agent", "Ray", "address", "GPU", "CPU", box=None, pad_edge=False)
    nodes = {node["host"]: node for node in seen.nodes}
    for host in seen.hosts:
        node = nodes.get(host["host"], {})
        resources = node.get("resources", {})
        table.add_row(
            host["host"],
            escape(", ".join(filter(None, (host["state"], host["held"])))),
            "alive" if node.get("alive") else "-",
            node.get("node_ip", "-"),
            f"{resources.get('GPU', 0):g}",
            f"{resources.get('CPU', 0):g}",
        )
    return table


def _fleet(seen: Status) -> list[Any]:
    """Of an autoscaled cluster: what each host does, since when and why."""
    fleet = seen.fleet or {}
    lines: list[Any] = [_hosts(seen), ""]
    if not fleet.get("running"):
        return [*lines, "[red]the fleet daemon is not installed yet: deploy the cluster[/]"]
    table = Table("host", "pool", "state", "GPU", "replicas", "since", "why", box=None, pad_edge=False)
    for name, host in sorted(fleet["hosts"].items()):
        replicas = seen.replicas_on(name)
        table.add_row(
            name,
            host["pool"],
            host["state"],
            str(host["gpus"]),
            str(replicas),
            host["since"] or "-",
            escape(host["why"]),
        )
    lines.append(table)
    lines += _demands(seen.demands, fleet)
    for want in fleet["open"]:
        lines.append(f"[yellow]{want['count']} more of {want['pool']} are asked for:[/] {escape(want['why'])}")
    if fleet["trouble"]:
        lines.append(f"[red]{escape(fleet['trouble'])}[/]")
    lines.append(_saved(list(fleet["hosts"].values())))
    return lines


def _demands(demands: list[str], fleet: dict[str, Any]) -> list[str]:
    """What has no place in Ray, and whether hosts could still come for it."""
    pools = fleet["pools"].items()
    full = [
        f"{name} has as many nodes as it may ({pool['max']})" for name, pool in pools if pool["nodes"] >= pool["max"]
    ]
    if len(full) == len(pools):
        why = "; ".join(full)
    elif fleet["open"] or any(host["state"] in ("booting", "starting") for host in fleet["hosts"].values()):
        why = "hosts are asked for"
    else:
        why = "; ".join([*full, "Ray asks for a host within seconds, or no pool's hosts offer that"])
    return [f"[yellow]Ray waits for[/] {escape(line)}: {why}" for line in demands]


def _saved(hosts: list[dict[str, Any]]) -> str:
    hours = sum(host["off_hours"] for host in hosts)
    known = [host["saved_kwh"] for host in hosts if host["saved_kwh"] is not None]
    text = f"hosts were off for {hours:.1f} hours altogether"
    if known:
        return f"{text}: about {sum(known):.1f} kWh saved, by the idle_watts of their pools\n"
    return f"{text}\n"


def _apps(seen: Status) -> Table:
    table = Table("app", "state", "replicas", "base URL", box=None, pad_edge=False)
    for item in seen.apps:
        running = sum(1 for replica in item["replicas"] if replica["state"] == "RUNNING")
        table.add_row(item["name"], item["state"], f"{running}/{len(item['replicas'])}", item["base_url"])
    return table
