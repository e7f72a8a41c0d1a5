"""GPU health, tiers 1 and 2: parsers on recorded outputs, judgement against pass lines, and the record of passes."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ansible_playbook, load_script

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "roles/gpu_health/files"
OUTPUTS = ROOT / "tests/modules/fixtures/acceptance"
LINES: Json = json.loads((FILES / "acceptance.json").read_text())
MI300X = "AMD-Instinct-MI300X-OAM"


acceptance, tier1 = load_script(FILES / "gpu-acceptance"), load_script(FILES / "gpu-tier1")


def output(name: str) -> str:
    return (OUTPUTS / name).read_text()


def judged(test: str, text: str, *options: str, lines: Json = LINES) -> tuple[list[Json], Json]:
    """(findings, measured) about one program's output."""
    given, _ = acceptance.parse(["--vendor", "amd", "--gpus", "8", "--model", MI300X, *options])
    findings: list[Json] = []
    measured: Json = {}
    acceptance.JUDGES[test](text, given, lines, findings, measured)
    return findings, measured


def problems(findings: list[Json], severity: str = "error") -> list[str]:
    return [item["problem"] for item in findings if item["severity"] == severity]


def test_every_pass_line_has_its_source() -> None:
    for measures in LINES["pass_lines"].values():
        for measure, line in measures.items():
            assert line["min"] > 0
            assert re.search(r" [0-9a-f]{7}, docs/.+: ", line["source"]), measure
    assert all(LINES[name]["source"] for name in ("rvs_bad_lines", "rvs_good_lines", "dcgm_mild_severities"))


def test_transferbench_a2a() -> None:
    found = acceptance.parse_a2a(output("recorded_transferbench_a2a.txt"))
    assert found == {"average": 35.776, "lowest": 28.583, "gpus": 8}
    framed = acceptance.parse_a2a(output("constructed_transferbench_a2a_framed.txt"))
    assert framed == {"average": 31.65, "lowest": 30.1, "gpus": 4}


def test_the_average_is_that_of_the_links() -> None:
    """Worked out from the table it is the number that the program itself prints, and no total is in it."""
    text = output("recorded_transferbench_a2a.txt")
    without = re.sub(r"Average .*\n", "", text)
    assert acceptance.parse_a2a(without)["average"] == pytest.approx(35.776, abs=0.001)


def test_transferbench_p2p() -> None:
    assert acceptance.parse_p2p(output("recorded_transferbench_p2p.txt")) == {
        "unidirectional": 48.44,
        "bidirectional": 46.24,
    }
    assert acceptance.parse_p2p(output("constructed_transferbench_p2p_one_gpu.txt")) == {
        "unidirectional": None,
        "bidirectional": None,
    }


def test_all_reduce() -> None:
    assert acceptance.parse_all_reduce(output("recorded_rccl_all_reduce.txt")) == {
        "busbw": 367.51,
        "bytes": 8589934592,
        "wrong": 0,
        "ranks": 8,
    }
    found = acceptance.parse_all_reduce(output("recorded_nccl_all_reduce_two_hosts.txt"))
    assert (found["busbw"], found["ranks"]) == (337.35, 16)


def test_dcgm() -> None:
    found = acceptance.parse_dcgm(output("recorded_dcgm_gb10_level2_skips.json"))
    assert [(test["name"], test["status"], test["subject"]) for test in found["tests"]] == [
        ("software", "fail", "GPU 0"),
        ("memory", "skip", "GPU 0"),
        ("pcie", "skip", "GPU 0"),
    ]
    assert (found["version"], found["error"]) == ("4.2.3", None)
    old = acceptance.parse_dcgm(output("constructed_dcgm_3.json"))
    assert [(test["name"], test["status"], test["subject"]) for test in old["tests"]] == [
        ("Denylist", "pass", "GPU 0,1,2,3"),
        ("GPU Memory", "pass", "GPU 0"),
        ("GPU Memory", "fail", "GPU 2"),
        ("PCIe", "warn", "GPU 1"),
        ("Diagnostic", "skip", "GPU 3"),
    ]
    assert old["version"] == "3.3.5"


