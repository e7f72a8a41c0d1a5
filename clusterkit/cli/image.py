"""`clusterkit image`: what the engine's image is made of, and building it on this machine, once."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from clusterkit import image_plan, images, operations, wheels, workspace
from clusterkit import registry as registries
from clusterkit.cli import output
from clusterkit.cli.options import READS, Given, Inventory, Json, takes
from clusterkit.errors import UsageError
from clusterkit.image_plan import SourceImage

app = typer.Typer(
    no_args_is_help=True,
    help="The engine's image: what it is made of, built on this machine, pushed to the site's registry.",
)

# A build of kernels writes thousands of lines; the log has them all.
SHOWN_WIDTH = 160


@dataclass(frozen=True)
class Wanted:
    """What an inventory asks for: an image that is given, or one to build."""

    cluster: dict[str, Any]
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
def plan_(given: Given, inventory: Inventory = None, as_json: Json = False) -> None:
    """The rendered recipe, its arguments, the tag, and why it would be built. Builds nothing."""
    wanted = _wanted(given, inventory, again=True)
    why = _why(wanted)
    dockerfile = wanted.plan.dockerfile() if wanted.plan is not None and wanted.given is None else ""
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
                "jobs": images.jobs(),
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
        output.out.print(f"jobs: {images.jobs()}, by cores and memory of this machine", markup=False)
        output.out.print(f"\n{dockerfile}", markup=False)
    for line in wanted.missing:
        output.err.print(f"[red]missing:[/] {escape(line)}")


@app.command()
@takes(*READS)
def build(given: Given, inventory: Inventory = None, as_json: Json = False) -> None:
    """Build the image here, unless it is built, and try what is inside. One that is given is pulled and tried.

    Exit code 2 where something has to be pinned first, 1 where the build or the test inside failed; hosts then keep
    the image that they have. The same command again goes on from the last finished layer.
    """
    wanted = _wanted(given, inventory, again=True)
    if wanted.given is not None:
        holds = images.check(wanted.given, wanted.expected())
        result = {"image": wanted.given, "prebuilt": True, "built": False, "archive": None, "holds": holds}
        words = f"{wanted.given} holds what it should: {', '.join(f'{key} {holds[key]}' for key in ('vllm', 'ray'))}"
    else:
        assert wanted.plan is not None
        site = images.Site.of(wanted.cluster["stack"]["image"])
        made = images.archive(wanted.plan, store=wanted.store, site=site, on_line=_live())
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
    done = images.push(wanted.tag, where, wanted.archive, own, store=wanted.store)
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
    """What an image in this machine's Docker says of itself: versions, commit, architectures, inputs."""
    if reference is None:
        wanted = _wanted(given, inventory, again=False)
        reference = wanted.given or wanted.tag
    found = images.inspect(reference)
    if as_json:
        output.data({"image": reference, **found})
        return
    output.out.print(f"image: {reference}\nid: {found['id']}\nsize: {found['size'] / 2**30:.2f} GiB", markup=False)
    for key, value in sorted(found["labels"].items()):
        output.out.print(f"{key}: {value}", markup=False)


def _wanted(given: Given, inventory: str | None, *, again: bool) -> Wanted:
    cluster = operations.validate(workspace.inventory(inventory), given.options())
    store, stack = workspace.cache_home(), cluster["stack"]
    recipe, chosen = stack["image"], cluster["image"]
    if recipe is None and chosen is None:
        raise UsageError(f"the row {stack['name']!r} of the version table has no recipe for an image")
    if chosen is not None and (recipe is None or "source" not in recipe):
        return Wanted(cluster, store, chosen, None, "", {})
    if chosen is not None:
        # Only what it has to hold is asked of the recipe: no repository needs to answer for that.
        recipe = {**recipe, "ref": "0" * 40, "patches": ""}
    wish = wheels.wish_from({**stack["engine"], "index_url": cluster["mirrors"]["pypi"] or ""})
    plan = images.planned(recipe, wish, os.uname().machine, store=store, again=again, draft=True)
    if chosen is not None:
        return Wanted(cluster, store, chosen, plan, "", {})
    tag, made_of = images.name(plan, store=store)
    return Wanted(cluster, store, None, plan, tag, made_of)


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
