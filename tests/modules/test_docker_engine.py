"""docker_engine: the merge as tables and as a law, and the module on files of its own, without a dockerd.

What a real dockerd says to it stands in tests/roles/test_container_engine.py.
"""

from __future__ import annotations

import copy
import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

docker_engine = load_module("docker_engine")

SITE = '{\n    "labels": ["rack=7"],\n  "log-opts": {"tag": "{{.Name}}", "max-size": "7m"}\n}'
OURS: Json = {
    "log-driver": "json-file",
    "log-opts": {"max-size": "100m", "max-file": "5"},
    "live-restore": True,
    "features": {"buildkit": True},
}


def first(text: str | None) -> Json:
    """The record's part about daemon.json on a host that the kit has not touched yet."""
    site = json.loads(text) if text and text.strip() else {}
    kept: Json = {"existed": text is not None, "text": text, "site": site, "ours": {}, "fallback": None}
    return {**kept, "digests": [docker_engine.digest(text)]}


def apply(text: str | None, kept: Json, ours: Json) -> tuple[str | None, Json]:
    planned = docker_engine.plan(text, kept, ours, "daemon.json")
    return planned["text"], planned["final"]


# --------------------------------------------------------------------------- the merge


@pytest.mark.parametrize(
    ("site", "ours", "merged"),
    [
        ({"labels": ["a"]}, {"debug": True}, {"labels": ["a"], "debug": True}),
        ({"features": {"cdi": True}}, {"features": {"buildkit": True}}, {"features": {"cdi": True, "buildkit": True}}),
        # Lists are the kit's, unless several owners may have entries.
        ({"dns": ["1.1.1.1"]}, {"dns": ["9.9.9.9"]}, {"dns": ["9.9.9.9"]}),
        (
            {"registry-mirrors": ["https://a", "https://b"]},
            {"registry-mirrors": ["https://b", "https://c"]},
            {"registry-mirrors": ["https://a", "https://b", "https://c"]},
        ),
        # Another driver refuses the options of the former.
        (
            {"log-driver": "syslog", "log-opts": {"syslog-address": "udp://log:514"}},
            {"log-driver": "json-file", "log-opts": {"max-size": "1m"}},
            {"log-driver": "json-file", "log-opts": {"max-size": "1m"}},
        ),
        # json-file is what dockerd takes where nothing is said.
        (
            {"log-opts": {"tag": "x"}},
            {"log-driver": "json-file", "log-opts": {"max-size": "1m"}},
            {"log-driver": "json-file", "log-opts": {"tag": "x", "max-size": "1m"}},
        ),
    ],
)
def test_the_sites_keys_stay_and_ours_are_on_top(site: Json, ours: Json, merged: Json) -> None:
    before = copy.deepcopy((site, ours))
    assert docker_engine.merge(site, ours) == merged
    assert (site, ours) == before


def test_a_key_that_leaves_the_inventory_leaves_the_file_and_the_sites_stays() -> None:
    text, kept = apply(SITE, first(SITE), OURS)
    assert text is not None
    less = {key: value for key, value in OURS.items() if key not in ("features", "log-opts")}
    text, kept = apply(text, kept, less)
    assert text is not None
    assert json.loads(text) == {**json.loads(SITE), "log-driver": "json-file", "live-restore": True}


def test_a_second_plan_changes_nothing() -> None:
    text, kept = apply(SITE, first(SITE), OURS)
    assert apply(text, kept, OURS) == (text, kept)


def test_a_key_of_ours_changed_by_hand_comes_back_and_is_not_taken_for_the_sites() -> None:
    text, kept = apply(SITE, first(SITE), OURS)
    assert text is not None
    by_hand = text.replace("100m", "1m").replace('"live-restore": true', '"live-restore": 1')
    again, kept = apply(by_hand, kept, OURS)
    assert again == text
    assert docker_engine.give_back(again, kept, "daemon.json") == SITE


def test_what_the_site_adds_later_stays_when_the_kit_goes() -> None:
    text, kept = apply(SITE, first(SITE), {**OURS, "registry-mirrors": ["https://ours"]})
    assert text is not None
    edited = json.loads(text)
    edited["registry-mirrors"].append("https://theirs")
    edited["runtimes"] = {"nvidia": {"path": "nvidia-container-runtime"}}
    del edited["labels"]
    text, kept = apply(json.dumps(edited), kept, OURS)
    left = json.loads(docker_engine.give_back(text, kept, "daemon.json"))
    assert left == {
        "log-opts": {"tag": "{{.Name}}", "max-size": "7m"},
        "registry-mirrors": ["https://theirs"],
        "runtimes": {"nvidia": {"path": "nvidia-container-runtime"}},
    }


