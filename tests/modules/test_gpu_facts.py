"""gpu_facts and its parsers: recorded outputs, broken ones, and the tools as real processes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import ROOT, load_module
from tests.modules.conftest import run_module as call
from tests.modules.gpu_support import (
    AMDSMI_PACKAGE,
    BDF,
    FIXTURES,
    H100,
    H100_BDF,
    MI300X,
    MI325X,
    amd_answers,
    amd_smi,
    amdsmi_package,
    bus,
    gpus,
    misfits,
    nvidia_answers,
    nvidia_smi,
    program,
)

Json = dict[str, Any]

facts = load_module("gpu_facts")


def flat(gpu: Json, place: str = "") -> Json:
    """A GPU with one key for each fact: pci.width."""
    found: Json = {}
    for key, value in gpu.items():
        inner = flat(value, f"{place}{key}.") if isinstance(value, dict) and value else {f"{place}{key}": value}
        found.update(inner)
    return found


# Parsers: NVIDIA


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (
            "nvidia_a100_mig",
            {
                "model": "NVIDIA A100-SXM4-80GB",
                "accelerator_type": "A100",
                "uuid": "GPU-513536b6-7d19-9063-b049-1e69664bb298",
                "serial": "1650522003820",
                "pci.address": "0000:01:00.0",
                "pci.device_id": "0x20b2",
                "pci.width": 16,
                "pci.speed_gts": 16.0,
                "pci.replays": 0,
                "memory_mib.total": 81920,
                "memory_mib.used": 50,
                "driver.version": "535.54.03",
                "firmware.VBIOS": "92.00.36.00.02",
                "firmware.GSP": "535.54.03",
                "partition.mig": True,
                "temperature_c.hotspot": 27,
                "temperature_c.memory": 44,
                "temperature_c.limit": 89,
                "power_w": 67.03,
                "power_limit_w": 500.0,
                "throttled": False,
                "ecc.enabled": True,
                "ecc.uncorrectable": 0,
                # All remap and retirement fields are N/A in this output.
                "ecc.bad_pages": None,
                "ecc.remap_pending": None,
                "processes": [],
            },
        ),
        (
            "nvidia_rtx4000ada",
            {
                "model": "NVIDIA RTX 4000 SFF Ada Generation",
                "accelerator_type": "RTX-4000",
                "ecc.enabled": False,
                "ecc.correctable": None,
                "ecc.bad_pages": 0,
                "ecc.remap_pending": False,
                # 38 degrees, 49 to the limit, which slows down 2 beyond it.
                "temperature_c.limit": 89,
                "power_w": 8.81,
                "power_limit_w": 70.0,
                "partition.mig": None,
            },
        ),
        (
            "nvidia_t4",
            {
                "model": "Tesla T4",
                "accelerator_type": "T4",
                "throttled": False,
                "power_w": 26.78,
                "driver.name": "nvidia",
            },
        ),
        (
            "nvidia_gtx1070ti",
            {
                "model": "GeForce GTX 1070 Ti",
                "accelerator_type": "GTX-1070",
                "power_w": None,
                "throttled": None,
                "ecc.enabled": None,
                "driver.version": None,
            },
        ),
        (
            "nvidia_h100",
            {
                "model": "NVIDIA H100 80GB HBM3",
                "accelerator_type": "H100",
                "arch": "9.0",
                "pci.address": "0000:00:09.0",
                "pci.device_id": "0x2330",
                "pci.speed_gts": 32.0,
                "memory_mib.total": 81559,
                "memory_mib.used": 0,
                "power_limit_w": 700.0,
                "partition.mig": False,
                "ecc.uncorrectable": 0,
            },
        ),
        (
            "nvidia_h100_mig",
            {"accelerator_type": "H100", "partition.mig": True, "links": []},
        ),
    ],
)
def test_recorded_nvidia_hosts(folder: str, expected: Json) -> None:
    found, problems = gpus.parse_nvidia(**nvidia_answers(FIXTURES / folder))
    assert problems == []
    assert len(found) == 1
    assert misfits(found[0]) == []
    seen = flat(found[0])
    assert {key: seen[key] for key in expected} == expected


def test_processes_of_a_recorded_host() -> None:
    [t4], _ = gpus.parse_nvidia(**nvidia_answers(FIXTURES / "nvidia_t4"))
    text = (FIXTURES / "nvidia_t4/q_x.xml").read_text()
    assert [str(entry["pid"]) for entry in t4["processes"]] == re.findall(r"<pid>(\d+)</pid>", text)
    assert all(entry["memory_mib"] for entry in t4["processes"])


def test_h100_x8() -> None:
    found, problems = gpus.parse_nvidia(**nvidia_answers(H100))
    assert problems == []
    assert [gpu["index"] for gpu in found] == list(range(8))
    assert [gpu["pci"]["address"] for gpu in found] == H100_BDF
    assert [misfits(gpu) for gpu in found] == [[]] * 8
    seen = flat(found[3])
    assert seen["arch"] == "9.0"  # from the table
    assert seen["ecc.correctable"] == 3  # from the XML
    assert seen["ecc.bad_pages"] == 1
    assert seen["temperature_c.limit"] == 89
    # 18 links of 26.562 GB/s.
    assert [(link["up"], link["speed_gbps"]) for link in found[3]["links"]] == [(True, 212.5)] * 18
    # A power limit that is reached is normal work.
    assert seen["throttled"] is False


def test_a_hot_nvidia_gpu_is_throttled() -> None:
    answers = nvidia_answers(H100)
    answers["xml"] = answers["xml"].replace(
        "<clocks_event_reason_hw_thermal_slowdown>Not Active", "<clocks_event_reason_hw_thermal_slowdown>Active", 1
    )
    found, _ = gpus.parse_nvidia(**answers)
    assert [gpu["throttled"] for gpu in found] == [True] + [False] * 7


def test_an_nvlink_that_is_down() -> None:
    answers = nvidia_answers(H100)
    answers["nvlink"] = answers["nvlink"].replace("Link 4: 26.562 GB/s", "Link 4: <inactive>", 1)
    found, _ = gpus.parse_nvidia(**answers)
    down = [(gpu["index"], place) for gpu in found for place, link in enumerate(gpu["links"]) if not link["up"]]
    assert down == [(0, 4)]
    assert found[0]["links"][4]["speed_gbps"] is None


def test_without_the_xml_the_table_does() -> None:
    found, _ = gpus.parse_nvidia(table_=(H100 / "query_gpu.csv").read_text())
    assert len(found) == 8
    assert found[7]["memory_mib"]["total"] == 81559
    assert found[7]["throttled"] is None


def test_xml_that_is_cut_off_is_completed_from_the_table() -> None:
    answers = nvidia_answers(H100)
    answers["xml"] = answers["xml"][: len(answers["xml"]) // 2]
    found, problems = gpus.parse_nvidia(**answers)
    assert [gpu["pci"]["address"] for gpu in found] == H100_BDF
    assert found[0]["throttled"] is False
    assert found[7]["throttled"] is None
    assert "cut off or broken" in " ".join(problems)


def test_a_name_that_only_the_table_has() -> None:
    answers = nvidia_answers(H100)
    answers["xml"] = answers["xml"].replace("NVIDIA H100 80GB HBM3", "N/A")
    found, _ = gpus.parse_nvidia(**answers)
    assert {(gpu["model"], gpu["accelerator_type"]) for gpu in found} == {("NVIDIA H100 80GB HBM3", "H100")}


def test_a_gpu_that_does_not_answer_is_named() -> None:
    answers = nvidia_answers(H100)
    node = re.findall(r"\t<gpu id=.*?</gpu>\n", answers["xml"], re.DOTALL)[5]
    answers["xml"] = answers["xml"].replace(node, re.sub(r">[^<\n]+</(?!pci_bus_id)", ">GPU is lost</", node))
    answers["table_"] = ""
    found, problems = gpus.parse_nvidia(**answers)
    assert problems == ["nvidia-smi: GPU 5 (0000:c3:00.0) answers GPU is lost"]
    assert misfits(found[5]) == []
    assert found[5]["memory_mib"] == {"total": None, "used": None}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # By the rule in ray 2.60.0, ray/_private/accelerators/nvidia_gpu.py.
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 5090", "GeForce-RTX-5090"),
        ("", None),
        (None, None),
    ],
)
def test_rays_name_of_an_nvidia_gpu(name: str | None, kind: str | None) -> None:
    assert gpus.nvidia_accelerator_type(name) == kind


# Parsers: AMD


def test_mi300x_x8() -> None:
    found, problems = gpus.parse_amd_smi(amd_answers(MI300X))
    assert problems == []
    assert [gpu["index"] for gpu in found] == list(range(8))
    assert [misfits(gpu) for gpu in found] == [[]] * 8
    expected = {
        "vendor": "amd",
        "model": "AMD Instinct MI300X",
        "arch": "gfx942",
        "uuid": "02ff74a1-0000-1000-8000-000000000002",
        "serial": "SERIAL-2",
        "pci.address": "0000:46:00.0",
        "pci.device_id": "0x74a1",
        "pci.width": 16,
        "pci.max_width": 16,
        "pci.speed_gts": 32.0,
        "pci.max_speed_gts": 32.0,
        "pci.replays": 0,
        "pci.recoveries": 2,
        "pci.naks": 2,
        "memory_mib.total": 196592,
        "memory_mib.used": 283,
        "driver.name": "amdgpu",
        "driver.version": "6.16.13",
        "firmware.PM": "07.85.11.01",
        "firmware.VBIOS": "022.040.003.041.000001",
        "partition.compute": "SPX",
        "partition.memory": "NPS1",
        "partition.mig": None,
        "temperature_c.hotspot": 42,
        "temperature_c.memory": 35,
        "temperature_c.edge": None,
        "temperature_c.limit": 100,
        "power_w": 139,
        "power_limit_w": 750,
        "throttled": False,
        "ecc.enabled": True,
        "ecc.correctable": 2,
        "ecc.bad_pages": 0,
        "ecc.remap_pending": False,
    }
    seen = flat(found[2])
    assert {key: seen[key] for key in expected} == expected
    assert {link["peer"] for link in found[2]["links"]} == set(BDF) - {"0000:46:00.0"}
    assert all(link["up"] and link["speed_gbps"] == 512 and link["type"] == "XGMI" for link in found[2]["links"])
    assert found[0]["processes"] == [{"pid": 4242, "name": "python3", "memory_mib": 2048}]
    assert found[1]["processes"] == []


def test_mi325x_x8_of_an_older_release() -> None:
    """Flat lists, bare numbers, hex instead of a name, driver_name, vbios, pages as one object, states per port."""
    found, problems = gpus.parse_amd_smi(amd_answers(MI325X))
    assert problems == []
    assert [misfits(gpu) for gpu in found] == [[]] * 8
    expected = {
        "model": "AMD Instinct MI325X",
        "serial": "0x0000000000000003",
        "memory_mib.total": 262128,
        "driver.version": "6.10.5",
        "firmware.PM": "05.85.98.00",
        "firmware.VBIOS": "113-CONSTRUCTED-2",
        "partition.compute": "SPX",
        "partition.memory": "NPS1",
        "pci.max_speed_gts": 32.0,
        "pci.naks": 5,
        "power_w": 150,
        "power_limit_w": 1000,
        "throttled": False,
        "ecc.enabled": True,
        "ecc.deferred": None,
        "ecc.bad_pages": 1,
        "ecc.remap_failed": None,
    }
    seen = flat(found[2])
    assert {key: seen[key] for key in expected} == expected
    assert len(found[2]["links"]) == 7
    assert found[0]["processes"] == [{"pid": 4242, "name": "python", "memory_mib": 3}]


def test_a_recorded_output_with_warnings_before_it_that_is_cut_off() -> None:
    found, problems = gpus.parse_amd_smi({"static": (FIXTURES / "amd_rx7800xt/static.txt").read_text()})
    assert found == []
    assert problems == ["amd-smi static: its output is cut off or broken; what was whole in it is used"]


def static(**sections: Any) -> str:
    entry = {"gpu": 0, "asic": {"market_name": "MI300X"}, "bus": {"bdf": "0000:05:00.0"}, **sections}
    return json.dumps([entry])


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        # The variants of dstackai/dstack runner/internal/shim/host/gpu_test.go at 17956d9d.
        ({"name": "amdgpu", "version": "6.10.5"}, ("amdgpu", "6.10.5")),
        ({"version": "6.10.5", "driver_version": "6.8.5"}, (None, "6.10.5")),
        ({"NAME": "amdgpu", "VERSION": "6.12.12"}, ("amdgpu", "6.12.12")),
        ({"driver_name": "amdgpu", "driver_version": "6.8.5"}, ("amdgpu", "6.8.5")),
        ("amdgpu 6.8.5", ("amdgpu", "6.8.5")),
        ("6.8.5", (None, "6.8.5")),
        ({"name": "N/A", "version": "N/A"}, (None, None)),
        ({"version": "N/A", "driver_version": "6.8.5"}, (None, "6.8.5")),
        (None, (None, None)),
        (["amdgpu"], (None, None)),
        # The driver of the distribution, not AMD's.
        ({"name": "amdgpu", "version": "Linuxver"}, ("amdgpu", "Linuxver")),
    ],
)
def test_driver_keys(driver: Any, expected: tuple[str | None, str | None]) -> None:
    [gpu], problems = gpus.parse_amd_smi({"static": static(driver=driver)})
    assert (gpu["driver"]["name"], gpu["driver"]["version"]) == expected
    assert problems == []


def test_the_drivers_version_from_the_version_question() -> None:
    [gpu], _ = gpus.parse_amd_smi({"static": static(), "version": (MI300X / "version.json").read_text()})
    assert gpu["driver"]["version"] == "6.16.13"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([{"process_info": {"name": "a", "pid": 1, "memory_usage": {"vram_mem": {"value": 2, "unit": "MB"}}}}], 2),
        ([{"process_info": {"name": "a", "pid": 1, "mem_usage": {"value": 3072, "unit": "KB"}}}], 3),
        ([{"name": "a", "pid": 1, "mem": 4194304}], 4),
        ([{"name": "a", "pid": "1", "memory_usage": {"vram_mem": "1 GB"}}], 1024),
        ({"process_0": {"name": "a", "pid": 1}}, None),
        ([{"process_info": "No running processes detected"}], "none"),
        ("No running processes detected", "none"),
        ("N/A", "none"),
        ([{"process_info": {"name": "a", "pid": "N/A"}}], "none"),
    ],
)
def test_process_lists(listed: Any, expected: Any) -> None:
    answers = {"static": static(), "process": json.dumps([{"gpu": 0, "process_list": listed}])}
    [gpu], _ = gpus.parse_amd_smi(answers)
    wanted = [] if expected == "none" else [{"pid": 1, "name": "a", "memory_mib": expected}]
    assert gpu["processes"] == wanted


@pytest.mark.parametrize(
    ("question", "change"),
    [
        ("static", lambda text: "WARNING: User is missing the following required groups: render, video\n" + text),
        ("static", lambda text: "[WARN] {0} x\n" + text + "\nLegend:\n  * = Current mode\n"),
        ("static", lambda text: json.dumps(json.loads(text)["gpu_data"])),
        ("metric", lambda text: "\n".join(json.dumps({"gpu_data": [e]}) for e in json.loads(text)["gpu_data"])),
        ("list", lambda text: "\n".join(json.dumps(entry) for entry in json.loads(text))),
        ("process", lambda text: json.dumps({"gpu_data": json.loads(text)})),
    ],
)
def test_envelopes_banners_and_documents_in_a_row(question: str, change: Callable[[str], str]) -> None:
    answers = amd_answers(MI300X)
    plain = gpus.parse_amd_smi(answers)
    answers[question] = change(answers[question])
    assert gpus.parse_amd_smi(answers) == plain


def test_the_current_partition_among_all_profiles() -> None:
    """The table of profiles may come first, and lists those that are not set."""
    found, _ = gpus.documents((MI300X / "partition.txt").read_text())
    profiles = [dict(row, accelerator_type=row["accelerator_type"].replace("SPX*", "DPX")) for row in found[2]]
    answers = {**amd_answers(MI300X), "partition": json.dumps(profiles) + json.dumps(found[0])}
    assert {gpu["partition"]["compute"] for gpu in gpus.parse_amd_smi(answers)[0]} == {"SPX"}


def test_one_gpu_less() -> None:
    answers = amd_answers(MI300X)
    for question in ("list", "static", "metric", "firmware"):
        answers[question] = re.sub(r'\{"gpu": 6,.*\n', "", answers[question])
    found, _ = gpus.parse_amd_smi(answers)
    assert [gpu["index"] for gpu in found] == [0, 1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("folder", [MI300X, MI325X])
def test_an_xgmi_link_that_is_down(folder: Path) -> None:
    answers = amd_answers(folder)
    found = json.loads(answers["xgmi -l"])
    found["link_status"][3]["link_status"][5] = "D"
    answers["xgmi -l"] = json.dumps(found)
    seen, _ = gpus.parse_amd_smi(answers)
    down = [(gpu["index"], link["peer"]) for gpu in seen for link in gpu["links"] if not link["up"]]
    assert down == [(3, BDF[5])]


@pytest.mark.parametrize(
    ("ports", "states"),
    [
        (lambda index: ["U", "U/D", "N/A"], [True, True, False]),
        (lambda index: ["U"] * index + ["X", "U", "D"], [True, False]),
    ],
)
def test_states_of_ports_name_no_peer(ports: Callable[[int], list[str]], states: list[bool]) -> None:
    """Not a state for each GPU: which port leads where is not told, and is not guessed."""
    answers = amd_answers(MI325X)
    rows = [{"gpu": index, "bdf": BDF[index], "link_status": ports(index)} for index in range(8)]
    answers["xgmi -l"] = json.dumps({"link_status": rows})
    seen, problems = gpus.parse_amd_smi(answers)
    assert [(link["peer"], link["up"]) for link in seen[0]["links"]] == [(None, state) for state in states]
    assert problems == []


def test_links_from_the_topology_where_xgmi_says_nothing() -> None:
    answers = amd_answers(MI300X)
    del answers["xgmi -l"]
    seen, _ = gpus.parse_amd_smi(answers)
    assert {link["peer"] for link in seen[0]["links"]} == set(BDF[1:])
    # It is a substitute only: with the states there, it adds nothing.
    assert len(gpus.parse_amd_smi(amd_answers(MI300X))[0][0]["links"]) == 7


def nothing_known(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"value", "unit"}:
            return "N/A"
        return {key: item if key in ("gpu", "gpu_id", "bdf") else nothing_known(item) for key, item in value.items()}
    return [nothing_known(item) for item in value] if isinstance(value, list) else "N/A"


def test_na_everywhere() -> None:
    answers = {}
    for question, text in amd_answers(MI300X).items():
        found, _ = gpus.documents(text)
        answers[question] = "\n".join(json.dumps(nothing_known(document)) for document in found)
    seen, problems = gpus.parse_amd_smi(answers)
    assert problems == []
    assert len(seen) == 8
    blank = gpus.blank(4, "amd")
    blank["pci"]["address"] = "0000:85:00.0"
    assert seen[4] == blank
    xml = re.sub(r">[^<\n]+</(?!pci_bus_id)", ">[N/A]</", (H100 / "q_x.xml").read_text())
    seen, _ = gpus.parse_nvidia(xml)
    assert flat(seen[0])["pci.address"] == "0000:1b:00.0"
    assert {key for key, value in flat(seen[0]).items() if value not in (None, [], {})} == {
        "index",
        "vendor",
        "model",
        "pci.address",
        "driver.name",
    }


def test_json_that_is_cut_off_keeps_what_is_whole() -> None:
    answers = amd_answers(MI300X)
    answers["static"] = answers["static"][: answers["static"].index('{"gpu": 5') + 300]
    seen, problems = gpus.parse_amd_smi(answers)
    assert len(seen) == 8
    assert [gpu["arch"] for gpu in seen] == ["gfx942"] * 5 + [None] * 3
    # What other questions tell is there.
    assert seen[7]["memory_mib"]["total"] == 196592
    assert seen[7]["pci"]["address"] == "0000:e5:00.0"
    assert problems == ["amd-smi static: its output is cut off or broken; what was whole in it is used"]


def test_the_library_in_words() -> None:
    assert gpus.parse_amdsmi("x\n" + gpus.MARK + '{"absent": true}') == ([], [])
    assert gpus.parse_amdsmi("Segmentation fault")[1] == [
        "the Python package amdsmi: no answer; it crashed, or its output is cut off"
    ]


# Any output at all


def broken(text: str, chance: random.Random) -> str:
    """A text after an accident."""
    if not text:
        return text
    start, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
    junk = chance.choice(
        ["\0", "N/A", "{", "[", "]]", '"', "<gpu>", "</gpu>", "9" * 400, "-1", "null", "\ud800", "1e999"]
    )
    return chance.choice(
        [
            text[:start],
            text[start:],
            text[:start] + text[end:],
            text[:end] + text[start:],
            text[:start] + junk + text[start:],
            "".join(chance.choice('[]{}",:<>/ 0aN\n') if chance.random() < 0.02 else letter for letter in text),
            re.sub(r"\d+", lambda match: match.group() if chance.random() < 0.7 else junk, text),
            re.sub(r'"[^"]*"', lambda match: match.group() if chance.random() < 0.7 else f'"{start}"', text),
            re.sub(r": ", lambda match: match.group() if chance.random() < 0.9 else ": [{}], ", text),
        ]
    )


def assert_sound(found: list[Json], problems: list[str]) -> None:
    assert [wrong for gpu in found for wrong in misfits(gpu)] == []
    assert all(isinstance(text, str) and text for text in problems)


@pytest.mark.parametrize(
    ("folder", "question"), [(folder, question) for folder in (MI300X, MI325X) for question in amd_answers(folder)]
)
def test_broken_output_of_amd_smi(folder: Path, question: str) -> None:
    answers = amd_answers(folder)
    chance = random.Random(f"{folder.name} {question}")
    for _ in range(25):
        assert_sound(*gpus.parse_amd_smi({**answers, question: broken(answers[question], chance)}))


@pytest.mark.parametrize(
    "folder", ["constructed_h100_x8", "nvidia_h100", "nvidia_h100_mig", "nvidia_a100_mig", "nvidia_t4"]
)
def test_broken_output_of_nvidia_smi(folder: str) -> None:
    answers = nvidia_answers(FIXTURES / folder)
    chance = random.Random(folder)
    for _ in range(40):
        for key in answers:
            assert_sound(*gpus.parse_nvidia(**{**answers, key: broken(answers[key], chance)}))


def test_broken_output_of_the_library() -> None:
    parts = {"static": json.loads(static())[0], "ports": [{"bdf": "0000:05:00.0", "state": "U", "speed": 512}]}
    text = "\n" + gpus.MARK + json.dumps({"gpus": [parts, {**parts, "process": {"process_list": [{"pid": 1}]}}]})
    chance = random.Random("amdsmi")
    assert len(gpus.parse_amdsmi(text)[0]) == 2
    for _ in range(300):
        assert_sound(*gpus.parse_amdsmi(broken(text, chance)))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100000,
        '{"gpu":' * 3000,
        '[{"gpu": 0, "asic": ' + "[" * 500 + "]" * 500 + "}]",
        '[{"gpu": 0, "bus": []}, {"gpu": true}, {"gpu": "0"}, {"gpu": -1}, {"gpu": 1e9}, {"gpu": null}, 3, "x", null]',
        '[{"gpu": 0, "link_status": {"a": 1}, "links": 4, "fw_list": {"a": []}, "process_list": 3}]',
        '[{"gpu": 0, "link_status": [null, 3, {}], "links": [1, null], "retired": 3, "partition": "x", "driver": 7}]',
        '[{"gpu": 0, "power": {"socket_power": NaN}, "temperature": {"hotspot": 1e400, "mem": -Infinity}}]',
    ],
)
def test_nonsense_that_is_json(text: str) -> None:
    assert_sound(*gpus.parse_amd_smi(dict.fromkeys(gpus.AMD_QUESTIONS, text)))
    assert_sound(*gpus.parse_amdsmi(gpus.MARK + '{"gpus": ' + text + "}"))
    assert_sound(*gpus.parse_nvidia(text, text, text))


def test_any_run_at_all(tmp_path: Path) -> None:
    """Any status, any text or bytes, or an exception: read() returns its four keys."""
    chance = random.Random("run")
    texts = [path.read_text() for path in FIXTURES.glob("*/*")]

    def run(argv: list[str], timeout: float) -> tuple[int, Any, Any]:
        if chance.random() < 0.1:
            raise OSError("no such luck")
        text = broken(chance.choice(texts), chance)
        return chance.choice([0, 0, 1, 2, 124, 127, 255, -11]), chance.choice([text, text, None, b"\xff\x00"]), "words"

    for _ in range(60):
        found = gpus.read(run, root=str(tmp_path))
        assert set(found) == {"gpus", "reason", "source", "problems"}
        assert_sound(found["gpus"], found["problems"])
        assert (found["reason"] is None) == bool(found["gpus"])


# The tools as processes


@pytest.fixture
def bin_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH, with nothing else there but what a shell needs."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a host of our own, also for the module."""
    (tmp_path / "root/sys/bus/pci/devices").mkdir(parents=True)
    monkeypatch.setattr(facts, "ROOT", str(tmp_path / "root"))
    return tmp_path / "root"


