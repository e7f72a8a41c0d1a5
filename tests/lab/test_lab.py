"""The lab for real: system containers made, reached by SSH, made again, resized, and taken away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
import testinfra
from typer.testing import CliRunner

from clusterkit import lab
from clusterkit.cli.lab import app
from clusterkit.errors import UsageError

pytestmark = pytest.mark.docker

NAME = "citest"


@pytest.fixture(scope="module")
def client() -> Any:
    try:
        found = docker.from_env()
        found.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"the lab tests need a running Docker Engine: {error}")
    return found


@pytest.fixture(scope="module")
def state() -> Iterator[Path]:
    """A state folder of the test's own, with a path short enough for ssh's control sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def folder(client: Any, state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("lab") / "inventory"
    yield path
    lab.down(NAME, path)


def inventory_of(client: Any) -> set[str]:
    """All that Docker holds, except what belongs to another lab."""
    things = [*client.containers.list(all=True), *client.networks.list(), *client.volumes.list()]
    return {
        thing.id
        for thing in things
        if (thing.attrs.get("Labels") or thing.attrs.get("Config", {}).get("Labels") or {}).get(lab.LABEL, NAME) == NAME
    }


def ids(made: lab.Lab) -> dict[str, str]:
    return {host.name: host.container_id for host in made.hosts}


def ping(made: lab.Lab) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ansible")), "all", "-i", str(made.inventory), "-m", "ping"]
    # From an empty folder: no ansible.cfg may switch off what is tested here.
    return subprocess.run(command, cwd=made.inventory, capture_output=True, text=True, check=False)


def login(made: lab.Lab, host: str) -> Any:
    (address,) = (h.address for h in made.hosts if h.name == host)
    options = f"-o UserKnownHostsFile={made.known_hosts} -o StrictHostKeyChecking=yes"
    return testinfra.get_host(
        f"ssh://ops@{address}", ssh_identity_file=str(made.private_key), ssh_extra_args=options, sudo=True
    )


def test_up_ssh_and_again(client: Any, folder: Path) -> None:
    made = lab.up(1, name=NAME, inventory_dir=folder, group_vars="clusterkit_name: citest\n")
    assert made.changed
    assert [host.name for host in made.hosts] == ["head", "worker1"]
    assert made.private_key.stat().st_mode & 0o777 == 0o600
    pinged = ping(made)
    assert pinged.returncode == 0, pinged.stdout + pinged.stderr
    assert pinged.stdout.count("pong") == 2

    again = lab.up(1, name=NAME, inventory_dir=folder, group_vars="clusterkit_name: citest\n")
    assert not again.changed
    assert ids(again) == ids(made)
    status = lab.status(NAME)
    assert [(host.name, host.container, host.system) for host in status.hosts] == [
        ("head", "running", "running"),
        ("worker1", "running", "running"),
    ]


def test_host_keys_are_checked(folder: Path) -> None:
    made = lab.up(1, name=NAME, inventory_dir=folder)
    lines = made.known_hosts.read_text().splitlines()
    addresses, keys = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert len(set(keys)) == 2, "each host made its own key"
    made.known_hosts.write_text("".join(f"{a} {k}\n" for a, k in zip(addresses, reversed(keys), strict=True)))
    lab._end_connections(NAME, ["*"])
    refused = ping(made)
    assert refused.returncode != 0
    assert "pong" not in refused.stdout
    assert "Host key verification failed" in refused.stdout + refused.stderr
    assert lab.up(1, name=NAME, inventory_dir=folder).changed
    assert ping(made).returncode == 0


def test_a_host_is_a_bare_server(folder: Path) -> None:
    made = lab.up(1, name=NAME, inventory_dir=folder)
    machine_ids = set()
    for name in ("head", "worker1"):
        host = login(made, name)
        assert host.check_output("hostname") == name
        assert host.check_output("systemctl is-system-running") == "running"
        assert host.system_info.codename == "bookworm"
        assert not host.package("python3-venv").is_installed
        assert not host.exists("pip")
        assert host.file("/root").user == "root", "sudo asks for no password"
        # What a nested Docker needs: writable cgroups, and a file system that overlay can lie on.
        host.check_output("d=/sys/fs/cgroup; test ! -d $d/cpuset || d=$d/cpuset; mkdir $d/probe && rmdir $d/probe")
        assert host.mount_point("/var/lib/docker").exists
        assert host.check_output("df -BM --output=size /dev/shm | tail -n1").strip() == "2048M"
        for other in made.hosts:
            assert other.address in host.check_output(f"getent hosts {other.name}")
        machine_ids.add(host.file("/etc/machine-id").content_string)
    assert len(machine_ids) == 2


@pytest.mark.slow
def test_more_and_fewer_workers(client: Any, folder: Path) -> None:
    one = ids(lab.up(1, name=NAME, inventory_dir=folder))
    two = ids(lab.up(2, name=NAME, inventory_dir=folder))
    assert two.keys() == {"head", "worker1", "worker2"}
    assert one.items() <= two.items()
    made = lab.up(1, name=NAME, inventory_dir=folder)
    assert ids(made) == one
    assert "worker2" not in lab.hosts_path(folder).read_text()
    with pytest.raises(docker.errors.NotFound):
        client.containers.get(two["worker2"])


@pytest.mark.slow
def test_a_killed_up_is_finished_by_the_next(client: Any, folder: Path) -> None:
    before = ids(lab.up(1, name=NAME, inventory_dir=folder))
    client.containers.get(before["worker1"]).remove(v=True, force=True)
    script = (
        "import functools, pathlib; from clusterkit import lab\n"
        f"lab.up(2, name={NAME!r}, inventory_dir=pathlib.Path({str(folder)!r}),"
        " on_progress=functools.partial(print, flush=True))"
    )
    for line_to_die_at in ("worker2: made", "worker1: booting"):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert any(line.startswith(line_to_die_at) for line in process.stdout)
            process.send_signal(signal.SIGKILL)
    client.containers.get(before["head"]).kill()
    made = lab.up(2, name=NAME, inventory_dir=folder)
    assert ids(made)["head"] == before["head"]
    pinged = ping(made)
    assert pinged.stdout.count("pong") == 3, pinged.stdout + pinged.stderr


@pytest.mark.slow
def test_a_rebooted_host_and_a_pruned_network_come_back(client: Any, folder: Path) -> None:
    made = lab.up(1, name=NAME, inventory_dir=folder)
    assert ping(made).returncode == 0  # leaves shared connections, which would hang
    client.containers.get(ids(made)["worker1"]).exec_run("reboot")
    client.containers.get(ids(made)["worker1"]).wait(timeout=60)
    client.containers.get(ids(made)["head"]).stop(timeout=30)
    client.networks.prune(filters={"label": f"{lab.LABEL}={NAME}"})
    assert [host.container for host in lab.status(NAME).hosts] == ["exited", "exited"]
    again = lab.up(1, name=NAME, inventory_dir=folder)
    assert ids(again) == ids(made)
    assert ping(again).stdout.count("pong") == 2
    assert "worker1" in login(again, "head").check_output("getent hosts worker1")


def test_command_line(folder: Path) -> None:
    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--name", NAME, "--json"], catch_exceptions=False)
        assert result.exit_code == 0
        return json.loads(result.stdout)

    made = run("up", "-w", "1", "-i", str(folder))
    assert made["inventory"] == str(folder)
    assert [host["system"] for host in run("status")["hosts"]] == ["running", "running"]
    assert len(run("down", "-i", str(folder))["containers"]) == 2
    assert run("status")["exists"] is False


@pytest.mark.slow
def test_offline_has_no_route_out(client: Any, state: Path, tmp_path: Path) -> None:
    name = f"{NAME}-off"
    try:
        made = lab.up(1, name=name, inventory_dir=tmp_path, offline=True)
        assert made.subnet != lab.status(NAME).subnet
        host = login(made, "worker1")
        assert "default" not in host.check_output("ip route")
        assert host.run("ip route get 192.0.2.1").failed
        assert host.run("timeout 10 getent hosts deb.debian.org").rc == 2, "says soon that there is no answer"
        assert host.addr(made.hosts[0].address).port(22).is_reachable
        with pytest.raises(UsageError, match="route out"):
            lab.up(1, name=name, inventory_dir=tmp_path)
    finally:
        lab.down(name, tmp_path)
    assert not lab.status(name).exists


def test_down_leaves_nothing(client: Any, state: Path, folder: Path) -> None:
    lab.down(NAME, folder)
    before = inventory_of(client)
    made = lab.up(1, name=NAME, inventory_dir=folder)
    assert ping(made).returncode == 0
    sockets = list((made.private_key.parent / "cp").iterdir())
    assert len(sockets) == 2
    assert inventory_of(client) > before

    removed = lab.down(NAME, folder)
    assert len(removed.containers) == 2
    assert inventory_of(client) == before
    assert not folder.exists()
    assert [path for path in state.rglob("*") if path.name != "clusterkit"] == []
    still = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not any(str(socket) in still for socket in sockets)
    assert not lab.status(NAME).exists
    assert lab.down(NAME, folder) == lab.LabRemoved((), (), (), (), (), ())


@pytest.mark.slow
def test_down_keeps_what_the_user_wrote(client: Any, state: Path, folder: Path) -> None:
    """Also: what is left of a lab by hand is found, its volumes by their label."""
    made = lab.up(1, name=NAME, inventory_dir=folder)
    client.containers.get(ids(made)["worker1"]).remove(force=True)  # its volume stays
    own = folder / "group_vars" / "all" / "site.yml"
    own.write_text("mine: true\n")
    removed = lab.down(NAME, folder)
    assert len(removed.volumes) == 2
    assert client.volumes.list(filters={"label": f"{lab.LABEL}={NAME}"}) == []
    assert [path for path in folder.rglob("*") if path.is_file()] == [own]
    assert removed.kept == (f"{own}: not written by the lab",)
    own.unlink()
    shutil.rmtree(folder)
    assert os.listdir(state) in ([], ["clusterkit"])
