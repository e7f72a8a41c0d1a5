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
  - Takes nothing away, but for I(state=absent). With I(record) it notes what it installs and holds, so that a
    removal can name it.
  - Holds are those of C(apt-mark), and a marked block in the list of dnf's plugin C(versionlock) - a repository's own
    C(excludepkgs) would not cover the kernel, and dnf 4 reads no drop-in files. A wanted version goes before a hold.
author:
  - clusterkit
options:
  state:
    description: C(recorded) only names what the record holds and is still installed. C(absent) lifts the holds of the
      record, and takes away those of its packages that I(packages) names, as patterns.
    type: str
    choices: [present, recorded, absent]
    default: present
  packages:
    description: Each as C(name), or as C(name=version) where only that version will do; C(*) may stand in it.
    type: list
    elements: str
    default: []
  first:
    description: As I(packages), installed in a run of their own before those - they pin the others' versions.
    type: list
    elements: str
    default: []
  optional:
    description: Names of packages that are installed along with others where the host's sources have them.
    type: list
    elements: str
    default: []
  alike:
    description: Further packages, each with the package whose upstream version it must have.
    type: dict
    default: {}
  built_with:
    description: As I(alike), by the packager's revision in place of the upstream version.
    type: dict
    default: {}
  hold:
    description: Patterns of names; what is installed and matches one is held at its version.
    type: list
    elements: str
    default: []
  free_mib:
    description: Free space that an installation needs, in MiB, by path.
    type: dict
    default: {}
  guard:
    description: Patterns of names; such a package is left as it is while I(busy_unit) runs.
    type: list
    elements: str
    default: []
  busy_unit:
    description: The systemd unit that I(guard) is about.
    type: str
  consent:
    description: Whether the caller is going to stop I(busy_unit) for it; then check mode shows it as planned.
    type: bool
    default: false
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
  description: What differs, each with C(what), C(name), C(wanted) and C(actual); C(disrupts) and C(left) where
    I(guard) applies.
  returned: always
  type: list
  elements: dict
waiting:
  description: Packages that were left as they are, because I(busy_unit) runs.
  returned: state is present
  type: list
  elements: str
versions:
  description: What is installed of the wanted packages, by name; empty where it is not.
  returned: state is present
  type: dict
recorded:
  description: Packages of the record that are still installed.
  returned: state is recorded or absent
  type: list
  elements: str
