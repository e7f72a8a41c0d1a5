#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_driver
short_description: Whether the wanted GPU driver is loaded, and what it takes where it is not
description:
  - Reads what is installed for the running kernel and for the one that boots next, what is loaded, and what stands in
    the way (DKMS, blacklists, Secure Boot, nouveau, kernel parameters), and decides.
  - Installs nothing and reboots nothing. It loads the module where that is enough, and keeps the marker that stops
    a second reboot for the same reason.
author:
  - clusterkit
options:
  module:
    description: The kernel module. Without it only C(parameters) and C(reasons) count.
    type: str
  version:
    description: The wanted driver version.
    type: str
    default: ""
  builds:
    description:
      - What that version is called by DKMS or by the module itself, as a list of accepted beginnings, or as a mapping
        of driver versions to one of them or several. C(6.16.13.30300400-2341068), the version of AMD's package,
        also stands for the C(6.16.13-2341068.24.04) of DKMS and the C(6.16.13) of the module.
      - Without it nvidia takes C(version) itself, and any driver of amdgpu's is taken that is not the kernel's own.
    type: raw
  dkms:
    description: Whether the module is built by DKMS.
    type: bool
    default: true
  parameters:
    description: Whole tokens that the kernel has to be booted with.
    type: list
    elements: str
    default: []
  reasons:
    description: Reasons for a reboot that somebody else found. They cannot be checked here.
    type: list
    elements: str
    default: []
  forget_reasons:
    description: >-
      Whether the caller has seen for itself that nothing more is to be done for such reasons; then a marker that names
      some goes as well, once all fits.
    type: bool
    default: false
  load:
    description: Load the module where nothing is loaded and the wanted one would be.
    type: bool
    default: false
  mark:
    description: Write the marker where a reboot is needed. To be said right before the reboot.
    type: bool
    default: false
  consent:
    description: With false a needed reboot is listed as left, and nothing is marked.
    type: bool
    default: true
  marker:
    description: The file that says for what the host was rebooted, and in which boot that was decided.
    type: path
    default: /var/lib/clusterkit/reboot.json
"""

EXAMPLES = r"""
- name: Look at the driver
  gpu_driver:
    module: amdgpu
    version: 30.30.4
    builds: [6.16.13.30300400-2341068]
    load: true
  register: driver
"""

RETURN = r"""
state:
  description:
    - C(fits), C(load) (modprobe is enough, and waits for a driver that is still initialising), C(reboot),
      C(not_installed) (the wanted version is not on this host) or C(broken) (a reboot would not help).
  returned: always
  type: str
reasons:
  description: Why a reboot is needed.
  returned: always
  type: list
problems:
  description: What stands in the way, each with C(problem) and C(fix). Under C(fits), what the next boot will meet.
  returned: always
  type: list
summary:
  description: What is loaded, what is wanted, and why they differ, in one line.
  returned: always
  type: str
loaded:
  description: C(version) and C(srcversion); the version is null for the kernel's own driver.
  returned: where one is loaded
  type: dict
on_disk:
  description: By kernel, the running one and the next, what modinfo says of the module there.
  returned: always
  type: dict
changes:
  description: What differs, each with C(what), C(name), C(wanted), C(actual), and C(disrupts) where it takes a reboot.
  returned: always
  type: list
  elements: dict
