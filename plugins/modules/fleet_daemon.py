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

from ansible.module_utils import systemd_unit
from ansible.module_utils.basic import AnsibleModule

REQUEST = b'{"v": 1, "verb": "status"}\n'
ANSWER_S = 5.0


def plan_absent(unit, there):
    """What is not as wanted of one that is to go: [(wanted, actual)]. there: whether it has a file."""
    found = [("stopped", unit["ActiveState"])] if unit.get("ActiveState") in ("active", "activating", "failed") else []
    return found + ([("gone", "there")] if there else [])


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
    systemd_unit.restart(name, "this host has no unit %s" % name)
    systemd_unit.wait(name, "on %s" % path, lambda: silence(path), timeout_s)


def take_away(name, file, unit):
    if unit.get("LoadState") != "not-found":
        systemd_unit.must("stop", name)
        systemd_unit.systemctl("disable", name)
    if os.path.lexists(file):
        os.unlink(file)
    systemd_unit.systemctl("daemon-reload")
    systemd_unit.systemctl("reset-failed", name)


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
        unit = systemd_unit.show(name)
        if params["state"] == "present":
            answers = unit.get("ActiveState") == "active" and not silence(params["socket"])
            found = systemd_unit.plan(unit, systemd_unit.changed_at(params["files"] + [file]), answers)
        else:
            found = plan_absent(unit, os.path.lexists(file))
        if found and not module.check_mode:
            if params["state"] == "present":
                run(name, params["socket"], params["timeout_s"])
            else:
                take_away(name, file, unit)
    except systemd_unit.Problem as problem:
        module.fail_json(msg=str(problem))
    except FileNotFoundError:
        module.fail_json(msg="this host has no systemd, which the fleet daemon is run with")
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or name, error.strerror or error))
    systemd_unit.report(module, name, found)


if __name__ == "__main__":
    main()