AMD = {"vendor": "0x1002", "device": "0x74a1"}
NVIDIA = {"vendor": "0x10de", "device": "0x2330"}


def test_no_gpu(bin_: Path, root: Path) -> None:
    seen = call(facts, expected={"count": 0})
    assert (seen["gpus"], seen["findings"], seen["source"]) == ([], [], "none")
    assert seen["reason"] == "no AMD or NVIDIA GPU is on the PCI bus"
    assert call(facts, vendor="amd")["reason"] == "no AMD GPU is on the PCI bus"


def test_no_driver(bin_: Path, root: Path) -> None:
    bus(root, BDF, **AMD, driver=None)
    seen = call(facts, expected={"count": 8})
    assert seen["reason"] == "8 AMD GPU(s) on the PCI bus (0x74a1), and the driver amdgpu is not loaded"
    [finding] = seen["findings"]
    assert set(finding) == {"check", "severity", "subject", "problem", "fix"}
    assert (finding["check"], finding["severity"], finding["subject"]) == ("gpu-count", "error", "host")
    assert seen["reason"] in finding["problem"]


def test_another_driver_holds_them(bin_: Path, root: Path) -> None:
    bus(root, H100_BDF, **NVIDIA, driver="vfio-pci", module="nvidia")
    assert call(facts)["reason"].endswith("and vfio-pci holds them, not the loaded nvidia")


