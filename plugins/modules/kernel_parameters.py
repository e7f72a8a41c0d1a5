#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_parameters
short_description: Kernel parameters at every boot, beside the site's own
description:
  - With GRUB as Debian and Ubuntu have it, a drop-in file for C(/etc/default/grub.d) and C(update-grub); with
    C(grubby), the arguments of every boot entry.
  - What counts is what the boot loader would hand over, and what the running kernel was given; that a file is right
    proves nothing. Reboots nothing.
  - The site's own parameters stay; what it has set itself is not set twice, and not taken away.
  - The list is the whole of what is wanted. Two callers on one host need a C(path) and a C(record) each.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes away what this module has added.
    type: str
    choices: [present, absent]
    default: present
  parameters:
    description:
      - Whole tokens, such as C(iommu=pt). Two with the same name, such as C(pci=realloc=off) and C(pci=bfsort), are
        both kept. What is taken out of the list is taken away.
    type: list
    elements: str
    default: []
  path:
    description: The drop-in file. A name that sorts behind the site's files, so that none of them sets all anew.
    type: path
    default: /etc/default/grub.d/zz-clusterkit.cfg
  record:
    description: The file that says which parameters are ours.
    type: path
    default: /var/lib/clusterkit/kernel-parameters.json
"""

EXAMPLES = r"""
- name: Boot with these
  kernel_parameters:
    parameters: [iommu=pt, pci=realloc=off, pci=bfsort]
"""

RETURN = r"""
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual), or C(before) and C(after) of the file.
  returned: always
  type: list
  elements: dict
running:
  description: The wanted ones that the running kernel was not booted with.
  returned: always
  type: list
leftover:
  description: Those of ours that are not wanted any more, and that the running kernel was booted with.
  returned: always
  type: list
reboot_needed:
  description: Whether there is any of the two.
  returned: always
  type: bool
reasons:
  description: The same in words.
  returned: always
  type: list
"""

import glob
import json
import os
import re
import shutil
import subprocess
import tempfile

from ansible.module_utils.basic import AnsibleModule

ROOT = "/"
# An SSH session's PATH can lack them.
SBIN = ":/usr/sbin:/sbin"
GRUB_CONFIG = "/boot/grub/grub.cfg"
# What neither a shell nor GRUB nor the kernel reads as more than a letter.
TOKEN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:=@/+%~-]*")
DROP_IN = """\
# Written by clusterkit; what is changed here by hand is overwritten.
# Adds to the kernel's command line what no other file has set. It has to be read behind them: hence its name.
for clusterkit_parameter in %s; do
    case " $GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT " in
        *" $clusterkit_parameter "*) ;;
        *) GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX $clusterkit_parameter" ;;
    esac