"""

import fcntl
import fnmatch
import json
import os
import re
import shutil
import struct
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
# As apt-get, dpkg, dnf and rpm say it; apt's own waiting does not cover the lock of its lists.
LOCKED = re.compile(
    r"Could not get lock|Unable to lock|Unable to acquire the dpkg frontend lock|lock was locked by another process"
    r"|another copy is running|already locked by \d+|can't create transaction lock",
)
HOLDER = re.compile(r"(?:held by process|with pid|already locked by) (\d+)")
# What a package manager's complaint means, and what to do.
ADVICE = (
    (
        r"NO_PUBKEY|BADSIG|EXPKEYSIG|EXPSIG|REVKEYSIG|is not signed|couldn't be verified|GPG check FAILED|Signing key"
        r"|GPG signature verification error",
        "The repository's signature does not fit the key on this host (Signed-By or gpgkey in its file). Has the "
        "publisher changed the key, take the key's file away and run again: it is fetched anew. Is it a mirror, let it "
        "copy the repository once more, as a whole",
    ),
    (
        r"\b404\b|does not have a Release file|File not found - ",
        "The repository has nothing at that address: is that version published for this distribution? Check the pin "
        "and the address, or the mirror",
    ),
    (
        r"No space left on device|enough free space|needs? \d+\w* more space|Disk Requirements",
        "The disk is full. `df -h` shows which; `apt-get clean` or `dnf clean all` frees the cache of packages, taking "
        "old kernels away frees /boot",
    ),
    (r"Unit (\S+) is masked", "A masked unit cannot start: `systemctl unmask` it, then run again"),
    (
        r"Bad return status for module build|dkms.*returned.*error|Error! .*build",
        "The kernel module does not build against this kernel. Its log is named above; a kernel that the driver "
        "supports helps, or another driver version",
    ),
    (
        r"nothing provides dkms|No match for argument: dkms",
        "dkms comes from EPEL, which this host does not have: enable EPEL and CRB, or your mirrors of them",
    ),
)
UNREAD = re.compile(r"Failed to download metadata|Cannot download repomd|Cannot prepare internal mirrorlist")
VERSIONLOCK = "/etc/dnf/plugins/versionlock.list"
BLOCK = re.compile(r"# Begin: held by clusterkit\n(.*?)# End: held by clusterkit\n", re.DOTALL)
# The second letter of dpkg's status.
UNFINISHED = {"H": "half installed", "U": "unpacked, not configured", "F": "half configured"}


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def plan(have, want):
    """What is missing or has another version: [{what, name, wanted, actual}].

    have: {name: version, or a state in words where the package is not whole}, with versions as
    ("1.2", None), further ones beside it as ("1.2", None, "1.1"), and states as (None, "unpacked");
    want: ["name" or "name=version"].
    """
    found = []
    for item in dict.fromkeys(want):
        name, _, wanted = item.partition("=")
        version, state, *more = have.get(name, (None, "missing"))
        if version is None or (wanted and not fnmatch.filter([version, *more], wanted)):
            actual = ", ".join([version, *more]) if version else state
            found.append({"what": "package", "name": name, "wanted": wanted or "installed", "actual": actual})
    return found


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def holds(names, held, ours, patterns):
    """(names to hold, names to release): what is installed and matches, and what we held and no longer matches."""
    wanted = {name for name in names if matches(name, patterns)}
    return sorted(wanted - held), sorted((ours & held) - wanted)


def upstream(version):
    """A version without its epoch and the packager's revision."""
    return (version.rpartition("-")[0] or version).rpartition(":")[2]


def kernel_of(name):
    """(sortable version, flavour) of a package such as linux-headers-6.1.0-27-cloud-amd64; None for others."""
    found = re.match(r"linux-headers-(\d[\d.]*(?:-\d+)?)-?(.*)$", name)
    return found and (tuple(int(part) for part in re.findall(r"\d+", found.group(1))), found.group(2))


def newest_headers(names, wanted):
    """The newest of `names` with the flavour of `wanted`; None where there is none."""
    flavour = (kernel_of(wanted) or ((), ""))[1]
    found = [(kernel_of(name)[0], name) for name in names if kernel_of(name) and kernel_of(name)[1] == flavour]
    return max(found)[1] if found else None


def no_headers(kernel, newest):
    """Why the driver cannot be built, in words. newest: a kernel's release, or None."""
    if newest is None:
        return (
            "No headers for the running kernel %s, nor for another of its kind, are in the sources of this host: "
            "enable the distribution's updates, or install the headers by hand" % kernel
        )
    return (
        "No headers for the running kernel %s are in the sources of this host. The newest kernel of its kind there is "
        "%s: install it with its headers, reboot into it, then run again" % (kernel, newest)
    )


def advice(text):
    """What to do about a package manager's complaint; empty where it speaks for itself."""
    return " ".join("%s." % told for pattern, told in ADVICE if re.search(pattern, text, re.IGNORECASE)).rstrip(".")


def active(unit):
    try:
        return bool(unit) and run(["systemctl", "is-active", "--quiet", unit])[0] == 0
    except FileNotFoundError:
        return False


def holder(text):
    """The process that holds the lock that a complaint is about; apt names it for some locks only."""
    named, lock = HOLDER.search(text), re.search(r"(/\S+[/.]lock(?:-frontend)?)\b", text)
    try:
        if named:
            pid = int(named.group(1))
        else:
            with open(lock.group(1) if lock else os.devnull, "r+") as file:
                asked = struct.pack("hhlli", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                pid = struct.unpack("hhlli", fcntl.fcntl(file, fcntl.F_GETLK, asked))[4]
        with open("/proc/%d/cmdline" % pid, "rb") as handle:
            command = handle.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except (OSError, struct.error):
        return ""
    return " It is process %d: %s" % (pid, command[:200])


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
                "another process has held the package manager for %d s: %s.%s. Wait until it has ended, then run the "
                "same command again" % (lock_timeout_s, held[0].strip().rstrip(".?"), holder(held[0]))
            )
        sleep(2)


