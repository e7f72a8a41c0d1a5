"""rdma_facts: what it reads from a tree laid out as the kernel documents it, and what it finds wrong.

The trees are constructed_*: after Documentation/ABI/stable/sysfs-class-infiniband of the kernel (state, phys_state,
rate, link_layer, gids, gid_attrs/types, gid_attrs/ndevs, fw_ver). None was recorded on a host with RDMA.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module, run_module

Json = dict[str, Any]

rdma = load_module("rdma_facts")

V1, V2 = "IB/RoCE v1", "RoCE v2"


def gid_text(address: str) -> str:
    """As the kernel prints a GID: eight groups of four digits."""
    parsed = ipaddress.ip_address(address)
    wide = ipaddress.IPv6Address(f"::ffff:{address}") if parsed.version == 4 else parsed
    assert isinstance(wide, ipaddress.IPv6Address)
    return wide.exploded


class Tree:
    """A host's /sys and /etc, and what its `ip` prints."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.addresses: dict[str, list[str]] = {}
        (root / "sys/class/net").mkdir(parents=True)
        self.write("etc/os-release", 'NAME="Rocky Linux"\nID="rocky"\nID_LIKE="rhel centos fedora"\n')

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def interface(self, name: str, *addresses: str, state: str = "up", mtu: int = 9000) -> None:
        self.write(f"sys/class/net/{name}/operstate", f"{state}\n")
        self.write(f"sys/class/net/{name}/mtu", f"{mtu}\n")
        self.addresses[name] = list(addresses)

    def device(
        self,
        name: str,
        gids: list[tuple[str, str, str]],
        *,
        driver: str | None = "mlx5_core",
        state: str = "4: ACTIVE",
        rate: str = "400 Gb/sec (4X NDR)",
        link: str = "Ethernet",
    ) -> None:
        """`gids`: (address, type, interface); what follows them is empty, as in a kernel's table."""
        base = f"sys/class/infiniband/{name}"
        self.write(f"{base}/fw_ver", "28.39.1002\n")
        if driver:
            target = self.root / f"sys/bus/pci/drivers/{driver}"
            target.mkdir(parents=True, exist_ok=True)
            (self.root / base / "device").mkdir(parents=True)
            (self.root / base / "device/driver").symlink_to(target)
        port = f"{base}/ports/1"
        self.write(f"{port}/state", f"{state}\n")
        self.write(f"{port}/phys_state", "5: LinkUp\n" if "ACTIVE" in state else "3: Disabled\n")
        self.write(f"{port}/rate", f"{rate}\n")
        self.write(f"{port}/link_layer", f"{link}\n")
        for index, (address, kind, interface) in enumerate(gids):
            self.write(f"{port}/gids/{index}", gid_text(address) + "\n")
            self.write(f"{port}/gid_attrs/types/{index}", kind + "\n")
            self.write(f"{port}/gid_attrs/ndevs/{index}", interface + "\n")
        # The kernel refuses to say the type of an unused entry; here there is no such file.
        self.write(f"{port}/gids/{len(gids)}", gid_text("::") + "\n")

    def nic(self, number: int, *, before: int = 2, mtu: int = 9000, **more: Any) -> None:
        """One RoCE NIC with its own interface; `before` link-local entries precede those of its address."""
        interface, address = f"ens{number}", f"10.0.{number}.7"
        link_local = f"fe80::{number + 1}"
        self.interface(interface, address, link_local, mtu=mtu)
        gids = [(link_local, V1, interface), (link_local, V2, interface)] * 2
        self.device(
            more.pop("name", f"mlx5_{number}"),
            [*gids[:before], (address, V1, interface), (address, V2, interface)],
            **more,
        )

    def run(self) -> tuple[int, str, str]:
        links = [
            {"ifname": name, "addr_info": [{"local": address} for address in found]}
            for name, found in self.addresses.items()
        ]
        return 0, json.dumps(links), ""

    def read(self) -> Json:
        found: Json = rdma.read(str(self.root), self.run)
        return found

    def judge(
        self, declared: str = "", wanted: tuple[str, ...] = (), required: bool = False
    ) -> tuple[Json, list[Json]]:
        fabric, findings = rdma.judge(self.read(), declared, wanted, required)
        assert all(set(item) == {"check", "severity", "subject", "problem", "fix"} for item in findings)
        return fabric, findings


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def told(findings: list[Json]) -> list[tuple[str, str]]:
    return [(item["check"], item["severity"]) for item in findings]


