#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_key
short_description: The fleet daemon's SSH key on the head, made once
description:
  - Makes a key (ed25519, without a passphrase) with C(ssh-keygen) where there is none, in a folder that only root may
    enter, and returns its public half. The private half never leaves the host and is in no output.
  - The private half has its name only when it is whole, and the public one is derived from it each time - a run that
    was cut in between converges.
author:
  - clusterkit
options:
  path:
    description: Where it lies. Its folder is the daemon's alone, and is made.
    type: path
    required: true
  make:
    description: Whether to make one where there is none. Else nothing is returned for it.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: Make or read the fleet's key
  fleet_key:
    path: /etc/clusterkit/fleet/id_ed25519
"""

RETURN = r"""
public:
  description: The public half, as C(type base64); empty where there is no key.
  returned: always
  type: str
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
"""

import os
import shutil
import stat
import subprocess
import tempfile

from ansible.module_utils.basic import AnsibleModule

KEY = 0o600
FOLDER = 0o700


class Problem(Exception):
    """It cannot be done; the text says what to do."""


def plan(have, path):
    """What differs: [{what, name, wanted, actual}].

    have: modes of the folder and of the key, None where one is not there, as {"folder", "key"}.
    """
    found = []
    for key, what, name, wanted in (("folder", "folder", os.path.dirname(path), FOLDER), ("key", "secret", path, KEY)):
        if have[key] != wanted:
            actual = "missing" if have[key] is None else "%04o" % have[key]
            found.append({"what": what, "name": name, "wanted": "%04o" % wanted, "actual": actual})
    return found


def mode(path):
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
        raise Problem("%s is a link, or somebody else's: take it away, and run again" % path)
    return stat.S_IMODE(found.st_mode)


def read(path):
    return {"folder": mode(os.path.dirname(path)), "key": mode(path)}


def keygen(*words):
    try:
        done = subprocess.run(
            ["ssh-keygen"] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise Problem("this host has no ssh-keygen: install the distribution's OpenSSH client")
    if done.returncode != 0:
        raise Problem("ssh-keygen failed: %s" % done.stderr.decode("utf-8", "replace").strip()[-500:])
    return done.stdout.decode("utf-8", "replace").strip()


def put_right(path, have):
    folder = os.path.dirname(path)
    if have["folder"] is None:
        os.makedirs(os.path.dirname(folder), mode=0o755, exist_ok=True)
        os.mkdir(folder, FOLDER)
    os.chmod(folder, FOLDER)
    if have["key"] is None:
        work = tempfile.mkdtemp(prefix=".key-", dir=folder)
        try:
            keygen("-q", "-t", "ed25519", "-N", "", "-C", "clusterkit-fleet", "-f", os.path.join(work, "key"))
            os.replace(os.path.join(work, "key"), path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    os.chmod(path, KEY)


def public_half(path):
    """Empty where there is no key that ssh-keygen would read."""
    return " ".join(keygen("-y", "-P", "", "-f", path).split()[:2]) if mode(path) == KEY else ""


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "make": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    path, make = module.params["path"], module.params["make"]
    try:
        have = read(path)
        changes = plan(have, path) if make or have["key"] is not None else []
        if changes and not module.check_mode:
            put_right(path, have)
        public = public_half(path)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or path, error.strerror or error))
    before = "".join("%s: %s\n" % (change["name"], change["actual"]) for change in changes)
    after = "".join("%s: %s\n" % (change["name"], change["wanted"]) for change in changes)
    module.exit_json(changed=bool(changes), public=public, changes=changes, diff={"before": before, "after": after})


if __name__ == "__main__":
    main()