done
unset clusterkit_parameter
"""
LISTED = re.compile(r"^for clusterkit_parameter in (.*); do$", re.MULTILINE)


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def plan(have, want):
    """{add, take, missing, leftover} of tokens.

    have: entries (a list of tokens for each boot entry), cmdline (tokens of the running kernel), ours (tokens that
    were added here); want: tokens. add: not in every entry; take: ours, not wanted, in some entry; missing and
    leftover: the same of the running kernel.
    """
    gone = [token for token in have["ours"] if token not in want]
    return {
        "add": [token for token in want if not have["entries"] or any(token not in entry for entry in have["entries"])],
        "take": [token for token in gone if any(token in entry for entry in have["entries"])],
        "missing": [token for token in want if token not in have["cmdline"]],
        "leftover": [token for token in gone if token in have["cmdline"]],
    }


def at(path):
    return os.path.join(ROOT, path.lstrip("/"))


def read(path):
    try:
        with open(at(path), encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except FileNotFoundError:
        return ""


def write(path, text):
    """All or nothing; without text there is no file."""
    path = at(path)
    if not text:
        if os.path.exists(path):
            os.unlink(path)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".clusterkit-", dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def program(name):
    return shutil.which(name, path=os.environ.get("PATH", "") + SBIN)


def run(*command):
    environment = dict(os.environ, LC_ALL="C", PATH=os.environ.get("PATH", "") + SBIN)
    done = subprocess.run(
        (program(command[0]),) + command[1:],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env=environment,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise Problem("%s failed with exit code %d: %s" % (" ".join(command), done.returncode, said))
    return done.stdout


class Grub:
    """GRUB as Debian and Ubuntu have it: a file per concern, and update-grub to make one of all."""

    def __init__(self, path):
        self.path = path
        mkconfig = program("grub-mkconfig")
        if mkconfig is None or "default/grub.d" not in read_program(mkconfig):
            raise Problem(
                "update-grub is there, and the GRUB of this host does not read /etc/default/grub.d: set the "
                "parameters in its own configuration, and leave them out here"
            )
        if not os.path.exists(at(GRUB_CONFIG)):
            raise Problem(
                "there is no %s: this host does not boot by GRUB. Set the parameters in its boot loader's "
                "configuration, and leave them out here" % GRUB_CONFIG
            )

    def entries(self):
        """Tokens of each entry, of those that 10_linux has made; not of the recovery entries, which lack some."""
        text = read(GRUB_CONFIG)
        part = re.search(r"^### BEGIN \S*/10_linux ###$(.*?)^### END ", text, re.MULTILINE | re.DOTALL)
        pattern = re.compile(r"^\s*linux(?:efi|16)?\s+\S+\s+(.*)$", re.MULTILINE)
        found = [line.split() for line in (part and pattern.findall(part.group(1))) or pattern.findall(text)]
        return [tokens for tokens in found if not {"single", "recovery"} & set(tokens)]

    def noted(self):
        """What the drop-in has."""
        found = LISTED.search(read(self.path))
        return re.findall(r"'([^']*)'", found.group(1)) if found else []

    def file(self, want):
        return DROP_IN % " ".join("'%s'" % token for token in want) if want else ""

    def apply(self, add, take, want):
        write(self.path, self.file(want))
        if not add and not take:
            return
        run("update-grub")
        lacking = [token for token in add if any(token not in entry for entry in self.entries())]
        if lacking:
            later = [
                path[len(ROOT.rstrip("/")) :]
                for path in sorted(glob.glob(at(os.path.dirname(self.path)) + "/*.cfg"))
                if path > at(self.path)
            ]
            hint = "%s is read later: rename it" % ", ".join(later) if later else "look at the scripts in /etc/grub.d"
            raise Problem("update-grub ran, and %s still lacks %s. %s" % (GRUB_CONFIG, " ".join(lacking), hint))


class Grubby:
    """The EL family: arguments stand in the boot entries themselves."""

    path = None

    def entries(self):
        return [line.split() for line in re.findall(r'^args="(.*)"$', run("grubby", "--info=ALL"), re.MULTILINE)]

    def noted(self):
        return []

    def file(self, want):
        return ""

    def apply(self, add, take, want):
        before = self.entries()
        if not before:
            raise Problem("grubby --info=ALL names no boot entry: look at /boot/loader/entries")
        if take:
            run("grubby", "--update-kernel=ALL", "--remove-args=%s" % " ".join(take))
        if add:
            # grubby replaces what has the same name: so all of that name are handed over together.
            names = {token.split("=")[0] for token in add}
            same = [token for entry in before for token in entry if token.split("=")[0] in names and token not in take]
            run("grubby", "--update-kernel=ALL", "--args=%s" % " ".join(dict.fromkeys(same + add)))
        for entry, after in zip(before, self.entries()):  # noqa: B905 - Python 3.9 has no strict
            lost = [token for token in entry + add if token not in after and token not in take]
            if lost:
                raise Problem(
                    "grubby dropped %s. Before it ran there was: %s. Set that again (grubby --update-kernel=ALL "
                    "--args=...), and write parameters of one name as one, such as pci=realloc=off,bfsort"
                    % (" ".join(lost), " ".join(entry))
                )


def read_program(path):
    with open(path, encoding="utf-8", errors="replace") as handle:
        return handle.read()


def loader(path):
    if program("update-grub"):
        return Grub(path)
    if program("grubby"):
        return Grubby()
    raise Problem(
        "this host has neither update-grub nor grubby: set the parameters in its boot loader's configuration, "
        "and leave them out here"
    )


def recorded(path):
    try:
        found = json.loads(read(path) or "{}")
        return [str(token) for token in found["added"]] if found else []
    except (ValueError, KeyError, TypeError):
        raise Problem("%s cannot be read; remove it, and take away by hand what is not wanted any more" % path)


def record_text(tokens):
    return json.dumps({"added": tokens}, indent=2) + "\n" if tokens else ""


def converge(given, check):
    """(changes, plan): the boot loader's configuration has the wanted tokens, and none of ours besides."""
    want = list(dict.fromkeys(given["parameters"])) if given["state"] == "present" else []
    for token in want:
        if not TOKEN.fullmatch(token):
            raise Problem("%r is no kernel parameter: one token, without blanks, quotes and such" % token)
    ours = recorded(given["record"])
    cmdline = read("/proc/cmdline").split()
    if not want and not ours and not os.path.exists(at(given["path"])):
        # Nothing is asked for: a host with another boot loader is fine.
        return [], plan({"entries": [], "cmdline": cmdline, "ours": []}, [])
    boot = loader(given["path"])
    ours = list(dict.fromkeys(ours + boot.noted()))
    found = plan({"entries": boot.entries(), "cmdline": cmdline, "ours": ours}, want)
    changes = [
        {"what": "kernel parameter", "name": token, "wanted": wanted, "actual": actual}
        for key, wanted, actual in (("add", "at every boot", "missing"), ("take", "gone", "at every boot"))
        for token in found[key]
    ]
    before, after = (read(boot.path), boot.file(want)) if boot.path else ("", "")
    if before != after:
        changes.insert(0, {"what": "file", "name": boot.path, "before": before, "after": after})
    if check:
        return changes, found
    # Noted first: a run that is cut has not forgotten what it has added.
    noted = record_text(list(dict.fromkeys(ours + found["add"])))
    if read(given["record"]) != noted:
        write(given["record"], noted)
    if changes:
        boot.apply(found["add"], found["take"], want)
    # What is not wanted any more is remembered until the host has booted without it; what is still there after all
    # is the site's own.
    entries = boot.entries()
    waiting = [token for token in found["leftover"] if not any(token in entry for entry in entries)]
    found["leftover"] = waiting
    noted = record_text(
        [token for token in list(dict.fromkeys(ours + found["add"])) if token in want or token in waiting]
    )
    if read(given["record"]) != noted:
        write(given["record"], noted)
    return changes, found


