"""Debian without an image registry: apt's sources of this machine, and a root file system by mmdebstrap."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clusterkit.errors import ClusterkitError, ToolMissing

SUITE = "bookworm"
DEFAULT_MIRROR = "http://deb.debian.org/debian"

_SUITES = (SUITE, f"{SUITE}-updates", f"{SUITE}-security")
_COMPONENTS = ("main", "contrib", "non-free", "non-free-firmware")


def bootstrap(
    tarball: Path,
    packages: Sequence[str],
    sources: Sequence[str],
    *,
    hooks: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Write the root file system of a minimal Debian with `packages` to `tarball`. Takes about half a minute.

    Raises ToolMissing, and ClusterkitError with mmdebstrap's last words.
    """
    if shutil.which("mmdebstrap") is None:
        raise ToolMissing("mmdebstrap", hint="on Debian or Ubuntu: sudo apt install mmdebstrap debian-archive-keyring")
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(packages)}"]
    command += [f"--customize-hook={hook}" for hook in hooks]
    done = subprocess.run(
        [*command, SUITE, str(tarball), *sources],
        env={**os.environ, **(environment or {}), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ClusterkitError(
            f"the Debian image was not built, mmdebstrap said:\n{last}",
            hint=f"is the mirror reachable ({sources[0].split()[1]})? `--mirror URL` names another",
        )


def debian_sources(mirror: str | None, *, root: Path = Path("/")) -> list[str]:
    """apt's source lines for the hosts: of `mirror`, else this machine's if it is Debian 12, else Debian's.

    `root` is where this machine's /etc/os-release and /etc/apt are looked for.
    """
    if mirror is None:
        own = _own_sources(root)
        if any(line.split()[2] == SUITE for line in own):
            return own
    base = (mirror or DEFAULT_MIRROR).rstrip("/")
    lines = [f"deb {base} {suite} main" for suite in _SUITES[:2]]
    if base == DEFAULT_MIRROR:  # other mirrors need not carry it
        lines.append(f"deb {base}-security {SUITE}-security main")
    return lines


def _own_sources(root: Path) -> list[str]:
    release = root / "etc/os-release"
    if not release.is_file() or f"VERSION_CODENAME={SUITE}" not in release.read_text().splitlines():
        return []
    apt = root / "etc/apt"
    one_line = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]
    stanzas = sorted((apt / "sources.list.d").glob("*.sources"))
    entries = [entry for path in one_line if path.is_file() for entry in _one_line_entries(path.read_text())]
    entries += [entry for path in stanzas for entry in _deb822_entries(path.read_text())]
    lines = []
    for entry in entries:
        # Other vendors' repositories have keys of their own, which the hosts do not get.
        if entry.signed_by and "debian-archive-" not in entry.signed_by:
            continue
        mine = [component for component in entry.components if component in _COMPONENTS]
        for uri in entry.uris:
            for suite in entry.suites:
                if mine and suite in _SUITES and uri.startswith(("http://", "https://")):
                    lines.append(f"deb {uri.rstrip('/')} {suite} {' '.join(mine)}")
    return list(dict.fromkeys(lines))


@dataclass(frozen=True, slots=True)
class _SourceEntry:
    uris: list[str]
    suites: list[str]
    components: list[str]
    signed_by: str


def _one_line_entries(text: str) -> Iterator[_SourceEntry]:
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[([^]]*)\]\s+)?([^#]*)", line.strip())
        if match and len(fields := match[2].split()) >= 3:
            options = dict(option.split("=", 1) for option in (match[1] or "").split() if "=" in option)
            yield _SourceEntry(fields[:1], fields[1:2], fields[2:], options.get("signed-by", ""))


def _deb822_entries(text: str) -> Iterator[_SourceEntry]:
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        # A key, and the rest of its line with every following line that is indented.
        pairs = re.findall(r"^([\w-]+):(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        fields = {key.lower(): value.split() for key, value in pairs}
        if "deb" in fields.get("types", ()) and fields.get("enabled") != ["no"]:
            uris, suites, components = (fields.get(key, []) for key in ("uris", "suites", "components"))
            yield _SourceEntry(uris, suites, components, " ".join(fields.get("signed-by", ())))
