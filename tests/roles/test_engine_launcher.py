"""The launcher with a real Ray, and a model on it, in an engine environment that the role ray_env makes."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_apps import template as templates
from tests.support import free_block

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "roles/ray_node/files/ray-node"
MAKER = ROOT / "roles/model_store/files/make_tiny_llama.py"

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def nodes_engine(engine: Path) -> None:
    Node.engine = engine


class Node:
    """One node with its own folders."""

    engine: Path  # set by the fixture of that name

    def __init__(self, folder: Path, kind: str, head: Node | None = None, **changes: Any) -> None:
        self.folder = folder / kind
        self.folder.mkdir(mode=0o755)
        # Below pytest's folders the path would be too long for Ray's sockets.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="ckt-", dir="/tmp"))
        base = free_block(50) if head is None else head.ports["metrics"] + 20
        names = ["metrics", "agent_http", "agent_grpc", "node_manager", "object_manager", "runtime_env_agent", "serve"]
        if kind == "head":
            names += ["gcs", "dashboard", "client", "autoscaler_metrics", "dashboard_metrics"]
        self.ports = {name: base + number for number, name in enumerate(names)}
        self.token = folder / "token"
        if not self.token.exists():
            self.token.write_text(secrets.token_hex(16))
            self.token.chmod(0o600)
        # A worker on the head's host needs an address of its own.
        node_ip = "127.0.0.1" if head is None else "127.0.0.2"
        gcs = (head or self).ports["gcs"]
        self.config = {
            "kind": kind,
            "runtime": "venv",
            "venv": str(self.engine),
            "node_ip": node_ip,
            "head_address": f"127.0.0.1:{gcs}",
            "ports": {**self.ports, "worker_min": base + 10000, "worker_max": base + 10199},
            "num_cpus": 2,
            "num_gpus": 0,
            "labels": {"pool": "test"},
            "object_store_gib": 0.2,
            "temp_dir": str(self.temp_dir),
            "state_dir": str(self.folder / "state"),
            "log_dir": str(self.folder / "log"),
            "token_file": str(self.token),
            "node_type": "test",
            "generation": "one",
            "drain_timeout_s": 30,
            "stop_timeout_s": 60,
            **changes,
        }
        self.path = self.folder / "ray-node.json"
        self.save()

    def save(self) -> None:
        self.path.write_text(json.dumps(self.config))

    def command(self, *words: str) -> list[str]:
        return [sys.executable, str(LAUNCHER), "--config", str(self.path), *words]

    def run(self, *words: str, code: int = 0) -> dict[str, Any]:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 1, lines
        answer = json.loads(lines[0])
        assert isinstance(answer, dict)
        return answer

    def processes(self) -> dict[int, str]:
        """Everything of this user that has to do with the node, found in another way than the launcher does:
        open files, command lines, environments and working folders."""
        found = {}
        needle = str(self.temp_dir).encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                texts = [(entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()]
                texts += [os.fsencode(os.readlink(link)) for link in (entry / "fd").iterdir()]
                texts.append(os.fsencode(os.readlink(entry / "cwd")))
            except OSError:
                continue
            if any(needle in text for text in texts):
                found[int(entry.name)] = texts[0].replace(b"\0", b" ").decode(errors="replace")[:150]
        return found

    def clean_up(self) -> None:
        subprocess.run(self.command("stop"), capture_output=True, timeout=300, check=False)
        shutil.rmtree(self.temp_dir, ignore_errors=True)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, "head")
    yield node
    node.clean_up()


@pytest.fixture
def worker(tmp_path: Path, head: Node) -> Iterator[Node]:
    node = Node(tmp_path, "worker", head)
    yield node
    node.clean_up()


def shared_memory(pids: Iterable[int]) -> set[int]:
    """The inodes in /dev/shm that the processes have mapped."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {int(line.split()[4]) for line in lines if " /dev/shm/" in line}


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.2)


