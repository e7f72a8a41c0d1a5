"""gpu-tier1 for real, in the engine's image and on its CPU: sound results pass, and wrong ones become findings.

Wrong results come from a wrapper that loads the program, replaces one of its functions and calls its main().
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.docker, pytest.mark.slow]

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/gpu_health/files/gpu-tier1"
TINY = ["--device", "cpu", "--backend", "gloo", "--size", "64", "--seconds", "0.05", "--memory-mib", "2"]
TINY += ["--reduce-mib", "1"]
WRAPPER = """
import importlib.machinery, importlib.util, os, sys, threading
loader = importlib.machinery.SourceFileLoader("tier1", "/t/gpu-tier1")
tier1 = importlib.util.module_from_spec(importlib.util.spec_from_loader("tier1", loader))
loader.exec_module(tier1)
{fault}
tier1.main(sys.argv[1:])
"""
# One worker in two is sick: that its neighbour is fit is part of what is tested.
MATRIX_FAULT = """
sound = tier1.multiply
def multiply(torch, a, b, out):
    sound(torch, a, b, out)
    out[7, 9] += sick
tier1.multiply = multiply
work, sick = tier1.work, 0
def sick_work(stage, index, options):
    global sick
    sick = 1 if index == 1 else 0
    return work(stage, index, options)
tier1.work = sick_work
"""
LATE_FAULT = """
sound, count = tier1.multiply, 0
def multiply(torch, a, b, out):
    global count
    count += 1
    sound(torch, a, b, out)
    if count == 1 + tier1.BURST:
        out[0, 0] += 1
tier1.multiply = multiply
"""
MEMORY_FAULT = """
sound = tier1.fill
def fill(chunk, value):
    sound(chunk, value)
    chunk[12345] ^= 1 << 40
tier1.fill = fill
"""
ADDRESS_FAULT = """
sound = tier1.own_values
calls = 0
def own_values(torch, device, first, count):
    # A word written to the address of another one; read back, it is what stood there first.
    global calls
    calls += 1
    found = sound(torch, device, first, count)
    if calls == 1:
        found[5] = found[6]
    return found
tier1.own_values = own_values
"""
REDUCTION_FAULT = """
sound = tier1.reduce_all
def reduce_all(distributed, buffer):
    sound(distributed, buffer)
    if distributed.get_rank() == 1:
        buffer[3] += 1
tier1.reduce_all = reduce_all
"""
HANG = """
def multiply(torch, a, b, out):
    threading.Event().wait()
tier1.multiply = multiply
"""
REDUCTION_HANG = """
sound = tier1.reduce_all
def reduce_all(distributed, buffer):
    if distributed.get_rank() == 0:
        threading.Event().wait()
    sound(distributed, buffer)
tier1.reduce_all = reduce_all
"""
CRASH = """
def multiply(torch, a, b, out):
    os.kill(os.getpid(), 11)
tier1.multiply = multiply
"""
RAISES = """
def multiply(torch, a, b, out):
    raise RuntimeError("HIP error: an illegal memory access was encountered\\nCompile with ...")
