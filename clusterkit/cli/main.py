"""`clusterkit`, or `python -m clusterkit`: the only place that catches errors and exits."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from clusterkit import operations, workspace
from clusterkit.cli import app as app_verbs
from clusterkit.cli import host as host_verbs
from clusterkit.cli import image, init, lab, output, plan, status
from clusterkit.cli.options import READS, RUNS, Given, Inventory, Json, takes
from clusterkit.errors import ClusterkitError, SpecError, UsageError
from clusterkit.render.variables import variables
from clusterkit.spec.stacks import table as stack_table

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": False}

app = typer.Typer(
    name="clusterkit",
    help="From racked GPU servers to an autoscaling, OpenAI-compatible inference service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
render = typer.Typer(help="Show what would be applied.", no_args_is_help=True)
app.add_typer(render, name="render")
app.add_typer(lab.app, name="lab")
app.add_typer(app_verbs.app, name="app")
app.add_typer(host_verbs.app, name="host")
app.add_typer(image.app, name="image")
app.command()(init.init)


@app.command()
@takes(*READS)
def validate(
    given: Given,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """Check the inventory: every mistake at once, with its place and its fix. Touches no host."""
    try:
        cluster = operations.validate(workspace.inventory(inventory), given.options())
    except SpecError as error:
        if as_json:
            output.data({"valid": False, "findings": [finding.as_dict() for finding in error.findings]})
            raise typer.Exit(error.exit_code) from None
        raise
    if as_json:
        output.data({"valid": True, "findings": [], "cluster": cluster})
        return
    pools = ", ".join(f"{name} ({len(pool['hosts'])} hosts)" for name, pool in cluster["pools"].items())
    output.err.print(
        f"valid: cluster {cluster['name']}, stack {cluster['stack']['name']}, head {cluster['head']['host']}, "
        f"pools {pools}, {len(cluster['apps'])} app(s)"
    )


@app.command(context_settings=PASS_ON)
@takes("limit", "tags", "forks", "verbosity", *RUNS)
def deploy(
    given: Given,
    context: typer.Context,
    inventory: Inventory = None,
    as_json: Json = False,
    check: Annotated[bool, typer.Option("--check", help="Change nothing.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show what changes in files.")] = False,
    skip_off: Annotated[
        bool,
        typer.Option("--skip-off", help="Autoscaled: leave out hosts that are off, until a deploy takes them along."),
    ] = False,
) -> None:
    """Bring the hosts to what the inventory says. The same command again converges.

    What stands after `--` goes to ansible-playbook. Hosts that the autoscaler has switched off are switched on for it.
    """
    options = given.options(check=check, diff=diff, rest=tuple(context.args))
    if skip_off:
        options = replace(options, extra_vars=(*options.extra_vars, "skip_off=true"))
    with output.running(as_json) as show:
        done = operations.deploy(workspace.inventory(inventory), options, on_event=show)
    hosts = {host: asdict(count) for host, count in done.result.hosts.items()}
    if as_json:
        output.data(
            {
                "base_url": done.base_url,
                "model": done.model,
                "answer": done.answer,
                "hosts": hosts,
                "log": str(done.result.log),
            }
        )
        return
    output.summary(done.result)
    if done.base_url and done.model:
        body = {"model": done.model, "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 16}
        output.out.print(f"\nbase URL: {done.base_url}")
        output.out.print(
            f"curl {done.base_url}/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
            markup=False,
        )
        output.out.print(f"it answered: {done.answer!r}", markup=False)


app.command()(plan.plan)
app.command()(status.status)


@app.command()
@takes(*RUNS)
def verify(
    given: Given,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """Ask every replica for real tokens, streaming and not. Exit 1 where a check failed."""
    with output.Progress(quiet=True) as show:
        found = operations.verify(workspace.inventory(inventory), given.options(), on_event=show)
    if as_json:
        output.data({"ok": all(check.ok for check in found), "checks": [asdict(check) for check in found]})
    else:
        output.checks(found)
    if not found or not all(check.ok for check in found):
        raise typer.Exit(1)


@app.command(context_settings=PASS_ON)
@takes("limit", *RUNS)
def remove(
    given: Given,
    context: typer.Context,
    inventory: Inventory = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    with_data: Annotated[bool, typer.Option("--data", help="The whole folder of the weights, too.")] = False,
) -> None:
    """Take away what the kit made, stray Ray processes included. Packages and the site's data stay."""
    where = workspace.inventory(inventory)
    what = f"{given.limit or 'the cluster'} of {where}{', every weight included,' if with_data else ''}"
    if not yes and not (sys.stdin.isatty() and typer.confirm(f"Take {what} away?", err=True)):
        raise UsageError("nothing was removed", hint="say --yes to remove without being asked")
    with output.Progress() as show:
        result = operations.remove(where, given.options(rest=tuple(context.args)), data=with_data, on_event=show)
    for host, line in operations.stays(result):
        output.err.print(f"{host}: {escape(line)}")
    output.summary(result)


@app.command()
def stacks(as_json: Json = False) -> None:
    """The version table: which Ray, vLLM and driver go together."""
    if as_json:
        output.data(stack_table().model_dump(mode="json"))
        return
    table = Table("stack", "accelerator", "Ray", "vLLM", "ROCm", "driver", "venv", box=None, pad_edge=False)
    for row in stack_table().rows:
        driver = f"{row.driver.name} {row.driver.version or '(pin it)'}" if row.driver else "-"
        venv = (row.engine.note or "yes") if row.engine else "no"
        table.add_row(row.name, row.accelerator, f"{row.ray}[{row.ray_extra}]", row.vllm, row.rocm or "-", driver, venv)
    output.out.print(table)


@render.command("serve")
@takes(*READS)
def render_serve(
    given: Given,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """The whole Serve config, as `deploy` would apply it."""
    config = operations.serve_config(workspace.inventory(inventory), given.options())
    if as_json:
        output.data(config)
    else:
        sys.stdout.write(yaml.safe_dump(config, sort_keys=False))


@render.command("variables")
def render_variables() -> None:
    """Every variable of an inventory, as Markdown: docs/variables.md."""
    sys.stdout.write(variables())


# Typer brings its own click: its usage errors are found from a class that it makes public.
_ClickError: type[Any] = typer.BadParameter.__mro__[2]

# What it makes of Ctrl-C.
CTRL_C = 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a run or a check failed, 2 the request was wrong."""
    try:
        code = app(arguments, standalone_mode=False)
        if code == CTRL_C:
            raise KeyboardInterrupt
    except ClusterkitError as error:
        output.failure(error)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        output.err.print("stopped; the same command again goes on from here")
        sys.exit(1)
    except _ClickError as error:
        error.show()
        sys.exit(2)
    except Exception as error:
        output.unexpected(error)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
