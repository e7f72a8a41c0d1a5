"""The launcher without Ray: what Ray is given, what is refused, and which processes count as the node's."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import load_script

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "roles/ray_node/files/ray-node"


ray_node = load_script(LAUNCHER)

PORTS = {
    "gcs": 6379,
    "dashboard": 8265,
    "client": 10001,
    "serve": 8000,
    "metrics": 8090,
    "agent_http": 52365,
    "agent_grpc": 52366,
    "node_manager": 52367,
    "object_manager": 52368,
    "runtime_env_agent": 52369,
    "worker_min": 10002,
    "worker_max": 19999,
}


def given(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "head",
        "runtime": "venv",
        "venv": "/opt/env",
        "node_ip": "192.0.2.1",
        "head_address": "192.0.2.1:6379",
        "ports": PORTS,
        "num_cpus": None,
        "num_gpus": 8,
        "resources": {},
        "labels": {},
        "object_store_gib": None,
        "temp_dir": "/tmp/node",
        "state_dir": "/var/lib/node",
        "log_dir": "/var/log/node",
        "token_file": "/etc/node/token",
        "env": {},
        "node_type": "pool",
        "generation": "g1",
        "drain_timeout_s": 60,
        "stop_timeout_s": 90,
        **changes,
    }


def config(**changes: Any) -> dict[str, Any]:
    checked = ray_node.check_config(given(**changes))
    assert isinstance(checked, dict)
    return checked


def pairs(argv: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in itertools.pairwise(argv) if flag.startswith("--")}


# --------------------------------------------------------------------------- what Ray is given


def test_a_head() -> None:
    argv = ray_node.ray_argv(config())
    assert argv[:3] == ["/opt/env/bin/python", "/opt/env/bin/ray", "start"]
    assert "--head" in argv
    assert "--block" in argv
    assert "--address" not in argv
    flags = pairs(argv)
    assert flags["--dashboard-host"] == "127.0.0.1"
    assert (flags["--port"], flags["--dashboard-port"], flags["--ray-client-server-port"]) == ("6379", "8265", "10001")
    assert (flags["--min-worker-port"], flags["--max-worker-port"]) == ("10002", "19999")
    assert (flags["--node-ip-address"], flags["--temp-dir"]) == ("192.0.2.1", "/tmp/node")
    assert flags["--num-gpus"] == "8"
    assert "--num-cpus" not in argv


def test_a_worker_joins_and_takes_no_head_ports() -> None:
    argv = ray_node.ray_argv(
        config(
            kind="worker",
            num_cpus=0,
            num_gpus=0,
            resources={"accelerator_type:X": 8},
            labels={"pool": "a", "zone": "b"},
            object_store_gib=1.5,
            spill_dir="/data/spill",
        )
    )
    flags = pairs(argv)
    assert flags["--address"] == "192.0.2.1:6379"
    assert not {"--head", "--port", "--dashboard-port", "--dashboard-host", "--ray-client-server-port"} & set(argv)
    assert (flags["--num-cpus"], flags["--num-gpus"]) == ("0", "0"), "zero is an answer, not a gap"
    assert json.loads(flags["--resources"]) == {"accelerator_type:X": 8}
    assert flags["--labels"] == "pool=a,zone=b"
    assert flags["--object-store-memory"] == str(int(1.5 * 1024**3))
    assert flags["--object-spilling-directory"] == "/data/spill"


def environment(inherited: dict[str, str] | None = None, **changes: Any) -> dict[str, str]:
    env = ray_node.ray_env(config(**changes), {"RAY_CLOUD_INSTANCE_ID": "h-1"}, inherited or {})
    assert isinstance(env, dict)
    return env


def test_the_environment_says_everything_that_matters() -> None:
    env = environment()
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"]) == ("token", "/etc/node/token")
    assert env["RAY_USAGE_STATS_ENABLED"] == "0"
    assert env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == env["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert env["RAY_CLOUD_INSTANCE_ID"] == "h-1"
    assert env["PATH"].startswith("/opt/env/bin:")
    assert (env["TMPDIR"], env["XDG_CACHE_HOME"]) == ("/tmp/node/tmp", "/var/lib/node/cache")
    assert env["HOME"]


def test_without_a_token_authentication_is_off_and_not_left_open() -> None:
    env = environment(token_file=None)
    assert env["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN_PATH" not in env


def test_a_shell_and_systemd_make_the_same_node() -> None:
    shell = {
        "HOME": "/home/me",
        "USER": "me",
        "LC_ALL": "C.UTF-8",
        "PATH": "/home/me/bin",
        "PYTHONPATH": "/home/me/lib",
        "RAY_ADDRESS": "elsewhere:6379",
        "CUDA_VISIBLE_DEVICES": "3",
        "http_proxy": "http://proxy:3128",
        "ROCR_VISIBLE_DEVICES": "0",
    }
    env = environment(shell)
    assert (env["HOME"], env["USER"], env["LC_ALL"]) == ("/home/me", "me", "C.UTF-8")
    leaked = {"PYTHONPATH", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "http_proxy", "ROCR_VISIBLE_DEVICES"} & set(env)
    assert not leaked
    assert "/home/me/bin" not in env["PATH"]


def test_the_configured_environment_is_taken_but_not_against_safety() -> None:
    env = environment(
        env={
            "NCCL_SOCKET_IFNAME": "eth1",
            "PYTHONPATH": "/srv/policies",
            "TMPDIR": "/scratch",
            "ROCR_VISIBLE_DEVICES": "0",
            "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_AUTH_TOKEN": "secret",
            "RAY_USAGE_STATS_ENABLED": "1",
        }
    )
    assert (env["NCCL_SOCKET_IFNAME"], env["PYTHONPATH"], env["TMPDIR"]) == ("eth1", "/srv/policies", "/scratch")
    assert not [name for name in env if "NOSET" in name or name == "ROCR_VISIBLE_DEVICES"]
    assert (env["RAY_AUTH_MODE"], env["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")
    assert "RAY_AUTH_TOKEN" not in env


def test_metrics_ports_of_the_head_go_by_environment() -> None:
    ports = {**PORTS, "autoscaler_metrics": 44217, "dashboard_metrics": 44227}
    env = environment(ports=ports)
    assert (env["AUTOSCALER_METRIC_PORT"], env["DASHBOARD_METRIC_PORT"]) == ("44217", "44227")
    assert "AUTOSCALER_METRIC_PORT" not in environment(kind="worker", ports=ports)


def test_instance_file(tmp_path: Path) -> None:
    node = config(state_dir=str(tmp_path))
    assert ray_node.read_instance(node) == {"RAY_NODE_TYPE_NAME": "pool"}
    (tmp_path / "instance.env").write_text(
        "# by the agent\nRAY_CLOUD_INSTANCE_ID=h-17\nLD_PRELOAD=/evil.so\nRAY_NODE_TYPE_NAME=other\nnonsense\n"
    )
    assert ray_node.read_instance(node) == {"RAY_CLOUD_INSTANCE_ID": "h-17", "RAY_NODE_TYPE_NAME": "other"}


AUTOSCALER = {
    "config": "/etc/x/autoscaler/autoscaling.yaml",
    "lib": "/etc/x/autoscaler/lib",
    "environment": {"RAY_enable_autoscaler_v2": "1"},
    "folders": ["/etc/x/autoscaler", "/run/x/fleet"],
}


def test_a_head_scales_with_its_provider_before_the_sites_own_code() -> None:
    site = {"PYTHONPATH": "/srv/policies", "RAY_enable_autoscaler_v2": "0"}
    assert pairs(ray_node.ray_argv(config(autoscaler=AUTOSCALER)))["--autoscaling-config"] == AUTOSCALER["config"]
    env = environment(autoscaler=AUTOSCALER, env=site)
    assert env["PYTHONPATH"] == "/etc/x/autoscaler/lib:/srv/policies"
    assert env["RAY_enable_autoscaler_v2"] == "1", "the provider is none for v1"
    assert environment(autoscaler=AUTOSCALER)["PYTHONPATH"] == "/etc/x/autoscaler/lib"
    assert "--autoscaling-config" not in ray_node.ray_argv(config())
    assert "PYTHONPATH" not in environment()


def instance_of(node: dict[str, Any]) -> str:
    """As a start notes it."""
    return str(ray_node.begin_record(node)["instance_id"])


def test_a_head_is_another_instance_with_every_start(tmp_path: Path) -> None:
    """Systemd starts it again with the file that its agent wrote for the first start; Ray takes no id twice."""
    head, named = config(state_dir=str(tmp_path)), tmp_path / "instance.env"
    seen = [instance_of(head)]
    named.write_text("RAY_CLOUD_INSTANCE_ID=h-1\n")
    seen += [instance_of(head) for _ in range(3)]
    assert seen[1] == "h-1", "as its agent says"
    named.write_text("RAY_CLOUD_INSTANCE_ID=h-2\n")
    seen += [instance_of(head), instance_of(head)]
    assert seen[4] == "h-2"
    assert len(set(seen)) == len(seen)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", name) for name in seen)


def test_a_worker_is_what_it_was_named(tmp_path: Path) -> None:
    worker = config(kind="worker", state_dir=str(tmp_path))
    (tmp_path / "instance.env").write_text("RAY_CLOUD_INSTANCE_ID=w-1\n")
    assert [instance_of(worker), instance_of(worker)] == ["w-1", "w-1"]


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "both"}, "must be head or worker"),
        ({"runtime": "podman"}, "it must be container or venv"),
        ({"temp_dir": "relative"}, "temp_dir must be an absolute path"),
        ({"temp_dir": "/tmp/" + "x" * 60}, "may have 43"),
        ({"node_ip": ""}, "node_ip is missing"),
        ({"object_store_gib": 0.05}, "Ray wants at least 0.073"),
        ({"num_gpu": 8}, "unknown key num_gpu"),
        ({"ports": {**PORTS, "metric": 1}}, "unknown port metric"),
        ({"ports": {**PORTS, "metrics": 6379}}, "both 6379"),
        ({"ports": {**PORTS, "metrics": 10500}}, "lies among the worker ports"),
        ({"ports": {**PORTS, "metrics": "8090"}}, "must be a port number"),
        ({"ports": {**PORTS, "worker_max": None}}, "given together"),
        ({"autoscaler": AUTOSCALER, "kind": "worker"}, "only a head has one"),
        ({"autoscaler": {"config": "/etc/x"}}, "must have config, lib, environment, folders, and nothing else"),
        ({"autoscaler": {**AUTOSCALER, "lib": "lib"}}, "'lib' must be an absolute path"),
        ({"ports": {name: port for name, port in PORTS.items() if name != "gcs"}}, "ports.gcs is missing"),
    ],
)
def test_a_wrong_configuration(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ray_node.Problem, match=re.escape(says)) as caught:
        config(**changes)
    assert caught.value.code == 2


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ray_node.Problem) as caught:
        config(kind="x", runtime="y", node_ip="")
    assert str(caught.value).count(";") == 2


def test_the_limit_of_temp_dir_is_that_of_unix_sockets() -> None:
    """A socket can be bound below the longest folder that is allowed, and below no longer one."""
    for extra, works in ((0, True), (1, False)):
        base = tempfile.mkdtemp(prefix="s", dir="/tmp")
        folder = base + "/" + "x" * (ray_node.TEMP_DIR_LIMIT - len(base) - 1 + extra)
        path = f"{folder}/{ray_node.SESSION_NAME}/sockets/plasma_store"
        os.makedirs(os.path.dirname(path))
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                if works:
                    probe.bind(path)
                else:
                    with pytest.raises(OSError, match="too long"):
                        probe.bind(path)
        finally:
            shutil.rmtree(base)


def test_a_taken_port_is_told_with_its_process() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        node = config(ports={**PORTS, "metrics": port})
        (taken,) = [line for line in ray_node.taken_ports(node) if "metrics" in line]
    assert f"port {port} (ports.metrics) is taken by process {os.getpid()}" in taken


# --------------------------------------------------------------------------- processes


@pytest.fixture
def folder() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="ckn-", dir="/tmp")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def spawn(code: str, *arguments: str, **keywords: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, **keywords
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


SLEEP = "import sys, time; print(flush=True); time.sleep(60)"
# What setproctitle does: the title overwrites arguments and environment, from their beginning on.
RENAMED = """
import ctypes, os, sys, time
start, end = 0, 0
fields = open("/proc/self/stat").read().rsplit(")", 1)[1].split()
start, end = int(fields[45]), int(fields[48])
ctypes.memset(start, 0x20, end - start)
ctypes.memmove(start, b"ray::Agent", 10)
print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "arguments", "marked", "opens", "ours"),
    [
        (SLEEP, [], True, False, True),
        (SLEEP, [], False, False, False),
        (SLEEP, ["FOLDER/log"], False, False, False),  # an editor, a tail
        (SLEEP, [], False, True, False),  # a notebook that uses the cluster
        (RENAMED, [], True, True, True),
        (RENAMED, [], False, True, True),
        (RENAMED, [], True, False, False),  # cannot be told from any other process
    ],
)
def test_which_processes_are_the_nodes(
    folder: str, code: str, arguments: list[str], marked: bool, opens: bool, ours: bool
) -> None:
    node = config(temp_dir=folder, state_dir=folder)
    env = {"PATH": os.environ["PATH"], "HOME": "/"}
    if marked:
        env[ray_node.MARKER] = folder
    keywords: dict[str, Any] = {"env": env}
    if opens:
        keywords["stderr"] = open(f"{folder}/log", "wb")  # noqa: SIM115
    process = spawn(code, *[word.replace("FOLDER", folder) for word in arguments], **keywords)
    try:
        assert ray_node.is_ours(process.pid, node) is ours
        assert (process.pid in ray_node.node_processes(node)) is ours
    finally:
        process.kill()
        process.wait()


