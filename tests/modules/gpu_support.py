"""Hosts with GPUs that are not there: the tools as programs that print fixtures, and the kernel's folders as a tree."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils import gpus

from tests.modules.conftest import ROOT

FIXTURES = ROOT / "tests/modules/fixtures/gpu"
MI300X = FIXTURES / "constructed_mi300x_x8"
MI325X = FIXTURES / "constructed_mi325x_x8_rocm6"
H100 = FIXTURES / "constructed_h100_x8"

# Which file answers which question of amd-smi.
AMD_FILES = {question: question.replace(" -", "_") + ".json" for question in gpus.AMD_QUESTIONS}
AMD_FILES["partition"] = "partition.txt"

BDF = [f"0000:{bus}:00.0" for bus in ("05", "26", "46", "65", "85", "a6", "c6", "e5")]
H100_BDF = [f"0000:{bus}:00.0" for bus in ("1b", "43", "52", "61", "9d", "c3", "d1", "df")]

NUMBER = (int, float, type(None))
TEXT = (str, type(None))
COUNT = (int, type(None))
FLAG = (bool, type(None))
SHAPE: dict[str, Any] = {
    "index": int,
    "vendor": str,
    "model": str,
    "accelerator_type": TEXT,
    "arch": TEXT,
    "uuid": TEXT,
    "serial": TEXT,
    "pci": {
        "address": TEXT,
        "device_id": TEXT,
        "width": COUNT,
        "max_width": COUNT,
        "speed_gts": (float, type(None)),
        "max_speed_gts": (float, type(None)),
        "replays": COUNT,
        "recoveries": COUNT,
        "naks": COUNT,
    },
    "memory_mib": {"total": COUNT, "used": COUNT},
    "driver": {"name": TEXT, "version": TEXT},
    "firmware": dict,
    "partition": {"compute": TEXT, "memory": TEXT, "mig": FLAG},
    "temperature_c": {"hotspot": NUMBER, "memory": NUMBER, "edge": NUMBER, "limit": NUMBER},
    "power_w": NUMBER,
    "power_limit_w": NUMBER,
    "throttled": FLAG,
    "ecc": {
        "enabled": FLAG,
        "correctable": COUNT,
        "uncorrectable": COUNT,
        "deferred": COUNT,
        "bad_pages": COUNT,
        "remap_pending": FLAG,
        "remap_failed": FLAG,
    },
    "links": [{"peer": TEXT, "type": str, "up": bool, "speed_gbps": NUMBER}],
    "processes": [{"pid": int, "name": TEXT, "memory_mib": COUNT}],
}


def misfits(value: Any, shape: Any = None, place: str = "gpu") -> list[str]:
    """Where a GPU is not of the shape that its readers count on."""
    shape = SHAPE if shape is None else shape
    if isinstance(shape, dict):
        if not isinstance(value, dict) or set(value) != set(shape):
            return [f"{place}: {value!r}"]
        return [wrong for key in shape for wrong in misfits(value[key], shape[key], f"{place}.{key}")]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{place}: {value!r}"]
        return [wrong for entry in value for wrong in misfits(entry, shape[0], f"{place}[]")]
    kinds = shape if isinstance(shape, tuple) else (shape,)
    # A bool is an int in Python, and no count; NaN is no number; no placeholder of a tool is a text.
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)) and value == value
    return [] if fits and str(value).strip("[]").lower() not in ("n/a", "not supported") else [f"{place}: {value!r}"]


def amd_answers(folder: Path) -> dict[str, str]:
    """What amd-smi of a host prints, by question; a question without a file is one that its release does not know."""
    files = {question: folder / name for question, name in AMD_FILES.items()}
    return {question: path.read_text() for question, path in files.items() if path.exists()}


def nvidia_answers(folder: Path) -> dict[str, str]:
    names = {"xml": "q_x.xml", "table_": "query_gpu.csv", "nvlink": "nvlink_s.txt"}
    return {key: (folder / name).read_text() for key, name in names.items() if (folder / name).exists()}


def program(path: Path, answers: Mapping[str, tuple[str, int]], *, other: str = "exit 2") -> Path:
    """An executable that prints what belongs to its arguments (a shell pattern), and ends with the status given."""
    lines = ["#!/bin/sh", 'case "$*" in']
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, (pattern, (text, status)) in enumerate(answers.items()):
        said = path.parent / f".{path.name}-{number}"
        said.write_text(text)
        lines.append(f"  {pattern.replace(' ', chr(92) + ' ')}) cat {shlex.quote(str(said))}; exit {status} ;;")
    path.write_text("\n".join([*lines, f"  *) {other} ;;", "esac", ""]))
    path.chmod(0o755)
    return path


def amd_smi(path: Path, answers: Mapping[str, str], status: int = 0) -> Path:
    """amd-smi with these answers; as the real one it refuses subcommands that it does not have."""
    known = {f"{question} --json": (text, status) for question, text in answers.items()}
    return program(path, known, other="echo \"amd-smi: error: invalid choice: '$1'\" >&2; exit 2")


def nvidia_smi(path: Path, answers: Mapping[str, str]) -> Path:
    patterns = {"xml": "-q -x", "table_": "--query-gpu=*", "nvlink": "nvlink -s"}
    return program(path, {patterns[key]: (text, 0) for key, text in answers.items()})


def bus(
    root: Path, addresses: list[str], *, vendor: str, device: str, driver: str | None, module: str | None = None
) -> Path:
    """GPUs on the PCI bus of a host, as its kernel shows them, beside a network card of the same vendor."""
    kind = {"0x1002": "0x120000", "0x10de": "0x030200"}[vendor]
    for name in ["sys/module", *([f"sys/module/{module or driver}"] if module or driver else [])]:
        (root / name).mkdir(parents=True, exist_ok=True)
    for address, code in [*((address, kind) for address in addresses), ("0000:01:00.0", "0x020000")]:
        folder = root / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in {"vendor": vendor, "class": code, "device": device}.items():
            (folder / file).write_text(text + "\n")
        (folder / "current_link_speed").write_text("16.0 GT/s PCIe\n")
        (folder / "current_link_width").write_text("8\n")
        if driver and code == kind:
            (root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
            (folder / "driver").symlink_to(root / f"sys/bus/pci/drivers/{driver}")
    return root


# The functions that AMDSMI_SCRIPT calls, with names and results as in the PyPI wheel amdsmi 7.0.2, amdsmi_interface.py.
AMDSMI_PACKAGE = """
from enum import IntEnum

