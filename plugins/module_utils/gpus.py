"""GPU facts of a host in one shape, for AMD and NVIDIA.

Read from the `amdsmi` Python package of the ROCm release, else from `amd-smi`, and from `nvidia-smi`. No output
raises: what cannot be read is None in the facts and a sentence in `problems`. Needs Python 3.9 and nothing else: the
same file is a module_utils of Ansible and a library on the hosts.

Units: memory MiB, power W, temperature Celsius, PCIe speed GT/s per lane, links Gbit/s. Where the vendors differ:
`temperature_c.hotspot` is NVIDIA's GPU temperature, the one its limit is about; `bad_pages` are retired pages or
remapped rows; ECC counts are those since the driver was loaded; `remap_pending` and `remap_failed` are AMD's pages
that wait for their retirement, or could not be retired; `firmware.VBIOS` is also what newer amd-smi calls IFWI;
`throttled` is heat, power brake or another hardware slowdown, and not a reached power limit, which is normal work.

Shapes of AMD's output: ROCm/amdsmi amdsmi_cli (0ceca28f), ROCm/rocm-systems projects/amdsmi/amdsmi_cli/subcommands.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

TIMEOUT_S = 30
SILENT = "the tool lists none"
NO_TOOL = "there is no "
# What a `run` returns as a shell would: the program did not answer in time, or is not there.
HUNG, ABSENT = 124, 127

VENDORS = {
    "amd": {"name": "AMD", "pci": "0x1002", "module": "amdgpu"},
    "nvidia": {"name": "NVIDIA", "pci": "0x10de", "module": "nvidia"},
}
# PCI classes: display controllers, and processing accelerators (an MI300X is one). An AMD device of the class VGA is
# the board's or the processor's own graphics.
GPU_CLASSES = {"amd": ("0x0380", "0x0302", "0x12"), "nvidia": ("0x0300", "0x0302", "0x12")}
# A bridge of another kind, which is what an NVSwitch says that it is.
SWITCH_CLASSES = {"nvidia": ("0x0680",)}

# ray 2.60.0, ray/_private/accelerators/amd_gpu.py: what a node of such a device announces.
RAY_AMD = {
    "0x66a1": "AMD-Instinct-MI50",
    "0x6798": "AMD-Radeon-R9-200-HD-7900",
    "0x6799": "AMD-Radeon-HD-7900",
    "0x679a": "AMD-Radeon-HD-7900",
    "0x679b": "AMD-Radeon-HD-7900",
    "0x738c": "AMD-Instinct-MI100",
    "0x7408": "AMD-Instinct-MI250X",
    "0x740c": "AMD-Instinct-MI250X-MI250",
    "0x740f": "AMD-Instinct-MI210",
    "0x74a0": "AMD-Instinct-MI300A",
    "0x74a1": "AMD-Instinct-MI300X-OAM",
    "0x74a2": "AMD-Instinct-MI308X-OAM",
    "0x74a5": "AMD-Instinct-MI325X-OAM",
    "0x74a9": "AMD-Instinct-MI300X-HF",
    "0x75a0": "AMD-Instinct-MI350X-OAM",
    "0x75a3": "AMD-Instinct-MI355X-OAM",
}
# ray 2.60.0, ray/_private/accelerators/nvidia_gpu.py: capitals up to the first word with a digit.
RAY_NVIDIA = re.compile(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)")

UNKNOWN = {"", "n/a", "na", "none", "null", "unknown", "unknown error", "not supported", "not available", "err!"}
# Values that nvidia-smi puts in every field of a GPU that does not answer any more.
LOST = {"gpu is lost", "gpu requires reset", "unknown error"}
# All bits set: what the drivers return for a counter they do not have.
NO_COUNT = {0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}
NUMBER = re.compile(r"\s*([-+]?\d{1,25}(?:\.\d{1,25})?)")
ADDRESS = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])$")
GTS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
MIB = {"B": 1.0 / 1048576, "KB": 1.0 / 1024, "KIB": 1.0 / 1024, "GB": 1024.0, "GIB": 1024.0}


# Values


def blank(index, vendor):
    """The whole shape, nothing known."""
    return {
        "index": index,
        "vendor": vendor,
        "model": "%s GPU" % VENDORS[vendor]["name"],
        "accelerator_type": None,
        "arch": None,
        "uuid": None,
        "serial": None,
        "pci": dict.fromkeys(
            "address device_id width max_width speed_gts max_speed_gts replays recoveries naks".split()
        ),
        "memory_mib": {"total": None, "used": None},
        "driver": {"name": None, "version": None},
        "firmware": {},
        "partition": {"compute": None, "memory": None, "mig": None},
        "temperature_c": {"hotspot": None, "memory": None, "edge": None, "limit": None},
        "power_w": None,
        "power_limit_w": None,
        "throttled": None,
        "ecc": dict.fromkeys("enabled correctable uncorrectable deferred bad_pages remap_pending remap_failed".split()),
        "links": [],
        "processes": [],
    }


def subject(gpu):
    """How findings and problems name a GPU: `GPU 3 (0000:c5:00.0)`."""
    return "GPU %d (%s)" % (gpu["index"], gpu["pci"]["address"] or "address unknown")


def word(value):
    """Text, or None for every way to say that there is none."""
    if isinstance(value, dict):
        value = value.get("value")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    value = str(value).strip()
    bare = plain(value)
    return None if bare in UNKNOWN or bare in LOST or bare.startswith("requested functionality") else value


def plain(text):
    """A placeholder without its brackets: `[N/A]` is n/a."""
    return text.strip().lower().strip("[]")


def number(value, low=None, high=None):
    """A number from a bare one, a text with a unit, or {value, unit}; None outside of low and high."""
    if isinstance(value, dict):
        value = value.get("value")
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        match = NUMBER.match(value)
        if not match:
            return None
        value = float(match.group(1)) if "." in match.group(1) else int(match.group(1))
    if not isinstance(value, (int, float)) or value in NO_COUNT or abs(value) > 1 << 64 or not math.isfinite(value):
        return None
    if (low is not None and value < low) or (high is not None and value > high):
        return None
    return value


def count(value):
    found = number(value, 0)
    return None if found is None else int(found)


def celsius(value):
    return number(value, -60, 200)


def watts(value):
    return number(value, 0, 10000)


def lanes(value):
    found = number(value, 0, 32)
    return None if found is None else int(found)


def gigatransfers(value):
    """GT/s; what is 1000 and above is MT/s."""
    found = number(value, 0)
    if found is None:
        return None
    found = found / 1000.0 if found >= 1000 else float(found)
    return found if found <= 256 else None


def mebibytes(value, unit="MB"):
    """MiB. amd-smi writes MB and means MiB; `unit` is that of a bare number."""
    if isinstance(value, dict):
        unit = str(value.get("unit") or unit)
    elif isinstance(value, str):
        unit = "".join(re.findall("[A-Za-z]+", value)) or unit
    found = number(value, 0)
    return None if found is None else int(found * MIB.get(unit.upper(), 1))


def yes(value):
    """True, False or None from the words that the tools have for it."""
    if isinstance(value, bool):
        return value
    return {
        "yes": True,
        "no": False,
        "enabled": True,
        "disabled": False,
        "active": True,
        "not active": False,
        "throttled": True,
        "unthrottled": False,
        "true": True,
        "false": False,
    }.get(str(value).strip().lower())


def any_of(values):
    """True if one is, False if one is known and none is true, else None."""
    known = [value for value in values if value is not None]
    return any(known) if known else None


def total(values):
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def first(values):
    return next((value for value in values if value is not None), None)


def address(value):
    """`0000:05:00.0`, lower case; the domain in four digits where it fits."""
    match = ADDRESS.match(str(value).strip().lower())
    if not match:
        return None
    return "%04x:%s:%s.%s" % ((int(match.group(1), 16),) + match.groups()[1:])


def device_id(value):
    """`0x74a1` from 0x74A1, 74a1, 29857 or NVIDIA's 20B210DE."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "0x%04x" % value if 0 < value <= 0xFFFF else None
    match = re.match(r"\s*(?:0x)?([0-9a-f]{4})(?:10de)?\s*$", str(value).lower())
    return "0x%s" % match.group(1) if match else None


