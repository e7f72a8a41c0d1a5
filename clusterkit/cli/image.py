"""`clusterkit image`: what the engine's image is made of, and building it, once, here or on the builder host."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from clusterkit import image_plan, images, operations, runner, wheels, workspace
from clusterkit import registry as registries
from clusterkit.cli import output
from clusterkit.cli.options import READS, Given, Inventory, Json, takes
from clusterkit.errors import ClusterkitError, UsageError
from clusterkit.image_plan import SourceImage
from clusterkit.tunnel import Way

app = typer.Typer(
    no_args_is_help=True,
    help="The engine's image: what it is made of, built here or on the builder host, pushed to the site's registry.",
)

# A build of kernels writes thousands of lines; the log has them all.
SHOWN_WIDTH = 160
# Of playbooks/images.yml: Ansible knows how it logs in.
REACHED_TASK = "Read how Ansible reaches the builder"

Plain = Annotated[bool, typer.Option("--plain", help="Without BuildKit, even where there is one.")]


@dataclass(frozen=True)
class Wanted:
    """What an inventory asks for: an image that is given, or one to build. `at`: the builder host, where it has one."""

    cluster: dict[str, Any]
    at: Way | None
    store: Path
    given: str | None
    plan: images.WheelImage | SourceImage | None
    tag: str
    made_of: dict[str, str]

    @property
    def missing(self) -> list[str]:
        if self.given is not None or not isinstance(self.plan, SourceImage):
            return []
        return [*self.plan.missing, *([self.plan.unresolved] if self.plan.unresolved else [])]

    @property
    def archive(self) -> Path | None:
        path = images.archive_of(self.tag, store=self.store)
        return path if self.plan is not None and path.exists() else None

    def expected(self) -> dict[str, object]:
        """What an image that is given has to hold: the row's versions, for the pools' GPUs."""
        if isinstance(self.plan, SourceImage):
            return self.plan.expected()
        stack = self.cluster["stack"]
        return {"ray": stack["ray"], "vllm": stack["vllm"], "device": stack["accelerator"]}


@app.command("plan")
@takes(*READS)
def plan_(given: Given, inventory: Inventory = None, plain: Plain = False, as_json: Json = False) -> None:
    """The rendered recipe, its arguments, the tag, and why it would be built. Builds nothing."""
    wanted = _wanted(given, inventory, again=True)
    why, place = _why(wanted), _place(wanted)
    plain = plain or (place is not None and not place.buildkit)
    dockerfile = wanted.plan.dockerfile(plain=plain) if wanted.plan is not None and wanted.given is None else ""
    if as_json:
        output.data(
            {
                "image": wanted.given or wanted.tag,
                "prebuilt": wanted.given is not None,
                "built": wanted.archive is not None,
                "archive": str(wanted.archive) if wanted.archive else None,
                "made_of": wanted.made_of,
                "dockerfile": dockerfile,
                "expected": wanted.expected(),
                "missing": wanted.missing,
                "builder": wanted.at.host if wanted.at else None,
                "buildkit": not plain,
                "jobs": place.jobs if place else None,
                "why": why,
            }
        )
        return
    draft = " (not its last name: something is missing)" if wanted.missing else ""
    output.out.print(f"image: {wanted.given or wanted.tag}{draft}", markup=False)
    for key, value in wanted.made_of.items():
        output.out.print(f"  {key}: {value}", markup=False)
    for line in why:
        output.out.print(f"why: {line}", markup=False)
    if dockerfile:
        how = f"{_where(wanted)}, {'without' if plain else 'with'} BuildKit"
        output.out.print(f"built: on {how}; jobs: {place.jobs}, by its cores and memory" if place else "", markup=False)
        output.out.print(f"\n{dockerfile}", markup=False)
    for line in wanted.missing:
        output.err.print(f"[red]missing:[/] {escape(line)}")


@app.command()
@takes(*READS)
def build(given: Given, inventory: Inventory = None, plain: Plain = False, as_json: Json = False) -> None:
    """Build the image, unless it is built, and try what is inside. One that is given is pulled and tried.

    It is built on the host of the group image_builder where there is one, else here; its archive lies here anyway.

    Exit code 2 where something has to be pinned first, 1 where the build or the test inside failed; hosts then keep
    the image that they have. The same command again goes on from the last finished layer.
    """
    wanted = _wanted(given, inventory, again=True)
    if wanted.given is not None:
        holds = images.check(wanted.given, wanted.expected(), at=wanted.at)
        result = {"image": wanted.given, "prebuilt": True, "built": False, "archive": None, "holds": holds}
        words = f"{wanted.given} holds what it should: {', '.join(f'{key} {holds[key]}' for key in ('vllm', 'ray'))}"
    else:
        assert wanted.plan is not None
        site = images.Site.of(wanted.cluster["stack"]["image"])
        made = images.archive(
            wanted.plan,
            store=wanted.store,
            site=site,
            at=wanted.at,
            buildkit="never" if plain else "auto",
            on_line=_live(),
        )
        result = {"image": made.tag, "prebuilt": False, "built": made.built, "archive": str(made.archive)}
        words = f"{made.tag} is {'built' if made.built else 'built already'}: {made.archive}"
    if as_json:
        output.data(result)
    else:
        output.err.print(f"[green]done:[/] {escape(words)}")


@app.command()
@takes(*READS)
def push(
    given: Given,
    inventory: Inventory = None,
    registry: Annotated[
        str | None,
        typer.Option(
            "--registry", metavar="HOST[:PORT]", help="Default: clusterkit_image_registry, or the group `registry`."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring the image that was built to the site's registry."""
    wanted = _wanted(given, inventory, again=False)
    where = registry or wanted.cluster["image_registry"]
    if not where:
        raise UsageError(
            "which registry?", hint="a host in the group registry, clusterkit_image_registry, or --registry HOST:PORT"
        )
    own = wanted.cluster["registry"]
    if own and own["proxy"] and where == own["address"]:
        raise UsageError(
            f"{where} is a pull-through cache: it cannot be pushed to",
            hint="push to the registry behind it: clusterkit_image_registry",
        )
    if wanted.given is not None:
        raise UsageError(f"{wanted.given} is an image that is given: nothing was built here")
    if wanted.archive is None:
        raise UsageError(f"{wanted.tag} is not built", hint="clusterkit image build, first")
    if own and where == own["address"]:
        own = registries.own(wanted.cluster, store=wanted.store)
    done = images.push(wanted.tag, where, wanted.archive, own, store=wanted.store, at=wanted.at)
    if as_json:
        output.data({"image": done.reference, "layers": done.layers, "sent_layers": done.sent_layers})
    else:
        moved = f", {done.sent_layers} of {done.layers} layers moved" if done.layers else ""
        output.err.print(f"[green]done:[/] {escape(done.reference)}{moved}")


