"""The roles host_agent and fleet on one system container that is head and only worker at once: real sshd, sudo and
systemd, no network. The tests go through one host's life in their order, from bare Debian to removal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.roles.lonely_host import Box, running_box
from tests.support import Run, ansible_playbook

pytestmark = [pytest.mark.docker, pytest.mark.slow]

Json = dict[str, Any]

NAME = "clusterkit-fleettest"
PATHS = {"root": "/opt/clusterkit", "config": "/etc/clusterkit", "state": "/var/lib/clusterkit"}
FLEET = "/etc/clusterkit/fleet"
SOCKET = "/run/clusterkit/fleet/fleet.sock"
UNIT = "clusterkit-fleet.service"
AGENT = "/opt/clusterkit/bin/host-agent --config /etc/clusterkit/host-agent.json"
SUDOERS = "/etc/sudoers.d/clusterkit-agent"
PASSWORD = "correct-horse-7"
CREDENTIALS = {"default": {"user": "ops-bmc", "password": PASSWORD}}
REDFISH = {"kind": "redfish", "address": "https://127.0.0.1:1", "mac": None, "broadcast": "255.255.255.255"}
PATIENCE_S = 90.0

ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sys.argv[1])
    client.sendall(b'{"v": 1, "verb": "%s"}\\n' % sys.argv[2].encode())
    print(client.makefile().readline())
"""


def member(name: str, address: str) -> Json:
    return {name: {"address": address, "node_ip": address, "pool": "cpus", "power": {**REDFISH, "system": None}}}


def cluster(*, autoscaled: bool = True, members: Json | None = None, **pool: Any) -> Json:
    """What of the published fact the two roles read."""
    # The second host is not there: its files and keys come and go all the same.
    hosts = {**member("box", "127.0.0.1"), **member("w9", "192.0.2.9")} if members is None else members
    fleet = {"cluster": "test", "socket": SOCKET, "pools": {"cpus": {"max": 2, **pool}}, "hosts": hosts}
    here = {"managed": True, "head": True, "worker": True}
    return {
        "runtime": "venv",
        "service_user": "ray",
        "paths": PATHS,
        "proxy": {"http": None, "https": None, "no_proxy": []},
        "mirrors": {"pypi": None},
        "hosts": {"box": here},
        "head": {"host": "box", "node_ip": "127.0.0.1"},
        "autoscaler": {"config": {}, "environment": {}, "fleet": fleet} if autoscaled else None,
    }


