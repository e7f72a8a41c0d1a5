"""The role rdma_fabric, run on this machine against trees that stand for /sys: what it writes for engines.

The trees are constructed, with the loopback as the NIC's interface: its address is one that this machine's `ip` has.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
ROCM = {
    "NCCL_IB_TIMEOUT": "30",
    "NCCL_IB_SL": "0",
    "NCCL_IB_TC": "0",
    "NCCL_IB_SPLIT_DATA_ON_QPS": "0",
    "NCCL_PXN_DISABLE": "0",
    "NCCL_IGNORE_CPU_AFFINITY": "1",
    "HSA_NO_SCRATCH_RECLAIM": "1",
    "IB_RX_QUEUE_LEN": "8192",
}
SOCKETS = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
V4, V6 = "0000:0000:0000:0000:0000:ffff:7f00:0001", "0000:0000:0000:0000:0000:0000:0000:0001"


def make_tree(root: Path, devices: dict[str, str], gids: list[str]) -> None:
    """`devices`: driver by name; each with one port and these GIDs of type RoCE v2."""
    files = {"sys/class/net/lo/operstate": "unknown", "sys/class/net/lo/mtu": "65536"}
    for name, driver in devices.items():
        port = f"sys/class/infiniband/{name}/ports/1"
        (root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        (root / f"sys/class/infiniband/{name}/device").mkdir(parents=True)
        (root / f"sys/class/infiniband/{name}/device/driver").symlink_to(root / f"sys/bus/pci/drivers/{driver}")
        files |= {f"{port}/state": "4: ACTIVE", f"{port}/rate": "400 Gb/sec (4X NDR)", f"{port}/link_layer": "Ethernet"}
        for index, gid in enumerate(gids):
            files[f"{port}/gids/{index}"] = gid
            files[f"{port}/gid_attrs/types/{index}"] = "RoCE v2"
            files[f"{port}/gid_attrs/ndevs/{index}"] = "lo"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")


@dataclass
class Case:
    devices: dict[str, str]
    gids: list[str]
    options: Json
    wanted: Json | None


CASES = {
    "mlx5_rocm": Case(
        {"mlx5_0": "mlx5_core", "mlx5_1": "mlx5_core"},
        [V6, V4],
        {"rdma_fabric_accelerator": "rocm", "rdma_fabric_rocm": "7.2.3"},
        {
            **ROCM,
            **SOCKETS,
            "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
            "NCCL_IB_GID_INDEX": "1",
            "NCCL_CUMEM_ENABLE": "0",
            "NCCL_DMABUF_ENABLE": "1",
            "NCCL_NET_PLUGIN": "none",
        },
    ),
    # Index 0 is an index, and no "nothing".
    "bnxt_rocm": Case(
        {"bnxt_re0": "bnxt_en"},
        [V4],
        {"rdma_fabric_accelerator": "rocm", "rdma_fabric_rocm": "7.2.3"},
        {
            **ROCM,
            **SOCKETS,
            "NCCL_IB_HCA": "=bnxt_re0:1",
            "NCCL_IB_GID_INDEX": "0",
            "NCCL_CUMEM_ENABLE": "1",
            "NCCL_DMABUF_ENABLE": "1",
            "NCCL_NET_PLUGIN": "none",
        },
    ),
    "ionic_rocm": Case(
        {"ionic_0": "ionic"},
        [V6, V4],
        {"rdma_fabric_accelerator": "rocm", "rdma_fabric_rocm": "7.0.0"},
        {
            **ROCM,
            **SOCKETS,
            "NCCL_IB_GID_INDEX": "1",
            "NCCL_CUMEM_ENABLE": "0",
            "NCCL_DMABUF_ENABLE": "0",
            "NCCL_IB_FIFO_TC": "0",
            "NCCL_NET_PLUGIN": "librccl-anp.so",
            "IONIC_LOCKFREE": "all",
            "NCCL_GDR_FLUSH_DISABLE": "1",
            "NCCL_IB_USE_INLINE": "1",
        },
    ),
    # What the site says stands above both, and becomes text.
    "mlx5_cuda": Case(
        {"mlx5_0": "mlx5_core"},
        [V4],
        {
            "rdma_fabric_accelerator": "cuda",
            "rdma_fabric_environment": {"NCCL_IB_TC": 106, "NCCL_IB_GID_INDEX": "3"},
        },
        {**SOCKETS, "NCCL_IB_HCA": "=mlx5_0:1", "NCCL_IB_GID_INDEX": "3", "NCCL_IB_TC": "106"},
    ),
    "head": Case(
        {"mlx5_0": "mlx5_core"},
        [V4],
        {"rdma_fabric_accelerator": None},
        {**SOCKETS, "NCCL_IB_HCA": "=mlx5_0:1", "NCCL_IB_GID_INDEX": "0"},
    ),
    # Its card is gone, and an earlier run left a file.
    "without": Case({}, [], {"rdma_fabric_accelerator": "rocm"}, None),
    # A port without an address, which nobody counts on: as if the card was not there.
    "unused": Case({"mlx5_0": "mlx5_core"}, [], {"rdma_fabric_accelerator": "rocm"}, None),
    "never": Case({"mlx5_0": "mlx5_core"}, [V4], {"rdma_fabric_enabled": "never"}, None),
}


class Site:
    """The playbook with one host for each case, all of them this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        hosts: Json = {}
        for name, case in CASES.items():
            make_tree(folder / name / "root", case.devices, case.gids)
            (folder / name / "config").mkdir()
            hosts[name] = {
                "tree": str(folder / name / "root"),
                "rdma_fabric_config_path": str(folder / name / "config"),
                "rdma_fabric_interface": "lo" if case.devices else "",
                **case.options,
            }
        common = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "rdma_fabric_rocm": "",
            "rdma_fabric_accelerator": "cpu",
            "rdma_fabric_user": "ray",
            "rdma_fabric_package_record": str(folder / "packages.json"),
            "rdma_fabric_proxy": {"http": None, "https": None, "no_proxy": []},
        }
        (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": common}}))
        play = {
            "name": "Fabric",
            "hosts": "all",
            "gather_facts": False,
            # What stands for this machine's /sys; the role itself has no such option.
            "module_defaults": {"rdma_facts": {"root": "{{ tree }}"}},
            "tasks": [{"name": "Role", "ansible.builtin.import_role": {"name": "rdma_fabric"}}],
        }
        (folder / "play.yml").write_text(yaml.safe_dump([play]))

    def play(self, *options: str) -> str:
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self.folder / "hosts.yml")]
        # Above the role's own vars: nothing of this test may be written below /etc.
        command += ["-e", '{"__rdma_fabric_limits": "{{ rdma_fabric_config_path }}/../limits.conf"}']
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        command += [str(self.folder / "play.yml"), *options]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        self.code = done.returncode
        return done.stdout + done.stderr

    def fabric(self, name: str) -> Json | None:
        file = self.folder / name / "config/fabric.json"
        found: Json | None = json.loads(file.read_text()) if file.exists() else None
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    if shutil.which("ip") is None:
        pytest.skip("there is no program ip (iproute2) on this machine")
    made = Site(tmp_path_factory.mktemp("fabric"))
    for name in ("without", "unused"):
        (made.folder / name / "config/fabric.json").write_text("{}")
    told = made.play("--check")
    assert made.code == 0, told
    # Check mode changed nothing.
    assert not (made.folder / "head/limits.conf").exists()
    told = made.play()
    assert made.code == 0, told
    return made