def test_end_all_ends_the_family_and_spares_the_caller(folder: str) -> None:
    node = config(temp_dir=folder, state_dir=folder)
    env = {**os.environ, ray_node.MARKER: folder}
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
    # The child drops the marker: it counts because of its parent.
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], env={{}}); {SLEEP}"
    bystander = spawn(SLEEP)
    family = [spawn(parent, env=env), spawn(deaf, env=env)]
    try:
        assert ray_node.end_all(node, grace_s=0.5) >= 3
        assert ray_node.node_processes(node) == {}
        assert bystander.poll() is None
    finally:
        for process in [bystander, *family]:
            process.kill()
            process.wait()


# Maps a file as a killed engine would leave it: no tracker is there to remove it.
MAPS = (
    "import mmap, sys, time; f = open(sys.argv[1], 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096); " + SLEEP
)


@pytest.fixture
def segments() -> Iterator[tuple[Path, Path]]:
    paths = [Path(f"/dev/shm/ckt-{os.getpid()}-{name}") for name in ("node", "other")]
    yield paths[0], paths[1]
    for path in paths:
        path.unlink(missing_ok=True)


def test_memory_of_an_ended_engine_is_freed_while_the_node_lives(folder: str, segments: tuple[Path, Path]) -> None:
    node = config(temp_dir=folder, state_dir=folder)
    mine, foreign = segments
    engine = spawn(MAPS, str(mine), env={**os.environ, ray_node.MARKER: folder})
    stranger = spawn(MAPS, str(foreign))
    memory = ray_node.Memory(node)
    memory.sweep(ray_node.node_processes(node))
    for process in (engine, stranger):
        process.kill()
        process.wait()
    memory.sweep(ray_node.node_processes(node))
    assert mine.exists(), "one look is not enough: it may be between two owners"
    memory.sweep(ray_node.node_processes(node))
    assert not mine.exists()
    assert foreign.exists()


