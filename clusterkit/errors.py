"""Every error that the package raises on purpose.

ClusterkitError
├── SpecError        the inventory is wrong: findings, each with its place and its fix
├── UsageError       the command line was wrong
├── RunFailed        a playbook run ended with a failed or unreachable host
├── VerifyFailed     a probe of the running cluster failed
└── ToolMissing      something that the command needs is not on this machine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clusterkit.spec.findings import Finding


class ClusterkitError(Exception):
    """Base of all; `hint` says how to mend it, where that is known."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SpecError(ClusterkitError):
    """The request was wrong: nothing was touched. Carries all findings at once."""

    exit_code = 2

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        count = len(self.findings)
        super().__init__(f"the inventory has {count} finding{'s' if count != 1 else ''}")


class UsageError(ClusterkitError):
    """The command line was wrong: nothing was touched."""

    exit_code = 2


@dataclass(frozen=True)
class Failure:
    """Where a run ended on one host; `kind` is failed or unreachable."""

    host: str
    kind: str
    role: str
    task: str
    message: str


class RunFailed(ClusterkitError):
    """A playbook run failed: the first failure, all of them, and where the whole log lies.

    `hosts` counts what was done on each host of the run, those that went on to the end included.
    """

    def __init__(
        self,
        *,
        host: str,
        role: str,
        task: str,
        message: str,
        log: str,
        hint: str | None = None,
        failures: Sequence[Failure] = (),
        hosts: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.host = host
        self.role = role
        self.task = task
        self.log = log
        self.failures = tuple(failures)
        self.hosts = dict(hosts or {})

    def as_dict(self) -> dict[str, object]:
        """For another program."""
        return {
            "error": self.message,
            "hint": self.hint,
            "failures": [asdict(failure) for failure in self.failures],
            "hosts": {host: dict(count) for host, count in self.hosts.items()},
            "log": self.log,
        }


class VerifyFailed(ClusterkitError):
    """At least one probe failed; the report says which."""


class ToolMissing(ClusterkitError):
    """A tool or library is missing on this machine."""

    exit_code = 2

    def __init__(self, name: str, *, hint: str) -> None:
        super().__init__(f"{name} is missing", hint=hint)
        self.name = name