def test_no_tool(bin_: Path, root: Path) -> None:
    bus(root, BDF, **AMD, driver="amdgpu")
    bus(root, H100_BDF[:1], **NVIDIA, driver="nvidia")
    seen = call(facts)
    assert seen["reason"] == (
        "8 AMD GPU(s) on the PCI bus (0x74a1), and there is no amd-smi or Python package amdsmi; "
        "1 NVIDIA GPU(s) on the PCI bus (0x2330), and there is no nvidia-smi"
    )
    # GPUs that nobody can ask about are not GPUs that are gone.
    assert seen["problems"] == seen["reason"].split("; ")


def test_a_tool_that_fails(bin_: Path, root: Path) -> None:
    bus(root, H100_BDF, **NVIDIA, driver="nvidia")
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    program(bin_ / "nvidia-smi", {}, other=f'echo "{words}"; exit 9')
    seen = call(facts, vendor="nvidia")
    assert words in seen["reason"]
    assert seen["problems"] == [f"nvidia-smi -q -x ended with status 9: {words}"]


def test_an_amd_host(bin_: Path, root: Path) -> None:
    bus(root, BDF, **AMD, driver="amdgpu")
    # Nobody asks for the topology where xgmi answered: this one does not know it, and that is no problem.
    amd_smi(
        bin_ / "amd-smi", {question: text for question, text in amd_answers(MI300X).items() if question != "topology"}
    )
    want = {"count": 8, "accelerator_type": "AMD-Instinct-MI300X-OAM", "model": "MI300X", "memory_gib": 192}
    seen = call(facts, vendor="amd", expected=want)
    assert (seen["findings"], seen["problems"], seen["reason"]) == ([], [], None)
    assert (seen["source"], seen["changed"]) == ("amd-smi", False)
    assert seen["gpus"][0]["accelerator_type"] == "AMD-Instinct-MI300X-OAM"
    # It only reads: check mode is the same.
    assert call(facts, check=True, vendor="amd", expected=want) == seen


