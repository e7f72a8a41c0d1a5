"""What tier 0 makes of a host: each fault to its finding; what the timer does about it; how many may be out."""

from __future__ import annotations

import copy
import json
import os
import pwd
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_host_agent import AGENT, PYTHON, Host

from tests.support import ansible_playbook, load_script

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "roles/gpu_health/files"
NOW = 1_795_000_000
BOOT = "0f4ac8fe-1a8e-4c5b-8f0d-2b1c6a000001"

Json = dict[str, Any]


tool, places = load_script(FILES / "gpu-health"), load_script(FILES / "pool-slot")
THRESHOLDS = json.loads((FILES / "gpu-thresholds.json").read_text())
PATTERNS = json.loads((FILES / "gpu-log-patterns.json").read_text())
ADDRESSES = [f"0000:{bus}:00.0" for bus in ("05", "26", "46", "65", "85", "a6", "c5", "e5")]


def amd_gpu(index: int) -> Json:
    """A healthy MI300X, in the shape of gpus.py."""
    return {
        "index": index,
        "vendor": "amd",
        "model": "AMD Instinct MI300X",
        "accelerator_type": "AMD-Instinct-MI300X-OAM",
        "arch": "gfx942",
        "uuid": f"uuid-{index}",
        "serial": f"serial-{index}",
        "pci": {
            "address": ADDRESSES[index],
            "device_id": "0x74a1",
            "width": 16,
            "max_width": 16,
            "speed_gts": 32.0,
            "max_speed_gts": 32.0,
            "replays": 0,
            "recoveries": 5,
            "naks": 0,
        },
        "memory_mib": {"total": 196592, "used": 283},
        "driver": {"name": "amdgpu", "version": "6.16.13"},
        "firmware": {},
        "partition": {"compute": "SPX", "memory": "NPS1", "mig": None},
        "temperature_c": {"hotspot": 44, "memory": 37, "edge": None, "limit": 100},
        "power_w": 140,
        "power_limit_w": 750,
        "throttled": False,
        "ecc": {
            "enabled": True,
            "correctable": 0,
            "uncorrectable": 0,
            "deferred": 0,
            "bad_pages": 0,
            "remap_pending": False,
            "remap_failed": False,
        },
        "links": [
            {"peer": peer, "type": "XGMI", "up": True, "speed_gbps": 512.0}
            for peer in ADDRESSES
            if peer != ADDRESSES[index]
        ],
        "processes": [],
    }


def nvidia_gpu(index: int) -> Json:
    gpu = amd_gpu(index)
    gpu.update(vendor="nvidia", model="NVIDIA H200", accelerator_type="H200", arch="9.0")
    gpu["pci"]["device_id"] = "0x2335"
    gpu["driver"] = {"name": "nvidia", "version": "580.95.05"}
    gpu["links"] = [{"peer": None, "type": "NVLINK", "up": True, "speed_gbps": 212.5}] * 18
    gpu["ecc"].update(deferred=None)
    return gpu


def healthy(vendor: str = "amd") -> Json:
    make = amd_gpu if vendor == "amd" else nvidia_gpu
    devices = {"/dev/kfd": 1, "/dev/dri/renderD*": 8}
    if vendor == "nvidia":
        devices = {"/dev/nvidiactl": 1, "/dev/nvidia-uvm": 1, "/dev/nvidia<n>": 8}
    return {
        "reading": {"gpus": [make(index) for index in range(8)], "reason": None, "source": "amd-smi", "problems": []},
        "on_the_bus": 8,
        "nvswitches": 4 if vendor == "nvidia" else 0,
        "devices": devices,
        "fabric": {"mlx5_0:1": "ACTIVE"},
        "log": [(NOW - 5000, "Linux version 6.8.0")],
        "log_problem": None,
        "boot": BOOT,
        "now": NOW,
    }


def config(vendor: str = "amd", **changes: Any) -> Json:
    of = {"amd": ("rocm", "AMD-Instinct-MI300X-OAM", "30.30.3"), "nvidia": ("cuda", "H200", "580")}[vendor]
    given = {"accelerator": of[0], "accelerator_type": of[1], "driver": of[2], "vendor": vendor, "gpus": 8}
    return {**tool.DEFAULTS, **given, **changes}


def judge(
    host: Json, settings: Json, tier: str = "gate", state: Json | None = None, lifted: int = 0, runs: bool = False
) -> tuple[Any, Json]:
    verdict, following = tool.judge(host, settings, THRESHOLDS, PATTERNS, state or {}, tier, lifted, runs)
    return verdict, json.loads(json.dumps(following))


def log(*lines: str, at: int = NOW - 100) -> Callable[[Json], None]:
    return lambda host: host["log"].extend((at, line) for line in lines)


def put(*path: Any, value: Any) -> Callable[[Json], None]:
    """Changes one fact of GPU 6, at 0000:c5:00.0."""

    def change(host: Json) -> None:
        place = host["reading"]["gpus"][6]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def lose_gpu(bus: int) -> Callable[[Json], None]:
    def change(host: Json) -> None:
        host["on_the_bus"] = bus
        host["reading"]["gpus"].pop(6)
        for gpu in host["reading"]["gpus"]:
            gpu["links"] = [link for link in gpu["links"] if link["peer"] != ADDRESSES[6]]

    return change


def all_lost(host: Json) -> None:
    host["reading"].update(gpus=[], reason="8 AMD GPU(s) on the PCI bus (0x74a1), and the driver amdgpu is not loaded")
    host["log"] = [(NOW, "Linux version 6.8.0")]


def no_tool(host: Json) -> None:
    """What gpus.read says of GPUs that the driver holds, on a host without the vendor's tool."""
    words = "8 AMD GPU(s) on the PCI bus (0x74a1), and there is no amd-smi or Python package amdsmi"
    host["reading"].update(gpus=[], reason=words, problems=[words])


def device(name: str, count: int) -> Callable[[Json], None]:
    return lambda host: host["devices"].update({name: count})


def port(state: str | None) -> Callable[[Json], None]:
    return lambda host: host["fabric"].update({"mlx5_0:1": state})


def says(*problems: str) -> Callable[[Json], None]:
    return lambda host: host["reading"]["problems"].extend(problems)


def no_log(host: Json) -> None:
    host.update(log=None, log_problem="journalctl: No journal files were opened due to insufficient permissions.")


GPU6 = "GPU 6 (0000:c5:00.0)"
A = "amdgpu 0000:c5:00.0: amdgpu: "
X = "NVRM: Xid (PCI:0000:c5:00): "

