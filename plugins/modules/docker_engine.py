#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: docker_engine
short_description: A host's Docker Engine, with a daemon.json that is merged and can be given back
description:
  - Reads packages, daemon.json, the unit and the running dockerd, and compares them with what is wanted.
  - What the host had before is written into a record first, so that C(absent) can give it back.
  - The site's own keys of daemon.json stay. A key that the kit put in goes when it is no longer wanted.
  - dockerd is restarted when a file that it reads at its start is newer than its start. While the named
    container runs, that needs consent.
  - A daemon.json that dockerd does not start with is taken back.
author:
  - clusterkit
options:
  state:
    description:
      - C(planned) only compares, and writes the record where there is none.
      - C(present) writes the files and brings dockerd up; packages are installed by the caller.
      - C(absent) gives back what the host had. C(forgotten) then deletes O(data) and the record.
    type: str
    choices: [planned, present, absent, forgotten]
    default: present
  record:
    description: Where the record lies, readable by root alone.
    type: path
    required: true
  config:
    description: The kit's keys of daemon.json; a null leaves a key out.
    type: dict
    default: {}
  config_file:
    description: The daemon.json.
    type: path
    default: /etc/docker/daemon.json
  files:
    description: Further files of the kit's by path, with their whole content.
    type: dict
    default: {}
  gone:
    description: Files that must not be there.
    type: list
    elements: path
    default: []
  secrets:
    description: Texts that no output may hold; a file with one of them is readable by root alone.
    type: list
    elements: str
    default: []
  packages:
    description: Wanted packages by ID of os-release, or by ID-VERSION where a release differs.
    type: dict
    default: {}
  engine_packages:
    description: Those of them whose installation restarts dockerd; they get O(version).
    type: list
    elements: str
    default: []
  version:
    description: Version of the engine's packages; the repository's candidate where it is empty.
    type: str
    default: ""
  conflicts:
    description: Packages that must not be there.
    type: list
    elements: str
    default: []
  removable:
    description: Packages that C(absent) names for removal where the host did not have them before.
    type: list
    elements: str
    default: []
  remove_packages:
    description: Whether the caller of C(absent) removes packages and data.
    type: bool
    default: false
  repository:
    description: URL of a package repository; files of the site's that name it already are listed.
    type: str
    default: ""
  trust:
    description: The system's certificate authorities, as dockerd reads them at its start; the first that exists counts.
    type: list
    elements: path
    default: []
  container:
    description: While this container runs, dockerd is restarted only with O(disruption).
    type: str
    default: clusterkit-ray
  disruption:
    description: Consent to restart dockerd under that container.
    type: bool
    default: false
  agent:
    description: The host agent's program; where it is there, it can stop the node first.
    type: path
  started:
    description: Whether dockerd is to be enabled and to run.
    type: bool
    default: true
  restart:
    description: Without it a running dockerd only reads the new daemon.json, which shows whether it takes it.
    type: bool
    default: true
  data:
    description: Folders that C(forgotten) deletes.
    type: list
    elements: path
    default: []
"""

EXAMPLES = r"""
- name: Configure dockerd
  docker_engine:
    record: /var/lib/clusterkit/container-engine.json
    config: {live-restore: true}
"""

RETURN = r"""
work:
  description: Whether there is anything to do.
  returned: state is planned
  type: bool
install:
  description: Packages to install now, with their versions.
  returned: state is planned
  type: list
drain:
  description: Whether the node is to be drained and stopped first.
  returned: state is planned
  type: bool
waiting:
  description: What was left, because the container runs and consent is missing.
  returned: state is planned or present
  type: list
distribution:
  description: C(id), C(version), C(codename), C(architecture) and C(manager) of the host.
  returned: state is planned or absent
  type: dict
repository_files:
  description: Files of the site's that name the repository.
  returned: state is planned
  type: list
packages:
  description: What the kit installed and the host did not have before.
  returned: state is absent
  type: list
data:
  description: Folders that belong to those packages.
  returned: state is absent
  type: list