class Host(Box):
    """The container: plays against it, words to its daemon, and logins as the daemon does them."""

    def play(
        self,
        *options: str,
        ok: bool = True,
        fact: Json | None = None,
        roles: tuple[str, ...] = ("host_agent", "fleet"),
        tasks: str = "main",
        credentials: Json | None = None,
    ) -> Run:
        steps = [{"name": "Role", "ansible.builtin.import_role": {"name": role, "tasks_from": tasks}} for role in roles]
        play = {"name": "It", "hosts": "box", "gather_facts": False, "tasks": steps}
        given = {
            "clusterkit": fact or cluster(),
            "fleet_bmc_credentials": CREDENTIALS if credentials is None else credentials,
            # The container has no network, and no python3-venv.
            "fleet_source": "wheelhouse",
        }
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        (self.folder / "variables.json").write_text(json.dumps(given))
        words = ["-i", str(self.folder / "hosts"), "-e", f"@{self.folder}/variables.json"]
        run = ansible_playbook(self.folder, *words, str(self.folder / "play.yml"), *options)
        assert (run.code == 0) is ok, run.text
        return run

    def ask(self, verb: str = "status", user: str = "root") -> str:
        (self.folder / "ask.py").write_text(ASK)
        script = ASK.replace("'", "'\\''")
        return self.sh(f"runuser -u {user} -- python3 -c '{script}' {SOCKET} {verb} 2>&1", check=False)

    def seen(self) -> Json:
        """What the daemon knows of this host."""
        found: Json = next(item for item in json.loads(self.ask())["hosts"] if item["host"] == "box")
        return found

    def wait(self, state: str, why: str = "") -> None:
        end = time.monotonic() + PATIENCE_S
        while (seen := self.seen())["state"] != state or why not in str(seen["why"]):
            assert time.monotonic() < end, seen
            time.sleep(0.5)

    def ssh(self, *words: str, options: str = "", given: str = "") -> str:
        """Exit code and what was said, with the head's key, from the head."""
        login = f"ssh -F none -i {FLEET}/id_ed25519 -o BatchMode=yes -o HostKeyAlias=box -o IdentitiesOnly=yes"
        login += f" -o UserKnownHostsFile={FLEET}/known_hosts -o GlobalKnownHostsFile=/dev/null {options}"
        command = f"printf %s '{given}' | {login} clusterkit-agent@127.0.0.1 {' '.join(words)} 2>&1; echo code=$?"
        return self.sh(command, check=False)

    def known(self) -> set[str]:
        return set(self.sh(f"grep -v '^#' {FLEET}/known_hosts | cut -d' ' -f1").split())

    def pid(self) -> str:
        return self.sh(f"systemctl show {UNIT} -p MainPID --value").strip()

    def journal(self, tag: str) -> str:
        self.sh("journalctl --sync")
        return self.sh(f"journalctl -q --no-pager -o cat -t {tag}", check=False)

    def left(self) -> str:
        """What is there of either role."""
        paths = [SUDOERS, "/var/lib/clusterkit-agent", "/opt/clusterkit/fleet-env", "/etc/clusterkit/fleet.json", FLEET]
        paths += [f"/etc/systemd/system/{UNIT}", f"/etc/systemd/system/multi-user.target.wants/{UNIT}"]
        paths += ["/var/lib/clusterkit/fleet", "/run/clusterkit"]
        found = self.sh(f"ls -d {' '.join(paths)} 2>/dev/null; getent passwd clusterkit-agent", check=False)
        return found + self.sh(f"systemctl show {UNIT} -p LoadState --value").replace("not-found\n", "")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with running_box(Host, NAME) as made:
        # As baseline leaves a host.
        made.sh("mkdir -p /opt/clusterkit/bin /etc/clusterkit /var/lib/clusterkit/node")
        # sudo asks for the host's own name, and there is no network.
        made.sh("echo 127.0.0.1 box >>/etc/hosts")
        made.sh("useradd --system --user-group --no-create-home ray && useradd --system --groups ray eve")
        yield made


def test_check_mode_on_a_bare_host(host: Host) -> None:
    assert host.play("--check", "--diff").changed > 0
    assert host.left() == ""


def test_a_bmc_without_a_password_is_named_and_nothing_else_is(host: Host) -> None:
    given = {"w9": {"user": "ops-bmc", "password": ""}, "box": CREDENTIALS["default"]}
    said = " ".join(host.play("--check", "-vvv", credentials=given, ok=False).text.split())
    assert "the BMC of w9 has no user and password" in said
    assert "fleet_bmc_credentials" in said
    assert PASSWORD not in said


def test_from_a_bare_host_to_a_daemon_that_sees_its_worker_and_again(host: Host) -> None:
    run = host.play("-vvv", "--diff")
    assert PASSWORD not in run.text
    assert "PRIVATE KEY" not in run.text
    # By the key that was made, the host key that was read, the one command and the one sudo rule.
    host.wait("idle")
    running = host.pid()
    again = host.play("-vvv", "--diff")
    assert again.changed == 0, again.text
    assert PASSWORD not in again.text
    assert host.play("--check").changed == 0
    assert host.pid() == running
    assert host.sh(f"systemctl is-enabled {UNIT}").strip() == "enabled"


def test_the_daemon_listens_to_root_and_to_rays_user_alone(host: Host) -> None:
    assert host.sh(f"stat -c '%a %U:%G' {SOCKET}").strip() == "660 root:ray"
    assert json.loads(host.ask("status"))["ok"] is True
    assert json.loads(host.ask("status", "ray"))["ok"] is True
    assert "PermissionError" in host.ask("status", "nobody")
    # In the group of the socket, and still nobody: the kernel says who asks.
    assert json.loads(host.ask("status", "eve"))["code"] == "forbidden"