# vendor, what breaks, the finding's check, its severity at the gate and at the timer, its subject, a word of its fix
FAULTS = {
    "a dead GPU that left the bus": ("amd", lose_gpu(7), "gpu_count", "error", "error", "host", "reseat"),
    "a GPU that the driver gave up": ("amd", lose_gpu(8), "gpu_count", "error", "error", "host", "driver"),
    "no driver": ("amd", all_lost, "gpu_count", "error", "error", "host", "driver"),
    # It would put a whole pool in quarantine; the count is left to the bus.
    "no tool": ("amd", no_tool, "tool_output", "error", "warning", "host", "deploy to this host again"),
    "a GPU too many": ("amd", lambda host: host["reading"]["gpus"].append({**amd_gpu(7), "index": 8}), "gpu_count",
                       "warning", "warning", "host", "clusterkit_gpus"),
    "another model": ("amd", put("accelerator_type", value="AMD-Instinct-MI325X-OAM"), "accelerator_type", "error",
                      "error", GPU6, "clusterkit_gpu_model"),
    "an old driver": ("amd", put("driver", "version", value="6.14.14"), "driver_version", "error", "warning", GPU6,
                      "deploy"),
    "an old NVIDIA driver": ("nvidia", put("driver", "version", value="575.57.08"), "driver_version", "error",
                             "warning", GPU6, "deploy"),
    "the inbox driver": ("amd", put("driver", "version", value="Linuxver"), "driver_version", "error", "warning", GPU6,
                         "deploy"),
    "no kfd": ("amd", device("/dev/kfd", 0), "devices", "error", "error", "host", "blacklisted"),
    "a render node too few": ("amd", device("/dev/dri/renderD*", 7), "devices", "error", "error", "host", "driver"),
    "no nvidia-uvm": ("nvidia", device("/dev/nvidia-uvm", 0), "devices", "error", "error", "host",
                      "clusterkit-nvidia-devices"),
    "an RDMA port down": ("amd", port("INIT"), "rdma_port", "warning", "error", "RDMA port mlx5_0:1", "switch port"),
    "an RDMA card gone": ("nvidia", port(None), "rdma_port", "warning", "error", "RDMA port mlx5_0:1", "cable"),
    "an nvidia device too few": ("nvidia", device("/dev/nvidia<n>", 7), "devices", "error", "error", "host", "driver"),
    "half the lanes": ("amd", put("pci", "width", value=8), "pcie_width", "error", "error", GPU6, "reseat"),
    "a slow link": ("amd", put("pci", "speed_gts", value=16.0), "pcie_speed", "error", "error", GPU6, "reseat"),
    "an XGMI link down": ("amd", put("links", 2, "up", value=False), "links", "error", "error", GPU6, "baseboard"),
    "an XGMI link missing": ("amd", put("links", value=[]), "links", "error", "error", GPU6, "baseboard"),
    "an NVLink down": ("nvidia", put("links", value=[{"peer": None, "type": "NVLINK", "up": False}]), "links", "error",
                       "error", GPU6, "reboot"),
    "an uncorrectable error": ("amd", put("ecc", "uncorrectable", value=1), "ecc_uncorrectable", "error", "error", GPU6,
                               "reset"),
    "a deferred error": ("amd", put("ecc", "deferred", value=1), "ecc_deferred", "error", "error", GPU6, "reset"),
    "some bad pages": ("amd", put("ecc", "bad_pages", value=12), "bad_pages", "warning", "warning", GPU6, "watch"),
    "too many bad pages": ("amd", put("ecc", "bad_pages", value=128), "bad_pages", "error", "error", GPU6, "RMA"),
    "a remapped row": ("nvidia", put("ecc", "bad_pages", value=1), "bad_pages", "info", "info", GPU6, "watch"),
    "a row to remap": ("nvidia", put("ecc", "remap_pending", value=True), "remap_pending", "error", "warning", GPU6,
                       "reset"),
    "a row that cannot be remapped": ("nvidia", put("ecc", "remap_failed", value=True), "remap_failed", "error",
                                      "error", GPU6, "RMA"),
    "hot while idle": ("amd", put("temperature_c", "hotspot", value=85), "temperature", "error", "error", GPU6, "fans"),
    "at its limit": ("nvidia", put("temperature_c", "hotspot", value=100), "temperature", "warning", "warning", GPU6,
                     "fans"),
    "throttled": ("amd", put("throttled", value=True), "throttling", "warning", "warning", GPU6, "cooling"),
    "an output of another format": ("amd", says("amd-smi metric: no JSON"), "tool_output", "error", "warning", "host",
                                    "by hand"),
    "a broken Python package beside amd-smi": ("amd", says("the Python package amdsmi ended with status 1: KeyError"),
                                               "tool_output", "warning", "warning", "host", "amd-smi-lib"),
    "a GPU that answers no more": ("nvidia", says(f"nvidia-smi: {GPU6} answers GPU is lost"), "gpu_lost", "error",
                                   "error", GPU6, "reboot"),
    "a GPU that is not listed": ("amd", says("PCI device 0000:c5:00.0 (0x74a1, driver none) is not among what amd-smi "
                                             "lists"), "gpu_lost", "error", "error", GPU6, "reboot"),
    "no kernel log": ("amd", no_log, "kernel_log", "error", "warning", "host", "journald"),
}  # fmt: skip
# Constructed after the patterns in amd/node-scraper @034f3e54 (dmesg_analyzer.py and its test), in ROCm/cvs @1999d2a8
# (verify_lib.py), after public bug reports, and of Xids after docs.nvidia.com/deploy/xid-errors.
PORT = "pcieport 0000:c0:01.1: "
LINES = {
    "log_gpu_reset": ("error", GPU6, A + "GPU reset begin!"),
    "log_gpu_reset_failed": ("error", GPU6, A + "GPU reset(2) failed"),
    "log_gpu_hang": ("error", "host", "amdgpu: qcm fence wait loop timeout expired"),
    "log_driver_init": ("error", "host", "[drm:x [amdgpu]] *ERROR* hw_init of IP block <psp> failed -22"),
    "log_poison": ("error", GPU6, A + "{12}poison is consumed by client 12, kick off gpu reset flow"),
    "log_ras_fatal": ("error", "host", "amdgpu: RAS event: ERREVENT_ATHUB_INTERRUPT detected!"),
    "log_ras_uncorrectable": ("error", GPU6, A + "die: 0 1 uncorrectable hardware errors detected in umc block"),
    "log_ras_correctable": ("warning", GPU6, A + "die: 0 1 correctable hardware errors detected in total in gfx block"),
    "log_bad_pages": ("error", "host", "amdgpu: Saved bad pages 130 reaches threshold value 128"),
    "log_aca": ("error", GPU6, A + "[Hardware error] Accelerator Check Architecture events logged"),
    "log_page_fault": ("warning", GPU6, A + "[gfxhub0] no-retry page fault (src_id:0 ring:0 vmid:0 pasid:0)"),
    "log_io_page_fault": ("error", GPU6, "amdgpu 0000:c5:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0000]"),
    "log_queues": ("error", GPU6, A + "MES failed to respond to msg=REMOVE_QUEUE"),
    "log_throttled": ("warning", GPU6, A + "WARN: GPU is throttled, expect performance decrease. GFX_CLK"),
    "log_oversubscribed": ("warning", GPU6, A + "Runlist is getting oversubscribed. Expect reduced ROCm performance."),
    "log_pcie_gone": ("error", "PCI device 0000:c0:01.1", PORT + "pciehp: Slot(12): Link Down"),
    "log_pcie_contained": ("error", "PCI device 0000:c0:01.1", PORT + "DPC: containment event, status:0x1f01"),
    "log_aer": ("error", "PCI device 0000:c0:01.1", PORT + "AER: aer_status: 0x00004000, aer_mask: 0x0"),
    "log_aer_corrected": ("warning", GPU6, "amdgpu 0000:c5:00.0: aer_cor_status: 0x00000040, aer_cor_mask: 0x00002000"),
    "log_mce": ("error", "host", "[Hardware Error]: Uncorrected, software restartable error."),
    "log_mce_corrected": ("warning", "host", "[Hardware Error]: Corrected error, no action required."),
    "log_out_of_memory": ("warning", "host", "Out of memory: Killed process 4242 (python3) total-vm:1kB"),
    "log_kernel_panic": ("error", "host", "Kernel panic - not syncing: Fatal exception"),
    "log_kernel_fault": ("error", "host", "general protection fault, probably for address 0xdead: 0000 [#1]"),
    "log_process_fault": ("warning", "host", "traps: python3[77] general protection fault ip:7f sp:7f error:0"),
    "log_stall": ("error", "host", "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
    "log_file_system": ("error", "host", "EXT4-fs error (device nvme0n1p2): ext4_find_entry:1455: inode #2"),
    "xid_13": ("warning", GPU6, X + "13, pid=77, name=python3, Graphics SM Warp Exception"),
    "xid_31": ("warning", GPU6, X + "31, pid=77, name=python3, MMU Fault: ENGINE GRAPHICS"),
    "xid_43": ("warning", GPU6, X + "43, pid=77, Ch 00000018"),
    "xid_48": ("error", GPU6, X + "48, pid=77, An uncorrectable double bit error (DBE) has been detected"),
    "xid_63": ("warning", GPU6, X + "63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate."),
    "xid_64": ("error", GPU6, X + "64, pid=1896, Row Remapper: Failed to record"),
    "xid_74": ("error", GPU6, X + "74, pid=77, NVLink: fatal error detected on link 2"),
    "xid_79": ("error", GPU6, X + "79, GPU has fallen off the bus."),
    "xid_94": ("warning", GPU6, "NVRM: Xid (PCI:0000:c5:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9)."),
    "xid_95": ("error", GPU6, X + "95, pid=7194, Uncontained: LTC TAG (0x2,0x0). RST: Yes, D-RST: No"),
    "xid_119": ("error", GPU6, X + "119, pid=77, Timeout after 6s of waiting for RPC response from GPU6 GSP!"),
    "xid_136": ("error", GPU6, X + "136, link training failed"),
    "xid_154": ("error", GPU6, X + "154, GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)"),
    "xid_999": ("warning", GPU6, X + "999, something new"),
}  # fmt: skip


@pytest.mark.parametrize("vendor", ["amd", "nvidia"])
@pytest.mark.parametrize("tier", ["gate", "timer"])
def test_a_healthy_host_has_no_findings(vendor: str, tier: str) -> None:
    verdict, _ = judge(healthy(vendor), config(vendor), tier)
    assert verdict.findings == []
    assert {"gpu_count", "devices", "driver_version", "pcie_width", "links", "kernel_log"} <= verdict.judged


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_becomes_a_finding(name: str) -> None:
    vendor, breaks, check, at_gate, at_timer, subject, hint = FAULTS[name]
    host = healthy(vendor)
    breaks(host)
    # The gate of a host whose node runs judges as the timer does: a driver that waits for consent is no fault.
    for tier, runs, severity in (("gate", False, at_gate), ("gate", True, at_timer), ("timer", False, at_timer)):
        found = judge(host, config(vendor), tier, runs=runs)[0].findings
        assert [(entry["check"], entry["severity"], entry["subject"]) for entry in found] == [
            (check, severity, subject)
        ]
        assert hint.lower() in found[0]["fix"].lower()


@pytest.mark.parametrize("check", LINES)
def test_a_line_of_the_kernel_log_becomes_a_finding(check: str) -> None:
    severity, subject, line = LINES[check]
    vendor = "nvidia" if check.startswith("xid") else "amd"
    host = healthy(vendor)
    log(line, line)(host)
    for tier in ("gate", "timer"):
        found = judge(host, config(vendor), tier)[0].findings
        assert [(entry["check"], entry["severity"], entry["subject"]) for entry in found] == [
            (check, severity, subject)
        ]
        assert "2 in the kernel log" in found[0]["problem"]
        assert found[0]["fix"]


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("=mlx5_0:1,mlx5_1:1,mlx5_2:1", {"mlx5_0:1": "ACTIVE", "mlx5_1:1": "DOWN", "mlx5_2:1": None}),
        # What is no list of ours is not judged: a pattern of the site's own, and AMD's plugin for ionic chooses itself.
        ("mlx5", {}),
        (None, {}),
    ],
)
def test_the_ports_of_the_fabric_are_those_that_the_deploy_wrote(
    tmp_path: Path, listed: str | None, found: dict[str, str | None]
) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n"), ("mlx5_9", "1: DOWN\n")):
        folder = tmp_path / f"sys/class/infiniband/{name}/ports/1"
        folder.mkdir(parents=True)
        (folder / "state").write_text(state)
    file = tmp_path / "fabric.json"
    file.write_text(json.dumps({"NCCL_IB_HCA": listed} if listed else {}))
    assert tool.read_fabric(str(tmp_path), str(file)) == found
    assert tool.read_fabric(str(tmp_path), str(tmp_path / "none.json")) == {}
    assert tool.read_fabric(str(tmp_path), None) == {}


