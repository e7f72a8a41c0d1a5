"""`clusterkit init`: what it writes validates, what it cannot write it refuses, and it overwrites nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
import yaml

from clusterkit import scaffold
from clusterkit.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "clusterkit"]
HOSTS = ["--head", "head1=192.0.2.10", "--worker", "gpu1=192.0.2.11", "--worker", "gpu2=192.0.2.12"]
MI300X = [*HOSTS, "--accelerator", "rocm", "--gpu-model", "AMD-Instinct-MI300X-OAM", "--gpus", "8"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sites" / "demo"


def clusterkit(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_STATE_HOME": str(folder.parents[1] / "state")}
    done = subprocess.run(
        [*COMMAND, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def init(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return clusterkit("init", "demo", "--directory", str(folder), *words, folder=folder)


def validate(folder: Path) -> dict[str, Any]:
    done = clusterkit("validate", "-i", str(folder), "--json", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["cluster"]
    return found


def read(folder: Path, name: str) -> Any:
    return yaml.safe_load((folder / name).read_text())


def test_servers_with_gpus(folder: Path) -> None:
    done = init(folder, *MI300X, "--user", "ops", "--model-id", "llama-3.1-8b", "--model-source", "/srv/models/Llama")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    assert "valid: stack rocm72, pool mi300x with 2 host(s)" in done.stderr, "rocm70 comes first, without wheels"
    example = read(ROOT / "inventory/mi300x", "hosts.yml")
    assert read(folder, "hosts.yml") == example
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.yml")} == {
        str(path.relative_to(ROOT / "inventory/mi300x")) for path in (ROOT / "inventory/mi300x").rglob("*.yml")
    }
    assert read(folder, "group_vars/all/main.yml")["ray_env_python"] == "python3.12"
    for file in folder.rglob("*.yml"):
        assert file.read_text().startswith("# "), file
    cluster = validate(folder)
    assert (cluster["name"], cluster["head"]["host"]) == ("demo", "head1")
    (app,) = cluster["serve_config"]["applications"]
    assert app["name"] == "llama-3-1-8b"


def test_one_box_with_a_model_that_is_made(folder: Path) -> None:
    done = init(folder, "--head", "192.0.2.10", "--one-box", "--accelerator", "cpu", "--runtime", "container", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["inventory"], answer["stack"], answer["valid"]) == (str(folder), "cpu", True)
    assert [Path(file).exists() for file in answer["files"]] == [True] * 4
    cluster = validate(folder)
    assert cluster["hosts"]["192.0.2.10"]["worker"]
    assert cluster["runtime"] == "container"
    assert [app["model_id"] for app in cluster["apps"]] == ["tiny-llama"]


def test_without_a_model_the_example_waits_in_a_comment_and_holds(folder: Path) -> None:
    done = init(folder, *HOSTS, "--accelerator", "cuda", "--gpu-model", "H100", "--gpus", "8")
    assert done.returncode == 0, done.stderr
    assert validate(folder)["apps"] == []
    apps = folder / "group_vars/all/apps.yml"
    _, example = apps.read_text().split("clusterkit_apps: []\n")
    apps.write_text("\n".join(line.removeprefix("# ") for line in example.splitlines()))
    assert [app["name"] for app in validate(folder)["apps"]] == ["my-model"]


def test_what_does_not_validate_stays_and_says_why(folder: Path) -> None:
    wish = [*HOSTS, "--accelerator", "cuda", "--gpu-model", "H100", "--gpus", "8", "--runtime", "container"]
    done = init(folder, *wish)
    assert done.returncode == 2
    assert f"{folder}/group_vars/all/main.yml:8 clusterkit_image" in done.stderr
    assert "mend it there" in done.stderr
    assert (folder / "hosts.yml").exists()
    other = folder.with_name("other")
    listed = init(other, *wish, "--json")
    assert listed.returncode == 2
    assert [finding["subject"] for finding in json.loads(listed.stdout)["findings"]] == ["clusterkit_image_base"]
    named = init(folder.with_name("named"), *wish, "--image", "registry.example/vllm:1")
    assert named.returncode == 0, named.stderr


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "dangling link"])
def test_what_is_there_is_never_overwritten(folder: Path, what: str) -> None:
    folder.parent.mkdir()
    if what == "file":
        folder.write_text("mine")
    elif what == "dangling link":
        folder.symlink_to("nowhere")
    else:
        folder.mkdir()
    if what == "folder":
        (folder / "hosts.yml").write_text("mine")
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in folder.parent.rglob("*"))
    done = init(folder, *MI300X)
    assert done.returncode == 2
    assert f"{folder} is there already" in done.stderr
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], ["missing: --head, --worker (or --one-box), --accelerator"]),
        ([*HOSTS, "--accelerator", "rocm"], ["missing: --gpu-model, --gpus"]),
        (["--head", "head1"], ["'head1' has no IP address", "head1=192.0.2.10"]),
        (["--head", "head1=10.0.0"], ["'10.0.0' is no IP address"]),
        (["--head", "-h=192.0.2.10"], ["'-h' is no host name"]),
        (["--head", "all=192.0.2.10"], ["'all' has a meaning of its own"]),
        ([*HOSTS, "--one-box"], ["--one-box"]),
        ([*HOSTS, "--worker", "gpu1=192.0.2.13", "--accelerator", "cpu"], ["--worker gpu1: is named twice"]),
        ([*HOSTS, "--worker", "head1=192.0.2.10", "--accelerator", "cpu"], ["head1: is named twice", "--one-box"]),
        ([*HOSTS, "--worker", "gpu3=192.0.2.11", "--accelerator", "cpu"], ["192.0.2.11 is the address of gpu1 too"]),
        ([*HOSTS, "--accelerator", "cpu", "--gpus", "8"], ["--gpus: a cpu cluster has no GPUs"]),
        ([*MI300X, "--gpu-model", "MI300X"], ["--gpu-model", "did you mean 'AMD-Instinct-MI300X-OAM'?"]),
        ([*MI300X, "--stack", "cuda"], ["--stack: cuda is made for cuda; for rocm: rocm70, rocm72"]),
        ([*MI300X, "--stack", "rocm71"], ["--stack: no row 'rocm71'"]),
        ([*MI300X, "--model-id", "a b", "--model-source", "/srv/x"], ["--model-id"]),
        ([*MI300X, "--model-id", "a"], ["--model-id: needs --model-source too"]),
        ([*MI300X, "--model-source", "/srv/x"], ["--model-source: needs --model-id too"]),
        ([*MI300X, "--model-id", "a", "--model-source", "srv/x"], ["--model-source", "absolute path"]),
        ([*MI300X, "--user", "o ps"], ["--user"]),
        ([*MI300X, "--image", "x:1"], ["--image: is for --runtime container"]),
        (
            [*HOSTS, "--worker", "gpu1=192.0.2.10", "--accelerator", "cpu", "--gpus", "1", "--stack", "x"],
            ["3 things are wrong", "gpu1: is named twice", "--gpus", "--stack"],
        ),
    ],
)
def test_a_wrong_request_says_what_is_wrong_and_writes_nothing(folder: Path, words: list[str], says: list[str]) -> None:
    done = init(folder, *words)
    assert done.returncode == 2, done.stderr
    assert [text for text in says if text not in done.stderr] == [], done.stderr
    assert not folder.parent.exists()


@pytest.mark.parametrize("name", ["Demo", "demo_1", "-demo", "x" * 33, "a/b", ".."])
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    done = clusterkit("init", *MI300X, "--", name, folder=tmp_path / "sites/demo")
    assert done.returncode == 2
    assert "is no name for a cluster" in done.stderr
    assert not (ROOT / "inventory" / name / "group_vars").exists()


def test_a_run_that_is_cut_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, worker = scaffold.member("h=192.0.2.1"), scaffold.member("w=192.0.2.2")
    request = scaffold.Request("demo", folder, head, (worker,), "cpu")
    (row,) = scaffold.rows(request)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", cut)
        with pytest.raises(KeyboardInterrupt):
            scaffold.write(request, row)
    assert list(folder.parent.iterdir()) == []
    scaffold.write(request, row)
    assert (folder / "hosts.yml").exists()
    with pytest.raises(UsageError, match="is there already"):
        scaffold.write(request, row)
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]


@pytest.mark.parametrize(
    ("accelerator", "gpu_model", "hosts", "pool"),
    [
        ("rocm", "AMD-Instinct-MI300X-OAM", "w", "mi300x"),
        ("cuda", "H100", "w", "h100"),
        ("cuda", "A100-80G", "w", "a100"),
        ("cuda", "H100", "h100", "pool_h100"),
        ("cpu", None, "w", "cpus"),
    ],
)
def test_a_pool_has_a_name_of_its_own(tmp_path: Path, accelerator: Any, gpu_model: Any, hosts: str, pool: str) -> None:
    head, worker = scaffold.member("head=192.0.2.1"), scaffold.member(f"{hosts}=192.0.2.2")
    assert scaffold.Request("demo", tmp_path, head, (worker,), accelerator, gpu_model=gpu_model).pool == pool


def test_on_a_terminal_it_asks_for_what_is_missing(folder: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(folder.parents[1] / "state"), "TERM": "dumb", "COLUMNS": "200"}
    talk = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], "init", "demo", "--directory", str(folder), "--gpus", "4"],
        cwd=str(ROOT),
        env=environment,
        encoding="utf-8",
        timeout=60,
    )
    for question, answer in (
        ("The head", "head1"),
        ("has no IP address", "head1=192.0.2.10"),
        ("The workers", "gpu1=192.0.2.11  gpu2=192.0.2.12"),
        ("Accelerator", "amd"),
        ("one of rocm, cuda, cpu", "rocm"),
        ("GPU model", ""),
        ("Who logs in", "ops"),
        ("Model", "llama"),
        ("Folder", "/srv/models/llama"),
    ):
        talk.expect_exact(question)
        talk.expect(": *$")
        talk.sendline(answer)
    talk.expect_exact("valid: stack rocm72, pool mi300x with 2 host(s)")
    talk.expect(pexpect.EOF)
    talk.close()
    assert talk.exitstatus == 0
    assert read(folder, "hosts.yml") == read(ROOT / "inventory/mi300x", "hosts.yml")
    assert read(folder, "group_vars/mi300x.yml")["clusterkit_gpus"] == 4
