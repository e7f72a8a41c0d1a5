"""The engine's image by way of the cluster's own registry: real docker-registry, dockerd and SSH, and what goes wrong.

The head is the registry's host, too. Ray is not started: the image is all that is looked at, and what runs in it beside
Ray. The tests go through the cluster's life in their order; each leaves it converged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import BIN, ENVIRONMENT, Cluster, Maker, clusterkit, playbook, recap
from tests.lab.kill_at import family
from tests.lab.test_killed import when
from tests.modules.hub_server import Hub

pytestmark = [pytest.mark.docker, pytest.mark.slow]

ROLES = "registry,baseline,container_engine,vllm_image"
STORAGE = "/var/lib/clusterkit-registry"
CURRENT = "clusterkit/vllm:current"
TOKEN = "hf_a-token-that-nobody-sees"
INVENTORY = """\
all:
  children:
    registry:
      hosts:
        head:
"""


@pytest.fixture(scope="module")
def lab(lab_of: Maker) -> Iterator[Cluster]:
    """Three hosts; the head is in the group `registry`."""
    made = lab_of("registrytest", "--workers", "2")
    (made.inventory / "registry.yml").write_text(INVENTORY)
    yield made
    (made.inventory / "registry.yml").unlink()


@pytest.fixture(scope="module")
def address(lab: Cluster) -> str:
    return lab.on("head", "hostname -I").split()[0] + ":5000"


def deploy(lab: Cluster, *words: str, tags: str = ROLES) -> subprocess.CompletedProcess[str]:
    return playbook("site.yml", lab.inventory, "--tags", tags, *words)


def changed(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    assert done.returncode == 0, done.stdout[-4000:]
    return {host: count["changed"] for host, count in recap(done.stdout).items() if count["changed"]}


def log(lab: Cluster) -> list[str]:
    """What the registry was asked for, as `GET /v2/...`."""
    lab.on("head", "journalctl --sync")
    text = lab.on("head", "journalctl -q --no-pager -o cat -u docker-registry")
    return re.findall(r'"((?:GET|PUT|POST) /v2/\S+) HTTP/1.1" 20\d', text)


def without_image(lab: Cluster, host: str) -> None:
    ids = "$(docker image ls --all --quiet --filter label=clusterkit.image | sort -u)"
    lab.on(host, f"docker image rm --force {ids} 2>&1")
    assert current(lab, host) == ""


def current(lab: Cluster, host: str) -> str:
    """The id of the image that Ray would be started in; nothing where there is none."""
    return lab.on(host, f"docker image inspect --format '{{{{.Id}}}}' {CURRENT} 2>/dev/null", check=False).strip()


def test_hosts_pull_what_the_controller_pushed(lab: Cluster, address: str) -> None:
    # Nothing is told to this machine's dockerd; the check comes first, on hosts that are bare.
    assert changed(deploy(lab, "--check")).keys() == {"head", "worker1", "worker2"}
    assert changed(deploy(lab)).keys() == {"head", "worker1", "worker2"}
    assert not (Path("/etc/docker/certs.d") / address).exists()
    found = [json.loads(lab.on(host, f"docker image inspect {CURRENT}"))[0] for host in ("head", "worker1", "worker2")]
    (digest,) = {name for image in found for name in image["RepoDigests"] if name.startswith(f"{address}/")}
    assert re.fullmatch(rf"{address}/clusterkit/vllm-cpu@sha256:[0-9a-f]{{64}}", digest)
    assert len({image["Id"] for image in found}) == 1
    assert lab.on("worker1", "/opt/clusterkit/bin/ray-python -c 'import ray; print(ray.__version__)'") == "2.60.0"
    pushed = json.loads(clusterkit("image", "push", "-i", str(lab.inventory), "--json").stdout)
    assert (pushed["image"], pushed["sent_layers"]) == (digest, 0)


def test_a_run_with_nothing_to_do_moves_no_byte_of_an_image(lab: Cluster) -> None:
    before = log(lab)
    assert changed(deploy(lab)) == {}
    asked = log(lab)[len(before) :]
    assert set(asked) <= {"GET /v2/"}, asked


def test_a_host_that_lacks_the_image_has_it_from_the_registry(lab: Cluster) -> None:
    without_image(lab, "worker2")
    assert changed(deploy(lab, "--limit", "worker2", tags="vllm_image")) == {"worker2": 1}
    assert current(lab, "worker2") == current(lab, "worker1")


def test_a_registry_that_is_away_is_named(lab: Cluster, address: str) -> None:
    without_image(lab, "worker1")
    lab.on("head", "systemctl stop docker-registry")
    failed = deploy(lab, "--limit", "worker1", tags="vllm_image")
    assert failed.returncode != 0
    assert f"the registry {address} does not answer" in failed.stdout
    assert "systemctl status docker-registry" in failed.stdout
    assert current(lab, "worker1") == ""
    # A host that has its image does not ask for it.
    assert changed(deploy(lab, "--limit", "worker2", tags="vllm_image")) == {}
    # The whole run brings the registry back first.
    assert changed(deploy(lab)) == {"head": 1, "worker1": 1}
    assert current(lab, "worker1") == current(lab, "worker2")


def largest(lab: Cluster) -> str:
    """The file of the largest layer in the registry's storage."""
    blobs = f"{STORAGE}/docker/registry/v2/blobs"
    return lab.on("head", f"find {blobs} -name data -printf '%s %p\\n' | sort -n | tail -1").split()[1]