def test_every_pattern_has_a_line_a_fix_and_a_source() -> None:
    patterns = PATTERNS["patterns"]
    assert {pattern["check"] for pattern in patterns} == {check for check in LINES if check.startswith("log_")}
    assert all(pattern["fix"] and pattern["source"] for pattern in patterns)
    limits = [*THRESHOLDS["vendors"].values(), *(model["limits"] for model in THRESHOLDS["models"].values())]
    assert all(entry["source"] for limit in limits for entry in limit.values())


@pytest.mark.parametrize(
    "line",
    [
        "pcieport 0000:c0:01.1: DPC: enabled with IRQ 26",
        "pcieport 0000:c0:01.1: DPC: error containment capabilities: Int Msg #0, RPExt+ PoisonedTLP+ SwTrigger+",
        "pcieport 0000:c0:01.1: AER: enabled with IRQ 26",
        A + "socket: 4, die: 0 0 uncorrectable hardware errors detected in total in umc block",
        A + "RAS: optional ras ta ucode is not available",
        X + "154, GPU recovery action changed from 0x2 (Node Reboot Required) to 0x0 (None)",
        "mce: [Hardware Error]: Machine check events logged",
        "amdgpu 0000:c5:00.0: aer_uncor_status: 0x00000000, aer_uncor_mask: 0x00000000",
    ],
)
def test_lines_of_every_boot_mean_nothing(line: str) -> None:
    host = healthy()
    log(line)(host)
    assert judge(host, config())[0].findings == []