@pytest.mark.parametrize(
    ("test", "recorded"),
    [
        ("transferbench_a2a", "recorded_transferbench_a2a.txt"),
        ("transferbench_p2p", "recorded_transferbench_p2p.txt"),
        ("all_reduce", "recorded_rccl_all_reduce.txt"),
    ],
)
def test_what_amd_published_as_sound_passes_and_less_does_not(test: str, recorded: str) -> None:
    text = output(recorded)
    findings, measured = judged(test, text)
    assert findings == []
    assert measured
    # The same run at half the speed.
    slow = re.sub(r"\b\d+\.\d+\b", lambda match: f"{float(match.group()) / 2:.3f}", text)
    assert problems(judged(test, slow)[0])
    # Without a published line it is measured, and not judged.
    findings, measured = judged(test, slow, "--model", "AMD-Instinct-MI100")
    assert findings == []
    assert measured


def test_a_pass_line_for_eight_gpus_is_not_applied_to_others() -> None:
    text = output("recorded_nccl_all_reduce_two_hosts.txt").replace("337.35", "3.00")
    assert judged("all_reduce", text) == ([], {"all_reduce_busbw": 3.0})


def test_wrong_results_of_an_all_reduce() -> None:
    text = output("recorded_rccl_all_reduce.txt")
    assert problems(judged("all_reduce", text.replace("values : 0 OK", "values : 4 FAILED"))[0]) == [
        "all_reduce_perf counted 4 wrong results"
    ]
    # A count in the table alone is enough.
    assert problems(judged("all_reduce", text.replace("360.97       0", "360.97       7"))[0])


def test_rvs() -> None:
    findings, measured = judged("rvs", output("recorded_rvs_modules.txt"), "--gpus", "3")
    assert findings == []
    assert (measured["rvs"]["passed"], measured["rvs"]["failed"]) == (17, 0)
    # Eight are wanted, and three have verdicts.
    assert problems(judged("rvs", output("recorded_rvs_modules.txt"))[0]) == [
        "rvs has verdicts for 3 GPUs, 8 are wanted"
    ]
    findings, measured = judged("rvs", output("constructed_rvs_failed.txt"), "--gpus", "2")
    assert [(item["subject"], item["problem"].split(":")[0]) for item in findings] == [
        ("GPU 23018", "gst-581Tflops-4K4K8K-rand-bf16"),
        ("GPU 23018", "iet-750W-28K-rand-dgemm"),
        ("host", "pcie_act_6"),
        ("host", "action_1"),
        ("host", "RVS-ERROR"),
        ("GPU 28851", "p2p-unidir-sequential-64MB"),
        ("host", "rcqt_action"),
    ]
    assert measured["rvs"]["passed"] == 1


def test_rvs_with_many_bad_lines_stays_short() -> None:
    line = "[RESULT] [ 1.0] [gst] [GPU:: 7] GFLOPS 1 Target GFLOPS: 2 met: FALSE\n"
    findings, _ = judged("rvs", line * 5000)
    assert len(findings) < 30
    assert "4980 more bad lines" in problems(findings)


def test_dcgm_is_judged_by_its_own_severity() -> None:
    findings, _ = judged("dcgm", output("recorded_dcgm_gb10_level1.json"))
    assert [(item["severity"], item["subject"]) for item in findings] == [("warning", "GPU 0")]
    # Persistence mode is a setting; the same failure, to be isolated, is not.
    worse = output("recorded_dcgm_gb10_level1.json").replace('"error_severity": 5', '"error_severity": 2')
    assert problems(judged("dcgm", worse)[0])[0].startswith("software: Persistence Mode")
    findings, measured = judged("dcgm", output("constructed_dcgm_3.json"))
    assert [(item["severity"], item["subject"]) for item in findings] == [
        ("error", "GPU 2"),
        ("warning", "GPU 1"),
        ("info", "host"),
    ]
    assert measured["dcgm"] == {"pass": 2, "fail": 1, "skip": 1, "version": "3.3.5"}