def test_output_after_a_banner_with_an_exit_status(bin_: Path, root: Path) -> None:
    answers = {question: "WARNING: no group render\n" + text for question, text in amd_answers(MI300X).items()}
    amd_smi(bin_ / "amd-smi", answers, status=1)
    seen = call(facts, vendor="amd")
    assert len(seen["gpus"]) == 8
    assert seen["problems"] == []


def test_a_release_without_newer_subcommands(bin_: Path, root: Path) -> None:
    answers = amd_answers(MI325X)
    for question in ("xgmi -l", "xgmi -m"):
        del answers[question]
    amd_smi(bin_ / "amd-smi", answers)
    seen = call(facts, vendor="amd")
    assert seen["gpus"][0]["partition"]["compute"] == "SPX"
    assert seen["gpus"][0]["memory_mib"]["total"] == 262128
    assert "amd-smi xgmi -l --json ended with status 2: amd-smi: error: invalid choice: 'xgmi'" in seen["problems"]


def test_the_partition_from_a_flag_of_static(bin_: Path, root: Path) -> None:
    """Releases that dropped it from plain static, and have no `partition` yet."""
    known = {
        "list --json": ((MI300X / "list.json").read_text(), 0),
        "static --json": ((MI300X / "static.json").read_text(), 0),
        "static --partition --json": (
            json.dumps([{"gpu": 1, "partition": {"accelerator_partition": "CPX", "memory_partition": "NPS4"}}]),
            0,
        ),
    }
    program(bin_ / "amd-smi", known)
    seen = call(facts, vendor="amd")
    assert seen["gpus"][1]["partition"] == {"compute": "CPX", "memory": "NPS4", "mig": None}


