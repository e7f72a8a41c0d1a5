"""Build the engine's image on the controller, once, and keep it as an archive named by its content.

`plan` is pure; `archive` works: pins by `clusterkit.wheels`, the base by mmdebstrap, the build by BuildKit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clusterkit import debian, wheels
from clusterkit.errors import ClusterkitError, ToolMissing
from clusterkit.wheels import Target, Wish

RECIPES = Path(__file__).resolve().parent.parent / "images" / "vllm"
REPOSITORY = "clusterkit/vllm"
BASE_REPOSITORY = "clusterkit/base"
# A newer client without buildx may stand before the distribution's own.
LAST_RESORT = "/usr/bin"


@dataclass(frozen=True)
class ImagePlan:
    """What an image is made from. `packages` are the base's, of Debian's release in `clusterkit.debian`."""

    recipe: str
    packages: tuple[str, ...]
    wish: Wish
    target: Target

    @property
    def inputs(self) -> str:
        """A digest of what was asked for: a host that has an image of these inputs needs no other."""
        return _digest([self._recipe_text(), debian.SUITE, self.packages, self.wish.digest(self.target)])

    def tag(self, pins: Sequence[str]) -> str:
        """The image's name: a digest of the inputs and of every pinned wheel."""
        return f"{REPOSITORY}-{self.recipe}:{_digest([self.inputs, list(pins)])}"

    def _recipe_text(self) -> str:
        return (RECIPES / self.recipe / "Dockerfile").read_text(encoding="utf-8")


def archive(plan: ImagePlan, *, store: Path, mirror: str = "") -> tuple[str, Path]:
    """(tag, path of the `docker save` archive); builds what is missing. Minutes the first time, then at once.

    `mirror` is a Debian mirror for the base; empty: this machine's own sources, or Debian's.
    Raises ToolMissing (Docker, BuildKit, mmdebstrap), ClusterkitError with the build's last words.
    """
    pins = wheels.lock(plan.wish, plan.target, store=store)
    tag = plan.tag(pins)
    path = store / "images" / f"{tag.rpartition(':')[2]}.tar"
    with wheels.locked(store, path.name):
        if path.exists():
            return tag, path
        docker = builder()
        if _run(docker, "image", "inspect", tag).returncode != 0:
            _build(docker, plan, pins, tag, store=store, mirror=mirror)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        try:
            _must(_run(docker, "save", "--output", str(partial), tag), f"the image {tag} could not be saved")
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return tag, path


def push(tag: str, registry: str, archive_path: Path) -> str:
    """Push the image to an on-prem registry; returns its name there. Raises ClusterkitError, ToolMissing."""
    docker = builder()
    name = f"{registry}/{tag}"
    if _run(docker, "image", "inspect", tag).returncode != 0:
        _must(_run(docker, "load", "--input", str(archive_path)), f"{archive_path} could not be loaded")
    _must(_run(docker, "tag", tag, name), f"{tag} could not be named {name}")
    _must(
        _run(docker, "push", name),
        f"the registry {registry} did not take {tag}",
        hint="does this machine reach it, and does its dockerd trust it (insecure-registries, certs.d)?",
    )
    return name


@cache
def builder() -> str:
    """A docker client with BuildKit and a daemon behind it: of several on PATH the first that has both.

    From 23 on BuildKit needs the plugin buildx; before, it is built in (Docker's release notes).
    """
    words = "there is no docker client on this machine"
    for folder in dict.fromkeys([*os.environ.get("PATH", os.defpath).split(os.pathsep), LAST_RESORT]):
        client = os.path.join(folder, "docker")
        if not os.access(client, os.X_OK):
            continue
        asked = _run(client, "version", "--format", "{{.Client.Version}}")
        version = asked.stdout.strip()
        if asked.returncode != 0:
            words = asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else f"{client} does not answer"
            continue
        if int(version.split(".")[0] or 0) < 23 or _run(client, "buildx", "version").returncode == 0:
            return client
        words = f"{client} {version} has no BuildKit: the plugin buildx is missing"
    raise ToolMissing(
        "Docker with BuildKit",
        hint=f"{words}. On Debian or Ubuntu: sudo apt install docker.io (and docker-buildx where there is one); "
        "or name an image that the hosts can pull: clusterkit_image",
    )


def _build(docker: str, plan: ImagePlan, pins: Sequence[str], tag: str, *, store: Path, mirror: str) -> None:
    base = _base(docker, plan.packages, mirror)
    house = wheels.wheelhouse(plan.wish, plan.target, pins, store=store)
    with tempfile.TemporaryDirectory(dir=store, prefix="context-") as folder:
        context = Path(folder)
        shutil.copy(RECIPES / plan.recipe / "Dockerfile", context / "Dockerfile")
        (context / "wheels").mkdir()
        with tarfile.open(house) as tar:
            tar.extractall(context / "wheels", filter="data")
        wanted = list(pins)
        if plan.wish.provides_vllm:
            shim = wheels.vllm_metadata_wheel(plan.wish.provides_vllm, store=store)
            shutil.copy(shim, context / "wheels" / shim.name)
            wanted.append(f"vllm=={plan.wish.provides_vllm}")
        (context / "wheels" / "pins.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
        command = [docker, "build", "--quiet", "--tag", tag, "--build-arg", f"BASE={base}"]
        command += ["--build-arg", f"INPUTS={plan.inputs}", str(context)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
            check=False,
        )
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise ClusterkitError(f"the image {tag} was not built:\n{last}", hint="run again: finished layers are kept")


def _base(docker: str, packages: Sequence[str], mirror: str) -> str:
    """The base image's tag; made by mmdebstrap where it is missing: no registry is asked."""
    sources = debian.debian_sources(mirror or None)
    tag = f"{BASE_REPOSITORY}:{_digest([debian.SUITE, list(packages), sources])}"
    if _run(docker, "image", "inspect", tag).returncode == 0:
        return tag
    with tempfile.TemporaryDirectory(prefix="clusterkit-base-") as folder:
        tarball = Path(folder) / "base.tar"
        debian.bootstrap(tarball, packages, sources)
        _must(_run(docker, "import", str(tarball), tag), "the base image could not be imported")
    return tag


def _must(done: subprocess.CompletedProcess[str], problem: str, *, hint: str | None = None) -> None:
    if done.returncode != 0:
        raise ClusterkitError(f"{problem}: {(done.stderr or done.stdout).strip()[-800:]}", hint=hint)


def _run(docker: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([docker, *words], capture_output=True, text=True, errors="replace", check=False)


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
