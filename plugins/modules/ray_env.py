#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: ray_env
short_description: A pinned Python environment for Ray and vLLM
description:
  - Makes a virtual environment that holds exactly the given distributions, from an index or a wheelhouse.
  - The versions of every installed distribution are read on each run; no marker is believed.
  - As a task it runs through the action plugin of the same name, which resolves the pins on the controller
    and brings the wheelhouse where one is asked for.
author:
  - clusterkit
options:
  state:
    description: C(info) only reads the interpreter and the environment.
    type: str
    choices: [info, present, absent]
    default: present
  path:
    description: Where the environment lies.
    type: path
    required: true
  python:
    description: The interpreter to make it with, as a path or a name on PATH.
    type: str
    default: python3
  pins:
    description: Every distribution as C(name==version).
    type: list
    elements: str
    default: []
  inputs:
    description: The digest of what the pins were resolved from; kept beside them.
    type: str
    default: ""
  extra_wheels:
    description: Wheel files on this host that are installed as well.
    type: list
    elements: path
    default: []
  wheelhouse:
    description: A tar file of wheels on this host; no index is asked then.
    type: path
  index_url:
    description: The index to ask; pip's own configuration where it is not given.
    type: str
    default: ""
  extra_index_urls:
    description: Further indexes.
    type: list
    elements: str
    default: []
  find_links:
    description: Further places with links to wheels.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Make the Ray environment
  ray_env:
    path: /opt/clusterkit/ray-env
    pins: ["ray==2.60.0"]
"""

RETURN = r"""
python:
  description: Minor version of the interpreter.
  returned: always
  type: str
glibc:
  description: Version of the C library.
  returned: always
  type: str
machine:
  description: Architecture.
  returned: always
  type: str
missing:
  description: What was missing or had another version, before.
  returned: always
  type: list
changes:
  description: >-
    What differs, each with C(what), C(name), C(wanted) and C(actual); C(disrupts) where a node that runs from the
    environment has to be started anew.
  returned: state is present
  type: list
  elements: dict
digest:
  description: SHA-256 over the pins.
  returned: state is present
  type: str
"""

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile

from ansible.module_utils.basic import AnsibleModule

LOCK = "clusterkit.lock.json"
READ_INSTALLED = """
import importlib.metadata as m, json
print(json.dumps({d.metadata["Name"]: d.version for d in m.distributions()}))
"""
READ_HOST = """
import json, os, platform, sys
try:
    import ensurepip
    pip = True
except ImportError:
    pip = False
libc = os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else ""
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "glibc": (libc or "glibc 0.0").split()[-1],
                  "machine": platform.machine(), "ensurepip": pip}))