def test_tests_that_were_all_skipped_are_no_pass() -> None:
    text = output("recorded_dcgm_gb10_level2_skips.json").replace('"Fail"', '"Skip"')
    assert problems(judged("dcgm", text)[0]) == ["dcgmi diag printed no result that can be judged"]
    unknown = output("recorded_dcgm_gb10_level1.json").replace('"Fail"', '"Splendid"').replace("severity", "sev")
    assert problems(judged("dcgm", unknown)[0])


@pytest.mark.parametrize("test", sorted(acceptance.JUDGES))
def test_garbage_never_raises_and_never_passes(test: str) -> None:
    dice = random.Random(7)
    texts = ["", "\x00\xff", "{", "[" * 3000, "{" * 3000, "null", '{"DCGM Diagnostic": 3}', "Segmentation fault\n"]
    texts += ['{"DCGM Diagnostic": {"test_categories": [{"tests": [{"results": [{"warnings": 3}, 4]}, 5]}, 6]}}']
    for _ in range(50):
        texts.append("".join(chr(dice.randrange(32, 0x2600)) for _ in range(200)))
    for text in texts:
        findings, _ = judged(test, text)
        assert problems(findings), repr(text[:80])
        assert all(item["problem"].isprintable() for item in findings)
    for recorded in OUTPUTS.glob("*_*"):
        whole = recorded.read_text()
        for _ in range(20):
            judged(test, whole[dice.randrange(len(whole)) : dice.randrange(len(whole))])


# --------------------------------------------------------------------------- gpu-acceptance as a program