def test_what_nobody_published_is_not_judged_and_the_report_says_so() -> None:
    host = healthy()
    for gpu in host["reading"]["gpus"]:
        gpu.update(accelerator_type="AMD-Instinct-MI350X-OAM")
        gpu["pci"]["device_id"] = "0x75a0"
        gpu["temperature_c"].update(hotspot=150, limit=None)
    settings = config(accelerator_type="AMD-Instinct-MI350X-OAM", driver="30.10")
    verdict, _ = judge(host, settings)
    assert verdict.findings == []
    unjudged = {entry["check"]: entry for entry in verdict.not_judged()}
    assert unjudged["temperature"]["why"] == "no limit is known for this model in this state"
    assert "driver 30.10" in unjudged["driver_version"]["why"]
    assert unjudged["temperature"]["subject"].count("GPU") == 8, "one entry for all of them"
    assert "temperature" not in verdict.judged
    verdict, _ = judge(host, {**settings, "limits": {"idle_hotspot_c": 90}})
    assert {entry["check"] for entry in verdict.findings} == {"temperature"}, "a site may know more"


def test_a_loaded_gpu_is_judged_by_its_own_limit_and_a_slow_idle_nvidia_link_is_normal() -> None:
    host = healthy()
    put("temperature_c", "hotspot", value=90)(host)
    put("processes", value=[{"pid": 1, "name": "vllm", "memory_mib": 100_000}])(host)
    assert judge(host, config())[0].findings == []
    host = healthy("nvidia")
    put("pci", "speed_gts", value=2.5)(host)
    assert judge(host, config("nvidia"))[0].findings == []
    put("memory_mib", "used", value=150_000)(host)
    found = judge(host, config("nvidia"))[0].findings
    assert [(entry["check"], entry["severity"]) for entry in found] == [("pcie_speed", "warning")], (
        "no work may do it too"
    )


def test_a_slot_may_have_fewer_lanes_than_a_gpu_that_nobody_wrote_about() -> None:
    host = healthy("nvidia")
    put("accelerator_type", value="T4")(host)
    put("pci", "width", value=8)(host)
    settings = config("nvidia", accelerator_type=None)
    assert [entry["severity"] for entry in judge(host, settings)[0].findings] == ["warning"]
    assert judge(host, {**settings, "limits": {"pcie_width": 8}})[0].findings == []


@pytest.mark.parametrize(
    ("wanted", "loaded", "same"),
    [
        ("30.30.3", "6.16.13", True),
        ("30.30.3", "6.16.1", False),
        ("6.16.13.30300300-2327507", "6.16.13", True),
        ("580", "580.95.05", True),
        ("58", "580.95.05", False),
        ("580.95.05", "580.95.05", True),
        ("580.95.05", "580.126.09", False),
    ],
)
def test_which_driver_is_the_wanted_one(wanted: str, loaded: str, same: bool) -> None:
    vendor = "nvidia" if loaded.startswith("58") else "amd"
    host = healthy(vendor)
    for gpu in host["reading"]["gpus"]:
        gpu["driver"]["version"] = loaded
    found = {entry["check"] for entry in judge(host, config(vendor, driver=wanted))[0].findings}
    assert found == (set() if same else {"driver_version"})


# ------------------------------------------------------------------ links


def nvlinks(*up: int, ports: int = 18, switches: int = 0) -> Json:
    """A host whose GPUs have so many NVLinks up, and the rest of their ports inactive."""
    host = healthy("nvidia")
    host["nvswitches"] = switches
    for gpu, count in zip(host["reading"]["gpus"], up + up[-1:] * (8 - len(up)), strict=True):
        gpu["links"] = [{"peer": None, "type": "NVLINK", "up": port < count} for port in range(ports)]
    return host


@pytest.mark.parametrize(
    ("host", "sick", "judged"),
    [
        (nvlinks(18, switches=4), 0, True),
        (nvlinks(17, 18, switches=4), 1, True),
        (nvlinks(0, 18, switches=4), 1, True),
        # A fabric that never came up.
        (nvlinks(0, switches=4), 8, True),
        # Bridges between pairs: four of the ports have nothing plugged in.
        (nvlinks(4, ports=8), 0, True),
        (nvlinks(3, 4, ports=8), 1, True),
        # A GPU without a bridge beside two with one, and a host without any.
        (nvlinks(0, 4, ports=8), 0, True),
        (nvlinks(0), 0, False),
    ],
)
def test_an_inactive_nvlink_is_a_fault_only_where_it_should_be_in_use(host: Json, sick: int, judged: bool) -> None:
    verdict, _ = judge(host, config("nvidia"))
    assert [entry["check"] for entry in verdict.findings] == ["links"] * sick
    assert ("links" in verdict.judged) is judged
    if not judged:
        assert {entry["why"] for entry in verdict.not_judged() if entry["check"] == "links"} == {
            "all of its NVLinks are inactive, and no NVSwitch is on the PCI bus"
        }