def test_features_that_another_tool_replaced_are_merged_again() -> None:
    """amd-ctk puts {"cdi": true} in the place of the whole object."""
    text, kept = apply(None, first(None), OURS)
    assert text is not None
    replaced = {**json.loads(text), "features": {"cdi": True}}
    text, kept = apply(json.dumps(replaced), kept, OURS)
    assert text is not None
    assert json.loads(text)["features"] == {"cdi": True, "buildkit": True}
    assert json.loads(docker_engine.give_back(text, kept, "daemon.json")) == {"features": {"cdi": True}}


@pytest.mark.parametrize("text", [None, "", "{}", "{ }\n", SITE])
def test_what_was_there_comes_back_to_the_letter(text: str | None) -> None:
    after, kept = apply(text, first(text), OURS)
    assert after != text
    assert docker_engine.give_back(after, kept, "daemon.json") == text


def some(rng: random.Random, depth: int = 2) -> Any:
    kinds = ["word", "list", "flag", "number"] + ["object"] * depth
    kind = rng.choice(kinds)
    if kind == "object":
        return some_config(rng, depth - 1)
    if kind == "list":
        return rng.sample(["https://a", "https://b", "https://c"], rng.randint(0, 3))
    return {"word": rng.choice(["json-file", "syslog", "x"]), "flag": rng.choice([True, False]), "number": 1}[kind]


def some_config(rng: random.Random, depth: int = 2) -> Json:
    keys = ["log-driver", "log-opts", "registry-mirrors", "features", "debug", "labels"]
    return {key: some(rng, depth) for key in rng.sample(keys, rng.randint(0, len(keys)))}


def test_law_nothing_of_the_sites_is_lost_whatever_is_wanted_and_wherever_a_run_is_killed() -> None:
    for seed in range(400):
        rng = random.Random(seed)
        site = rng.choice([None, json.dumps(some_config(rng), indent=rng.choice([None, 1, 4]))])
        text, kept = site, first(site)
        for _ in range(rng.randint(1, 6)):
            planned = docker_engine.plan(text, kept, some_config(rng), "daemon.json")
            killed = rng.choice(["before the file", "before the record", "never"])
            kept = planned["final"] if killed == "never" else planned["pending"]
            text = text if killed == "before the file" else planned["text"]
        ours = some_config(rng)
        wanted = docker_engine.merge(json.loads(site or "{}"), ours)
        text, kept = apply(text, json.loads(json.dumps(kept)), ours)
        assert docker_engine.same(json.loads(text or "{}"), wanted), seed
        assert docker_engine.give_back(text, kept, "daemon.json") == site, seed


# --------------------------------------------------------------------------- the host, pure


@pytest.mark.parametrize(
    ("argv", "config", "conflicts"),
    [
        (["dockerd", "-H", "fd://", "--containerd=/run/c.sock"], {"live-restore": True}, []),
        (["dockerd", "-H", "fd://"], {"hosts": ["tcp://0.0.0.0:2375"]}, ["hosts (-H)"]),
        (["dockerd", "--log-opt", "max-size=1m"], {"log-opts": {}}, ["log-opts (--log-opt)"]),
        (
            ["dockerd", "--insecure-registry=r"],
            {"insecure-registries": []},
            ["insecure-registries (--insecure-registry)"],
        ),
        (
            ["dockerd", "-D", "--data-root", "/d"],
            {"debug": True, "data-root": "/e"},
            ["debug (-D)", "data-root (--data-root)"],
        ),
        # Allowed in both places.
        (["dockerd", "--add-runtime", "a=b"], {"runtimes": {}}, []),
    ],
)
def test_keys_that_also_stand_on_the_command_line(argv: list[str], config: Json, conflicts: list[str]) -> None:
    assert docker_engine.flag_conflicts(config, argv) == conflicts