def complaints(text):
    """The lines of a package manager's talk that say what is wrong."""
    lines = [line.strip() for line in text.splitlines()]
    kept = [
        line
        for line in lines
        if re.match(r"(E:|W: (Failed to fetch|GPG error)|Err:|[45]\d\d  |Error|Consult|dpkg: error)", line)
    ]
    return "; ".join(dict.fromkeys(kept or [line for line in lines if line][-3:]))[:1500]


class Apt:
    """Debian and Ubuntu."""

    def __init__(self, lock_timeout_s):
        self.lock_timeout_s = lock_timeout_s
        self.apt_get = [
            *("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=%d" % lock_timeout_s),
            *("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"),
        ]
        self.holds_are_ours = False
        self.over_holds = False  # whether a hold of the site's gives way to a wanted version
        self.held = set()
        self.stale = None  # until the lists have been read: what was wrong with them

    def read(self):
        """{name: (version, state)} of every package that dpkg knows of; `held` as well."""
        code, out, err = run(["dpkg-query", "-W", "-f", "${Package}\t${db:Status-Abbrev}\t${Version}\n"])
        if code != 0:
            raise Problem("dpkg-query fails: %s" % err.strip()[-500:])
        found, self.held = {}, set()
        for line in out.splitlines():
            name, status, version = line.split("\t")
            state = UNFINISHED.get(status[1], "missing")
            if status[0] == "h":
                self.held.add(name)
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

    def available(self, names):
        """Those that the host's sources have, as far as it has read them."""
        return [name for name in names if run(["apt-cache", "show", name])[0] == 0]

    def update(self):
        """Read the package lists, once; a source that fails is a matter of what cannot be installed then."""
        if self.stale is None:
            code, out, err = run_locked([*self.apt_get, "update"], self.lock_timeout_s)
            bad = code != 0 or "Failed to fetch" in err or "GPG error" in err
            self.stale = complaints(out + "\n" + err) if bad else ""

    def exact(self, item):
        """The item with the newest version that its pattern fits: apt itself takes a star at the end alone."""
        name, _, pattern = item.partition("=")
        fitting = [version for version in self.versions(name) if fnmatch.fnmatchcase(version, pattern)]
        return "%s=%s" % (name, fitting[0]) if "*" in pattern and fitting else item

    def versions(self, name):
        """What the sources have of a package, the newest first."""
        table = run(["apt-cache", "madison", name])[1]
        return list(dict.fromkeys(line.split("|")[1].strip() for line in table.splitlines() if line.count("|") >= 2))

    def install(self, items):
        self.update()
        items = [self.exact(item) if "=" in item else item for item in items]
        options = ["--allow-downgrades"] if any("=" in item for item in items) else []
        options += ["--allow-change-held-packages"] if self.over_holds else []
        code, out, err = run_locked(
            [*self.apt_get, "install", "--no-install-recommends", *options, *items], self.lock_timeout_s
        )
        if code == 0:
            return
        said = complaints(err + "\n" + out)
        hints = [text for text in (self.headers_hint(err), self.version_hint(err)) if text]
        if self.stale:
            hints.append(advice(self.stale))
            raise Problem(
                "the package lists of this host cannot be read: %s. Check the sources in /etc/apt and the way to "
                "them (clusterkit_proxy), then run again. %s Without them: %s" % (self.stale, " ".join(hints), said)
            )
        hints.append(advice(err + out))
        raise Problem(("apt-get cannot install %s: %s. %s" % (", ".join(items), said, " ".join(hints))).rstrip(". "))

    def headers_hint(self, text):
        for name in re.findall(r"Unable to locate package (linux-headers-\d\S*)", text):
            names = run(["apt-cache", "pkgnames", "linux-headers-"])[1].split()
            newest = newest_headers(names, name)
            return no_headers(name[len("linux-headers-") :], newest and newest[len("linux-headers-") :]) + "."
        return ""

    def version_hint(self, text):
        names = re.findall(r"Version '[^']*' for '([^']*)' was not found", text)
        return " ".join("Of %s there is: %s." % (name, ", ".join(self.versions(name)[:5]) or "none") for name in names)

    def hold(self, put, lift):
        for word, names in (("hold", put), ("unhold", lift)):
            code, out, err = run_locked(["apt-mark", word, *names], self.lock_timeout_s) if names else (0, "", "")
            if code != 0:
                raise Problem("apt-mark cannot %s %s: %s" % (word, ", ".join(names), complaints(err or out)))

    def remove(self, names):
        code, out, err = run_locked(
            [*self.apt_get, "purge", "--allow-change-held-packages", *names], self.lock_timeout_s
        )
        if code != 0:
            raise Problem("apt-get cannot remove %s: %s" % (", ".join(names), complaints(err + "\n" + out)))