@pytest.mark.parametrize("place", ["opt/rocm/bin", "opt/rocm-7.0.2/bin", "opt/rocm/core-7.14/bin", "usr/local/bin"])
def test_a_tool_beside_the_path(bin_: Path, root: Path, place: str) -> None:
    amd_smi(root / place / "amd-smi", amd_answers(MI300X))
    assert len(call(facts, vendor="amd")["gpus"]) == 8


def test_the_newest_release_is_asked(bin_: Path, root: Path) -> None:
    for name, folder in (("7.9.0", MI325X), ("7.14.0", MI300X)):
        amd_smi(root / f"opt/rocm-{name}/bin/amd-smi", amd_answers(folder))
    assert call(facts, vendor="amd")["gpus"][0]["model"] == "AMD Instinct MI300X"


def test_a_host_with_both(bin_: Path, root: Path) -> None:
    bus(root, BDF, **AMD, driver="amdgpu")
    bus(root, H100_BDF, **NVIDIA, driver="nvidia")
    amd_smi(bin_ / "amd-smi", amd_answers(MI300X))
    nvidia_smi(bin_ / "nvidia-smi", nvidia_answers(H100))
    seen = call(facts)
    assert [gpu["vendor"] for gpu in seen["gpus"]] == ["amd"] * 8 + ["nvidia"] * 8
    assert seen["source"] == "amd-smi+nvidia-smi"
    assert seen["problems"] == []
    assert len(call(facts, vendor="nvidia", expected={"count": 8, "accelerator_type": "H100"})["gpus"]) == 8


