"""Build the engine's image once, and keep it on the controller as an archive named by its content.

Two kinds: from released wheels on Debian (`WheelImage`), and vLLM from source on a vendor's base
(`clusterkit.image_plan.SourceImage`). Both are built by BuildKit where there is one, else by what Docker had before,
tried by images/vllm/smoke.py, and then named: what was not built whole, or does not hold what it should, gets no name,
and hosts keep the image that they have.

`at` says whose Docker builds: a `clusterkit.tunnel.Way`; None is this machine's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from clusterkit import debian, image_plan, registry, tunnel, wheels
from clusterkit.errors import ClusterkitError, ToolMissing, UsageError
from clusterkit.image_plan import BASE_REPOSITORY, COMMIT, RECIPES, REPOSITORY, Patch, SourceImage, digest
from clusterkit.tunnel import Way
from clusterkit.wheels import Target, Wish

# The first of Docker's APIs whose daemon has BuildKit built in: 18.09's (its release notes).
BUILDKIT_API = (1, 39)
# A newer client without buildx may stand before the distribution's own.
LAST_RESORT = "/usr/bin"
FETCH_TIMEOUT_S = 900
SMOKE_TIMEOUT_S = 1800
# Of each recipe, those that were asked for last: several clusters may have one each.
ARCHIVES_KEPT = 3

BUILDKIT_WAY = "use Docker with BuildKit (from 23 on, the plugin buildx beside this machine's docker client)"

OnLine = Callable[[str], None]
# `auto`: where it is there.
BuildKit = Literal["auto", "never"]


def _quiet(_line: str) -> None:
    return None


@dataclass(frozen=True)
class WheelImage:
    """Made from released wheels. `packages` are the base's, of Debian's release in `clusterkit.debian`."""

    recipe: str
    packages: tuple[str, ...]
    wish: Wish
    target: Target

    @property
    def inputs(self) -> str:
        """A digest of what was asked for: a host that has an image of these inputs needs no other."""
        return digest([self.dockerfile(), debian.SUITE, self.packages, self.wish.digest(self.target)])

    def tag(self, pins: Sequence[str]) -> str:
        """The image's name: a digest of the inputs and of every pinned wheel."""
        return f"{REPOSITORY}-{self.recipe}:{digest([self.inputs, list(pins)])}"

    def dockerfile(self, *, plain: bool = False) -> str:
        """The recipe, rendered; `plain`: for Docker's builder before BuildKit."""
        return image_plan.rendered(self.recipe, plain=plain)

    def made_of(self, pins: Sequence[str]) -> dict[str, str]:
        """Every input by name, as `SourceImage.made_of`."""
        return {
            "recipe": digest(self.dockerfile()),
            "base": f"Debian {debian.SUITE} with {' '.join(self.packages)}",
            "python": self.target.python,
            "machine": self.target.machine,
            **{f"wheel {pin.partition('==')[0]}": pin.partition("==")[2] for pin in pins},
        }


@dataclass(frozen=True)
class Site:
    """Where a build gets its things from; none of it names another image."""

    index_url: str = ""
    ca_bundle: str = ""
    proxy: Mapping[str, Any] = field(default_factory=dict)
    debian_mirror: str = ""

    @classmethod
    def of(cls, recipe: Mapping[str, Any], *, debian_mirror: str = "") -> Site:
        """As the published recipe of a cluster has it."""
        known = {key: recipe[key] for key in ("index_url", "ca_bundle", "proxy") if recipe.get(key)}
        return cls(debian_mirror=debian_mirror, **known)


@dataclass(frozen=True)
class Built:
    """An image that can be used: its tag, its archive, and whether it was built just now."""

    tag: str
    archive: Path
    built: bool


@dataclass(frozen=True)
class Workplace:
    """What a docker client and the machine behind it build with. `machine` is an architecture, such as x86_64."""

    docker: str
    cores: int
    memory_gib: float
    machine: str
    buildkit: bool

    @property
    def jobs(self) -> int:
        """How many compilers a build runs at once there."""
        return image_plan.jobs(self.cores, self.memory_gib)


