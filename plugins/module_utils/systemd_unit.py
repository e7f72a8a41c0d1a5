"""A systemd unit that is to run with its present files and to answer: what it lacks, and how it gets there."""

from __future__ import annotations

import os
import subprocess
import time

SHOWN = "LoadState,ActiveState,UnitFileState,NeedDaemonReload,ExecMainStartTimestampMonotonic"


class Problem(Exception):
    """It cannot be done; the text says what to do."""


def plan(unit, times, answers):
    """What is not as wanted: [(wanted, actual)].

    unit: `systemctl show` as a dict; times: {path: seconds since boot of its last change}; answers: whether it does.
    """
    found = []
    if unit.get("UnitFileState") != "enabled":
        found.append(("enabled", unit.get("UnitFileState") or "not installed"))
    if unit.get("ActiveState") != "active":
        return found + [("running", unit.get("ActiveState") or "not running")]
    began = int(unit.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    newer = sorted(path for path, changed in times.items() if changed > began)
    if newer:
        found.append(("restarted for %s" % ", ".join(newer), "running without it"))
    elif unit.get("NeedDaemonReload") == "yes":
        found.append(("restarted", "running an older unit"))
    elif not answers:
        found.append(("answering", "silent"))
    return found


def systemctl(*words):
    """(exit status, stdout, stderr). Raises FileNotFoundError on a host without systemd."""
    done = subprocess.run(
        ["systemctl"] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace").strip()


def must(verb, name):
    code, _out, err = systemctl(verb, name)
    if code != 0:
        raise Problem("systemctl %s %s failed: %s\n%s" % (verb, name, err, last_words(name)))


def show(name):
    _code, out, _err = systemctl("show", name, "-p", SHOWN)
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def last_words(name):
    done = subprocess.run(
        ["journalctl", "-q", "--no-pager", "-o", "cat", "-n", "8", "-u", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return done.stdout.decode("utf-8", "replace").strip()[-1500:]


def changed_at(paths):
    """{path: seconds since boot of its last change} of those that are there."""
    offset = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    return {path: os.stat(path).st_mtime - offset for path in paths if os.path.exists(path)}


def restart(name, missing):
    """Enable and (re)start it, as its file is now. missing: what is said where there is no such unit."""
    systemctl("daemon-reload")
    if show(name).get("LoadState") == "not-found":
        raise Problem(missing)
    must("enable", name)
    must("restart", name)


def wait(name, place, silence, timeout_s, failed_ends_it=False):
    """Until it answers, in seconds. place: where, in words; silence(): why it does not, empty where it does.

    failed_ends_it: one that systemd has given up is not waited for.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        why = silence()
        if not why:
            return
        if time.monotonic() > deadline or (failed_ends_it and show(name).get("ActiveState") == "failed"):
            said = "%s does not answer %s: %s. Its last words:\n%s"
            raise Problem(said % (name, place, why, last_words(name)))
        time.sleep(0.2)


def report(module, name, found):
    """Ends a module with what was not as wanted: [(wanted, actual)]."""
    changes = [{"what": "unit", "name": name, "wanted": one, "actual": other} for one, other in found]
    before = "".join("%s\n" % other for _one, other in found)
    after = "".join("%s\n" % one for one, _other in found)
    module.exit_json(changed=bool(found), changes=changes, diff={"before": before, "after": after})
