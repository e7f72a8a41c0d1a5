#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: distribution_packages
short_description: The distribution's packages, read once, installed where one is missing
description:
  - Reads which packages are installed with one C(dpkg-query) or C(rpm). The package lists are fetched and the
    package manager is asked only where something is missing, so a host without internet stays converged.
  - Waits for a package manager that somebody else runs. Finishes what an interrupted C(dpkg) left.
  - Installs no recommended packages, asks no questions, keeps a site's own configuration files, and lets no
    hook restart services.
  - Takes nothing away. With I(record) it notes what it installs, so that a removal can name it.
author:
  - clusterkit
options:
  state:
    description: C(recorded) only names what the record holds and is still installed.
    type: str
    choices: [present, recorded]
    default: present
  packages:
    description: Each as C(name), or as C(name=version) where only that version will do; C(*) may stand in it.
    type: list
    elements: str
    default: []
  record:
    description: A JSON file on the host that names what this module installed; written before the installation.
    type: path
  lock_timeout_s:
    description: How long to wait for another package manager, in seconds.
    type: int
    default: 300
"""

EXAMPLES = r"""
- name: Install packages
  distribution_packages:
    packages: [ca-certificates, libnuma1]
    record: /var/lib/clusterkit/packages.json
"""

RETURN = r"""
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
recorded:
  description: Packages of the record that are still installed.
  returned: state is recorded
  type: list
  elements: str
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

DPKG_JOURNAL = "/var/lib/dpkg/updates"
# needrestart would restart services with replaced libraries, Ray's unit among them. Listing only is its own
# mode `l`; Ubuntu 24.04 restarts by default, without a terminal too.
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C.UTF-8",
    "NEEDRESTART_MODE": "l",
    "NEEDRESTART_SUSPEND": "1",
}
# As apt-get, dpkg and dnf say it; apt's own waiting does not cover the lock of its lists.
LOCKED = re.compile(
    r"Could not get lock|Unable to lock|Unable to acquire the dpkg frontend lock|lock was locked by another process"
    r"|another copy is running",
)
# The second letter of dpkg's status.
UNFINISHED = {"H": "half installed", "U": "unpacked, not configured", "F": "half configured"}


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def plan(have, want):
    """What is missing or has another version: [{what, name, wanted, actual}].

    have: {name: version, or a state in words where the package is not whole}, with versions as
    ("1.2", None) and states as (None, "unpacked"); want: ["name" or "name=version"].
    """
    found = []
    for item in dict.fromkeys(want):
        name, _, wanted = item.partition("=")
        version, state = have.get(name, (None, "missing"))
        if version is None or (wanted and not fnmatch.fnmatchcase(version, wanted)):
            found.append({"what": "package", "name": name, "wanted": wanted or "installed", "actual": version or state})
    return found


def run(command, timeout_s=None):
    """(exit code, stdout, stderr)"""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ, **ENVIRONMENT),
        timeout=timeout_s,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def run_locked(command, lock_timeout_s, sleep=time.sleep):
    """The same, once nobody else holds the package manager."""
    deadline = time.monotonic() + lock_timeout_s
    while True:
        code, out, err = run(command)
        held = [line for line in err.splitlines() if LOCKED.search(line)]
        if code == 0 or not held:
            return code, out, err
        if time.monotonic() >= deadline:
            raise Problem(
                "another process has held the package manager for %d s: %s. Wait until it has ended, then run the "
                "same command again" % (lock_timeout_s, held[0].strip())
            )
        sleep(2)


def complaints(text):
    """The lines of a package manager's talk that say what is wrong."""
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if re.match(r"(E:|W: Failed to fetch|Err:|Error|dpkg: error)", line)]
    return "; ".join(dict.fromkeys(kept or [line for line in lines if line][-3:]))[:1500]


class Apt:
    """Debian and Ubuntu."""

    def __init__(self, lock_timeout_s):
        self.lock_timeout_s = lock_timeout_s
        self.apt_get = [
            *("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=%d" % lock_timeout_s),
            *("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"),
        ]

    def read(self):
        """{name: (version, state)} of every package that dpkg knows of."""
        code, out, err = run(["dpkg-query", "-W", "-f", "${Package}\t${db:Status-Abbrev}\t${Version}\n"])
        if code != 0:
            raise Problem("dpkg-query fails: %s" % err.strip()[-500:])
        found = {}
        for line in out.splitlines():
            name, status, version = line.split("\t")
            state = UNFINISHED.get(status[1], "missing")
            if status[1] in "iWt" and status[2:3] != "R":
                found[name] = (version, None)
            elif found.get(name, (None, None))[0] is None:  # another architecture of it may be whole
                found[name] = (None, state)
        return found

    def interrupted(self, have, missing):
        """What a killed dpkg left, in words; nothing where it left nothing that concerns us."""
        try:
            journal = [name for name in os.listdir(DPKG_JOURNAL) if name.isdigit()]
        except OSError:
            journal = []
        halves = sorted(name for name, (_version, state) in have.items() if state in UNFINISHED.values())
        if journal:
            return "dpkg was interrupted"
        return "dpkg was interrupted at %s" % ", ".join(halves) if halves and missing else ""

    def finish(self):
        code, out, err = run_locked(
            ["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"], self.lock_timeout_s
        )
        if code != 0:
            raise Problem(
                "dpkg was interrupted on this host and cannot be finished: %s. Mend it there: dpkg --configure -a"
                % complaints(err or out)
            )

    def install(self, items):
        code, out, err = run_locked([*self.apt_get, "update"], self.lock_timeout_s)
        stale = complaints(err) if code != 0 or "Failed to fetch" in err else ""
        pins = ["--allow-downgrades"] if any("=" in item for item in items) else []
        code, out, err = run_locked(
            [*self.apt_get, "install", "--no-install-recommends", *pins, *items], self.lock_timeout_s
        )
        if code == 0:
            return
        if stale:
            raise Problem(
                "the package lists of this host cannot be read: %s. Check the sources in /etc/apt and the way to "
                "them (clusterkit_proxy), then run again. Without them: %s" % (stale, complaints(err or out))
            )
        raise Problem("apt-get cannot install %s: %s" % (", ".join(items), complaints(err or out)))