def tool(folder: Path, name: str, text: str, code: int = 0, first: str = "") -> None:
    """A program of that name that prints this."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.out").write_text(text)
    (folder / name).write_text(
        f'#!/bin/sh\necho "{name} $*" >>{folder}/calls\n{first}\ncat {folder}/{name}.out\nexit {code}\n'
    )
    (folder / name).chmod(0o755)


def program(folder: Path, *options: str) -> tuple[int, Json]:
    command = [sys.executable, str(FILES / "gpu-acceptance"), "--path", str(folder), "--logs", str(folder / "logs")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_what_is_not_installed_is_not_run_and_not_passed(tmp_path: Path) -> None:
    code, answer = program(tmp_path, "--vendor", "nvidia", "--gpus", "8", "--only", "dcgm")
    assert (code, answer["healthy"], answer["ran"]) == (1, False, [])
    assert answer["not_run"] == [{"test": "dcgm", "why": "there is no program dcgmi on this host"}]
    assert "nothing is known about these GPUs" in problems(answer["findings"])[0]


def test_a_host_whose_tests_pass(tmp_path: Path) -> None:
    tool(tmp_path, "rvs", output("recorded_rvs_modules.txt"))
    tool(tmp_path, "all_reduce_perf", output("recorded_rccl_all_reduce.txt"))
    options = ("--vendor", "amd", "--model", MI300X, "--gpus", "3", "--rvs-level", "2")
    code, answer = program(tmp_path, *options)
    assert (code, answer["healthy"], answer["ran"]) == (0, True, ["rvs", "all_reduce"])
    assert [entry["test"] for entry in answer["not_run"]] == ["transferbench_a2a", "transferbench_p2p"]
    assert {item["severity"] for item in answer["findings"]} == {"info"}
    assert (tmp_path / "calls").read_text() == "rvs -r 2\nall_reduce_perf -b 8 -e 8G -f 2 -g 3\n"
    assert (tmp_path / "logs/rvs.log").read_text() == output("recorded_rvs_modules.txt")


def test_exit_codes_prove_nothing(tmp_path: Path) -> None:
    """rvs says 0 when its tests failed; a good output of a program that failed is told as well."""
    tool(tmp_path, "rvs", output("constructed_rvs_failed.txt"), code=0)
    assert program(tmp_path, "--vendor", "amd", "--only", "rvs")[0] == 1
    tool(tmp_path, "rvs", output("recorded_rvs_modules.txt"), code=3)
    code, answer = program(tmp_path, "--vendor", "amd", "--only", "rvs")
    assert code == 1
    assert "ended with code 3, and its output does not say why" in problems(answer["findings"])[0]


def test_a_program_that_hangs_ends_as_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(acceptance.TIMEOUT_S, "rvs", 1)
    tool(tmp_path, "rvs", "", first="sleep 1000")
    options, lines = acceptance.parse(
        ["--vendor", "amd", "--only", "rvs", "--path", str(tmp_path), "--logs", str(tmp_path / "logs")]
    )
    answer = acceptance.examine(options, lines)
    assert not answer["healthy"]
    assert "did not end within 1 s" in problems(answer["findings"])[0]


# --------------------------------------------------------------------------- gpu-tier1, what needs no torch


def measured(*rates: float, busbw: float | None = None) -> Json:
    gpus = [{"subject": f"GPU {index}", "tflops": {"bfloat16": rate}} for index, rate in enumerate(rates)]
    return {"gpus": gpus, "busbw_gbs": busbw}


def test_speeds_are_judged_only_where_a_threshold_is_given() -> None:
    slow = measured(500.0, 510.0, 505.0, 300.0, busbw=100.0)
    assert tier1.judge(slow, {}) == []
    found = tier1.judge(slow, {"min_tflops": {"bfloat16": 400}, "min_busbw_gbs": 304})
    assert [(item["check"], item["subject"], item["severity"]) for item in found] == [
        ("matrix-speed", "GPU 3", "error"),
        ("reduction-speed", "host", "error"),
    ]
    (lag,) = tier1.judge(slow, {"max_lag_percent": 10})
    assert (lag["subject"], lag["severity"]) == ("GPU 3", "warning")
    assert tier1.judge(measured(500.0, 490.0), {"max_lag_percent": 10}) == []


def test_a_subject_is_the_gpus_index_and_address() -> None:
    class Properties:
        name, pci_domain_id, pci_bus_id, pci_device_id, uuid = "MI300X", 0, 0xC5, 0, "abc"

    gpu = tier1.describe(Properties, 3)
    assert gpu == {"index": 3, "name": "MI300X", "address": "0000:c5:00.0", "uuid": "abc"}
    assert tier1.subject_of(gpu, tier1.parse([])) == "GPU 3 (0000:c5:00.0)"


@pytest.mark.parametrize("arguments", [["--size", "999999"], ["--device", "tpu"], ["--thresholds", "/nowhere"]])
def test_a_wrong_request_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        tier1.parse(arguments)
    assert refused.value.code == 2


# --------------------------------------------------------------------------- gpu-tier1 --gate

GPUS = """
import json, os
def read(run=None, root="/"):
    given = json.load(open(os.path.join(os.path.dirname(__file__), "gpus.json")))
    return {"gpus": [{"uuid": uuid, "serial": None, "pci": {"address": None}, "driver": {"version": given["driver"]}}
                     for uuid in given["uuids"]]}
"""
# The real ones are tested with the agent and in the engine's image; here is what the gate asks of them.
AGENT = """
import sys
folder, word = sys.argv[1:]
open(folder + "/asked", "a").write(word + "\\n")
if word == "quarantine":
    open(folder + "/found", "w").write(sys.stdin.read())
    print('{"changed": true}')
else:
    print(open(folder + "/status").read())