"""

import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

SERVICE = "docker.service"
SOCKET = "docker.socket"
OS_RELEASE = "/etc/os-release"
DROP_INS = "/etc/systemd/system/docker.service.d"
SBIN = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d/*", "/etc/yum.repos.d/*.repo")
DATA_ROOT = "/var/lib/docker"
CONTAINERD_ROOT = "/var/lib/containerd"
PATIENCE_S = 60
ANSWER_S = 20
# Lists in which several owners may have entries.
UNITED = ("registry-mirrors", "insecure-registries")
# dockerd's flags that stand under another name in daemon.json (docker/cli, docs/reference/dockerd.md).
FLAG_KEYS = {
    "add-runtime": None,  # allowed in both places
    "authorization-plugin": "authorization-plugins",
    "default-address-pool": "default-address-pools",
    "default-ulimit": "default-ulimits",
    "dns-opt": "dns-opts",
    "exec-opt": "exec-opts",
    "feature": "features",
    "host": "hosts",
    "insecure-registry": "insecure-registries",
    "label": "labels",
    "log-opt": "log-opts",
    "node-generic-resource": "node-generic-resources",
    "registry-mirror": "registry-mirrors",
    "storage-opt": "storage-opts",
}
SHORT_FLAGS = {
    "b": "bridge",
    "D": "debug",
    "G": "group",
    "g": "data-root",
    "H": "hosts",
    "l": "log-level",
    "p": "pidfile",
    "s": "storage-driver",
}


class Problem(Exception):
    """It cannot be done; the text says why, where, and what to do."""


# --------------------------------------------------------------------------- daemon.json: pure


def parse(text, path):
    """The object in a daemon.json; none and an empty file count as `{}`, as for dockerd."""
    if text is None or not text.strip():
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Problem(
            "%s, line %d: no valid JSON: %s. Mend it, or move it away, and run again; nothing was touched."
            % (path, getattr(error, "lineno", 1), getattr(error, "msg", error))
        )
    if not isinstance(found, dict):
        raise Problem("%s, line 1: a JSON object is needed here. Mend it, or move it away; nothing was touched." % path)
    return found


def same(one, other):
    """Equal as JSON: Python alone takes 1 for true."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def digest(text):
    return "none" if text is None else hashlib.sha256(text.encode()).hexdigest()


def without_nulls(value):
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}


def replaced_whole(site, ours):
    """Keys of objects that are not merged: log options belong to one driver, and another refuses them."""
    driver = ours.get("log-driver")
    return {"log-opts"} if driver and driver != site.get("log-driver", "json-file") else set()


def merge(site, ours):
    """The site's object with ours on top: objects are merged, mirrors and insecure registries united."""
    whole, merged = replaced_whole(site, ours), dict(site)
    for key, value in ours.items():
        have = site.get(key)
        if isinstance(value, dict) and isinstance(have, dict) and key not in whole:
            merged[key] = merge(have, value)
        elif key in UNITED and isinstance(value, list) and isinstance(have, list):
            merged[key] = have + [entry for entry in value if entry not in have]
        else:
            merged[key] = value
    return merged


def split(now, ours, site):
    """What the site itself wants, from a file that may have been edited since.

    now: the file; ours: what the kit put in; site: what the site had then. Where ours stands, the site's
    value is the one from then; everything else is as the file says now.
    """
    whole, found = replaced_whole(site, ours), {}
    for key in list(now) + [key for key in site if key not in now]:
        if key not in ours:
            if key in now:
                found[key] = now[key]
        elif isinstance(ours[key], dict) and isinstance(site.get(key, {}), dict) and key not in whole:
            value = now.get(key) if isinstance(now.get(key), dict) else {}
            inner = split(value, ours[key], site.get(key, {}))
            if inner or key in site:
                found[key] = inner
        elif key in UNITED and isinstance(ours[key], list) and isinstance(now.get(key), list):
            had = site.get(key) if isinstance(site.get(key), list) else []
            inner = [entry for entry in now[key] if entry not in ours[key] or entry in had]
            if inner or key in site:
                found[key] = inner
        elif key in site:
            found[key] = site[key]
    return found


def together(one, other):
    """Everything that either of two `ours` has put in."""
    merged = dict(one)
    for key, value in other.items():
        have = one.get(key)
        if isinstance(value, dict) and isinstance(have, dict):
            merged[key] = together(have, value)
        elif isinstance(value, list) and isinstance(have, list):
            merged[key] = have + [entry for entry in value if entry not in have]
        else:
            merged[key] = value
    return merged


def text_of(config, *candidates):
    """The first candidate that says the same, so that nobody's layout is changed without need."""
    for text in candidates:
        if text is not None and same(json.loads(text) if text.strip() else {}, config):
            return text
    return json.dumps(config, indent=2) + "\n"


def plan(text, kept, ours, path):
    """What daemon.json becomes.

    text: the file, None where there is none; kept: the record's `daemon_json`; ours: the kit's keys.
    Returns `text` (None: no file), `pending` (the record while it is written) and `final` (once it is).
    """
    now = parse(text, path)
    untouched = digest(text) in kept["digests"]
    site = kept["site"] if untouched else split(now, kept["ours"], kept["site"])
    # Given back to the letter, as long as it still says what the site wants.
    verbatim = kept["text"] if kept["text"] is not None and same(parse(kept["text"], path), site) else None
    wanted = merge(site, ours)
    after = text_of(wanted, text, verbatim) if wanted or kept["existed"] else None
    base = dict(kept, site=site, text=verbatim)
    # Killed while it writes, a run leaves the one file or the other: both are known.
    pending = dict(base, ours=together(kept["ours"], ours), fallback=kept["fallback"] or {"text": text})
    pending["digests"] = list(dict.fromkeys([digest(text)] + kept["digests"] + [digest(after)]))
    return {"text": after, "pending": pending, "final": dict(base, ours=ours, digests=[digest(after)])}


def give_back(text, kept, path):
    """The text that the site would have without the kit; None for no file."""
    if text is None:
        return None
    planned = plan(text, kept, {}, path)
    site, verbatim = planned["final"]["site"], planned["final"]["text"]
    if not site and not kept["existed"]:
        return None
    return text_of(site, verbatim, text)


# --------------------------------------------------------------------------- the host: pure