def planned(
    recipe: Mapping[str, Any], wish: Wish, machine: str, *, store: Path, again: bool = False, draft: bool = False
) -> WheelImage | SourceImage:
    """What the published recipe of a cluster asks for.

    A tag or branch is resolved once and kept in `store`, so that a deploy does not begin a build because a branch
    moved; `again` asks the repository. Raises UsageError where a patch cannot be read or there is no such ref,
    ClusterkitError where the repository does not answer; for a `draft` that is kept in the plan instead.
    """
    if recipe.get("glibc"):
        target = Target(recipe["python"], recipe["glibc"], machine)
        return WheelImage(recipe["recipe"], tuple(recipe["packages"]), wish, target)
    device = recipe["arguments"].get("VLLM_TARGET_DEVICE", recipe["recipe"])
    if device not in image_plan.REQUIREMENTS:
        known = ", ".join(image_plan.REQUIREMENTS)
        raise UsageError(f"clusterkit_image_arguments: VLLM_TARGET_DEVICE is {device!r}", hint=f"one of {known}")
    commit = unresolved = ""
    try:
        commit = resolve(recipe["source"], recipe["ref"], store=store, again=again, ca_bundle=recipe["ca_bundle"])
    except ClusterkitError as error:
        if not draft or isinstance(error, UsageError | ToolMissing):
            raise
        unresolved = f"{error.message}. {error.hint}"
    return SourceImage(
        recipe=recipe["recipe"],
        base=recipe["base"],
        base_recipe=recipe["base_recipe"],
        source=recipe["source"],
        ref=recipe["ref"],
        commit=commit,
        vllm=recipe["vllm"],
        ray=tuple(recipe["ray"]),
        archs=tuple(recipe["archs"]),
        unknown_models=tuple(recipe["unknown_models"]),
        arguments=tuple(sorted(recipe["arguments"].items())),
        patches=patches(recipe["patches"]),
        unresolved=unresolved,
    )


def patches(folder: str) -> tuple[Patch, ...]:
    """The *.patch files of a folder, by name. Raises UsageError where it cannot be read or holds none."""
    if not folder:
        return ()
    try:
        found = tuple(
            Patch(file.name, file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob("*.patch"))
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"clusterkit_image_patches: {error}", hint="patches are text files, as git diff writes"
        ) from None
    if not found:
        raise UsageError(
            f"clusterkit_image_patches: there is no *.patch file in {folder}", hint="take the variable out, or mend it"
        )
    return found


