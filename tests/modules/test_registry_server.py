"""registry_server: what makes a restart due, and whether a registry answers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.unit.registry_server import Registry

Json = dict[str, Any]

module = load_module("registry_server")

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
        ({"ActiveState": "failed"}, {"/etc/a": 51.0}, False, [("running", "failed")]),
        ({}, {"/etc/a": 51.0}, False, [("restarted for /etc/a", "running without it")]),
        ({"NeedDaemonReload": "yes"}, {}, True, [("restarted", "running an older unit")]),
        ({}, {}, False, [("answering", "silent")]),
    ],
)
def test_plan(unit: Json, times: dict[str, float], answers: bool, expected: list[tuple[str, str]]) -> None:
    assert module.plan({**RUNS, **unit}, {**TIMES, **times}, answers) == expected


def test_a_host_without_the_unit() -> None:
    unit = {"LoadState": "not-found", "ActiveState": "inactive", "UnitFileState": ""}
    assert module.plan(unit, {}, False) == [("enabled", "not installed"), ("running", "inactive")]


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate: needs openssl")
def test_it_answers_to_who_trusts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = tmp_path / "crt", tmp_path / "key"
    subprocess.run(["openssl", *words, "-keyout", files[1], "-out", files[0]], check=True, capture_output=True)
    # A proxy of the environment would be asked, and is not there.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server, plain = Registry(*files), Registry()
    try:
        url = f"https://{server.address}"
        assert module.silence(url, str(files[0])) == ""
        assert "certificate" in module.silence(url, None)
        assert module.silence(f"http://{plain.address}", None) == ""
        assert module.silence(f"https://{plain.address}", str(files[0])) != ""
    finally:
        server.close()
        plain.close()
    assert "refused" in module.silence(url, str(files[0]))