class Dnf:
    """The Enterprise Linux family."""

    def __init__(self, lock_timeout_s):
        self.lock_timeout_s = lock_timeout_s
        self.holds_are_ours = True  # the marked block
        self.over_holds = False  # dnf knows no such thing
        self.held = set()
        self.locks = {}  # {name: [the lines that hold its installed versions]}
        self.stale = None  # until the lists have been read: what was wrong with them

    def read(self):
        query = "%{NAME}\t%{VERSION}-%{RELEASE}\t%{EPOCHNUM}\n"
        code, out, err = run(["rpm", "-qa", "--qf", query])
        if code != 0:
            raise Problem("rpm fails: %s" % err.strip()[-500:])
        found, self.locks = {}, {}
        for line in out.splitlines():
            name, version, epoch = (line + "\t0").split("\t")[:3]
            # Kernels, and what is made like them (kernel-devel), stay beside one another in several versions.
            found[name] = (version, None, *(kept for kept in found.get(name, ()) if kept))
            self.locks.setdefault(name, []).append("%s-%s:%s.*" % (name, epoch, version))
        block = set(self.block()[1])
        self.held = {name for name, lines in self.locks.items() if block and block.issuperset(lines)}
        return found

    def block(self):
        """(the whole file, our lines in it)"""
        try:
            with open(VERSIONLOCK) as handle:
                text = handle.read()
        except FileNotFoundError:
            return "", []
        found = BLOCK.search(text)
        return text, found.group(1).splitlines() if found else []

    def interrupted(self, have, missing):
        return ""  # rpm's database recovers by itself

    def finish(self):
        pass

    def available(self, names):
        return [name for name in names if run(["dnf", "-q", "-C", "list", name])[0] == 0]

    def dnf(self, *words):
        # Without exit_on_lock, dnf waits for ever; with -q, it keeps its reasons to itself.
        return run_locked(["dnf", "-y", "--setopt=exit_on_lock=True", *words], self.lock_timeout_s)

    def update(self):
        """Read the package lists, once: for two days dnf believes what it has."""
        if self.stale is None:
            code, _out, err = self.dnf("--refresh", "makecache")
            self.stale = " ".join(err.split())[:1500] if UNREAD.search(err) else ""
            if code != 0 and self.stale:
                raise Problem(
                    "the package lists of this host cannot be read: %s. Check /etc/yum.repos.d and the way to them "
                    "(clusterkit_proxy), then run again. %s" % (self.stale, advice(err))
                )

    def query(self, *words):
        return run(["dnf", "-q", "-C", "repoquery", "--qf", "%{version}-%{release}\n", *words])[1].split()

    def exact(self, item):
        """The item with the newest version that its pattern fits: dnf's own star reaches into longer names too."""
        name, _, pattern = item.partition("=")
        if "*" not in pattern:
            return item.replace("=", "-", 1)
        there = self.query(name)
        fitting = ["%s-%s" % (name, version) for version in there if fnmatch.fnmatchcase(version, pattern)]
        if not fitting:
            told = "Of %s there is: %s" % (name, ", ".join(dict.fromkeys(there)) or "none")
            hint = "%s. %s" % (self.stale, advice(self.stale)) if self.stale else "Check the pin, or the mirror"
            raise Problem(("dnf cannot install %s. %s. %s" % (item, told, hint)).rstrip(". "))
        return "%s-%s" % (name, self.query("--latest-limit=1", *fitting)[0]) if len(set(fitting)) > 1 else fitting[0]

    def install(self, items):
        self.update()
        code, _out, err = self.dnf("--setopt=install_weak_deps=False", "install", *[self.exact(item) for item in items])
        if code == 0:
            return
        hints = [text for text in (self.headers_hint(err), self.stale, advice(err + self.stale)) if text]
        said = " ".join(err.split())[:1500].rstrip(".")
        raise Problem(("dnf cannot install %s: %s. %s" % (", ".join(items), said, " ".join(hints))).rstrip(". "))

    def headers_hint(self, text):
        for kernel in re.findall(r"Unable to find a match:.*?\bkernel-devel-(\d\S*)", text):
            query = ["dnf", "-q", "-C", "repoquery", "--latest-limit=1", "--qf", "%{version}-%{release}.%{arch}\n"]
            names = run([*query, "kernel-devel"])[1].split()
            return no_headers(kernel, names[0] if names else None) + "."
        return ""

    def hold(self, put, lift):
        # Written anew, the block would lose lines whose package has another version by now.
        if put or lift:
            self.write_block((self.held | set(put)) - set(lift))

    def write_block(self, names):
        """The list of the plugin, with our block for these packages; the site's own lines stay."""
        text, _ours = self.block()
        lines = "".join("%s\n" % line for name in sorted(names) for line in sorted(self.locks.get(name, [])))
        block = "# Begin: held by clusterkit\n%s# End: held by clusterkit\n" % lines if lines else ""
        rest = BLOCK.sub("", text)
        if rest + block == text:
            return
        with open(VERSIONLOCK + ".clusterkit", "w") as out:
            out.write(rest + ("\n" if rest and not rest.endswith("\n") else "") + block)
        os.rename(VERSIONLOCK + ".clusterkit", VERSIONLOCK)
        self.held = set(names)

    def remove(self, names):
        code, _out, err = self.dnf("--noautoremove", "remove", *names)
        if code != 0:
            raise Problem("dnf cannot remove %s: %s" % (", ".join(names), " ".join(err.split())[:1500]))


