"""The plan: what events of a check-mode run become, what is hidden, and one real run on a host that is yet bare."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterkit import plan as planning
from clusterkit.cli import plan as cli
from clusterkit.plan import HIDDEN, Change, Plan
from clusterkit.runner import Event

ROOT = Path(__file__).resolve().parents[2]

Json = dict[str, Any]

CLUSTER: Json = {
    "allow_disruption": False,
    "head": {"host": "head"},
    "hosts": {"head": {}, "w1": {}, "w2": {}},
    "node_addresses": {"head": "192.0.2.1", "w1": "192.0.2.2", "w2": "192.0.2.3"},
}
APPS: Json = {
    "tiny": {
        "deployments": {
            "LLMServer": {
                "replicas": [
                    {"state": "RUNNING", "node_ip": "192.0.2.2"},
                    {"state": "RUNNING", "node_ip": "192.0.2.3"},
                    {"state": "STOPPING", "node_ip": "192.0.2.3"},
                ]
            },
            "Router": {"replicas": [{"state": "RUNNING", "node_ip": "192.0.2.2"}]},
        }
    }
}


def event(result: Json | None = None, *, host: str = "w1", kind: str = "changed", **more: Any) -> Event:
    given = {"role": "baseline", "task": "Do it", "play": "Prepare", **more}
    return Event(kind=kind, host=host, result=result or {}, **given)  # type: ignore[arg-type]


def spec(**changes: Any) -> Event:
    return event({"cluster": {**CLUSTER, **changes}}, kind="ok", role="", host="head", task=planning.SPEC_TASK)


def node(state: str, host: str = "w1") -> Event:
    answer = {"stdout": json.dumps({"state": state}) if state else ""}
    return event(answer, host=host, kind="ok", role="ray_node", task=planning.NODE_TASK)


def serve(host: str = "head", **result: Any) -> Event:
    kind = "changed" if result.get("changes") else "ok"
    answer = {"applications": APPS, **result}
    return event(answer, host=host, kind=kind, role="serve_apps", task=planning.SERVE_TASK)


def changes_of(*events: Event, **changes: Any) -> tuple[Change, ...]:
    return planning.plan([spec(**changes), *events]).changes


def only(result: Json, **more: Any) -> Change:
    (change,) = changes_of(event(result, **more))
    return change


# ------------------------------------------------------------------ what a task tells


def test_a_module_says_itself_what_differs() -> None:
    told = {"what": "package", "name": "libnuma1", "wanted": "installed", "actual": "missing"}
    change = only({"changed": True, "changes": [told]})
    assert (change.host, change.role, change.what, change.name) == ("w1", "baseline", "package", "libnuma1")
    assert (change.wanted, change.actual, change.diff, change.disrupts) == ("installed", "missing", "", ())


def test_a_file_of_a_module_is_a_diff() -> None:
    told = {"what": "file", "name": "/etc/x", "before": "a\nb\n", "after": "a\nc\n"}
    change = only({"changed": True, "changes": [told], "disrupts": "docker"})
    assert change.diff.splitlines() == ["--- on the host", "+++ wanted", "@@ -1,2 +1,2 @@", " a", "-b", "+c"]
    assert (change.wanted, change.actual, change.disrupts) == ("as rendered", "other content", ("docker",))


# Results as ansible-core 2.19 wrote them in check mode.
BUILTIN: dict[str, tuple[Json, Json]] = {
    "a file that is to be made": (
        {
            "diff": [{"before": "", "after_header": "/srv/checkout/files/x", "after": "new\n"}],
            "invocation": {"dest": "/etc/y", "module_args": {"dest": "/etc/y", "src": "/srv/checkout/files/x"}},
        },
        {"what": "file", "name": "/etc/y", "actual": "missing or empty"},
    ),
    "a file with another content": (
        {
            "diff": [{"before_header": "/etc/x", "before": "old\n", "after_header": "/etc/x", "after": "new\n"}],
            "invocation": {"module_args": {"dest": "/etc/x"}},
        },
        {"what": "file", "name": "/etc/x", "actual": "other content", "wanted": "as rendered"},
    ),
    "a unit": (
        {
            "diff": [{"before": "a", "after_header": "/tmp/t.j2", "after": "b"}],
            "invocation": {"module_args": {"dest": "/etc/systemd/system/clusterkit-ray.service"}},
        },
        {"what": "unit", "name": "/etc/systemd/system/clusterkit-ray.service"},
    ),
    "a mode": (
        {
            "diff": {"before": {"path": "/etc/x", "mode": "0755"}, "after": {"path": "/etc/x", "mode": "0700"}},
            "state": "file",
        },
        {"what": "file", "name": "/etc/x", "wanted": {"mode": "0700"}, "actual": {"mode": "0755"}},
    ),
    "a folder": (
        {
            "diff": {
                "before": {"path": "/srv/a", "state": "absent"},
                "after": {"path": "/srv/a", "state": "directory"},
            },
        },
        {"what": "folder", "name": "/srv/a", "wanted": {"state": "directory"}, "actual": "missing"},
    ),
    "a file too large to show": (
        {"diff": [{"dst_larger": 104448}], "invocation": {"module_args": {"dest": "/etc/x"}}},
        {"what": "file", "name": "/etc/x", "diff": "", "actual": None},
    ),
    "what host_files says": (
        {"diff": [{"after_header": "/etc/x (mode, owner)", "before": "a", "after": "a"}]},
        {"what": "file", "name": "/etc/x", "wanted": "another mode, owner", "diff": ""},
    ),
    "a unit that is to be enabled": (
        {
            "name": "clusterkit-ray.service",
            "enabled": True,
            "status": {"UnitFileState": "disabled", "ActiveState": "active"},
            "invocation": {"module_args": {"name": "clusterkit-ray.service", "enabled": True, "state": None}},
        },
        {"what": "unit", "wanted": {"enabled": True}, "actual": {"enabled": "disabled"}},
    ),
    "a command that makes a file": (
        {
            "msg": "Command would have run if not in check mode",
            "invocation": {"module_args": {"_raw_params": "make", "creates": "/var/lib/token"}},
        },
        {"what": "file", "name": "/var/lib/token", "actual": "missing"},
    ),
    "a user": (
        {"invocation": {"module_args": {"name": "ray", "home": "/home/ray", "shell": "/bin/sh", "state": "present"}}},
        {"what": "user", "name": "ray", "wanted": "present"},
    ),
    "a debug in plain words": (
        {"msg": "w1 would be started."},
        {"what": "step", "name": "Do it", "wanted": "w1 would be started."},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILTIN)
def test_ansibles_own_modules_are_read(name: str) -> None:
    result, expected = BUILTIN[name]
    change = only({"changed": True, **result})
    assert {key: getattr(change, key) for key in expected} == expected


def test_of_a_loop_only_what_changes_counts() -> None:
    def item(path: str, changed: bool) -> Json:
        diff = {"before": {"path": path, "state": "absent"}, "after": {"path": path, "state": "directory"}}
        return {"changed": changed, "diff": diff}

    told = changes_of(event({"changed": True, "results": [item("/a", True), item("/b", False), item("/c", True)]}))
    assert [change.name for change in told] == ["/a", "/c"]


def test_what_is_left_for_want_of_consent_is_listed_and_counts_as_nothing() -> None:
    stale = {"what": "node", "name": "Ray", "wanted": "generation b", "actual": "generation a", "disrupts": ["node"]}
    left = event({"msg": {**stale, "left": True}}, kind="ok", role="ray_node")
    plan = planning.plan([spec(), node("running"), left, serve()])
    assert [(change.what, change.left) for change in plan.changes] == [("node", True)]
    assert plan.empty
    assert plan.hosts["w1"].changes == 0
    agreed = planning.plan([spec(allow_disruption=True), node("running"), event({"msg": stale}, role="ray_node")])
    assert [(change.what, change.left) for change in agreed.changes] == [("node", False)]
    assert not agreed.empty


def test_what_is_as_wanted_is_no_change() -> None:
    events = [event({"changed": False}, kind="ok"), event({"skipped": True}, kind="skipped"), node("running"), serve()]
    plan = planning.plan([spec(), *events])
    assert (plan.changes, plan.disruptions, plan.empty, plan.whole) == ((), (), True, True)


def test_a_task_that_hides_its_output_is_not_lost() -> None:
    """Ansible says `ok` of it, and counts it."""
    silent = event({"censored": "the output has been hidden"}, kind="ok", role="ray_node", task="Give the token")
    told = planning.plan([spec(), event({"changed": True, "msg": "x"}), silent], {"w1": 2, "head": 0})
    assert [(change.what, change.name) for change in told.changes[1:]] == [("secret", "1 in 'Give the token'")]
    assert planning.plan([spec(), silent], {"w1": 0}).changes == ()


# ------------------------------------------------------------------ what would be disrupted

RESTART = {"what": "environment", "name": "/opt/kit/ray-env", "wanted": "2", "actual": "1", "disrupts": ["node"]}


@pytest.mark.parametrize("consent", [False, True])
@pytest.mark.parametrize("state", ["running", "degraded"])
def test_a_restart_names_the_replicas_that_go_with_it(state: str, consent: bool) -> None:
    change = event({"changed": True, "changes": [RESTART]}, role="ray_env")
    (found,) = planning.plan([spec(allow_disruption=consent), change, node(state), serve()]).disruptions
    assert (found.host, found.what, found.replicas) == ("w1", "node", {"tiny": 2})
    assert (found.needs_consent, found.consent, found.would_happen) == (True, consent, consent)
    assert found.because == ("environment /opt/kit/ray-env",)


@pytest.mark.parametrize("state", ["stopped", ""])
def test_where_nothing_runs_nothing_is_disrupted(state: str) -> None:
    change = event({"changed": True, "changes": [RESTART]}, role="ray_env")
    assert planning.plan([spec(), change, node(state), serve()]).disruptions == ()


def test_with_the_head_everything_goes() -> None:
    change = event({"changed": True, "changes": [RESTART]}, host="head")
    (found,) = planning.plan([spec(), change, node("running", "head"), serve()]).disruptions
    assert found.replicas == {"tiny": 3}


def test_where_nobody_could_be_asked_that_is_said() -> None:
    change = event({"changed": True, "changes": [RESTART]})
    plan = planning.plan([spec(), change])
    assert [found.replicas for found in plan.disruptions] == [None]
    assert plan.hosts["w1"].node == "unknown"


def test_several_reasons_are_one_restart() -> None:
    other = {"what": "node", "name": "Ray", "wanted": "b", "actual": "a", "disrupts": ["node"]}
    events = [event({"changed": True, "changes": [RESTART]}), node("running"), event({"msg": other}), serve()]
    (found,) = planning.plan([spec(), *events]).disruptions
    assert found.because == ("environment /opt/kit/ray-env", "node Ray")


def test_an_app_that_is_declared_anew_is_its_own_consent() -> None:
    change = {"what": "app", "name": "tiny", "wanted": {"args.x": 2}, "actual": {"args.x": 1}, "disrupts": ["app"]}
    found = planning.plan([spec(), serve(changes=[change])]).disruptions
    assert [(item.host, item.what, item.replicas) for item in found] == [
        ("w1", "app", {"tiny": 2}),
        ("w2", "app", {"tiny": 1}),
    ]
    assert all(item.would_happen and not item.needs_consent for item in found)


# ------------------------------------------------------------------ hosts that fail


def test_one_host_that_cannot_be_reached_hides_no_other() -> None:
    events = [
        event({"msg": "no route"}, host="w2", kind="unreachable", message="no route"),
        event({"changed": True, "changes": [RESTART]}),
        event({}, host="", kind="play", play=planning.LAST_PLAY),
    ]
    plan = planning.plan([spec(), *events])
    assert {host: item.state for host, item in plan.hosts.items()} == {"w1": "planned", "w2": "unreachable"}
    assert [(item.host, item.message) for item in plan.unreachable] == [("w2", "no route")]
    assert (plan.whole, plan.empty, len(plan.changes)) == (False, False, 1)


def test_a_run_that_ended_early_is_not_taken_for_a_converged_cluster() -> None:
    """All hosts of a play failed: Ansible starts no further play."""
    failed = event({}, host="head", kind="failed", role="ray_node", task="Start", message="no room")
    plan = planning.plan([spec(), event({}, kind="ok"), failed])
    assert plan.hosts["w1"].state == "incomplete"
    assert plan.hosts["head"].state == "failed"
    assert (plan.complete, plan.empty) == (False, False)
    assert [(item.role, item.task, item.message) for item in plan.failed] == [("ray_node", "Start", "no room")]


def test_an_ignored_failure_is_none() -> None:
    assert planning.plan([spec(), event({}, kind="failed", ignored=True)]).whole


# ------------------------------------------------------------------ secrets

SECRETS = {
    "environment": {"SITE_MARK": "***", "NCCL_DEBUG": "INFO"},
    "proxy": {"http": "http://kit:***@proxy.example:3128"},
}


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('  "SITE_MARK": "hush",', f'  "SITE_MARK": {HIDDEN},'),
        ("Environment=SITE_MARK=hush", f"Environment=SITE_MARK={HIDDEN}"),
        ("ExecStart=docker run --name=x -e SITE_MARK=hush y", f"ExecStart=docker run --name=x -e SITE_MARK={HIDDEN}"),
        ("export HF_TOKEN='hush'", f"export HF_TOKEN={HIDDEN}"),
        ("s3_secret_key: hush", f"s3_secret_key: {HIDDEN}"),
        ("http_proxy=http://kit:hush@proxy.example:3128", f"http_proxy={HIDDEN}"),
        ("mirror = https://me:hush@mirror.example/simple", f"mirror = https://me:{HIDDEN}@mirror.example/simple"),
        ('  "NCCL_DEBUG": "INFO",', '  "NCCL_DEBUG": "INFO",'),
        ('  "token_file": "/var/lib/clusterkit/node/token",', '  "token_file": "/var/lib/clusterkit/node/token",'),
        ('  "max_num_batched_tokens": 2048,', '  "max_num_batched_tokens": 2048,'),
        ("tokenizers==0.22.1", "tokenizers==0.22.1"),
    ],
)
def test_secrets_are_hidden_in_diffs(line: str, shown: str) -> None:
    told = {"what": "file", "name": "/etc/x", "before": "", "after": line + "\n"}
    (change,) = changes_of(event({"changed": True, "changes": [told]}), **SECRETS)
    assert change.diff.splitlines()[-1] == f"+{shown}"


def test_secrets_are_hidden_in_values_and_messages() -> None:
    told = {
        "what": "app",
        "name": "tiny",
        "wanted": {"runtime_env.env_vars.HF_TOKEN": "hush", "args": {"api_key": "hush", "model": "tiny"}},
        "actual": {"runtime_env.env_vars.SITE_MARK": "hush"},
    }
    failed = event({}, kind="failed", message="no answer from http://kit:hush@proxy.example:3128")
    plan = planning.plan([spec(**SECRETS), event({"changed": True, "changes": [told]}), failed])
    assert "hush" not in json.dumps(plan.as_dict())
    assert plan.changes[0].wanted["args"]["model"] == "tiny"


# ------------------------------------------------------------------ its shape, and the names that it reads


def test_the_shape_is_as_it_is_promised() -> None:
    change = event({"changed": True, "changes": [RESTART]}, role="ray_env")
    shape = planning.plan([spec(), change, node("running"), serve()]).as_dict()
    assert set(shape) == {"changes", "disruptions", "failed", "unreachable", "hosts", "consent", "complete"}
    keys = {"host", "role", "task", "what", "name", "wanted", "actual", "diff", "disrupts", "left", "note"}
    assert set(shape["changes"][0]) == keys
    keys = {"host", "what", "because", "replicas", "needs_consent", "consent", "would_happen"}
    assert set(shape["disruptions"][0]) == keys
    assert shape["hosts"]["w1"] == {"state": "planned", "changes": 1, "node": "running", "driver": None, "gpus": ()}
    assert json.loads(json.dumps(shape)) == json.loads(json.dumps(shape))
    assert all(f"    {key}" in str(planning.__doc__) for key in shape)


def test_a_gpu_host_shows_kernel_driver_and_firmware_as_they_are() -> None:
    driver = {"state": "reboot", "summary": "loaded is 6.14, wanted 6.16", "running_kernel": "6.1.0-1", "other": 1}
    gpu = {"index": 0, "model": "MI300X", "firmware": {"vbios": "022.040"}}
    seen = [
        event(driver, kind="ok", role="rocm_host", task=planning.DRIVER_TASK),
        event({"stdout": json.dumps({"gpus": [gpu]})}, kind="ok", role="gpu_health", task=planning.GPUS_TASK),
        event({"stdout": "garbage"}, host="w2", kind="ok", role="gpu_health", task=planning.GPUS_TASK),
    ]
    hosts = planning.plan([spec(), *seen]).hosts
    assert hosts["w1"].driver == {key: driver[key] for key in ("state", "summary", "running_kernel")}
    assert hosts["w1"].gpus == (gpu,)
    assert (hosts["w2"].driver, hosts["w2"].gpus) == (None, ())


@pytest.mark.parametrize(("state", "needed"), [("running", True), ("stopped", False)])
def test_a_reboot_needs_consent_where_a_node_runs(state: str, needed: bool) -> None:
    change = {"what": "driver", "name": "amdgpu", "wanted": "6.16", "actual": "6.14", "disrupts": ["host"]}
    (told,) = planning.plan([spec(), event({"changes": [change]}), node(state)]).disruptions
    assert (told.what, told.needs_consent, told.would_happen) == ("host", needed, not needed)


@pytest.mark.parametrize(("loaded", "needed"), [({"version": "6.14"}, True), (None, False)])
def test_a_reboot_needs_consent_where_nobody_could_ask_and_a_driver_is_loaded(
    loaded: Json | None, needed: bool
) -> None:
    change = {"what": "driver", "name": "amdgpu", "wanted": "6.16", "actual": "6.14", "disrupts": ["host"]}
    seen = event({"changes": [change], "loaded": loaded}, role="rocm_host", task=planning.DRIVER_TASK)
    (told,) = planning.plan([spec(), seen]).disruptions
    assert (told.needs_consent, told.would_happen) == (needed, not needed)


def test_the_tasks_that_it_knows_by_name_are_there() -> None:
    text = "".join(path.read_text() for path in [*ROOT.glob("playbooks/*.yml"), *ROOT.glob("roles/*/tasks/*.yml")])
    names = (planning.SPEC_TASK, planning.NODE_TASK, planning.SERVE_TASK, planning.DRIVER_TASK, planning.GPUS_TASK)
    for name in names:
        assert re.findall(rf"- name: {name}$", text, re.M), name
    last = yaml.safe_load((ROOT / "site.yml").read_text())[-1]["ansible.builtin.import_playbook"]
    assert yaml.safe_load((ROOT / last).read_text())[-1]["name"] == planning.LAST_PLAY


# ------------------------------------------------------------------ one real run, without a cluster


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """An inventory for this machine, of which nothing is there yet. Ray's sockets need a short path."""
    short = Path(tempfile.mkdtemp(prefix="ck-"))
    here = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "clusterkit_node_ip": "127.0.0.1",
    }
    hosts: Json = {
        "all": {
            "hosts": {"box": here, "gone": {"ansible_host": "127.0.0.1", "ansible_port": 1}},
            "children": {
                "ray_head": {"hosts": {"box": None}},
                "ray_workers": {"children": {"cpus": {"hosts": {"box": None, "gone": None}}}},
            },
        }
    }
    hosts["all"]["hosts"]["gone"]["clusterkit_node_ip"] = "127.0.0.2"
    paths = {name: str(short / name) for name in ("root", "config", "state", "log", "models")}
    facts = {
        "clusterkit_name": "box",
        "clusterkit_stack": "cpu",
        "clusterkit_paths": {**paths, "ray_temp": str(short / "ray")},
        "clusterkit_environment": {"HF_TOKEN": "hush-hush", "NCCL_DEBUG": "INFO"},
    }
    for name, content in {
        "hosts.yml": hosts,
        "group_vars/all.yml": facts,
        "group_vars/cpus.yml": {"clusterkit_accelerator": "cpu"},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(content))
    yield short
    shutil.rmtree(short)


