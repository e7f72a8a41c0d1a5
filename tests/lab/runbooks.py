"""Pages of docs/runbooks as commands with the output that they show.

A page holds ```console blocks: `$ ` begins a command, what follows is its output. `...` stands for anything, in a
line or between lines. `[exit code N]` ends a block whose command fails. `<!-- test: ... -->` is what happens to a
host at that point of the story.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.lab.conftest import BIN
from tests.support import ROOT

PAGES = ROOT / "docs" / "runbooks"


@dataclass(frozen=True)
class Step:
    """A command with the output that the page shows, or something that happens."""

    page: str
    line: int
    command: str
    shown: tuple[str, ...] = ()
    happens: bool = False


def steps(page: Path) -> Iterator[Step]:
    command, shown, inside = "", [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if event := re.fullmatch(r"<!-- test: (.+) -->", line):
            yield Step(page.name, number, event[1], happens=True)
        elif line == "```console":
            inside, command, shown = True, "", []
        elif inside and line == "```":
            inside = False
            yield Step(page.name, number, command, tuple(shown))
        elif inside and line.startswith("$ "):
            assert not command, f"{page.name}:{number}: one command a block"
            command = line.removeprefix("$ ")
        elif inside:
            shown.append(line)


def squeezed(text: str) -> str:
    return re.sub(r"[ \t]+", " ", text).strip()


def missing(shown: tuple[str, ...], output: str) -> str | None:
    """The first line of the page that the output has not, in this order."""
    lines = [squeezed(line) for line in output.splitlines()]
    at = 0
    for line in shown:
        wanted = squeezed(line)
        if wanted in {"", "..."} or wanted.startswith("[exit code"):
            continue
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in wanted.split("...")))
        found = next((n for n in range(at, len(lines)) if pattern.match(lines[n])), None)
        if found is None:
            return line
        at = found + 1
    return None


def follow(
    page: Path, environment: Mapping[str, str], adapt: Callable[[str], str], happen: Callable[[str], object]
) -> int:
    """Gives every command of a page, and compares; `adapt` puts the lab's names into a text. How many there were."""
    given = 0
    for step in steps(page):
        if step.happens:
            happen(step.command)
            continue
        command, shown = adapt(step.command), adapt("\n".join(step.shown))
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env={**environment, "PATH": f"{BIN}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        code = re.search(r"\[exit code (\d+)\]", shown)
        where = f"{step.page}:{step.line}: {command}\n{done.stdout[-8000:]}"
        assert done.returncode == int(code[1] if code else 0), where
        line = missing(tuple(shown.splitlines()), done.stdout)
        assert line is None, f"no such line: {line}\n{where}"
        given += 1
    return given
