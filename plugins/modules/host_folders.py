#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: host_folders
short_description: All folders of a role, in one task
description:
  - Makes each folder with its owner, group and mode, and corrects those that have others. Contents are left alone.
  - Parents that are missing are made with mode 0755.
  - C(state=absent) takes the folders away with what is in them, but for the paths in I(keep) and for what is
    mounted below them; of a link to a folder, what is behind it. System folders such as C(/opt) or a home are
    refused.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes them away.
    type: str
    choices: [present, absent]
    default: present
  folders:
    description: What is to be there. Required for I(state=present).
    type: list
    elements: dict
    suboptions:
      path:
        description: Where it lies.
        type: path
        required: true
      owner:
        description: Its user; left alone where it is not given.
        type: str
      group:
        description: Its group; the user's own group where only I(owner) is given.
        type: str
      mode:
        description: Its mode in octal, as text; left alone where it is not given.
        type: str
  paths:
    description: What is to go, folders and files. Required for I(state=absent).
    type: list
    elements: path
  keep:
    description: >-
      Paths at or below I(paths) that stay, with their parents. An empty folder among them goes all the same.
    type: list
    elements: path
    default: []
"""

EXAMPLES = r"""
- name: Make the folders
  host_folders:
    folders:
      - {path: /var/lib/clusterkit, owner: root, mode: "0755"}
      - {path: /var/lib/clusterkit/node, owner: ray, mode: "0750"}

- name: Take the folders away, but for the weights
  host_folders:
    state: absent
    paths: [/var/lib/clusterkit]
    keep: [/var/lib/clusterkit/models]
"""

RETURN = r"""
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
kept:
  description: What stays of what was to go - paths in I(keep) that hold something, mounts, links.
  returned: state is absent
  type: list
  elements: str
"""

import grp
import os
import pwd
import stat

from ansible.module_utils.basic import AnsibleModule

# Whoever names one of these means something in it.
SYSTEM_FOLDERS = frozenset(
    "/bin /boot /dev /etc /home /lib /lib64 /media /mnt /opt /proc /root /run /sbin /srv /sys /tmp /usr /usr/local "
    "/usr/local/bin /usr/local/lib /usr/local/share /usr/share /var /var/cache /var/lib /var/log /var/opt /var/run "
    "/var/spool /var/tmp".split()
)


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def plan(have, want):
    """What differs: [{what, name, wanted, actual}], in the order of `want`.

    have: {path: {owner, group, mode} or None where there is nothing}; want: [{path, owner, group, mode}], where
    None means that it does not matter.
    """
    found = []
    for folder in want:
        wanted = {key: folder[key] for key in ("owner", "group", "mode") if folder.get(key) is not None}
        actual = have[folder["path"]]
        if actual is None:
            found.append({"what": "folder", "name": folder["path"], "wanted": wanted, "actual": "missing"})
            continue
        other = {key: value for key, value in wanted.items() if actual[key] != value}
        if other:
            found.append(
                {
                    "what": "folder",
                    "name": folder["path"],
                    "wanted": other,
                    "actual": {key: actual[key] for key in other},
                }
            )
    return found


def normal(folder):
    """As `plan` compares it: the mode with four digits, the group that goes with the owner."""
    path, mode, owner, group = folder["path"], folder.get("mode"), folder.get("owner"), folder.get("group")
    if not os.path.isabs(path):
        raise Problem("%s is no absolute path" % path)
    if mode is not None:
        try:
            mode = "%04o" % int(mode, 8)
        except ValueError:
            raise Problem("%s: the mode %r is no octal number, such as 0755" % (path, mode))
    if owner is not None and group is None:
        group = group_of(owner)
    return {"path": os.path.normpath(path), "owner": owner, "group": group, "mode": mode}


def group_of(user):
    """A user's own group; its name is the user's where the user is still to be made."""
    try:
        return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        return user


def read(path):
    """{owner, group, mode} of a folder, or None."""
    try:
        link = os.lstat(path)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise Problem("%s: something above it is no folder; move that away" % path)
    # A site may put a link to a larger disk here. One that an ordinary user made could lead anywhere.
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid()):
        raise Problem("%s is a link that belongs to uid %d; remove it" % (path, link.st_uid))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise Problem("%s is a link to nothing; remove it, or make what it names" % path)
    if not stat.S_ISDIR(found.st_mode):
        raise Problem("%s is there and is no folder; move it away" % path)
    return {
        "owner": name_of(pwd.getpwuid, found.st_uid),
        "group": name_of(grp.getgrgid, found.st_gid),
        "mode": "%04o" % stat.S_IMODE(found.st_mode),
    }


def name_of(lookup, number):
    try:
        return lookup(number)[0]
    except KeyError:
        return str(number)


def number_of(kind, lookup, name):
    """Of a user or group, also where it is given as a number."""
    try:
        return lookup(name)[2]
    except KeyError:
        if name.isdigit():
            return int(name)
        raise Problem("there is no %s %r on this host" % (kind, name))


def make(path):
    """The folder and its parents, each with mode 0755."""
    if os.path.isdir(path):
        return
    make(os.path.dirname(path))
    os.mkdir(path, 0o700)
    os.chmod(path, 0o755)


def correct(change):
    path, wanted = change["name"], change["wanted"]
    make(path)
    owner = number_of("user", pwd.getpwnam, wanted["owner"]) if "owner" in wanted else -1
    group = number_of("group", grp.getgrnam, wanted["group"]) if "group" in wanted else -1
    # Owner first: a change of owner takes special bits away.
    if owner >= 0 or group >= 0:
        os.chown(path, owner, group)
    if "mode" in wanted:
        os.chmod(path, int(wanted["mode"], 8))


def present(folders, check):
    want = [normal(folder) for folder in folders]
    changes = plan({folder["path"]: read(folder["path"]) for folder in want}, want)
    if not check:
        for change in changes:
            correct(change)
    return {"changed": bool(changes), "changes": changes, "diff": difference(changes)}


def difference(changes):
    """Ansible's diff: a line per folder."""

    def lines(key):
        return "".join("%s: %s\n" % (change["name"], said(change[key])) for change in changes)

    return {"before": lines("actual"), "after": lines("wanted")}


