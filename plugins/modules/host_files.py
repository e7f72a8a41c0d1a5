#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: host_files
short_description: Small files with given content, all of a role in one task
description:
  - Compares each file's content, owner, group and mode with what is wanted, and replaces a file as a whole.
  - One task for a list costs as much as one C(copy) for a single file does; a run with nothing to do is mostly that.
author:
  - clusterkit
options:
  files:
    description: The files, in the order in which they are written.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where it lies. Its folder has to be there.
        type: path
        required: true
      content:
        description: The whole text.
        type: str
      secret_content:
        description: The whole text, where nobody may read it in a log or a diff.
        type: str
      mode:
        description: As in C(chmod), octal.
        type: str
        default: "0644"
      owner:
        description: A user's name; as it is, where not given. A user that is yet to be made counts as a difference
          in check mode.
        type: str
      group:
        description: A group's name; as it is, where not given.
        type: str
"""

EXAMPLES = r"""
- name: Write both files
  host_files:
    files:
      - {path: /etc/clusterkit/a.json, content: "{}\n"}
      - {path: /etc/clusterkit/b.json, secret_content: "{}\n", mode: "0600", owner: ray}
"""

RETURN = r"""
written:
  description: Paths whose content, owner, group or mode was not as wanted.
  returned: always
  type: list
"""

import grp
import os
import pwd
import stat
import tempfile

from ansible.module_utils.basic import AnsibleModule

HIDDEN = "(a secret: not shown)\n"


def wanted_text(entry):
    return entry["secret_content"] if entry["secret_content"] is not None else entry["content"]


def have(path):
    """(text, mode, uid, gid), or None where there is no plain file."""
    try:
        state = os.lstat(path)
        if not stat.S_ISREG(state.st_mode):
            return None
        with open(path, "rb") as handle:
            return handle.read(), stat.S_IMODE(state.st_mode), state.st_uid, state.st_gid
    except OSError:
        return None


def number(lookup, name):
    """The id of a user or group; None where it is not asked for, -1 where there is none of that name."""
    if name is None:
        return None
    try:
        return lookup(name)[2]
    except KeyError:
        return -1


def plan(found, text, mode, uid, gid):
    """What differs: content, mode, owner, group."""
    if found is None:
        return ["content"]
    differs = ["content"] if found[0] != text else []
    differs += ["mode"] if found[1] != mode else []
    differs += ["owner"] if uid is not None and found[2] != uid else []
    differs += ["group"] if gid is not None and found[3] != gid else []
    return differs


def write(module, path, text, mode, uid, gid):
    folder = os.path.dirname(path)
    temporary = None
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            module.fail_json(msg="%s is a folder, and has to be a file: move it away" % path)
        handle, temporary = tempfile.mkstemp(prefix=".%s." % os.path.basename(path), dir=folder)
        with os.fdopen(handle, "wb") as out:
            # Before the content: it is at no moment readable for others than those it is meant for.
            os.fchown(out.fileno(), -1 if uid is None else uid, -1 if gid is None else gid)
            os.fchmod(out.fileno(), mode)
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        # Made in another place's name: on a host with SELinux, the label is the final path's.
        module.set_default_selinux_context(path, False)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        module.fail_json(msg="cannot write %s: %s" % (path, error.strerror or error))


def shown(entry, found, text, differs):
    secret = entry["secret_content"] is not None
    before = "" if found is None else HIDDEN if secret else found[0].decode(errors="replace")
    after = HIDDEN if secret else text.decode(errors="replace")
    header = "%s (%s)" % (entry["path"], ", ".join(differs))
    return {"before_header": header, "after_header": header, "before": before, "after": after}


def described(entry, found, text, differs):
    """The same for `clusterkit plan`: a text as it is, owner and mode by name."""
    told = {"what": "unit" if entry["path"].startswith("/etc/systemd/") else "file", "name": entry["path"]}
    if "content" in differs and entry["secret_content"] is not None:
        return dict(told, wanted="a secret", actual="missing" if found is None else "another one")
    if "content" in differs:
        before = "" if found is None else found[0].decode(errors="replace")
        return dict(told, before=before, after=text.decode(errors="replace"))
    have = {"mode": "%04o" % found[1], "owner": name(pwd.getpwuid, found[2]), "group": name(grp.getgrgid, found[3])}
    return dict(told, wanted={key: entry[key] for key in differs}, actual={key: have[key] for key in differs})


def name(lookup, wanted):
    try:
        return lookup(wanted)[0]
    except KeyError:
        return str(wanted)


def main():
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str"},
                    "secret_content": {"type": "str", "no_log": True},
                    "mode": {"type": "str", "default": "0644"},
                    "owner": {"type": "str"},
                    "group": {"type": "str"},
                },
                "mutually_exclusive": [("content", "secret_content")],
                "required_one_of": [("content", "secret_content")],
            }
        },
        supports_check_mode=True,
    )
    written, diffs, changes = [], [], []
    for entry in module.params["files"]:
        path, mode, text = entry["path"], int(entry["mode"], 8), wanted_text(entry).encode()
        uid, gid = number(pwd.getpwnam, entry["owner"]), number(grp.getgrnam, entry["group"])
        if -1 in (uid, gid) and not module.check_mode:
            who = entry["owner"] if uid == -1 else entry["group"]
            module.fail_json(msg="%s is to belong to %s, and this host has none of that name" % (path, who))
        found = have(path)
        differs = plan(found, text, mode, uid, gid)
        if not differs:
            continue
        written.append(path)
        diffs.append(shown(entry, found, text, differs))
        changes.append(described(entry, found, text, differs))
        if not module.check_mode:
            write(module, path, text, mode, uid, gid)
    module.exit_json(changed=bool(written), written=written, changes=changes, diff=diffs)


if __name__ == "__main__":
    main()