@app.command()
@takes(*READS)
def inspect(
    given: Given,
    reference: Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="Default: the inventory's.")] = None,
    inventory: Inventory = None,
    as_json: Json = False,
) -> None:
    """What an image in the Docker that builds says of itself: versions, commit, architectures, inputs."""
    at = None
    if reference is None or inventory is not None:
        wanted = _wanted(given, inventory, again=False)
        reference, at = reference or wanted.given or wanted.tag, wanted.at
    found = images.inspect(reference, at=at)
    if as_json:
        output.data({"image": reference, **found})
        return
    output.out.print(f"image: {reference}\nid: {found['id']}\nsize: {found['size'] / 2**30:.2f} GiB", markup=False)
    for key, value in sorted(found["labels"].items()):
        output.out.print(f"{key}: {value}", markup=False)


def _wanted(given: Given, inventory: str | None, *, again: bool) -> Wanted:
    source, options = workspace.inventory(inventory), given.options()
    cluster = operations.validate(source, options)
    at = _builder(cluster, source, options)
    store, stack = workspace.cache_home(), cluster["stack"]
    recipe, chosen = stack["image"], cluster["image"]
    if recipe is None and chosen is None:
        raise UsageError(f"the row {stack['name']!r} of the version table has no recipe for an image")
    if chosen is not None and (recipe is None or "source" not in recipe):
        return Wanted(cluster, at, store, chosen, None, "", {})
    if chosen is not None:
        # Only what it has to hold is asked of the recipe: no repository needs to answer for that.
        recipe = {**recipe, "ref": "0" * 40, "patches": ""}
    wish = wheels.wish_from({**stack["engine"], "index_url": cluster["mirrors"]["pypi"] or ""})
    plan = images.planned(recipe, wish, os.uname().machine, store=store, again=again, draft=True)
    if chosen is not None:
        return Wanted(cluster, at, store, chosen, plan, "", {})
    tag, made_of = images.name(plan, store=store)
    return Wanted(cluster, at, store, None, plan, tag, made_of)


def _builder(cluster: dict[str, Any], inventory: str, options: runner.Options) -> Way | None:
    """How the host of the group image_builder is reached."""
    host = cluster["image_builder"]
    if host is None:
        return None
    result = runner.run("images.yml", inventory, replace(options, tags="image_builder"))
    return Way.of(result.results[REACHED_TASK][host]["reached"])


def _place(wanted: Wanted) -> images.Workplace | None:
    """What would build; None where nothing has to, or nothing is there to ask on this machine."""
    if wanted.given is not None:
        return None
    try:
        with images.docker_at(wanted.at) as docker:
            return images.workplace(docker)
    except ClusterkitError:
        if wanted.at is not None:
            raise
        return None


def _where(wanted: Wanted) -> str:
    return wanted.at.host if wanted.at else "this machine"


def _why(wanted: Wanted) -> list[str]:
    if wanted.given is not None:
        return ["clusterkit_image names it; `image build` pulls it and tries what it holds"]
    if wanted.archive is not None:
        return [f"nothing: it is built, {wanted.archive}"]
    assert wanted.plan is not None
    before = images.last_built(wanted.plan.recipe, store=wanted.store)
    return image_plan.why(before, wanted.made_of) or ["its archive is gone"]


def _live() -> images.OnLine:
    started = time.monotonic()

    def show(line: str) -> None:
        if line.strip():
            output.err.print(f"[dim]{time.monotonic() - started:6.0f} s[/] {escape(line[:SHOWN_WIDTH])}")

    return show