def nvidia_accelerator_type(name):
    """Ray's name for an NVIDIA product, by Ray's own rule (see RAY_NVIDIA)."""
    if not name:
        return None
    match = RAY_NVIDIA.match(name)
    if match and len(match.group(1)) > 1:
        return match.group(1).replace(" ", "-")
    return re.sub(r"^NVIDIA\s+", "", name).strip().replace(" ", "-") or None


def get(record, *path):
    """A value in nested dicts, None where a step of the path is no dict or not there."""
    for key in path:
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def pick(record, *names):
    """The first of several keys that holds more than a placeholder."""
    return first([word(get(record, name)) for name in names])


def measure(convert, record, *names):
    """The first of several keys whose value converts."""
    return first([convert(get(record, name)) for name in names])


def fill(facts, more):
    """Into `facts` what they lack and `more` knows."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(facts.get(key), dict):
            fill(facts[key], value)
        elif facts.get(key) is None or facts.get(key) == []:
            facts[key] = value


# Running programs


def run_program(argv, timeout):
    """(exit status, stdout, stderr). A program that hangs is killed, and left alone where even that does not help."""
    environment = dict(os.environ, LC_ALL="C", PYTHONWARNINGS="ignore")
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return ABSENT, "", "%s: %s" % (argv[0], error.strerror)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        try:
            os.killpg(process.pid, signal.SIGKILL)
            # A process that waits for a dead device dies with the device only: do not wait for it, too.
            process.wait(timeout=1)
        except (OSError, subprocess.TimeoutExpired):
            pass
        for pipe in (process.stdout, process.stderr):
            pipe.close()
        return HUNG, "", ""
    return process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


class Tool:
    """A program that is asked several questions; after one without an answer it is asked no more."""

    def __init__(self, name, path, run, timeout):
        self.name, self.path, self.run, self.timeout = name, path, run, timeout
        self.alive = self.present = path is not None

    def ask(self, *arguments):
        """(stdout, complaint): the complaint is None where the program ended well."""
        if not self.alive:
            return "", None
        # A script that is handed over is no part of the question.
        what = " ".join((self.name,) + arguments if "-c" not in arguments else (self.name,))[:60]
        try:
            status, out, err = self.run([self.path] + list(arguments), self.timeout)
        except Exception as error:
            return "", "%s: %r" % (what, error)
        out, err = (text.decode("utf-8", "replace") if isinstance(text, bytes) else text or "" for text in (out, err))
        if status == ABSENT and not out:
            self.alive = self.present = False
            return "", None
        if status == HUNG and not out:
            self.alive = False
            return "", "%s did not answer within %g s" % (what, self.timeout)
        said = first_line(err) or first_line(out) or "no word"
        return out, None if status == 0 else "%s ended with status %s: %s" % (what, status, said)


def first_line(text):
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), "")


def by_version(path):
    return [int(part) for part in re.findall(r"\d+", path)]


def program(name, root):
    """Where a program lies: PATH, then the places of ROCm's releases, the newest first."""
    found = shutil.which(name)
    if found:
        return found
    for pattern in ("usr/local/bin", "opt/rocm/bin", "opt/rocm-*/bin", "opt/rocm/core-*/bin"):
        for path in sorted(glob.glob(os.path.join(root, pattern, name)), key=by_version, reverse=True):
            if os.access(path, os.X_OK):
                return path
    return None


# JSON of amd-smi


OPENING = re.compile(r"[\[{]")
# What starts like a document, and not like a word of a banner in brackets.
DOCUMENT = re.compile(r"[\[{]\s*([\[{\"]|\Z)")


