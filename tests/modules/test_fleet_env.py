"""fleet_env: the kit's wheel as an interpreter takes it, and what else the daemon needs. A real environment, made on a
host: tests/roles/test_fleet_role.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT, load_script

plugin = load_script(ROOT / "plugins/action/fleet_env.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What of the checkout the wheel is made of, and something beside it."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "clusterkit/fleet", root / "clusterkit/fleet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "errors.py", "plan.py"):
        shutil.copy(ROOT / "clusterkit" / name, root / "clusterkit" / name)
    return root


def test_the_wheel_holds_a_daemon_that_runs(checkout: Path, tmp_path: Path) -> None:
    wheel = plugin.kit_wheel(checkout, tmp_path / "store")
    target = tmp_path / "there"
    words = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*words, "--target", str(target), str(wheel)], check=True)
    # Alone in its folder: nothing of this checkout may be what makes it run.
    script = f"import sys; sys.path.insert(0, {str(target)!r}); sys.argv[1:] = ['--config', '/no/such']; "
    script += "import runpy; runpy.run_module('clusterkit.fleet', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot read the configuration /no/such" in done.stderr
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "clusterkit/fleet/power/redfish.py" in names
    assert not {name for name in names if name.startswith("clusterkit/") and "fleet" not in name} - {
        "clusterkit/__init__.py",
        "clusterkit/errors.py",
    }


def test_another_daemon_is_another_version_and_nothing_else_is(checkout: Path, tmp_path: Path) -> None:
    first = plugin.kit_wheel(checkout, tmp_path / "one")
    assert plugin.kit_wheel(checkout, tmp_path / "two").read_bytes() == first.read_bytes()
    (checkout / "clusterkit/plan.py").write_text("")
    assert plugin.kit_wheel(checkout, tmp_path / "one") == first
    with (checkout / "clusterkit/fleet/policy.py").open("a") as file:
        file.write("# changed\n")
    second = plugin.kit_wheel(checkout, tmp_path / "one")
    assert second.name != first.name
    assert second.name.split("-")[0] == "clusterkit"


def test_what_the_project_names_is_what_is_asked_for() -> None:
    assert "3.11" in plugin.pythons()
    assert "3.10" not in plugin.pythons()
    names = {item.partition(">")[0] for item in plugin.requirements(redfish=True)}
    assert names == {"pydantic", "sushy"}
    assert [item.partition(">")[0] for item in plugin.requirements(redfish=False)] == ["pydantic"]