def resolve(source: str, ref: str, *, store: Path, again: bool = False, ca_bundle: str = "") -> str:
    """The commit of a tag or branch; a commit is one already. Asks the repository with `git ls-remote`."""
    if COMMIT.fullmatch(ref):
        return ref
    kept = store / "images" / "refs" / f"{digest([source, ref])}.txt"
    if kept.exists() and not again:
        return kept.read_text(encoding="utf-8").strip()
    names = [f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", f"refs/heads/{ref}"]
    asked = _git("ls-remote", "--", source, *names, ca_bundle=ca_bundle)
    if asked.returncode != 0:
        raise ClusterkitError(
            f"vLLM's repository {image_plan.without_credentials(source)} does not answer: {_last(asked.stderr)}",
            hint="clusterkit_image_source names a mirror or a folder; a 40-digit clusterkit_image_ref needs no answer",
        )
    answers = {name: commit for commit, _, name in (line.partition("\t") for line in asked.stdout.splitlines())}
    # A tag with a message is an object of its own; `^{}` is the commit behind it.
    commit = next((answers[name] for name in names if name in answers), None)
    if commit is None:
        raise UsageError(
            f"there is no tag or branch {ref!r} in {image_plan.without_credentials(source)}",
            hint="clusterkit_image_ref names a tag, a branch, or a commit by all its 40 digits",
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(commit + "\n", encoding="utf-8")
    return commit


def name(plan: WheelImage | SourceImage, *, store: Path) -> tuple[str, dict[str, str]]:
    """(tag, every input by name). A plan from wheels is resolved by uv the first time."""
    if isinstance(plan, SourceImage):
        return plan.tag, plan.made_of
    pins = wheels.lock(plan.wish, plan.target, store=store)
    return plan.tag(pins), plan.made_of(pins)


def archive_of(tag: str, *, store: Path) -> Path:
    """Where the `docker save` archive of an image lies, once it is built."""
    return store / "images" / f"{tag.rpartition(':')[2]}.tar"


def last_built(recipe: str, *, store: Path) -> dict[str, str] | None:
    """The inputs of the image of this recipe that was built last; None where none is known."""
    records = sorted((store / "images").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for record in records:
        data = json.loads(record.read_text(encoding="utf-8"))
        if data.get("recipe") == recipe:
            return dict(data["made_of"])
    return None


def archive(
    plan: WheelImage | SourceImage,
    *,
    store: Path,
    site: Site | None = None,
    at: Way | None = None,
    machine: str = "",
    buildkit: BuildKit = "auto",
    on_line: OnLine = _quiet,
) -> Built:
    """The image's archive; builds what is missing. Minutes the first time (hours from source), then at once.

    `machine`: the architecture that the image has to be for. `on_line` gets the build's log as it comes. Raises
    UsageError where something has to be pinned first, ToolMissing (ssh, Docker, git, mmdebstrap), ClusterkitError with
    the failed step and its last lines. How it is built has no part in its name.
    """
    where = site or Site()
    if isinstance(plan, SourceImage) and plan.missing:
        raise UsageError("the image cannot be built yet", hint="\n".join(plan.missing))
    if isinstance(plan, SourceImage) and plan.unresolved:
        raise ClusterkitError("the image cannot be built", hint=plan.unresolved)
    tag, made_of = name(plan, store=store)
    path = archive_of(tag, store=store)
    machine = plan.target.machine if isinstance(plan, WheelImage) else machine
    with wheels.locked(store, path.name):
        if path.exists():
            _for_machine(machine, _machine_of(path), f"the archive {path}", "delete it: then it is built anew")
            os.utime(path)
            return Built(tag, path, built=False)
        with docker_at(at) as docker:
            place = workplace(docker)
            _for_machine(
                machine,
                place.machine,
                f"the Docker of {at.host if at else 'this machine'}",
                "put a host of that architecture into the group image_builder, or name an image: clusterkit_image",
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            if _run(docker, "image", "inspect", tag).returncode != 0:
                plain = buildkit == "never" or not place.buildkit
                if plain:
                    on_line("built without BuildKit: without caches that outlive a step, one step at a time")
                log = path.with_suffix(".log")
                if isinstance(plan, SourceImage):
                    _build_source(place, plan, store=store, site=where, plain=plain, log=log, on_line=on_line)
                else:
                    _build_wheels(docker, plan, store=store, site=where, plain=plain, log=log, on_line=on_line)
            partial = path.with_suffix(".part")
            on_line(f"to the archive {path}")
            try:
                _must(_run(docker, "save", "--output", str(partial), tag), f"the image {tag} could not be saved")
                record = {"recipe": plan.recipe, "tag": tag, "made_of": made_of, "machine": place.machine}
                path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
    forget_archives(plan.recipe, store=store)
    return Built(tag, path, built=True)


def _machine_of(archive: Path) -> str:
    """The architecture of an image that was built; empty where its record does not say."""
    try:
        return str(json.loads(archive.with_suffix(".json").read_text(encoding="utf-8")).get("machine") or "")
    except FileNotFoundError:
        return ""


def _for_machine(wanted: str, found: str, what: str, hint: str) -> None:
    if wanted and found and wanted != found:
        raise ClusterkitError(f"{what} is for {found}, and the image has to be for {wanted}", hint=hint)


def forget_archives(recipe: str, *, store: Path, keep: int = ARCHIVES_KEPT) -> list[Path]:
    """Take away a recipe's archives but for those that were asked for last, with their records and logs. A host that
    needs one of them again has it built anew. Returns the archives that went.
    """
    used: dict[Path, float] = {}
    for record in (store / "images").glob("*.json"):
        # Another run may be at the same.
        with suppress(FileNotFoundError):
            if json.loads(record.read_text(encoding="utf-8")).get("recipe") == recipe:
                path = record.with_suffix(".tar")
                used[path] = path.stat().st_mtime
    gone = sorted(used, key=lambda path: -used[path])[keep:]
    for path in gone:
        for suffix in (".tar", ".json", ".log"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    return gone


def push(
    tag: str,
    to: str,
    archive_path: Path,
    own: Mapping[str, Any] | None = None,
    *,
    store: Path,
    at: Way | None = None,
) -> registry.Pushed:
    """Bring the image to a registry. `own`: the cluster's own, see `clusterkit.registry`: the archive goes there from
    here. Another one is pushed to by the Docker that builds, with this machine's logins. Many hosts ask at once: one
    pushes. Raises ClusterkitError, ToolMissing.
    """
    with wheels.locked(store, f"push-{archive_path.name}"):
        if own and own["address"] == to:
            return registry.push(archive_path, tag, own)
        name = f"{to}/{tag}"
        with docker_at(at) as docker:
            if _run(docker, "image", "inspect", tag).returncode != 0:
                _must(_run(docker, "load", "--input", str(archive_path)), f"{archive_path} could not be loaded")
            _must(_run(docker, "tag", tag, name), f"{tag} could not be named {name}")
            _must(
                _run(docker, "push", name),
                f"the registry {to} did not take {tag}",
                hint=f"does {at.host if at else 'this machine'} reach it, and does its dockerd trust it "
                "(insecure-registries, certs.d)? A host in the group `registry` is pushed to without dockerd",
            )
        return registry.Pushed(name, (), 0, 0, 0)


def inspect(reference: str, *, at: Way | None = None) -> dict[str, Any]:
    """What an image in the Docker that builds says of itself: id, size in bytes, digests and labels.

    Raises UsageError where there is no such image.
    """
    with docker_at(at) as docker:
        done = _run(docker, "image", "inspect", reference)
    if done.returncode != 0:
        raise UsageError(
            f"{reference} is not on {at.host if at else 'this machine'}: {_last(done.stderr)}",
            hint="clusterkit image build, first",
        )
    (image,) = json.loads(done.stdout)
    return {
        "id": image["Id"],
        "size": image["Size"],
        "digests": image.get("RepoDigests") or [],
        "labels": image["Config"].get("Labels") or {},
    }


def check(reference: str, expected: Mapping[str, Any], *, at: Way | None = None) -> dict[str, Any]:
    """What a given image holds (pulled where it is missing). Raises ClusterkitError where that is not `expected`."""
    with docker_at(at) as docker:
        if _run(docker, "image", "inspect", reference).returncode != 0:
            _must(
                _run(docker, "pull", "--quiet", reference),
                f"{reference} could not be pulled",
                hint=f"does {at.host if at else 'this machine'} reach the registry, and does its dockerd trust it?",
            )
        return smoke(docker, reference, expected, named=reference)


def smoke(docker: str, image: str, expected: Mapping[str, Any], *, named: str) -> dict[str, Any]:
    """Run images/vllm/smoke.py in an image, without network or device. Raises ClusterkitError with what is wrong."""
    container = f"clusterkit-smoke-{uuid.uuid4().hex[:12]}"
    words = ["--rm", "--interactive", "--name", container, "--network", "none", "--shm-size", "1g"]
    try:
        done = subprocess.run(
            [docker, "run", *words, "--entrypoint", "python3", image, "-", json.dumps(dict(expected))],
            input=(RECIPES / "smoke.py").read_text(encoding="utf-8"),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SMOKE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        # The client is gone, the container is not.
        _run(docker, "rm", "--force", container)
        raise ClusterkitError(f"{named} did not end its test within {SMOKE_TIMEOUT_S} s") from None
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise ClusterkitError(
            f"{named} does not hold what it should:\n{last}", hint="it is not used: what is in use stays as it is"
        )
    # Ray and vLLM may write to stdout, too.
    return dict(json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))))


@contextmanager
def docker_at(at: Way | None) -> Iterator[str]:
    """A docker client. Inside, whatever this process asks Docker is asked there. Raises as `tunnel.opened`,
    and ToolMissing.
    """
    with tunnel.opened(at) as socket, _asking(socket):
        yield builder()


@contextmanager
def _asking(socket: str | None) -> Iterator[None]:
    if socket is None:
        yield
        return
    ours = {"DOCKER_HOST": f"unix://{socket}", "DOCKER_CONTEXT": None, "DOCKER_TLS_VERIFY": None, "DOCKER_TLS": None}
    before = {key: os.environ.get(key) for key in ours}

    def put(values: Mapping[str, str | None]) -> None:
        for key, value in values.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        # Which client fits depends on the daemon.
        builder.cache_clear()

    put(ours)
    try:
        yield
    finally:
        put(before)


@cache
def builder() -> str:
    """A docker client with a daemon behind it: of several on PATH the first with BuildKit, else the first."""
    words, plain = "there is no docker client on this machine", ""
    for folder in dict.fromkeys([*os.environ.get("PATH", os.defpath).split(os.pathsep), LAST_RESORT]):
        client = os.path.join(folder, "docker")
        if not os.access(client, os.X_OK):
            continue
        try:
            if knows_buildkit(client):
                return client
        except ClusterkitError as error:
            words = error.message
            continue
        plain = plain or client
    if plain:
        return plain
    raise ToolMissing(
        "Docker",
        hint=f"{words}. On Debian or Ubuntu: sudo apt install docker.io (and docker-buildx where there is one); "
        "or name an image that the hosts pull: clusterkit_image",
    )


def knows_buildkit(client: str) -> bool:
    """Whether this client and the daemon that it asks can build with BuildKit.

    From 23 on a client needs the plugin buildx for it; before, it is built in (Docker's release notes). Raises
    ClusterkitError where no daemon answers.
    """
    asked = _run(client, "version", "--format", "{{.Client.Version}} {{.Server.APIVersion}}")
    if asked.returncode != 0:
        raise ClusterkitError(f"{client}: {_last(asked.stderr)}")
    version, api = asked.stdout.split()
    if tuple(int(part) for part in api.split(".")) < BUILDKIT_API:
        return False
    return int(version.split(".")[0]) < 23 or _run(client, "buildx", "version").returncode == 0


def workplace(docker: str) -> Workplace:
    """What a docker client and its daemon build with. Raises ClusterkitError where it does not say."""
    asked = _run(docker, "info", "--format", "{{.NCPU}} {{.MemTotal}} {{.Architecture}}")
    _must(asked, "Docker does not say what machine it runs on")
    cores, memory, machine = asked.stdout.split()
    return Workplace(docker, int(cores), int(memory) / 2**30, machine, knows_buildkit(docker))


# --------------------------------------------------------------------------- one build


def build(
    docker: str,
    tag: str,
    context: Path,
    *,
    log: Path,
    arguments: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    secrets: Mapping[str, Path] | None = None,
    expected: Mapping[str, Any] | None = None,
    plain: bool = False,
    on_line: OnLine = _quiet,
) -> None:
    """One `docker build` of a folder with a Dockerfile; the tag is given at the end, after the smoke test if any.

    `plain`: without BuildKit, and so without secrets. The whole log is in `log`, and comes to `on_line` line by line.
    Raises ClusterkitError with the failed step and its last 20 lines; finished layers stay, so the next build goes on
    there.
    """
    # Both name each step as it begins. A step that failed in a plain build leaves no container behind.
    how = ["--force-rm"] if plain else ["--progress", "plain"]
    command = [docker, "build", *how, "--iidfile", str(log.with_suffix(".iid"))]
    for key, value in (arguments or {}).items():
        command += ["--build-arg", f"{key}={value}"]
    for key, value in (labels or {}).items():
        command += ["--label", f"{key}={value}"]
    for key, file in (secrets or {}).items():
        command += ["--secret", f"id={key},src={file}"]
    lines: list[str] = []
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            [*command, str(context)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "DOCKER_BUILDKIT": "0" if plain else "1"},
        ) as running,
    ):
        assert running.stdout is not None
        try:
            for line in running.stdout:
                kept.write(line)
                kept.flush()
                lines.append(line.rstrip())
                on_line(lines[-1])
        except BaseException:
            # Nobody reads on: it would wait for that for ever.
            running.terminate()
            raise
    if running.returncode != 0:
        step, last = image_plan.failed_step(lines)
        where = f" in the step {step}" if step else ""
        raise ClusterkitError(
            f"the image {tag} was not built; it failed{where}:\n" + "\n".join(last),
            hint=f"the whole log: {log}. Run again: finished layers are kept; hosts keep the image that they have",
        )
    identity = log.with_suffix(".iid").read_text(encoding="utf-8").strip()
    log.with_suffix(".iid").unlink()
    if expected is not None:
        on_line("smoke test inside the image")
        try:
            said = smoke(docker, identity, expected, named=f"the image that was to be {tag}")
        except ClusterkitError:
            # Its steps stay for the next build; without a name it would only take room.
            _run(docker, "image", "rm", "--no-prune", identity)
            raise
        on_line(json.dumps(said))
    _must(_run(docker, "tag", identity, tag), f"the image could not be named {tag}")


def _build_wheels(
    docker: str, plan: WheelImage, *, store: Path, site: Site, plain: bool, log: Path, on_line: OnLine
) -> None:
    pins = wheels.lock(plan.wish, plan.target, store=store)
    tag, made_of = plan.tag(pins), plan.made_of(pins)
    base = _debian_base(docker, plan.packages, site.debian_mirror)
    house = wheels.wheelhouse(plan.wish, plan.target, pins, store=store)
    versions = dict(pin.split("==", 1) for pin in pins)
    with _context(store) as context:
        (context / "Dockerfile").write_text(plan.dockerfile(plain=plain), encoding="utf-8")
        (context / "wheels").mkdir()
        unpack(house, context / "wheels")
        wanted = list(pins)
        if plan.wish.provides_vllm:
            shim = wheels.vllm_metadata_wheel(plan.wish.provides_vllm, store=store)
            shutil.copy(shim, context / "wheels" / shim.name)
            wanted.append(f"vllm=={plan.wish.provides_vllm}")
        (context / "wheels" / "pins.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
        build(
            docker,
            tag,
            context,
            log=log,
            arguments={"BASE": base, "INPUTS": plan.inputs},
            labels={
                "org.opencontainers.image.title": "vLLM for CPUs, with Ray",
                "clusterkit.ray": versions.get("ray", ""),
                "clusterkit.made-of": json.dumps(made_of, sort_keys=True),
            },
            expected={"ray": versions.get("ray"), "device": "cpu"},
            plain=plain,
            on_line=on_line,
        )


def _build_source(
    place: Workplace, plan: SourceImage, *, store: Path, site: Site, plain: bool, log: Path, on_line: OnLine
) -> None:
    docker = place.docker
    if plain:
        _without_secrets(site)
    with _context(store) as context, tempfile.TemporaryDirectory(prefix="clusterkit-secrets-") as hidden:
        on_line(f"source: {plan.ref} is {plan.commit}")
        _check_out(plan, context / "source", store=store, site=site)
        if plan.base_recipe and _run(docker, "image", "inspect", plan.base_tag).returncode != 0:
            # vLLM's own file, as it stands at that commit: it pins torch and the rest itself.
            file = context / "source" / plan.base_recipe
            if not file.is_file():
                raise ClusterkitError(f"vLLM's source at {plan.ref} has no {plan.base_recipe}")
            if plain and "--mount=" in file.read_text(encoding="utf-8"):
                raise ClusterkitError(
                    f"vLLM's own {plan.base_recipe} asks for BuildKit",
                    hint=f"{BUILDKIT_WAY}, or name a base that holds torch: clusterkit_image_base",
                )
            with _context(store) as empty:
                shutil.copy(file, empty / "Dockerfile")
                words = {**_proxy(site), "BASE_IMAGE": plan.base, image_plan.ARCHS[plan.recipe][0]: plan.arch_list}
                on_line(f"base: {plan.base_recipe} on {plan.base}")
                base_log = log.with_name(f"{plan.base_tag.rpartition(':')[2]}.log")
                build(docker, plan.base_tag, empty, log=base_log, arguments=words, plain=plain, on_line=on_line)
        (context / "Dockerfile").write_text(plan.dockerfile(plain=plain), encoding="utf-8")
        shutil.copytree(RECIPES / "kit", context / "kit")
        secrets = {"ca": Path(site.ca_bundle)} if site.ca_bundle else {}
        if site.index_url:
            # It may hold a password; as a secret it is in no layer and in no history.
            secrets["index"] = Path(hidden) / "index"
            secrets["index"].write_text(site.index_url, encoding="utf-8")
        if plain:
            for key, path in secrets.items():
                shutil.copyfile(path, context / "kit" / key)
            secrets = {}
        build(
            docker,
            plan.tag,
            context,
            log=log,
            arguments={**_proxy(site), "MAX_JOBS": str(place.jobs)},
            labels=plan.labels(),
            secrets=secrets,
            expected=plan.expected(),
            plain=plain,
            on_line=on_line,
        )


def _without_secrets(site: Site) -> None:
    """Raises where a plain build would leave a password in a layer."""
    parts = urlsplit(site.index_url)
    if "@" in parts.netloc or parts.query:
        raise ClusterkitError(
            "the index is asked with a login, and without BuildKit that would stay in the image",
            hint=f"{BUILDKIT_WAY}, or name an index without a login: clusterkit_mirrors.pypi",
        )


def _check_out(plan: SourceImage, folder: Path, *, store: Path, site: Site) -> None:
    """The source at its commit, with the patches in it, and no history: the same files are the same layer."""
    kept = store / "sources" / f"{digest(plan.source)}.git"
    with wheels.locked(store, kept.name):
        if not kept.exists():
            _must(_git("init", "--quiet", "--bare", str(kept)), f"{kept} could not be made")
        if _git("-C", str(kept), "cat-file", "-e", f"{plan.commit}^{{commit}}").returncode != 0:
            # Not every server gives out a commit that is not the end of a ref.
            for wanted in (plan.commit, plan.ref):
                got = _git(
                    *("-C", str(kept), "fetch", "--quiet", "--depth", "1", "--", plan.source, wanted),
                    ca_bundle=site.ca_bundle,
                )
                if got.returncode == 0:
                    break
        there = _git("-C", str(kept), "cat-file", "-e", f"{plan.commit}^{{commit}}")
        _must(
            there,
            f"{plan.ref} ({plan.commit}) could not be fetched from {image_plan.without_credentials(plan.source)}",
            hint="did the ref move since it was resolved? clusterkit image plan asks again",
        )
        folder.mkdir()
        packed = folder.with_suffix(".tar")
        _must(
            _git("-C", str(kept), "archive", "--format", "tar", "--output", str(packed), plan.commit),
            f"the source at {plan.commit} could not be read",
        )
    unpack(packed, folder)
    packed.unlink()
    for patch in plan.patches:
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", "-"],
            input=patch.text,
            cwd=folder,
            # Else a checkout around the folder would be taken for the one that is meant.
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        _must(
            done, f"the patch {patch.name} does not fit vLLM's source at {plan.ref}", hint="rebase it, or take it out"
        )


def _debian_base(docker: str, packages: Sequence[str], mirror: str) -> str:
    """The base image's tag; made by mmdebstrap where it is missing: no registry is asked."""
    sources = debian.debian_sources(mirror or None)
    tag = f"{BASE_REPOSITORY}:{digest([debian.SUITE, list(packages), sources])}"
    if _run(docker, "image", "inspect", tag).returncode == 0:
        return tag
    with tempfile.TemporaryDirectory(prefix="clusterkit-base-") as folder:
        tarball = Path(folder) / "base.tar"
        debian.bootstrap(tarball, packages, sources)
        _must(_run(docker, "import", str(tarball), tag), "the base image could not be imported")
    return tag


@contextmanager
def _context(store: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=store, prefix="context-") as folder:
        yield Path(folder)


def _proxy(site: Site) -> dict[str, str]:
    """Docker's predefined arguments: they are in no layer and in no history."""
    named = {"http_proxy": site.proxy.get("http"), "https_proxy": site.proxy.get("https")}
    named["no_proxy"] = ",".join(site.proxy.get("no_proxy") or ())
    return {key: value for key, value in named.items() if value}


def _git(*words: str, ca_bundle: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8"}
    if ca_bundle:
        environment["GIT_SSL_CAINFO"] = ca_bundle
    try:
        return subprocess.run(
            ["git", *words],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise ToolMissing("git", hint="on Debian or Ubuntu: sudo apt install git") from None
    except subprocess.TimeoutExpired:
        raise ClusterkitError(
            f"git {words[0]} did not end within {FETCH_TIMEOUT_S} s", hint="is the network up?"
        ) from None


def unpack(archive: Path, folder: Path) -> None:
    """A tar file of our own making. Python 3.11 knows extraction filters from 3.11.4 on; Debian 12 has 3.11.2."""
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)


def _must(done: subprocess.CompletedProcess[str], problem: str, *, hint: str | None = None) -> None:
    if done.returncode != 0:
        raise ClusterkitError(f"{problem}: {(done.stderr or done.stdout).strip()[-800:]}", hint=hint)


def _run(docker: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([docker, *words], capture_output=True, text=True, errors="replace", check=False)


def _last(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no answer"
