#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: service_user
short_description: The user that runs a service, made where there is none
description:
  - Makes a system user with its own home and no login. It is known by that home - a user of the same name with
    another home is the site's own, and is used as it is and never changed or taken away.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes the user and its home away.
    type: str
    choices: [present, absent]
    default: present
  name:
    description: The user's name.
    type: str
    required: true
  home:
    description: Its home.
    type: path
    required: true
  shell:
    description: Its shell.
    type: path
    default: /usr/sbin/nologin
  keep:
    description: A folder; while the user owns it with something in it, C(state=absent) leaves the user there.
    type: path
"""

EXAMPLES = r"""
- name: Make the user that runs Ray
  service_user:
    name: ray
    home: /var/lib/clusterkit/home
"""

RETURN = r"""
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
ours:
  description: Whether the user is one that this module made.
  returned: always
  type: bool
"""

import os
import pwd
import shutil
import stat
import subprocess

from ansible.module_utils.basic import AnsibleModule


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def plan(have, want):
    """What differs: [{what, name, wanted, actual}].

    have: {home, shell, home_there}, or None where there is no such user; want: {name, home, shell}.
    """
    name = want["name"]
    if have is None:
        wanted = {"home": want["home"], "shell": want["shell"]}
        return [{"what": "user", "name": name, "wanted": wanted, "actual": "missing"}]
    if not ours(have, want):
        return []
    found = []
    if have["shell"] != want["shell"]:
        found.append({"what": "user", "name": name, "wanted": want["shell"], "actual": have["shell"]})
    if not have["home_there"]:
        found.append({"what": "folder", "name": want["home"], "wanted": "the home of %s" % name, "actual": "missing"})
    return found


def ours(have, want):
    return have is not None and os.path.normpath(have["home"]) == os.path.normpath(want["home"])


def read(name):
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    there = os.path.isdir(entry.pw_dir)
    return {"home": entry.pw_dir, "shell": entry.pw_shell, "home_there": there, "uid": entry.pw_uid}


def run(*command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        said = done.stdout.decode("utf-8", "replace").strip()
        raise Problem("%s failed: %s" % (" ".join(command), said or "exit code %d" % done.returncode))


def make_home(name, home):
    """Private, and empty: what a skeleton holds is for people."""
    entry = pwd.getpwnam(name)
    parent = os.path.dirname(home)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    for part in os.path.relpath(os.path.dirname(home), parent).split("/"):
        parent = os.path.normpath(os.path.join(parent, part))
        if not os.path.isdir(parent):
            os.mkdir(parent)
            os.chmod(parent, 0o755)
    if not os.path.isdir(home):
        os.mkdir(home, 0o700)
        os.chown(home, entry.pw_uid, entry.pw_gid)


def present(want, check):
    have = read(want["name"])
    changes = plan(have, want)
    if changes and not check:
        if have is None:
            command = ["useradd", "--system", "--user-group", "--no-create-home"]
            run(*command, "--home-dir", want["home"], "--shell", want["shell"], want["name"])
        elif have["shell"] != want["shell"]:
            run("usermod", "--shell", want["shell"], want["name"])
        make_home(want["name"], want["home"])
    return changes, have is None or ours(have, want)


def owns_below(folder, uid):
    """Is there anything below `folder` that belongs to the user, or anything in a folder of the user's?"""
    if os.path.isdir(folder) and os.listdir(folder) and os.stat(folder).st_uid == uid:
        return True
    for base, folders, files in os.walk(folder):
        for name in folders + files:
            if os.lstat(os.path.join(base, name)).st_uid == uid:
                return True
    return False


def absent(want, keep, check):
    have = read(want["name"])
    if not ours(have, want):
        return [], False
    changes = []
    if have["home_there"]:
        changes.append({"what": "folder", "name": want["home"], "wanted": "gone", "actual": "there"})
    # Its number would be given to the next user that somebody makes, and the weights with it.
    stays = bool(keep) and owns_below(keep, have["uid"])
    if not stays:
        changes.append({"what": "user", "name": want["name"], "wanted": "gone", "actual": "there"})
    if not check:
        if have["home_there"] and stat.S_ISDIR(os.lstat(want["home"]).st_mode):
            shutil.rmtree(want["home"])
        if not stays:
            run("userdel", want["name"])
    return changes, True


def difference(changes):
    """Ansible's diff: a line per change."""

    def lines(key):
        return "".join("%s %s: %s\n" % (item["what"], item["name"], said(item[key])) for item in changes)

    return {"before": lines("actual"), "after": lines("wanted")}


def said(value):
    return " ".join("%s=%s" % pair for pair in sorted(value.items())) if isinstance(value, dict) else value


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "name": {"type": "str", "required": True},
            "home": {"type": "path", "required": True},
            "shell": {"type": "path", "default": "/usr/sbin/nologin"},
            "keep": {"type": "path"},
        },
        supports_check_mode=True,
    )
    given = module.params
    want = {key: given[key] for key in ("name", "home", "shell")}
    try:
        if given["state"] == "present":
            changes, mine = present(want, module.check_mode)
        else:
            changes, mine = absent(want, given["keep"], module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or given["name"], error.strerror))
    module.exit_json(changed=bool(changes), changes=changes, ours=mine, diff=difference(changes))


if __name__ == "__main__":
    main()