def test_a_host_of_eight_nics(tree: Tree) -> None:
    for number in range(8):
        tree.nic(number)
    fabric, findings = tree.judge(declared="ens0")
    assert findings == []
    assert fabric == {
        "family": "mlx5",
        "interface": "ens0",
        "hcas": [f"mlx5_{number}:1" for number in range(8)],
        "gid_index": 3,
    }


def test_what_is_read(tree: Tree) -> None:
    tree.nic(0, rate="2.5 Gb/sec (1X SDR)", state="1: DOWN")
    (device,) = tree.read()["devices"]
    assert (device["name"], device["family"], device["driver"], device["firmware"]) == (
        "mlx5_0",
        "mlx5",
        "mlx5_core",
        "28.39.1002",
    )
    (port,) = device["ports"]
    assert (port["state"], port["physical"], port["rate_gbps"], port["link_layer"]) == (
        "DOWN",
        "Disabled",
        2.5,
        "Ethernet",
    )
    assert port["interfaces"] == ["ens0"]
    assert [(gid["index"], gid["address"], gid["type"]) for gid in port["gids"]] == [
        (0, "fe80::1", V1),
        (1, "fe80::1", V2),
        (2, "10.0.0.7", V1),
        (3, "10.0.0.7", V2),
    ]
    assert tree.read()["distribution"] == ["rocky", "rhel", "centos", "fedora"]


@pytest.mark.parametrize("before", [0, 2, 4])
def test_the_index_is_where_the_address_really_is(tree: Tree, before: int) -> None:
    """Neither 1 nor 3 by convention, nor the first entry of the right type."""
    tree.nic(0, before=before)
    assert tree.judge()[0]["gid_index"] == before + 1


def test_an_address_that_only_the_table_has_is_not_used(tree: Tree) -> None:
    tree.nic(0)
    tree.addresses["ens0"] = ["10.9.9.9"]
    fabric, findings = tree.judge()
    assert (fabric["gid_index"], fabric["hcas"]) == (None, [])
    assert told(findings) == [("rdma-gid", "warning"), ("rdma-fabric", "warning")]
    assert "10.0.0.7 (3, RoCE v2)" in findings[0]["problem"]


def test_version_1_of_roce_is_not_used(tree: Tree) -> None:
    tree.interface("ens0", "10.0.0.7")
    tree.device("mlx5_0", [("10.0.0.7", V1, "ens0")])
    assert ("rdma-fabric", "warning") in told(tree.judge()[1])
    assert ("rdma-fabric", "error") in told(tree.judge(required=True)[1])


def test_a_vlan_on_the_port_has_an_index_of_its_own(tree: Tree) -> None:
    tree.interface("ens0", "10.0.0.7")
    tree.interface("ens0.100", "10.100.0.7")
    tree.device("mlx5_0", [("10.0.0.7", V2, "ens0"), ("10.100.0.7", V2, "ens0.100")])
    assert tree.judge(declared="ens0.100")[0]["gid_index"] == 1
    assert tree.judge(declared="ens0")[0]["gid_index"] == 0


def test_an_ipv6_fabric(tree: Tree) -> None:
    tree.interface("ens0", "fe80::1", "fd00::7")
    tree.device("mlx5_0", [("fe80::1", V2, "ens0"), ("fd00::7", V2, "ens0")])
    assert tree.judge()[0]["gid_index"] == 1


