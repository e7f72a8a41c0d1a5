"""What tests of several packages share for a whole session."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import ROOT, ansible_playbook


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine environment of the CPU stack, as the role ray_env makes it; CLUSTERKIT_TEST_ENGINE names one that is
    there, to save two minutes."""
    given = os.environ.get("CLUSTERKIT_TEST_ENGINE")
    if given:
        return Path(given)
    path = tmp_path_factory.mktemp("engine") / "ray-env"
    words = ["playbooks/images.yml", "-i", "inventory/local", "--tags", "ray_env"]
    done = ansible_playbook(ROOT, *words, "-e", json.dumps({"ray_env_path": str(path)}))
    assert done.code == 0, done.text[-3000:]
    return path
