#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_daemon
short_description: The fleet daemon's unit, running with its present files, and answering on its socket
description:
  - Enables and starts a systemd unit. Restarts it where a file that it reads at its start is newer than its start,
    where systemd has not read the unit anew, or where nothing answers C(status) on its socket; so a run that was cut in
    between converges.
  - Then waits until it answers, and fails with the unit's own last words where it does not.
  - C(state=absent) stops and disables the unit, and takes its file away.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes the unit away.
    type: str
    choices: [present, absent]
    default: present
  unit:
    description: The unit's file.
    type: path
    required: true
  files:
    description: What else it reads at its start.
    type: list
    elements: path
    default: []
  socket:
    description: Where it is to answer. Required for I(state=present).
    type: path
  timeout_s:
    description: How long it may take to answer, in seconds.
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: Run the daemon
  fleet_daemon:
    unit: /etc/systemd/system/clusterkit-fleet.service
    files: [/etc/clusterkit/fleet.json]
    socket: /run/clusterkit/fleet/fleet.sock
"""

RETURN = r"""
changes:
  description: What was not as wanted, with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
"""

import json
import os
import socket
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule

SHOWN = "LoadState,ActiveState,UnitFileState,NeedDaemonReload,ExecMainStartTimestampMonotonic"
REQUEST = b'{"v": 1, "verb": "status"}\n'
ANSWER_S = 5.0


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


def plan_absent(unit, there):
    """The same for one that is to go. there: whether it has a file."""
    found = [("stopped", unit["ActiveState"])] if unit.get("ActiveState") in ("active", "activating", "failed") else []
    return found + ([("gone", "there")] if there else [])


def systemctl(*words):
    done = subprocess.run(
        ["systemctl"] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace").strip()


def must(*words):
    code, _out, err = systemctl(*words)
    if code != 0:
        raise Problem("systemctl %s failed: %s\n%s" % (" ".join(words), err, last_words(words[-1])))


def show(unit):
    _code, out, _err = systemctl("show", unit, "-p", SHOWN)
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def last_words(unit):
    done = subprocess.run(
        ["journalctl", "-q", "--no-pager", "-o", "cat", "-n", "8", "-u", unit],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return done.stdout.decode("utf-8", "replace").strip()[-1500:]


def changed_at(paths):
    """{path: seconds since boot of its last change} of those that are there."""
    offset = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    return {path: os.stat(path).st_mtime - offset for path in paths if os.path.exists(path)}


def silence(path):
    """Why it does not answer; empty where it does."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(ANSWER_S)
            client.connect(path)
            client.sendall(REQUEST)
            with client.makefile("rb") as stream:
                answer = json.loads(stream.readline().decode("utf-8", "replace"))
        return "" if answer.get("ok") else str(answer.get("error") or "an answer of another kind")
    except (OSError, ValueError, AttributeError) as error:
        return str(error) or type(error).__name__


def run(name, path, timeout_s):
    """Enable and (re)start it, and wait until it answers."""
    systemctl("daemon-reload")
    if show(name).get("LoadState") == "not-found":
        raise Problem("this host has no unit %s" % name)
    must("enable", name)
    must("restart", name)
    deadline = time.monotonic() + timeout_s
    while True:
        why = silence(path)
        if not why:
            return
        if time.monotonic() > deadline:
            raise Problem("%s does not answer on %s: %s. Its last words:\n%s" % (name, path, why, last_words(name)))
        time.sleep(0.2)


def take_away(name, file, unit):
    if unit.get("LoadState") != "not-found":
        must("stop", name)
        systemctl("disable", name)
    if os.path.lexists(file):
        os.unlink(file)
    systemctl("daemon-reload")
    systemctl("reset-failed", name)


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "unit": {"type": "path", "required": True},
            "files": {"type": "list", "elements": "path", "default": []},
            "socket": {"type": "path"},
            "timeout_s": {"type": "int", "default": 30},
        },
        required_if=[("state", "present", ("socket",))],
        supports_check_mode=True,
    )
    params = module.params
    file, name = params["unit"], os.path.basename(params["unit"])
    try:
        unit = show(name)
        if params["state"] == "present":
            answers = unit.get("ActiveState") == "active" and not silence(params["socket"])
            found = plan(unit, changed_at(params["files"] + [file]), answers)
        else:
            found = plan_absent(unit, os.path.lexists(file))
        if found and not module.check_mode:
            if params["state"] == "present":
                run(name, params["socket"], params["timeout_s"])
            else:
                take_away(name, file, unit)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except FileNotFoundError:
        module.fail_json(msg="this host has no systemd, which the fleet daemon is run with")
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or name, error.strerror or error))
    changes = [{"what": "unit", "name": name, "wanted": one, "actual": other} for one, other in found]
    before = "".join("%s\n" % other for _one, other in found)
    after = "".join("%s\n" % one for one, _other in found)
    module.exit_json(changed=bool(found), changes=changes, diff={"before": before, "after": after})


if __name__ == "__main__":
    main()