def test_memory_of_a_killed_node_is_freed_later(folder: str, segments: tuple[Path, Path]) -> None:
    node = config(temp_dir=folder, state_dir=folder)
    mine, _ = segments
    engine = spawn(MAPS, str(mine), env={**os.environ, ray_node.MARKER: folder})
    ray_node.Memory(node).sweep(ray_node.node_processes(node))
    assert ray_node.free_memory(node, ray_node.Memory(node).known) == 0, "still in use"
    engine.kill()
    engine.wait()
    ray_node.end_all(node)  # of a supervisor that knows nothing but what the last one wrote down
    assert not mine.exists()


def test_a_path_is_not_the_beginning_of_another() -> None:
    assert ray_node.mentions(b"--temp-dir=/tmp/node\0", "/tmp/node")
    assert ray_node.mentions(b"/tmp/node/session/logs", "/tmp/node")
    assert not ray_node.mentions(b"--temp-dir=/tmp/node2\0", "/tmp/node")
    assert not ray_node.mentions(b"--temp-dir=/tmp/node-2/x\0", "/tmp/node")
    assert ray_node.mentions(b"/tmp/node-2 /tmp/node\0", "/tmp/node")


def record_of(pid: int) -> dict[str, Any]:
    process = ray_node.read_process(pid)
    return {"pid": pid, "start": process.start, "boot": ray_node.boot_id()}