def test_start_status_and_stop_of_a_head(head: Node) -> None:
    assert head.run("status")["state"] == "stopped"
    instance = head.folder / "state"
    instance.mkdir()
    (instance / "instance.env").write_text("RAY_CLOUD_INSTANCE_ID=box-1\n")

    first = head.run("start")
    assert (first["changed"], first["state"], first["instance_id"]) == (True, "running", "box-1")
    again = head.run("start")
    assert (again["changed"], again["pid"]) == (False, first["pid"])

    status = head.run("status")
    assert (status["state"], status["generation"], status["stale"]) == ("running", "one", False)
    head.config["generation"] = "two"
    head.save()
    status = head.run("status")
    assert (status["generation"], status["stale"]) == ("one", True), "what runs, not what is configured"

    assert head.temp_dir.stat().st_mode & 0o077 == 0, "Ray opens its folder to everybody"
    token = head.token.read_text()
    processes = head.processes()
    assert len(processes) > 5
    for pid in processes:
        assert token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()

    assert head.run("stop")["changed"] is True
    assert head.processes() == {}
    assert head.run("stop")["changed"] is False
    assert head.run("status")["state"] == "stopped"


def test_stop_without_a_supervisor_leaves_nothing(head: Node) -> None:
    started = head.run("start")
    os.kill(started["pid"], signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{started['pid']}/fd").exists(), 10)
    status = head.run("status")
    assert status["state"] == "degraded"
    assert "supervisor is gone" in status["reason"]
    # `ray start` goes too, so that nobody is left who knows the agents with their changed titles.
    for pid, line in head.processes().items():
        if " start " in line or "raylet" in line.split(" ")[0] or "gcs_server" in line.split(" ")[0]:
            os.kill(pid, signal.SIGKILL)
    assert head.processes(), "the strays that this is about"
    assert head.run("stop")["changed"] is True
    assert head.processes() == {}


def test_start_repairs_a_broken_node(head: Node) -> None:
    started = head.run("start")
    raylet = next(pid for pid, line in head.processes().items() if line.split(" ")[0].endswith("/raylet"))
    os.kill(started["pid"], signal.SIGKILL)
    os.kill(raylet, signal.SIGKILL)
    again = head.run("start")
    assert (again["changed"], again["state"]) == (True, "running")
    assert again["pid"] != started["pid"]


def test_supervisor_ends_when_ray_dies(head: Node) -> None:
    head.run("start")
    raylet = next(pid for pid, line in head.processes().items() if line.split(" ")[0].endswith("/raylet"))
    os.kill(raylet, signal.SIGKILL)
    wait_for(lambda: head.run("status")["state"] == "stopped")
    assert "exit code 1" in head.run("status")["reason"]
    assert head.processes() == {}


def test_a_taken_port_is_named(head: Node) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", head.ports["gcs"]))
        other.listen()
        answer = head.run("start", code=1)
    assert f"port {head.ports['gcs']} (ports.gcs) is taken by process {os.getpid()}" in answer["reason"]
    assert head.processes() == {}


def test_two_starts_at_once_make_one_node(head: Node) -> None:
    starts = [
        subprocess.Popen(head.command("start"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)
    ]
    answers = [json.loads(start.communicate(timeout=200)[0]) for start in starts]
    assert sorted(answer["changed"] for answer in answers) == [False, True]
    assert answers[0]["pid"] == answers[1]["pid"]


def test_foreground_ends_gracefully_on_sigterm(head: Node, tmp_path: Path) -> None:
    # As systemd does it with Type=notify.
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    address = f"{head.temp_dir}-notify"
    listener.bind(address)
    listener.settimeout(120)
    env = {**os.environ, "NOTIFY_SOCKET": address}
    process = subprocess.Popen(head.command("start", "--foreground"), stdout=subprocess.PIPE, env=env)
    try:
        assert listener.recv(100) == b"READY=1"
        assert head.run("status")["pid"] == process.pid
        assert head.run("start")["changed"] is False
        process.terminate()
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        listener.close()
        os.unlink(address)
    assert process.returncode == 0
    assert json.loads(out)["state"] == "stopped"
    assert head.processes() == {}


def test_a_worker_joins_drains_and_stops(head: Node, worker: Node) -> None:
    head.run("start")
    assert worker.run("start")["state"] == "running"
    done = worker.run("drain")
    assert (done["changed"], done["drained"]) == (True, True)
    status = worker.run("status")
    assert status["state"] == "degraded"
    assert "drained" in status["reason"]
    assert worker.run("drain")["changed"] is False
    assert worker.run("start")["changed"] is True, "a drained node is started anew"
    assert worker.run("stop", "--drain")["state"] == "stopped"
    assert worker.processes() == {}
    assert head.run("status")["state"] == "running", "the other node of the same user is left alone"


def test_a_worker_with_a_wrong_token_says_so(head: Node, worker: Node, tmp_path: Path) -> None:
    head.run("start")
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong")
    wrong.chmod(0o600)
    worker.config["token_file"] = str(wrong)
    worker.save()
    answer = worker.run("start", code=1)
    assert "refuses the token" in answer["reason"]
    assert any("InvalidAuthToken" in line for line in answer["log"])
    assert worker.processes() == {}


# --------------------------------------------------------------------------- a model on it


def apply(head: Node, config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The module as Ansible runs it."""
    arguments = {
        "url": f"http://127.0.0.1:{head.ports['dashboard']}",
        "token_file": str(head.token),
        "ray_python": f"{Node.engine}/bin/python",
        "config": config,
        "wait_timeout_s": 400,
    }
    env = {
        **os.environ,
        "ANSIBLE_LIBRARY": str(ROOT / "plugins/modules"),
        "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
        "ANSIBLE_STDOUT_CALLBACK": "minimal",
        "ANSIBLE_HOME": str(tmp_path / "ansible"),
    }
    program = "from ansible.cli.adhoc import main; import sys; main(sys.argv)"
    command = [sys.executable, "-c", program, "localhost", "-c", "local", "-m", "ray_serve_config"]
    command += ["-e", f"ansible_python_interpreter={sys.executable}", "-a", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout[done.stdout.index("=>") + 2 :])
    assert isinstance(answer, dict)
    return answer


def ask(url: str, body: dict[str, Any]) -> str:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(answer.read().decode())


def server_pids(answer: dict[str, Any]) -> list[int]:
    return [replica["pid"] for replica in answer["applications"]["tiny"]["deployments"]["LLMServer:tiny"]["replicas"]]


def test_a_model_from_nothing_to_real_tokens(head: Node, tmp_path: Path) -> None:
    model = tmp_path / "model"
    subprocess.run([f"{Node.engine}/bin/python", str(MAKER), "--out", str(model)], check=True, capture_output=True)

    def config(**scaling: int) -> dict[str, Any]:
        llm = templates.load("llm")
        parameters = llm.parameters.model_validate(
            {
                "model_id": "tiny",
                "model_source": {"make": "tiny-llama"},
                "engine_kwargs": {"max_model_len": 512, "max_num_seqs": 4},
                **scaling,
            }
        )
        app = llm.render(name="tiny", route_prefix="/", parameters=parameters, accelerator="cpu", model_path=str(model))
        return {"http_options": {"host": "127.0.0.1", "port": head.ports["serve"]}, "applications": [app]}

    head.run("start")
    first = apply(head, config(), tmp_path)
    assert first["changed"] is True
    assert first["plan"]["added"] == ["tiny"]

    url = f"http://127.0.0.1:{head.ports['serve']}/v1/chat/completions"
    question = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "Count to ten"}]}
    answer = json.loads(ask(url, question))
    assert answer["usage"]["completion_tokens"] > 0
    stream = [line for line in ask(url, {**question, "stream": True}).splitlines() if line]
    assert len(stream) > 2
    assert stream[-1] == "data: [DONE]"

    assert apply(head, config(), tmp_path)["changed"] is False

    scaled = apply(head, config(max_replicas=3), tmp_path)
    assert scaled["plan"]["changed"] == ["tiny"]
    assert server_pids(scaled) == server_pids(first), "a scaling edit restarts no engine"

    memory = shared_memory(head.processes())
    head.run("stop")
    assert head.processes() == {}
    assert memory
    left = [entry.name for entry in Path("/dev/shm").iterdir() if entry.stat().st_ino in memory]
    assert left == [], "an engine's shared memory outlived it"