def keys_of_flags(argv):
    """{key of daemon.json: the flag as it was given} of a dockerd's command line."""
    found = {}
    for word in argv[1:]:
        match = re.match(r"^(--?)([A-Za-z][A-Za-z0-9-]*)", word)
        if not match:
            continue
        name = match.group(2)
        if match.group(1) == "--":
            key = FLAG_KEYS.get(name, name)
        else:
            key = SHORT_FLAGS.get(name[0])
        if key:
            found[key] = word.split("=", 1)[0]
    return found


def flag_conflicts(config, argv):
    """Keys that also stand on the command line: dockerd refuses to start with those."""
    flags = keys_of_flags(argv)
    return ["%s (%s)" % (key, flags[key]) for key in config if key in flags]


def words_of(text):
    """The words of a line as a shell reads them; none where it has an open quote."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def expand(line, variables):
    """The words of an ExecStart, with `$NAME` and `${NAME}` as systemd replaces them."""
    words = []
    for word in words_of(line):
        alone = re.match(r"^\$([A-Za-z_][A-Za-z0-9_]*)$", word)
        if alone:
            words += words_of(variables.get(alone.group(1), ""))
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: variables.get(match.group(1), ""), word))
    return words


def newer(times, started_at):
    """The paths that were changed after dockerd had started. times: {path: seconds since the epoch}"""
    return sorted(path for path, changed in times.items() if started_at is not None and changed > started_at)


def missing_packages(wanted, installed, engine, version):
    """{name: what to ask the package manager for} of those that are missing or have another version."""
    missing = {}
    for name in wanted:
        pinned = version if name in engine else ""
        if name not in installed or (pinned and installed[name] != pinned):
            missing[name] = pinned
    return missing


def entry_for(table, release):
    """The entry of `ID-VERSION` or `ID`."""
    ident, version = release.get("ID", "unknown"), release.get("VERSION_ID", "")
    for key in ("%s-%s" % (ident, version), ident):
        if key in table:
            return table[key]
    raise Problem(
        "no packages are known for %s %s from this source; known are: %s. Say container_engine_source: docker, "
        "or use one of those." % (ident, version, ", ".join(sorted(table)) or "none")
    )


# --------------------------------------------------------------------------- files


def read(path):
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            return handle.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise Problem("%s: not UTF-8: %s. Mend it, or move it away; nothing was touched." % (path, error))


def mtime(path):
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def write(path, text, mode=0o644):
    """All or nothing. A file that is there keeps its owner and mode."""
    try:
        before = os.stat(path)
    except FileNotFoundError:
        before = None
    handle, temporary = tempfile.mkstemp(prefix=".%s." % os.path.basename(path), dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as out:
            out.write(text)
            out.flush()
            if before and os.geteuid() == 0:
                os.fchown(out.fileno(), before.st_uid, before.st_gid)
            os.fchmod(out.fileno(), stat.S_IMODE(before.st_mode) if before and mode != 0o600 else mode)
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def put(path, text, mode=0o644):
    """Write, or take away where there is to be no file."""
    if text is not None:
        write(path, text, mode)
    elif os.path.lexists(path):
        os.unlink(path)


def missing_folders(path):
    """The folders above a file that are not there yet, the outermost first."""
    found, folder = [], os.path.dirname(path)
    while folder and not os.path.isdir(folder):
        found.insert(0, folder)
        folder = os.path.dirname(folder)
    return found


def empty(folder):
    """Delete what lies in a folder, and the folder, unless something is mounted there."""
    if not os.path.isdir(folder):
        return False
    found = os.listdir(folder)
    for name in found:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    if os.path.ismount(folder):
        return bool(found)
    os.rmdir(folder)
    return True


def shown(path, before, after):
    """One entry of a diff. A file of an earlier run may hold a password that no variable knows any more."""

    def public(text):
        return re.sub(r"(://[^:/@\s]*):[^/@\s]+@", r"\1:********@", text or "")

    return {"before_header": path, "after_header": path, "before": public(before), "after": public(after)}


def os_release():
    found = {}
    for line in (read(OS_RELEASE) or "").splitlines():
        key, _, value = line.strip().partition("=")
        found[key] = value.strip("\"'")
    return found


# --------------------------------------------------------------------------- the host


class Host:
    """The programs of a host. Nothing is asked of dockerd where it does not run: its socket would start it."""

    def __init__(self):
        self.path = os.pathsep.join([os.environ.get("PATH", "")] + list(SBIN))
        self.env = dict(os.environ, LC_ALL="C", PATH=self.path)
        for name in ("DOCKER_HOST", "DOCKER_CONTEXT"):
            self.env.pop(name, None)
        self.refresh()

    def find(self, name):
        return shutil.which(name, path=self.path)

    def run(self, *command, **options):
        """(exit code, stdout, stderr); 127 where there is no such program, 124 where it took too long."""
        program = self.find(command[0])
        if program is None:
            return 127, "", "%s is not installed" % command[0]
        try:
            done = subprocess.run(
                [program] + list(command[1:]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                universal_newlines=True,
                env=self.env,
                timeout=options.get("timeout_s"),
            )
        except subprocess.TimeoutExpired:
            return 124, "", "no answer within %d s" % options["timeout_s"]
        return done.returncode, done.stdout, done.stderr

    def refresh(self):
        """Read the unit anew."""
        names = "LoadState,ActiveState,UnitFileState,MainPID,ExecMainStartTimestampMonotonic,NeedDaemonReload,"
        code, out, _err = self.run("systemctl", "show", SERVICE, "-p", names + "ExecStart,Environment,EnvironmentFiles")
        pairs = [line.partition("=") for line in out.splitlines()] if code == 0 else []
        self.unit = {}
        for key, _, value in pairs:
            self.unit[key] = self.unit[key] + "\n" + value if key in self.unit else value
        self.loaded = self.unit.get("LoadState") in ("loaded", "masked")
        self.active = self.unit.get("ActiveState") == "active"
        self.enabled = self.unit.get("UnitFileState") in ("enabled", "enabled-runtime", "static")
        self.started_at = None
        began = int(self.unit.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
        if self.active and began:
            self.started_at = time.time() - (time.clock_gettime(time.CLOCK_MONOTONIC) - began)

    def argv(self):
        """The command line that dockerd runs with, or would be started with; empty where there is no unit."""
        pid = int(self.unit.get("MainPID") or 0)
        if self.active and pid:
            try:
                with open("/proc/%d/cmdline" % pid, "rb") as handle:
                    return handle.read().decode("utf-8", "replace").rstrip("\0").split("\0")
            except OSError:
                pass
        line = re.search(r"argv\[\]=(.*?) ; ignore_errors=", self.unit.get("ExecStart", ""))
        if not line:
            return []
        texts = [self.unit.get("Environment", "")]
        for entry in self.unit.get("EnvironmentFiles", "").splitlines():
            texts += [row for row in (read(entry.split(" (")[0]) or "").splitlines() if not row.startswith("#")]
        variables = {}
        for text in texts:
            for word in words_of(text):
                name, _, value = word.partition("=")
                variables[name] = value
        return expand(line.group(1), variables)

    def info(self):
        """What `docker info` answers; None where there is no answer."""
        if not self.active:
            return None
        code, out, _err = self.run("docker", "info", "--format", "{{json .}}", timeout_s=ANSWER_S)
        try:
            found = json.loads(out) if code == 0 else None
        except ValueError:
            return None
        return None if not found or found.get("ServerErrors") else found

    def containers(self):
        """Names of the running containers; None where dockerd runs and does not say."""
        if not self.active:
            return []
        code, out, _err = self.run("docker", "ps", "--format", "{{.Names}}", timeout_s=ANSWER_S)
        return out.split() if code == 0 else None

    def manager(self):
        return "apt" if self.find("dpkg-query") else "dnf" if self.find("rpm") else ""

    def installed(self, names):
        """{name: version} of the packages that are installed."""
        if self.manager() == "apt":
            form = "${Package} ${db:Status-Status} ${Version}\\n"
            _code, out, _err = self.run("dpkg-query", "-W", "-f", form, *names)
        else:
            _code, out, _err = self.run("rpm", "-q", "--qf", "%{NAME} installed %{VERSION}-%{RELEASE}\n", *names)
        rows = [line.split() for line in out.splitlines()]
        return {row[0]: row[2] for row in rows if len(row) == 3 and row[1] == "installed"}

    def cursor(self):
        """A place in the journal, to read from later on."""
        _code, out, _err = self.run("journalctl", "-q", "-n", "0", "--show-cursor")
        match = re.search(r"-- cursor: (\S+)", out)
        return ["--after-cursor", match.group(1)] if match else ["-n", "30"]

    def words(self, cursor):
        """dockerd's own complaints since a place in the journal."""
        _code, out, _err = self.run(
            "journalctl", "-q", "--no-pager", "-o", "cat", "_COMM=dockerd", "_SYSTEMD_UNIT=%s" % SERVICE, *cursor
        )
        found = []
        for line in out.splitlines():
            if line.strip() and not re.search(r"\blevel=(info|debug|warning)\b", line):
                message = re.search(r'\bmsg="((?:[^"\\]|\\.)*)"', line)
                found.append(message.group(1).replace('\\"', '"') if message else line.strip())
        return list(dict.fromkeys(found))[-5:]

    def validate(self, text, path):
        """Ask this host's dockerd to read a daemon.json; one before 23.0 does not know how to."""
        if self.find("dockerd") is None:
            return
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as trial:
            trial.write(text)
            trial.flush()
            code, out, err = self.run("dockerd", "--validate", "--config-file", trial.name, timeout_s=60)
            if code != 0 and "unknown flag" not in err:
                said = (err.strip() or out.strip()).replace(trial.name, path)
                raise Problem(
                    "dockerd refuses the new %s: %s. Mend the container_engine_* variables or that file; "
                    "nothing was touched." % (path, said)
                )

    def refused_reload(self, path):
        """dockerd's own words where it refuses to read its file again; None where it took it.

        It goes on with what it has in that case, so this is asked before any restart. As a side effect
        `live-restore` is in force, and the site's containers outlive the restart.
        """
        cursor, since = self.cursor(), "%.6f" % time.time()
        if self.run("systemctl", "reload", SERVICE)[0] != 0:
            return None
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            until = "%.6f" % time.time()
            choice = ["--filter", "type=daemon", "--filter", "event=reload"]
            code, out, _err = self.run("docker", "events", "--since", since, "--until", until, *choice, timeout_s=10)
            if code == 0 and out.strip():
                return None
            said = [line for line in self.words(cursor) if path in line or "configuration" in line]
            if said:
                return "; ".join(said)
            time.sleep(0.2)
        return None

    def bring_up(self, word=None):
        """Start or restart dockerd and wait until it answers; why not, in its own words, or None."""
        # Always: systemd 252 does not notice the first drop-in of a unit by itself.
        self.run("systemctl", "daemon-reload")
        # A start limit that earlier failures have used up would refuse this one.
        self.run("systemctl", "reset-failed", SERVICE, SOCKET)
        cursor = self.cursor()
        code, _out, err = self.run("systemctl", word or ("restart" if self.active else "start"), SERVICE)
        self.refresh()
        deadline = time.monotonic() + PATIENCE_S
        while code == 0 and time.monotonic() < deadline:
            if self.info() is not None:
                return None
            self.refresh()
            if not self.active and self.unit.get("ActiveState") not in ("activating", "reloading"):
                break
            time.sleep(0.2)
        self.run("journalctl", "--sync")
        said = self.words(cursor) or [line for line in err.splitlines() if line.strip()][:1]
        return "; ".join(said) or "it does not answer `docker info` within %d s" % PATIENCE_S