"""


def normal(name):
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wheel_pin(path):
    """`name==version` of a wheel file."""
    name, version = os.path.basename(path).split("-")[:2]
    return "%s==%s" % (normal(name), version)


def plan(have, want):
    """Which pins are missing or have another version, and which distributions are too many.

    have: {name: version} installed; want: ["name==version"]. pip itself may stay.
    """
    installed = {normal(name): version for name, version in have.items()}
    wanted = dict((normal(pin.split("==")[0]), pin.split("==")[1]) for pin in want)
    missing = sorted(pin for pin in want if installed.get(normal(pin.split("==")[0])) != pin.split("==")[1])
    extra = sorted(set(installed) - set(wanted) - {"pip", "setuptools"})
    return missing, extra


def described(path, have, missing, extra, lock_differs, fresh=""):
    """The same in words, for a plan: [{what, name, wanted, actual}].

    fresh: why all of it is made anew, as what is there now; lock_differs: an environment that a node may run from
    gets other pins, which makes that node stale.
    """
    installed = {normal(name): version for name, version in have.items()}
    found = []
    if fresh:
        wanted = "%d distributions" % len(missing)
        found.append({"what": "environment", "name": path, "wanted": wanted, "actual": fresh})
    else:
        for pin in missing:
            name, version = pin.split("==")
            actual = installed.get(normal(name), "missing")
            found.append({"what": "distribution", "name": name, "wanted": version, "actual": actual})
        for name in extra:
            found.append({"what": "distribution", "name": name, "wanted": "gone", "actual": installed[name]})
    if lock_differs:
        change = {"what": "environment", "name": path, "wanted": "a lock with these pins", "actual": "another lock"}
        found.append(dict(change, disrupts=["node"]))
    return found


def run(command, env=None):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=env)
    return done.returncode, done.stdout, done.stderr


def installed(path):
    """{name: version} of the environment; None where there is no working one."""
    python = os.path.join(path, "bin", "python")
    if not os.access(python, os.X_OK):
        return None
    code, out, _err = run([python, "-I", "-B", "-c", READ_INSTALLED])
    return json.loads(out) if code == 0 else None


def host(module, python):
    interpreter = python if os.path.isabs(python) else shutil.which(python)
    if interpreter is None or not os.access(interpreter, os.X_OK):
        module.fail_json(msg="no interpreter %r on this host; set ray_env_python" % python)
    code, out, err = run([interpreter, "-I", "-B", "-c", READ_HOST])
    if code != 0:
        module.fail_json(msg="%s does not run: %s" % (interpreter, err.strip()[-500:]))
    return interpreter, json.loads(out)


def make(module, interpreter, facts, path, wheels):
    """A fresh environment with pip in it, also where the distribution left `ensurepip` out."""
    if os.path.lexists(path):
        shutil.rmtree(path)
    command = [interpreter, "-m", "venv"]
    from_wheel = sorted(glob.glob(os.path.join(wheels, "pip-*.whl"))) if wheels else []
    if not facts["ensurepip"] and not from_wheel:
        module.fail_json(
            msg="Python %s on this host cannot make environments (no ensurepip). "
            "Install it: apt-get install python3-venv" % facts["python"]
        )
    code, _out, err = run(command + (["--without-pip"] if from_wheel else []) + [path])
    if code != 0:
        module.fail_json(msg="the environment could not be made: %s" % err.strip()[-1000:])
    if from_wheel:
        python = os.path.join(path, "bin", "python")
        code, _out, err = run(
            [python, os.path.join(from_wheel[-1], "pip"), "install", "-q", "--no-index", "--find-links", wheels, "pip"]
        )
        if code != 0:
            module.fail_json(msg="pip could not be installed from the wheelhouse: %s" % err.strip()[-1000:])


def install(module, params, path, missing, extra, wheels):
    pip = [os.path.join(path, "bin", "python"), "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    if extra:
        code, _out, err = run(pip + ["uninstall", "--yes"] + quiet + extra)
        if code != 0:
            module.fail_json(msg="pip uninstall failed: %s" % err.strip()[-1500:])
    own = [name for name in params["extra_wheels"] if wheel_pin(name) in missing]
    listed = [pin for pin in missing if pin not in [wheel_pin(name) for name in own]]
    command = pip + ["install", "--no-deps"] + quiet
    if wheels:
        command += ["--no-index", "--find-links", wheels]
    else:
        if params["index_url"]:
            command += ["--index-url", params["index_url"]]
        for url in params["extra_index_urls"]:
            command += ["--extra-index-url", url]
        for link in params["find_links"]:
            command += ["--find-links", link]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(listed) + "\n")
        wanted.flush()
        code, _out, err = run(command + own + ["--requirement", wanted.name])
    if code != 0:
        lines = [line for line in err.splitlines() if line.startswith("ERROR")] or err.splitlines()
        module.fail_json(msg="pip install failed: %s" % "\n".join(lines)[-2000:])


def read_lock(path):
    try:
        with open(os.path.join(path, LOCK)) as handle:
            return json.load(handle)
    except (OSError, ValueError):
        return {}


def write_lock(path, content):
    target = os.path.join(path, LOCK)
    if read_lock(path) == content:
        return False
    with open(target + ".new", "w") as handle:
        json.dump(content, handle, indent=1, sort_keys=True)
    os.rename(target + ".new", target)
    return True


def present(module, params, interpreter, facts):
    path = params["path"]
    want = sorted(params["pins"] + [wheel_pin(name) for name in params["extra_wheels"]])
    have = installed(path)
    code_version = None
    if have is not None:
        _code, out, _err = run(
            [os.path.join(path, "bin", "python"), "-c", "import sys;print('%d.%d'%sys.version_info[:2])"]
        )
        code_version = out.strip()
    fresh = have is None or code_version != facts["python"]
    missing, extra = plan({} if fresh else have, want)
    lock = {
        "inputs": params["inputs"],
        "pins": params["pins"],
        "digest": hashlib.sha256("\n".join(want).encode()).hexdigest(),
    }
    lock_differs = read_lock(path) != lock
    changed = bool(fresh or missing or extra or lock_differs)
    why = ""
    if fresh:
        why = "missing" if not os.path.lexists(path) else "broken" if have is None else "of Python %s" % code_version
    changes = described(path, have or {}, missing, extra, lock_differs and os.path.lexists(path), why)
    if changed and not module.check_mode:
        unpacked = None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            if params["wheelhouse"] and (fresh or missing):
                unpacked = tempfile.mkdtemp(prefix="wheelhouse-", dir=os.path.dirname(path))
                with tarfile.open(params["wheelhouse"]) as tar:
                    for member in tar.getmembers():
                        if member.isfile() and "/" not in member.name:
                            tar.extract(member, unpacked)
            if fresh:
                make(module, interpreter, facts, path, unpacked)
            if missing or extra:
                install(module, params, path, missing, extra, unpacked)
        finally:
            if unpacked:
                shutil.rmtree(unpacked, ignore_errors=True)
        left, _extra = plan(installed(path) or {}, want)
        if left:
            module.fail_json(msg="after the installation these are still missing: %s" % ", ".join(left))
        write_lock(path, lock)
    done = {"changed": changed, "missing": missing, "extra": extra, "digest": lock["digest"]}
    return dict(done, changes=changes, diff=difference(changes))


def difference(changes):
    """Ansible's diff: a line per distribution."""

    def lines(key):
        return "".join("%s: %s\n" % (change["name"], change[key]) for change in changes)

    return {"before": lines("actual"), "after": lines("wanted")}


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["info", "present", "absent"], "default": "present"},
            "path": {"type": "path", "required": True},
            "python": {"type": "str", "default": "python3"},
            "pins": {"type": "list", "elements": "str", "default": []},
            "inputs": {"type": "str", "default": ""},
            "extra_wheels": {"type": "list", "elements": "path", "default": []},
            "wheelhouse": {"type": "path"},
            "index_url": {"type": "str", "default": ""},
            "extra_index_urls": {"type": "list", "elements": "str", "default": []},
            "find_links": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    params = module.params
    if params["state"] == "absent":
        there = os.path.lexists(params["path"])
        if there and not module.check_mode:
            shutil.rmtree(params["path"])
        module.exit_json(changed=there)
    interpreter, facts = host(module, params["python"])
    if params["state"] == "info":
        lock = read_lock(params["path"])
        have = installed(params["path"]) or {}
        missing, extra = plan(have, lock.get("pins", []))
        module.exit_json(changed=False, lock=lock, missing=missing, extra=extra, vllm=have.get("vllm", ""), **facts)
    module.exit_json(**dict(facts, **present(module, params, interpreter, facts)))


if __name__ == "__main__":
    main()