def test_a_tool_that_tells_no_links_at_all_has_not_lost_them_all() -> None:
    host = healthy()
    for gpu in host["reading"]["gpus"]:
        gpu["links"] = []
    verdict, _ = judge(host, config())
    assert verdict.findings == []
    assert ("links", "the tool tells the links of no GPU") in {
        (entry["check"], entry["why"]) for entry in verdict.not_judged()
    }


def test_a_site_can_switch_the_check_of_the_links_off() -> None:
    for host in (broken(put("links", 2, "up", value=False)), broken(put("links", value=[]))):
        assert [entry["check"] for entry in judge(host, config())[0].findings] == ["links"]
        verdict, _ = judge(host, config(limits={"links": None}))
        assert verdict.findings == []
        assert "links" not in verdict.judged
        assert "gpu_health_limits" in {entry["check"]: entry["why"] for entry in verdict.not_judged()}["links"]


# ------------------------------------------------------------------ counters


GROWTH = {
    "ecc_correctable": (("ecc", "correctable"), 1, "warning"),
    "pcie_recoveries": (("pci", "recoveries"), 101, "error"),
    "pcie_naks": (("pci", "naks"), 101, "error"),
    "pcie_replays": (("pci", "replays"), 11, "error"),
}


@pytest.mark.parametrize("check", GROWTH)
def test_counters_are_judged_by_their_growth(check: str) -> None:
    path, growth, severity = GROWTH[check]
    settings = config(limits={"replays": 10})
    host = healthy()
    put(*path, value=100_000)(host)
    first, state = judge(host, settings)
    assert first.findings == [], "what a counter stands at says nothing about today"
    assert "nothing to compare with" in {entry["check"]: entry["why"] for entry in first.not_judged()}[check]
    host["now"] += 600
    again, state = judge(host, settings, state=state)
    assert again.findings == []
    assert check in again.judged
    put(*path, value=100_000 + growth)(host)
    grown, following = judge(host, settings, state=state)
    assert [(entry["check"], entry["severity"], entry["subject"]) for entry in grown.findings] == [
        (check, severity, GPU6)
    ]
    assert f"{growth} " in grown.findings[0]["problem"]
    assert judge(host, settings, state=following)[0].findings == [], "the base moves on"
    put(*path, value=3)(host)
    reset, following = judge(host, settings, state=state)
    assert reset.findings == []
    put(*path, value=3 + growth)(host)
    assert [entry["check"] for entry in judge(host, settings, state=following)[0].findings] == [check]


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"now": NOW + 100_000}])
def test_another_boot_or_a_run_of_long_ago_is_no_base(changes: Json) -> None:
    host = healthy()
    _, state = judge(host, config())
    put("pci", "naks", value=5000)(host)
    assert [entry["check"] for entry in judge(host, config(), state=state)[0].findings] == ["pcie_naks"]
    host.update(changes)
    assert judge(host, config(), state=state)[0].findings == []


# ------------------------------------------------------------------ which lines of the log count


def test_the_gate_reads_since_boot_and_the_timer_since_its_last_run() -> None:
    host = healthy("nvidia")
    log(X + "79, GPU has fallen off the bus.")(host)
    settings = config("nvidia")
    _, state = judge(host, settings, "timer")
    assert judge(host, settings, "timer", state)[0].findings == []
    assert [entry["check"] for entry in judge(host, settings, "gate", state)[0].findings] == ["xid_79"]
    log(X + "79, GPU has fallen off the bus.", at=NOW - 50)(host)
    assert [entry["check"] for entry in judge(host, settings, "timer", state)[0].findings] == ["xid_79"]
    host["boot"] = "another"
    assert "2 in the kernel log" in judge(host, settings, "timer", state)[0].findings[0]["problem"]


def test_lines_from_before_a_release_were_dealt_with() -> None:
    host = healthy("nvidia")
    log(X + "95, pid=1, Uncontained", at=NOW - 100)(host)
    assert judge(host, config("nvidia"))[0].findings
    assert judge(host, config("nvidia"), lifted=NOW - 50)[0].findings == []
    assert judge(host, config("nvidia"), lifted=NOW - 150)[0].findings


def test_journal_and_dmesg_are_read() -> None:
    journal = "\n".join(
        json.dumps({"__REALTIME_TIMESTAMP": str(at), "MESSAGE": message})
        for at, message in ((1_000_000, "one"), (2_500_000, list(b"tw\xffo")), (3_000_000, None))
    )
    assert tool.parse_journal(journal + "\nno json")[:2] == [(1.0, "one"), (2.5, "tw\N{REPLACEMENT CHARACTER}o")]
    text = "2025-01-01T00:00:01,500000+00:00 amdgpu 0000:c5:00.0: x\nnot a time\n"
    assert tool.parse_dmesg(text) == [(1735689601.5, "amdgpu 0000:c5:00.0: x")]

    def only_dmesg(argv: list[str], timeout: int) -> tuple[int, str, str]:
        return (127, "", "not found") if argv[0] == "journalctl" else (0, text, "")

    assert tool.read_log(only_dmesg) == ([(1735689601.5, "amdgpu 0000:c5:00.0: x")], None)
    lines, why = tool.read_log(lambda argv, timeout: (1, "", f"{argv[0]} says no"))
    assert (lines, why) == (None, "journalctl: journalctl says no; dmesg: dmesg says no")


def test_a_log_line_cannot_smuggle_control_characters_into_the_record() -> None:
    host = healthy()
    log(A + "GPU reset begin! \x1b[31m\n" + "x" * 5000)(host)
    problem = judge(host, config())[0].findings[0]["problem"]
    assert problem.isprintable()
    assert len(problem) < 400


# ------------------------------------------------------------------ a tool that nobody can read


def test_a_new_output_format_empties_no_pool_and_joins_none() -> None:
    host = healthy()
    host["reading"].update(gpus=[], source="none", problems=["amd-smi static: no JSON in it"])
    timer, _ = judge(host, config(), "timer")
    assert {entry["severity"] for entry in timer.findings} == {"warning"}
    assert "gpu_count" not in timer.judged
    gate, _ = judge(host, config(), "gate")
    assert "error" in {entry["severity"] for entry in gate.findings}
    host["on_the_bus"] = 7
    assert ("gpu_count", "error") in {
        (entry["check"], entry["severity"]) for entry in judge(host, config(), "timer")[0].findings
    }, "the bus tells it without any tool"


