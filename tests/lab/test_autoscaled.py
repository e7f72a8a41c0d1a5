"""Hosts that come and go as Ray asks: from zero to two and back, powered by BMCs, and what can go wrong.

The tests are one cluster's life, in their order; each leaves it with both hosts off or idle, and nothing asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.lab.conftest import Maker, clusterkit, playbook, recap
from tests.lab.scaled_site import ScaledSite, scaled_site, until

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest.fixture(scope="module")
def site(lab_of: Maker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScaledSite]:
    with scaled_site(lab_of, tmp_path_factory.mktemp("scaled"), "scaletest", 2, clusterkit_apps=[]) as made:
        yield made


def test_from_bare_to_a_cluster_without_workers(site: ScaledSite) -> None:
    done = playbook("site.yml", site.inventory)
    assert done.returncode == 0, done.stdout[-6000:]
    assert site.nodes() == []
    assert set(site.states().values()) <= {"idle", "off"}
    again = playbook("site.yml", site.inventory)
    assert again.returncode == 0, again.stdout[-6000:]
    assert {host: count["changed"] for host, count in recap(again.stdout).items() if count["changed"]} == {}


def test_nobody_needs_them_so_they_go_off(site: ScaledSite) -> None:
    until(lambda: site.is_off("worker1") and site.is_off("worker2"), site.log)
    site.wait_for(worker1="off", worker2="off")


def test_load_comes_and_goes(site: ScaledSite) -> None:
    work = site.work(2, 5)
    site.wait_for(worker1="busy", worker2="busy")
    assert work.done() == sorted(site.address(host) for host in ("worker1", "worker2"))
    # Idle nodes leave Ray, are stopped, and their hosts go off.
    until(lambda: site.is_off("worker1") and site.is_off("worker2"), lambda: f"{site.told()}\n{site.log()}")
    site.wait_for(worker1="off", worker2="off")
    assert site.nodes() == []


def test_a_deploy_on_hosts_that_are_off_changes_nothing_and_wakes_them(site: ScaledSite) -> None:
    assert site.is_off("worker1")
    done = playbook("site.yml", site.inventory)
    assert done.returncode == 0, done.stdout[-6000:]
    counts = recap(done.stdout)
    assert counts.keys() == {"head", "worker1", "worker2", "localhost"}
    assert not any(count["changed"] or count["unreachable"] for count in counts.values()), counts
    site.wait_for(worker1="off", worker2="off")


def test_a_plan_wakes_nobody(site: ScaledSite) -> None:
    planned = clusterkit("plan", "-i", str(site.inventory), "--json")
    assert planned.returncode == 0, planned.stderr
    assert site.is_off("worker1")
    assert site.is_off("worker2")


def test_a_host_in_maintenance_stays_off_and_another_comes(site: ScaledSite) -> None:
    inventory = ("-i", str(site.inventory))
    held = clusterkit("host", "maintain", "worker1", "--reason", "new board", *inventory)
    assert held.returncode == 0, held.stderr
    assert "new board" in site.wait("worker1", "maintenance")["why"]
    assert site.is_off("worker1")
    assert site.work(1, 1).done() == [site.address("worker2")]
    more = site.work(2, 1)
    until(
        lambda: any("worker1" not in want["why"] and "new board" in want["why"] for want in site.ask("status")["open"]),
        site.told,
    )
    told = clusterkit("status", *inventory)
    assert re.search(r"worker1 .*maintenance.*new board", told.stdout), told.stdout
    assert re.search(r"1 more of cpu_pool are asked for", told.stdout), told.stdout
    assert site.is_off("worker1")
    back = clusterkit("host", "add", "worker1", *inventory)
    assert back.returncode == 0, back.stderr[-3000:]
    assert len(more.done()) == 2
    site.wait_for(worker1="off", worker2="off")


def test_the_head_s_key_opens_no_shell(site: ScaledSite) -> None:
    key = "/etc/clusterkit/fleet/id_ed25519"
    known = "-o UserKnownHostsFile=/etc/clusterkit/fleet/known_hosts -o HostKeyAlias=worker1 -o BatchMode=yes"
    login = f"ssh -i {key} {known} clusterkit-agent@{site.address('worker1')}"
    site.ask("reserve", hosts=["worker1"], owner="a test", seconds=120)
    site.wait("worker1", "idle")
    answer = json.loads(site.lab.on("head", f"{login} status"))
    assert answer["state"] == "stopped"
    for word in ("id", "sh -c id", "release", "status; id", "hold --owner x --reason y"):
        refused = site.lab.on("head", f"{login} '{word}'; echo code $?", check=False)
        assert "uid=" not in refused
        assert refused.endswith("code 2"), refused
    site.lab.on("worker1", "journalctl --sync")
    log = site.lab.on("worker1", "journalctl -q --no-pager -t clusterkit-host-agent")
    assert "refused from" in log
    assert "'id'" in log
    site.ask("free", hosts=["worker1"])
    site.wait_for(worker1="off")


# --------------------------------------------------------------------------- what goes wrong, and what status says


def rest(site: ScaledSite) -> None:
    """Until nothing is asked for and both hosts are off."""
    site.wait_for(worker1="off", worker2="off")
    assert site.ask("status")["open"] == []


def test_a_bmc_that_is_broken_and_another_host_comes(site: ScaledSite) -> None:
    with site.fault("worker1", "500"):
        work = site.work(2, 1)
        site.wait("worker2", "busy")
        told = until(lambda: site.host("worker1")["failures"] and site.host("worker1"), site.told)
        assert "cannot be switched on: the BMC https://" in told["why"]
        assert site.is_off("worker1")
    # Mended: it is tried again by itself.
    assert len(work.done()) == 2
    rest(site)


def test_a_bmc_that_lies_is_not_believed_and_not_used(site: ScaledSite) -> None:
    with site.fault("worker1", "lies"):
        until(lambda: "the BMC says that it is on" in site.host("worker1")["why"], site.told)
        assert site.work(1, 1).done() == [site.address("worker2")]
        assert site.is_off("worker1")
    rest(site)


def test_a_bmc_whose_certificate_is_another_s_is_told_nothing(site: ScaledSite) -> None:
    """The authority that is trusted is another one: no password goes out."""
    other = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=other -keyout /dev/null -out"
    path = site.lab.on("head", "ls /etc/clusterkit/fleet/*ca*").splitlines()[0]
    site.lab.on("head", f"cp -p {path} /root/kept && {other} {path} 2>/dev/null")
    try:
        until(lambda: "certificate verify failed" in str(site.host("worker1")["power_error"]), site.told)
    finally:
        site.lab.on("head", f"cp -p /root/kept {path}")
    until(lambda: site.host("worker1")["power_error"] is None, site.told)


def test_a_host_that_refuses_the_key_and_another_comes(site: ScaledSite) -> None:
    site.ask("reserve", hosts=["worker1"], owner="a test", seconds=300)
    site.wait("worker1", "idle")
    keys = "/var/lib/clusterkit-agent/.ssh/authorized_keys"
    site.lab.on("worker1", f"mv {keys} {keys}.kept")
    site.lab.on("head", "rm -f /run/clusterkit/fleet-ssh/*")
    site.ask("free", hosts=["worker1"])
    try:
        until(lambda: "Permission denied" in site.host("worker1")["why"], site.told)
        assert site.work(1, 1).done() == [site.address("worker2")]
    finally:
        site.lab.on("worker1", f"mv {keys}.kept {keys}")
    rest(site)


def test_a_host_that_hangs_in_its_boot_and_another_takes_its_place(site: ScaledSite) -> None:
    site.ask("hold", host="worker2", owner="a test", reason="so that worker1 is chosen")
    with site.fault("worker1", "hangs"):
        work = site.work(1, 1)
        site.wait("worker1", "booting")
        site.ask("release", host="worker2")
        assert "did not boot in 90 s" in site.wait("worker1", "quarantined")["why"]
        assert work.done() == [site.address("worker2")]
    site.lab.container("worker1").unpause()
    # The host is told, and keeps it itself from now on.
    until(lambda: site.lab.agent("worker1", "status")["quarantine"], site.told)
    released = clusterkit("host", "release", "worker1", "-i", str(site.inventory))
    assert released.returncode == 0, released.stderr[-3000:]
    rest(site)


def test_a_raylet_that_dies_is_cleared_away_and_replaced(site: ScaledSite) -> None:
    work = site.work(1, 20)
    (busy,) = until(lambda: [name for name, state in site.states().items() if state == "busy"], site.told)
    first = site.host(busy)["instance"]
    until(lambda: site.nodes() == [busy], site.told)
    site.lab.on(busy, "pkill -KILL -x raylet")
    work.process.wait()
    assert work.process.returncode != 0, "it ran there, once"
    again = site.work(1, 1)
    assert again.done()
    assert first not in {host["instance"] for host in site.ask("status")["hosts"]}
    rest(site)


def test_the_agent_is_killed_while_it_starts_a_node(site: ScaledSite) -> None:
    site.ask("hold", host="worker2", owner="a test", reason="so that worker1 is chosen")
    work = site.work(1, 1)
    site.wait("worker1", "starting")
    instance = site.host("worker1")["instance"]
    kill = "pgrep -f '[s]ystemctl.* start clusterkit-ray' && pkill -KILL -f '[h]ost-agent.*remote-root' && echo killed"
    until(lambda: "killed" in site.lab.on("worker1", kill, check=False), site.told)
    assert work.done() == [site.address("worker1")]
    assert instance is not None
    site.ask("release", host="worker2")
    rest(site)


def test_the_daemon_is_killed_while_a_host_comes(site: ScaledSite) -> None:
    work = site.work(2, 1)
    site.wait("worker1", "booting", "starting")
    before = {host["host"]: host["instance"] for host in site.ask("status")["hosts"]}
    site.lab.on("head", "systemctl kill -s KILL clusterkit-fleet")
    until(lambda: "clusterkit-fleet.service" in site.lab.on("head", "systemctl list-units --state=running"), site.log)
    assert len(work.done()) == 2
    assert before["worker1"]
    starts = site.lab.on("worker1", "journalctl -q --no-pager -t clusterkit-host-agent | grep -c ' start '")
    assert int(starts) >= 1
    rest(site)


def test_the_head_is_killed_while_hosts_come_and_the_new_one_is_served(site: ScaledSite) -> None:
    lost = site.work(2, 60)
    site.wait("worker1", "booting", "starting", "busy")
    site.lab.on("head", "docker kill $(docker ps -q --filter name=clusterkit)")
    lost.process.wait()
    until(lambda: site.lab.agent("head", "status")["state"] == "running", site.log)
    # Ray's own hour is what it would wait for workers of the old head.
    assert len(site.work(2, 1).done()) == 2
    rest(site)


def test_a_full_disk_holds_up_and_is_said(site: ScaledSite) -> None:
    folder = "/var/lib/clusterkit/fleet"
    site.lab.on("head", f"cp -a {folder} /root/record && mount -t tmpfs -o size=16k tmpfs {folder}")
    site.lab.on("head", f"cp -a /root/record/. {folder}; dd if=/dev/zero of={folder}/full bs=1k count=64", check=False)
    try:
        work = site.work(1, 1)
        trouble = until(lambda: site.ask("status")["trouble"] or "cannot be written" in site.log(), site.told)
        assert trouble
        assert site.is_off("worker1")
        assert site.is_off("worker2")
    finally:
        site.lab.on("head", f"umount {folder}")
    assert len(work.done()) == 1
    rest(site)


def test_hosts_that_a_deploy_left_out_wait_for_the_next(site: ScaledSite) -> None:
    done = clusterkit("deploy", "-i", str(site.inventory), "--skip-off", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)["hosts"]
    assert not any(count["changed"] or count["unreachable"] for count in counts.values()), counts
    assert site.is_off("worker1")
    assert site.is_off("worker2")
    site.wait_for(worker1="stale", worker2="stale")
    work = site.work(1, 1)
    until(lambda: any("a deploy left it out" in want["why"] for want in site.ask("status")["open"]), site.told)
    whole = clusterkit("deploy", "-i", str(site.inventory), "--json")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert len(work.done()) == 1
    rest(site)


def test_a_node_with_another_token_does_not_join_and_its_host_is_kept_out(site: ScaledSite) -> None:
    token = "/var/lib/clusterkit/node/token"
    site.ask("hold", host="worker2", owner="a test", reason="so that worker1 is chosen")
    site.ask("reserve", hosts=["worker1"], owner="a test", seconds=300)
    site.wait("worker1", "idle")
    site.lab.on("worker1", f"cp -p {token} {token}.kept && printf wrong-wrong-wrong-wrong-wrong-wrong > {token}")
    site.ask("free", hosts=["worker1"])
    work = site.work(1, 1)
    try:
        told = until(
            lambda: site.host("worker1")["failures"] and site.host("worker1"), lambda: site.told() + site.log(), 400
        )
        assert "start" in told["why"]
        site.ask("release", host="worker2")
        assert work.done() == [site.address("worker2")]
    finally:
        site.lab.on("worker1", f"mv {token}.kept {token}")
        clusterkit("host", "release", "worker1", "-i", str(site.inventory))
    rest(site)


def test_removal_leaves_nothing(site: ScaledSite) -> None:
    site.ask("reserve", hosts=["worker1", "worker2"], owner="a test", seconds=600)
    site.wait_for(worker1="idle", worker2="idle")
    done = clusterkit("remove", "-i", str(site.inventory), "--yes")
    assert done.returncode == 0, done.stderr[-3000:]
    left = "ls -d /etc/clusterkit /opt/clusterkit /run/clusterkit /etc/sudoers.d/clusterkit-agent 2>/dev/null"
    for host in ("head", "worker1"):
        assert site.lab.on(host, left, check=False) == ""
        assert site.lab.on(host, "getent passwd clusterkit-agent", check=False) == ""
