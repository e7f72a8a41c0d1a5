"""What is wrong with an inventory: where, what, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, order=True)
class Place:
    """A place in the user's files. `line` is 0 where only the file is known."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        if not self.file:
            return "inventory"
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Finding:
    """One mistake. Never carries the value of a secret."""

    place: Place
    subject: str
    problem: str
    fix: str
    hosts: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.place.file,
            "line": self.place.line,
            "hosts": list(self.hosts),
            "subject": self.subject,
            "problem": self.problem,
            "fix": self.fix,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finding:
        return cls(
            place=Place(data["file"], data["line"]),
            subject=data["subject"],
            problem=data["problem"],
            fix=data["fix"],
            hosts=tuple(data["hosts"]),
        )

    def without(self, secrets: Iterable[str]) -> Finding:
        """The same, with `***` for each secret that would be in its words."""
        found = list(secrets)
        return replace(
            self,
            subject=blanked(self.subject, found),
            problem=blanked(self.problem, found),
            fix=blanked(self.fix, found),
        )

    def __str__(self) -> str:
        who = ""
        if self.hosts:
            more = f" (+{len(self.hosts) - 1} more)" if len(self.hosts) > 1 else ""
            who = f" [{self.hosts[0]}{more}]"
        return f"{self.place}{who} {self.subject}: {self.problem}. Fix: {self.fix}"


def blanked(text: str, secrets: Iterable[str]) -> str:
    """The text with `***` for each secret in it."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """One finding per mistake: the same line read by many hosts is listed once, with all its hosts."""
    merged: dict[tuple[Place, str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.place, finding.subject, finding.problem, finding.fix)
        known = merged.get(key)
        if known is None:
            merged[key] = finding
        else:
            merged[key] = replace(known, hosts=tuple(dict.fromkeys((*known.hosts, *finding.hosts))))
    return sorted(merged.values(), key=lambda item: (item.place, item.subject, item.problem))


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """` did you mean 'x'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""