# ------------------------------------------------------------------ the program itself


class Machine:
    """This machine with the agent, its pretended launcher, and a pretended answer of the pool's places."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.host = Host(folder)
        self.slot = folder / "slot"
        self.answer(0, '{"slot": 0}')
        self.settings = config(
            lib=str(ROOT / "plugins/module_utils"),
            thresholds=str(FILES / "gpu-thresholds.json"),
            patterns=str(FILES / "gpu-log-patterns.json"),
            state_dir=str(folder),
            record=str(self.host.record),
            agent=[PYTHON, str(AGENT), "--config", str(self.host.config)],
            drain=True,
            host="w1",
            pool="gpus",
            head_address="127.0.0.1:1",
            slot={
                "runtime": "venv",
                "python": PYTHON,
                "program": str(self.slot),
                "token_file": "/none",
                "user": pwd.getpwuid(os.getuid()).pw_name,
            },
            **changes,
        )
        self.state: Json = {}

    def answer(self, code: int, text: str) -> None:
        self.slot.write_text(f"import sys\nprint({text!r})\nsys.exit({code})\n")

    def watch(self, host: Json) -> Json:
        record = tool.read_record(self.settings)
        report, state = tool.watch(self.settings, host, self.state, record)
        self.state = json.loads(json.dumps(state))
        assert isinstance(report, dict)
        return report

    @property
    def calls(self) -> list[str]:
        file = self.host.folder / "calls"
        return [word for word in file.read_text().split() if word != "status"] if file.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.host.call("start")
    return machine


def broken(breaks: Callable[[Json], None]) -> Json:
    host = healthy()
    breaks(host)
    return host


SICK = put("ecc", "uncorrectable", value=2)


def test_the_timer_takes_a_sick_host_out(machine: Machine) -> None:
    assert machine.watch(healthy())["action"] is None
    report = machine.watch(broken(SICK))
    assert report["action"] == "none yet: what was found has to be there in the next run too"
    assert machine.calls == ["start"]
    report = machine.watch(broken(SICK))
    assert report["action"] == "drained, stopped and in quarantine"
    assert machine.calls == ["start", "drain", "stop"]
    entry = machine.host.read_record()["quarantine"]
    assert entry["reason"] == f"1 GPU error: ecc_uncorrectable on {GPU6}"
    assert entry["findings"] == report["findings"]
    assert machine.host.call("start")[0] == 3
    assert machine.watch(broken(SICK))["action"] == "in quarantine already"
    assert machine.calls == ["start", "drain", "stop"]


def test_a_fault_of_one_moment_is_only_reported(machine: Machine) -> None:
    """So looks a host whose driver is just being exchanged."""
    for moment in (all_lost, device("/dev/kfd", 0), SICK):
        report = machine.watch(broken(moment))
        assert (report["healthy"], report["action"][:8]) == (False, "none yet")
        assert machine.watch(healthy())["action"] is None
    assert machine.calls == ["start"]


def test_a_log_line_counts_at_once_and_until_people_have_seen_to_it(machine: Machine) -> None:
    machine.answer(0, '{"slot": null, "reason": "no place is free"}')
    fallen = broken(log(A + "GPU reset(2) failed"))
    assert machine.watch(fallen)["action"] == "report only: no place is free"
    fallen["now"] += 600
    report = machine.watch(fallen)
    assert [entry["check"] for entry in report["findings"]] == ["log_gpu_reset_failed"], (
        "the line was read, and counts on"
    )
    machine.answer(0, '{"slot": 0}')
    assert machine.watch(fallen)["action"] == "drained, stopped and in quarantine"
    machine.host.call("release")
    fallen["now"] += 600
    assert machine.watch(fallen)["healthy"] is True
    again = copy.deepcopy(fallen)
    again["boot"] = "another"
    again["log"] = []
    assert machine.watch(again)["healthy"] is True


@pytest.mark.parametrize(
    ("code", "text", "why"),
    [
        (0, '{"slot": null, "reason": "no place is free: w2 is"}', "report only: no place is free: w2 is"),
        (1, '{"slot": null, "reason": "no answer from the head"}', "report only: no answer from the head"),
        (1, "", "report only: no answer"),
        (0, '{"slot": null}', "report only: no place is free"),
    ],
)
def test_without_a_place_the_timer_only_reports(machine: Machine, code: int, text: str, why: str) -> None:
    machine.answer(code, text)
    for _ in range(3):
        report = machine.watch(broken(SICK))
    assert (report["healthy"], report["action"]) == (False, why)
    assert machine.calls == ["start"]
    assert not machine.host.read_record()["quarantine"]


def test_drain_is_off_by_default(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.settings["drain"] = tool.DEFAULTS["drain"]
    machine.answer(1, "nobody asks")
    for _ in range(3):
        assert machine.watch(broken(SICK))["action"] == "report only: gpu_health_drain is false"
    assert machine.calls == []


def test_work_that_cannot_move_keeps_the_host_in_service(machine: Machine) -> None:
    (machine.host.folder / "stuck").touch()
    for _ in range(2):
        report = machine.watch(broken(SICK))
    assert report["action"] == "report only: the work does not move away: work is still on the node after 120 s"
    assert "stop" not in machine.calls
    assert not machine.host.read_record()["quarantine"]


def test_a_host_in_maintenance_is_left_alone(machine: Machine) -> None:
    machine.host.call("hold", "--owner", "kim", "--reason", "new GPU")
    for _ in range(3):
        report = machine.watch(broken(SICK))
    assert report["action"] == "none: the host is held already"
    assert report["held"]["maintenance"]["owner"] == "kim"
    assert machine.calls == ["start"]


def quarantine_by(machine: Machine, owner: str) -> None:
    finding = {"check": "ecc_deferred", "severity": "error", "subject": GPU6, "problem": "1 error", "fix": "reset it"}
    given = {"owner": owner, "reason": f"1 GPU error: ecc_deferred on {GPU6}", "findings": [finding]}
    assert machine.host.call("quarantine", given=json.dumps(given))[0] == 0


def test_the_timer_moves_the_work_off_a_host_that_the_gate_found_sick(machine: Machine) -> None:
    quarantine_by(machine, tool.GATE_OWNER)
    machine.answer(0, '{"slot": null, "reason": "no place is free"}')
    assert machine.watch(healthy())["action"] == "report only: no place is free"
    assert machine.calls == ["start"]
    machine.answer(0, '{"slot": 0}')
    # What the gate read since boot is not what the timer reads: the gate's findings are the reason.
    assert machine.watch(healthy())["action"] == "drained, stopped and in quarantine"
    assert machine.calls == ["start", "drain", "stop"]
    entry = machine.host.read_record()["quarantine"]
    assert (entry["owner"], [found["check"] for found in entry["findings"]]) == ("gpu-health timer", ["ecc_deferred"])
    assert machine.watch(healthy())["action"] == "in quarantine already"
    assert machine.calls == ["start", "drain", "stop"]


@pytest.mark.parametrize("why", ["drain is off", "it is stopped", "people hold it", "people quarantined it"])
def test_the_timer_leaves_other_quarantined_hosts_alone(machine: Machine, why: str) -> None:
    quarantine_by(machine, "kim" if why == "people quarantined it" else tool.GATE_OWNER)
    if why == "drain is off":
        machine.settings["drain"] = False
    elif why == "it is stopped":
        machine.host.call("stop")
    elif why == "people hold it":
        machine.host.call("hold", "--owner", "kim", "--reason", "new GPU")
    before = machine.calls
    assert machine.watch(broken(SICK))["action"] == "none: the host is held already"
    assert machine.calls == before


def test_whether_the_node_runs_is_the_agents_word_and_else_the_records(machine: Machine) -> None:
    def runs() -> bool:
        found = tool.node_runs(machine.settings, tool.read_record(machine.settings), tool.run)
        assert isinstance(found, bool)
        return found

    assert runs() is True
    (machine.host.folder / "running").unlink()
    assert runs() is False, "a reboot ended it, and the record does not know"
    (machine.host.folder / "launcher").write_text("import sys; sys.exit(1)")
    assert runs() is True, "nobody knows: the record counts"
    record = machine.host.read_record()
    machine.host.write_record(**{**record, "instance_id": None})
    assert runs() is False


def test_a_driver_that_waits_for_a_reboot_takes_no_host_out(machine: Machine) -> None:
    for _ in range(3):
        report = machine.watch(broken(put("driver", "version", value="6.14.14")))
        assert (report["healthy"], report["action"]) == (True, None)


def call(folder: Path, settings: Json, *words: str) -> subprocess.CompletedProcess[str]:
    file = folder / "config.json"
    file.write_text(json.dumps({key: value for key, value in settings.items() if key != "vendor"}))
    argv = [PYTHON, str(FILES / "gpu-health"), "--config", str(file), *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.skipif(Path("/dev/kfd").exists() or Path("/dev/nvidiactl").exists(), reason="this machine has GPUs")
def test_the_program_on_a_machine_without_gpus(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.settings["drain"] = False
    done = call(tmp_path, machine.settings, "check", "--json", "--keep-state")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert (report["healthy"], report["tier"], report["gpus"]) == (False, 0, [])
    assert {"gpu_count", "devices"} <= {entry["check"] for entry in report["findings"]}
    assert report["reason"].startswith(
        f"{len([f for f in report['findings'] if f['severity'] == 'error'])} GPU errors: "
    )
    assert not (tmp_path / "gate-state.json").exists()

    given = {"owner": "gpu_health", "reason": report["reason"], "findings": report["findings"]}
    assert machine.host.call("quarantine", given=json.dumps(given))[1]["changed"] is True, "the agent takes it as it is"

    text = call(tmp_path, machine.settings, "check")
    assert text.stdout.startswith("sick: 0 GPUs")
    assert "Fix: " in text.stdout
    assert (tmp_path / "gate-state.json").stat().st_mode & 0o777 == 0o600

    watched = call(tmp_path, machine.settings, "watch")
    assert watched.returncode == 1
    assert "<3>host, gpu_count: 0 of 8 GPUs answer, 0 are on the PCI bus" in watched.stdout
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["action"] == "none: the host is held already"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": None}, "lacks gpus"),
        ({"accelerator": "tpu"}, "cuda or rocm"),
        ({"thresholds": "/none/x.json"}, "cannot read the limits /none/x.json"),
        ({"lib": "/none"}, "No module named 'gpus'"),
        ({"limits": {"pcie_width": "8"}}, "limits.pcie_width"),
        ({"limits": {"naks": True}}, "limits.naks"),
        ({"limits": {"full_mesh": 1}}, "limits.full_mesh"),
        ({"limits": {"links": 4}}, "limits.links"),
        ({"limits": ["naks"]}, "limits in"),
    ],
)
def test_a_wrong_configuration_is_told(tmp_path: Path, changes: Json, says: str) -> None:
    done = call(tmp_path, {**Machine(tmp_path).settings, **changes}, "check", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["check", "watch"])
def test_a_crash_is_never_taken_for_findings(tmp_path: Path, word: str) -> None:
    odd = tmp_path / "odd.json"
    odd.write_text('{"patterns": 3}')
    done = call(tmp_path, {**Machine(tmp_path).settings, "patterns": str(odd), "drain": False}, word)
    assert (done.returncode, done.stdout) == (2, "")
    assert "gpu-health: it failed: TypeError: " in done.stderr
    # What people may set, and what is looked at before it is used.
    good = {"naks": 3, "pcie_speed_gts": 2.5, "full_mesh": False, "links": None, "replays": None}
    tool.check_limits("x", good)


# ------------------------------------------------------------------ the role's tasks


def gate(folder: Path, answer: str, code: int, *options: str, said: str = "") -> tuple[int, str]:
    """(exit code, text) of tier 0 on this machine, where gpu-health answers like this."""
    program = folder / "gpu-health"
    program.write_text(f"import sys\nprint({answer!r})\nsys.stderr.write({said!r})\nsys.exit({code})\n")
    agent = Host(folder)
    task = {"name": "Role", "ansible.builtin.import_role": {"name": "gpu_health", "tasks_from": "tier0"}}
    (folder / "play.yml").write_text(
        json.dumps([{"name": "Gate", "hosts": "localhost", "gather_facts": False, "tasks": [task]}])
    )
    dummies = {f"gpu_health_{name}_path": str(folder) for name in ("root", "config", "state")}
    given = {"__gpu_health_agent": [PYTHON, str(AGENT), "--config", str(agent.config)],
             "__gpu_health_command": f"{PYTHON} {program}", **dummies}  # fmt: skip
    (folder / "given.json").write_text(json.dumps(given))
    words = ["-i", "localhost,", "-c", "local", "-e", f"@{folder}/given.json", str(folder / "play.yml")]
    run = ansible_playbook(folder, *words, *options)
    return run.code, run.text


def answer_for(host: Json, runs: bool = False) -> str:
    verdict, _ = judge(host, config(), runs=runs)
    return json.dumps(dict(tool.report_of(verdict, host, {}, NOW), node_runs=runs))


def quarantined(folder: Path) -> Any:
    file = folder / "host.json"
    return json.loads(file.read_text())["quarantine"] if file.exists() else None


@pytest.mark.slow
def test_the_gate_quarantines_what_is_sick_and_only_that(tmp_path: Path) -> None:
    both = broken(SICK)
    both["reading"]["problems"].append("amd-smi metric: no JSON")
    code, told = gate(tmp_path, answer_for(both, runs=True), 1)
    assert code != 0
    assert "Its node still runs: clusterkit host drain localhost --reason" in told
    entry = quarantined(tmp_path)
    assert (entry["owner"], [found["check"] for found in entry["findings"]]) == (
        "gpu-health gate",
        ["ecc_uncorrectable"],
    )


@pytest.mark.slow
def test_the_gate_refuses_a_host_that_nobody_can_judge_without_a_quarantine(tmp_path: Path) -> None:
    answer = answer_for(broken(says("amd-smi metric: no JSON")))
    code, told = gate(tmp_path, answer, 1)
    assert code != 0
    assert "goes no further, and not into quarantine: 1 GPU error: tool_output on host" in told
    assert "run the tool by hand" in told
    assert quarantined(tmp_path) is None
    code, told = gate(tmp_path, answer, 1, "--check")
    assert code == 0, "a plan goes on"
    assert "goes no further" in told


@pytest.mark.slow
def test_the_gate_lets_a_running_host_wait_for_its_reboot(tmp_path: Path) -> None:
    old = broken(put("driver", "version", value="6.14.14"))
    code, told = gate(tmp_path, answer_for(old, runs=True), 0)
    assert code == 0, told
    assert quarantined(tmp_path) is None
    code, told = gate(tmp_path, answer_for(old), 1)
    assert code != 0, "where the node is off, the host is not let in"
    assert quarantined(tmp_path)["findings"][0]["check"] == "driver_version"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "code", "said", "passes", "plan_passes"),
    [
        (answer_for(healthy()), 0, "", True, True),
        ("", 1, "Traceback (most recent call last):", False, False),
        ("", 0, "", False, False),
        ("healthy: 8 GPUs", 0, "", False, False),
        ("", 2, "gpu-health: it failed: KeyError: 'x'", False, False),
        ("", 2, "python3: can't open file '/opt/x/bin/gpu-health'", False, True),
        ("", 2, "gpu-health: cannot read the configuration /etc/x.json: gone", False, True),
    ],
)
def test_no_answer_is_no_pass(
    tmp_path: Path, answer: str, code: int, said: str, passes: bool, plan_passes: bool
) -> None:
    for options, good in (((), passes), (("--check",), plan_passes)):
        ended, told = gate(tmp_path, answer, code, *options, said=said)
        assert (ended == 0) is good, told


# ------------------------------------------------------------------ how many may be out


class Store:
    """The GCS's keys; `between` is what another host does just before this one adds."""

    def __init__(self, *alive: str) -> None:
        self.data: dict[bytes, bytes] = {}
        self.nodes = set(alive)
        self.between: list[Callable[[], object]] = []

    def keys(self, prefix: bytes) -> list[bytes]:
        return [key for key in self.data if key.startswith(prefix)]

    def get(self, key: bytes) -> bytes:
        return self.data[key]

    def add(self, key: bytes, value: bytes) -> bool:
        while self.between:
            self.between.pop()()
        if key in self.data:
            return False
        self.data[key] = value
        return True

    def alive(self) -> set[str]:
        return self.nodes


