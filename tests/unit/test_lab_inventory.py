"""The lab without Docker: the inventory's text, addresses, apt sources, and what is refused beforehand."""

from __future__ import annotations

import ipaddress
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clusterkit import debian, lab
from clusterkit.errors import ToolMissing, UsageError

ADDRESSES = {"head": "198.18.0.10", "worker1": "198.18.0.11", "worker2": "198.18.0.12"}


def render(folder: Path) -> str:
    return lab.render_hosts(
        "lab",
        ADDRESSES,
        private_key=folder / "id_ed25519",
        known_hosts=folder / "known_hosts",
        control_path=f"{folder}/cp/%h",
    )


def net(text: str) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network(text)


def test_hosts_and_groups(tmp_path: Path) -> None:
    text = render(tmp_path)
    assert text.startswith(lab.MARKER)
    tree = yaml.safe_load(text)["all"]
    assert tree["vars"]["ansible_user"] == "ops"
    assert tree["vars"]["ansible_python_interpreter"] == "/usr/bin/python3"
    groups = tree["children"]
    assert groups["ray_head"]["hosts"] == {"head": {"ansible_host": "198.18.0.10"}}
    assert groups["ray_workers"]["children"]["cpu_pool"]["hosts"] == {
        "worker1": {"ansible_host": "198.18.0.11"},
        "worker2": {"ansible_host": "198.18.0.12"},
    }
    assert set(groups["managed_hosts"]["children"]) == {"ray_head", "ray_workers"}


def test_ansible_reads_it(tmp_path: Path) -> None:
    """Ansible itself resolves groups and variables, those of the group_vars files included."""
    files = lab.inventory_files(tmp_path, group_vars="answer: 42\n", pool_vars="pooled: true\n")
    for path, text in {**files, lab.hosts_path(tmp_path): render(tmp_path)}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [str(Path(sys.executable).with_name("ansible-inventory")), "-i", str(tmp_path), "--list"]
    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    variables = out["_meta"]["hostvars"]
    assert {host: values["answer"] for host, values in variables.items()} == dict.fromkeys(ADDRESSES, 42)
    assert [host for host, values in variables.items() if "pooled" in values] == ["worker1", "worker2"]
    assert out["ray_workers"]["children"] == ["cpu_pool"]