def difference(changes):
    """Ansible's diff: the file, and the boot entries."""
    found = [
        {"before_header": item["name"], "after_header": item["name"], "before": item["before"], "after": item["after"]}
        for item in changes
        if item["what"] == "file"
    ]
    tokens = [item for item in changes if item["what"] == "kernel parameter"]
    if tokens:
        lines = ["".join("%s: %s\n" % (item["name"], item[key]) for item in tokens) for key in ("actual", "wanted")]
        found.append({"before_header": "boot", "after_header": "wanted", "before": lines[0], "after": lines[1]})
    return found


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "parameters": {"type": "list", "elements": "str", "default": []},
            "path": {"type": "path", "default": "/etc/default/grub.d/zz-clusterkit.cfg"},
            "record": {"type": "path", "default": "/var/lib/clusterkit/kernel-parameters.json"},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        changes, found = converge(given, module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or given["path"], error.strerror))
    reasons = ["the kernel was not booted with %s" % token for token in found["missing"]]
    reasons += ["the kernel was booted with %s, which is not wanted any more" % token for token in found["leftover"]]
    module.exit_json(
        changed=bool(changes),
        changes=changes,
        diff=difference(changes),
        running=found["missing"],
        leftover=found["leftover"],
        reboot_needed=bool(reasons),
        reasons=reasons,
    )


if __name__ == "__main__":
    main()