"""
# Stands for the engine's Python: tells what it was called with, and gives the answer that lies there.
ENGINE = """#!/bin/sh
cat >FOLDER/thresholds
echo "$@" >>FOLDER/worked
cat FOLDER/answer
[ -e FOLDER/end ] && . FOLDER/end
true
"""
SOUND = {"tier": 1, "healthy": True, "findings": [], "measured": {"busbw_gbs": 310.0}}
SICK_FINDING = {"check": "memory", "severity": "error", "subject": "GPU 3", "problem": "a word", "fix": "Exchange it."}
SICK = {"tier": 1, "healthy": False, "findings": [SICK_FINDING], "measured": {}}


class Gate:
    """A host with GPUs, driver, engine and agent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("gpus.py", GPUS), ("agent.py", AGENT), ("engine", ENGINE.replace("FOLDER", str(folder)))):
            (folder / name).write_text(text)
        (folder / "engine").chmod(0o755)
        self.config: Json = {
            "agent": [sys.executable, str(folder / "agent.py"), str(folder)],
            "lib": str(folder),
            "record": str(folder / "gpu-tier1.json"),
            "user": "",
            "python": str(folder / "engine"),
            "lock": str(folder / "lock.json"),
            "options": ["--expect", "2"],
            "timeout_s": 60,
            "thresholds": {"min_busbw_gbs": 304},
        }
        self.host(["a", "b"], "6.14", "one")
        self.status(state="stopped", held=None)
        self.answer(SOUND)

    def host(self, uuids: list[str], driver: str, engine: str) -> None:
        (self.folder / "gpus.json").write_text(json.dumps({"uuids": uuids, "driver": driver}))
        (self.folder / "lock.json").write_text(engine)

    def status(self, **what: Any) -> None:
        (self.folder / "status").write_text(json.dumps(what))

    def answer(self, what: Json | str) -> None:
        (self.folder / "answer").write_text(what if isinstance(what, str) else json.dumps(what))

    def run(self, *options: str) -> tuple[int, Json]:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        command = [sys.executable, str(FILES / "gpu-tier1"), "--gate", str(self.folder / "config.json"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        self.said = done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else {}

    def worked(self) -> list[str]:
        file = self.folder / "worked"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_a_pass_is_noted_and_holds(gate: Gate) -> None:
    code, answer = gate.run()
    assert (code, answer["ran"], answer["changed"], answer["healthy"]) == (0, True, True, True)
    (worked,) = gate.worked()
    assert worked.endswith("gpu-tier1 --thresholds - --timeout-s 60 --expect 2")
    assert json.loads((gate.folder / "thresholds").read_text()) == {"min_busbw_gbs": 304}
    code, answer = gate.run()
    assert (code, answer["ran"], answer["changed"]) == (0, False, False)
    assert answer["why"] == "these GPUs have passed with this driver and engine"
    assert gate.run("--force")[1]["ran"]
    assert "quarantine" not in (gate.folder / "asked").read_text()


@pytest.mark.parametrize(
    ("uuids", "driver", "engine", "again"),
    [
        (["b", "a"], "6.14", "one", False),  # the order in which they are listed says nothing
        (["a", "c"], "6.14", "one", True),
        (["a"], "6.14", "one", True),
        (["a", "b"], "6.16", "one", True),
        (["a", "b"], "6.14", "two", True),
    ],
)
def test_a_pass_holds_for_one_combination(gate: Gate, uuids: list[str], driver: str, engine: str, again: bool) -> None:
    gate.run()
    gate.host(uuids, driver, engine)
    assert gate.run()[1]["ran"] is again


def test_what_is_not_known_in_full_never_counts_as_passed(gate: Gate) -> None:
    gate.host([], "6.14", "one")
    assert gate.run()[1]["ran"]
    assert gate.run()[1]["ran"]
    gate.host(["a"], "6.14", "one")
    (gate.folder / "gpu-tier1.json").write_text("garbage")
    assert gate.run()[1]["ran"]


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ({"state": "running", "held": None}, "the node is running"),
        ({"state": "degraded", "held": None}, "the node is degraded"),
        ({"state": "stopped", "held": "in maintenance: fans"}, "the host is in maintenance: fans"),
    ],
)
def test_a_host_at_work_or_held_is_left_alone(gate: Gate, status: Json, why: str) -> None:
    gate.status(**status)
    code, answer = gate.run()
    assert (code, answer["ran"], answer["why"], gate.worked()) == (0, False, why, [])
    # Only people's holds can be overruled: a test beside a running node would find both sick.
    assert gate.run("--force")[1]["ran"] is (status["state"] == "stopped")