def clusterkit(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "log"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "clusterkit", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def tree(folder: Path) -> str:
    """Everything below a folder, with its content, mode and time of change."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        digest.update(f"{path} {state.st_mode} {state.st_uid} {state.st_mtime_ns}\n".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def test_a_bare_host_and_one_that_is_gone(tmp_path: Path, site: Path) -> None:
    """Later roles do not stumble over what earlier ones would only have made; nothing is touched."""
    words = ("plan", "-i", str(tmp_path), "--tags", "model_store,host_agent,ray_node")
    (site / "config").mkdir()
    (site / "config/ray-node.json").write_text('{\n    "HF_TOKEN": "another-hush",\n    "by": "hand"\n}\n')
    before = tree(site)
    done = clusterkit(tmp_path, *words, "--json")
    assert tree(site) == before
    assert done.returncode == 1, done.stderr
    told: Json = json.loads(done.stdout)
    assert told["failed"] == []
    assert [item["host"] for item in told["unreachable"]] == ["gone"]
    assert told["hosts"]["box"]["state"] == "planned"
    assert told["hosts"]["box"]["node"] == "not installed"
    found = {(change["role"], change["what"], change["name"]) for change in told["changes"]}
    for role, what, name in (
        ("host_agent", "file", f"{site}/root/bin/host-agent"),
        ("ray_node", "file", f"{site}/root/bin/ray-node"),
        ("ray_node", "file", f"{site}/config/ray-node.json"),
    ):
        assert (role, what, name) in found
    diff = next(change["diff"] for change in told["changes"] if change["name"] == f"{site}/config/ray-node.json")
    assert '-    "by": "hand"' in diff
    assert "hush" not in done.stdout
    assert told["disruptions"] == []


def test_a_request_that_is_wrong_is_refused(tmp_path: Path, site: Path) -> None:
    (tmp_path / "group_vars/all.yml").write_text("clusterkit_name: box\nclusterkit_stack: none-such\n")
    done = clusterkit(tmp_path, "plan", "-i", str(tmp_path))
    assert done.returncode == 2
    assert "none-such" in done.stderr
    assert done.stdout == ""


# ------------------------------------------------------------------ what people read


def read(plan: Plan, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    cli._show(plan)
    said = capsys.readouterr()
    return said.out, said.err


def test_a_converged_cluster_would_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = read(planning.plan([spec(), node("running"), serve()]), capsys)
    assert (out, err) == ("nothing would change\n", "")


def test_people_read_wanted_against_actual(capsys: pytest.CaptureFixture[str]) -> None:
    setting = {"what": "kernel setting", "name": "vm.swappiness", "wanted": "1", "actual": "60"}
    file = {"what": "file", "name": "/etc/x", "before": "".join(f"{n}\n" for n in range(99)), "after": "other\n"}
    folder = {"what": "folder", "name": "/srv", "wanted": {"mode": "0755"}, "actual": {"mode": "0700"}}
    events = [
        event({"changed": True, "changes": [setting, file, folder]}),
        event({"changed": True, "changes": [RESTART]}, role="ray_env"),
        node("running"),
        serve(),
    ]
    out, err = read(planning.plan([spec(), *events]), capsys)
    assert out.startswith("w1\n  baseline\n    kernel setting vm.swappiness: 60, wanted 1\n")
    assert "file /etc/x: other content, wanted as rendered" in out
    assert "      -0\n" in out
    assert "more lines; --json has them" in out
    assert "folder /srv: mode is 0700, wanted 0755" in out
    assert "w1: Ray is restarted (tiny: 2 replica(s)); would be left: clusterkit_allow_disruption is not given" in out
    assert "4 change(s) on 1 host(s)" in err


def test_people_read_what_could_not_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        event({}, kind="ok"),
        event({}, host="w2", kind="unreachable", message="no route"),
        event({}, host="head", kind="failed", role="preflight", task="Compare", message="[too] small"),
    ]
    out, err = read(planning.plan([spec(), *events]), capsys)
    assert "nothing would change" not in out
    assert "failed: head, preflight: Compare\n    [too] small" in err
    assert "unreachable: w2" in err
    assert "not planned to the end: w1" in err