def test_infiniband_needs_no_index(tree: Tree) -> None:
    tree.device("mlx5_0", [("fe80::1", V1, "")], link="InfiniBand")
    fabric, findings = tree.judge()
    assert (fabric["hcas"], fabric["gid_index"], findings) == (["mlx5_0:1"], None, [])


def test_different_indexes_are_told_and_none_is_set(tree: Tree) -> None:
    tree.nic(0)
    tree.nic(1, before=4)
    fabric, findings = tree.judge(declared="ens0")
    assert (fabric["gid_index"], fabric["hcas"]) == (None, ["mlx5_0:1", "mlx5_1:1"])
    assert told(findings) == [("rdma-gid-index", "warning")]
    assert "mlx5_0:1 has 3, mlx5_1:1 has 5" in findings[0]["problem"]


def test_ports_that_are_down_or_slow_are_left_out(tree: Tree) -> None:
    tree.nic(0)
    tree.nic(1, rate="100 Gb/sec (4X EDR)")
    tree.nic(2, state="1: DOWN")
    fabric, findings = tree.judge(declared="ens0")
    assert fabric["hcas"] == ["mlx5_0:1"]
    assert [(item["check"], item["subject"], item["severity"]) for item in findings] == [
        ("rdma-port-slow", "mlx5_1 port 1", "warning"),
        ("rdma-port-down", "mlx5_2 port 1", "warning"),
    ]
    assert "100 Gb/s, its peers at 400" in findings[0]["problem"]


def test_a_card_that_nobody_cabled_stops_nobody_who_does_not_count_on_it(tree: Tree) -> None:
    """Servers come with such cards; their engines may talk over sockets."""
    tree.nic(0, state="1: DOWN")
    fabric, findings = tree.judge()
    assert fabric["hcas"] == []
    assert told(findings) == [("rdma-port-down", "warning"), ("rdma-fabric", "warning")]
    assert told(tree.judge(required=True)[1]) == [("rdma-port-down", "warning"), ("rdma-fabric", "error")]


def test_devices_that_the_site_names(tree: Tree) -> None:
    """They alone count, and one of them that is down or missing is an error."""
    tree.nic(0)
    tree.nic(1, rate="100 Gb/sec (4X EDR)")
    tree.nic(2, state="1: DOWN")
    fabric, findings = tree.judge(declared="ens1", wanted=("mlx5_1",))
    assert (fabric["hcas"], findings) == (["mlx5_1:1"], [])
    _, findings = tree.judge(declared="ens1", wanted=("mlx5_1", "mlx5_2", "mlx5_9"))
    assert told(findings) == [("rdma-device", "error"), ("rdma-port-down", "error")]
    assert "it has mlx5_0, mlx5_1, mlx5_2" in findings[0]["problem"]


def test_the_vendor_with_the_most_speed_carries_the_fabric(tree: Tree) -> None:
    tree.nic(0, name="bnxt_re0", driver="bnxt_en", rate="25 Gb/sec (1X EDR)")
    for number in (1, 2):
        tree.nic(number, name=f"ionic_{number}", driver="ionic")
    fabric, findings = tree.judge(declared="ens0")
    assert (fabric["family"], fabric["hcas"], findings) == ("ionic", ["ionic_1:1", "ionic_2:1"], [])


@pytest.mark.parametrize(
    ("name", "driver", "family"),
    [
        ("roce0", "mlx5_core", "mlx5"),  # renamed by udev
        ("bnxt_re0", "bnxt_en", "bnxt_re"),
        ("rdma_ionic0", "ionic", "ionic"),
        ("mlx5_0", None, "mlx5"),
        ("irdma0", "irdma", "irdma"),
        ("rxe0", None, "other"),
    ],
)
def test_families(tree: Tree, name: str, driver: str | None, family: str) -> None:
    tree.nic(0, name=name, driver=driver)
    assert tree.read()["devices"][0]["family"] == family