"""

import datetime
import glob
import json
import os
import re
import shutil
import subprocess
import tempfile

from ansible.module_utils import secure_boot
from ansible.module_utils.basic import AnsibleModule

ROOT = "/"
# An SSH session's PATH can lack them.
SBIN = ":/usr/sbin:/sbin"
# DKMS signs with the first of them that is there: Ubuntu's, its own.
# In this order a file hides one of the same name (modprobe.d(5)).
MODPROBE = ("/etc/modprobe.d", "/run/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d")
# NVIDIA/open-gpu-kernel-modules #567: the open modules' package for EL had a name of its own.
DKMS_NAMES = {"nvidia": ("nvidia", "nvidia-open")}
# dkms 3: `amdgpu/6.14, KERNEL, x86_64: installed`; dkms 2 and weak modules: `amdgpu, 6.14, KERNEL, x86_64: installed`.
DKMS_LINE = re.compile(
    r"^(?P<module>[^/,\s]+)(?:/|, )(?P<version>[^,:/\s]+)(?:, (?P<kernel>[^,\s]+), [^:\s]+)?: ?(?P<state>.+)$",
    re.MULTILINE,
)
BUILD = re.compile(r"(?:\d+:)?(\d+(?:\.\d+){0,2})(?:\.\d+)*(?:-(\d+))?")


class Problem(Exception):
    """It cannot be done; the message says what to do."""


# --------------------------------------------------------------------------- decide: facts in, words out


def matches(found, builds):
    """Whether this version is one of the wanted ones; `builds` empty takes all but the kernel's own.

    AMD's package 6.16.13.30300400-2341068 is 6.16.13-2341068.24.04 for DKMS, and 6.16.13 for the module itself.
    """
    if is_inbox(found):
        return False
    return not builds or any(same_build(found, build) for build in builds)


def same_build(found, build):
    left, right = BUILD.match(found), BUILD.match(build)
    if not left or not right:
        return found == build
    want = right.group(1).split(".")
    if left.group(1).split(".")[: len(want)] != want:
        return False
    return None in (left.group(2), right.group(2)) or left.group(2) == right.group(2)


def is_inbox(version):
    """The kernel's own driver has no version; amd-smi calls it Linuxver... ."""
    return not version or version.startswith("Linuxver")


def marked(wanted):
    """What a marker remembers of the wish."""
    return {key: wanted[key] for key in ("module", "version", "builds", "parameters", "reasons")}


def wish(wanted):
    """The wanted driver in words."""
    builds = ", ".join(build for build in wanted["builds"] if build != wanted["version"])
    version = wanted["version"] or builds or "any version that is not the kernel's own"
    return "%s (%s)" % (version, builds) if builds and wanted["version"] else version


def described(facts, module):
    """What is loaded, in words."""
    if facts["loaded"] is None:
        return "nouveau" if facts["nouveau"] else "nothing"
    version = facts["loaded"]["version"]
    return "the kernel's own %s" % module if is_inbox(version) else "%s %s" % (module, version)


def obstacle(facts, wanted, kernel):
    """Why the wanted module is not there for this kernel: a problem; None where it is."""
    module = wanted["module"]
    if wanted["dkms"]:
        ours = [entry for entry in facts["dkms"] if matches(entry["version"], wanted["builds"])]
        here = [entry for entry in ours if entry["kernel"] == kernel]
        if not any(entry["state"].startswith("installed") for entry in here):
            name = "%(module)s/%(version)s" % ours[0] if ours else "%s %s" % (module, wish(wanted))
            text = "DKMS has not installed %s for the kernel %s" % (name, kernel)
            if kernel not in facts["headers"]:
                return {
                    "problem": "%s: that kernel's headers are not there" % text,
                    "fix": "install linux-headers-%s (kernel-devel-%s on EL), then: dkms install -m %s -k %s"
                    % (kernel, kernel, name, kernel),
                }
            if facts["make_log"]:
                text += "; %(path)s ends: %(tail)s" % facts["make_log"]
            return {"problem": text, "fix": "dkms install -m %s -k %s, and read what it says" % (name, kernel)}
    disk = facts["on_disk"].get(kernel)
    if disk is None or is_inbox(disk["version"]):
        there = "no %s" % module if disk is None else "the kernel's own %s, %s" % (module, disk["path"])
        return {
            "problem": "the kernel %s would load %s, not the one that is installed" % (kernel, there),
            "fix": "depmod -a %s; where that changes nothing, install the driver's package again" % kernel,
        }
    if not matches(disk["version"], wanted["builds"]):
        return {
            "problem": "for the kernel %s there is %s %s (%s)" % (kernel, module, disk["version"], disk["path"]),
            "fix": "take that one away, or install the driver again: %s is wanted" % wish(wanted),
        }
    return None