class Dnf:
    """The Enterprise Linux family."""

    def __init__(self, lock_timeout_s):
        self.lock_timeout_s = lock_timeout_s

    def read(self):
        code, out, err = run(["rpm", "-qa", "--qf", "%{NAME}\t%{VERSION}-%{RELEASE}\n"])
        if code != 0:
            raise Problem("rpm fails: %s" % err.strip()[-500:])
        return {name: (version, None) for name, version in (line.split("\t") for line in out.splitlines())}

    def interrupted(self, have, missing):
        return ""  # rpm's database recovers by itself

    def finish(self):
        pass

    def install(self, items):
        names = [item.replace("=", "-", 1) for item in items]
        # Without exit_on_lock, dnf waits for ever.
        options = ["--setopt=install_weak_deps=False", "--setopt=exit_on_lock=True"]
        code, out, err = run_locked(["dnf", "-q", "-y", *options, "install", *names], self.lock_timeout_s)
        if code == 0:
            return
        if re.search(r"Failed to download metadata|Cannot download repomd|Cannot prepare internal mirrorlist", err):
            raise Problem(
                "the package lists of this host cannot be read: %s. Check /etc/yum.repos.d and the way to them "
                "(clusterkit_proxy), then run again" % complaints(err)
            )
        raise Problem("dnf cannot install %s: %s" % (", ".join(items), complaints(err or out)))


def manager(lock_timeout_s):
    if shutil.which("dpkg-query"):
        return Apt(lock_timeout_s)
    if shutil.which("rpm") and shutil.which("dnf"):
        return Dnf(lock_timeout_s)
    raise Problem("this host has neither dpkg nor dnf; distributions that are supported stand in roles/preflight")


def read_record(path):
    try:
        with open(path) as handle:
            return list(json.load(handle)["packages"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise Problem("the record %s cannot be read; take it away, and a removal will name fewer packages" % path)


def write_record(path, names):
    known = read_record(path)
    if set(names) <= set(known):
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".packages-", dir=folder)
    with os.fdopen(handle, "w") as out:
        json.dump({"packages": sorted(set(known) | set(names))}, out, indent=1)
        out.write("\n")
    os.chmod(temporary, 0o644)
    os.rename(temporary, path)


def ensure(tool, params, check):
    """What was to be done; and, unless `check`, does it."""
    want = params["packages"]
    have = tool.read()
    changes = plan(have, want)
    interrupted = tool.interrupted(have, bool(changes))
    if check:
        if interrupted:
            changes.append({"what": "package", "name": "dpkg", "wanted": "finished", "actual": interrupted})
        return changes
    told = list(changes)
    if interrupted:
        tool.finish()
        told.append({"what": "package", "name": "dpkg", "wanted": "finished", "actual": interrupted})
        changes = plan(tool.read(), want)
    if changes:
        names = {change["name"] for change in changes}
        if params["record"]:
            # Only what is not there at all: another version of a site's own package does not make it ours.
            write_record(params["record"], [change["name"] for change in changes if change["actual"] == "missing"])
        tool.install([item for item in dict.fromkeys(want) if item.partition("=")[0] in names])
        left = plan(tool.read(), want)
        if left:
            raise Problem(
                "after the installation these are not as wanted: %s. Is one of them a virtual package? Name the one "
                "that provides it" % ", ".join("%(name)s (%(actual)s)" % change for change in left)
            )
    return told


def difference(changes):
    """Ansible's diff: a line per package."""

    def lines(key):
        return "".join("%s: %s\n" % (change["name"], change[key]) for change in changes)

    return {"before": lines("actual"), "after": lines("wanted")}


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "recorded"], "default": "present"},
            "packages": {"type": "list", "elements": "str", "default": []},
            "record": {"type": "path"},
            "lock_timeout_s": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        tool = manager(params["lock_timeout_s"])
        if params["state"] == "recorded":
            names = read_record(params["record"]) if params["record"] else []
            have = tool.read() if names else {}
            module.exit_json(changed=False, changes=[], recorded=[n for n in names if have.get(n, (None, ""))[0]])
        changes = ensure(tool, params, module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or "the package manager", error.strerror))
    module.exit_json(changed=bool(changes), changes=changes, diff=difference(changes))


if __name__ == "__main__":
    main()
