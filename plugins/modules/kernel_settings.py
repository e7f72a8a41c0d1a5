#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_settings
short_description: Kernel settings, in the drop-in file and in the running kernel
description:
  - Writes a drop-in file for C(sysctl) and sets what the running kernel has otherwise.
  - What the kernel says is read on each run; that the file is right proves nothing.
  - The file notes as a comment what each setting was before, and C(state=absent) sets that again.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes the file away, and sets what was there before where the kernel still has ours.
    type: str
    choices: [present, absent]
    default: present
  path:
    description: The drop-in file.
    type: path
    required: true
  settings:
    description: Values by name, such as C(net.core.somaxconn).
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Set the kernel
  kernel_settings:
    path: /etc/sysctl.d/60-clusterkit.conf
    settings: {net.core.somaxconn: 4096}
"""

RETURN = r"""
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
"""

import os
import re
import tempfile

from ansible.module_utils.basic import AnsibleModule

PROC = "/proc/sys"
HEADER = "# Written by clusterkit; what is changed here by hand is overwritten.\n"
BEFORE = re.compile(r"^# (\S+) was (.*)$", re.MULTILINE)
OURS = re.compile(r"^([^#\s]\S*) = (.*)$", re.MULTILINE)
NAME = re.compile(r"[A-Za-z0-9_-]+([./][A-Za-z0-9_*-]+)+")


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def plan(have, want):
    """What the kernel has otherwise: [{what, name, wanted, actual}].

    have: {name: value, or None where the kernel has no such setting}; want: {name: value}.
    """
    return [
        {
            "what": "kernel setting",
            "name": name,
            "wanted": want[name],
            "actual": "no such setting" if have[name] is None else have[name],
        }
        for name in sorted(want)
        if have[name] != want[name]
    ]


def normal(value):
    """As the kernel prints it: numbers as text, one blank between several."""
    if isinstance(value, bool):
        return str(int(value))
    return " ".join(str(value).split())


def file_of(name):
    """`net.ipv4.ip_forward` as a path; `net/ipv4/conf/eth0.10/rp_filter` where a part has dots in it."""
    if not NAME.fullmatch(name.replace("/", ".")):
        raise Problem("%r is no name of a kernel setting" % name)
    parts = name.split("/") if "/" in name else name.split(".")
    return os.path.join(PROC, *parts)


def read(name):
    try:
        with open(file_of(name)) as handle:
            return normal(handle.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Problem("the kernel does not tell %s: %s" % (name, error.strerror))


def write(name, value):
    try:
        with open(file_of(name), "w") as handle:
            handle.write(value)
    except FileNotFoundError:
        raise Problem("the kernel has no setting %s; load its module, or take it out of the settings" % name)
    except OSError as error:
        raise Problem(
            "the kernel refuses %s = %s: %s. It is %s. In a container the settings are those of its host: "
            "set it there, or take it out of the settings" % (name, value, error.strerror, read(name))
        )
    found = read(name)
    if found != value:
        raise Problem("the kernel took %s = %s and has %s; set what it can have" % (name, value, found))


def text_of(settings, before):
    """The file: what each setting was before, then what it is to be."""
    noted = ["# %s was %s\n" % (name, before[name]) for name in sorted(settings) if name in before]
    return HEADER + "".join(noted) + "".join("%s = %s\n" % (name, settings[name]) for name in sorted(settings))


def read_file(path):
    try:
        with open(path) as handle:
            return handle.read()
    except FileNotFoundError:
        return ""


def write_file(path, text):
    """All or nothing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".clusterkit-", dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def converge(path, settings, check):
    """Make file and kernel what `settings` say; no settings: no file. What was taken out of them is set back."""
    want = {name: normal(value) for name, value in settings.items()}
    text = read_file(path)
    ours, before = dict(OURS.findall(text)), dict(BEFORE.findall(text))
    gone = [name for name in sorted(set(ours) - set(want)) if name in before]
    back = {name: before[name] for name in gone if read(name) == ours[name]}
    have = {name: read(name) for name in want}
    # What the first run found: for what the file holds already, later ones find our own values.
    before.update({name: have[name] for name in want if name not in ours and have[name] not in (None, want[name])})
    wanted_text = text_of(want, before) if want else ""
    changes = plan(have, want) + plan({name: ours[name] for name in back}, back)
    if text != wanted_text:
        changes.insert(0, {"what": "file", "name": path, "before": text, "after": wanted_text})
    if not check:
        for name in sorted(back):
            write(name, back[name])
        # The file before the kernel: a run that is cut between the two has noted what was there.
        if text != wanted_text:
            write_file(path, wanted_text) if want else os.unlink(path)
        for name in sorted(want):
            if have[name] != want[name]:
                write(name, want[name])
    return changes


def difference(path, changes):
    """Ansible's diff: the file, and the kernel."""

    def lines(key):
        return "".join("%s = %s\n" % (item["name"], item[key]) for item in changes if item["what"] == "kernel setting")

    found = [
        {"before_header": path, "after_header": path, "before": item["before"], "after": item["after"]}
        for item in changes
        if item["what"] == "file"
    ]
    if lines("wanted"):
        found.append(
            {
                "before_header": "the kernel",
                "after_header": "wanted",
                "before": lines("actual"),
                "after": lines("wanted"),
            }
        )
    return found


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "path": {"type": "path", "required": True},
            "settings": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        settings = given["settings"] if given["state"] == "present" else {}
        changes = converge(given["path"], settings, module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or given["path"], error.strerror))
    module.exit_json(changed=bool(changes), changes=changes, diff=difference(given["path"], changes))


if __name__ == "__main__":
    main()