def kept_away(facts, wanted, kernel):
    """What keeps a module that is there from being loaded: problems."""
    module, found = wanted["module"], []
    for entry in facts["blacklists"]:
        # Who asks for it in the parameters loads the driver some other way.
        if entry["where"] == "/proc/cmdline" and entry["line"] in wanted["parameters"]:
            continue
        found.append(
            {
                "problem": "%s keeps %s away: %s" % (entry["where"], module, entry["line"]),
                "fix": "take that out of %s"
                % ("the boot loader's configuration" if entry["where"] == "/proc/cmdline" else entry["where"]),
            }
        )
    secure, disk = facts["secure_boot"], facts["on_disk"].get(kernel)
    if secure["enabled"] and disk:
        key = secure["key"] or secure_boot.KEYS[-1]
        enrol = "mokutil --import %s, reboot, and confirm at the console; or switch Secure Boot off in the BIOS" % key
        if not disk["signer"]:
            text = "Secure Boot rejects %s: it is not signed" % disk["path"]
            found.append({"problem": text, "fix": "have DKMS sign it; " + enrol})
        elif wanted["dkms"] and secure["enrolled"] is False:
            found.append(
                {
                    "problem": "Secure Boot rejects %s: the key %s is not enrolled" % (disk["path"], key)
                    + (", its enrolment waits for a confirmation at the console" if secure["pending"] else ""),
                    "fix": enrol,
                }
            )
    if facts["nouveau"] and not facts["nouveau"]["blocked"]:
        found.append(
            {
                "problem": "nouveau holds the GPUs, and nothing keeps it from doing so at the next boot",
                "fix": "write `blacklist nouveau` to a file in /etc/modprobe.d, and build the initramfs anew",
            }
        )
    return found


def decide_driver(facts, wanted):
    """(state, reasons, problems, changes) of the module alone."""
    module, running, following = wanted["module"], facts["running_kernel"], facts["next_kernel"]
    loaded, disk = facts["loaded"], facts["on_disk"].get(running)
    change = {"what": "driver", "name": module, "wanted": wish(wanted), "actual": described(facts, module)}
    versions = [entry["version"] for entry in facts["dkms"]] if wanted["dkms"] else []
    versions += [entry["version"] for entry in facts["on_disk"].values() if entry and not wanted["dkms"]]
    if not any(matches(version, wanted["builds"]) for version in versions):
        there = ", ".join(sorted({version for version in versions if version}))
        text = "%s %s is not installed" % (module, wish(wanted)) + (", %s is" % there if there else "")
        problem = {"problem": text, "fix": "install it: playbooks/hosts.yml does"}
        if loaded or facts["nouveau"]:
            change["disrupts"] = ["host"]
        return "not_installed", [], [problem], [change]
    hole = obstacle(facts, wanted, running)
    differs = loaded and disk and None not in (loaded["srcversion"], disk["srcversion"])
    differs = differs and loaded["srcversion"] != disk["srcversion"]
    if loaded and not hole and not differs and loaded["version"] == disk["version"]:
        if loaded["initialising"]:
            return "load", [], [], [dict(change, actual="still initialising")]
        later = following and following != running and obstacle(facts, wanted, following)
        return "fits", [], ([later] if later else []) + kept_away(facts, wanted, following or running), []
    if hole:
        if not following or following == running or obstacle(facts, wanted, following):
            return "broken", [], [hole], [change]
        reason = "%s is installed for the kernel %s, which boots next, not for the running %s"
        kernel = {"what": "kernel", "name": "running kernel", "wanted": following, "actual": running}
        return "reboot", [reason % (module, following, running)], [], [change, kernel]
    if not loaded and not facts["nouveau"]:
        if wanted["load"]:
            problems = kept_away(facts, wanted, running)
            return ("broken" if problems else "load"), [], problems, [change]
        return "reboot", ["%s is not loaded" % module], [], [change]
    other = "another build of %s" % described(facts, module) if differs else described(facts, module)
    return "reboot", ["%s is loaded, and %s is installed" % (other, wish(wanted))], [], [change]


