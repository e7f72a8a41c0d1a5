"""`clusterkit init`: the first inventory of a cluster, from flags or from answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from rich.markup import escape

from clusterkit import operations, scaffold, workspace
from clusterkit.cli import output
from clusterkit.cli.options import Json
from clusterkit.errors import SpecError, UsageError
from clusterkit.scaffold import Member, Runtime
from clusterkit.spec.facts import Accelerator

T = TypeVar("T")


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The cluster's name: lower case, digits, dashes.")],
    head: Annotated[str | None, typer.Option("--head", metavar="HOST=IP", help="Ray's head.")] = None,
    worker: Annotated[
        list[str] | None, typer.Option("--worker", metavar="HOST=IP", help="A host that runs models; once for each.")
    ] = None,
    one_box: Annotated[
        bool, typer.Option("--one-box", help="The head runs the models, and there is no other.")
    ] = False,
    accelerator: Annotated[Accelerator | None, typer.Option("--accelerator", help="What the models run on.")] = None,
    gpu_model: Annotated[
        str | None, typer.Option("--gpu-model", help="The GPU by Ray's name, such as AMD-Instinct-MI300X-OAM or H100.")
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs of each worker.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="Who logs in over SSH; left to ssh, unless you say.")
    ] = None,
    model_id: Annotated[str | None, typer.Option("--model-id", help="The name that clients send.")] = None,
    model_source: Annotated[
        str | None, typer.Option("--model-source", help="Absolute folder on the hosts, or tiny-llama (made there).")
    ] = None,
    stack: Annotated[
        str | None, typer.Option("--stack", help="A row of `clusterkit stacks`; default: the first that validates.")
    ] = None,
    runtime: Annotated[Runtime, typer.Option("--runtime", help="What Ray runs in.")] = "venv",
    image: Annotated[
        str | None, typer.Option("--image", help="Container runtime: an image that the hosts pull.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--directory", help="The folder to make; default inventory/NAME of the checkout.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a commented inventory that validates. Asks for what is missing, on a terminal.

    Touches no host and overwrites nothing.
    """
    folder = (directory or workspace.ROOT / "inventory" / scaffold.cluster_name(name)).absolute()
    if os.path.lexists(folder):
        raise UsageError(f"{folder} is there already, and nothing is overwritten", hint="name another: --directory")
    if one_box and worker:
        raise UsageError("--one-box is a cluster without workers", hint="leave out --worker, or --one-box")
    answers = _Answers(
        head=scaffold.member(head) if head is not None else None,
        workers=() if one_box else tuple(scaffold.member(text) for text in worker or ()) or None,
        accelerator=accelerator,
        gpu_model=gpu_model,
        gpus=gpus,
        user=user,
        model_id=model_id,
        model_source=model_source,
    )
    if missing := answers.missing():
        if not sys.stdin.isatty():
            raise UsageError(f"missing: {', '.join(missing)}", hint="give them, or run it on a terminal, which asks")
        answers.ask()
    request = answers.request(name, folder, stack=stack, runtime=runtime, image=image)
    made = operations.init(request)
    files = [str(path) for path in made.files]
    if as_json:
        findings = [finding.as_dict() for finding in made.findings]
        valid = not findings
        output.data(
            {"inventory": str(folder), "files": files, "stack": made.stack, "valid": valid, "findings": findings}
        )
        raise typer.Exit(0 if valid else 2)
    for file in files:
        output.err.print(f"wrote {escape(file)}")
    if made.findings:
        output.err.print(f"it does not validate yet: mend it there, then clusterkit validate -i {escape(str(folder))}")
        raise SpecError(made.findings)
    hosts = len(made.cluster["pools"][request.pool]["hosts"])
    output.err.print(f"[green]valid:[/] stack {made.stack}, pool {request.pool} with {hosts} host(s)")
    output.err.print(f"next: clusterkit plan -i {escape(str(folder))}, then deploy")
    output.out.print(str(folder), markup=False)


@dataclass
class _Answers:
    """What is known of the cluster so far."""

    head: Member | None
    workers: tuple[Member, ...] | None
    accelerator: Accelerator | None
    gpu_model: str | None
    gpus: int | None
    user: str | None
    model_id: str | None
    model_source: str | None

    def missing(self) -> list[str]:
        """The flags without which there is no inventory."""
        gpus = self.accelerator in {"rocm", "cuda"}
        flags = {
            "--head": self.head is None,
            "--worker (or --one-box)": self.workers is None,
            "--accelerator": self.accelerator is None,
            "--gpu-model": gpus and self.gpu_model is None,
            "--gpus": gpus and self.gpus is None,
        }
        return [flag for flag, lacks in flags.items() if lacks]

    def ask(self) -> None:
        """Ask for what is missing, and for what may be left out."""
        if self.head is None:
            self.head = _prompt("The head, as NAME=IP", scaffold.member)
        if self.workers is None:
            self.workers = _prompt(
                "The workers, as NAME=IP NAME=IP (none: the head does their work)", _members, default=""
            )
        if self.accelerator is None:
            self.accelerator = _prompt(f"Accelerator ({', '.join(get_args(Accelerator))})", _accelerator)
        if self.accelerator != "cpu":
            known = "AMD-Instinct-MI300X-OAM" if self.accelerator == "rocm" else "H100"
            self.gpu_model = self.gpu_model or _prompt("GPU model, by Ray's name", str, default=known)
            self.gpus = self.gpus or _prompt("GPUs of each worker", _number, default="8")
        if self.user is None:
            self.user = _prompt("Who logs in over SSH (empty: as ssh decides)", str, default="") or None
        if self.model_id is None:
            self.model_id = _prompt("Model, as clients will call it (empty: later)", str, default="") or None
        if self.model_id is not None and self.model_source is None:
            self.model_source = _prompt(f"Folder with its weights on the hosts (or {scaffold.MADE_MODEL})", str)

    def request(self, name: str, folder: Path, **rest: Any) -> scaffold.Request:
        assert self.head is not None
        assert self.workers is not None
        assert self.accelerator is not None
        return scaffold.Request(
            name=name,
            folder=folder,
            head=self.head,
            workers=self.workers,
            accelerator=self.accelerator,
            gpu_model=self.gpu_model,
            gpus=self.gpus or 0,
            user=self.user,
            model_id=self.model_id,
            model_source=self.model_source,
            **rest,
        )


def _prompt(text: str, read: Callable[[str], T], default: str | None = None) -> T:
    """Asks until the answer can be read."""

    def value(answer: str) -> T:
        try:
            return read(answer.strip())
        except UsageError as error:
            raise typer.BadParameter("; ".join(filter(None, (error.message, error.hint)))) from None

    found: T = typer.prompt(text, default=default, value_proc=value, show_default=bool(default), err=True)
    return found


def _members(text: str) -> tuple[Member, ...]:
    return tuple(scaffold.member(word) for word in text.split())


def _accelerator(text: str) -> Accelerator:
    for known in get_args(Accelerator):
        if text == known:
            found: Accelerator = known
            return found
    raise UsageError(f"one of {', '.join(get_args(Accelerator))}")


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError("a whole number, at least 1")
    return int(text)
