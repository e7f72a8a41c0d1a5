"""Every mistake that validation knows, through both ways in: `clusterkit validate` and `ansible-playbook site.yml`.

The inventories are under tests/inventories. Each is asked once a way; the tests look at the answers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from clusterkit.spec.findings import Finding

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
BROKEN = "tests/inventories/broken"
EXAMPLES = ("local", "mi300x", "mi300x_single", "h100")
EVERYONE = ("h1", "w1", "w2")

CLI = (sys.executable, "-m", "clusterkit")
VALIDATE = (*CLI, "validate", "--json")
PLAYBOOK = (str(BIN / "ansible-playbook"), str(ROOT / "site.yml"))
SPEC_TASK = "Read the cluster from the inventory"


@dataclass(frozen=True)
class Answer:
    """What one way in said."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def data(self) -> Any:
        return json.loads(self.out)

    @property
    def findings(self) -> list[Finding]:
        """What `clusterkit validate --json` lists."""
        assert self.code == 2, self.text
        data = json.loads(self.out)
        assert data["valid"] is False
        return [Finding.from_dict(item) for item in data["findings"]]

    @property
    def tasks(self) -> set[str]:
        return set(re.findall(r"^TASK \[(.+?)\]", self.out, re.MULTILINE))

    @property
    def failure(self) -> Any:
        """What ansible-playbook's one failed task returned."""
        (found,) = re.findall(r"^fatal: \[.+?\]: FAILED! => (\{.*\})$", self.out, re.MULTILINE)
        return json.loads(found)


@dataclass(frozen=True)
class Ways:
    cli: Answer
    playbook: Answer

    @property
    def findings(self) -> list[Finding]:
        """The findings, which both ways must list alike; nothing but the inventory was looked at."""
        found = self.cli.findings
        assert self.playbook.code != 0
        assert self.playbook.tasks == {SPEC_TASK}
        assert self.playbook.failure["findings"] == [finding.as_dict() for finding in found]
        assert self.playbook.failure["msg"].splitlines()[1:] == [f"  {finding}" for finding in found]
        return found