def test_a_sick_host_is_quarantined_and_an_older_pass_is_void(gate: Gate) -> None:
    gate.run()
    gate.answer(SICK)
    code, answer = gate.run("--force")
    assert (code, answer["healthy"]) == (1, False)
    assert json.loads((gate.folder / "found").read_text()) == {
        "owner": "gpu_health",
        "reason": "tier 1: memory on GPU 3",
        "findings": [SICK_FINDING],
    }
    gate.answer(SOUND)
    assert gate.run()[1]["ran"]


@pytest.mark.parametrize(
    ("said", "end", "sick"),
    [
        # The engine's environment: no image, no Python, no torch, a library that is missing, a wrong option.
        *[("", f"exit {code}", False) for code in (1, 2, 125, 126, 127)],
        *[(said, "exit 0", False) for said in ("", "{}", '{"healthy": "yes"}', "[]")],
        ("Traceback (most recent call last):\n", "exit 1", False),
        # Somebody stopped it.
        ("", "kill -TERM $$", False),
        ("", "exit 143", False),
        # A GPU that brings its process down; docker and runuser say it as 128 and the signal.
        ("", "kill -SEGV $$", True),
        ("", "kill -KILL $$", True),
        ("", "exit 139", True),
        ("", "exit 137", True),
    ],
)
def test_no_answer_is_no_pass_and_only_the_gpus_own_faults_quarantine(
    gate: Gate, said: str, end: str, sick: bool
) -> None:
    gate.answer(said)
    (gate.folder / "end").write_text(f"echo no such library >&2; {end}\n")
    code, answer = gate.run()
    assert (code, bool(gate.worked())) == (1 if sick else 2, True)
    told = answer["findings"][0]["problem"] if sick else gate.said
    assert "gave no answer, exit code" in told
    assert "no such library" in told
    assert (gate.folder / "found").exists() is sick
    assert sick or "playbooks/images.yml" in gate.said
    # Once it is mended, it is tested again: neither noted a pass.
    (gate.folder / "end").unlink()
    gate.answer(SOUND)
    assert gate.run()[1]["ran"]


def test_a_test_that_does_not_end_quarantines(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier1, "DISCOVERY_S", -120)
    gate.config["timeout_s"] = 0.2
    (gate.folder / "engine").write_text("#!/bin/sh\nexec sleep 600\n")
    answer = tier1.work_here(gate.config)
    assert answer["healthy"] is False
    assert "exit code 124" in answer["findings"][0]["problem"]