class AmdSmiTemperatureType(IntEnum):
    EDGE, HOTSPOT, VRAM = 0, 1, 3

class AmdSmiTemperatureMetric(IntEnum):
    CURRENT, CRITICAL = 0, 5

class AmdSmiMemoryPageStatus(IntEnum):
    RESERVED, PENDING, UNRESERVABLE = 0, 1, 2

class AmdSmiFwBlock(IntEnum):
    AMDSMI_FW_ID_RLC = 18

BDF = ["0000:05:00.0", "0000:26:00.0"]

class NotSupported(Exception):
    pass

def amdsmi_init(): print("a word of the library on stdout")
def amdsmi_shut_down(): pass
def amdsmi_get_processor_handles(): return [0, 1]
def amdsmi_get_gpu_device_bdf(handle): return BDF[handle]
def amdsmi_get_gpu_device_uuid(handle): return "00ff74a1-0000-1000-80%02d" % handle
def amdsmi_get_gpu_asic_info(handle):
    return {"market_name": "AMD Instinct MI300X", "vendor_id": "0x1002", "device_id": "0x74a1",
            "asic_serial": "0x%016X" % handle, "target_graphics_version": "gfx942"}
def amdsmi_get_gpu_board_info(handle): return {"product_serial": "N/A", "product_name": "N/A"}
def amdsmi_get_gpu_vbios_info(handle): return {"name": "x", "part_number": "113-X", "version": "022.040"}
def amdsmi_get_gpu_driver_info(handle): return {"driver_name": "amdgpu", "driver_version": "6.16.13"}
def amdsmi_get_gpu_vram_usage(handle): return {"vram_total": 196592, "vram_used": 283}
def amdsmi_get_power_info(handle): return {"socket_power": "N/A", "current_socket_power": 140}
def amdsmi_get_power_cap_info(handle): return {"power_cap": 750000000}
def amdsmi_get_temp_metric(handle, sensor, metric):
    if sensor == AmdSmiTemperatureType.EDGE:
        raise NotSupported
    return 100 if metric == AmdSmiTemperatureMetric.CRITICAL else 44
def amdsmi_get_gpu_total_ecc_count(handle):
    return {"correctable_count": 1, "uncorrectable_count": 0, "deferred_count": 0}
def amdsmi_get_gpu_ras_block_features_enabled(handle): return [{"block": "UMC", "status": "ENABLED"}]
def amdsmi_get_gpu_bad_page_info(handle):
    return [{"page_address": 1, "page_size": 4096, "status": AmdSmiMemoryPageStatus.PENDING}] if handle else []
def amdsmi_get_pcie_info(handle):
    return {"pcie_static": {"max_pcie_width": 16, "max_pcie_speed": 32000},
            "pcie_metric": {"pcie_width": 16, "pcie_speed": 32000, "pcie_replay_count": 0xFFFFFFFFFFFFFFFF,
                            "pcie_l0_to_recovery_count": 2, "pcie_nak_sent_count": 1,
                            "pcie_nak_received_count": "N/A"}}
def amdsmi_get_link_metrics(handle):
    return {"num_links": 2, "links": [{"bdf": BDF[1 - handle], "max_bandwidth": 512}, {"bdf": "0000:00:00.0"}]}
def amdsmi_get_gpu_xgmi_link_status(handle): return {"status": ["D" if handle else "U", "X"], "total_links": 2}
def amdsmi_get_gpu_compute_partition(handle): return "SPX"
def amdsmi_get_gpu_memory_partition(handle): raise NotSupported
def amdsmi_get_fw_info(handle): return {"fw_list": [{"fw_name": AmdSmiFwBlock.AMDSMI_FW_ID_RLC, "fw_version": "65"}]}
def amdsmi_get_violation_status(handle):
    return {"active_prochot_thrm": False, "active_ppt_pwr": True, "active_socket_thrm": bool(handle),
            "active_vr_thrm": False, "active_hbm_thrm": "N/A"}
def amdsmi_get_gpu_process_list(handle):
    return [{"name": "python3", "pid": 42, "mem": 0, "memory_usage": {"vram_mem": 1048576}}]
"""


def amdsmi_package(root: Path, text: str = AMDSMI_PACKAGE) -> Path:
    """The Python package where a ROCm release puts it."""
    folder = root / "opt/rocm/share/amd_smi/amdsmi"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(text)
    return folder.parent