def test_a_damaged_layer_is_refused_and_mended(lab: Cluster, address: str) -> None:
    without_image(lab, "worker1")
    lab.on("head", f"printf clusterkit | dd of={largest(lab)} bs=1 seek=100000 conv=notrunc")
    failed = deploy(lab, "--limit", "worker1", tags="vllm_image")
    assert failed.returncode != 0
    assert f"a layer is damaged in the registry {address}" in failed.stdout
    assert current(lab, "worker1") == "", "nothing half-used"
    path = re.search(r"rm -r (docker/registry/v2/blobs/sha256/[0-9a-f]{2}/[0-9a-f]{64})", failed.stdout)
    assert path, failed.stdout[-2000:]
    lab.on("head", f"cd {STORAGE} && rm -r {path[1]}")
    before = log(lab)
    assert changed(deploy(lab, "--limit", "worker1", tags="vllm_image")) == {"worker1": 1}
    sent = [line for line in log(lab)[len(before) :] if line.startswith("PUT") and "/blobs/uploads/" in line]
    assert len(sent) == 1, "the layer alone was pushed again"
    assert current(lab, "worker1") == current(lab, "worker2")


def images_of(lab: Cluster, host: str) -> set[str]:
    return set(lab.on(host, "docker image ls --all --quiet --no-trunc --filter label=clusterkit.image").split())


def test_a_full_disk_is_named_and_leaves_no_part(lab: Cluster) -> None:
    without_image(lab, "worker1")
    # Where dockerd puts layers down while they come.
    lab.on("worker1", "mount -t tmpfs -o size=16m tmpfs /var/lib/docker/tmp")
    try:
        failed = deploy(lab, "--limit", "worker1", tags="vllm_image")
    finally:
        lab.on("worker1", "umount /var/lib/docker/tmp")
    assert failed.returncode != 0
    assert "the disk that Docker keeps images on is full" in failed.stdout, failed.stdout[-3000:]
    assert images_of(lab, "worker1") == set()
    assert changed(deploy(lab, "--limit", "worker1", tags="vllm_image")) == {"worker1": 1}
    assert current(lab, "worker1") == current(lab, "worker2")


def received(lab: Cluster, host: str) -> int:
    # An exec of a busy Docker gives no output now and then.
    while not (said := lab.on(host, "cat /sys/class/net/eth0/statistics/rx_bytes")):
        pass
    return int(said)


def test_a_pull_that_is_cut_names_the_registry_and_the_next_run_converges(lab: Cluster, address: str) -> None:
    without_image(lab, "worker1")
    start = received(lab, "worker1")
    # Well into the layers; the code that Ansible brings is smaller.
    begun = lambda: received(lab, "worker1") - start > 60_000_000  # noqa: E731
    with when(begun, lambda: lab.on("head", "systemctl stop docker-registry")) as cut:
        failed = deploy(lab, "--limit", "worker1", tags="vllm_image")
    assert cut
    assert failed.returncode != 0, failed.stdout[-3000:]
    assert f"the registry {address}" in failed.stdout
    assert current(lab, "worker1") == ""
    assert changed(deploy(lab)) == {"head": 1, "worker1": 1}
    assert current(lab, "worker1") == current(lab, "worker2")
    assert images_of(lab, "worker1") == {current(lab, "worker1")}, "no part is left"


def current_tag(lab: Cluster) -> str:
    told = json.loads(clusterkit("image", "plan", "-i", str(lab.inventory), "--json").stdout)
    return str(told["image"])