tier1.multiply = multiply
"""


@pytest.fixture(scope="module")
def image() -> str:
    docker = shutil.which("docker") or "/usr/bin/docker"
    try:
        done = subprocess.run(
            [docker, "images", "--quiet", "clusterkit/vllm-cpu"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        pytest.skip(f"needs Docker: {error}")
    if not done.stdout.strip():
        pytest.skip("the image clusterkit/vllm-cpu is not on this machine: clusterkit image builds it")
    return done.stdout.split()[0]


def run(image: str, *options: str, fault: str = "", thresholds: Json | None = None) -> tuple[int, Json]:
    """(exit code, answer)"""
    program = ["/t/gpu-tier1"] if not fault else ["-c", WRAPPER.format(fault=fault)]
    command = ["docker", "run", "--rm", "--interactive", "--network", "none", "--volume", f"{PROGRAM.parent}:/t:ro"]
    command += ["--entrypoint", "python3", image, *program, *TINY, *options]
    given = None if thresholds is None else json.dumps(thresholds)
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    answer: Json = json.loads(done.stdout)
    assert answer["tier"] == 1
    for item in answer["findings"]:
        assert set(item) == {"check", "severity", "subject", "problem", "fix"}
        assert item["problem"].isprintable()
    return done.returncode, answer


def test_sound_workers_pass(image: str) -> None:
    code, answer = run(image, "--expect", "2")
    assert (code, answer["healthy"], answer["findings"]) == (0, True, [])
    measured = answer["measured"]
    assert measured["torch"]
    assert [gpu["subject"] for gpu in measured["gpus"]] == ["CPU worker 0", "CPU worker 1"]
    for gpu in measured["gpus"]:
        assert gpu["memory_gib"] == 0.002
        assert set(gpu["tflops"]) == {"bfloat16", "float16", "float32"}
        assert all(rate > 0 for rate in gpu["tflops"].values())
    assert measured["busbw_gbs"] > 0


@pytest.mark.parametrize(
    ("fault", "check", "subjects", "words"),
    [
        (MATRIX_FAULT, "matrices", ["CPU worker 1"], "numbers of a bfloat16 matrix product differ from what a CPU"),
        (LATE_FAULT, "matrices", ["CPU worker 0", "CPU worker 1"], "another result in burst 1: 1 numbers differ"),
        (MEMORY_FAULT, "memory", ["CPU worker 0", "CPU worker 1"], "1 of 262144 words were read back wrong"),
        (ADDRESS_FAULT, "memory", ["CPU worker 0", "CPU worker 1"], "the first is word 5"),
        (REDUCTION_FAULT, "all-reduce", ["CPU worker 1"], "1 of 262144 numbers of an all-reduce over 2 GPUs"),
        (CRASH, "gpu-work", ["CPU worker 0", "CPU worker 1"], "ended with signal 11 during: matrices, bfloat16"),
        (RAISES, "gpu-work", ["CPU worker 0", "CPU worker 1"], "HIP error: an illegal memory access"),
    ],
    ids=["matrix", "late", "memory", "address", "reduction", "crash", "raises"],
)
def test_what_is_wrong_becomes_a_finding(image: str, fault: str, check: str, subjects: list[str], words: str) -> None:
    code, answer = run(image, fault=fault)
    assert (code, answer["healthy"]) == (1, False)
    assert [item["subject"] for item in answer["findings"]] == subjects
    assert {item["check"] for item in answer["findings"]} == {check}
    assert words in answer["findings"][0]["problem"]


@pytest.mark.parametrize(("fault", "words"), [(HANG, "matrices, bfloat16"), (REDUCTION_HANG, "first all-reduce")])
def test_a_hang_ends_as_a_finding(image: str, fault: str, words: str) -> None:
    code, answer = run(image, "--timeout-s", "45", fault=fault)
    assert (code, answer["healthy"]) == (1, False)
    assert [item["subject"] for item in answer["findings"]] == ["CPU worker 0", "CPU worker 1"]
    assert f"no answer within 45 s, the last thing begun was: {words}" in answer["findings"][0]["problem"]


def test_thresholds_and_the_number_of_gpus(image: str) -> None:
    limits = {"min_tflops": {"float32": 1e6}, "min_busbw_gbs": 1e6}
    code, answer = run(image, "--expect", "3", "--thresholds", "-", thresholds=limits)
    assert code == 1
    checks = [item["check"] for item in answer["findings"]]
    assert checks == ["gpus", "matrix-speed", "matrix-speed", "reduction-speed"]
    assert run(image, "--thresholds", "-", thresholds={"min_busbw_gbs": 0})[0] == 0


AGENT = """
import json, sys
open(sys.argv[1], "a").write(sys.argv[2] + "\\n" + (sys.stdin.read() if sys.argv[2] == "quarantine" else ""))
print(json.dumps({"state": "stopped", "held": None, "changed": True}))
"""
GPUS = """
def read(run=None, root="/"):
    return {"gpus": [{"uuid": "a", "serial": None, "pci": {"address": None}, "driver": {"version": "1"}}]}
"""


def test_the_gate_runs_it_in_the_image(image: str, tmp_path: Path) -> None:
    """From the host's side: as an ordinary user, in a container that nothing is left of."""
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "gpus.py").write_text(GPUS)
    config = {
        "agent": [sys.executable, str(tmp_path / "agent.py"), str(tmp_path / "asked")],
        "lib": str(tmp_path),
        "record": str(tmp_path / "gpu-tier1.json"),
        "user": "nobody",
        "python": "",
        "lock": "",
        "image": image,
        "container": {},
        "ulimits": {"nofile": "4096:4096"},
        "options": [*TINY, "--expect", "2"],
        "timeout_s": 60,
        "thresholds": {"min_busbw_gbs": 0},
    }

    def gate(*options: str, **changed: Any) -> tuple[int, Json]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
        command = [sys.executable, str(PROGRAM), "--gate", str(tmp_path / "config.json"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    code, answer = gate()
    assert (code, answer["ran"], answer["healthy"]) == (0, True, True), answer
    assert answer["measured"]["busbw_gbs"] > 0
    assert gate()[1]["ran"] is False
    code, answer = gate("--force", options=[*TINY, "--expect", "3"])
    assert (code, [item["check"] for item in answer["findings"]]) == (1, ["gpus"])
    *words, found = (tmp_path / "asked").read_text().splitlines()
    assert words == ["status", "status", "status", "quarantine"]
    assert json.loads(found)["reason"] == "tier 1: gpus on host"
    left = subprocess.run(
        ["docker", "ps", "--all", "--quiet", "--filter", "name=clusterkit-gpu-tier1"], capture_output=True, check=True
    )
    assert left.stdout == b""