Ask = Callable[..., Ways]
Run = Callable[..., Answer]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's with nothing in it, so that neither settings nor old runs of this machine play a part."""
    home = str(tmp_path_factory.mktemp("home"))
    return {"HOME": home, "LANG": "C.UTF-8", "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> Run:
    def start(*command: str, cwd: Path = ROOT) -> Answer:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stdout + done.stderr
        return Answer(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture(scope="session")
def ask(environment: dict[str, str]) -> Ask:
    @cache
    def both(inventory: str, *arguments: str) -> Ways:
        commands = (VALIDATE, PLAYBOOK)
        started = [
            subprocess.Popen(
                [*command, "-i", inventory, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in commands
        ]
        answers = []
        for process in started:
            out, err = process.communicate(timeout=120)
            assert "Traceback" not in out + err
            answers.append(Answer(process.returncode, out, err))
        return Ways(*answers)

    return both


def line_of(file: str, *texts: str) -> int:
    """The line that holds the last text, after lines that hold the ones before it."""
    lines = (ROOT / file).read_text().splitlines()
    number = 0
    for text in texts:
        number = next(n for n, line in enumerate(lines[number:], number + 1) if text in line)
    return number


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# ------------------------------------------------------------------ many mistakes at once


@dataclass(frozen=True)
class Mistake:
    """`line` leads to the line: texts that stand there, the ones before it first."""

    file: str
    line: tuple[str, ...]
    subject: str
    problem: str
    fix: str
    hosts: tuple[str, ...] = EVERYONE


MAIN, APPS = "group_vars/all/main.yml", "group_vars/all/apps.yml"

MISTAKES = {
    "misspelt variable": Mistake(
        MAIN,
        ("clusterkit_allow_disruptions",),
        "clusterkit_allow_disruptions",
        "no such variable",
        "did you mean 'clusterkit_allow_disruption'?",
    ),
    "misspelt role variable": Mistake(
        MAIN, ("ray_env_sorce",), "ray_env_sorce", "no such role variable", "did you mean 'ray_env_source'?"
    ),
    "role variable with an unknown value": Mistake(
        MAIN, ("ray_env_source",), "ray_env_source", "must be one of index, wheelhouse", "see roles/ray_env/README.md"
    ),
    "role variable of a wrong type": Mistake(
        MAIN,
        ("preflight_memory_gib",),
        "preflight_memory_gib",
        "must be of type float",
        "see roles/preflight/README.md",
    ),
    "GiB with a unit": Mistake(
        MAIN,
        ("clusterkit_object_store_gib",),
        "clusterkit_object_store_gib",
        "must be a plain number of GiB, without a unit",
        "write the number alone, such as 30",
    ),
    "seconds with a unit": Mistake(
        MAIN,
        ("ready_timeout_s",),
        "clusterkit_serve.ready_timeout_s",
        "must be a plain number of seconds, without a unit",
        "write the number alone, such as 30",
    ),
    "number in quotes": Mistake(
        MAIN,
        ('serve: "8000"',),
        "clusterkit_ports.serve",
        "must be a number",
        "write the number alone, without quotes or a unit",
    ),
    "misspelt key": Mistake(
        MAIN, ("dashbord",), "clusterkit_ports.dashbord", "no such key", "did you mean 'dashboard'?"
    ),
    "unknown value": Mistake(
        MAIN,
        ("clusterkit_runtime",),
        "clusterkit_runtime",
        "is not one of the known values",
        "one of 'venv' or 'container'",
    ),
    "undefined value": Mistake(
        MAIN,
        ("clusterkit_ca_bundle",),
        "clusterkit_ca_bundle",
        "has no value: 'site_ca_bundle' is undefined",
        "define what it refers to, or set it directly",
    ),
    "versions that do not go together": Mistake(
        MAIN,
        ("clusterkit_vllm_version",),
        "clusterkit_ray_version, clusterkit_vllm_version",
        "Ray 2.60.0 and vLLM 0.10.2 do not go together: Ray 2.60.0 asks for vLLM ==0.29.0, not 0.10.2",
        "use a pair that does: Ray 2.52.1 with vLLM 0.10.2, Ray 2.60.0 with vLLM 0.29.0, Ray 2.60.0 with vLLM 0.32.0",
    ),
    "pool larger than its hosts": Mistake(
        "group_vars/gpus.yml",
        ("max: 3",),
        "clusterkit_pool.max",
        "is 3, and the pool gpus has 2 hosts",
        "lower it to 2, or add hosts",
        ("w1", "w2"),
    ),
    "a pool's fact that one host has otherwise": Mistake(
        "host_vars/w2.yml",
        ("clusterkit_gpus",),
        "clusterkit_gpus",
        "differs between hosts, and is a fact of the pool",
        "set it once, in the pool's group_vars",
        ("w2",),
    ),
    "two hosts on one address": Mistake(
        "hosts.yml",
        ("w2:",),
        "clusterkit_node_ip",
        "192.0.2.11 is the address of w1 too",
        "give each host its own",
        ("w2",),
    ),
    "an app larger than a host": Mistake(
        APPS,
        ("name: wide", "parameters:"),
        "clusterkit_apps[0] wide",
        "one replica needs 16 GPUs on one host, and a host of gpus has 8",
        "lower tensor_parallel, or choose a pool with larger hosts",
    ),
    "an app larger than its pool": Mistake(
        APPS,
        ("name: many", "parameters:"),
        "clusterkit_apps[1] many",
        "at max_replicas it needs 28 GPUs, and the pool gpus has 16",
        "lower max_replicas to 4, or add hosts",
    ),
    "more than the memory of a GPU": Mistake(
        APPS,
        ("name: shared", "parameters:"),
        "clusterkit_apps[2] shared",
        "2 replicas share one GPU by gpu_fraction 0.5, and together ask for 1.2 of its memory",
        "lower gpu_memory_utilization to at most 0.5, or raise gpu_fraction",
    ),
    "two apps of one name": Mistake(
        APPS,
        ("name: shared", "name: shared"),
        "clusterkit_apps[3].name",
        "'shared' is the name of clusterkit_apps[2] too",
        "give each app its own name",
    ),
    "two apps on one route": Mistake(
        APPS,
        ("name: shared", "name: shared", "route_prefix: /many"),
        "clusterkit_apps[3].route_prefix",
        "'/many' is the route of 'many' too",
        "give each app its own, such as /shared",
    ),
    "target_num_ongoing_requests_per_replica": Mistake(
        APPS,
        ("target_num_ongoing_requests_per_replica",),
        "clusterkit_apps[4] target_num_ongoing_requests_per_replica",
        "Ray Serve has removed this option",
        "write target_ongoing_requests instead",
    ),
    "max_concurrent_queries": Mistake(
        APPS,
        ("max_concurrent_queries",),
        "clusterkit_apps[4] max_concurrent_queries",
        "Ray Serve has removed this option",
        "write max_ongoing_requests instead",
    ),
    "misspelt template": Mistake(
        APPS, ("lmm",), "clusterkit_apps[5].template", "no template 'lmm'", "did you mean 'llm'?"
    ),
    "misspelt parameter": Mistake(
        APPS,
        ("tensor_paralel",),
        "clusterkit_apps[6].parameters.tensor_paralel",
        "no such key",
        "did you mean 'tensor_parallel'?",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_each_mistake_has_its_place_and_its_fix(ask: Ask, mistake: Mistake) -> None:
    file = f"{BROKEN}/many/{mistake.file}"
    here = [item for item in ask(f"{BROKEN}/many").findings if item.subject == mistake.subject]
    assert [item.as_dict() for item in here] == [
        {
            "file": file,
            "line": line_of(file, *mistake.line),
            "hosts": list(mistake.hosts),
            "subject": mistake.subject,
            "problem": mistake.problem,
            "fix": mistake.fix,
        }
    ]


def test_all_mistakes_come_at_once_and_no_other(ask: Ask) -> None:
    """A value that another host knows and a site's own variable without a value are no mistakes."""
    assert {item.subject for item in ask(f"{BROKEN}/many").findings} == {item.subject for item in MISTAKES.values()}


# ------------------------------------------------------------------ one mistake an inventory

ONE_MISTAKE = {
    "no_head": ("hosts.yml", 1, (), "ray_head", "no head", "put exactly one host into the group ray_head"),
    "two_heads": (
        "hosts.yml",
        3,
        ("h1", "h2"),
        "ray_head",
        "2 heads: h1, h2",
        "leave one host in the group; Ray has one head",
    ),
    "two_pools": ("hosts.yml", 11, ("w1",), "w1", "is in 2 pools: one, two", "leave it in one"),
    "unparsable": (
        "hosts.yml",
        6,
        (),
        "inventory",
        "does not parse: expected ',' or '}', but got ':'",
        "mend the YAML there",
    ),
    "vault_value": (
        "group_vars/all.yml",
        6,
        ("h1", "w1"),
        "clusterkit_ca_bundle",
        "cannot be decrypted",
        "give the vault password with --ask-vault-pass or --vault-id, or encrypt the value anew",
    ),
}


@pytest.mark.parametrize("name", ONE_MISTAKE)
def test_an_inventory_with_one_mistake(ask: Ask, name: str) -> None:
    file, line, hosts, subject, problem, fix = ONE_MISTAKE[name]
    (found,) = ask(f"{BROKEN}/{name}").findings
    assert (found.place.file, found.place.line) == (f"{BROKEN}/{name}/{file}", line)
    assert (found.hosts, found.subject, found.problem, found.fix) == (hosts, subject, problem, fix)


def test_an_inventory_without_a_host(ask: Ask) -> None:
    (found,) = ask(f"{BROKEN}/empty").findings
    assert (str(found.place), found.problem) == (f"{BROKEN}/empty", "no host in it")
    assert "add hosts to ray_head and ray_workers" in found.fix


def test_an_inventory_that_is_not_there(ask: Ask) -> None:
    (found,) = ask("nowhere").findings
    assert (str(found.place), found.problem) == ("nowhere", "no such file or folder")
    assert found.fix == "name one with -i, such as inventory/local"


def test_variable_files_that_do_not_parse(ask: Ask) -> None:
    """Of a host and of a small group: both, each with its line."""
    folder = f"{BROKEN}/host_vars_file"
    assert [(str(item.place), item.problem) for item in ask(folder).findings] == [
        (f"{folder}/group_vars/cpus.yml:1", "is no YAML mapping"),
        (f"{folder}/host_vars/w1.yml:2", "does not parse: expected ',' or '}', but got ':'"),
    ]


# ------------------------------------------------------------------ what Ansible refuses before any play


def refused(ways: Ways) -> list[Finding]:
    """ansible-playbook stops by itself and runs no task; `clusterkit` says what it means, and where."""
    assert ways.playbook.code not in {0, 2}
    assert ways.playbook.tasks == set()
    return ways.cli.findings


def test_a_vault_file_without_a_password(ask: Ask) -> None:
    (found,) = refused(ask(f"{BROKEN}/vault_file"))
    assert str(found.place) == f"{BROKEN}/vault_file/group_vars/all/vault.yml:1"
    assert found.problem == "is encrypted, and the vault password is missing or wrong"
    assert found.fix == "give it with --ask-vault-pass or --vault-id"


def test_variables_of_all_that_do_not_parse(ask: Ask) -> None:
    folder = f"{BROKEN}/group_vars_file"
    (found,) = refused(ask(folder))
    file = f"{folder}/group_vars/all.yml"
    assert (found.place.file, found.place.line) == (file, line_of(file, "{{ site_stack }}"))
    assert found.problem.startswith("does not parse")


def test_a_variable_file_that_may_not_be_read(run: Run, tmp_path: Path) -> None:
    hosts = (ROOT / f"{BROKEN}/vault_file/hosts.yml").read_text()
    write(tmp_path, {"hosts.yml": hosts, "group_vars/all.yml": "clusterkit_name: closed\n"})
    file = tmp_path / "group_vars/all.yml"
    file.chmod(0)
    # Root reads everything, unless it gives that up.
    rights = () if os.geteuid() else ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    (found,) = run(*rights, *VALIDATE, "-i", str(tmp_path)).findings
    assert (found.place.file, found.problem) == (str(file), "cannot be read")


# ------------------------------------------------------------------ secrets


def encrypt(text: str, password: str) -> str:
    from ansible.parsing.vault import VaultLib, VaultSecret

    secrets = [("default", VaultSecret(password.encode()))]
    encrypted: bytes = VaultLib(secrets).encrypt(text, secret=secrets[0][1])
    return encrypted.decode()


def inline(text: str) -> str:
    return "!vault |\n" + "".join(f"    {line}\n" for line in encrypt(text, "open").splitlines())


@pytest.fixture(scope="module")
def vaulted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inventory whose secrets are all wrong, in each way that a value can be one."""
    return write(
        tmp_path_factory.mktemp("vaulted"),
        {
            "password": "open\n",
            "site/hosts.yml": (ROOT / f"{BROKEN}/vault_file/hosts.yml").read_text(),
            "site/group_vars/all/main.yml": 'clusterkit_name: vaulted\nclusterkit_stack: "{{ vault_stack }}"\n'
            f"clusterkit_object_store_gib: {inline('hush-number')}"
            f"clusterkit_ports:\n  serve: {inline('hush-port')}"
            'clusterkit_service_user: "{{ vault_user }} x"\n'
            f"preflight_memory_gib: {inline('hush-memory')}",
            "site/group_vars/all/vault.yml": encrypt("vault_stack: hush-stack\nvault_user: hush-user\n", "open"),
        },
    )


def test_no_secret_is_ever_shown(ask: Ask, vaulted: Path, environment: dict[str, str]) -> None:
    """Wrong values out of a vault: each is a finding, and none of them stands in it, nor in what a run leaves."""
    ways = ask(str(vaulted / "site"), "--vault-id", str(vaulted / "password"))
    assert {item.place.file for item in ways.findings} == {str(vaulted / "site/group_vars/all/main.yml")}
    assert {item.subject: item.problem for item in ways.findings} == {
        "clusterkit_stack": "no row '***'",
        "clusterkit_object_store_gib": "must be a plain number of GiB, without a unit",
        "clusterkit_ports.serve": "must be a number",
        "clusterkit_service_user": "has characters that are not allowed",
        "preflight_memory_gib": "must be of type float",
    }
    assert "hush" not in ways.cli.text + ways.playbook.text
    left = [path for path in Path(environment["HOME"]).rglob("*") if path.is_file()]
    assert left
    assert [path for path in left if b"hush" in path.read_bytes()] == []


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid inventory with a secret in it."""
    return write(
        tmp_path_factory.mktemp("sound"),
        {
            "password": "open\n",
            "site/hosts.yml": (ROOT / f"{BROKEN}/vault_file/hosts.yml").read_text(),
            "site/group_vars/all/main.yml": "clusterkit_name: sound\nclusterkit_stack: cpu\n"
            'clusterkit_environment:\n  TOKEN: "{{ vault_token }}"\n  GREETING: hello\n',
            "site/group_vars/all/vault.yml": encrypt("vault_token: hush-token\n", "open"),
            "play.yml": f"- import_playbook: {ROOT}/playbooks/validate.yml\n"
            "- hosts: w1\n  gather_facts: false\n  tasks:\n"
            '    - debug: {msg: "{{ clusterkit.environment.TOKEN | reverse }}"}\n',
        },
    )


def test_the_cluster_is_shown_without_its_secrets(run: Run, sound: Path) -> None:
    """Relative paths are the caller's, that of the password included."""
    said = run(*VALIDATE, "-i", "site", "--vault-id", "password", cwd=sound)
    assert said.code == 0, said.text
    assert said.data["cluster"]["environment"] == {"TOKEN": "***", "GREETING": "hello"}
    assert "hush" not in said.text


def test_a_limited_run_leaves_no_secret(run: Run, sound: Path, environment: dict[str, str]) -> None:
    """Of a host's roles the checks of their arguments run, which read the cluster; no task of theirs does."""
    given = ("-i", str(sound / "site"), "--vault-id", str(sound / "password"), "--limit", "w1", "--tags", "no_such_tag")
    said = run(*CLI, "deploy", *given, "--json", "-v")
    assert said.code == 0, said.text
    counts = said.data["hosts"]["w1"]
    assert counts["ok"] > 3
    assert (counts["changed"], counts["failed"], counts["unreachable"]) == (0, 0, 0)
    assert "hush" not in said.text
    left = [path for path in Path(environment["HOME"]).rglob("*") if path.is_file()]
    assert [path for path in left if b"hush" in path.read_bytes()] == []


def test_roles_get_the_secret_itself(run: Run, sound: Path) -> None:
    given = ("-i", str(sound / "site"), "--vault-id", str(sound / "password"))
    said = run(PLAYBOOK[0], str(sound / "play.yml"), *given)
    assert said.code == 0, said.text
    assert "nekot-hsuh" in said.out


# ------------------------------------------------------------------ however it is asked


def test_neither_limit_nor_tags_hide_a_mistake(run: Run, ask: Ask) -> None:
    said = run(*PLAYBOOK, "-i", f"{BROKEN}/many", "--limit", "w1", "--tags", "ray_node")
    assert said.code != 0
    assert said.tasks == {SPEC_TASK}
    assert said.failure["findings"] == ask(f"{BROKEN}/many").cli.data["findings"]


def test_deploy_refuses_in_words(run: Run) -> None:
    said = run(*CLI, "deploy", "-i", f"{BROKEN}/two_heads", "--limit", "w1")
    assert (said.code, said.out) == (2, "")
    for words in (f"{BROKEN}/two_heads/hosts.yml:3", "h1, h2", "leave one host in the group", "no host was touched"):
        assert words in said.err


def test_a_value_of_the_command_line_is_told_as_such(run: Run) -> None:
    (found,) = run(*VALIDATE, "-i", "inventory/h100", "-e", '{"clusterkit_name": "No Name"}').findings
    assert (found.place.file, found.subject) == ("-e", "clusterkit_name")


# ------------------------------------------------------------------ what is right passes


@pytest.fixture(scope="module")
def examples(run: Run) -> dict[str, Ways]:
    """Each example validated by the one way, and its tasks listed by the other."""
    with ThreadPoolExecutor(2) as pool:
        valid = pool.map(lambda name: run(*VALIDATE, "-i", f"inventory/{name}"), EXAMPLES)
        listed = pool.map(lambda name: run(*PLAYBOOK, "-i", f"inventory/{name}", "--list-tasks"), EXAMPLES)
        return {name: Ways(*both) for name, *both in zip(EXAMPLES, valid, listed, strict=True)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_valid(examples: dict[str, Ways], name: str) -> None:
    said = examples[name].cli
    assert said.code == 0, said.text
    assert said.data["valid"] is True
    assert said.data["findings"] == []
    assert said.data["cluster"]["serve_config"]["applications"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_site_lists_its_tasks_for_the_examples(examples: dict[str, Ways], name: str) -> None:
    said = examples[name].playbook
    assert said.code == 0, said.text
    # What is included as it goes is in no list of tasks.
    playbooks = "".join(path.read_text() for path in (ROOT / "playbooks").rglob("*.yml"))
    included = set(re.findall(r"include_role:\n\s+name: (\w+)", playbooks))
    for role in sorted(path.name for path in (ROOT / "roles").iterdir()):
        assert f"{role} : " in said.out or role in included


def test_an_ini_inventory_is_valid(run: Run) -> None:
    said = run(*VALIDATE, "-i", "tests/inventories/ini/hosts")
    assert said.code == 0, said.text
    hosts = said.data["cluster"]["hosts"]
    assert {name: (host["num_gpus"], host["fabric_interface"]) for name, host in hosts.items()} == {
        "h1": (0, None),
        "w1": (8, None),
        "w2": (8, "eth1"),
    }


def test_an_autoscaled_cluster_is_published_with_all_that_its_roles_need(run: Run, tmp_path: Path) -> None:
    text = (ROOT / "tests/inventories/ini/hosts").read_text()
    scaled = text.replace("clusterkit_gpus=8", "clusterkit_gpus=8\nclusterkit_cpus=96")
    write(tmp_path, {"hosts": scaled.replace('"mode": "fixed"', '"mode": "autoscaled"')})
    said = run(*VALIDATE, "-i", str(tmp_path / "hosts"))
    assert said.code == 0, said.text
    cluster = said.data["cluster"]
    assert [cluster["hosts"][name]["autoscaled"] for name in ("h1", "w1", "w2")] == [False, True, True]
    made = cluster["autoscaler"]
    assert set(made) == {"config", "environment", "fleet"}
    pools = set(made["config"]["available_node_types"]) - {"head"}
    assert pools == set(made["fleet"]["pools"]) == set(cluster["pools"])
    assert made["config"]["provider"]["fleet_socket"] == made["fleet"]["socket"]
    fixed = run(*VALIDATE, "-i", "tests/inventories/ini/hosts").data["cluster"]
    assert (fixed["autoscaler"], fixed["node_timeout_s"]) == (None, 0)


def test_mistakes_in_an_ini_inventory_have_their_line(run: Run, tmp_path: Path) -> None:
    text = (ROOT / "tests/inventories/ini/hosts").read_text()
    text = text.replace("clusterkit_gpus=8", "clusterkit_gpu=8").replace("eth1", "eth1 clusterkit_node_ip=w2")
    write(tmp_path, {"hosts": text})
    found = run(*VALIDATE, "-i", str(tmp_path / "hosts")).findings
    assert [(str(item.place), item.hosts, item.subject) for item in found] == [
        # Nothing sets it, so no line of the file is the place.
        (f"{tmp_path}/hosts", ("w1", "w2"), "clusterkit_gpus"),
        (f"{tmp_path}/hosts:7", ("w2",), "clusterkit_node_ip"),
        (f"{tmp_path}/hosts:11", ("w1", "w2"), "clusterkit_gpu"),
    ]