def test_secrets_are_roots_alone(host: Host) -> None:
    found = host.sh(f"grep -rlF {PASSWORD} /etc /opt /run /tmp /root /home /var/lib 2>/dev/null", check=False).split()
    assert sorted(found) == [f"{FLEET}/bmc/box.json", f"{FLEET}/bmc/w9.json"]
    assert PASSWORD not in host.sh("journalctl -q --no-pager; cat /proc/[0-9]*/cmdline | tr '\\0' ' '", check=False)
    modes = host.sh(
        f"stat -c '%a %U %n' {FLEET} {FLEET}/bmc {FLEET}/bmc/* {FLEET}/id_ed25519 /etc/clusterkit/fleet.json"
    )
    kept = {tuple(line.split()[:2]) for line in modes.splitlines()}
    assert kept == {("700", "root"), ("600", "root")}
    assert "Permission denied" in host.sh(f"runuser -u ray -- cat {FLEET}/bmc/box.json 2>&1", check=False)


def test_a_new_password_needs_no_restart(host: Host) -> None:
    running = host.pid()
    changed = {"default": {"user": "ops-bmc", "password": "battery-staple-9"}}
    assert host.play(credentials=changed).changed == 1
    assert "battery-staple-9" in host.sh(f"cat {FLEET}/bmc/box.json")
    assert host.pid() == running
    host.play()


def test_the_words_go_through_sudo(host: Host) -> None:
    said = host.ssh("status")
    assert said.endswith("code=0\n")
    assert json.loads(said.splitlines()[-2])["state"] == "stopped"
    assert '"refused": "generation"' in host.ssh("start", "box-1")
    found = {"owner": "fleet", "reason": "a test", "findings": []}
    assert '"held": "in quarantine: a test' in host.ssh("quarantine", given=json.dumps(found))
    record = json.loads(host.sh("cat /var/lib/clusterkit/host.json"))
    assert record["quarantine"]["owner"] == "fleet"
    host.wait("quarantined", "a test")
    host.sh(f"{AGENT} release quarantine")
    host.wait("idle")
    assert "start box-1 from 127.0.0.1" in host.journal("clusterkit-host-agent")


@pytest.mark.parametrize("words", ["id", "status;id", "release", "remote-root", "bash -i", ""])
def test_nothing_else_does_and_it_stands_in_the_journal(host: Host, words: str) -> None:
    said = host.ssh(f"'{words}'" if words else "")
    assert "the fleet's key may say" in said
    assert "uid=" not in said
    assert said.endswith("code=2\n")
    assert f"refused from 127.0.0.1: {words!r}" in host.journal("clusterkit-host-agent")


def test_the_key_opens_no_terminal_no_tunnel_and_only_from_the_head(host: Host) -> None:
    assert "PTY allocation request failed" in host.ssh("status", options="-tt")
    assert "administratively prohibited" in host.ssh(options="-W 127.0.0.1:22")
    assert "Permission denied (publickey)" in host.ssh("status", options="-b 127.0.0.2")
    # The same from the head's address, with the option left out.
    host.sh("sed -i 's/from=\"127.0.0.1\",//' /var/lib/clusterkit-agent/.ssh/authorized_keys")
    assert host.ssh("status", options="-b 127.0.0.2").endswith("code=0\n")
    assert host.play(roles=("host_agent",)).changed == 1
    assert "Permission denied (publickey)" in host.ssh("status", options="-b 127.0.0.2")


def test_sudo_has_one_rule(host: Host) -> None:
    def sudo(command: str, given: str = "status") -> str:
        words = f"printf '{given}\\n' | runuser -u clusterkit-agent -- sudo -n {command} 2>&1; echo code=$?"
        return host.sh(words, check=False)

    assert sudo(f"{AGENT} remote-root").endswith("code=0\n")
    other = AGENT.replace("/etc/clusterkit", "/tmp")
    for command in ("id", f"{AGENT} status", f"{AGENT} remote-root x", f"{other} remote-root", "-s", "-u ray id"):
        assert "a password is required" in sudo(command), command
    assert "the fleet's key may say" in sudo(f"{AGENT} remote-root", "release")
    # Nobody who is that user lets others in.
    for path in ("/var/lib/clusterkit-agent/x", "/var/lib/clusterkit-agent/.ssh/authorized_keys", SUDOERS):
        assert "ermission denied" in host.sh(f"runuser -u clusterkit-agent -- sh -c ': >>{path}' 2>&1", check=False)
    # Asked every few seconds: that would be all that the log has. It is, where the rules do not say otherwise.
    assert host.journal("sudo") == ""
    host.sh(f"sed -i '/log_allowed/d' {SUDOERS}")
    sudo(f"{AGENT} remote-root")
    assert f"COMMAND={AGENT} remote-root" in host.journal("sudo")
    assert "session opened for user root" in host.journal("sudo")
    assert host.play(roles=("host_agent",)).changed == 1