@pytest.mark.parametrize("name", CASES)
def test_the_environment(site: Site, name: str) -> None:
    assert site.fabric(name) == CASES[name].wanted
    limits = site.folder / name / "limits.conf"
    assert limits.exists() == (CASES[name].wanted is not None)
    if limits.exists():
        assert limits.read_text().endswith("ray soft memlock unlimited\nray hard memlock unlimited\n")


def test_a_second_run_changes_nothing_and_bare_hosts_cost_two_tasks(site: Site) -> None:
    told = site.play()
    assert told.count("changed=0") == len(CASES), told
    (recap,) = [line for line in told.splitlines() if line.startswith("without ")]
    # The third is Ansible's own, of the arguments.
    assert "ok=3 " in recap


def test_a_fabric_that_cannot_work_fails_the_host(site: Site) -> None:
    told = site.play("--limit", "head,without", "-e", "rdma_fabric_enabled=always rdma_fabric_interface=bond0")
    assert site.code == 2
    assert "error: interface bond0: the inventory declares this fabric interface" in told
    assert "error: host: the inventory counts on RDMA, and the kernel shows no RDMA device" in told


def test_a_fabric_without_a_usable_port_is_told_and_fails_only_who_counts_on_it(site: Site) -> None:
    told = site.play("--limit", "unused")
    assert site.code == 0, told
    assert "warning: host: no RDMA port of this host is usable" in told
    told = site.play("--limit", "unused", "-e", "rdma_fabric_enabled=always")
    assert site.code == 2
    assert "error: host: no RDMA port of this host is usable" in told


def test_remove_takes_away_what_the_role_made(site: Site) -> None:
    play = yaml.safe_load((site.folder / "play.yml").read_text())
    play[0]["tasks"][0]["ansible.builtin.import_role"]["tasks_from"] = "remove"
    (site.folder / "play.yml").write_text(yaml.safe_dump(play))
    told = site.play()
    assert site.code == 0, told
    assert not list(site.folder.glob("*/config/*"))
    assert not list(site.folder.glob("*/limits.conf"))