def test_a_run_that_is_killed_in_the_middle_of_a_pull(lab: Cluster) -> None:
    without_image(lab, "worker1")
    start = received(lab, "worker1")
    command = [str(BIN / "ansible-playbook"), "site.yml", "-i", str(lab.inventory), "--tags", "vllm_image"]
    run = subprocess.Popen([*command, "--limit", "worker1"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)

    def kill() -> None:
        for pid in (run.pid, *family(run.pid)):
            os.kill(pid, signal.SIGKILL)

    with when(lambda: received(lab, "worker1") - start > 60_000_000, kill) as killed:
        run.wait()
    assert killed
    # What it had begun on the host may come to its end there: then the name is a whole image's.
    lab.on("worker1", "while pgrep -f '[d]ocker pull' >/dev/null; do sleep 0.2; done")
    assert current(lab, "worker1") in ("", current(lab, "worker2"))
    assert deploy(lab, "--limit", "worker1", tags="vllm_image").returncode == 0
    assert current(lab, "worker1") == current(lab, "worker2")
    assert changed(deploy(lab, "--limit", "worker1", tags="vllm_image")) == {}


def test_older_images_go_and_a_used_one_stays(lab: Cluster) -> None:
    for number in (1, 2, 3):
        lab.on(
            "worker1",
            f"docker create --name old {CURRENT} true && docker commit --change 'LABEL clusterkit.inputs=old{number}'"
            f" old clusterkit/vllm-cpu:old{number} && docker rm old",
        )
    # It never ran.
    lab.on("worker1", "docker create --name holds clusterkit/vllm-cpu:old1 true")
    one = ("--limit", "worker1")
    assert changed(deploy(lab, "--check", *one, tags="vllm_image")) == {"worker1": 1}
    assert changed(deploy(lab, *one, tags="vllm_image")) == {"worker1": 1}
    names = lab.on("worker1", "docker image ls --format '{{.Repository}}:{{.Tag}}' 'clusterkit/vllm*'").split()
    tags = {name for name in names if not name.endswith("<none>")}
    assert tags == {current_tag(lab), CURRENT, "clusterkit/vllm-cpu:old1", "clusterkit/vllm-cpu:old3"}
    assert changed(deploy(lab, *one, tags="vllm_image")) == {}
    lab.on("worker1", "docker rm holds")
    assert changed(deploy(lab, *one, tags="vllm_image")) == {"worker1": 1}
    assert "old1" not in lab.on("worker1", "docker image ls 'clusterkit/vllm*'")


def test_weights_come_by_way_of_the_image(lab: Cluster) -> None:
    """The engine's own huggingface_hub fetches them, in a container that may use the network."""
    gateway = lab.on("worker1", "ip route show default").split()[2]
    hub = Hub(address=gateway)
    files = {"config.json": b"{}", "model.safetensors": os.urandom(3_000_000)}
    hub.repository().token = TOKEN
    source = {"hub": "org/model", "revision": hub.repository().push(files)}
    app = {"name": "chat", "template": "llm", "parameters": {"model_id": "chat", "model_source": source}}
    given = json.dumps({"clusterkit_mirrors": {"huggingface": hub.url}, "clusterkit_apps": [app]})
    words = ("-e", given, "-e", json.dumps({"model_store_token": TOKEN}), "-vv", "--diff")
    try:
        fetched = deploy(lab, *words, tags="model_store")
        assert changed(fetched).keys() == {"head", "worker1", "worker2"}
        assert TOKEN not in fetched.stdout + fetched.stderr
        folder = f"/var/lib/clusterkit/models/org--model--{source['revision'][:12]}"
        wanted = hashlib.sha256(files["model.safetensors"]).hexdigest()
        assert lab.on("worker1", f"sha256sum {folder}/model.safetensors").split()[0] == wanted
        assert lab.on("worker1", f"stat -c %U {folder}/model.safetensors").strip() == "ray"
        assert lab.on("head", f"ls {folder}").split() == ["clusterkit-manifest.json", "config.json"]
        asked = len(hub.log)
        assert changed(deploy(lab, *words, tags="model_store")) == {}
        assert len(hub.log) == asked, "whoever has it asks nobody"
    finally:
        hub.close()


def test_nothing_runs_on_after_the_registry_is_removed(lab: Cluster, address: str) -> None:
    done = playbook("playbooks/remove.yml", lab.inventory, "-e", "remove_data=true")
    assert done.returncode == 0, done.stdout[-4000:]
    left = f"ls -d {STORAGE} /etc/clusterkit-registry /usr/bin/docker-registry 2>/dev/null"
    assert lab.on("head", left, check=False) == ""
    assert lab.on("worker1", f"ls -d /etc/docker/certs.d/{address} 2>/dev/null", check=False) == ""
    again = playbook("playbooks/remove.yml", lab.inventory, "-e", "remove_data=true")
    assert again.returncode == 0, again.stdout[-4000:]