def manager(lock_timeout_s):
    if shutil.which("dpkg-query"):
        return Apt(lock_timeout_s)
    if shutil.which("rpm") and shutil.which("dnf"):
        return Dnf(lock_timeout_s)
    raise Problem("this host has neither dpkg nor dnf; distributions that are supported stand in roles/preflight")


def read_record(path):
    """{packages: [...], held: [...]}: what this module has installed and held."""
    try:
        with open(path) as handle:
            found = json.load(handle)
            return {"packages": list(found["packages"]), "held": list(found.get("held", []))}
    except FileNotFoundError:
        return {"packages": [], "held": []}
    except (ValueError, KeyError, TypeError):
        raise Problem("the record %s cannot be read; take it away, and a removal will name fewer packages" % path)


def write_record(path, packages, held):
    if not path:
        return
    known = read_record(path)
    wanted = {"packages": sorted(set(known["packages"]) | set(packages)), "held": sorted(held)}
    if wanted == {"packages": sorted(known["packages"]), "held": sorted(known["held"])}:
        return
    if not wanted["held"]:
        del wanted["held"]
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".packages-", dir=folder)
    with os.fdopen(handle, "w") as out:
        json.dump(wanted, out, indent=1)
        out.write("\n")
    os.chmod(temporary, 0o644)
    os.rename(temporary, path)


def check_space(free_mib):
    for path, needed in sorted(free_mib.items()):
        nearest = path
        while not os.path.isdir(nearest):
            nearest = os.path.dirname(nearest) or "/"
        free = shutil.disk_usage(nearest).free >> 20
        if free < int(needed):
            raise Problem(
                "%d MiB are free in %s, and %d are needed to install. Take old kernels or other files away there, "
                "then run again" % (free, path, int(needed))
            )


