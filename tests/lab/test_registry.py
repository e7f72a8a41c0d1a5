"""The image by way of an on-prem registry: a real one, on the head, behind a certificate of the site's own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import Cluster, Maker, playbook, recap

pytestmark = [pytest.mark.docker, pytest.mark.slow]

CONFIG = """\
version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/docker-registry}}
http:
  addr: :5000
  tls: {certificate: /etc/docker/registry/tls.crt, key: /etc/docker/registry/tls.key}
"""


@pytest.fixture
def registry(lab_of: Maker, tmp_path: Path) -> Iterator[tuple[Cluster, str, Path]]:
    """A lab whose head runs Debian's docker-registry, its address, and the certificate that it is trusted by."""
    lab = lab_of("registrytest", "--workers", "1")
    address = lab.on("head", "hostname -I").split()[0]
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=registry"]
    request += ["-addext", f"subjectAltName=IP:{address}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(request, check=True, capture_output=True)
    lab.on("head", "apt-get update -qq && apt-get install -y -qq --no-install-recommends docker-registry")
    for name, text in (
        ("config.yml", CONFIG),
        ("tls.crt", certificate.read_text()),
        ("tls.key", key.read_text()),
    ):
        lab.on("head", f"cat > /etc/docker/registry/{name} <<'END'\n{text}END")
    lab.on("head", "chown -R docker-registry /etc/docker/registry && systemctl restart docker-registry")
    # This machine pushes: its dockerd trusts the certificate as the site would have it.
    trusted = Path("/etc/docker/certs.d") / f"{address}:5000"
    trusted.mkdir(parents=True)
    shutil.copy(certificate, trusted / "ca.crt")
    yield lab, f"{address}:5000", certificate
    shutil.rmtree(trusted)


def test_hosts_pull_what_the_controller_pushed(registry: tuple[Cluster, str, Path]) -> None:
    lab, address, certificate = registry
    trust = {"container_engine_registry_ca": {address: str(certificate)}, "vllm_image_registry": address}
    words = ("--limit", "worker1", "--tags", "baseline,container_engine,vllm_image", "-e", json.dumps(trust))
    done = playbook("site.yml", lab.inventory, *words)
    assert done.returncode == 0, done.stdout[-4000:]
    image = json.loads(lab.on("worker1", "docker image inspect clusterkit/vllm:current"))[0]
    assert [digest for digest in image["RepoDigests"] if digest.startswith(f"{address}/clusterkit/vllm-cpu@sha256:")]
    assert lab.on("worker1", "/opt/clusterkit/bin/ray-python -c 'import ray; print(ray.__version__)'") == "2.60.0"
    again = playbook("site.yml", lab.inventory, *words)
    assert recap(again.stdout)["worker1"]["changed"] == 0
