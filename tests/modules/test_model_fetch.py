"""model_store with repositories of the Hub: the real huggingface_hub against a server of ours, faults included."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import ROOT, load_module
from tests.modules.conftest import run_module as call
from tests.modules.hub_server import Hub

Json = dict[str, Any]

FETCHER = ROOT / "roles/model_store/files/fetch_model.py"
# What vLLM 0.32 and vLLM 0.10.2 bring: the newest of today, and the last of the line before 1.0.
VERSIONS = ("2.4.0", "0.36.2")
TOKEN = "hf_a-token-of-these-tests"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": os.urandom(200_000),
    "model-00002-of-00002.safetensors": os.urandom(300_000),
    "model.safetensors.index.json": b"{}",
    # The same weights in other clothes.
    "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"pickle",
}
WANTED = {name for name in FILES if not name.endswith((".bin", ".pth"))}

store = load_module("model_store")
_spec = importlib.util.spec_from_file_location("fetch_model", FETCHER)
assert _spec is not None
assert _spec.loader is not None
program = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(program)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Interpreters that have the library as an engine's environment has it."""
    found = {}
    for version in VERSIONS:
        home = tmp_path_factory.mktemp("engine") / version
        uv = [sys.executable, "-m", "uv", "--quiet"]
        subprocess.run([*uv, "venv", "--python", sys.executable, str(home)], check=True)
        wanted = ["--python", str(home / "bin/python"), f"huggingface_hub=={version}"]
        subprocess.run([*uv, "pip", "install", *wanted], check=True)
        found[version] = str(home / "bin/python")
    return found


@pytest.fixture(params=VERSIONS)
def python(engines: dict[str, str], request: pytest.FixtureRequest) -> str:
    return engines[request.param]