def test_a_gpu_that_the_bus_has_and_the_tool_has_not(bin_: Path, root: Path) -> None:
    bus(root, BDF, **AMD, driver="amdgpu")
    answers = amd_answers(MI300X)
    for question in ("list", "static", "metric"):
        answers[question] = re.sub(r'\{"gpu": 6,.*\n', "", answers[question])
    amd_smi(bin_ / "amd-smi", answers)
    seen = call(facts, vendor="amd", expected={"count": 8})
    said = "PCI device 0000:c6:00.0 (0x74a1, driver amdgpu) is not among what amd-smi lists"
    assert seen["problems"] == [said]
    assert [finding["problem"] for finding in seen["findings"]] == [f"8 GPUs are declared, and there are 7: {said}"]


def test_gpus_that_the_tool_lists_without_addresses_are_not_gone(bin_: Path, root: Path) -> None:
    bus(root, BDF, **AMD, driver="amdgpu")
    answers = {question: text.replace('"bdf"', '"address_of_2030"') for question, text in amd_answers(MI300X).items()}
    amd_smi(bin_ / "amd-smi", answers)
    seen = call(facts, vendor="amd")
    assert [gpu["pci"]["address"] for gpu in seen["gpus"]] == [None] * 8
    [said] = seen["problems"]
    assert said.startswith("amd-smi lists GPUs without a PCI address, and nobody knows whether")
    assert "is not among" not in said


@pytest.mark.parametrize("driver", ["amdgpu", "vfio-pci"])
def test_a_tool_that_says_nothing_of_what_its_driver_holds(bin_: Path, root: Path, driver: str) -> None:
    bus(root, BDF, **AMD, driver=driver, module="amdgpu")
    amd_smi(bin_ / "amd-smi", dict.fromkeys(amd_answers(MI300X), '{"data": {}}'))
    seen = call(facts, vendor="amd")
    silent = "8 AMD GPU(s) on the PCI bus (0x74a1), and the tool lists none"
    assert seen["problems"] == ([silent] if driver == "amdgpu" else [])


def test_the_kernel_tells_what_the_tool_does_not(bin_: Path, root: Path) -> None:
    bus(root, H100_BDF, **NVIDIA, driver="nvidia")
    (root / "sys/module/nvidia/version").write_text("590.48.01\n")
    names = "index, name, pci.bus_id, driver_version"
    program(bin_ / "nvidia-smi", {"--query-gpu=*": (f"{names}\n0, NVIDIA H100, 00000000:1B:00.0, [N/A]\n", 0)})
    [gpu] = call(facts, vendor="nvidia")["gpus"]
    assert (gpu["pci"]["width"], gpu["pci"]["speed_gts"], gpu["pci"]["device_id"]) == (8, 16.0, "0x2330")
    assert gpu["driver"]["version"] == "590.48.01"