def test_a_units_variables_are_read_as_systemd_reads_them() -> None:
    line = "/usr/sbin/dockerd -H fd:// $DOCKER_OPTS --label=${RACK}x $NONE"
    found = docker_engine.expand(line, {"DOCKER_OPTS": "--debug --mtu 1400", "RACK": "7"})
    assert found == ["/usr/sbin/dockerd", "-H", "fd://", "--debug", "--mtu", "1400", "--label=7x"]


def test_a_file_newer_than_dockerd_asks_for_a_restart() -> None:
    times = {"/etc/docker/daemon.json": 101.0, "/etc/ssl/certs/ca-certificates.crt": 99.0}
    assert docker_engine.newer(times, 100.0) == ["/etc/docker/daemon.json"]
    assert docker_engine.newer(times, 102.0) == []
    assert docker_engine.newer(times, None) == [], "one that does not run has nothing to restart"


def test_only_the_engine_is_pinned() -> None:
    wanted, engine = ["docker.io", "apparmor"], ["docker.io"]
    assert docker_engine.missing_packages(wanted, {}, engine, "") == {"docker.io": "", "apparmor": ""}
    have = {"docker.io": "1", "apparmor": "3"}
    assert docker_engine.missing_packages(wanted, have, engine, "") == {}
    assert docker_engine.missing_packages(wanted, have, engine, "2") == {"docker.io": "2"}


def test_a_release_of_its_own_goes_before_its_distribution() -> None:
    table = {"debian-12": ["a"], "ubuntu": ["b"]}
    assert docker_engine.entry_for(table, {"ID": "debian", "VERSION_ID": "12"}) == ["a"]
    assert docker_engine.entry_for(table, {"ID": "ubuntu", "VERSION_ID": "24.04"}) == ["b"]
    with pytest.raises(docker_engine.Problem, match=r"rocky 9\.6 .* known are: debian-12, ubuntu"):
        docker_engine.entry_for(table, {"ID": "rocky", "VERSION_ID": "9.6"})


# --------------------------------------------------------------------------- the module on files