def alike(have, pairs, pattern=lambda version: "*%s-*" % upstream(version)):
    """The followers, each at its leader's upstream version where that is installed; or as `pattern` has it."""
    leaders = {name: have.get(leader, (None, None))[0] for name, leader in pairs.items()}
    return ["%s=%s" % (name, pattern(leaders[name])) if leaders[name] else name for name in sorted(leaders)]


class Wanted:
    """What one call asks for, against what the host has."""

    def __init__(self, tool, params, check):
        self.tool, self.params, self.check = tool, params, check
        self.leaders = dict(params["alike"], **params["built_with"])
        self.ours = set(read_record(params["record"])["held"]) if params["record"] else set()
        self.busy = None
        tool.over_holds = bool(params["hold"])
        self.look()
        # The marked block is one for all calls of the kit: who holds nothing leaves it to those who do.
        if tool.holds_are_ours and (params["hold"] or self.ours):
            self.ours |= tool.held

    def look(self):
        self.have = self.tool.read()
        followers = alike(self.have, self.params["alike"])
        followers += alike(self.have, self.params["built_with"], lambda version: "*-%s" % version.rpartition("-")[2])
        self.phases = [self.params["first"], self.params["packages"], followers]

    def missing(self):
        changes = plan(self.have, self.phases[0] + self.phases[1])
        moving = {change["name"] for change in changes}
        followers = {name: leader for name, leader in self.leaders.items() if leader in moving}
        for name, leader in sorted(followers.items()):
            version, state = self.have.get(name, (None, "missing"))[:2]
            told = {"what": "package", "name": name, "wanted": "the version of %s" % leader}
            changes.append(dict(told, actual=version or state))
        still = [item for item in self.phases[2] if item.partition("=")[0] not in followers]
        return changes + plan(self.have, still)

    def guarded(self, change):
        """Whether it has to wait: the unit runs that it would pull the ground from under."""
        if not matches(change["name"], self.params["guard"]):
            return False
        if self.busy is None:
            self.busy = active(self.params["busy_unit"])
        return self.busy

    def split(self):
        """(what may be done, what waits), with what it would stop."""
        now, left = [], []
        for change in self.missing():
            if not self.guarded(change):
                now.append(change)
            elif self.check and self.params["consent"]:
                now.append(dict(change, disrupts=["node"]))
            else:
                left.append(dict(change, disrupts=["node"], left=True))
        return now, left

    def holds(self, coming=()):
        installed = [name for name, found in self.have.items() if found[0]]
        return holds(set(installed) | set(coming), self.tool.held, self.ours, self.params["hold"])

    def version_of(self, name):
        """What is installed of it; of several versions one that is wanted."""
        version, _state, *more = self.have.get(name, ("", None))
        wanted = [item.partition("=")[2] for phase in self.phases for item in phase if item.startswith(name + "=")]
        fitting = [found for found in (version, *more) if found and wanted and fnmatch.fnmatchcase(found, wanted[0])]
        return fitting[0] if fitting else version or ""

    def result(self, told, left):
        names = [item.partition("=")[0] for phase in self.phases for item in phase]
        return {
            "changes": told + left,
            "waiting": [change["name"] for change in left],
            "versions": {name: self.version_of(name) for name in names},
        }

    def install_unheld(self, left):
        """The same with our holds lifted meanwhile: apt takes away no held package for one that replaces it."""
        lifted = sorted(self.ours & self.tool.held)
        self.tool.hold([], lifted)
        try:
            self.install(left)
        finally:
            self.look()
            self.tool.hold([name for name in lifted if self.have.get(name, (None, None))[0]], [])
            self.look()

    def install(self, left):
        """Phase by phase, but for `left`: what comes later may depend on the versions that came before."""
        extra = None
        for number in range(len(self.phases)):
            phase = [change["name"] for change in plan(self.have, self.phases[number]) if change["name"] not in left]
            items = [item for item in dict.fromkeys(self.phases[number]) if item.partition("=")[0] in phase]
            if items and extra is None and self.params["optional"]:
                if hasattr(self.tool, "update"):
                    self.tool.update()
                missing = [name for name in self.params["optional"] if not self.have.get(name, (None,))[0]]
                extra = self.tool.available(missing)
                items += extra
            if items:
                self.tool.install(items)
                self.look()