def test_a_field_that_a_driver_does_not_have(bin_: Path, root: Path) -> None:
    """Old drivers refuse the whole query for one field."""
    table = (H100 / "query_gpu.csv").read_text()
    program(
        bin_ / "nvidia-smi",
        {
            "--query-gpu=*compute_cap*": ('Field "compute_cap" is not a valid field to query.\n', 2),
            "--query-gpu=*mig.mode*": ('Field "mig.mode.current" is not a valid field to query.\n', 2),
            "--query-gpu=*": (table, 0),
        },
    )
    assert len(call(facts, vendor="nvidia")["gpus"]) == 8


def runs(pid: int) -> bool:
    """Is it there, and not only waiting to be buried?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_tool_that_hangs(bin_: Path, root: Path, tmp_path: Path) -> None:
    """One timeout for all its questions, its processes are gone, and the other vendor is read."""
    bus(root, BDF, **AMD, driver="amdgpu")
    tool = bin_ / "amd-smi"
    # The child holds the output open, too.
    tool.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path / 'pid'}\nwait\n")
    tool.chmod(0o755)
    nvidia_smi(bin_ / "nvidia-smi", nvidia_answers(H100))
    start = time.monotonic()
    seen = call(facts, timeout=1)
    assert time.monotonic() - start < 10
    assert seen["problems"] == ["amd-smi list --json did not answer within 1 s"]
    assert [gpu["vendor"] for gpu in seen["gpus"]] == ["nvidia"] * 8
    assert not runs(int((tmp_path / "pid").read_text()))
    # Without a limit it would still be there.
    alone = subprocess.Popen([str(tool)], start_new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):
        alone.wait(timeout=1)
    os.killpg(alone.pid, signal.SIGKILL)
    alone.wait()


def test_a_mistake_in_a_parser_costs_one_vendor(bin_: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amd_smi(bin_ / "amd-smi", amd_answers(MI300X))
    nvidia_smi(bin_ / "nvidia-smi", nvidia_answers(H100))
    monkeypatch.setattr(gpus, "parse_nvidia", lambda *texts: 1 / 0)
    seen = call(facts)
    assert len(seen["gpus"]) == 8
    assert seen["problems"] == ["reading NVIDIA GPUs: ZeroDivisionError('division by zero')"]


# AMD's Python package


def test_the_library_comes_first(bin_: Path, root: Path) -> None:
    amdsmi_package(root)
    amd_smi(bin_ / "amd-smi", amd_answers(MI300X))
    seen = call(facts, vendor="amd")
    assert (seen["source"], seen["problems"], len(seen["gpus"])) == ("amdsmi", [], 2)
    assert [misfits(gpu) for gpu in seen["gpus"]] == [[], []]
    expected = {
        "model": "AMD Instinct MI300X",
        "accelerator_type": "AMD-Instinct-MI300X-OAM",
        "arch": "gfx942",
        "serial": "0x0000000000000001",
        "pci.address": "0000:26:00.0",
        "pci.max_speed_gts": 32.0,
        "pci.speed_gts": 32.0,
        "pci.replays": None,  # all bits set: no such counter
        "pci.recoveries": 2,
        "pci.naks": 1,
        "memory_mib.total": 196592,
        "driver.version": "6.16.13",
        "firmware.RLC": "65",
        "firmware.VBIOS": "022.040",
        "partition.compute": "SPX",
        "partition.memory": None,
        "temperature_c.hotspot": 44,
        "temperature_c.edge": None,
        "temperature_c.limit": 100,
        "power_w": 140,
        "power_limit_w": 750.0,
        "throttled": True,
        "ecc.enabled": True,
        "ecc.correctable": 1,
        "ecc.bad_pages": 1,
        "ecc.remap_pending": True,
        "links": [{"peer": "0000:05:00.0", "type": "XGMI", "up": False, "speed_gbps": 512}],
        "processes": [{"pid": 42, "name": "python3", "memory_mib": 1}],
    }
    found = flat(seen["gpus"][1])
    assert {key: found[key] for key in expected} == expected
    # Its power limit is reached, and that is all.
    assert seen["gpus"][0]["throttled"] is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # What the wrapper on PyPI does where there is no library.
        ('print("Unable to find libamd_smi.so")\nraise KeyError("libamd_smi.so")', "import: KeyError('libamd_smi.so')"),
        ("import os\nos.abort()", "ended with status -6"),
        ("import os\nos._exit(0)", None),
        ("import time\ntime.sleep(300)", "did not answer within 3 s"),
        ("import sys\nsys.exit('no')", "SystemExit"),
        ("def amdsmi_init(): raise RuntimeError('AMDSMI_STATUS_NOT_INIT')", "AMDSMI_STATUS_NOT_INIT"),
        ("import not_there", "not_there"),
        (AMDSMI_PACKAGE + "\ndef amdsmi_get_processor_handles(): raise MemoryError\n", "MemoryError"),
    ],
)
def test_a_library_that_fails_takes_nothing_along(bin_: Path, root: Path, text: str, words: str | None) -> None:
    folder = amdsmi_package(root, text)
    amd_smi(bin_ / "amd-smi", amd_answers(MI300X))
    seen = call(facts, vendor="amd", timeout=3)
    assert (seen["source"], len(seen["gpus"])) == ("amd-smi", 8)
    assert [problem for problem in seen["problems"] if words is None or words not in problem] == []
    if "abort" in text:
        # In this process it would have ended it.
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); import amdsmi"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGABRT


# What is declared


def have(*seen: Json) -> Json:
    return {"gpus": list(seen), "reason": None if seen else "no AMD GPU is on the PCI bus", "problems": []}


def a_gpu(index: int = 0, kind: str | None = "H100", gib: float | None = 79.6, **more: Any) -> Json:
    gpu: Json = gpus.blank(index, "nvidia")
    gpu.update(accelerator_type=kind, model=more.pop("model", f"NVIDIA {kind} 80GB HBM3"))
    gpu["pci"]["address"] = f"0000:0{index}:00.0"
    gpu["memory_mib"]["total"] = None if gib is None else int(gib * 1024)
    gpu["partition"].update(more)
    return gpu


@pytest.mark.parametrize(
    ("gpu", "want", "problem", "fix"),
    [
        (a_gpu(), {"accelerator_type": "H200"}, "H200 is declared, and it is NVIDIA H100", "set clusterkit_gpu_model"),
        (a_gpu(kind=None, model="AMD GPU"), {"accelerator_type": "H100"}, "it is AMD GPU (Ray: unknown)", "pool"),
        (a_gpu(), {"model": "H200"}, "H200 is declared", "set clusterkit_gpu_model"),
        (
            a_gpu(model="AMD Instinct MI300X", kind=None),
            {"model": "MI300"},
            "MI300 is declared",
            "clusterkit_gpu_model",
        ),
        (a_gpu(kind="A100", gib=39.4), {"memory_gib": 80.0}, "80 GiB are declared, and it has 39.4", "gpu_memory_gib"),
        (a_gpu(kind="A100", gib=39.4), {"accelerator_type": "A100-80G"}, "80 GiB are declared", "gpu_memory_gib"),
        (a_gpu(gib=24, compute="CPX"), {"memory_gib": 192.0}, "it has 24.0", "undo its partitioning (CPX)"),
        (a_gpu(gib=20, mig=True), {"memory_gib": 80.0}, "it has 20.0", "undo its partitioning (MIG)"),
    ],
)
def test_differences(gpu: Json, want: Json, problem: str, fix: str) -> None:
    [finding] = facts.plan(have(gpu), want)
    assert problem in finding["problem"]
    assert fix in finding["fix"]
    assert (finding["severity"], finding["subject"]) == ("error", "GPU 0 (0000:00:00.0)")


@pytest.mark.parametrize(
    ("gpu", "want"),
    [
        (a_gpu(), {}),
        (a_gpu(), {"count": 1, "accelerator_type": "H100", "memory_gib": 80.0, "model": None}),
        (a_gpu(), {"model": "h100"}),
        (a_gpu(kind="A10G", gib=22.2), {"memory_gib": 24.0}),
        (a_gpu(kind="A100", gib=79.2), {"accelerator_type": "A100-80G"}),
        (a_gpu(kind="X", model="AMD Instinct MI300X"), {"model": "Instinct MI300X"}),
        # Not known is no difference.
        (a_gpu(gib=None), {"memory_gib": 80.0}),
    ],
)
def test_no_difference(gpu: Json, want: Json) -> None:
    assert facts.plan(have(gpu), want) == []


@pytest.mark.parametrize(
    ("seen", "wanted", "problem", "fix"),
    [
        (7, 8, "8 GPUs are declared, and there are 7", "or set clusterkit_gpus to 7"),
        (64, 8, "8 GPUs are declared, and there are 64", "set clusterkit_gpus to 64, or undo a partitioning"),
        (0, 8, "there are 0: no AMD GPU is on the PCI bus", "install and load the driver"),
    ],
)
def test_the_count(seen: int, wanted: int, problem: str, fix: str) -> None:
    [finding] = facts.plan(have(*map(a_gpu, range(seen))), {"count": wanted})
    assert problem in finding["problem"]
    assert fix in finding["fix"]
    assert finding["subject"] == "host"


def test_as_ansible_runs_it(bin_: Path, tmp_path: Path) -> None:
    """Packed with its module_utils, sent, and run by the target's Python."""
    amd_smi(bin_ / "amd-smi", amd_answers(MI300X))
    nvidia_smi(bin_ / "nvidia-smi", {})
    ansible = Path(sys.executable).with_name("ansible")
    arguments = {"vendor": "amd", "expected": {"count": 9, "accelerator_type": "AMD-Instinct-MI300X-OAM"}}
    interpreter = "/usr/bin/python3" if shutil.which("python3", path="/usr/bin") else sys.executable
    done = subprocess.run(
        [
            *(str(ansible), "localhost", "-i", "localhost,", "-c", "local", "-m", "gpu_facts"),
            *("-a", json.dumps(arguments), "-e", f"ansible_python_interpreter={interpreter}", "--check"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_HOME": str(tmp_path / "ansible"),
            "ANSIBLE_MODULE_UTILS": str(ROOT / "plugins/module_utils"),
            "ANSIBLE_LOAD_CALLBACK_PLUGINS": "true",
            "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout[done.stdout.index("{") :])
    assert len(seen["gpus"]) == 8
    assert [finding["check"] for finding in seen["findings"]] == ["gpu-count"]


def test_gpus_and_switches_are_told_apart_on_the_bus(tmp_path: Path) -> None:
    kinds = {
        "07": ("0x10de", "0x068000"),
        "08": ("0x10de", "0x060400"),
        "09": ("0x1b36", "0x068000"),
        "1b": ("0x10de", "0x030200"),
        "2c": ("0x1002", "0x120000"),
        # The graphics of the processor.
        "2d": ("0x1002", "0x030000"),
    }
    for number, (vendor, kind) in kinds.items():
        folder = tmp_path / f"sys/bus/pci/devices/0000:{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
    assert sorted(gpus.devices(str(tmp_path))) == ["0000:1b:00.0", "0000:2c:00.0"]
    assert list(gpus.devices(str(tmp_path), gpus.SWITCH_CLASSES)) == ["0000:07:00.0"]
    assert gpus.devices(str(tmp_path / "nowhere")) is None
