"""What the command line says: progress and talk on stderr, data on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status as Spinner
from rich.table import Table

from clusterkit.errors import ClusterkitError, RunFailed, SpecError
from clusterkit.operations import Check
from clusterkit.runner import Event, Result
from clusterkit.workspace import state_home

err = Console(stderr=True, highlight=False, soft_wrap=True)
# Into a file or a pipe a table is not folded to a terminal that is not there.
WIDE = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
out = Console(highlight=False, soft_wrap=True, width=WIDE)


def data(value: Any) -> None:
    """JSON on stdout, for another program."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


class Progress:
    """Play, role, task, host and time as they happen; one line per play where nobody watches."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = err.is_terminal and not quiet
        self.started = time.monotonic()
        self.spinner: Spinner | None = None
        self.shown: set[str] = set()

    def __enter__(self) -> Callable[[Event], None]:
        if self.live:
            self.spinner = err.status("starting")
            self.spinner.start()
        return self.show

    def __exit__(self, *_: object) -> None:
        if self.spinner is not None:
            self.spinner.stop()

    def show(self, event: Event) -> None:
        elapsed = f"{time.monotonic() - self.started:5.0f} s"
        if event.kind == "play" and not self.quiet and event.play not in self.shown:
            # Every playbook begins with the validation, which runs once; so it is told once.
            self.shown.add(event.play)
            err.print(f"[dim]{elapsed}[/]  {escape(event.play)}")
        elif event.kind == "task" and self.spinner is not None:
            where = f"{event.role}: " if event.role else ""
            self.spinner.update(f"{escape(where)}{escape(event.task)}")
        elif event.kind == "changed" and self.live:
            where = f"{event.role}: " if event.role else ""
            err.print(
                f"[dim]{elapsed}[/]    [yellow]changed[/] {event.host}  {escape(where + event.task)}"
                f" [dim]({event.duration_s:.1f} s)[/]"
            )
        elif event.kind in {"failed", "unreachable"} and not event.ignored and not self.quiet:
            where = f"{event.role}: " if event.role else ""
            err.print(f"[dim]{elapsed}[/]    [red]{event.kind}[/] {event.host}  {escape(where + event.task)}")


@contextmanager
def running(as_json: bool) -> Iterator[Callable[[Event], None]]:
    """Progress; with --json the data of a run that failed, too."""
    try:
        with Progress(quiet=as_json) as show:
            yield show
    except RunFailed as error:
        if as_json:
            data(error.as_dict())
        raise


def summary(result: Result) -> None:
    """One line per host, as Ansible counts."""
    table = Table(box=None, pad_edge=False)
    for name in ("host", "ok", "changed", "failed", "unreachable"):
        table.add_column(name, justify="left" if name == "host" else "right")
    for host, count in result.hosts.items():
        table.add_row(host, str(count.ok), str(count.changed), str(count.failed), str(count.unreachable))
    err.print(table)


def failure(error: ClusterkitError) -> None:
    """Host, role, task, message, hint and log; never a traceback."""
    if isinstance(error, SpecError):
        for finding in error.findings:
            hosts = (
                f" [{', '.join(finding.hosts[:3])}{' …' if len(finding.hosts) > 3 else ''}]" if finding.hosts else ""
            )
            err.print(f"[red]{escape(str(finding.place))}[/]{escape(hosts)} [bold]{escape(finding.subject)}[/]")
            err.print(f"    {escape(finding.problem)}")
            err.print(f"    [green]fix:[/] {escape(finding.fix)}")
        err.print(f"[red]error:[/] {escape(error.message)}; no host was touched")
        return
    if isinstance(error, RunFailed) and error.hosts:
        err.print(_outcomes(error))
    if isinstance(error, RunFailed) and error.host:
        err.print(f"[red]failed:[/] host {error.host}, role {error.role or '-'}, task {escape(error.task)}")
    err.print(f"[red]error:[/] {escape(error.message)}")
    if error.hint:
        err.print(f"\n[green]hint:[/] {escape(error.hint)}")
    if isinstance(error, RunFailed):
        err.print(f"[dim]log: {error.log}[/]")


def _outcomes(error: RunFailed) -> Table:
    """One line per host: how far it came, and why no further."""
    table = Table("host", "outcome", "changed", "where", "why", box=None, pad_edge=False)
    last = {failure.host: failure for failure in error.failures}
    for host, count in error.hosts.items():
        where = last.get(host)
        outcome = f"[red]{where.kind}[/]" if where else "[green]done[/]"
        task = f"{where.role}: {where.task}" if where and where.role else where.task if where else ""
        lines = where.message.strip().splitlines() if where else []
        table.add_row(
            host, outcome, str(count.get("changed", 0)), escape(task), escape(lines[0][:100] if lines else "")
        )
    return table


def unexpected(error: Exception) -> None:
    """A fault of ours: one line here, the traceback in a file."""
    log = state_home() / "error.log"
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    err.print(f"[red]error:[/] clusterkit failed: {escape(type(error).__name__)}: {escape(str(error))}")
    err.print(f"[dim]traceback: {log}; please report it[/]")


def checks(found: Sequence[Check]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("", "check", "seconds", "detail"):
        table.add_column(name)
    for check in found:
        mark = "[green]ok[/]" if check.ok else "[red]failed[/]"
        table.add_row(mark, escape(check.name), f"{check.seconds:.1f}", escape(check.detail[:160]))
    out.print(table)
