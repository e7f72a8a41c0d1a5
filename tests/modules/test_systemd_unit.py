"""module_utils/systemd_unit.py: what makes a start or a restart due.

Real systemd: tests/roles/test_fleet_role.py and tests/roles/test_registry_role.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from ansible.module_utils import systemd_unit

Json = dict[str, Any]

RUNS = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "UnitFileState": "enabled",
    "NeedDaemonReload": "no",
    "ExecMainStartTimestampMonotonic": "50000000",
}
TIMES = {"/etc/a": 49.0, "/etc/b": 10.0}


@pytest.mark.parametrize(
    ("unit", "times", "answers", "expected"),
    [
        ({}, {}, True, []),
        ({"UnitFileState": "disabled"}, {}, True, [("enabled", "disabled")]),
        ({"ActiveState": "activating"}, {"/etc/a": 51.0}, False, [("running", "activating")]),
        ({"ActiveState": "failed"}, {"/etc/a": 51.0}, False, [("running", "failed")]),
        ({}, {"/etc/a": 51.0}, False, [("restarted for /etc/a", "running without it")]),
        ({"NeedDaemonReload": "yes"}, {}, True, [("restarted", "running an older unit")]),
        ({}, {}, False, [("answering", "silent")]),
    ],
)
def test_plan(unit: Json, times: dict[str, float], answers: bool, expected: list[tuple[str, str]]) -> None:
    assert systemd_unit.plan({**RUNS, **unit}, {**TIMES, **times}, answers) == expected


def test_a_host_without_the_unit() -> None:
    unit = {"LoadState": "not-found", "ActiveState": "inactive", "UnitFileState": ""}
    assert systemd_unit.plan(unit, {}, False) == [("enabled", "not installed"), ("running", "inactive")]