@pytest.fixture
def newest(engines: dict[str, str]) -> str:
    return engines[VERSIONS[0]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    server.repository().push(FILES)
    yield server
    server.close()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def model(path: Path, revision: str = "main", **more: Any) -> Json:
    given: Json = {"id": "chat", "hub": "org/model", "revision": revision, "path": str(path), "weights": True}
    return {**given, "allow_patterns": [], "ignore_patterns": [], **more}


def put(python: str, hub: Hub, *wanted: Json, **more: Any) -> Json:
    given: Json = {"models": list(wanted), "python": python, "endpoint": hub.url, "fetcher": str(FETCHER)}
    return call(store, **{**given, "maker": "/nonexistent", **more})


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("clusterkit-manifest.json", None)
    return found


def start(python: str, hub: Hub, wanted: Json, token: str = "") -> subprocess.Popen[str]:
    """The program as the module starts it, left running."""
    request = {**wanted, "out": wanted["path"], "endpoint": hub.url, "token": token, "broken": [], "in_use": []}
    request |= {"environment": {}, "authorities": ""}
    child = subprocess.Popen([python, str(FETCHER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    child.stdin.write(json.dumps(request))
    child.stdin.close()
    child.stdin = None
    return child


# ------------------------------------------------------------------ what is wanted, and what is there


def have(**changed: Any) -> Json:
    files = {"config.json": {"size": 2, "sha256": "aa"}, "model.safetensors": {"size": 9, "sha256": "bb"}}
    manifest = {"hub": "org/model", "revision": "main", "weights": True, "files": files}
    state: Json = {"there": True, "manifest": manifest, "files": {name: dict(about) for name, about in files.items()}}
    return {**state, **changed}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (have(), []),
        (have(files={"config.json": {"size": 2}, "model.safetensors": {"size": 9}}), []),
        ({"there": False, "manifest": None, "files": {}}, [(None, "missing")]),
        ({"there": True, "manifest": None, "files": {}}, [(None, "no manifest")]),
        (have(files={"config.json": {"size": 2}}), [("model.safetensors", "model.safetensors is missing")]),
        (
            have(files={"config.json": {"size": 2}, "model.safetensors": {"size": 4}}),
            [("model.safetensors", "model.safetensors has 4 bytes, not 9")],
        ),
        (
            have(files={"config.json": {"size": 2}, "model.safetensors": {"size": 9, "sha256": "cc"}}),
            [("model.safetensors", "model.safetensors has changed")],
        ),
        (have(manifest={**have()["manifest"], "weights": False}), [(None, "its weights are not there yet")]),
        (have(manifest={**have()["manifest"], "revision": "v1"}), [(None, "holds org/model at v1")]),
    ],
)
def test_a_plan_names_what_differs(state: Json, says: list[Any]) -> None:
    assert store.plan(state, model(Path("/m"))) == says


def test_a_host_without_replicas_is_content_with_the_configuration() -> None:
    manifest = {**have()["manifest"], "weights": False}
    assert store.plan(have(manifest=manifest), model(Path("/m"), weights=False)) == []
    # And nothing is thrown away where it has more.
    assert store.plan(have(), model(Path("/m"), weights=False)) == []


@pytest.mark.parametrize(
    ("names", "asked", "gets"),
    [
        (list(FILES), {}, WANTED),
        (["config.json", "pytorch_model.bin"], {}, {"config.json", "pytorch_model.bin"}),
        (list(FILES), {"weights": False}, {name for name in WANTED if not name.endswith(".safetensors")}),
        (["a-Q4.gguf", "a-Q8.gguf", "config.json"], {"allow_patterns": ["*Q4.gguf"]}, {"a-Q4.gguf"}),
        (
            ["config.json", "consolidated.safetensors", "model.safetensors"],
            {"ignore_patterns": ["consolidated*"]},
            {"config.json", "model.safetensors"},
        ),
        (["m.safetensors", "onnx/model.onnx", "tf_model.h5", ".gitattributes"], {}, {"m.safetensors"}),
    ],
)
def test_what_is_chosen_of_a_repository(names: list[str], asked: Json, gets: set[str]) -> None:
    assert set(program.chosen(names, model(Path("/m"), **asked))) == gets


def test_an_adapter_is_looked_at_when_it_has_come(newest: str, hub: Hub, models: Path) -> None:
    files = {"adapter_config.json": b'{"r": 32}', "adapter_model.safetensors": b"weights"}
    hub.repository("org/sql").push(files)
    sql = model(models / "sql", id="chat:sql", hub="org/sql", max_rank=16)
    # Nobody knows its rank before.
    assert put(newest, hub, sql, check=True)["changed"]
    assert "chat:sql: its rank is 32" in put(newest, hub, sql)["msg"]
    assert contents(models / "sql") == files
    assert not put(newest, hub, {**sql, "max_rank": 32})["changed"]


# ------------------------------------------------------------------ fetched


def test_a_repository_is_fetched_once(python: str, hub: Hub, models: Path) -> None:
    wanted = model(models / "m")
    planned = put(python, hub, wanted, check=True)
    assert [item["actual"] for item in planned["changes"]] == ["missing"]
    assert hub.log == []

    first = put(python, hub, wanted)
    commit = hub.repository().branches["main"]
    assert first["changed"]
    assert first["fetched"] == [
        {"id": "chat", "ok": True, "commit": commit, "files": len(WANTED), "bytes": sum(len(FILES[n]) for n in WANTED)}
    ]
    assert contents(models / "m") == {name: FILES[name] for name in WANTED}
    assert [path.name for path in models.iterdir()] == ["m"]
    asked = len(hub.log)
    # A branch that moves on is no reason to fetch: the host has what it had.
    hub.repository().push({**FILES, "config.json": b"{}"})
    assert put(python, hub, wanted)["changed"] is False
    assert put(python, hub, wanted, verify=True)["changed"] is False
    assert len(hub.log) == asked
    store_user_can_read = all(path.stat().st_mode & 0o044 == 0o044 for path in (models / "m").rglob("*"))
    assert store_user_can_read


def test_with_the_mirror_gone_weights_that_are_there_are_enough(newest: str, hub: Hub, models: Path) -> None:
    put(newest, hub, model(models / "m"))
    hub.close()
    again = put(newest, hub, model(models / "m"), verify=True)
    assert (again.get("failed"), again["changed"]) == (None, False)


def test_a_killed_fetch_goes_on_where_it_was(python: str, hub: Hub, models: Path) -> None:
    last = "model-00002-of-00002.safetensors"
    hub.stop_at = last
    child = start(python, hub, model(models / "m"))
    assert hub.stopped.wait(30)
    # Others come meanwhile: the library asks for several at a time, and notes which are complete.
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert not (models / "m").exists()
    notes = models / ".m.part/.cache/huggingface/download"
    complete = {path.name.removesuffix(".metadata") for path in notes.glob("*.metadata") if path.stat().st_size > 50}
    assert last not in complete
    hub.stop_at = None
    hub.go_on.set()
    hub.log.clear()
    assert put(python, hub, model(models / "m"))["changed"]
    assert last in hub.gets()
    assert complete.isdisjoint(hub.gets())
    assert contents(models / "m") == {name: FILES[name] for name in WANTED}
    assert [path.name for path in models.iterdir()] == ["m"]


def test_two_runs_at_once_fetch_once(newest: str, hub: Hub, models: Path) -> None:
    hub.stop_at = "model-00001-of-00002.safetensors"
    children = [start(newest, hub, model(models / "m")) for _ in range(2)]
    assert hub.stopped.wait(30)
    hub.go_on.set()
    assert [json.loads(child.communicate(timeout=30)[0])["ok"] for child in children] == [True, True]
    assert sorted(hub.gets()) == sorted(WANTED)


def test_the_head_gets_the_configuration_and_later_the_weights(newest: str, hub: Hub, models: Path) -> None:
    small = {name for name in WANTED if not name.endswith(".safetensors")}
    put(newest, hub, model(models / "m", weights=False))
    assert set(contents(models / "m")) == small
    hub.log.clear()
    told = put(newest, hub, model(models / "m"))
    assert [item["actual"] for item in told["changes"]] == ["its weights are not there yet"]
    assert set(hub.gets()) == WANTED - small
    assert contents(models / "m") == {name: FILES[name] for name in WANTED}
    assert not put(newest, hub, model(models / "m"))["changed"]


# ------------------------------------------------------------------ damaged


def test_a_file_that_is_gone_comes_from_the_same_commit(newest: str, hub: Hub, models: Path) -> None:
    put(newest, hub, model(models / "m"))
    kept = (models / "m/model-00001-of-00002.safetensors").stat().st_ino
    hub.repository().push({**FILES, "config.json": b"other"})
    (models / "m/config.json").unlink()
    hub.log.clear()
    told = put(newest, hub, model(models / "m"))
    assert [item["actual"] for item in told["changes"]] == ["config.json is missing"]
    assert hub.gets() == ["config.json"]
    assert (models / "m/config.json").read_bytes() == FILES["config.json"]
    assert (models / "m/model-00001-of-00002.safetensors").stat().st_ino == kept


def test_a_changed_byte_is_found_by_verify_alone(newest: str, hub: Hub, models: Path) -> None:
    put(newest, hub, model(models / "m"))
    name = "model-00001-of-00002.safetensors"
    (models / "m" / name).write_bytes(bytes(len(FILES[name])))
    assert not put(newest, hub, model(models / "m"))["changed"]
    hub.log.clear()
    told = put(newest, hub, model(models / "m"), verify=True)
    assert [item["actual"] for item in told["changes"]] == [f"{name} has changed"]
    assert hub.gets() == [name]
    assert contents(models / "m") == {name: FILES[name] for name in WANTED}


def test_what_comes_damaged_is_fetched_again_and_never_used(newest: str, hub: Hub, models: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.repository().damaged[name] = 1
    assert "failed" not in put(newest, hub, model(models / "one"))
    assert (models / "one" / name).read_bytes() == FILES[name]
    hub.repository().damaged[name] = 1000
    failed = put(newest, hub, model(models / "two"))
    assert "gives other bytes than it announces" in failed["msg"]
    assert name in failed["msg"]
    assert not (models / "two").exists()


def test_what_the_kit_did_not_fetch_is_left_alone(newest: str, hub: Hub, models: Path) -> None:
    (models / "m").mkdir()
    (models / "m/config.json").write_text("somebody's")
    failed = put(newest, hub, model(models / "m"))
    assert "is not what the kit fetched there" in failed["msg"]
    assert f"model_source: {{folder: {models / 'm'}}}" in failed["msg"]
    assert (models / "m/config.json").read_text() == "somebody's"


# ------------------------------------------------------------------ refused


def test_a_full_disk_is_seen_before_anything_comes(newest: str, hub: Hub, models: Path) -> None:
    put(newest, hub, model(models / "old"))
    hub.repository().sizes["model-00001-of-00002.safetensors"] = 10**15
    hub.log.clear()
    failed = put(newest, hub, model(models / "new"))
    free = os.statvfs(models)
    assert "needs 931322.57 GiB more" in failed["msg"]
    assert "GiB are free" in failed["msg"]
    assert free.f_bavail * free.f_frsize < 10**15
    assert f"no app of this host uses {models / 'old'} (0.00 GiB) any more" in failed["msg"]
    assert hub.gets() == []
    # A folder that an app does use is not offered.
    both = put(newest, hub, model(models / "old"), model(models / "new"))
    assert "any more" not in both["msg"]


def test_a_token_opens_a_gated_repository_and_is_seen_by_nobody(newest: str, hub: Hub, models: Path) -> None:
    repository = hub.repository()
    repository.token, repository.gated = TOKEN, True
    hub.stop_at = "model-00001-of-00002.safetensors"
    child = start(newest, hub, model(models / "m"), token=TOKEN)
    assert hub.stopped.wait(30)
    for name in ("cmdline", "environ"):
        assert TOKEN.encode() not in Path(f"/proc/{child.pid}/{name}").read_bytes()
    assert not [path for path in models.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    hub.go_on.set()
    said, _ = child.communicate(timeout=30)
    assert json.loads(said)["ok"]
    assert TOKEN not in said
    again = put(newest, hub, model(models / "n"), token=TOKEN)
    assert "failed" not in again
    assert TOKEN not in json.dumps(again)


@pytest.mark.parametrize(
    ("prepare", "token", "says"),
    [
        ({"token": TOKEN, "gated": True}, "", ["is gated", "no token", "set model_store_token in the vault"]),
        ({"token": TOKEN, "gated": True}, "hf_other", ["is gated", "closed to the token of model_store_token"]),
        ({"token": TOKEN}, "hf_wrong", ["refuses the token of model_store_token (401)", "make a new one"]),
        ({"token": TOKEN}, "", ["shows no repository org/model to no token", "correct the name"]),
        ({"commits": {}, "branches": {}}, "", ["org/model has no revision main", "/org/model/commits/main"]),
    ],
)
def test_what_the_hub_refuses(python: str, hub: Hub, models: Path, prepare: Json, token: str, says: list[str]) -> None:
    for name, value in prepare.items():
        setattr(hub.repository(), name, value)
    hub.repository("org/others").token = "hf_other"
    failed = put(python, hub, model(models / "m"), token=token)
    assert failed["failed"]
    assert failed["msg"].startswith("model chat: ")
    assert [part for part in says if part not in failed["msg"]] == [], failed["msg"]
    assert not token or token not in json.dumps(failed)
    assert not (models / "m").exists()


def test_a_mirror_that_cannot_be_reached_or_is_none(python: str, hub: Hub, models: Path) -> None:
    hub.page = b"<html>Welcome to the proxy</html>"
    failed = put(python, hub, model(models / "m"))
    assert f"{hub.url} does not answer like the Hub" in failed["msg"]
    hub.close()
    failed = put(python, hub, model(models / "m"))
    assert f"{hub.url} cannot be reached for org/model" in failed["msg"]
    assert "check clusterkit_mirrors.huggingface and clusterkit_proxy" in failed["msg"]


def test_every_model_is_tried_before_it_fails(newest: str, hub: Hub, models: Path) -> None:
    failed = put(newest, hub, model(models / "no", hub="org/no", id="no"), model(models / "m"))
    assert failed["msg"].count("model ") == 1
    assert contents(models / "m")


def test_an_engine_that_is_not_there(hub: Hub, models: Path, tmp_path: Path) -> None:
    failed = put(str(tmp_path / "python"), hub, model(models / "m"))
    assert "put the engine on the host first" in failed["msg"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    failed = put(str(tmp_path / "bare/bin/python"), hub, model(models / "m"))
    assert "has no huggingface_hub" in failed["msg"]


@pytest.mark.parametrize("trusted", [True, False])
def test_the_sites_own_authority(python: str, models: Path, tmp_path: Path, trusted: bool) -> None:
    both, certificate = tmp_path / "both.pem", tmp_path / "certificate.pem"
    asked = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=mirror"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(both), "-out", str(certificate)]
    subprocess.run([*asked.split(), *names], check=True, capture_output=True)
    both.write_text(both.read_text() + certificate.read_text())
    server = Hub(certificate=str(both))
    server.repository().push(FILES)
    result = put(python, server, model(models / "m"), authorities=certificate.read_text() if trusted else "")
    server.close()
    assert ("failed" not in result) is trusted, result
    if not trusted:
        assert "cannot be reached" in result["msg"]


# ------------------------------------------------------------------ from a peer


class Peer:
    """The program that shares a folder, in the background as on a host."""

    def __init__(self, root: Path, idle_s: float = 60) -> None:
        said = self.start(root, "--idle", str(idle_s))
        assert said.returncode == 0, said.stderr
        self.offer: Json = json.loads(said.stdout)
        self.asked = {"peer": {key: self.offer[key] for key in ("url", "models")}, "peer_token": self.offer["token"]}
        mark = str(root).encode()
        self.pids = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if mark in path.read_bytes() and b"share_models" in path.read_bytes()
        ]

    @staticmethod
    def start(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(FETCHER.with_name("share_models.py")), f"--root={root}", "--address=127.0.0.1"]
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=30, check=False)

    def get(self, path: str, token: str | None = None, **headers: str) -> tuple[int, bytes]:
        headers |= {"Authorization": f"Bearer {self.offer['token'] if token is None else token}"}
        try:
            request = urllib.request.Request(f"{self.offer['url']}/{path}", headers=headers)
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, b""

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    started: list[Peer] = []
    yield started
    for peer in started:
        peer.close()


def test_a_host_has_it_from_its_peer(python: str, hub: Hub, models: Path, tmp_path: Path, peers: list[Peer]) -> None:
    put(python, hub, model(models / "m"))
    commit = hub.repository().branches["main"]
    # The branch moves on; hosts that come later are to have what the others have.
    hub.repository().push({**FILES, "config.json": b"{}"})
    hub.repository("org/other").push({"config.json": b"{}", "model.safetensors": b"other"})
    peers.append(Peer(models))
    hub.log.clear()
    here = tmp_path / "here"
    here.mkdir()
    result = put(python, hub, model(here / "m"), model(here / "o", id="o", hub="org/other"), **peers[0].asked)
    assert [item["id"] for item in result["fetched"]] == ["chat", "o"]
    assert contents(here / "m") == {name: FILES[name] for name in WANTED}
    assert json.loads((here / "m/clusterkit-manifest.json").read_text())["commit"] == commit
    # The other one the peer does not have.
    assert [line for line in hub.log if "org/model" in line] == []
    assert contents(here / "o") == {"config.json": b"{}", "model.safetensors": b"other"}
    assert peers[0].offer["token"] not in json.dumps(result)


def test_what_a_peer_has_of_a_model_is_not_taken_for_the_whole(hub: Hub, models: Path) -> None:
    """A peer without weights, or with a choice of files: such a model comes from the Hub."""
    offered = {"hub": "org/model", "revision": "main", "allow_patterns": [], "ignore_patterns": [], "weights": False}
    params = {"peer": {"url": "http://peer", "models": [offered]}, "peer_token": "t", "endpoint": hub.url, "token": ""}
    params |= {"environment": {}, "authorities": ""}
    assert store.source_of(model(models / "m"), params)["endpoint"] == hub.url
    assert store.source_of(model(models / "m", weights=False), params)["endpoint"] == "http://peer"
    assert store.source_of(model(models / "m", weights=False, ignore_patterns=["a"]), params)["endpoint"] == hub.url


def test_a_fetch_from_a_peer_checks_its_bytes(newest: str, hub: Hub, models: Path, peers: list[Peer]) -> None:
    put(newest, hub, model(models / "m"))
    name = "model-00002-of-00002.safetensors"
    (models / "m" / name).write_bytes(bytes(len(FILES[name])))
    peers.append(Peer(models))
    failed = put(newest, hub, model(models.parent / "copy"), **peers[0].asked)
    assert "gives other bytes than it announces" in failed["msg"]
    assert not (models.parent / "copy").exists()


def test_a_peer_gives_only_models_and_only_to_who_may(newest: str, hub: Hub, models: Path, peers: list[Peer]) -> None:
    put(newest, hub, model(models / "m"))
    commit = hub.repository().branches["main"]
    (models / "m/secret").write_text("not in the manifest")
    (models / "half").mkdir()
    (models / "half/clusterkit-manifest.json").write_text((models / "m/clusterkit-manifest.json").read_text())
    peers.append(Peer(models))
    assert len(peers[0].offer["models"]) == 1
    get = peers[0].get
    good = f"org/model/resolve/{commit}/config.json"
    assert get(good) == (200, FILES["config.json"])
    assert get(good, Range="bytes=5-") == (206, FILES["config.json"][5:])
    assert get(good, token="") == (401, b"")
    assert get(good, token="wrong")[0] == 401
    for path in ("secret", "clusterkit-manifest.json", "..%2Fm%2Fconfig.json", "../m/config.json", "%2Fetc%2Fpasswd"):
        assert get(f"org/model/resolve/{commit}/{path}")[0] == 404, path
    assert get(f"org/model/resolve/{'0' * 40}/config.json")[0] == 404
    assert get("api/models/org/other/revision/main")[0] == 404
    token = peers[0].offer["token"].encode()
    assert not any(token in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in peers[0].pids)


def test_a_peer_ends_when_nobody_asks_and_says_why_it_cannot_begin(models: Path, peers: list[Peer]) -> None:
    peers.append(Peer(models, idle_s=0.1))
    for pid in peers[0].pids:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(pid)], [], [], 10)
    with pytest.raises(urllib.error.URLError):
        peers[0].get("api/models/org/model/revision/main")
    taken = socket.create_server(("127.0.0.1", 0))
    refused = Peer.start(models, f"--port={taken.getsockname()[1]}")
    taken.close()
    assert refused.returncode == 1
    assert "Address already in use" in refused.stderr
    assert "No such file or directory" in Peer.start(models / "none").stderr


# ------------------------------------------------------------------ away


def test_what_was_fetched_stays_and_what_a_killed_fetch_left_goes(newest: str, hub: Hub, models: Path) -> None:
    put(newest, hub, model(models / "m"))
    (models / ".n.part").mkdir()
    gone = put(newest, hub, model(models / "m"), model(models / "n", id="n"), state="absent")
    assert gone["changed"]
    assert [path.name for path in models.iterdir()] == ["m"]
    assert contents(models / "m") == {name: FILES[name] for name in WANTED}
    assert not put(newest, hub, model(models / "m"), state="absent")["changed"]