def test_a_reused_process_number_is_another_process() -> None:
    record = record_of(os.getpid())
    assert ray_node.is_same_process(record)
    assert not ray_node.is_same_process({**record, "start": record["start"] - 1})
    assert not ray_node.is_same_process({**record, "boot": "another"})
    assert not ray_node.is_same_process({})
    process = spawn(SLEEP)
    record = record_of(process.pid)
    process.kill()
    wait_for_zombie(process.pid)
    assert not ray_node.is_same_process(record), "a zombie runs no more"
    process.wait()
    assert not ray_node.is_same_process(record)


def wait_for_zombie(pid: int) -> None:
    for _ in range(100):
        if ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.02)
    raise AssertionError("still runs")


def test_a_name_with_brackets_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([str(program), "-c", SLEEP], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert ray_node.read_process(process.pid).ppid == os.getpid()
    finally:
        process.kill()
        process.wait()


# --------------------------------------------------------------------------- the command


def call(tmp_path: Path, *words: str, **changes: Any) -> tuple[int, dict[str, Any]]:
    folders = {name: str(tmp_path / name) for name in ("state_dir", "log_dir", "venv")}
    path = tmp_path / "config.json"
    temp_dir = changes.pop("temp_dir", "/tmp/ckn-none")
    path.write_text(json.dumps(given(temp_dir=temp_dir, **{**folders, **changes})))
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), "--config", str(path), *words], capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout)


