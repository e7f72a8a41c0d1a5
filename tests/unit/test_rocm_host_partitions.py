"""rocm_host's assertions about partition modes, run by Ansible on this machine in another host's name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HOST = {"architecture": "x86_64", "id": "debian", "version": "12", "manager": "apt"}


@pytest.mark.parametrize(
    ("compute", "memory", "allowed", "said"),
    [
        ("SPX", "NPS1", False, ""),
        ("CPX", "NPS1", False, "is CPX/NPS1. The preflight, the health gate and Ray count whole GPUs only"),
        ("CPX", "NPS4", False, "rocm_host_allow_unsupported: true goes on"),
        ("CPX", "NPS4", True, ""),
        # No such pair, whoever asks for it.
        ("SPX", "NPS4", True, "Valid are"),
    ],
)
def test_partitioned_gpus_are_refused_unless_asked_for(
    tmp_path: Path, compute: str, memory: str, allowed: bool, said: str
) -> None:
    given = {
        "ansible_python_interpreter": sys.executable,
        # Above what the role reads: this machine may be of any kind.
        "__rocm_host_read": {"host": HOST},
        "rocm_host_version": "7.2.3",
        "rocm_host_driver_version": "30.30.3",
        "rocm_host_metrics_exporter": False,
        "rocm_host_compute_partition": compute,
        "rocm_host_memory_partition": memory,
        "rocm_host_allow_unsupported": allowed,
    }
    task = {"name": "Role", "ansible.builtin.import_role": {"name": "rocm_host", "tasks_from": "assert"}}
    play = {"name": "Assert", "hosts": "localhost", "gather_facts": False, "tasks": [task]}
    (tmp_path / "given.json").write_text(json.dumps(given))
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local"]
    command += ["-e", f"@{tmp_path}/given.json", str(tmp_path / "play.yml")]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    told = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == (2 if said else 0), told
    assert said in told