def decide(facts, wanted):
    """{state, reasons, problems, changes, forget}; `forget`: the marker has done its work.

    facts: what `observe` found; wanted: module (or None), version, builds, dkms, parameters, reasons, load.
    """
    state, reasons, problems, changes = decide_driver(facts, wanted) if wanted["module"] else ("fits", [], [], [])
    for parameter in wanted["parameters"]:
        if parameter not in facts["cmdline"]:
            reasons = reasons + ["the kernel was not booted with %s" % parameter]
            changes = changes + [
                {"what": "kernel parameter", "name": parameter, "wanted": "in force", "actual": "not in force"}
            ]
    reasons = reasons + wanted["reasons"]
    changes = changes + [
        {"what": "reboot", "name": reason, "wanted": "done", "actual": "pending"} for reason in wanted["reasons"]
    ]
    if reasons and state in ("fits", "load", "reboot"):
        state, following = "reboot", facts["next_kernel"] or facts["running_kernel"]
        # A reboot must not lead to a host without its driver.
        if wanted["module"]:
            hole = obstacle(facts, wanted, following)
            problems = [hole] if hole else kept_away(facts, wanted, following)
            state = "broken" if problems else state
    marker = facts["marker"]
    mine = marker is not None and marker.get("wanted") == marked(wanted)
    if state == "reboot":
        changes = [dict(change, disrupts=["host"]) for change in changes]
        if mine and marker.get("boot_id") != facts["boot_id"]:
            state = "broken"
            problems = [
                {
                    "problem": "the host was rebooted once for this already, at %s: %s"
                    % (marker.get("at"), "; ".join(reasons)),
                    "fix": "find out why that did not help (journalctl -b -k; an old module in the initramfs is one "
                    "cause: update-initramfs -u -k all, or dracut -f --regenerate-all), then remove the marker %s"
                    % facts["marker_path"],
                }
            ]
    # Other people's reasons cannot be checked here: unless they say so, their marker stays, and stops a second reboot
    # for the same.
    theirs = marker is not None and (marker.get("wanted") or {}).get("reasons") and not wanted["forget_reasons"]
    forget = state == "fits" and marker is not None and not theirs
    return {"state": state, "reasons": reasons, "problems": problems, "changes": changes, "forget": forget}


def summary(facts, wanted, decided):
    """One line for people."""
    words = []
    if wanted["module"]:
        words.append("loaded: %s" % described(facts, wanted["module"]))
        words.append("wanted: %s %s" % (wanted["module"], wish(wanted)))
    words.append(decided["state"])
    words += decided["reasons"] if decided["state"] == "reboot" else []
    words += ["%(problem)s. %(fix)s" % problem for problem in decided["problems"]]
    return "; ".join(words)


# --------------------------------------------------------------------------- observe


def at(path):
    return os.path.join(ROOT, path.lstrip("/"))


def text_of(path):
    """A small file's text without blanks around it; None where there is none."""
    try:
        with open(at(path), encoding="utf-8", errors="replace") as handle:
            return handle.read().strip()
    except OSError:
        return None