def test_status_and_stop_of_what_never_ran(tmp_path: Path) -> None:
    code, answer = call(tmp_path, "status")
    assert (code, answer["state"], answer["reason"]) == (0, "stopped", "never started")
    code, answer = call(tmp_path, "stop")
    assert (code, answer["changed"]) == (0, False)


def test_status_does_not_trust_an_old_record(tmp_path: Path) -> None:
    state = tmp_path / "state_dir"
    state.mkdir()
    record = {**record_of(os.getpid()), "boot": "before", "generation": "g0", "phase": "up"}
    (state / "ray-node.json").write_text(json.dumps(record))
    _, answer = call(tmp_path, "status")
    assert (answer["state"], answer["pid"], answer["generation"]) == ("stopped", None, None)


@contextlib.contextmanager
def program(name: str, folder: str) -> Iterator[None]:
    """A process of the node's that calls itself so."""
    environment = {"PATH": os.environ["PATH"], ray_node.MARKER: folder}
    process = subprocess.Popen(
        [f"/opt/{name}", "-c", SLEEP], executable=sys.executable, env=environment, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("supervised", "record", "left", "state", "raylet"),
    [
        (True, {"phase": "up"}, "raylet", "degraded", "running"),
        (True, {"phase": "up"}, "gcs_server", "degraded", "gone"),
        (True, {"phase": "up", "drained": "2026-01-01T00:00:00Z"}, "gcs_server", "degraded", "gone"),
        # It may come at any moment.
        (True, {"phase": "starting"}, "gcs_server", "degraded", "starting"),
        (False, {"phase": "starting"}, "gcs_server", "degraded", "starting"),
        # The supervisor was killed, and the node may serve on.
        (False, {"phase": "up"}, "raylet", "degraded", "running"),
        (False, {"phase": "up"}, "gcs_server", "degraded", "gone"),
        (False, {"phase": "ended"}, None, "stopped", "none"),
    ],
)
def test_status_says_whether_the_raylet_is_certainly_gone(
    folder: str, supervised: bool, record: dict[str, Any], left: str | None, state: str, raylet: str
) -> None:
    node = config(kind="worker", node_ip="127.0.0.1", temp_dir=folder, state_dir=folder)
    ray_node.write_record(node, {**record_of(os.getpid()), "boot": ray_node.boot_id() if supervised else "", **record})
    with program(left, folder) if left else contextlib.nullcontext():
        answer = ray_node.inspect(node)
    assert (answer["state"], answer["raylet"]) == (state, raylet)


