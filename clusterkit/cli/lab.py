"""`clusterkit lab`: system containers on this machine that stand for the servers of a cluster."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clusterkit.workspace import ROOT

if TYPE_CHECKING:
    from clusterkit import lab

app = typer.Typer(
    no_args_is_help=True, help="System containers on this machine that stand for the servers of a cluster."
)

_DEFAULT_NAME = "lab"

Name = Annotated[str, typer.Option("--name", help="Which lab; several can be up at once.")]
Inventory = Annotated[
    Path | None,
    typer.Option("--inventory", "-i", help="The lab's inventory folder (default: inventory/NAME)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Runtime = Literal["container", "venv"]

_RUNTIME = "\n# Chosen by `clusterkit lab up --runtime`.\nclusterkit_runtime: {}\n"


@app.command()
def up(
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Hosts besides the head.")] = 2,
    offline: Annotated[bool, typer.Option("--offline", help="A network without a route out.")] = False,
    runtime: Annotated[
        Runtime | None,
        typer.Option(help="What Ray runs in there (default: as the lab has it, else container; offline: venv)."),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(help="Debian mirror of the hosts (default: this machine's, or deb.debian.org)."),
    ] = None,
    name: Name = _DEFAULT_NAME,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """Make the lab be there, with WORKERS workers, and write its inventory."""
    from clusterkit import lab  # the Docker SDK takes a while to import; other verbs need none of it

    talk = Console(stderr=True)
    started = time.monotonic()
    folder = _folder(inventory, name)
    made = lab.up(
        workers,
        name=name,
        inventory_dir=folder,
        offline=offline,
        mirror=mirror,
        group_vars=_settings("all") + _RUNTIME.format(runtime or _runtime_of(folder, offline)),
        pool_vars=_settings("cpu_pool"),
        on_progress=lambda line: talk.print(
            f"[dim]{time.monotonic() - started:5.1f} s[/] {escape(line)}", soft_wrap=True
        ),
    )
    done = "is up" if made.changed else "was up already"
    hosts = ", ".join(host.name for host in made.hosts)
    talk.print(f"[green]the lab {made.name!r} {done}:[/] {hosts} in {made.subnet}", soft_wrap=True)
    _emit(made) if as_json else print(made.inventory)


def _settings(group: str) -> str:
    """What the lab's inventory says about a group: an ordinary file of the checkout."""
    return (ROOT / "lab" / "inventory" / f"{group}.yml").read_text(encoding="utf-8")


def _runtime_of(inventory: Path, offline: bool) -> Runtime:
    """What an earlier `up` chose. Without a route, the hosts cannot install Docker."""
    settings = inventory / "group_vars" / "all" / "main.yml"
    if settings.is_file() and _RUNTIME.format("venv").strip() in settings.read_text(encoding="utf-8"):
        return "venv"
    return "venv" if offline else "container"


@app.command()
def down(
    images: Annotated[bool, typer.Option("--images", help="Remove the host images, too.")] = False,
    name: Name = _DEFAULT_NAME,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """Take the lab away: containers, volumes, network, keys and its inventory."""
    from clusterkit import lab

    talk = Console(stderr=True)
    removed = lab.down(name, _folder(inventory, name), images=images)
    gone = len(removed.containers)
    if gone or removed.networks or removed.files:
        talk.print(f"[green]the lab {name!r} is gone:[/] {gone} hosts")
    else:
        talk.print(f"there was no lab {name!r}")
    if removed.images:
        talk.print(f"removed the image {', '.join(removed.images)}")
    for line in removed.kept:
        talk.print(f"[yellow]kept[/] {escape(line)}", soft_wrap=True)
    if as_json:
        _emit(removed)


@app.command()
def status(name: Name = _DEFAULT_NAME, as_json: Json = False) -> None:
    """Show the lab's hosts, and whether each one's container and systemd run."""
    from clusterkit import lab

    found = lab.status(name)
    if as_json:
        _emit(found)
        return
    if not found.exists:
        Console(stderr=True).print(f"there is no lab {name!r}; `clusterkit lab up` makes one")
        return
    title = f"lab {found.name!r}, {found.subnet or 'no network'}{', offline' if found.offline else ''}"
    table = Table("host", "address", "container", "systemd", "id", title=title)
    for host in found.hosts:
        table.add_row(host.name, host.address, host.container, host.system or "-", host.container_id[:12])
    Console().print(table)


def _folder(inventory: Path | None, name: str) -> Path:
    return inventory or Path(__file__).resolve().parents[2] / "inventory" / name


def _emit(result: lab.Lab | lab.LabRemoved | lab.LabStatus) -> None:
    print(json.dumps(dataclasses.asdict(result), indent=2, default=str))
