#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_known_hosts
short_description: The SSH host keys that the fleet daemon believes, by host name
description:
  - Merges what was read of some hosts into a C(known_hosts) file that holds nothing else. A host with keys in I(keys)
    gets exactly those; one of I(hosts) without any keeps its own; all others lose theirs.
author:
  - clusterkit
options:
  path:
    description: The file. Its folder has to be there, but for check mode.
    type: path
    required: true
  hosts:
    description: Names of all hosts that may be known.
    type: list
    elements: str
    required: true
  keys:
    description: Public keys by host name, each as C(type base64).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Note the host keys
  fleet_known_hosts:
    path: /etc/clusterkit/fleet/known_hosts
    hosts: [w1, w2]
    keys:
      w1: ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB4f"]
"""

RETURN = r"""
changes:
  description: Hosts whose keys differ, each with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
"""

import os
import re
import tempfile

from ansible.module_utils.basic import AnsibleModule

# A name stands before the first blank of a line, where `,`, `*`, `!` and `|` mean something (sshd(8), SSH_KNOWN_HOSTS).
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/]+=*")


class Problem(Exception):
    """It cannot be done; the text says what to do."""


def plan(have, hosts, keys):
    """(the keys by host as they are to be, [{what, name, wanted, actual}]).

    have, keys: {host: [key]}; hosts: all that may be known.
    """
    want = {host: sorted(set(keys.get(host) or have.get(host, ()))) for host in hosts}
    want = {host: lines for host, lines in want.items() if lines}
    changes = []
    for host in sorted(set(have) | set(want)):
        before, after = sorted(have.get(host, ())), want.get(host, [])
        if before != after:
            change = {"what": "host key", "name": host, "wanted": told(after), "actual": told(before)}
            changes.append(change)
    return want, changes


def told(lines):
    """The kinds of keys, and where one ends: enough to see that it is another."""
    return ", ".join("%s …%s" % (line.split(" ")[0], line[-12:]) for line in lines) or "none"


def check(hosts, keys):
    for host in hosts:
        if not NAME.fullmatch(host):
            raise Problem("%r is no name that known_hosts can hold; rename the host" % host)
    for host, lines in sorted(keys.items()):
        for line in lines:
            if not KEY.fullmatch(line):
                raise Problem("%s has a host key that is none: %.60r" % (host, line))


def parse(text):
    found = {}
    for line in text.splitlines():
        host, _, key = line.partition(" ")
        if key and not host.startswith("#"):
            found.setdefault(host, []).append(key)
    return found


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return parse(handle.read())
    except FileNotFoundError:
        return {}


def write(path, want):
    handle, temporary = tempfile.mkstemp(prefix=".known_hosts.", dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write("# Ansible managed: keys of the hosts that the fleet daemon logs in to\n")
            for host in sorted(want):
                out.write("".join("%s %s\n" % (host, key) for key in want[host]))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "hosts": {"type": "list", "elements": "str", "required": True},
            "keys": {"type": "dict", "required": True, "no_log": False},
        },
        supports_check_mode=True,
    )
    path, hosts, keys = (module.params[key] for key in ("path", "hosts", "keys"))
    try:
        check(hosts, keys)
        want, changes = plan(read(path), hosts, keys)
        if changes and not module.check_mode:
            write(path, want)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or path, error.strerror or error))
    before = "".join("%s: %s\n" % (change["name"], change["actual"]) for change in changes)
    after = "".join("%s: %s\n" % (change["name"], change["wanted"]) for change in changes)
    module.exit_json(changed=bool(changes), changes=changes, diff={"before": before, "after": after})


if __name__ == "__main__":
    main()