def test_a_raylet_that_answers_is_not_looked_for(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = config(kind="worker", node_ip="127.0.0.1", temp_dir=folder, state_dir=folder)
    ray_node.write_record(node, {**record_of(os.getpid()), "boot": ray_node.boot_id(), "phase": "up"})
    monkeypatch.setattr(ray_node, "ask", lambda _url: "success")
    answer = ray_node.inspect(node)
    assert (answer["state"], answer["raylet"], answer["reason"]) == ("running", "running", None)


def test_start_tells_what_is_missing(tmp_path: Path, folder: str) -> None:
    code, answer = call(tmp_path, "start", temp_dir=folder)
    assert (code, answer["changed"], answer["failed"]) == (1, False, True)
    assert "there is no Ray in" in answer["reason"]

    ray = tmp_path / "venv/bin/ray"
    ray.parent.mkdir(parents=True)
    ray.touch()
    code, answer = call(tmp_path, "start", temp_dir=folder, token_file=str(tmp_path / "none"))
    assert (code, "cannot read the token" in answer["reason"]) == (1, True)

    code, answer = call(tmp_path, "start", temp_dir=folder, autoscaler=AUTOSCALER)
    assert (code, answer["reason"]) == (1, f"there is no {AUTOSCALER['config']}: the role autoscaler writes it")

    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    code, answer = call(tmp_path, "start", temp_dir=folder, token_file=str(token))
    assert (code, "chmod 600" in answer["reason"]) == (1, True)


def test_a_temp_dir_that_somebody_prepared_is_refused(tmp_path: Path, folder: str) -> None:
    link = f"{folder}/link"
    os.symlink("/etc", link)
    code, answer = call(tmp_path, "start", temp_dir=link)
    assert (code, "not a folder that belongs to this user" in answer["reason"]) == (1, True)


def test_a_wrong_configuration_is_exit_2(tmp_path: Path) -> None:
    code, answer = call(tmp_path, "status", kind="x")
    assert (code, answer["failed"]) == (2, True)


def test_cause_of_a_failed_start() -> None:
    log = ["Traceback (most recent call last):", '  File "x"', "ValueError: no such thing", "ray-node 12:00:00 ended"]
    assert ray_node.cause(log) == "ValueError: no such thing"
    log = ["ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing"]
    assert "refuses the token" in ray_node.cause(log)
    assert ray_node.cause(["all is well"]) is None


@pytest.mark.parametrize(
    "path",
    [
        "roles/ray_node/files/ray-node",
        "roles/host_agent/files/host-agent",
        "roles/model_store/files/make_tiny_llama.py",
    ],
)
def test_runs_on_targets(path: str) -> None:
    """Syntax of Python 3.9, and at the top nothing but its standard library."""
    text = (ROOT / path).read_text()
    assert text.startswith("#!")
    tree = ast.parse(text, feature_version=(3, 9))
    for node in tree.body:
        names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names, name