class Overwriting(Store):
    """The safeguard off: what was there is replaced."""

    def add(self, key: bytes, value: bytes) -> bool:
        self.data.pop(key, None)
        super().add(key, value)
        return True


def take(store: Store, host: str, max_out: int = 1, now: int = NOW) -> Any:
    members = [f"w{number}" for number in range(20)]
    request = {"pool": "gpus", "host": host, "node_ip": f"ip-{host}", "max_out": max_out, "members": members}
    return places.take(store, request, now)[0]


@pytest.mark.parametrize("max_out", [0, 1, 3, 12])
def test_never_more_hosts_than_places(max_out: int) -> None:
    store = Store(*(f"ip-w{number}" for number in range(10)))
    out = [take(store, f"w{number}", max_out) for number in range(10)]
    assert [slot for slot in out if slot is not None] == list(range(min(max_out, 10)))
    again = [take(store, f"w{number}", max_out) for number in range(10)]
    assert again == out, "who is out keeps its place"


@pytest.mark.parametrize(("kind", "both"), [(Store, False), (Overwriting, True)])
def test_two_that_see_the_same_free_place_do_not_both_get_it(kind: type[Store], both: bool) -> None:
    store = kind()
    won: list[Any] = []
    store.between.append(lambda: won.append(take(store, "w2")))
    mine = take(store, "w1")
    assert won == [0]
    assert (mine == 0) is both


def test_two_that_take_over_the_same_old_place_do_not_both_get_it() -> None:
    store = Store("ip-w3")
    assert take(store, "w3") == 0
    assert take(store, "w1", now=NOW + 60) is None, "w3 is still on its way out"
    later, won = NOW + 7200, []
    store.between.append(lambda: won.append(take(store, "w2", now=later)))
    assert take(store, "w1", now=later) is None
    assert won == [0]
    store.nodes.clear()
    assert take(store, "w1", now=later + 7200) is None, "w2 is not back in Ray"


def test_whoever_goes_out_again_renews_its_place_first() -> None:
    store = Store("ip-w3")
    assert take(store, "w3") == 0
    assert take(store, "w3", now=NOW + 1700) == 0
    assert take(store, "w1", now=NOW + 1900) is None, "it drains since a few minutes only"
    assert take(store, "w1", now=NOW + 3600) == 0


def test_a_host_that_is_no_longer_in_the_pool_holds_no_place() -> None:
    store = Store()
    assert take(store, "gone-host") == 0
    assert take(store, "w1") == 0
