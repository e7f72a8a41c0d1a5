"""A host in and out of an inventory's file: nothing else in it changes, and nothing is kept that does not validate."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterkit import inventory_file
from clusterkit.errors import UsageError
from clusterkit.inventory_file import Edit

ROOT = Path(__file__).resolve().parents[2]

HOSTS = """\
# Rack plan: see the wiki.
all:
  vars:
    ansible_user: "ops"   # not root
  children:
    ray_head:
      hosts:
        head1:
          ansible_host: 192.0.2.10
    ray_workers:
      children:
        # Bought in spring.
        gpus:
          hosts:
            gpu1:
              ansible_host: 192.0.2.11
              note: |
                two lines,
                # and this is one of them

            gpu2:   # the loud one
              ansible_host: 192.0.2.12
              # its fan was changed
        cpus:
          hosts:
            cpu1: {ansible_host: 192.0.2.21}

    # Where root work is done.
    managed_hosts:
      children:
        ray_head:
        ray_workers:
"""


def put(folder: Path, text: str, name: str = "hosts.yml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def added(path: Path, *arguments: Any, **variables: Any) -> str:
    host, pool = arguments
    inventory_file.write(inventory_file.add(str(path), host, pool, variables))
    return path.read_text()


def lines_of(diff: str, sign: str) -> list[str]:
    return [line[1:] for line in diff.splitlines() if line.startswith(sign) and not line.startswith(sign * 3)]


def test_a_host_is_added_below_the_others_and_above_the_next_groups_comment(tmp_path: Path) -> None:
    path = put(tmp_path, HOSTS)
    after = added(path, "gpu3", "gpus", ansible_host="192.0.2.13", clusterkit_fabric_interface="eth1")
    new = "            gpu3:\n              ansible_host: 192.0.2.13\n              clusterkit_fabric_interface: eth1\n"
    below = "              # its fan was changed\n"
    assert after == HOSTS.replace(below, below + new)


def test_a_host_goes_with_its_own_comments_and_leaves_all_others(tmp_path: Path) -> None:
    path = put(tmp_path, HOSTS)
    inventory_file.write(inventory_file.remove(str(path), "gpu2"))
    start, end = HOSTS.index("            gpu2:"), HOSTS.index("        cpus:")
    assert path.read_text() == HOSTS[:start] + HOSTS[end:]


def test_what_was_added_is_removed_without_a_trace(tmp_path: Path) -> None:
    path = put(tmp_path, HOSTS)
    added(path, "gpu3", "gpus", ansible_host="192.0.2.13", labels={"rack": "b 2"}, text="yes")
    assert yaml.safe_load(path.read_text())["all"]["children"]["ray_workers"]["children"]["gpus"]["hosts"]["gpu3"] == {
        "ansible_host": "192.0.2.13",
        "labels": {"rack": "b 2"},
        "text": "yes",
    }
    inventory_file.write(inventory_file.remove(str(path), "gpu3"))
    assert path.read_text() == HOSTS


def test_a_block_of_text_ends_where_it_ends(tmp_path: Path) -> None:
    path = put(tmp_path, HOSTS)
    inventory_file.write(inventory_file.remove(str(path), "gpu1"))
    entry = HOSTS[HOSTS.index("            gpu1:") : HOSTS.index("\n            gpu2:")]
    assert path.read_text() == HOSTS.replace(entry, "")


@pytest.mark.parametrize("host", ["gpu1", "gpu2"])
def test_asked_twice_it_changes_nothing(tmp_path: Path, host: str) -> None:
    path = put(tmp_path, HOSTS)
    assert inventory_file.add(str(path), host, "gpus", {}) == []
    assert inventory_file.remove(str(path), "gpu9") == []
    assert inventory_file.place(str(path), "gpu2") == inventory_file.Place(str(path), 21)


def test_a_pool_that_becomes_empty_goes_with_its_last_host(tmp_path: Path) -> None:
    path = put(tmp_path, HOSTS.replace("cpu1: {ansible_host: 192.0.2.21}", "cpu1:"))
    inventory_file.write(inventory_file.remove(str(path), "cpu1"))
    assert path.read_text() == HOSTS.replace(
        "        cpus:\n          hosts:\n            cpu1: {ansible_host: 192.0.2.21}\n", ""
    )
    # The last pool stays: that it is empty is for validation to say.
    for host in ("gpu1", "gpu2"):
        inventory_file.write(inventory_file.remove(str(path), host))
    assert yaml.safe_load(path.read_text())["all"]["children"]["ray_workers"] == {"children": {"gpus": {"hosts": None}}}


@pytest.mark.parametrize(
    ("pool", "inside"),
    [
        ("        gpus:\n", "          hosts:\n            gpu3:\n              ansible_host: 192.0.2.13\n"),
        ("        gpus:\n          hosts:\n", "            gpu3:\n              ansible_host: 192.0.2.13\n"),
        (
            "        gpus:\n          vars:\n            a: b\n",
            "          hosts:\n            gpu3:\n              ansible_host: 192.0.2.13\n",
        ),
    ],
    ids=["an empty group", "an empty list", "a group of variables"],
)
def test_a_pool_without_hosts_gets_its_first(tmp_path: Path, pool: str, inside: str) -> None:
    text = f"all:\n  children:\n    ray_workers:\n      children:\n{pool}        other:\n"
    path = put(tmp_path, text)
    assert added(path, "gpu3", "gpus", ansible_host="192.0.2.13") == text.replace(pool, pool + inside)


def test_managed_hosts_that_are_listed_get_the_host_too(tmp_path: Path) -> None:
    listed = HOSTS.replace(
        "      children:\n        ray_head:\n        ray_workers:\n", "      hosts:\n        gpu1:\n"
    )
    path = put(tmp_path, listed)
    (edit,) = inventory_file.add(str(path), "gpu3", "gpus", {"ansible_host": "192.0.2.13"})
    assert lines_of(edit.diff, "+") == [
        "            gpu3:",
        "              ansible_host: 192.0.2.13",
        "        gpu3:",
    ]
    assert lines_of(edit.diff, "-") == []
    inventory_file.write([edit])
    inventory_file.write(inventory_file.remove(str(path), "gpu3"))
    assert path.read_text() == listed


def test_a_folder_of_files_is_edited_where_the_pool_stands(tmp_path: Path) -> None:
    first = put(tmp_path, "all:\n  children:\n    ray_workers:\n      children:\n        gpus:\n", "10-groups.yml")
    second = put(tmp_path, "gpus:\n  hosts:\n    gpu1:\n", "20-gpus.yml")
    third = put(tmp_path, "managed_hosts:\n  hosts:\n    gpu1:\n", "30-managed.yml")
    put(tmp_path, "gpus:\n  hosts:\n    gpu3:\n", ".hidden.yml")
    edits = inventory_file.add(str(tmp_path), "gpu3", "gpus", {})
    assert [edit.path.name for edit in edits] == ["30-managed.yml", "20-gpus.yml"], "the pool last: it is what counts"
    inventory_file.write(edits[:1])  # cut off between the two
    assert [edit.path for edit in inventory_file.add(str(tmp_path), "gpu3", "gpus", {})] == [second]
    assert "gpu3" not in first.read_text()
    assert "gpu3" in third.read_text()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("gpus: {hosts: {gpu1: {ansible_host: 192.0.2.11}}}\n", "hosts.yml:1"),
        ("gpus:\n  hosts: {}\n", "hosts.yml:2"),
        ("gpus:\n  hosts:\n    - gpu1\n", "hosts.yml:2"),
    ],
    ids=["on one line", "an empty mapping on one line", "a list"],
)
def test_what_cannot_be_edited_is_told_with_the_lines(tmp_path: Path, text: str, where: str) -> None:
    path = put(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        inventory_file.add(str(path), "gpu3", "gpus", {"ansible_host": "192.0.2.13"})
    assert where in caught.value.message
    assert "    gpu3:\n      ansible_host: 192.0.2.13" in str(caught.value.hint)
    assert path.read_text() == text


def test_an_ini_file_is_told_with_the_line_for_it(tmp_path: Path) -> None:
    path = put(tmp_path, "[gpus]\ngpu1 ansible_host=192.0.2.11\n", "hosts")
    with pytest.raises(UsageError) as caught:
        inventory_file.add(str(tmp_path), "gpu3", "gpus", {"ansible_host": "192.0.2.13", "note": "a b"})
    assert f"{path}:1" in caught.value.message
    assert "gpu3 ansible_host=192.0.2.13 note='a b'" in str(caught.value.hint)


def test_a_program_is_told_what_to_say(tmp_path: Path) -> None:
    path = put(tmp_path, "#!/bin/sh\necho '{}'\n", "hosts.sh")
    with pytest.raises(UsageError) as caught:
        inventory_file.add(str(tmp_path), "gpu3", "gpus", {"ansible_host": "192.0.2.13"})
    assert f"program {path}" in caught.value.message


def test_a_host_whose_variables_others_share_is_not_cut_out(tmp_path: Path) -> None:
    text = "gpus:\n  hosts:\n    gpu1: &like\n      port: 22\n    gpu2: *like\n"
    path = put(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        inventory_file.remove(str(path), "gpu1")
    assert f"{path}:3" in str(caught.value.hint)
    inventory_file.write(inventory_file.remove(str(path), "gpu2"))
    assert path.read_text() == "gpus:\n  hosts:\n    gpu1: &like\n      port: 22\n"


def test_line_ends_and_a_missing_last_one_stay(tmp_path: Path) -> None:
    path = tmp_path / "hosts.yml"
    path.write_bytes(b"gpus:\r\n  hosts:\r\n    gpu1:\r\n")
    inventory_file.write(inventory_file.add(str(path), "gpu3", "gpus", {}))
    assert path.read_bytes() == b"gpus:\r\n  hosts:\r\n    gpu1:\r\n    gpu3:\r\n"
    path.write_bytes(b"gpus:\n  hosts:\n    gpu1:")
    inventory_file.write(inventory_file.add(str(path), "gpu3", "gpus", {}))
    assert path.read_bytes() == b"gpus:\n  hosts:\n    gpu1:\n    gpu3:"


def test_ansibles_own_tags_stay(tmp_path: Path) -> None:
    secret = "      key: !vault |\n        $ANSIBLE_VAULT;1.1;AES256\n        6162\n"
    text = f"gpus:\n  hosts:\n    gpu1:\n{secret}    gpu2:\n"
    path = put(tmp_path, text)
    inventory_file.write(inventory_file.remove(str(path), "gpu2"))
    assert added(path, "gpu3", "gpus") == f"gpus:\n  hosts:\n    gpu1:\n{secret}    gpu3:\n"


def test_rights_and_links_stay(tmp_path: Path) -> None:
    real = put(tmp_path, HOSTS, "real")
    real.chmod(0o640)
    link = tmp_path / "inventory" / "hosts.yml"
    link.parent.mkdir()
    link.symlink_to(real)
    added(link, "gpu3", "gpus")
    assert link.is_symlink()
    assert "gpu3" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inventory", "real"]


def test_a_file_that_somebody_else_changed_is_left_alone(tmp_path: Path) -> None:
    path = put(tmp_path, HOSTS)
    edits = inventory_file.add(str(path), "gpu3", "gpus", {})
    path.write_text(HOSTS + "# mine\n")
    with pytest.raises(UsageError, match="changed by somebody else"):
        inventory_file.write(edits)
    assert path.read_text() == HOSTS + "# mine\n"


def test_a_candidate_lies_beside_and_goes_whatever_happens(tmp_path: Path) -> None:
    path = put(tmp_path, HOSTS)
    other = put(tmp_path, "[monitoring]\n", "monitoring")
    edit = Edit(path, HOSTS, HOSTS + "# new\n")
    with suppress(RuntimeError), inventory_file.candidate(str(tmp_path), [edit]) as trial:
        first, second = map(Path, trial.sources)
        assert (first.read_text(), second) == (edit.after, other)
        assert first.parent == tmp_path, "group_vars are found from there"
        assert first.name.startswith(".")
        assert first.suffix == "", "Ansible reads it as YAML, and nobody takes it for a file of the folder"
        assert path.read_text() == HOSTS
        raise RuntimeError
    assert sorted(found.name for found in tmp_path.iterdir()) == ["hosts.yml", "monitoring"]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("ansible_port=2222", "ansible_port", 2222),
        ("clusterkit_fabric_interface=eth1", "clusterkit_fabric_interface", "eth1"),
        ("note=a=b", "note", "a=b"),
        ("labels={rack: b2}", "labels", {"rack": "b2"}),
        ("key={{ lookup('env', 'X') }}", "key", "{{ lookup('env', 'X') }}"),
    ],
)
def test_a_variable_is_read_as_in_a_file(text: str, name: str, value: Any) -> None:
    assert inventory_file.variable(text) == (name, value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port", "NAME=VALUE"),
        ("1x=2", "NAME=VALUE"),
        ("x={a", "YAML"),
        ("ansible_password=x", "secret"),
        ("ansible_become_pass=x", "secret"),
        ("hf_token=x", "secret"),
    ],
)
def test_a_variable_that_cannot_be_taken(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        inventory_file.variable(text)
    assert words in caught.value.message
    assert "=x" not in caught.value.message, "a secret is not repeated"


# ------------------------------------------------------------------ through the command line

SITE = """\
all:
  vars:
    # Nothing listens there: what would be touched is refused at once.
    ansible_port: 1
    ansible_ssh_retries: 0
  children:
    ray_head:
      hosts:
        h1: {ansible_host: 127.0.0.10}
    ray_workers:
      children:
        cpus:
          hosts:
            w1:
              ansible_host: 127.0.0.11
        spare:
          hosts:
            w2:
              ansible_host: 127.0.0.12
    # Root work.
    managed_hosts:
      children:
        ray_head:
        ray_workers:
"""
FACTS = """\
clusterkit_name: site
clusterkit_stack: cpu
clusterkit_accelerator: cpu
clusterkit_apps:
  - name: tiny
    template: llm
    pool: cpus
    parameters: {model_id: tiny, model_source: {make: tiny-llama}}
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    (folder / "group_vars").mkdir(parents=True)
    put(folder, SITE)
    put(folder / "group_vars", FACTS, "all.yml")
    return folder


def host(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_STATE_HOME": str(site.parent / "state")}
    command = [sys.executable, "-m", "clusterkit", "host", *words, "-i", str(site)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["add", "w3", "--pool", "cpus"], ["hosts.yml:16 [w3] clusterkit_node_ip", "set clusterkit_node_ip"]),
        (["add", "w3", "--pool", "cpus", "--address", "127.0.0.11"], ["hosts.yml:16", "is the address of w1 too"]),
        (["add", "w3", "--address", "127.0.0.13"], ["--pool is missing", "cpus, spare"]),
        (["add", "w3", "--pool", "cpu", "--address", "127.0.0.13"], ["no pool 'cpu'", "did you mean 'cpus'?"]),
        (["add", "w3", "--pool", "cpus", "--address", "gpu3"], ["no IP address"]),
        (["add", "w 3", "--pool", "cpus"], ["no host name"]),
        (["add", "spare", "--pool", "cpus"], ["name of a group"]),
        (["add", "h1", "--pool", "cpus"], ["h1 is the head"]),
        (["add", "w1", "--pool", "spare"], ["is in the pool cpus"]),
        (["add", "w1", "--address", "127.0.0.19"], ["is there already", "ansible_host", "hosts.yml:14"]),
        (["remove", "w1", "--yes"], ["apps[0].pool", "no pool 'cpus'"]),
        (["remove", "h1", "--yes"], ["hosts.yml:9 h1", "is the head"]),
        (["remove", "w1"], ["--yes"]),
        (["drain", "h1", "--reason", "x"], ["hosts.yml:9 h1", "is the head"]),
        (["drain", "w9", "--reason", "x"], ["no host 'w9'", "h1, w1, w2"]),
        (["drain", "w1", "--reason", "a\nb"], ["--reason"]),
        (["drain", "w1", "--reason", "x" * 201], ["--reason"]),
    ],
)
def test_a_wrong_request_says_what_is_wrong_and_touches_nothing(site: Path, words: list[str], says: list[str]) -> None:
    done = host(site, *words)
    assert done.returncode == 2, done.stderr
    assert [word for word in says if word not in done.stderr] == [], done.stderr
    assert sorted(path.name for path in site.iterdir()) == ["group_vars", "hosts.yml"]
    assert (site / "hosts.yml").read_text() == SITE
    # Whatever ran was the validation, on the controller.
    logs = [path.read_text() for path in (site.parent / "state").rglob("stdout")]
    assert not [log for log in logs if "unreachable" in log.lower().replace("unreachable=0", "")]


