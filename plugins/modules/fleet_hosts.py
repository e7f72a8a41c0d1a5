#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_hosts
short_description: What the fleet daemon knows of its hosts, and what people tell it
description:
  - Speaks to the fleet daemon's socket on the head host; docs/autoscaler.md describes it.
  - Where no daemon is installed yet, it says so and changes nothing.
author:
  - clusterkit
options:
  socket:
    description: The daemon's socket.
    type: path
    required: true
  verb:
    description:
      - C(status) only looks. C(reserve) keeps hosts free for whoever works on them, and waits until those that are
        off are on. C(free) ends that, and so does C(converged) for hosts that are as the inventory says. C(skip)
        leaves out what is off until a deploy has taken it along.
        C(hold) and C(release) are maintenance.
    type: str
    choices: [status, reserve, free, converged, skip, hold, release]
    default: status
  hosts:
    description: Which ones; empty for all where it only looks.
    type: list
    elements: str
    default: []
  owner:
    description: Who, for C(reserve) and C(hold).
    type: str
  reason:
    description: Why, for C(hold).
    type: str
  only:
    description: For C(release), what ends; empty for the maintenance and the quarantine that the daemon keeps.
    type: str
    choices: ["", maintenance]
    default: ""
  seconds:
    description: For C(reserve), how long at most, should nobody end it.
    type: int
    default: 7200
  timeout_s:
    description: For C(reserve), how long hosts may take to come, in seconds.
    type: int
    default: 3600
"""

EXAMPLES = r"""
- name: Keep the hosts of this run free
  fleet_hosts:
    socket: /run/clusterkit/fleet/fleet.sock
    verb: reserve
    hosts: "{{ ansible_play_hosts_all }}"
    owner: a deploy
"""

RETURN = r"""
running:
  description: Whether a daemon answers.
  returned: always
  type: bool
hosts:
  description: What the daemon says of each host, by name.
  returned: always
  type: dict
pools:
  description: Of each pool, how many C(nodes) it has, and its C(max).
  returned: always
  type: dict
open:
  description: What Ray asks for and no host can serve, with C(pool), C(count) and C(why).
  returned: always
  type: list
  elements: dict
trouble:
  description: What keeps the daemon from its work; null for nothing.
  returned: always
  type: str
off:
  description: Of the named hosts, those that are off by policy, and why.
  returned: always
  type: dict
"""

import errno
import json
import socket
import time

from ansible.module_utils.basic import AnsibleModule

VERSION = 1
ANSWER_LIMIT = 64 * 1024 * 1024
PATIENCE_S = 30
LOOK_S = 1
ASKED_S = 60
# A host without an answer in one of these is where policy or people have put it; any other is a fault.
BY_POLICY = ("off", "maintenance", "quarantined", "stale")


class Problem(Exception):
    """It cannot be done; the text says what to do."""


class NotInstalled(Problem):
    """There is no such socket."""


def ask(path, **request):
    """The daemon's answer to one request."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(path)
            connection.sendall(json.dumps(dict(request, v=VERSION)).encode() + b"\n")
            with connection.makefile("rb") as stream:
                answer = json.loads(stream.readline(ANSWER_LIMIT))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotInstalled(str(error)) from error
        raise Problem(
            "the fleet daemon does not answer on %s: %s\nFix: systemctl status clusterkit-fleet; journalctl "
            "-u clusterkit-fleet, on the head" % (path, error)
        ) from error
    except ValueError as error:
        raise Problem("the fleet daemon's answer cannot be read: %s" % error) from error
    if answer.get("ok") is not True:
        raise Problem(str(answer.get("error", "no reason given")))
    return answer


def picture(answer, names):
    """What the module returns of a status."""
    hosts = {host["host"]: host for host in answer["hosts"]}
    left = {name: hosts[name]["why"] for name in names if name in hosts and is_off(hosts[name])}
    told = {key: answer[key] for key in ("pools", "open", "trouble")}
    return dict(told, running=True, hosts=hosts, off=left)


def is_off(host):
    return not host["answers"] and host["state"] in BY_POLICY


def comes(host):
    """Whether a reserved host that does not answer will, as far as the daemon knows."""
    return not host["reachable"] and (host["obstacle"] is None or host["phase"] is not None)


def wait(path, names, pending, timeout_s):
    """The status once none of the named hosts is `pending` any more. One that did not come stays in it as it is."""
    end = time.monotonic() + timeout_s
    while True:
        answer = ask(path, verb="status")
        if not any(pending(host) for host in answer["hosts"] if host["host"] in names) or time.monotonic() > end:
            return answer
        time.sleep(LOOK_S)


def carry_out(given, check_mode):
    path, verb = given["socket"], given["verb"]
    names = given["hosts"]
    # A daemon that has just started knows nothing of hosts that it has not asked.
    answer = wait(path, names, lambda host: not host["asked"], ASKED_S)
    if check_mode or verb == "status":
        return dict(picture(answer, names), changed=False)
    # A new host comes into the daemon's configuration later in the run.
    names = [host["host"] for host in answer["hosts"] if host["host"] in names]
    changed = False
    if verb == "reserve":
        ask(path, verb="reserve", hosts=names, owner=given["owner"], seconds=given["seconds"])
        answer = wait(path, names, comes, given["timeout_s"])
    elif verb in ("free", "converged"):
        ask(path, verb="free", hosts=names, converged=verb == "converged")
    elif verb == "skip":
        out = [host["host"] for host in answer["hosts"] if host["host"] in names and is_off(host)]
        ask(path, verb="skip", hosts=out)
        ask(
            path,
            verb="reserve",
            hosts=[name for name in names if name not in out],
            owner=given["owner"],
            seconds=given["seconds"],
        )
    else:
        for name in names:
            more = {"owner": given["owner"], "reason": given["reason"]} if verb == "hold" else {}
            if given["only"]:
                more["only"] = given["only"]
            changed = ask(path, verb=verb, host=name, **more)["changed"] or changed
        answer = ask(path, verb="status")
    return dict(picture(answer, names), changed=changed)


def main():
    module = AnsibleModule(
        argument_spec={
            "socket": {"type": "path", "required": True},
            "verb": {
                "type": "str",
                "choices": ["status", "reserve", "free", "converged", "skip", "hold", "release"],
                "default": "status",
            },
            "hosts": {"type": "list", "elements": "str", "default": []},
            "owner": {"type": "str"},
            "reason": {"type": "str"},
            "only": {"type": "str", "choices": ["", "maintenance"], "default": ""},
            "seconds": {"type": "int", "default": 7200},
            "timeout_s": {"type": "int", "default": 3600},
        },
        required_if=[
            ("verb", "reserve", ("owner",)),
            ("verb", "skip", ("owner",)),
            ("verb", "hold", ("owner", "reason")),
        ],
        supports_check_mode=True,
    )
    try:
        module.exit_json(**carry_out(module.params, module.check_mode))
    except NotInstalled:
        module.exit_json(changed=False, running=False, hosts={}, pools={}, open=[], trouble=None, off={})
    except Problem as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
