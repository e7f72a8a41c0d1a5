#!/usr/bin/python
# What brings the files is the action plugin of this name; what they are on a host is this module's.
from __future__ import annotations

DOCUMENTATION = r"""
module: app_code
short_description: The code of apps on a host, each as a zip named by its digest
description:
  - Compares each of I(apps) with its name, which is the SHA-256 of its bytes, and reads every byte for that on each
    run.
  - What is wanting or damaged is packed on the controller, brought here, compared again and put in place. Replicas
    never see half a file.
  - Zips of earlier configurations stay, those that were declared last, as the way back to one needs its code. Each run
    notes the time with what is declared, and that is no change.
  - The folder may lie in one of Ray's user, who may have put links there. None of those is followed.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes away the folder with all zips.
    type: str
    choices: [present, absent]
    default: present
  path:
    description: The folder. It is made where it is missing, for who runs the module, readable for all.
    type: path
    required: true
  user:
    description: Ray's user, who gets the folders above it where these are made.
    type: str
    default: ""
  apps:
    description: The codes, each with C(digest), and C(template) or C(folder), from which the controller packs it.
    type: list
    elements: dict
    default: []
  keep:
    description: How many others stay, those that were declared last.
    type: int
    default: 50
  incoming:
    description: Files on the host by digest, as the action plugin brought them.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Put the apps' code in place
  app_code:
    path: /var/lib/clusterkit/node/cache/apps
    user: ray
    apps: "{{ clusterkit.code.apps }}"
"""

RETURN = r"""
wanting:
  description: Digests of what is not there, or damaged, and was not brought.
  returned: state is present
  type: list
  elements: str
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
"""

import errno
import hashlib
import os
import pwd
import re
import stat

from ansible.module_utils.basic import AnsibleModule

ZIP = re.compile(r"([0-9a-f]{64})\.zip")
# What a run that was killed has left.
LITTER = re.compile(r"\.[0-9a-f]{64}\.new")
MODE = 0o644


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def plan(have, wanted, keep):
    """What is to come and what is to go: (missing, wrong, gone), all digests.

    have: {digest: {"whole", "readable", "time"}} of the zips in the folder, with the time when each was declared last;
    wanted: digests. `wrong` has the right bytes and another owner or mode.
    """
    missing = [digest for digest in wanted if digest not in have or not have[digest]["whole"]]
    wrong = [digest for digest in wanted if digest not in missing and not have[digest]["readable"]]
    others = sorted(set(have) - set(wanted), key=lambda digest: (have[digest]["time"], digest), reverse=True)
    return missing, wrong, sorted(others[keep:])


def described(apps, have, missing, wrong, gone):
    def told(digest, wanted, actual):
        source = next((app.get("template") or app.get("folder") for app in apps if app["digest"] == digest), "")
        name = "%s (%s)" % (digest[:12], os.path.basename(source)) if source else digest[:12]
        return {"what": "app code", "name": name, "wanted": wanted, "actual": actual}

    changes = [told(digest, "there", "damaged" if digest in have else "missing") for digest in missing]
    changes += [told(digest, "readable for all, nobody else's", "not so") for digest in wrong]
    return changes + [told(digest, "gone", "of no app") for digest in gone]


def open_folder(path, user, make):
    """A descriptor of the folder; None where it is missing and not to be made. Links count where root, or who runs
    this, could have put them; where somebody else can write, none does."""
    current, owners = os.open("/", os.O_RDONLY | os.O_DIRECTORY), (0, os.geteuid())
    parts = [part for part in os.path.normpath(path).split("/") if part]
    for number, part in enumerate(parts):
        flags = os.O_RDONLY | os.O_DIRECTORY
        if os.fstat(current).st_uid not in owners:
            flags |= os.O_NOFOLLOW
        last = number == len(parts) - 1
        try:
            below = enter(part, flags, current, user, make, last)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            shown = "/" + "/".join(parts[: number + 1])
            raise Problem("%s is a link of somebody else's, or no folder: move it away" % shown) from error
        finally:
            os.close(current)
        if below is None:
            return None
        current = below
    return current


def enter(part, flags, above, user, make, last):
    try:
        return os.open(part, flags, dir_fd=above)
    except FileNotFoundError:
        if not make:
            return None
    os.mkdir(part, 0o700, dir_fd=above)
    below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=above)
    if last:
        os.fchmod(below, 0o755)
    elif user and os.geteuid() == 0:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise Problem("there is no user %s on this host: run playbooks/hosts.yml first" % user)
        os.fchown(below, entry.pw_uid, entry.pw_gid)
    return below