def hold_changes(put, lift):
    told = [{"what": "hold", "name": name, "wanted": "held", "actual": "not held"} for name in put]
    return told + [{"what": "hold", "name": name, "wanted": "not held", "actual": "held"} for name in lift]


def ensure(tool, params, check):
    """{changes, waiting, versions}: what was to be done; and, unless `check`, does it."""
    wanted = Wanted(tool, params, check)
    changes, left = wanted.split()
    interrupted = tool.interrupted(wanted.have, bool(changes))
    told, finished = list(changes), []
    if interrupted:
        finished = [{"what": "package", "name": "dpkg", "wanted": "finished", "actual": interrupted}]
    if check:
        if changes:
            check_space(params["free_mib"])
        told += finished + hold_changes(*wanted.holds(change["name"] for change in changes))
        return wanted.result(told, left)
    if interrupted:
        tool.finish()
        told += finished
        wanted.look()
        changes, left = wanted.split()
    before = set(tool.held)
    if changes:
        check_space(params["free_mib"])
        # Only what is not there at all: another version of a site's own package does not make it ours.
        write_record(params["record"], [c["name"] for c in changes if c["actual"] == "missing"], wanted.ours)
        wanted.install_unheld([change["name"] for change in left])
        amiss = wanted.split()[0]
        if amiss:
            raise Problem(
                "after the installation these are not as wanted: %s. Is one of them a virtual package? Name the one "
                "that provides it" % ", ".join("%(name)s (%(actual)s)" % change for change in amiss)
            )
    put, lift = wanted.holds()
    if put or lift:
        write_record(params["record"], [], (wanted.ours | set(put)) - set(lift))
        tool.hold(put, lift)
        # Another version takes its hold along: putting it back is no change.
        told += hold_changes([name for name in put if name not in before], lift)
    return wanted.result(told, left)


def forget(tool, params, check):
    """{changes, recorded}: the holds of the record go, and those of its packages that are named; the others stay."""
    record = read_record(params["record"]) if params["record"] else {"packages": [], "held": []}
    have = tool.read() if record["packages"] or record["held"] else {}
    lift = [name for name in record["held"] if name in tool.held]
    there = [name for name in record["packages"] if have.get(name, (None, None))[0]]
    gone = [name for name in there if matches(name, params["packages"])]
    changes = hold_changes([], lift)
    changes += [{"what": "package", "name": name, "wanted": "absent", "actual": have[name][0]} for name in gone]
    if not check:
        if lift:
            tool.hold([], lift)
        if gone:
            tool.remove(gone)
        if params["record"] and os.path.exists(params["record"]):
            os.unlink(params["record"])
    return {"changes": changes, "recorded": [name for name in there if name not in gone]}


def difference(changes):
    """Ansible's diff: a line per package."""

    def lines(key):
        return "".join("%s: %s\n" % (change["name"], change[key]) for change in changes)

    return {"before": lines("actual"), "after": lines("wanted")}


def main():
    words = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "recorded", "absent"], "default": "present"},
            "packages": words,
            "first": words,
            "optional": words,
            "alike": {"type": "dict", "default": {}},
            "built_with": {"type": "dict", "default": {}},
            "hold": words,
            "free_mib": {"type": "dict", "default": {}},
            "guard": words,
            "busy_unit": {"type": "str"},
            "consent": {"type": "bool", "default": False},
            "record": {"type": "path"},
            "lock_timeout_s": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        tool = manager(params["lock_timeout_s"])
        if params["state"] == "recorded":
            names = read_record(params["record"])["packages"] if params["record"] else []
            have = tool.read() if names else {}
            module.exit_json(changed=False, changes=[], recorded=[n for n in names if have.get(n, (None, ""))[0]])
        result = (forget if params["state"] == "absent" else ensure)(tool, params, module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or "the package manager", error.strerror))
    done = [change for change in result["changes"] if not change.get("left")]
    module.exit_json(changed=bool(done), diff=difference(done), **result)


if __name__ == "__main__":
    main()
