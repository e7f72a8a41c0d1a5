from __future__ import annotations

import docker
import docker.errors
import pytest


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Skips, with the reason, where there is no Docker Engine."""
    try:
        docker.from_env().ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"the lab tests need a running Docker Engine: {error}")