def said(value):
    if isinstance(value, dict):
        return " ".join("%s=%s" % item for item in sorted(value.items())) or "there"
    return value


class Remover:
    """Takes trees away; with `check` it only counts."""

    def __init__(self, keep, check):
        self.keep = frozenset(keep)
        self.check = check
        self.kept = []
        self.count = 0

    def remove(self, path, device=None):
        """True if nothing of it is left. `device` is the file system of the folder above, inside a tree."""
        found = os.lstat(path)
        folder = stat.S_ISDIR(found.st_mode)
        if device is not None and folder and found.st_dev != device:
            self.kept.append(path)  # somebody's mount
            return False
        if path in self.keep and not (folder and not os.listdir(path)):
            self.kept.append(path)
            return False
        if folder:
            left = [
                name for name in sorted(os.listdir(path)) if not self.remove(os.path.join(path, name), found.st_dev)
            ]
            if left:
                return False
            if os.path.ismount(path):
                self.kept.append(path)
                return False
        self.count += 1
        if not self.check:
            os.rmdir(path) if folder else os.unlink(path)
        return True


def absent(paths, keep, check):
    remover, changes = Remover([os.path.normpath(path) for path in keep], check), []
    for path in (os.path.normpath(path) for path in paths):
        if path in remover.keep and path in SYSTEM_FOLDERS:
            remover.kept.append(path)
            continue
        if not os.path.isabs(path) or path == "/" or path in SYSTEM_FOLDERS or os.path.dirname(path) == "/home":
            raise Problem("%s is a folder of the system, and is not taken away; name one in it" % path)
        before = remover.count
        if os.path.islink(path) and os.path.isdir(path):
            # The site put the link here, to a disk of its choice: what is behind it goes, the link stays.
            device = os.stat(path).st_dev
            for name in sorted(os.listdir(path)):
                remover.remove(os.path.join(path, name), device)
            remover.kept.append(path)
        elif os.path.lexists(path):
            remover.remove(path)
        if remover.count > before:
            changes.append({"what": "folder", "name": path, "wanted": "gone", "actual": "there"})
    kept = sorted(set(remover.kept))
    return {"changed": bool(changes), "changes": changes, "kept": kept, "diff": difference(changes)}


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "folders": {
                "type": "list",
                "elements": "dict",
                "options": {
                    "path": {"type": "path", "required": True},
                    "owner": {"type": "str"},
                    "group": {"type": "str"},
                    "mode": {"type": "str"},
                },
            },
            "paths": {"type": "list", "elements": "path"},
            "keep": {"type": "list", "elements": "path", "default": []},
        },
        required_if=[("state", "present", ("folders",)), ("state", "absent", ("paths",))],
        supports_check_mode=True,
    )
    given = module.params
    try:
        if given["state"] == "present":
            result = present(given["folders"], module.check_mode)
        else:
            result = absent(given["paths"], given["keep"], module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or "the folders", error.strerror))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