def run(*command):
    """(exit code, stdout, stderr); code 127 where there is no such program."""
    environment = dict(os.environ, LC_ALL="C", PATH=os.environ.get("PATH", "") + SBIN)
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        return 127, "", "there is no %s on this host" % command[0]
    try:
        done = subprocess.run(
            (program,) + command[1:],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            env=environment,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        raise Problem("%s did not end within 300 s; look at what it waits for" % " ".join(command))
    return done.returncode, done.stdout, done.stderr


def natural(kernel):
    """Orders 6.1.0-9 before 6.1.0-13."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", kernel) if part]


def following_kernel():
    """The kernel that boots next: the boot loader's choice, or the newest; None where the choice cannot be read."""
    code, out, _ = run("grubby", "--default-kernel")
    if code == 0 and "vmlinuz-" in out:
        return out.strip().split("vmlinuz-", 1)[1]
    config = text_of("/boot/grub/grub.cfg")
    if config is None:
        kernels = [
            name
            for name in (os.path.basename(path) for path in glob.glob(at("/lib/modules/*")))
            if os.path.exists(at("/boot/vmlinuz-" + name)) or os.path.exists(at("/lib/modules/%s/vmlinuz" % name))
        ]
        return max(kernels, key=natural) if kernels else None
    environment = dict(re.findall(r"^(\w+)=(.*)$", text_of("/boot/grub/grubenv") or "", re.MULTILINE))
    chosen = re.search(r'^\s*set default="([^"$]*)"', config, re.MULTILINE)
    choice = environment.get("next_entry") or (chosen.group(1) if chosen else environment.get("saved_entry")) or "0"
    entries = []
    for line in config.splitlines():
        head = re.match(r"\s*menuentry\s+(?:'([^']*)'|\"([^\"]*)\")(?:.*menuentry_id_option\s+'([^']*)')?", line)
        if head:
            entries.append({"names": [name for name in head.groups() if name], "kernel": None})
        kernel = re.match(r"\s*linux(?:efi)?\s+\S*vmlinuz-(\S+)", line)
        if kernel and entries:
            entries[-1]["kernel"] = kernel.group(1)
    if choice == "0":
        return entries[0]["kernel"] if entries else None
    named = [entry["kernel"] for entry in entries if choice.rsplit(">", 1)[-1] in entry["names"]]
    return named[0] if named else None


def modinfo(module, kernel):
    """{path, version, srcversion, signer} of the module on disk for a kernel; None where there is none."""
    base = () if ROOT == "/" else ("-b", ROOT)
    code, out, error = run("modinfo", "-k", kernel, *base, module)
    if code == 127:
        raise Problem("%s: install kmod" % error)
    found = dict(re.findall(r"^(filename|version|srcversion|signer):\s*(.*)$", out, re.MULTILINE))
    if code or "filename" not in found:
        return None
    keys = ("version", "srcversion", "signer")
    return dict({key: found.get(key) or None for key in keys}, path=found["filename"])


def dkms_entries(module):
    entries = []
    for name in DKMS_NAMES.get(module, (module,)):
        code, out, error = run("dkms", "status", "-m", name)
        if code not in (0, 127) and not out.strip():
            raise Problem("dkms status -m %s failed; mend or remove what it names: %s" % (name, error.strip()))
        found = [entry.groupdict() for entry in DKMS_LINE.finditer(out)]
        entries += [entry for entry in found if entry["module"] == name]
    return entries


def make_log(entries, builds):
    """{path, tail} of the log of a build that failed; None where there is none."""
    for entry in entries:
        path = "/var/lib/dkms/%s/%s/build/make.log" % (entry["module"], entry["version"])
        text = text_of(path) if matches(entry["version"], builds) else None
        if text:
            return {"path": path, "tail": " / ".join(line.strip() for line in text.splitlines()[-3:])}
    return None


def blacklists(module, cmdline):
    """[{where, line}] of what keeps a module away."""
    name = re.sub("[-_]", "[-_]", re.escape(module).replace(r"\-", "-"))
    pattern = re.compile(r"^\s*(blacklist\s+%s|install\s+%s\s+\S*/(?:true|false))\s*(?:#.*)?$" % (name, name), re.M)
    found, seen = [], set()
    for folder in MODPROBE:
        for path in sorted(glob.glob(at(folder) + "/*.conf")):
            file = os.path.basename(path)
            if file in seen:
                continue
            seen.add(file)
            text = text_of("%s/%s" % (folder, file)) or ""
            found += [{"where": "%s/%s" % (folder, file), "line": line} for line in pattern.findall(text)]
    for token in cmdline:
        key, _, value = token.partition("=")
        if key in ("modprobe.blacklist", "module_blacklist"):
            if module in [one.replace("-", "_") for one in value.split(",")]:
                found.append({"where": "/proc/cmdline", "line": token})
    return found


def loaded_module(module):
    folder = "/sys/module/" + module
    state = text_of(folder + "/initstate")
    # What is built in, or on its way out, has a folder too.
    if state not in ("live", "coming"):
        return None
    found = {key: text_of("%s/%s" % (folder, key)) for key in ("version", "srcversion")}
    return dict(found, initialising=state == "coming")


def read_marker(path):
    """The marker; {} where it cannot be read: then nobody knows what the reboot was for."""
    text = text_of(path)
    if text is None:
        return None
    try:
        marker = json.loads(text)
    except ValueError:
        marker = {}
    return marker if isinstance(marker, dict) else {}


def observe(wanted, marker):
    """The facts that `decide` reads."""
    module, cmdline = wanted["module"], (text_of("/proc/cmdline") or "").split()
    running = os.uname().release
    facts = {
        "boot_id": text_of("/proc/sys/kernel/random/boot_id"),
        "running_kernel": running,
        "next_kernel": following_kernel(),
        "cmdline": cmdline,
        "marker": read_marker(marker),
        "marker_path": marker,
        "loaded": None,
        "on_disk": {},
        "dkms": [],
    }
    if not module:
        return facts
    kernels = [kernel for kernel in dict.fromkeys([running, facts["next_kernel"]]) if kernel]
    facts["loaded"] = loaded_module(module)
    facts["on_disk"] = {kernel: modinfo(module, kernel) for kernel in kernels}
    facts["dkms"] = dkms_entries(module) if wanted["dkms"] else []
    facts["make_log"] = make_log(facts["dkms"], wanted["builds"])
    facts["headers"] = [kernel for kernel in kernels if os.path.exists(at("/lib/modules/%s/build" % kernel))]
    facts["blacklists"] = blacklists(module, cmdline)
    facts["secure_boot"] = secure_boot.read(ROOT)
    holder = module == "nvidia" and loaded_module("nouveau")
    facts["nouveau"] = {"blocked": bool(blacklists("nouveau", cmdline))} if holder else None
    return facts


# --------------------------------------------------------------------------- act


def write_marker(path, facts, wanted, reasons):
    """All or nothing, and on the disk: the host goes down right after it."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    entry = {"boot_id": facts["boot_id"], "wanted": marked(wanted), "reasons": reasons, "at": now}
    folder = os.path.dirname(at(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".reboot-", dir=folder)
    try:
        with os.fdopen(handle, "w") as out:
            out.write(json.dumps(entry, indent=2, sort_keys=True) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.rename(temporary, at(path))
    except OSError:
        os.unlink(temporary)
        raise
    # The name, too, survives a power cut.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def accepted(builds, version, module):
    """`builds` as a list, whatever form it was given in."""
    if isinstance(builds, dict):
        builds = builds.get(version)
    if isinstance(builds, str):
        builds = [builds]
    if builds is not None and not isinstance(builds, (list, tuple)):
        raise Problem("builds has to be a list, or a mapping of driver versions to a list, and is %r" % (builds,))
    if not builds and version and module != "amdgpu":
        builds = [version]
    return [str(build) for build in builds or [] if build]


def converge(wanted, given, check):
    """(facts, what was decided, whether something was changed)"""
    facts = observe(wanted, given["marker"])
    decided, changed = decide(facts, wanted), False
    if decided["state"] == "load":
        changed = True
        if not check:
            code, _, error = run("modprobe", wanted["module"])
            before, facts = decided, observe(wanted, given["marker"])
            decided = decide(facts, wanted)
            if code:
                fix = "look at: journalctl -k | grep %s" % wanted["module"]
                problem = {"problem": "modprobe %s failed: %s" % (wanted["module"], error.strip()), "fix": fix}
                decided, changed = dict(decided, state="broken", problems=[problem]), False
            decided["changes"] = before["changes"]
    if decided["state"] == "reboot" and not given["consent"]:
        decided["changes"] = [dict(change, left=True) for change in decided["changes"]]
    elif decided["state"] == "reboot" and given["mark"]:
        changed = True
        if not check:
            write_marker(given["marker"], facts, wanted, decided["reasons"])
    elif decided["forget"]:
        changed = True
        decided["changes"] = decided["changes"] + [
            {"what": "file", "name": given["marker"], "wanted": "absent", "actual": "of a reboot that is done"}
        ]
        if not check:
            os.unlink(at(given["marker"]))
    return facts, decided, changed


def main():
    module = AnsibleModule(
        argument_spec={
            "module": {"type": "str"},
            "version": {"type": "str", "default": ""},
            "builds": {"type": "raw"},
            "dkms": {"type": "bool", "default": True},
            "parameters": {"type": "list", "elements": "str", "default": []},
            "reasons": {"type": "list", "elements": "str", "default": []},
            "forget_reasons": {"type": "bool", "default": False},
            "load": {"type": "bool", "default": False},
            "mark": {"type": "bool", "default": False},
            "consent": {"type": "bool", "default": True},
            "marker": {"type": "path", "default": "/var/lib/clusterkit/reboot.json"},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        keys = ("version", "dkms", "parameters", "reasons", "forget_reasons", "load")
        wanted = dict({key: given[key] for key in keys}, module=given["module"] or None)
        wanted["builds"] = accepted(given["builds"], given["version"], given["module"])
        facts, decided, changed = converge(wanted, given, module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or given["marker"], error.strerror))
    shown = ("loaded", "on_disk", "running_kernel", "next_kernel", "dkms", "secure_boot")
    told = {key: facts[key] for key in shown if key in facts}
    told.update({key: decided[key] for key in ("state", "reasons", "problems", "changes")})
    module.exit_json(changed=changed, wanted=marked(wanted), summary=summary(facts, wanted, decided), **told)


if __name__ == "__main__":
    main()
