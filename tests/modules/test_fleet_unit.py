"""fleet_daemon: what a removal has to take away, and whether a daemon answers.

Real systemd: tests/roles/test_fleet_role.py.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module

Json = dict[str, Any]

module = load_module("fleet_daemon")


@pytest.mark.parametrize(
    ("unit", "there", "expected"),
    [
        ({"ActiveState": "active", "LoadState": "loaded"}, True, [("stopped", "active"), ("gone", "there")]),
        ({"ActiveState": "failed", "LoadState": "loaded"}, True, [("stopped", "failed"), ("gone", "there")]),
        # Its file went, and the process did not.
        ({"ActiveState": "active", "LoadState": "not-found"}, False, [("stopped", "active")]),
        ({"ActiveState": "inactive", "LoadState": "not-found"}, False, []),
    ],
)
def test_plan_of_a_removal(unit: Json, there: bool, expected: list[tuple[str, str]]) -> None:
    assert module.plan_absent(unit, there) == expected


@pytest.fixture
def folder() -> Iterator[Path]:
    """pytest's own folders are too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="ck-") as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b'{"v": 1, "ok": true, "hosts": []}\n', ""),
        (b'{"ok": false, "code": "forbidden", "error": "not you"}\n', "not you"),
        (b"nonsense\n", "Expecting value"),
        (b"[]\n", "attribute"),
        (b"", "Expecting value"),
    ],
)
def test_it_answers_or_it_is_said_why(folder: Path, said: bytes, why: str) -> None:
    path = folder / "sock"
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def answer() -> None:
            client, _ = server.accept()
            with client, client.makefile("rb") as stream:
                heard.append(stream.readline())
                client.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        found = module.silence(str(path))
        thread.join()
    assert why in found
    assert bool(why) is bool(found)
    assert heard == [b'{"v": 1, "verb": "status"}\n']


def test_nobody_is_there(folder: Path) -> None:
    assert "No such file" in module.silence(str(folder / "sock"))