@pytest.mark.parametrize("broken", ["no lock file", "no image", "no dockerd", "no Python", "no library"])
def test_a_host_whose_software_is_not_there_is_refused_and_not_quarantined(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A program stands for docker; the words are those of Docker 20.10."""
    said = {
        "no image": "Error: No such image: clusterkit/vllm:current",
        "no dockerd": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.",
    }.get(broken)
    if said:
        (gate.folder / "docker").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        (gate.folder / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{gate.folder}:{os.environ['PATH']}")
        gate.config["image"] = "clusterkit/vllm:current"
    elif broken == "no lock file":
        (gate.folder / "lock.json").unlink()
    elif broken == "no library":
        (gate.folder / "gpus.py").write_text("import no_such_module\n")
    else:
        (gate.folder / "engine").unlink()
    code, answer = gate.run()
    assert (code, answer, gate.worked()) == (2, {}, [])
    assert not (gate.folder / "found").exists()
    assert (said or {"no lock file": "lock.json", "no library": "no_such_module"}.get(broken, "engine")) in gate.said
    assert "deploy the host again" in gate.said if broken == "no library" else "run this again" in gate.said


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import os; os._exit(3)", "code 3"),
        (
            "class version: hip = cuda = None\n__version__ = '2.9.0+cpu'",
            "torch 2.9.0+cpu is built for CPUs alone",
        ),
    ],
)
def test_a_torch_that_cannot_be_used_is_no_finding_about_gpus(tmp_path: Path, torch: str, told: str) -> None:
    (tmp_path / "torch.py").write_text(torch)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(FILES / "gpu-tier1"), "--expect", "8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "torch cannot be imported: " in done.stderr
    assert told in done.stderr
    # One that works, and sees no GPUs, has something to say of them.
    sound = "class version: hip, cuda = '7.2', None\n__version__ = '2.9.0'\nclass cuda: device_count = lambda: 0"
    (tmp_path / "torch.py").write_text(sound)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "sees 0 GPUs, 8 wanted" in json.loads(done.stdout)["findings"][0]["problem"]


def test_the_agent_takes_what_the_gate_hands_over(gate: Gate) -> None:
    """The real agent, whose record is a file of its own."""
    for name in ("launcher", "launcher.json", "instance.env", "generation"):
        (gate.folder / name).write_text("")
    (gate.folder / "launcher").write_text("import json; print(json.dumps({'state': 'stopped', 'reason': 'stopped'}))")
    agent = {
        "launcher": str(gate.folder / "launcher"),
        "launcher_config": str(gate.folder / "launcher.json"),
        "python": sys.executable,
        "record": str(gate.folder / "host.json"),
        "instance_env": str(gate.folder / "instance.env"),
        "generation_file": str(gate.folder / "generation"),
    }
    (gate.folder / "agent.json").write_text(json.dumps(agent))
    program_file = str(ROOT / "roles/host_agent/files/host-agent")
    gate.config["agent"] = [sys.executable, program_file, "--config", str(gate.folder / "agent.json")]
    awkward = {**SICK_FINDING, "problem": tier1.finding("a", "b", "CUDA\nerror\x1b[0m " + "x" * 5000, "c")["problem"]}
    gate.answer({**SICK, "findings": [awkward] * 150})
    code, _ = gate.run()
    assert code == 1, gate.said
    assert json.loads((gate.folder / "host.json").read_text())["quarantine"]["owner"] == "gpu_health"
    # From now on it is left alone.
    assert "in quarantine" in gate.run()[1]["why"]


def test_an_agent_that_does_not_answer_is_told(gate: Gate) -> None:
    gate.config["agent"] = ["/nowhere/agent"]
    code, answer = gate.run()
    assert (code, answer) == (2, {})
    assert "the agent does not tell the node's state" in gate.said


def test_the_container_gets_what_a_node_would_get(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        **gate.config,
        "image": "clusterkit/vllm:current",
        "user": "root",
        "container": {
            "devices": ["/dev/kfd", "/dev/dri"],
            "groups": ["root"],
            "cap_add": ["SYS_PTRACE"],
            "security_opt": ["seccomp=unconfined"],
        },
        "ulimits": {"memlock": "-1:-1"},
    }
    said = " ".join(tier1.command_of(config))
    assert said.startswith(
        "docker run --rm --interactive --init --name clusterkit-gpu-tier1 --pull never --network none"
    )
    assert (
        "--user 0:0 --env HOME=/tmp --device /dev/kfd --device /dev/dri --group-add 0 --cap-add SYS_PTRACE "
        "--security-opt no-new-privileges --security-opt seccomp=unconfined --ulimit memlock=-1:-1" in said
    )
    assert "--privileged" not in said
    assert "--gpus all" in " ".join(tier1.command_of({**config, "container": {"gpus": "all"}}))
    with pytest.raises(KeyError):
        tier1.command_of({**config, "user": "nobody-of-this-name"})


# --------------------------------------------------------------------------- the role's tasks


def play(gate: Gate, tasks: str, *options: str, **variables: Any) -> tuple[int, str]:
    """(exit code, text) of the role's tasks on this machine, with the stand-ins of `gate`."""
    folder = gate.folder
    task = {"name": "Role", "ansible.builtin.import_role": {"name": "gpu_health", "tasks_from": tasks}}
    hosts = [{"name": "Tier", "hosts": "localhost", "gather_facts": False, "tasks": [task]}]
    (folder / "play.yml").write_text(yaml.safe_dump(hosts))
    for path in ("root/bin", "root/lib", "root/ray-env", "etc", "var"):
        (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / "root/ray-env/clusterkit.lock.json").write_text("one")
    (folder / "root/lib/gpus.py").write_text(GPUS)
    (folder / "root/lib/gpus.json").write_text(json.dumps({"uuids": ["a", "b"], "driver": "6.14"}))
    given = {
        "__gpu_health_agent": gate.config["agent"],
        "gpu_health_root_path": str(folder / "root"),
        "gpu_health_config_path": str(folder / "etc"),
        "gpu_health_state_path": str(folder / "var"),
        "gpu_health_gpus": 8,
        "gpu_health_accelerator": "rocm",
        "gpu_health_gpu_model": MI300X,
        "gpu_health_runtime": "venv",
        "gpu_health_image": "clusterkit/none:of-this-name",
        "gpu_health_user": "root",
        "gpu_health_ray_python": str(folder / "engine"),
        "gpu_health_tier1_force": False,
        "gpu_health_tier1_seconds": 1,
        "gpu_health_tier1_memory_mib": 0,
        "gpu_health_tier1_timeout_s": 60,
        "gpu_health_tier1_thresholds": {"max_lag_percent": 15},
        "gpu_health_tier2": True,
        "gpu_health_tier2_rvs_level": 2,
        "gpu_health_tier2_dcgm_level": 1,
        "gpu_health_tier2_paths": [str(folder / "tools")],
        **variables,
    }
    (folder / "given.json").write_text(json.dumps(given))
    words = ["-i", "localhost,", "-c", "local", "-e", f"@{folder}/given.json", str(folder / "play.yml")]
    run = ansible_playbook(folder, *words, *options)
    return run.code, run.text


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the role works as root")
def test_tier1_as_the_role_runs_it(gate: Gate) -> None:
    code, told = play(gate, "tier1", "--check")
    assert code == 0, told
    assert gate.worked() == []
    code, told = play(gate, "tier1")
    assert code == 0, told
    assert gate.worked()[0].endswith("--timeout-s 60 --expect 8 --seconds 1 --memory-mib 0")
    code, told = play(gate, "tier1")
    assert code == 0, told
    assert "changed=0" in told
    # An image that is not there says nothing of the GPUs.
    code, told = play(gate, "tier1", gpu_health_runtime="container", gpu_health_accelerator="cuda")
    assert code == 2
    assert "The GPUs of localhost were not tested, and it is not in quarantine: the image" in told
    assert "playbooks/images.yml" in told
    assert not (gate.folder / "found").exists()
    gate.answer(SICK)
    code, told = play(gate, "tier1", gpu_health_tier1_force=True)
    assert code == 2
    assert "localhost is in quarantine" in told
    assert "error: GPU 3: a word. Exchange it." in told
    assert json.loads((gate.folder / "found").read_text())["owner"] == "gpu_health"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the role works as root")
def test_tier2_as_the_role_runs_it(gate: Gate) -> None:
    tool(gate.folder / "tools", "rvs", output("recorded_rvs_modules.txt"))
    code, told = play(gate, "tier2", gpu_health_tier2=False)
    assert code == 0, told
    assert not (gate.folder / "tools/calls").exists()
    code, told = play(gate, "tier2", gpu_health_gpus=3)
    assert code == 0, told
    assert (gate.folder / "tools/calls").read_text() == "rvs -r 2\n"
    assert "transferbench_a2a was not run: there is no program TransferBench on this host" in told
    tool(gate.folder / "tools", "rvs", output("constructed_rvs_failed.txt"))
    code, told = play(gate, "tier2")
    assert code == 2
    assert "GPU 23018: gst-581Tflops-4K4K8K-rand-bf16" in told
    assert json.loads((gate.folder / "found").read_text())["findings"][0]["subject"] == "GPU 23018"
    gate.status(state="running", held=None)
    code, told = play(gate, "tier2")
    assert code == 2
    assert "clusterkit host drain localhost" in told
