#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: registry_server
short_description: A registry's unit, running with its present files, and answering
description:
  - Enables and starts a systemd unit. Restarts it where a file that it reads at its start is newer than its start,
    or where it does not answer; so a run that was cut in between converges.
  - Then waits until C(/v2/) answers, and fails with the unit's own last words where it does not.
author:
  - clusterkit
options:
  unit:
    description: The unit.
    type: str
    required: true
  files:
    description: What it reads at its start.
    type: list
    elements: path
    required: true
  url:
    description: Where it is to answer.
    type: str
    required: true
  certificate:
    description: The PEM file that it is trusted by; empty without TLS.
    type: path
  timeout_s:
    description: How long it may take to answer, in seconds.
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: Run the registry
  registry_server:
    unit: docker-registry.service
    files: [/etc/clusterkit-registry/config.yml]
    url: http://192.0.2.10:5000
"""

RETURN = r"""
changes:
  description: What was not as wanted, with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
"""

import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule

SHOWN = "LoadState,ActiveState,UnitFileState,NeedDaemonReload,ExecMainStartTimestampMonotonic"


class Problem(Exception):
    """It cannot be done; the text says what to do."""


def plan(unit, times, answers):
    """What is not as wanted: [(wanted, actual)].

    unit: `systemctl show` as a dict; times: {path: seconds since boot of its last change}; answers: whether it does.
    """
    found = []
    if unit.get("UnitFileState") != "enabled":
        found.append(("enabled", unit.get("UnitFileState") or "not installed"))
    if unit.get("ActiveState") != "active":
        return found + [("running", unit.get("ActiveState") or "not running")]
    began = int(unit.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    newer = sorted(path for path, changed in times.items() if changed > began)
    if newer:
        found.append(("restarted for %s" % ", ".join(newer), "running without it"))
    elif unit.get("NeedDaemonReload") == "yes":
        found.append(("restarted", "running an older unit"))
    elif not answers:
        found.append(("answering", "silent"))
    return found


def systemctl(*words):
    done = subprocess.run(
        ["systemctl"] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace").strip()


def show(unit):
    _code, out, _err = systemctl("show", unit, "-p", SHOWN)
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def changed_at(paths):
    """{path: seconds since boot of its last change} of those that are there."""
    offset = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    return {path: os.stat(path).st_mtime - offset for path in paths if os.path.exists(path)}


def silence(url, certificate):
    """Why it does not answer; empty where it does."""
    # Its own host asks: no proxy of the environment stands between.
    handlers = [urllib.request.ProxyHandler({})]
    try:
        if certificate:
            context = ssl.create_default_context(cafile=certificate)
            # As for dockerd: the certificate itself may be all that is known of its chain.
            context.verify_flags |= getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0x80000)
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            handlers.append(urllib.request.HTTPSHandler(context=context))
        with urllib.request.build_opener(*handlers).open(url + "/v2/", timeout=5):
            return ""
    except urllib.error.HTTPError as error:
        return "status %d" % error.code
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", None) or error)


def last_words(unit):
    done = subprocess.run(
        ["journalctl", "-q", "--no-pager", "-o", "cat", "-n", "5", "-u", unit],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return done.stdout.decode("utf-8", "replace").strip()[-1200:]


def run(params, unit):
    """Enable and (re)start it, and wait until it answers."""
    name = params["unit"]
    systemctl("daemon-reload")
    if unit.get("LoadState") == "not-found" and show(name).get("LoadState") == "not-found":
        raise Problem("this host has no %s: its package is not installed" % name)
    # A start limit that earlier failures have used up would refuse this one.
    systemctl("reset-failed", name)
    for words in (("enable", name), ("restart", name)):
        code, _out, err = systemctl(*words)
        if code != 0:
            raise Problem("systemctl %s failed: %s\n%s" % (" ".join(words), err, last_words(name)))
    deadline = time.monotonic() + params["timeout_s"]
    while True:
        why = silence(params["url"], params["certificate"])
        if not why:
            return
        if time.monotonic() > deadline or show(name).get("ActiveState") == "failed":
            said = "%s does not answer at %s: %s. Its last words:\n%s"
            raise Problem(said % (name, params["url"], why, last_words(name)))
        time.sleep(0.2)


def main():
    module = AnsibleModule(
        argument_spec={
            "unit": {"type": "str", "required": True},
            "files": {"type": "list", "elements": "path", "required": True},
            "url": {"type": "str", "required": True},
            "certificate": {"type": "path"},
            "timeout_s": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        unit = show(params["unit"])
        active = unit.get("ActiveState") == "active"
        answers = active and not silence(params["url"], params["certificate"])
        found = plan(unit, changed_at(params["files"]), answers)
        if found and not module.check_mode:
            run(params, unit)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except FileNotFoundError:
        module.fail_json(msg="this host has no systemd, which the registry is run with")
    changes = [{"what": "unit", "name": params["unit"], "wanted": one, "actual": other} for one, other in found]
    before = "".join("%s\n" % other for _one, other in found)
    after = "".join("%s\n" % one for one, _other in found)
    module.exit_json(changed=bool(found), changes=changes, diff={"before": before, "after": after})


if __name__ == "__main__":
    main()