def test_names_come_in_the_order_of_their_numbers(tree: Tree) -> None:
    for number in (0, 10, 2):
        tree.nic(number)
    assert tree.judge(declared="ens0")[0]["hcas"] == ["mlx5_0:1", "mlx5_2:1", "mlx5_10:1"]


def test_the_only_interface_with_rdma_is_found(tree: Tree) -> None:
    tree.interface("eno1", "192.0.2.7")
    tree.nic(0)
    assert tree.judge()[0]["interface"] == "ens0"
    tree.nic(1)
    fabric, findings = tree.judge()
    assert fabric["interface"] is None
    assert "ens0, ens1" in findings[0]["problem"]


@pytest.mark.parametrize(
    ("declared", "severity", "words"),
    [
        ("bond0", "error", "the host has none of that name"),
        ("eno2", "error", "the fabric interface is down"),
        ("eno1", "warning", "belongs to no RDMA port; those have ens0"),
    ],
)
def test_a_declared_interface_that_is_not_as_declared(tree: Tree, declared: str, severity: str, words: str) -> None:
    tree.interface("eno1", "192.0.2.7")
    tree.interface("eno2", state="down")
    tree.nic(0)
    _, findings = tree.judge(declared=declared)
    assert (findings[0]["check"], findings[0]["severity"]) == ("fabric-interface", severity)
    assert words in findings[0]["problem"]
    assert tree.judge(declared="ens0")[1] == []


def test_different_mtus(tree: Tree) -> None:
    tree.nic(0)
    tree.nic(1, mtu=1500)
    _, findings = tree.judge(declared="ens0")
    assert told(findings) == [("fabric-mtu", "warning")]
    assert "ens0 9000, ens1 1500" in findings[0]["problem"]


def test_a_host_without_rdma(tree: Tree) -> None:
    assert tree.judge(declared="ens0")[1] == []
    assert told(tree.judge(required=True)[1]) == [("rdma-device", "error")]


def test_an_ip_that_fails_is_told(tree: Tree) -> None:
    tree.nic(0)
    for answer, words in [((127, "", "install iproute2"), "iproute2"), ((0, "<html>", ""), "cannot be understood")]:
        have = rdma.read(str(tree.root), lambda answer=answer: answer)
        fabric, findings = rdma.judge(have, "ens0")
        assert fabric["gid_index"] is None
        assert findings[0]["severity"] == "error"
        assert words in findings[0]["problem"]


def test_garbage_in_the_tree_never_raises(tree: Tree) -> None:
    tree.nic(0)
    port = "sys/class/infiniband/mlx5_0/ports/1"
    tree.write(f"{port}/gids/0", "zzzz:not a gid\n")
    tree.write(f"{port}/gids/other", "0\n")
    for name in ("state", "phys_state", "rate", "link_layer"):
        (tree.root / port / name).write_bytes(b"\xff\x00?")
    tree.write("sys/class/infiniband/mlx5_0/ports/x/state", "")
    tree.write("sys/class/infiniband/empty/fw_ver", "")
    fabric, findings = tree.judge()
    assert fabric["hcas"] == []
    assert ("rdma-port-down", "warning") in told(findings)


def test_the_module_on_this_machine_and_on_a_tree(tree: Tree) -> None:
    """With the machine's own `ip`: the loopback's address is one that it really has."""
    tree.interface("lo", state="unknown")
    tree.device("mlx5_0", [("::1", V2, "lo"), ("127.0.0.1", V2, "lo"), ("127.0.0.9", V2, "lo")])
    done = run_module(rdma, root=str(tree.root), interface="lo", check=True)
    assert not done["changed"]
    assert (done["fabric"]["gid_index"], done["findings"]) == (1, [])
    here = run_module(rdma)
    assert {"devices", "fabric", "findings", "distribution"} <= set(here)
    assert here["distribution"]