def test_a_host_with_another_key_is_not_spoken_to(host: Host) -> None:
    known = f"{FLEET}/known_hosts"
    host.sh(
        f"rm -f /tmp/k* && ssh-keygen -q -t ed25519 -N '' -f /tmp/k && echo box $(cut -d' ' -f1,2 /tmp/k.pub) >{known}"
    )
    # The connection that is kept open was made before.
    host.sh(f"systemctl restart {UNIT}")
    # Its BMC is silent, too.
    host.wait("off", "Host key verification failed")
    assert host.play(roles=("host_agent",)).changed == 1
    host.wait("idle")
    assert host.known() == {"box"}


def test_it_comes_back_after_a_kill(host: Host) -> None:
    killed, folder = host.pid(), host.sh(f"stat -c %i $(dirname {SOCKET})")
    host.sh(f"systemctl kill -s KILL {UNIT}")
    end = time.monotonic() + PATIENCE_S
    while host.pid() in ("0", killed) or '"ok": true' not in host.ask():
        assert time.monotonic() < end, host.sh(f"systemctl status {UNIT}", check=False)
        time.sleep(0.5)
    host.wait("idle")
    # What has the folder mounted still sees the socket.
    assert host.sh(f"stat -c %i $(dirname {SOCKET})") == folder
    assert host.play().changed == 0


def test_a_run_that_was_cut_before_the_restart_converges(host: Host) -> None:
    running = host.pid()
    host.sh("touch /etc/clusterkit/fleet.json")
    assert host.play().changed == 1
    assert host.pid() != running


def test_an_environment_that_somebody_changed_is_mended(host: Host) -> None:
    host.sh("rm -r /opt/clusterkit/fleet-env/lib/python3*/site-packages/clusterkit-*")
    assert host.play().changed > 0
    host.wait("idle")
    assert host.play().changed == 0


def test_a_daemon_that_cannot_start_says_why(host: Host) -> None:
    said = host.play(fact=cluster(start_timeout_s=-1), ok=False).text
    assert "pools.cpus.start_timeout_s" in said
    assert host.play().changed > 0
    host.wait("idle")


def test_hosts_that_left_leave_nothing_behind(host: Host) -> None:
    here = member("box", "127.0.0.1")
    host.sh(f"echo w9 ssh-ed25519 AAAA >>{FLEET}/known_hosts")
    host.play(fact=cluster(members=here))
    assert host.sh(f"ls {FLEET}/bmc").split() == ["box.json"]
    assert host.known() == {"box"}
    here["box"]["power"] = {"kind": "none"}
    host.play(fact=cluster(members=here), credentials={})
    assert sorted(host.sh(f"ls {FLEET}").split()) == ["id_ed25519", "known_hosts"]
    assert host.play(fact=cluster(members=here), credentials={}).changed == 0


def test_where_pools_become_fixed_all_of_it_goes(host: Host) -> None:
    fixed = cluster(autoscaled=False)
    assert host.play("--check", fact=fixed).changed > 0
    # The daemon's connection is still open: its processes are the user's.
    assert host.sh("pgrep -u clusterkit-agent", check=False)
    host.play(fact=fixed)
    assert host.left() == ""
    assert host.play(fact=fixed).changed == 0


def test_removal_leaves_nothing(host: Host) -> None:
    host.play()
    host.wait("idle")
    host.play(roles=("fleet", "host_agent"), tasks="remove")
    assert host.left() == ""
    assert host.sh("ls -A /etc/clusterkit /opt/clusterkit/bin").split() == ["/etc/clusterkit:", "/opt/clusterkit/bin:"]
    assert host.sh("command -v sudo").strip()
    assert host.play(roles=("fleet", "host_agent"), tasks="remove").changed == 0