def lower(value):
    """Keys in lower case, at every depth."""
    if isinstance(value, dict):
        return {str(key).lower(): lower(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [lower(entry) for entry in value]
    return value


def documents(text):
    """(every JSON document in a text, whether one of them is damaged).

    Lines before, between and after them are passed over. Of a document that is cut off or broken, the whole objects
    in it are found, as documents of their own; a text that is broken in 100 places is given up.
    """
    decoder, found, damaged, position, tries = json.JSONDecoder(), [], False, 0, 0
    while tries < 100:
        match = OPENING.search(text, position)
        if not match:
            break
        try:
            document, position = decoder.raw_decode(text, match.start())
            # A blank or a piece of a banner, such as `[0]`, has no facts.
            if isinstance(document, dict) or any(isinstance(entry, (dict, list)) for entry in document):
                found.append(lower(document))
        except (ValueError, RecursionError):
            tries += 1
            position = match.start() + 1
            damaged = damaged or DOCUMENT.match(text, match.start()) is not None
    return found, damaged


def records(value, depth=0):
    """The per-GPU entries, whatever envelope they are in."""
    if depth > 4:
        return []
    if isinstance(value, dict):
        if "gpu" in value or "gpu_id" in value:
            return [value]
        value = [entry for entry in value.values() if isinstance(entry, (dict, list))]
    if isinstance(value, list):
        return [record for entry in value for record in records(entry, depth + 1)]
    return []


def gpu_number(record):
    value = record.get("gpu", record.get("gpu_id"))
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 4096 else None


def table(text):
    """({GPU number: its entries}, whether the output is damaged)."""
    found, damaged = documents(text)
    rows = {}
    for record in records(found):
        index = gpu_number(record)
        if index is not None:
            rows.setdefault(index, []).append(record)
    return rows, damaged


def section(rows, index):
    """All entries of a GPU as one."""
    joined = {}
    for record in rows.get(index, []):
        joined.update(record)
    return joined


# AMD


def amd_driver(value):
    """(name, version) from {name, version}, {driver_name, driver_version} or a text such as `amdgpu 6.8.5`."""
    if isinstance(value, dict):
        return pick(value, "name", "driver_name"), pick(value, "version", "driver_version")
    match = re.match(r"(?:([A-Za-z_]\w*)\s+)?v?(\d\S*|Linuxver\S*)?$", word(value) or "")
    return (match.group(1), match.group(2)) if match else (None, None)


def amd_pages(value):
    """How many pages: a list, a single page, or words for none."""
    if isinstance(value, list):
        return len(value)
    if isinstance(value, dict):
        return 1
    return 0 if isinstance(value, str) and value.lower().startswith("no bad pages") else None


def amd_processes(value):
    if isinstance(value, dict):
        value = list(value.values())
    found = []
    for entry in value if isinstance(value, list) else []:
        entry = get(entry, "process_info") or entry
        pid = count(get(entry, "pid"))
        if pid is not None:
            memory = [get(entry, "memory_usage", "vram_mem"), get(entry, "mem_usage"), get(entry, "mem")]
            memory = first([mebibytes(value, "B") for value in memory])
            found.append({"pid": pid, "name": word(get(entry, "name")), "memory_mib": memory})
    return found


def amd_firmware(value, image):
    found = {}
    for entry in value if isinstance(value, list) else []:
        name, version = pick(entry, "fw_id", "fw_name"), pick(entry, "fw_version")
        if name and version:
            found[name.upper()] = version
    vbios = pick(image, "version", "vbios_version", "part_number", "vbios_part_number")
    if vbios:
        found["VBIOS"] = vbios
    return found


def amd_partition(entries):
    """Compute and memory mode. The table of all profiles marks the current one with a star."""
    compute = memory = None
    for entry in entries:
        mode = pick(entry, "compute_partition", "accelerator_partition", "accelerator_type")
        if "profile_index" not in entry or str(mode).endswith("*"):
            match = re.match(r"[SDTQC]PX\b", str(mode))
            compute = compute or (match.group(0) if match else None)
        match = re.match(r"NPS\d+$", str(pick(entry, "memory_partition", "memory", "current_memory_partition")))
        memory = memory or (match.group(0) if match else None)
    return compute, memory


def amd_throttled(metric):
    heat = ("prochot", "socket_thermal", "vr_thermal", "hbm_thermal")
    known = any_of([yes(get(metric, "throttle", "%s_violation_status" % name)) for name in heat])
    # Older devices only: it does not tell heat from a reached power limit.
    return yes(get(metric, "power", "throttle_status")) if known is None else known


def amd_ecc(static, metric, pages):
    blocks = get(static, "ras", "ecc_block_state")
    if isinstance(blocks, list):
        blocks = {str(get(entry, "block")).lower(): get(entry, "status") for entry in blocks}
    states = {name: yes(state) for name, state in blocks.items()} if isinstance(blocks, dict) else {}
    kinds = [amd_pages(get(pages, kind)) for kind in ("retired", "pending", "un_res")]
    return {
        "enabled": first([states.get("umc"), any_of(states.values())]),
        "correctable": count(get(metric, "ecc", "total_correctable_count")),
        "uncorrectable": count(get(metric, "ecc", "total_uncorrectable_count")),
        "deferred": count(get(metric, "ecc", "total_deferred_count")),
        "bad_pages": total(kinds),
        "remap_pending": None if kinds[1] is None else kinds[1] > 0,
        "remap_failed": None if kinds[2] is None else kinds[2] > 0,
    }


def amd_gpu(index, parts):
    """One GPU from the entries of the questions: {question: entry}."""
    gpu = blank(index, "amd")
    static, metric, listed = (parts.get(name) or {} for name in ("static", "metric", "list"))
    bus, pcie, limit, vram = get(static, "bus"), get(metric, "pcie"), get(static, "limit"), get(static, "vram")
    names = [get(static, "asic", "market_name"), get(static, "board", "product_name")]
    names = [name for name in map(word, names) if name and not name.startswith("0x")]
    gpu["pci"].update(
        address=first([address(get(bus, "bdf")), address(get(listed, "bdf"))]),
        device_id=device_id(get(static, "asic", "device_id")),
        width=measure(lanes, pcie, "width", "current_width", "current_lanes"),
        max_width=measure(lanes, bus, "max_pcie_width", "max_pcie_lanes"),
        speed_gts=measure(gigatransfers, pcie, "speed", "current_speed"),
        max_speed_gts=gigatransfers(get(bus, "max_pcie_speed")),
        replays=count(get(pcie, "replay_count")),
        recoveries=count(get(pcie, "l0_to_recovery_count")),
        naks=total([count(get(pcie, "nak_sent_count")), count(get(pcie, "nak_received_count"))]),
    )
    kind = gpu["pci"]["device_id"]
    gpu["model"] = first(names + ["AMD GPU %s" % kind if kind else gpu["model"]])
    gpu["arch"] = (word(get(static, "asic", "target_graphics_version")) or "").lower() or None
    gpu["uuid"] = pick(listed, "uuid", "gpu_uuid")
    gpu["serial"] = first([word(get(static, "board", "product_serial")), word(get(static, "asic", "asic_serial"))])
    installed = mebibytes(get(metric, "mem_usage", "total_vram"))
    gpu["memory_mib"]["total"] = measure(mebibytes, vram, "size", "vram_size_mb") if installed is None else installed
    gpu["memory_mib"]["used"] = mebibytes(get(metric, "mem_usage", "used_vram"))
    gpu["driver"]["name"], gpu["driver"]["version"] = amd_driver(get(static, "driver"))
    image = first([get(static, "ifwi"), get(static, "vbios")])
    gpu["firmware"] = amd_firmware(get(parts.get("firmware"), "fw_list"), image)
    entries = parts.get("partition") or []
    if isinstance(get(static, "partition"), dict):
        entries = entries + [static["partition"]]
    gpu["partition"]["compute"], gpu["partition"]["memory"] = amd_partition(entries)
    gpu["temperature_c"].update(
        hotspot=celsius(get(metric, "temperature", "hotspot")),
        memory=celsius(get(metric, "temperature", "mem")),
        edge=celsius(get(metric, "temperature", "edge")),
        limit=celsius(get(limit, "slowdown_hotspot_temperature")),
    )
    powers = ("socket_power", "current_socket_power", "average_socket_power")
    gpu["power_w"] = measure(watts, get(metric, "power"), *powers)
    newer = measure(watts, get(limit, "ppt0"), "socket_power_limit")
    gpu["power_limit_w"] = measure(watts, limit, "socket_power", "max_power") if newer is None else newer
    gpu["throttled"] = amd_throttled(metric)
    pages = parts.get("bad-pages")
    gpu["ecc"] = amd_ecc(static, metric, get(pages, "values") or pages)
    gpu["processes"] = amd_processes(get(parts.get("process"), "process_list"))
    return gpu


def link(peer, kind, up, speed):
    return {"peer": peer, "type": kind, "up": up, "speed_gbps": speed}


def xgmi_links(states, metrics, topology):
    """{GPU number: links} from `xgmi -l`, `xgmi -m` and, where the first says nothing, `topology`.

    Newer releases list a state per GPU, older ones a state per port, which does not tell the peer. States are per GPU
    where each list has an entry for every GPU and its own one is SELF or disabled.
    """
    speeds = {
        index: number(get(section(metrics, index), "link_metrics", "max_bandwidth"), 0, 1000000) for index in metrics
    }
    lists = {index: get(section(states, index), "link_status") for index in states}
    lists = {index: list(map(str, found)) for index, found in lists.items() if isinstance(found, list)}
    peers = [address(get(section(states, index), "bdf")) for index in sorted(lists)]
    own = [found[place] for place, found in enumerate(map(lists.get, sorted(lists))) if place < len(found)]
    per_gpu = all(len(found) == len(lists) for found in lists.values()) and (
        "SELF" in own or (len(own) > 1 and set(own) == {"X"})
    )
    found = {}
    for index, letters in lists.items():
        for place, letter in enumerate(letters):
            for state in letter.split("/"):
                if state in ("U", "D"):
                    peer = peers[place] if per_gpu else None
                    found.setdefault(index, []).append(link(peer, "XGMI", state == "U", speeds.get(index)))
    for index in topology if not found else ():
        entries = get(section(topology, index), "links")
        for entry in entries if isinstance(entries, list) else []:
            if str(get(entry, "link_type")).upper() == "XGMI" and gpu_number(entry) != index:
                up = yes(get(entry, "link_status"))
                found.setdefault(index, []).append(
                    link(address(get(entry, "bdf")), "XGMI", up is not False, speeds.get(index))
                )
    return found


# Subcommands of amd-smi. topology is slow, and asked only where xgmi tells nothing.
AMD_QUESTIONS = (
    *("list", "static", "metric", "firmware", "bad-pages", "process", "partition", "xgmi -l", "xgmi -m"),
    *("topology", "version"),
)


def parse_amd_smi(answers):
    """(GPUs, problems) from {question of AMD_QUESTIONS: its output}. All may be missing, or be anything."""
    problems, tables = [], {}
    for question in AMD_QUESTIONS:
        text = answers.get(question) or ""
        try:
            tables[question], damaged = table(text)
        except Exception as error:
            tables[question], damaged = {}, True
            problems.append("amd-smi %s: %r" % (question, error))
        if damaged:
            problems.append("amd-smi %s: its output is cut off or broken; what was whole in it is used" % question)
    try:
        links = xgmi_links(tables["xgmi -l"], tables["xgmi -m"], tables["topology"])
    except Exception as error:
        links = {}
        problems.append("amd-smi xgmi: %r" % error)
    driver = (None, None)
    for found in documents(answers.get("version") or "")[0]:
        for entry in found if isinstance(found, list) else [found]:
            driver = amd_driver(get(entry, "amdgpu_version")) if driver == (None, None) else driver
    gpus = []
    for index in sorted(set(tables["static"]) | set(tables["list"]) | set(tables["metric"])):
        parts = {name: section(tables[name], index) for name in AMD_QUESTIONS}
        parts["partition"] = tables["partition"].get(index, [])
        try:
            gpu = amd_gpu(index, parts)
            gpu["links"] = links.get(index, [])
        except Exception as error:
            gpu = blank(index, "amd")
            problems.append("amd-smi: GPU %d: %r" % (index, error))
        fill(gpu, {"driver": {"version": driver[1]}})
        gpus.append(gpu)
    return gpus, problems


def read_amd_smi(tool):
    """(GPUs, problems)."""
    answers, complaints = {}, []
    for question in AMD_QUESTIONS:
        # Without a GPU there is nothing to ask.
        if question == "metric" and not any(records(documents(text)[0]) for text in answers.values()):
            break
        if question == "topology" and records(documents(answers["xgmi -l"])[0]):
            continue
        out, complaint = tool.ask(*question.split(), "--json")
        if question == "partition" and not records(documents(out)[0]):
            # Before there was `amd-smi partition`, it was a section of static, and in some releases a flag of it.
            out, _ = tool.ask("static", "--partition", "--json")
            out = json.dumps([flat(entry) for entry in records(documents(out)[0])])
        answers[question] = out
        # Valid output comes with any exit status.
        if complaint and not documents(out)[0]:
            complaints.append(complaint)
    gpus, problems = parse_amd_smi(answers)
    return gpus, complaints + problems


def flat(entry):
    """A `static --partition` entry as one of `partition`."""
    return dict(get(entry, "partition") or {}, gpu=entry.get("gpu"))


# AMD's Python package, in a process of its own: it may crash, hang, and print what it likes.

MARK = "clusterkit-amdsmi "
AMDSMI_SCRIPT = r"""
import json, sys
mark, sys.path[:0] = sys.argv[1], sys.argv[2:]

def say(answer):
    sys.stdout.write("\n" + mark + json.dumps(answer, default=str) + "\n")
    sys.stdout.flush()
    sys.exit(0)

try:
    import amdsmi
except ModuleNotFoundError as error:
    say({"absent": True} if error.name == "amdsmi" else {"broken": repr(error)})
except BaseException as error:
    say({"broken": "import: %r" % (error,)})

def ask(name, *arguments):
    try:
        return getattr(amdsmi, name)(*arguments)
    except Exception:
        return None

def get(found, *path):
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found

def temperature(handle, sensor, metric):
    try:
        return ask("amdsmi_get_temp_metric", handle, getattr(amdsmi.AmdSmiTemperatureType, sensor),
                   getattr(amdsmi.AmdSmiTemperatureMetric, metric))
    except Exception:
        return None

def pages(handle):
    found = ask("amdsmi_get_gpu_bad_page_info", handle)
    if not isinstance(found, list):
        return {}
    kinds = {"retired": "RESERVED", "pending": "PENDING", "un_res": "UNRESERVABLE"}
    states = [getattr(page.get("status"), "name", None) or page.get("status") for page in found]
    known = getattr(amdsmi, "AmdSmiMemoryPageStatus", None)
    return {key: [1 for state in states if str(state).endswith(name) or state == getattr(known, name, ())]
            for key, name in kinds.items()}

def links(handle):
    found = get(ask("amdsmi_get_link_metrics", handle), "links") or []
    states = get(ask("amdsmi_get_gpu_xgmi_link_status", handle), "status") or []
    return [{"bdf": entry.get("bdf"), "speed": entry.get("max_bandwidth"), "state": state}
            for entry, state in zip(found, states)]

def firmware(handle):
    found = get(ask("amdsmi_get_fw_info", handle), "fw_list") or []
    return [{"fw_id": str(getattr(entry.get("fw_name"), "name", entry.get("fw_name"))).replace("AMDSMI_FW_ID_", ""),
             "fw_version": entry.get("fw_version")} for entry in found]

def watts(value):
    # The library counts in microwatts.
    return value / 1e6 if isinstance(value, (int, float)) and value >= 10000 else value

def facts(handle):
    pcie = ask("amdsmi_get_pcie_info", handle)
    fixed, now = get(pcie, "pcie_static") or {}, get(pcie, "pcie_metric") or {}
    usage, ecc = ask("amdsmi_get_gpu_vram_usage", handle), ask("amdsmi_get_gpu_total_ecc_count", handle)
    power = ask("amdsmi_get_power_info", handle) or {}
    heat = ask("amdsmi_get_violation_status", handle) or {}
    names = {"prochot": "prochot_thrm", "socket_thermal": "socket_thrm", "vr_thermal": "vr_thrm",
             "hbm_thermal": "hbm_thrm"}
    static = {
        "asic": ask("amdsmi_get_gpu_asic_info", handle),
        "bus": {"bdf": ask("amdsmi_get_gpu_device_bdf", handle), "max_pcie_width": fixed.get("max_pcie_width"),
                "max_pcie_speed": fixed.get("max_pcie_speed")},
        "ifwi": ask("amdsmi_get_gpu_vbios_info", handle),
        "board": ask("amdsmi_get_gpu_board_info", handle),
        "driver": ask("amdsmi_get_gpu_driver_info", handle),
        "limit": {"socket_power": watts(get(ask("amdsmi_get_power_cap_info", handle), "power_cap")),
                  "slowdown_hotspot_temperature": temperature(handle, "HOTSPOT", "CRITICAL")},
        "ras": {"ecc_block_state": ask("amdsmi_get_gpu_ras_block_features_enabled", handle)},
        "vram": {"size": get(usage, "vram_total")},
        "partition": {"compute_partition": ask("amdsmi_get_gpu_compute_partition", handle),
                      "memory_partition": ask("amdsmi_get_gpu_memory_partition", handle)},
    }
    metric = {
        "power": power,
        "temperature": {"hotspot": temperature(handle, "HOTSPOT", "CURRENT"),
                        "mem": temperature(handle, "VRAM", "CURRENT"), "edge": temperature(handle, "EDGE", "CURRENT")},
        "pcie": {"width": now.get("pcie_width"), "speed": now.get("pcie_speed"),
                 "replay_count": now.get("pcie_replay_count"),
                 "l0_to_recovery_count": now.get("pcie_l0_to_recovery_count"),
                 "nak_sent_count": now.get("pcie_nak_sent_count"),
                 "nak_received_count": now.get("pcie_nak_received_count")},
        "ecc": {"total_%s" % name: value for name, value in (ecc or {}).items()},
        "mem_usage": {"total_vram": get(usage, "vram_total"), "used_vram": get(usage, "vram_used")},
        "throttle": {"%s_violation_status" % key: heat.get("active_" + name) for key, name in names.items()},
    }
    return {"static": static, "metric": metric, "list": {"uuid": ask("amdsmi_get_gpu_device_uuid", handle)},
            "firmware": {"fw_list": firmware(handle)}, "bad-pages": pages(handle), "ports": links(handle),
            "process": {"process_list": ask("amdsmi_get_gpu_process_list", handle)}}

try:
    amdsmi.amdsmi_init()
    answer = {"gpus": [facts(handle) for handle in amdsmi.amdsmi_get_processor_handles()]}
except BaseException as error:
    say({"broken": repr(error)})
ask("amdsmi_shut_down")
say(answer)
"""


def parse_amdsmi(text):
    """(GPUs, problems) from the output of AMDSMI_SCRIPT; no GPUs and no problem where there is no such package."""
    _, mark, answer = text.rpartition(MARK)
    try:
        answer = lower(json.JSONDecoder().raw_decode(answer)[0]) if mark else {}
    except (ValueError, RecursionError):
        answer = {}
    if not isinstance(answer, dict) or not ("gpus" in answer or "broken" in answer or "absent" in answer):
        return [], ["the Python package amdsmi: no answer; it crashed, or its output is cut off"]
    if "gpus" not in answer:
        return [], [] if "absent" in answer else ["the Python package amdsmi: %s" % str(answer["broken"])[:200]]
    gpus, problems = [], []
    for index, parts in enumerate(answer["gpus"] if isinstance(answer["gpus"], list) else []):
        try:
            gpu = amd_gpu(index, parts)
            for port in parts.get("ports") or []:
                if get(port, "state") in ("U", "D"):
                    speed = number(get(port, "speed"), 0, 1000000)
                    gpu["links"].append(link(address(get(port, "bdf")), "XGMI", port["state"] == "U", speed))
        except Exception as error:
            gpu = blank(index, "amd")
            problems.append("the Python package amdsmi: GPU %d: %r" % (index, error))
        gpus.append(gpu)
    return gpus, problems


def read_amdsmi(tool, root):
    """Beside the package of this Python, those that the ROCm releases bring along."""
    places = ["opt/rocm/share/amd_smi", "opt/rocm-*/share/amd_smi", "opt/rocm/core-*/share/amd_smi"]
    folders = [
        path for place in places for path in sorted(glob.glob(os.path.join(root, place)), key=by_version, reverse=True)
    ]
    out, complaint = tool.ask("-I", "-c", AMDSMI_SCRIPT, MARK, *folders)
    if not out:
        return [], [complaint] if complaint else []
    return parse_amdsmi(out)


def read_amd(run, root, timeout, given):
    """(GPUs, source, whether there is any tool, problems)."""
    gpus, told = read_amdsmi(Tool("the Python package amdsmi", sys.executable or "python3", run, timeout), root)
    if gpus:
        return gpus, "amdsmi", True, told
    tool = Tool("amd-smi", "amd-smi" if given else program("amd-smi", root), run, timeout)
    gpus, more = read_amd_smi(tool)
    return gpus, "amd-smi", tool.present or bool(told), told + (more if tool.present else [])


# NVIDIA

NVIDIA_FIELDS = (
    "index pci.bus_id pci.device_id name uuid serial driver_version vbios_version compute_cap memory.total memory.used"
    " temperature.gpu temperature.memory power.draw enforced.power.limit pcie.link.gen.current pcie.link.gen.max"
    " pcie.link.width.current pcie.link.width.max mig.mode.current ecc.mode.current"
    " ecc.errors.corrected.volatile.total ecc.errors.uncorrected.volatile.total"
).split()
BAD_FIELD = re.compile(r'Field "([^"]+)" is not a valid field')
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


def nvidia_named(gpu, name):
    if name:
        gpu["model"], gpu["accelerator_type"] = name, nvidia_accelerator_type(name)


def nvidia_ecc(node):
    """(correctable, uncorrectable) since the driver was loaded; older and newer layouts."""
    errors = {}
    for entry in node.iter() if node is not None else ():
        errors[entry.tag] = count(entry.text) if len(entry) == 0 else None
    correctable = total(value for tag, value in errors.items() if "correctable" in tag and "uncorr" not in tag)
    uncorrectable = total(value for tag, value in errors.items() if "uncorrectable" in tag)
    if node is not None and correctable is None and uncorrectable is None:
        correctable, uncorrectable = count(node.findtext("single_bit/total")), count(node.findtext("double_bit/total"))
    return correctable, uncorrectable


def nvidia_limit(node):
    """Where it slows down. Newer GPUs tell how far they are from it instead."""
    fixed = celsius(node.findtext("temperature/gpu_temp_slow_threshold"))
    if fixed is not None:
        return fixed
    now, left, slow = (
        celsius(node.findtext("temperature/" + tag))
        for tag in ("gpu_temp", "gpu_temp_tlimit", "gpu_temp_slow_tlimit_threshold")
    )
    return None if None in (now, left, slow) else now + left - slow


def nvidia_gpu(index, node, driver):
    """One GPU from its element of `nvidia-smi -q -x`."""
    gpu = blank(index, "nvidia")

    def text(*paths):
        return first([word(node.findtext(path)) for path in paths])

    nvidia_named(gpu, text("product_name"))
    gpu["uuid"], gpu["serial"] = text("uuid"), text("serial")
    info = "pci/pci_gpu_link_info/"
    gpu["pci"].update(
        address=first([address(node.get("id")), address(text("pci/pci_bus_id"))]),
        device_id=device_id(text("pci/pci_device_id")),
        width=lanes(text(info + "link_widths/current_link_width")),
        max_width=lanes(text(info + "link_widths/max_link_width")),
        speed_gts=GTS.get(count(text(info + "pcie_gen/current_link_gen"))),
        max_speed_gts=GTS.get(count(text(info + "pcie_gen/max_link_gen"))),
        replays=count(text("pci/replay_counter")),
    )
    gpu["memory_mib"] = {key: mebibytes(text("fb_memory_usage/" + key)) for key in ("total", "used")}
    gpu["driver"] = {"name": "nvidia", "version": driver}
    versions = {
        "VBIOS": text("vbios_version"),
        "GSP": text("gsp_firmware_version"),
        "INFOROM": text("inforom_version/img_version"),
    }
    gpu["firmware"] = {name: version for name, version in versions.items() if version}
    gpu["partition"]["mig"] = yes(text("mig_mode/current_mig"))
    gpu["temperature_c"].update(
        hotspot=celsius(text("temperature/gpu_temp")),
        memory=celsius(text("temperature/memory_temp")),
        limit=nvidia_limit(node),
    )
    powers = ("gpu_power_readings/", "power_readings/")
    draws = ("power_draw", "average_power_draw", "instant_power_draw")
    limits = ("current_power_limit", "enforced_power_limit", "power_limit")
    gpu["power_w"] = watts(text(*[power + name for power in powers for name in draws]))
    gpu["power_limit_w"] = watts(text(*[power + name for power in powers for name in limits]))
    gpu["throttled"] = any_of(
        yes(text("clocks_%s_reasons/clocks_%s_reason_%s" % (kind, kind, name)))
        for kind in ("event", "throttle")
        for name in SLOWDOWNS
    )
    correctable, uncorrectable = nvidia_ecc(node.find("ecc_errors/volatile"))
    rows, pages = "remapped_rows/remapped_row_", "retired_pages/"
    gpu["ecc"].update(
        enabled=yes(text("ecc_mode/current_ecc")),
        correctable=correctable,
        uncorrectable=uncorrectable,
        bad_pages=total(
            count(text(path))
            for path in (
                rows + "corr",
                rows + "unc",
                pages + "multiple_single_bit_retirement/retired_count",
                pages + "double_bit_retirement/retired_count",
            )
        ),
        remap_pending=any_of([yes(text(rows + "pending")), yes(text(pages + "pending_retirement"))]),
        remap_failed=yes(text(rows + "failure")),
    )
    for entry in node.iterfind("processes/process_info"):
        pid = count(entry.findtext("pid"))
        if pid is not None:
            memory = mebibytes(word(entry.findtext("used_memory")))
            gpu["processes"].append({"pid": pid, "name": word(entry.findtext("process_name")), "memory_mib": memory})
    return gpu


def parse_nvidia_xml(text):
    """(GPUs, problems) from `nvidia-smi -q -x`; of output that is cut off, the GPUs that are whole."""
    start = first([place for place in (text.find("<?xml"), text.find("<nvidia_smi_log")) if place >= 0])
    if start is None:
        return [], []
    gpus, problems, driver = [], [], None
    try:
        for _, node in ElementTree.iterparse(io.BytesIO(text[start:].encode("utf-8", "replace"))):
            if node.tag == "driver_version":
                driver = word(node.text)
            elif node.tag == "gpu":
                try:
                    gpu = nvidia_gpu(len(gpus), node, driver)
                except Exception as error:
                    gpu = blank(len(gpus), "nvidia")
                    problems.append("nvidia-smi: GPU %d: %r" % (len(gpus), error))
                gpus.append(gpu)
                lost = [entry.text.strip() for entry in node.iter() if plain(entry.text or "") in LOST]
                if lost:
                    problems.append("nvidia-smi: %s answers %s" % (subject(gpu), lost[0]))
    except Exception as error:
        problems.append("nvidia-smi -q -x: its output is cut off or broken (%s); what was whole in it is used" % error)
    return gpus, problems


def parse_nvidia_csv(text):
    """(GPUs, problems) from `nvidia-smi --query-gpu=… --format=csv`, with its header, whatever the fields are."""
    gpus, problems, header = [], [], None
    for line in text.splitlines():
        try:
            row = next(csv.reader([line], skipinitialspace=True), [])
        except csv.Error:
            continue
        if header is None:
            names = [re.sub(r"\s*\[.*", "", name.strip()) for name in row]
            header = names if "name" in names and "pci.bus_id" in names else None
            continue
        if len(row) != len(header):
            problems.append("nvidia-smi --query-gpu: no row of %d values: %s" % (len(header), line.strip()[:100]))
            continue
        value = {name: word(row[place]) for place, name in enumerate(header)}.get
        place = address(value("pci.bus_id"))
        if place is None:
            continue
        index = count(value("index"))
        gpu = blank(len(gpus) if index is None else index, "nvidia")
        nvidia_named(gpu, value("name"))
        gpu.update(arch=value("compute_cap"), uuid=value("uuid"), serial=value("serial"))
        gpu["pci"].update(
            address=place,
            device_id=device_id(value("pci.device_id")),
            width=lanes(value("pcie.link.width.current")),
            max_width=lanes(value("pcie.link.width.max")),
            speed_gts=GTS.get(count(value("pcie.link.gen.current"))),
            max_speed_gts=GTS.get(count(value("pcie.link.gen.max"))),
        )
        gpu["memory_mib"] = {key: mebibytes(value("memory." + key)) for key in ("total", "used")}
        gpu["driver"] = {"name": "nvidia", "version": value("driver_version")}
        if value("vbios_version"):
            gpu["firmware"]["VBIOS"] = value("vbios_version")
        gpu["partition"]["mig"] = yes(value("mig.mode.current"))
        gpu["temperature_c"].update(
            hotspot=celsius(value("temperature.gpu")), memory=celsius(value("temperature.memory"))
        )
        gpu["power_w"], gpu["power_limit_w"] = watts(value("power.draw")), watts(value("enforced.power.limit"))
        gpu["ecc"].update(
            enabled=yes(value("ecc.mode.current")),
            correctable=count(value("ecc.errors.corrected.volatile.total")),
            uncorrectable=count(value("ecc.errors.uncorrected.volatile.total")),
        )
        gpus.append(gpu)
    return gpus, problems


def parse_nvlink(text):
    """{GPU number: links} from `nvidia-smi nvlink -s`. It tells GB/s, and not who is at the other end."""
    found, index = {}, None
    for line in text.splitlines():
        head, entry = re.match(r"GPU (\d{1,4}):", line), re.match(r"\s+Link \d+:\s*(\S+)", line)
        if head:
            index = int(head.group(1))
        elif entry and index is not None:
            speed = number(entry.group(1), 0, 100000)
            if speed is not None or "inactive" in entry.group(1).lower():
                speed = None if speed is None else round(speed * 8, 1)
                found.setdefault(index, []).append(link(None, "NVLINK", speed is not None, speed))
    return found


def parse_nvidia(xml="", table_="", nvlink=""):
    """(GPUs, problems) from the three outputs of nvidia-smi; each may be missing, or be anything."""
    gpus, problems = parse_nvidia_xml(xml)
    listed, more = parse_nvidia_csv(table_)
    problems += more
    here = {gpu["pci"]["address"]: gpu for gpu in gpus}
    for entry in listed:
        gpu = here.get(entry["pci"]["address"])
        if gpu is None:
            gpus.append(entry)
        else:
            gpu["index"] = entry["index"]
            if gpu["accelerator_type"] is None:
                gpu["model"] = entry["model"]
            fill(gpu, entry)
    links = parse_nvlink(nvlink)
    for gpu in gpus:
        gpu["links"] = links.get(gpu["index"], [])
    gpus.sort(key=lambda gpu: gpu["index"])
    for text in (xml, table_, nvlink):
        for line in text.splitlines():
            if line.startswith("Unable to determine the device handle"):
                problems.append("nvidia-smi: %s" % line.strip()[:200])
    return gpus, sorted(set(problems), key=problems.index)


def read_nvidia(run, root, timeout, given):
    """(GPUs, source, whether there is any tool, problems)."""
    tool = Tool("nvidia-smi", "nvidia-smi" if given else program("nvidia-smi", root), run, timeout)
    xml, wrong = tool.ask("-q", "-x")
    fields, rows, complaint = list(NVIDIA_FIELDS), "", None
    for _ in NVIDIA_FIELDS:
        rows, complaint = tool.ask("--query-gpu=" + ",".join(fields), "--format=csv")
        # A driver that lacks one field answers none of them.
        unknown = BAD_FIELD.search(rows + (complaint or ""))
        if not unknown or unknown.group(1) not in fields:
            break
        fields.remove(unknown.group(1))
    links, _ = tool.ask("nvlink", "-s")
    gpus, problems = parse_nvidia(xml, rows, links)
    whole = bool(parse_nvidia_xml(xml)[0])
    if not whole and tool.present:
        problems = [text for text in (wrong, None if gpus or wrong else complaint) if text] + problems
        if gpus:
            problems.append("nvidia-smi -q -x listed no GPU: processes, remapped rows and throttling are unknown")
    return gpus, "nvidia-smi", tool.present, problems


# The host


def read_file(*path):
    try:
        with open(os.path.join(*path)) as handle:
            return handle.read(4096).strip()
    except (OSError, ValueError):
        return None


def devices(root, classes=GPU_CLASSES):
    """GPUs on the PCI bus, or what else has such a class, whatever a driver thinks of them.

    {address: {vendor, device_id, driver, folder}}; None where the bus cannot be read.
    """
    top = os.path.join(root, "sys/bus/pci/devices")
    try:
        names = sorted(os.listdir(top))
    except OSError:
        return None
    found = {}
    for name in names:
        folder = os.path.join(top, name)
        kind = read_file(folder, "vendor")
        vendor = next((key for key, facts in VENDORS.items() if facts["pci"] == kind), None)
        if vendor and (read_file(folder, "class") or "").startswith(classes.get(vendor, ())):
            driver = os.path.join(folder, "driver")
            found[address(name) or name] = {
                "vendor": vendor,
                "device_id": device_id(read_file(folder, "device")),
                "driver": os.path.basename(os.path.realpath(driver)) if os.path.exists(driver) else None,
                "folder": folder,
            }
    return found


def complete(gpu, found, root):
    """What the kernel knows beside the tools."""
    device = (found or {}).get(gpu["pci"]["address"])
    if device:
        folder = device["folder"]
        facts = {
            "device_id": device["device_id"],
            "width": lanes(read_file(folder, "current_link_width")),
            "max_width": lanes(read_file(folder, "max_link_width")),
            "speed_gts": gigatransfers(read_file(folder, "current_link_speed")),
            "max_speed_gts": gigatransfers(read_file(folder, "max_link_speed")),
        }
        fill(gpu["pci"], facts)
    if gpu["vendor"] == "amd":
        gpu["accelerator_type"] = RAY_AMD.get(gpu["pci"]["device_id"])
    module = VENDORS[gpu["vendor"]]["module"]
    fill(gpu["driver"], {"name": module, "version": read_file(root, "sys/module", module, "version")})


def why_none(vendor, found, root, present, said):
    """Why a vendor has no GPU here; None where the bus has none either."""
    facts = VENDORS[vendor]
    here = [device for device in (found or {}).values() if device["vendor"] == vendor]
    if found is not None and not here:
        return None
    kinds = ", ".join(sorted({device["device_id"] or "?" for device in here}))
    what = "%d %s GPU(s) on the PCI bus (%s)" % (len(here), facts["name"], kinds)
    if found is None:
        what = "/sys/bus/pci/devices cannot be read"
    elif not os.path.isdir(os.path.join(root, "sys/module", facts["module"])):
        return "%s, and the driver %s is not loaded" % (what, facts["module"])
    elif not any(device["driver"] == facts["module"] for device in here):
        holder = first([device["driver"] for device in here]) or "no driver"
        return "%s, and %s holds them, not the loaded %s" % (what, holder, facts["module"])
    if not present:
        tool = "amd-smi or Python package amdsmi" if vendor == "amd" else "nvidia-smi"
        return "%s, and %s%s" % (what, NO_TOOL, tool)
    return "%s, and %s" % (what, said or SILENT)


def read(run=None, root="/", vendor="any", timeout=TIMEOUT_S):
    """GPUs of this host: {"gpus": [...], "reason": why there are none or None, "source": str, "problems": [text]}.

    run(argv, timeout) -> (exit status, stdout, stderr), with 124 for no answer in time and 127 for no such program;
    root is put before /sys and /opt; vendor is amd, nvidia or any; timeout counts for each call, in seconds. The
    source is `amdsmi`, `amd-smi` or `nvidia-smi`, two of them with a + on a host with both, or `none`. Never raises.
    """
    problems, gpus, sources, reasons = [], [], [], []
    found = devices(root)
    for name, reader in (("amd", read_amd), ("nvidia", read_nvidia)):
        if vendor not in ("any", name):
            continue
        try:
            got, source, present, told = reader(run or run_program, root, timeout, run is not None)
            for gpu in got:
                complete(gpu, found, root)
        except Exception as error:
            got, source, present = [], None, True
            told = ["reading %s GPUs: %r" % (VENDORS[name]["name"], error)]
        if got:
            gpus += got
            sources.append(source)
            seen = {gpu["pci"]["address"] for gpu in got}
            left = [place for place, it in sorted((found or {}).items()) if it["vendor"] == name and place not in seen]
            if left and None in seen:
                # They may well be these: that is output which cannot be read, and no GPU that is gone.
                told.append(
                    "%s lists GPUs without a PCI address, and nobody knows whether these of the bus are among them: %s"
                    % (source, ", ".join(left))
                )
                left = []
            for place in left:
                device = found[place]
                told.append(
                    "PCI device %s (%s, driver %s) is not among what %s lists"
                    % (place, device["device_id"], device["driver"] or "none", source)
                )
        else:
            why = why_none(name, found, root, present, told[0] if told else None)
            reasons.append(why)
            if found and why and (why.endswith(SILENT) or NO_TOOL in why):
                # The driver holds them: rather nobody who can tell than GPUs that are gone.
                told.append(why)
        problems += told
    reason = None
    if not gpus:
        known = [text for text in reasons if text]
        names = [facts["name"] for key, facts in VENDORS.items() if vendor in ("any", key)]
        reason = "; ".join(known) or "no %s GPU is on the PCI bus" % " or ".join(names)
    return {"gpus": gpus, "reason": reason, "source": "+".join(sources) or "none", "problems": problems}