class Bench:
    """A host of files alone: no dockerd, no systemd, no package manager on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.config_file = folder / "etc/docker/daemon.json"
        self.drop_in = folder / "etc/systemd/docker.service.d/clusterkit.conf"
        self.record = folder / "state/container-engine.json"

    def site(self, text: str, mode: int = 0o644) -> None:
        self.config_file.parent.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(text)
        self.config_file.chmod(mode)

    def program(self, name: str, script: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.programs / name).chmod(0o755)

    def __call__(self, *, check: bool = False, **arguments: Any) -> Json:
        given = {"started": False, "config": OURS, **arguments}
        places = {"record": str(self.record), "config_file": str(self.config_file)}
        return call(docker_engine, check=check, **places, **given)

    def tree(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.folder)): path.read_text() for path in self.folder.rglob("*") if path.is_file()
        }


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    (tmp_path / "os-release").write_text('ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n')
    monkeypatch.setattr(docker_engine, "SBIN", ())
    monkeypatch.setattr(docker_engine, "OS_RELEASE", str(tmp_path / "os-release"))
    monkeypatch.setattr(docker_engine, "DROP_INS", str(made.drop_in.parent))
    monkeypatch.setenv("PATH", str(made.programs))
    return made


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_merged_twice_and_given_back(bench: Bench) -> None:
    bench.site(SITE, mode=0o640)
    assert bench()["changed"]
    merged = json.loads(bench.config_file.read_text())
    assert merged["labels"] == ["rack=7"]
    assert merged["log-opts"] == {"tag": "{{.Name}}", "max-size": "100m", "max-file": "5"}
    assert mode_of(bench.config_file) == 0o640
    assert mode_of(bench.record) == 0o600, "a site's daemon.json may hold a password"
    before = bench.tree()
    assert not bench()["changed"]
    assert bench.tree() == before
    assert bench(state="absent")["changed"]
    assert bench(state="forgotten")["changed"]
    assert bench.config_file.read_text() == SITE
    assert not bench.record.exists()
    assert not bench(state="absent")["changed"]
    assert not bench(state="forgotten")["changed"]


def test_on_a_host_without_docker_the_kits_file_and_folder_go_again(bench: Bench) -> None:
    bench()
    assert json.loads(bench.config_file.read_text()) == OURS
    bench(state="absent")
    bench(state="forgotten")
    assert bench.tree().keys() == {"os-release"}
    assert not (bench.folder / "etc").exists()


def test_check_mode_shows_and_touches_nothing(bench: Bench) -> None:
    bench.site(SITE)
    before = bench.tree()
    planned = bench(check=True, state="planned")
    assert planned["work"] is True
    shown = bench(check=True, files={str(bench.drop_in): "[Service]\n"})
    assert shown["changed"]
    by_path = {entry["after_header"]: entry for entry in shown["diff"]}
    assert by_path[str(bench.config_file)]["before"] == SITE
    assert json.loads(by_path[str(bench.config_file)]["after"])["live-restore"] is True
    assert by_path[str(bench.drop_in)]["after"] == "[Service]\n"
    assert bench.tree() == before


def test_a_null_leaves_a_key_out(bench: Bench) -> None:
    bench(config={**OURS, "live-restore": None, "features": {"buildkit": None, "cdi": True}})
    merged = json.loads(bench.config_file.read_text())
    assert "live-restore" not in merged
    assert merged["features"] == {"cdi": True}


@pytest.mark.parametrize(
    ("text", "place"),
    [('{\n  "a": 1,\n  "b": }\n', ", line 3: "), ("[]", ", line 1: "), ('{"a": 1,}', ", line 1: ")],
)
@pytest.mark.parametrize("state", ["planned", "present", "absent"])
def test_a_broken_file_is_named_with_its_line_and_nothing_is_touched(
    bench: Bench, text: str, place: str, state: str
) -> None:
    bench.site(text)
    before = bench.tree()
    result = bench(state=state)
    assert result["failed"]
    assert str(bench.config_file) + place in result["msg"]
    assert bench.tree() == before


def killed_at_the_file(bench: Bench, *, written: bool, **arguments: Any) -> None:
    """A run that ends with the file, written or not."""
    put = docker_engine.put

    def killed(*given: Any, **options: Any) -> None:
        if written:
            put(*given, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docker_engine, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            bench(**arguments)


def test_the_record_is_written_once_and_before_anything_else(bench: Bench) -> None:
    bench.site(SITE)
    killed_at_the_file(bench, written=False)
    assert bench.config_file.read_text() == SITE
    assert json.loads(bench.record.read_text())["daemon_json"]["text"] == SITE
    assert bench()["changed"]
    bench(state="absent")
    assert bench.config_file.read_text() == SITE


def test_a_run_that_was_killed_after_the_file_forgets_no_key(bench: Bench) -> None:
    """Keys of the former run and of the killed one are the kit's, and leave the file."""
    bench.site(SITE)
    bench(config={**OURS, "debug": True})
    killed_at_the_file(bench, written=True, config={**OURS, "max-concurrent-downloads": 2})
    bench()
    assert set(json.loads(bench.config_file.read_text())) == {"labels", *OURS}
    bench(state="absent")
    assert bench.config_file.read_text() == SITE


def test_files_of_the_kits_come_and_go_with_the_inventory(bench: Bench) -> None:
    authority = bench.folder / "etc/docker/certs.d/registry:5000/ca.crt"
    theirs = bench.folder / "etc/docker/certs.d/other/ca.crt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("the site's")
    text = '[Service]\nEnvironment="HTTP_PROXY=http://me:hunter2@proxy:3128"\n'
    files = {str(bench.drop_in): text, str(authority): "pem", str(theirs): "ours"}
    result = bench(files=files, secrets=["hunter2"])
    assert "hunter2" not in json.dumps(result), "no output holds the password"
    assert mode_of(bench.drop_in) == 0o600, "nor may others read it"
    assert mode_of(authority) == 0o644
    assert not bench(files=files, secrets=["hunter2"])["changed"]

    # The password is in no variable any more, and still in the diff's former text.
    result = bench(files={str(authority): "pem"})
    assert "hunter2" not in json.dumps(result)
    assert not bench.drop_in.exists()
    assert theirs.read_text() == "the site's"
    assert authority.exists()
    bench(files={})
    assert not authority.parent.exists()
    assert theirs.exists()


def test_files_of_the_kits_go_at_removal_and_the_sites_come_back(bench: Bench) -> None:
    bench.drop_in.parent.mkdir(parents=True)
    bench.drop_in.write_text("the site's")
    stale = bench.folder / "etc/source.list"
    stale.write_text("")
    bench(files={str(bench.drop_in): "ours"})
    assert bench(state="absent", gone=[str(stale)])["changed"]
    assert bench.drop_in.read_text() == "the site's"
    assert not stale.exists()


