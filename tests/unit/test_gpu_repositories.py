"""What rocm_host and cuda_host tell the package managers, rendered by Ansible for hosts that are not at hand."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROXY = {"http": None, "https": None, "no_proxy": []}
ROCM = {
    "rocm_host_version": "7.2.3",
    "rocm_host_driver_version": "30.30.3",
    "rocm_host_proxy": PROXY,
    "rocm_host_user": "ray",
    "rocm_host_bin": "/opt/clusterkit/bin",
    "rocm_host_state_path": "/var/lib/clusterkit",
}
CUDA = {
    "cuda_host_driver_version": "",
    "cuda_host_gpu_model": "H100",
    "cuda_host_proxy": PROXY,
    "cuda_host_bin": "/opt/clusterkit/bin",
    "cuda_host_config_path": "/etc/clusterkit",
    "cuda_host_state_path": "/var/lib/clusterkit",
}
KERNELS = {
    "debian": "6.1.0-27-amd64",
    "ubuntu": "6.8.0-79-generic",
    "rhel": "5.14.0-570.12.1.el9_6.x86_64",
    "rocky": "5.14.0-570.12.1.el9_6.x86_64",
}
SWITCH = "10de:22a3:0680"

Case = tuple[str, str, dict[str, Any]]
Json = dict[str, Any]


def host(distribution: str, version: str, pci: list[str]) -> Json:
    return {
        "id": distribution,
        "version": version,
        "major": version.split(".")[0],
        "manager": "apt" if distribution in ("debian", "ubuntu") else "dnf",
        "architecture": "x86_64",
        "kernel": KERNELS[distribution],
        "cpu": "AuthenticAMD",
        "pci": pci,
    }


def render(role: str, base: Json, shown: list[str], cases: list[tuple[str, str, Json]], folder: Path) -> list[Json]:
    """The role's variables for each (distribution, version, options), in one run of Ansible on this machine."""
    variables = [f"{ROOT}/roles/{role}/defaults/main.yml", f"{ROOT}/roles/{role}/vars/main.yml"]
    tasks = []
    for number, (distribution, version, given) in enumerate(cases):
        pci = given.pop("pci", [])
        tasks.append(
            {
                "name": f"Render {number}",
                "ansible.builtin.set_fact": {
                    f"case_{number}": "{{ {" + ", ".join(f"'{name}': __{role}_{name}" for name in shown) + "} }}"
                },
                "vars": {
                    **base,
                    **{f"{role}_{name}": value for name, value in given.items()},
                    f"__{role}_read": {"host": host(distribution, version, pci)},
                    "role_path": f"{ROOT}/roles/{role}",
                },
            }
        )
    listed = ", ".join(f"case_{number}" for number in range(len(cases)))
    content = {"content": "{{ [" + listed + "] | to_json }}", "dest": f"{folder}/found.json", "mode": "0600"}
    tasks.append({"name": "Write them down", "ansible.builtin.copy": content})
    play = [
        {
            "name": "Render",
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars_files": variables,
            "tasks": tasks,
        }
    ]
    # Beside the role's templates, where its own tasks would find them.
    (folder / "templates").symlink_to(ROOT / "roles" / role / "templates")
    (folder / "play.yml").write_text(yaml.safe_dump(play))
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", str(folder / "play.yml")]
    command += ["-e", f"ansible_python_interpreter={sys.executable}"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[Json] = json.loads((folder / "found.json").read_text())
    return found


ROCM_CASES: dict[str, Case] = {
    "debian 12": ("debian", "12", {}),
    "debian 13": ("debian", "13", {}),
    "jammy": ("ubuntu", "22.04", {}),
    "noble": ("ubuntu", "24.04", {}),
    "el 9.6": ("rhel", "9.6", {}),
    "el 9.4": ("rhel", "9.4", {}),
    "el 10.0": ("rhel", "10.0", {}),
    "rocky": ("rocky", "9.6", {}),
    "7.0.0": ("rhel", "9.6", {"version": "7.0.0", "driver_version": "30.10"}),
    "no driver": ("ubuntu", "24.04", {"version": "7.2.4", "driver_version": ""}),
    "patch 0": ("ubuntu", "24.04", {"version": "7.1.0", "driver_version": "30.20.0"}),
    "mirror": ("debian", "12", {"repository_url": "http://mirror.example/amd", "container_toolkit": True}),
    "exporter": ("debian", "12", {"metrics_exporter": True}),
    "partitioned": ("debian", "12", {"compute_partition": "CPX", "memory_partition": "NPS4"}),
    "new ubuntu": ("ubuntu", "25.10", {"allow_unsupported": True}),
}
SHOWN = [
    "repository_files",
    "packages",
    "driver",
    "driver_path",
    "rocm_path",
    "table",
    "files",
    "units",
    "cmdline",
    "built_with",
]


@pytest.fixture(scope="module")
def rocm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    cases = [(one, two, dict(three)) for one, two, three in ROCM_CASES.values()]
    # What the module that loads the driver would say; one unit asks for it.
    base = {**ROCM, "__rocm_host_gpu_driver": {"state": "fits"}}
    found = render("rocm_host", base, SHOWN, cases, tmp_path_factory.mktemp("rocm"))
    return dict(zip(ROCM_CASES, found, strict=True))


def text(found: Json, ending: str) -> str:
    return next(str(file["content"]) for file in found["repository_files"] if file["path"].endswith(ending))


def deb822(found: str) -> list[dict[str, str]]:
    stanzas = [[line for line in part.splitlines() if line and line[0] != "#"] for part in found.split("\n\n")]
    return [dict(line.split(": ", 1) for line in stanza) for stanza in stanzas if stanza]


def ini(found: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(found)
    return parser


@pytest.mark.parametrize(
    ("case", "suite"), [("debian 12", "jammy"), ("debian 13", "noble"), ("jammy", "jammy"), ("noble", "noble")]
)
def test_debian_uses_ubuntus_folders(rocm: dict[str, Json], case: str, suite: str) -> None:
    stanzas = deb822(text(rocm[case], ".sources"))
    assert [stanza["URIs"] for stanza in stanzas] == [
        "https://repo.radeon.com/amdgpu/30.30.3/ubuntu",
        "https://repo.radeon.com/rocm/apt/7.2.3",
    ]
    assert {stanza["Suites"] for stanza in stanzas} == {suite}
    assert {stanza["Signed-By"] for stanza in stanzas} == {"/etc/apt/keyrings/clusterkit-rocm.gpg"}


def test_the_drivers_path_is_never_the_releases(rocm: dict[str, Json]) -> None:
    assert {case: (found["driver_path"], found["rocm_path"]) for case, found in rocm.items()} == {
        **dict.fromkeys(ROCM_CASES, ("30.30.3", "7.2.3")),
        "7.0.0": ("30.10", "7.0"),
        "no driver": ("30.30.4", "7.2.4"),
        "patch 0": ("30.20", "7.1"),
    }


@pytest.mark.parametrize(
    ("case", "driver", "rocm_folder"),
    [
        ("el 9.6", "amdgpu/30.30.3/el/9.6", "rocm/el9/7.2.3"),
        ("el 9.4", "amdgpu/30.30.3/el/9.4", "rocm/el9/7.2.3"),
        ("el 10.0", "amdgpu/30.30.3/el/10", "rocm/el10/7.2.3"),
        ("rocky", "amdgpu/30.30.3/el/9.6", "rocm/el9/7.2.3"),
        ("7.0.0", "amdgpu/30.10/el/9.6", "rocm/el9/7.0.0"),
    ],
)
def test_el_9_has_a_folder_per_minor_and_10_has_one(
    rocm: dict[str, Json], case: str, driver: str, rocm_folder: str
) -> None:
    found = text(rocm[case], ".repo")
    sections = ini(found)
    assert sections["clusterkit-amdgpu"]["baseurl"] == f"https://repo.radeon.com/{driver}/main/x86_64/"
    assert sections["clusterkit-rocm"]["baseurl"] == f"https://repo.radeon.com/{rocm_folder}/main"
    assert "$" not in found, "what a variable of dnf stands for is not AMD's to have"
    for section in sections.sections():
        assert sections[section]["gpgcheck"] == "1"
        assert sections[section]["gpgkey"] == "file:///etc/pki/rpm-gpg/RPM-GPG-KEY-clusterkit-rocm"
        assert sections[section]["priority"] == "50"


def test_the_package_of_the_pinned_driver(rocm: dict[str, Json]) -> None:
    """AMD's own: amdgpu-dkms 1:6.16.13.30300000-2278356.24.04 with amdgpu-dkms-firmware
    30.30.0.0.30300000-2278356.24.04, amdgpu-dkms 1:6.14.14.30100000-2204008.24.04, amd-smi-lib 24.7.1.60300-39~22.04.
    """
    assert "amdgpu-dkms-firmware=*.30300300-*" in rocm["jammy"]["packages"]
    assert {"amdgpu-dkms=*.30300300-*", "amd-smi-lib=*.70203-*"} <= set(rocm["jammy"]["packages"])
    # On EL the driver's has no such number: it is told by its firmware's.
    el = rocm["7.0.0"]
    assert {"amdgpu-dkms-firmware=*.30100000-*", "amd-smi-lib=*.70000-*"} <= set(el["packages"])
    assert not [name for name in el["packages"] if name.startswith("amdgpu-dkms=")]
    assert (el["built_with"], rocm["jammy"]["built_with"]) == ({"amdgpu-dkms": "amdgpu-dkms-firmware"}, {})
    assert {"amdgpu-dkms=*.30200000-*", "amd-smi-lib=*.70100-*"} <= set(rocm["patch 0"]["packages"])


def test_headers_of_the_running_kernel(rocm: dict[str, Json]) -> None:
    assert rocm["debian 12"]["packages"][0] == "linux-headers-6.1.0-27-amd64"
    version = "5.14.0-570.12.1.el9_6"
    assert rocm["el 9.6"]["packages"][:3] == [
        f"kernel-headers={version}",
        f"kernel-devel={version}",
        f"kernel-devel-matched={version}",
    ]
    assert not [name for name in rocm["el 10.0"]["packages"] if name.startswith("kernel-devel-matched")]
    assert rocm["rocky"]["packages"][:2] == ["kernel-headers", "kernel-devel"]
    assert "python3-dnf-plugin-versionlock" in rocm["el 9.6"]["packages"]


def test_the_table_of_distributions_grows_with_the_release(rocm: dict[str, Json]) -> None:
    assert rocm["7.0.0"]["table"]["debian"] == ["12"]
    assert "10.0" not in rocm["7.0.0"]["table"]["rhel"]
    assert rocm["patch 0"]["table"]["debian"] == ["12", "13"]
    assert rocm["no driver"]["table"]["rhel"] == ["9.4", "9.6", "10.0"]


def test_a_mirror_and_what_is_optional(rocm: dict[str, Json]) -> None:
    uris = [stanza["URIs"] for stanza in deb822(text(rocm["mirror"], ".sources"))]
    assert all(uri.startswith("http://mirror.example/amd/") for uri in uris)
    assert "http://mirror.example/amd/amd-container-toolkit/apt/" in uris
    assert "http://mirror.example/amd/rocm/rocm.gpg.key" in text(rocm["mirror"], ".sources")
    exporter = rocm["exporter"]
    assert "https://repo.radeon.com/device-metrics-exporter/apt/1.5.2" in text(exporter, ".sources")
    assert "amdgpu-exporter" in exporter["packages"]
    assert "amd-metrics-exporter.service" in [unit["name"] for unit in exporter["units"]]


def test_partition_modes_are_a_unit_of_the_boot_and_the_default_writes_none(rocm: dict[str, Json]) -> None:
    unit = next(
        file for file in rocm["partitioned"]["files"] if file["path"].endswith("clusterkit-gpu-partition.service")
    )
    assert "ExecStart=/opt/clusterkit/bin/gpu-partition apply CPX NPS4\n" in unit["content"]
    assert not [file for file in rocm["debian 12"]["files"] if "partition" in file["path"]]


def test_the_iommu_of_the_processor(rocm: dict[str, Json]) -> None:
    assert rocm["debian 12"]["cmdline"] == ["pci=realloc=off", "pci=bfsort", "iommu=pt", "amd_iommu=on"]


def test_an_allowed_distribution_takes_the_newest_folder(rocm: dict[str, Json]) -> None:
    assert {stanza["Suites"] for stanza in deb822(text(rocm["new ubuntu"], ".sources"))} == {"noble"}


# ------------------------------------------------------------------ cuda_host

CUDA_CASES: dict[str, Case] = {
    "ubuntu 580": ("ubuntu", "24.04", {"driver_branch": "580", "pci": [SWITCH]}),
    "ubuntu 590": ("ubuntu", "22.04", {"driver_branch": "590", "pci": [SWITCH]}),
    "ubuntu 570": ("ubuntu", "22.04", {"driver_branch": "570", "open_modules": False, "pci": [SWITCH]}),
    "debian": ("debian", "12", {"driver_version": "580.65.06"}),
    "el 9": ("rhel", "9.6", {"driver_branch": "580", "pci": [SWITCH], "gpu_model": "B200"}),
    "el 9 570": ("rocky", "9.6", {"driver_branch": "570", "pci": [SWITCH]}),
    "el 10": ("rocky", "10.0", {"driver_branch": "580", "open_modules": False, "dcgm": True}),
}


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    cases = [(one, two, dict(three)) for one, two, three in CUDA_CASES.values()]
    shown = ["files", "packages", "keys", "fabric_manager", "switches", "units"]
    found = render("cuda_host", CUDA, shown, cases, tmp_path_factory.mktemp("cuda"))
    return dict(zip(CUDA_CASES, ({**one, "repository_files": one["files"]} for one in found), strict=True))


def test_cuda_repositories(cuda: dict[str, Json]) -> None:
    base = "https://developer.download.nvidia.com/compute/cuda/repos"
    stanzas = deb822(text(cuda["debian"], ".sources"))
    assert [(stanza["URIs"], stanza["Suites"]) for stanza in stanzas] == [
        (f"{base}/debian12/x86_64/", "/"),
        ("https://nvidia.github.io/libnvidia-container/stable/deb/amd64/", "/"),
    ]
    assert cuda["debian"]["keys"][0]["url"] == f"{base}/debian12/x86_64/3bf863cc.pub"
    sections = ini(text(cuda["el 10"], ".repo"))
    assert sections["clusterkit-cuda"]["baseurl"] == f"{base}/rhel10/x86_64"
    assert cuda["el 9"]["keys"][0]["url"] == f"{base}/rhel9/x86_64/D42D0685.pub"
    assert cuda["el 9"]["keys"][0]["path"] == "/etc/pki/rpm-gpg/RPM-GPG-KEY-clusterkit-cuda"
    # A stream of modules is EL 9's alone.
    assert ini(text(cuda["el 9"], ".module"))["nvidia-driver"]["stream"] == "580-open"
    assert not [file for file in cuda["el 10"]["files"] if file["path"].endswith(".module")]


def test_names_of_ubuntus_packages_changed_with_590(cuda: dict[str, Json]) -> None:
    assert cuda["ubuntu 580"]["packages"][1:5] == [
        "nvidia-dkms-580-open=580.*",
        "libnvidia-compute-580=580.*",
        "nvidia-persistenced=580.*",
        "nvidia-utils-580=580.*",
    ]
    assert cuda["ubuntu 590"]["packages"][1:4] == [
        "nvidia-dkms-open=590.*",
        "libnvidia-compute=590.*",
        "nvidia-persistenced=590.*",
    ]
    assert cuda["ubuntu 570"]["packages"][1] == "nvidia-dkms-570=570.*"
    names = {case: found["fabric_manager"] for case, found in cuda.items() if found["switches"]}
    assert names == {
        "ubuntu 580": "nvidia-fabricmanager",
        "ubuntu 590": "nvidia-fabricmanager",
        "ubuntu 570": "nvidia-fabricmanager-570",
        "el 9": "nvidia-fabricmanager",
        "el 9 570": "nvidia-fabric-manager",
    }


def test_the_exact_driver_and_the_toolkit_at_one_version(cuda: dict[str, Json]) -> None:
    packages = cuda["debian"]["packages"]
    assert {"nvidia-kernel-open-dkms=580.65.06-*", "nvidia-driver-cuda=580.65.06-*"} <= set(packages)
    assert [name for name in packages if name.endswith("=1.19.1-*")] == [
        "nvidia-container-toolkit=1.19.1-*",
        "nvidia-container-toolkit-base=1.19.1-*",
        "libnvidia-container-tools=1.19.1-*",
        "libnvidia-container1=1.19.1-*",
    ]
    assert "nvidia-fabricmanager.service" not in cuda["debian"]["units"]
    assert {"nvlsm", "libnvsdm"} <= set(cuda["el 9"]["packages"])
    assert {"kmod-nvidia-latest-dkms=580.*", "datacenter-gpu-manager-4-cuda13"} <= set(cuda["el 10"]["packages"])


def test_device_files_are_made_before_anybody_opens_them(cuda: dict[str, Json]) -> None:
    for found in cuda.values():
        assert found["units"][0] == "clusterkit-nvidia-devices.service"
        unit = text(found, "clusterkit-nvidia-devices.service")
        assert "Before=docker.service clusterkit-ray.service nvidia-cdi-refresh.service\n" in unit
        assert "/usr/bin/nvidia-ctk system create-device-nodes --control-devices --load-kernel-modules\n" in unit


# ------------------------------------------------------------------ what runs at boot


def programs(folder: Path, **texts: str) -> dict[str, str]:
    """PATH with these programs in front."""
    for name, text in texts.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    return {"PATH": f"{folder}:{os.defpath}"}


def test_acs_is_switched_off_where_it_is_on(tmp_path: Path) -> None:
    """setpci of the three bridges: one has it on, one off, one has none."""
    (tmp_path / "0000:00:01.0").write_text("001f")
    (tmp_path / "0000:00:02.0").write_text("0000")
    environment = programs(
        tmp_path,
        systemd_detect_virt="exit 1",
        lspci='for device in 1 2 3; do echo "0000:00:0$device.0 PCI bridge: x"; done',
        setpci=f"""file="{tmp_path}/$2"; [ -e "$file" ] || exit 1
case "$3" in *=*) echo "${{3#*=}}" >"$file"; echo "$2" >>{tmp_path}/set ;; *) cat "$file" ;; esac""",
    )
    script = ROOT / "roles/rocm_host/files/acs-off"
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0000:00:01.0: off, was 001f\n"
    assert (tmp_path / "set").read_text() == "0000:00:01.0\n"
    # A bridge that keeps it on is no success.
    (tmp_path / "0000:00:01.0").write_text("001f")
    programs(tmp_path, setpci=f'[ "$2" = 0000:00:01.0 ] && cat {tmp_path}/"$2"')
    stuck = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert (stuck.returncode, stuck.stderr) == (1, "0000:00:01.0: still on\n")
    # In a virtual machine nothing is touched.
    programs(tmp_path, systemd_detect_virt="exit 0", lspci="exit 9")
    assert "left as it is" in subprocess.run([script], env=environment, capture_output=True, text=True).stdout


def test_partition_modes_are_set_in_their_order(tmp_path: Path) -> None:
    """Constructed: amd-smi's words as in the MI300X partitioning guide, files of sysfs as amdgpu names them."""
    for card in ("card1", "card2"):
        device = tmp_path / "sys/class/drm" / card / "device"
        device.mkdir(parents=True)
        (device / "current_compute_partition").write_text("SPX\n")
        (device / "current_memory_partition").write_text("NPS1\n")
    devices = f"{tmp_path}/sys/class/drm/card*/device"
    amd_smi = f"""echo "$@" >>{tmp_path}/asked
case "$*" in
  *--memory-partition*) read answer; [ "$answer" = Y ] || exit 1
    for folder in {devices}; do echo NPS4 >$folder/current_memory_partition; echo CPX >$folder/current_compute_partition
    done ;;
  *--compute-partition*) for folder in {devices}; do echo CPX >$folder/current_compute_partition; done ;;
esac"""
    environment = {**programs(tmp_path, amd_smi=amd_smi), "SYSFS": str(tmp_path / "sys")}
    script = ROOT / "roles/rocm_host/files/gpu-partition"

    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run([script, *words], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert run("check", "SPX", "NPS1") == (0, "")
    code, said = run("check", "CPX", "NPS4")
    assert (code, said.count("SPX/NPS1")) == (1, 2)
    assert not (tmp_path / "asked").exists(), "check sets nothing"
    assert run("apply", "CPX", "NPS4")[0] == 0
    assert (tmp_path / "asked").read_text().splitlines() == [
        "set --memory-partition NPS4",
        "set --gpu all --compute-partition CPX",
    ]
    assert run("check", "CPX", "NPS4") == (0, "")
    # Nothing is asked for twice, and the same memory mode is left alone.
    run("apply", "CPX", "NPS4")
    (tmp_path / "sys/class/drm/card1/device/current_compute_partition").write_text("SPX\n")
    run("apply", "CPX", "NPS4")
    assert (tmp_path / "asked").read_text().splitlines()[2:] == ["set --gpu all --compute-partition CPX"]