def is_ours(state, mode):
    return state.st_uid == os.geteuid() and stat.S_IMODE(state.st_mode) == mode


def read(folder, wanted):
    """{digest: {"whole", "readable", "time"}} of the zips in it. Of those that nobody wants, no byte is read."""
    found = {}
    for name in os.listdir(folder):
        match = ZIP.fullmatch(name)
        if not match:
            continue
        digest = match.group(1)
        state = os.stat(name, dir_fd=folder, follow_symlinks=False)
        plain = stat.S_ISREG(state.st_mode) and digest in wanted
        found[digest] = {
            "whole": plain and sha256_of(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)) == digest,
            "readable": is_ours(state, MODE),
            "time": state.st_mtime,
        }
    return found


def sha256_of(handle):
    digest = hashlib.sha256()
    with os.fdopen(handle, "rb") as source:
        for block in iter(lambda: source.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def put(folder, digest, source):
    """Only the bytes that the name promises, and only as a whole."""
    with open(source, "rb") as handle:
        data = handle.read()
    if hashlib.sha256(data).hexdigest() != digest:
        raise Problem("%s did not arrive as it was sent: is the disk full?" % digest[:12])
    temporary = ".%s.new" % digest
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    with os.fdopen(handle, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
        os.fchmod(out.fileno(), MODE)
    os.rename(temporary, "%s.zip" % digest, src_dir_fd=folder, dst_dir_fd=folder)


def correct(folder, digest):
    handle = os.open("%s.zip" % digest, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        os.fchown(handle, os.geteuid(), os.getegid())
        os.fchmod(handle, MODE)
    finally:
        os.close(handle)


def present(module):
    given = module.params
    apps, incoming = given["apps"], given["incoming"]
    wanted = sorted({app["digest"] for app in apps})
    # The first of two calls only looks, where something has to be brought.
    folder = open_folder(given["path"], given["user"], make=bool(incoming) and not module.check_mode)
    have = read(folder, wanted) if folder is not None else {}
    missing, wrong, gone = plan(have, wanted, given["keep"])
    changes = described(apps, have, missing, wrong, gone)
    open_to_all = folder is None or is_ours(os.fstat(folder), 0o755)
    if not open_to_all:
        changes.append({"what": "folder", "name": given["path"], "wanted": "readable for all", "actual": "not so"})
    wanting = [digest for digest in missing if digest not in incoming]
    result = {"changed": bool(changes), "changes": changes, "wanting": wanting}
    if module.check_mode or wanting or folder is None:
        return result
    if not open_to_all:
        os.fchown(folder, os.geteuid(), os.getegid())
        os.fchmod(folder, 0o755)
    for name in os.listdir(folder):
        if LITTER.fullmatch(name):
            os.unlink(name, dir_fd=folder)
    for digest in missing:
        put(folder, digest, incoming[digest])
    for digest in wrong:
        correct(folder, digest)
    # It may have come long ago, and is what runs: with another code in its place, others go first.
    for digest in wanted:
        os.utime("%s.zip" % digest, dir_fd=folder, follow_symlinks=False)
    for digest in gone:
        os.unlink("%s.zip" % digest, dir_fd=folder)
    return result


def absent(module):
    path = module.params["path"]
    folder = open_folder(path, "", make=False)
    if folder is None:
        return {"changed": False, "changes": []}
    if not module.check_mode:
        for name in os.listdir(folder):
            if ZIP.fullmatch(name) or LITTER.fullmatch(name):
                os.unlink(name, dir_fd=folder)
        if os.listdir(folder):
            raise Problem("%s holds more than the code of apps: look what it is, and take it away" % path)
        above = open_folder(os.path.dirname(os.path.normpath(path)), "", make=False)
        os.rmdir(os.path.basename(os.path.normpath(path)), dir_fd=above)
    return {"changed": True, "changes": [{"what": "folder", "name": path, "wanted": "gone", "actual": "there"}]}


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "path": {"type": "path", "required": True},
            "user": {"type": "str", "default": ""},
            "apps": {"type": "list", "elements": "dict", "default": []},
            "keep": {"type": "int", "default": 50},
            "incoming": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    try:
        result = present(module) if module.params["state"] == "present" else absent(module)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        # A name below a descriptor says nothing by itself.
        module.fail_json(msg="%s cannot be written or read: %s" % (module.params["path"], error.strerror or error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