@pytest.mark.parametrize("folder", ["/state/lab", "/home/a user/state/lab"])
def test_ssh_reads_the_options(folder: str) -> None:
    """Paths with blanks pass YAML, Ansible's splitting and ssh's own quoting; host keys stay checked."""
    variables = yaml.safe_load(render(Path(folder)))["all"]["vars"]
    command = ["ssh", "-G", *shlex.split(variables["ansible_ssh_common_args"]), "198.18.0.10"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert f"userknownhostsfile {folder}/known_hosts" in out
    assert f"controlpath {folder}/cp/198.18.0.10" in out
    assert "stricthostkeychecking true" in out or "stricthostkeychecking yes" in out


def test_group_vars_are_valid_yaml_when_empty(tmp_path: Path) -> None:
    for text in lab.inventory_files(tmp_path, group_vars="", pool_vars="").values():
        assert text.startswith(lab.MARKER)
        assert yaml.safe_load(text) is None


def test_a_foreign_inventory_is_refused(tmp_path: Path) -> None:
    lab.hosts_path(tmp_path).write_text("all: {}\n")
    with pytest.raises(UsageError, match="not written by"):
        lab.up(1, name="unit", inventory_dir=tmp_path)
    assert lab.hosts_path(tmp_path).read_text() == "all: {}\n"


@pytest.mark.parametrize(
    ("workers", "name", "subnet", "match"),
    [
        (0, "unit", lab.DEFAULT_SUBNET, "at least one worker"),
        (245, "unit", lab.DEFAULT_SUBNET, "room for 244"),
        (1, "Unit 1", lab.DEFAULT_SUBNET, "no name"),
        (1, "unit", "198.18.0.1/24", "no IPv4 network"),
        (1, "unit", "198.18.0.0/29", "room for 0"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path: Path, workers: int, name: str, subnet: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        lab.up(workers, name=name, inventory_dir=tmp_path / "inventory", subnet=subnet)
    assert not (tmp_path / "inventory").exists()


def test_no_docker_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ToolMissing, match="Docker") as error:
        lab.up(1, name="unit", inventory_dir=tmp_path / "inventory")
    assert error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_first_free_subnet() -> None:
    first = net("198.18.0.0/24")
    assert lab.free_subnet(first, [net("172.17.0.0/16")]) == first
    assert lab.free_subnet(first, [first, net("198.18.1.128/25")]) == net("198.18.2.0/24")
    assert lab.free_subnet(net("198.19.255.0/24"), [net("198.19.0.0/16")]) == first
    with pytest.raises(UsageError, match="no free /24"):
        lab.free_subnet(first, [net("198.18.0.0/15")])
    with pytest.raises(UsageError, match=r"overlaps 10\.0\.0\.0/8"):
        lab.free_subnet(net("10.1.2.0/24"), [net("10.0.0.0/8")])


def test_routes_of_the_machine() -> None:
    text = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    )
    assert lab.parse_routes(text) == [net("192.168.1.0/24")]


def machine(root: Path, release: str, **lists: str) -> Path:
    (root / "etc/apt/sources.list.d").mkdir(parents=True)
    (root / "etc/os-release").write_text(release)
    for name, text in lists.items():
        (root / "etc/apt/sources.list.d" / name.replace("_", ".")).write_text(text)
    return root


def test_sources_of_a_debian_12_controller(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "ID=debian\nVERSION_CODENAME=bookworm\n",
        debian_sources=(
            "Types: deb deb-src\n# moved\nURIs: http://mirror.example/debian/\n"
            "Suites: bookworm bookworm-updates\n"
            "Components: main non-free-firmware\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
            "\n"
            "Types: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\nEnabled: no\n"
        ),
        vendor_sources=(
            "Types: deb\nURIs: http://vendor.example\nSuites: bookworm\nComponents: main\n"
            "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBGPL\n"
            " -----END PGP PUBLIC KEY BLOCK-----\n"
        ),
        tool_list=(
            "deb [arch=amd64 signed-by=/etc/apt/keyrings/tool.gpg] https://tool.example bookworm main\n"
            "deb https://mirror.example/security bookworm-security main # security\n"
            "#deb http://old.example/debian bookworm main\n"
            "deb cdrom:[Debian]/ bookworm main\n"
        ),
    )
    assert debian.debian_sources(None, root=root) == [
        "deb https://mirror.example/security bookworm-security main",
        "deb http://mirror.example/debian bookworm main non-free-firmware",
        "deb http://mirror.example/debian bookworm-updates main non-free-firmware",
    ]
    assert debian.debian_sources("http://given.example/debian", root=root) == [
        "deb http://given.example/debian bookworm main",
        "deb http://given.example/debian bookworm-updates main",
    ]


def test_sources_of_another_controller(tmp_path: Path) -> None:
    root = machine(tmp_path, "ID=ubuntu\nVERSION_CODENAME=noble\n", x_list="deb http://a.example noble main\n")
    assert debian.debian_sources(None, root=root) == [
        "deb http://deb.debian.org/debian bookworm main",
        "deb http://deb.debian.org/debian bookworm-updates main",
        "deb http://deb.debian.org/debian-security bookworm-security main",
    ]


def test_proxy_is_handed_on_unless_on_loopback() -> None:
    files = lab.proxy_files(
        {"HTTPS_PROXY": "http://proxy.example:3128", "http_proxy": "127.0.0.1:8080", "no_proxy": "a.example"},
        "198.18.0.0/24",
    )
    assert files["/etc/apt/apt.conf.d/80proxy"] == 'Acquire::https::Proxy "http://proxy.example:3128";\n'
    assert "no_proxy=a.example,localhost,127.0.0.1,198.18.0.0/24\n" in files["/etc/environment"]
    assert "http_proxy=" not in files["/etc/environment"].replace("https_proxy", "")
    assert lab.proxy_files({"http_proxy": "http://localhost:3128"}, "198.18.0.0/24") == {}


def test_more_hosts_than_the_kernel_lets_boot_are_refused_with_the_setting() -> None:
    lab.check_inotify(12, 128)
    lab.check_inotify(26, None)
    with pytest.raises(UsageError, match="26 lab hosts need 260 inotify instances") as refused:
        lab.check_inotify(26, 128)
    assert "fs.inotify.max_user_instances=1024" in (refused.value.hint or "")