def test_without_a_record_nobody_knows_and_all_stays(bench: Bench) -> None:
    bench.site(SITE)
    bench()
    bench.record.unlink()
    text = bench.config_file.read_text()
    result = bench(state="absent", removable=["docker.io"], remove_packages=True)
    assert not result["changed"]
    assert result["packages"] == []
    assert bench.config_file.read_text() == text


def test_a_damaged_record_is_no_licence_to_forget_the_site(bench: Bench) -> None:
    bench.site(SITE)
    bench()
    bench.record.write_text("{")
    result = bench()
    assert result["failed"]
    assert str(bench.record) in result["msg"]


def test_a_file_that_dockerd_does_not_validate_is_not_put_in_place(bench: Bench) -> None:
    """The words of dockerd 23.0 and later; the one at hand, 20.10, does not know the flag."""
    bench.site(SITE)
    bench.program(
        "dockerd",
        'while read -r line; do case "$line" in *no-such-key*)\n'
        "echo \"unable to configure the Docker daemon with file $3: the following directives don't match any "
        'configuration option: no-such-key" >&2; exit 1;; esac; done <"$3"; echo configuration OK',
    )
    before = bench.tree()
    result = bench(config={"no-such-key": 1})
    assert result["failed"]
    assert f"with file {bench.config_file}: the following directives don't match" in result["msg"]
    assert bench.tree() == before
    assert bench()["changed"]


def test_a_dockerd_that_cannot_validate_is_no_obstacle(bench: Bench) -> None:
    bench.program("dockerd", "echo 'Status: unknown flag: --validate' >&2; exit 125")
    assert bench()["changed"]


def test_the_other_sources_packages_are_a_finding(bench: Bench) -> None:
    bench.site(SITE)
    bench.program("dpkg-query", "echo 'docker-ce installed 5:27.0'; echo 'containerd.io config-files 1.7'")
    before = bench.tree()
    packages = {"debian": ["docker.io"]}
    result = bench(state="planned", packages=packages, conflicts=["docker-ce", "containerd.io"])
    assert result["failed"]
    assert "container_engine_source: docker" in result["msg"]
    assert result["msg"].endswith("apt-get remove docker-ce"), "what is only configured is not in the way"
    assert bench.tree() == before


def test_the_plan_names_packages_repository_and_distribution(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.folder / "docker.list"
    source.write_text("deb https://download.docker.com/linux/debian bookworm stable\n")
    monkeypatch.setattr(docker_engine, "SOURCES", (str(bench.folder / "*.list"),))
    packages = {"debian-12": ["docker-ce", "apparmor"]}
    planned = bench(
        state="planned",
        packages=packages,
        engine_packages=["docker-ce"],
        version="5:27.0-1",
        repository="https://download.docker.com/linux/",
    )
    assert planned["install"] == ["docker-ce-5:27.0-1", "apparmor"], "without dpkg the names are rpm's"
    assert planned["distribution"]["codename"] == "bookworm"
    assert planned["repository_files"] == [str(source)]


def test_without_systemd_it_says_so(bench: Bench) -> None:
    result = bench(started=True)
    assert result["failed"]
    assert "systemd" in result["msg"]


def test_data_goes_with_packages_of_the_kits_alone(bench: Bench) -> None:
    data = bench.folder / "data"
    (data / "overlay2").mkdir(parents=True)
    (data / "link").symlink_to("/etc/passwd")
    bench(config={"data-root": str(data)})
    bench.program("dpkg-query", "echo 'docker.io installed 20.10'")
    asked = {"removable": ["docker.io", "runc"], "engine_packages": ["docker.io"]}
    assert bench(state="absent", **asked)["packages"] == [], "not without the word"
    bench(config={"data-root": str(data)})
    result = bench(state="absent", remove_packages=True, **asked)
    assert result["packages"] == ["docker.io"]
    assert str(data) in result["data"]
    assert bench(state="forgotten", data=result["data"])["changed"]
    assert not data.exists()
    assert os.path.exists("/etc/passwd")

    # The next record is made on a host that has the package.
    bench()
    assert bench(state="absent", remove_packages=True, **asked)["packages"] == ["docker.io"]