# --------------------------------------------------------------------------- one run


class Engine:
    """One run of the module on one host."""

    def __init__(self, module, host):
        self.host, self.params = host, module.params
        self.check = module.check_mode
        self.path = self.params["config_file"]
        self.ours = without_nulls(self.params["config"])
        self.names = sorted(set(self.params["removable"] + self.params["conflicts"]))
        self.text = read(self.path)
        parse(self.text, self.path)
        self.record = self.read_record()
        self.new = self.record is None
        if self.new:
            self.record = self.first_record()

    # The record

    def read_record(self):
        text = read(self.params["record"])
        if text is None:
            return None
        try:
            found = json.loads(text)
        except ValueError as error:
            raise Problem(
                "the record %s is no valid JSON: %s. It says what this host had before the kit: restore it from "
                "a backup, or delete it to take today's state for the site's." % (self.params["record"], error)
            )
        return found

    def first_record(self):
        return {
            "packages": self.host.installed(self.names) if self.names else {},
            "service": {"enabled": self.host.enabled, "active": self.host.active},
            "config_folder": os.path.isdir(os.path.dirname(self.path)),
            "daemon_json": {
                "existed": self.text is not None,
                "text": self.text,
                "site": parse(self.text, self.path),
                "ours": {},
                "digests": [digest(self.text)],
                "fallback": None,
            },
            "files": {},
            "folders": [],
        }

    def keep(self, **changes):
        """Write the record where it changes; before anything else is written."""
        changed = dict(self.record, **changes)
        if self.check or (not self.new and same(changed, self.record)):
            return
        os.makedirs(os.path.dirname(self.params["record"]), exist_ok=True)
        write(self.params["record"], json.dumps(changed, indent=1) + "\n", mode=0o600)
        self.record, self.new = changed, False

    # What is to be done

    def look(self):
        """Compare the host with what is wanted. Touches nothing."""
        host, params = self.host, self.params
        release = os_release()
        self.distribution = {
            "id": release.get("ID", "unknown"),
            "version": release.get("VERSION_ID", ""),
            "codename": release.get("VERSION_CODENAME", ""),
            "manager": host.manager(),
            "architecture": host.run("dpkg", "--print-architecture")[1].strip() or os.uname().machine,
        }
        self.missing = {}
        if params["packages"]:
            wanted = entry_for(params["packages"], release)
            installed = host.installed(sorted(set(wanted + params["conflicts"])))
            self.refuse_conflicts(sorted(set(installed) & set(params["conflicts"])))
            self.missing = missing_packages(wanted, installed, params["engine_packages"], params["version"])
        self.planned = plan(self.text, self.record["daemon_json"], self.ours, self.path)
        self.rewrite = self.planned["text"] != self.text
        if self.rewrite and self.planned["text"] is not None:
            self.refuse_flags(parse(self.planned["text"], self.path))
            host.validate(self.planned["text"], self.path)
        kept = self.record["files"]
        self.changes = {path: text for path, text in params["files"].items() if read(path) != text}
        self.changes.update((path, kept[path]["before"]) for path in kept if path not in params["files"])
        self.gone = [path for path in params["gone"] if os.path.lexists(path)]
        # While dockerd runs and does not say what runs, the worst is assumed.
        running = host.containers()
        self.mute = running is None and host.find("docker") is not None
        if self.mute and not params["disruption"]:
            raise Problem(
                "dockerd runs and does not answer within %d s; see `journalctl -u docker`. "
                "Say -e clusterkit_allow_disruption=true to have it restarted." % ANSWER_S
            )
        self.busy = running is None or params["container"] in running
        self.reasons = self.restart_reasons()

    def refuse_conflicts(self, found):
        if not found:
            return
        remove = "apt-get remove" if self.distribution["manager"] == "apt" else "dnf remove"
        theirs = {"docker-ce": "docker", "docker.io": "distribution"}
        other = ["say container_engine_source: %s, or " % theirs[name] for name in found if name in theirs]
        raise Problem(
            "packages are installed that conflict with the wanted engine: %s. They are the site's, so nothing was "
            "touched: %stake them away: %s %s" % (", ".join(found), "".join(other[:1]), remove, " ".join(found))
        )

    def refuse_flags(self, config):
        found = flag_conflicts(config, self.host.argv())
        if found:
            raise Problem(
                "dockerd would not start: also given on its command line: %s. Take them out of the unit "
                "(`systemctl cat docker`, /etc/default/docker), or out of %s and the container_engine_* variables; "
                "nothing was touched." % (", ".join(found), self.path)
            )

    def watched(self):
        """{path: time of change} of what dockerd reads at its start."""
        inside = [DROP_INS] + glob.glob(os.path.join(DROP_INS, "*.conf"))
        trust = [path for path in self.params["trust"] if os.path.exists(path)][:1]
        found = {path: mtime(path) for path in [self.path] + inside + trust}
        return {path: changed for path, changed in found.items() if changed is not None}

    def restart_reasons(self):
        """Why the running dockerd is not the wanted one; empty where it is, or where it does not run."""
        if not self.host.active:
            return []
        soon = [self.path] if self.rewrite else []
        soon += [path for path in self.changes if os.path.dirname(path) == DROP_INS]
        if self.mute or self.host.unit.get("NeedDaemonReload") == "yes":
            soon.append(SERVICE)
        return sorted(set(soon + newer(self.watched(), self.host.started_at)))

    def install_now(self):
        """What may be installed without stopping the container."""
        held = self.busy and not self.params["disruption"]
        engine = self.params["engine_packages"] if held else []
        joint = "=" if self.distribution["manager"] == "apt" else "-"
        return [joint.join([n, v]) if v else n for n, v in self.missing.items() if n not in engine]

    def waiting(self):
        """What is left undone without consent, in words."""
        if not self.busy or self.params["disruption"]:
            return []
        left = ["%s has not been installed" % n for n in self.missing if n in self.params["engine_packages"]]
        if self.reasons:
            left.append("dockerd has not been restarted for %s" % ", ".join(self.reasons))
        return left

    def disrupts(self):
        return bool(self.reasons or set(self.missing) & set(self.params["engine_packages"]))

    def to_do(self):
        """Whether anything is left that this run may do."""
        restart = self.reasons and not (self.busy and not self.params["disruption"])
        stopped = self.params["started"] and not (self.host.active and self.host.enabled)
        return bool(self.install_now() or self.rewrite or self.changes or self.gone or restart or stopped)

    def settled(self):
        """The record of a host on which nothing is pending."""
        pending = self.record["daemon_json"]["fallback"] if self.path in self.reasons else None
        return dict(self.planned["final"], fallback=pending)

    def diff(self):
        """Before and after, for people."""
        found = []
        names = self.install_now()
        if names and self.check:
            have = self.host.installed(list(self.missing))
            before = ["%s %s\n" % (name, have.get(name, "is not installed")) for name in self.missing]
            found.append(shown("packages", "".join(before), "".join("%s\n" % name for name in names)))
        if self.rewrite:
            found.append(shown(self.path, self.text, self.planned["text"]))
        found += [shown(path, read(path), text) for path, text in sorted(self.changes.items())]
        found += [shown(path, read(path), None) for path in self.gone]
        if not self.params["started"]:
            return found
        if not (self.host.active and self.host.enabled):
            found.append(shown(SERVICE, "not enabled and running\n", "enabled and running\n"))
        elif self.reasons and not self.waiting():
            found.append(shown(SERVICE, "running\n", "restarted for %s\n" % ", ".join(self.reasons)))
        return found

    def described(self):
        """The same for `clusterkit plan`: what a restart stops, and what is left without consent."""
        stops = ["docker"] if self.busy else []
        found = []
        for item in self.diff():
            name, text = item["before_header"], {"before": item["before"], "after": item["after"]}
            if name == SERVICE:
                told = {"what": "unit", "wanted": item["after"].strip(), "actual": item["before"].strip()}
                told["disrupts"] = stops if self.host.active else []
            elif name.startswith("/"):
                told = dict(text, what="file")
            else:
                found += self.described_packages(stops)
                continue
            found.append(dict(told, name=name))
        left = {"what": "unit", "name": SERVICE, "actual": "left for want of consent", "disrupts": stops, "left": True}
        return found + [dict(left, wanted=said) for said in self.waiting()]

    def described_packages(self, stops):
        have, engine = self.host.installed(list(self.missing)), self.params["engine_packages"]
        return [
            {
                "what": "package",
                "name": name,
                "wanted": version or "installed",
                "actual": have.get(name, "missing"),
                "disrupts": stops if name in engine else [],
            }
            for name, version in sorted(self.missing.items())
        ]

    # Doing it

    def write_files(self):
        """The kit's further files; what stood there before goes into the record first."""
        files, folders = dict(self.record["files"]), list(self.record["folders"])
        for path in [self.path] + [path for path, text in self.changes.items() if text is not None]:
            folders += [folder for folder in missing_folders(path) if folder not in folders]
        for path in self.params["files"]:
            if path not in files:
                files[path] = {"before": read(path)}
        self.keep(files=files, folders=folders)
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        for path, text in self.changes.items():
            secret = text is not None and any(word in text for word in self.params["secrets"])
            put(path, text, mode=0o600 if secret else 0o644)
        for path in self.gone:
            os.unlink(path)

    def write_config(self):
        """Put the new daemon.json in place; dockerd reads it, and where it refuses, the old one is back."""
        if not self.rewrite:
            return
        before = mtime(self.path)
        self.keep(daemon_json=self.planned["pending"])
        put(self.path, self.planned["text"])
        said = self.host.refused_reload(self.path) if self.host.active else None
        if said:
            put(self.path, self.text)
            if self.text is not None:
                os.utime(self.path, (before, before))
            raise Problem(
                "dockerd refuses the new %s: %s. The old one is back, and dockerd was not restarted. "
                "Mend the container_engine_* variables or that file." % (self.path, said)
            )

    def run_dockerd(self):
        """Enable, start or restart dockerd, as far as it is allowed."""
        host = self.host
        host.refresh()
        if host.find("systemctl") is None:
            raise Problem("this host has no systemd, which dockerd is run with; install Docker Engine by hand here")
        if not host.loaded:
            raise Problem("there is no %s on this host: Docker Engine is not installed" % SERVICE)
        if not host.enabled:
            code, _out, err = host.run("systemctl", "enable", SERVICE)
            if code != 0:
                raise Problem("%s cannot be enabled: %s" % (SERVICE, err.strip()))
        self.rewrite, self.changes, self.mute = False, {}, host.active and host.info() is None
        running = host.containers()
        self.busy = running is None or self.params["container"] in running
        self.reasons = self.restart_reasons()
        if not host.active or (self.reasons and not self.waiting()):
            said = host.bring_up()
            if said:
                self.roll_back(said)
            self.reasons = []

    def roll_back(self, said):
        """dockerd is down: the daemon.json that it last ran with comes back, and dockerd with it."""
        fallback = self.record["daemon_json"]["fallback"]
        if not fallback or fallback["text"] == read(self.path):
            raise Problem("dockerd does not start: %s" % said)
        put(self.path, fallback["text"])
        # systemd may be about to start it once more, with the file that it refuses.
        again = self.host.bring_up("restart")
        after = "dockerd still does not start: %s" % again if again else "dockerd runs again"
        raise Problem(
            "dockerd does not start with the new %s: %s. The old one is back, and %s. "
            "Mend the container_engine_* variables or that file." % (self.path, said, after)
        )

    # The states

    def plan_only(self):
        self.look()
        work = self.to_do()
        self.keep(daemon_json=self.record["daemon_json"] if work else self.settled())
        agent = self.params["agent"]
        pattern = [path for form in SOURCES for path in sorted(glob.glob(form)) if os.path.isfile(path)]
        url = self.params["repository"].rstrip("/")
        theirs = [path for path in pattern if not os.path.basename(path).startswith("clusterkit-")]
        named = [path for path in theirs if url and re.search(r"(?m)^[^#\n]*" + re.escape(url), read(path) or "")]
        return {
            "changed": False,
            "work": work,
            "install": self.install_now(),
            "waiting": self.waiting(),
            "drain": bool(
                self.busy and self.disrupts() and self.params["disruption"] and agent and os.path.exists(agent)
            ),
            "distribution": self.distribution,
            "repository_files": named,
        }

    def present(self):
        self.look()
        result = {"changed": self.to_do(), "diff": self.diff(), "waiting": self.waiting()}
        result["changes"] = self.described()
        if self.check or not result["changed"]:
            return result
        self.write_files()
        self.write_config()
        if self.params["started"] and self.params["restart"]:
            self.run_dockerd()
            result["waiting"] = self.waiting()
        files = {path: self.record["files"][path] for path in self.params["files"]}
        # That of the drop-ins stays: its time says that one was taken away.
        folders = [folder for folder in self.record["folders"] if folder == DROP_INS]
        folders += self.leave_folders([folder for folder in self.record["folders"] if folder != DROP_INS])
        self.keep(daemon_json=self.settled(), files=files, folders=folders)
        return result

    def absent(self):
        """Give back what the host had, as far as the record knows it."""
        host, params = self.host, self.params
        result = {"changed": False, "waiting": [], "packages": [], "data": [], "diff": []}
        result["distribution"] = {"manager": host.manager()}
        gone = [path for path in params["gone"] if os.path.lexists(path)]
        kept, files = self.record["daemon_json"], self.record["files"]
        text = self.text if self.new else give_back(self.text, kept, self.path)
        changes = {path: entry["before"] for path, entry in files.items() if read(path) != entry["before"]}
        # Without a record nobody knows what was there before: then everything stays.
        installed = {} if self.new else host.installed(params["removable"]) if params["removable"] else {}
        ours = sorted(set(installed) - set(self.record["packages"]))
        running = host.containers() if ours or text != self.text or changes else []
        if params["remove_packages"] and ours and running != []:
            raise Problem(
                "containers still run on this host: %s. Stop them, or say container_engine_remove_packages: false; "
                "nothing was touched." % ", ".join(running or ["dockerd does not say which"])
            )
        watched = self.watched()
        if text is None and kept["ours"]:
            watched[os.path.dirname(self.path)] = mtime(os.path.dirname(self.path)) or 0
        restart = bool(text != self.text or changes or (not self.new and newer(watched, host.started_at)))
        if params["remove_packages"] and ours:
            result["packages"] = ours
            result["data"] = self.data_of(ours)
        result["changed"] = bool(gone or text != self.text or changes)
        for path, before, after in [(self.path, self.text, text)] + [(p, read(p), t) for p, t in changes.items()]:
            if before != after:
                result["diff"].append(shown(path, before, after))
        if self.check:
            return result
        if text != self.text:
            put(self.path, text)
        for path, before in changes.items():
            put(path, before)
        for path in gone:
            os.unlink(path)
        if restart and host.active and not result["packages"]:
            result["changed"] = True
            self.restart_for_removal(running, result)
        self.leave_service(result)
        self.leave_folders(self.record["folders"])
        return result

    def leave_folders(self, folders):
        """Take away those that are empty; the ones that stay."""
        for folder in reversed(folders):
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)
        return [folder for folder in folders if os.path.isdir(folder)]

    def restart_for_removal(self, running, result):
        """The site's daemon.json may lack live-restore: a restart would end the site's containers."""
        if running != [] and not self.params["disruption"]:
            names = ", ".join(running or ["unknown ones"])
            result["waiting"] = [
                "dockerd has not been restarted, because containers run (%s): it goes on with the kit's settings "
                "until its next start" % names
            ]
            return
        said = self.host.bring_up()
        if said:
            raise Problem("dockerd does not start with the site's own %s: %s" % (self.path, said))

    def leave_service(self, result):
        """A dockerd that the site kept switched off is off again."""
        before = self.record["service"]
        if self.new or not set(self.record["packages"]) & set(self.params["engine_packages"]):
            return
        self.host.refresh()
        if self.host.enabled and not before["enabled"]:
            self.host.run("systemctl", "disable", SERVICE)
            result["changed"] = True
        if self.host.active and not before["active"] and not result["waiting"]:
            self.host.run("systemctl", "stop", SERVICE, SOCKET)
            result["changed"] = True

    def data_of(self, ours):
        """Folders that the engine made, where the engine itself is the kit's."""
        found = []
        if set(ours) & set(self.params["engine_packages"]):
            config = merge(self.record["daemon_json"]["site"], self.record["daemon_json"]["ours"])
            found.append(str(config.get("data-root") or DATA_ROOT))
            if not self.record["config_folder"]:
                found.append(os.path.dirname(self.path))
        if set(ours) & {"containerd", "containerd.io"}:
            found.append(CONTAINERD_ROOT)
        return found

    def forgotten(self):
        result = {"changed": False}
        for folder in self.params["data"]:
            if os.path.isdir(folder):
                result["changed"] = bool(os.listdir(folder)) or not os.path.ismount(folder) or result["changed"]
                if not self.check:
                    empty(folder)
        if not self.new:
            result["changed"] = True
            if not self.check:
                os.unlink(self.params["record"])
                self.leave_folders([os.path.dirname(self.params["record"])])
        return result


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["planned", "present", "absent", "forgotten"], "default": "present"},
            "record": {"type": "path", "required": True},
            "config": {"type": "dict", "default": {}},
            "config_file": {"type": "path", "default": "/etc/docker/daemon.json"},
            "files": {"type": "dict", "default": {}},
            "gone": {"type": "list", "elements": "path", "default": []},
            "secrets": {"type": "list", "elements": "str", "default": [], "no_log": True},
            "packages": {"type": "dict", "default": {}},
            "engine_packages": {"type": "list", "elements": "str", "default": []},
            "version": {"type": "str", "default": ""},
            "conflicts": {"type": "list", "elements": "str", "default": []},
            "removable": {"type": "list", "elements": "str", "default": []},
            "remove_packages": {"type": "bool", "default": False},
            "repository": {"type": "str", "default": ""},
            "trust": {"type": "list", "elements": "path", "default": []},
            "container": {"type": "str", "default": "clusterkit-ray"},
            "disruption": {"type": "bool", "default": False},
            "agent": {"type": "path"},
            "started": {"type": "bool", "default": True},
            "restart": {"type": "bool", "default": True},
            "data": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        engine = Engine(module, Host())
        states = {"planned": engine.plan_only, "present": engine.present, "absent": engine.absent}
        states["forgotten"] = engine.forgotten
        result = states[module.params["state"]]()
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (getattr(error, "filename", None) or "this host", error.strerror or error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