def test_a_pool_that_lacks_nothing_but_hosts_can_be_filled(site: Path) -> None:
    empty = SITE.replace("            w2:\n              ansible_host: 127.0.0.12\n", "")
    put(site, empty)
    without = host(site, "add", "w2", "--address", "127.0.0.12")
    assert without.returncode == 2
    assert "spare" in without.stderr
    assert "the pool has no host" in without.stderr
    assert (site / "hosts.yml").read_text() == empty
    assert host(site, "add", "w2", "--pool", "spare", "--address", "127.0.0.12").returncode == 1, "nobody answers there"
    assert (site / "hosts.yml").read_text() == SITE


def test_a_host_that_is_not_there_yet_is_kept_in_the_file_and_taken_up_again(site: Path) -> None:
    wish = ["add", "w3", "--pool", "spare", "--address", "127.0.0.13"]
    first = host(site, *wish)
    assert first.returncode == 1
    assert "ssh w3" in first.stderr
    after = (site / "hosts.yml").read_text()
    entry = "            w3:\n              ansible_host: 127.0.0.13\n"
    assert after == SITE.replace("127.0.0.12\n", f"127.0.0.12\n{entry}")
    again = host(site, *wish)
    assert again.returncode == 1
    assert "unreachable w3" in again.stderr
    assert (site / "hosts.yml").read_text() == after
    logs = [path.read_text() for path in (site.parent / "state").rglob("stdout")]
    assert len(logs) > 2
    assert not [log for log in logs if any(f"[{name}]" in log for name in ("h1", "w1", "w2"))], "nobody else was asked"


def test_a_host_that_cannot_be_reached_leaves_by_force_only(site: Path) -> None:
    kept = host(site, "remove", "w2", "--yes")
    assert kept.returncode == 1
    assert "ssh w2" in kept.stderr
    assert "--force" in kept.stderr
    assert (site / "hosts.yml").read_text() == SITE
    forced = host(site, "remove", "w2", "--yes", "--force")
    assert forced.returncode == 0, forced.stderr
    assert "/opt/clusterkit" in forced.stderr
    gone = "        spare:\n          hosts:\n            w2:\n              ansible_host: 127.0.0.12\n"
    assert (site / "hosts.yml").read_text() == SITE.replace(gone, "")
    again = host(site, "remove", "w2", "--yes")
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
