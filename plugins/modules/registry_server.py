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

import ssl
import urllib.error
import urllib.request

from ansible.module_utils import systemd_unit
from ansible.module_utils.basic import AnsibleModule


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


def run(params):
    """Enable and (re)start it, and wait until it answers."""
    name, url = params["unit"], params["url"]
    # A start limit that earlier failures have used up would refuse this one.
    systemd_unit.systemctl("reset-failed", name)
    systemd_unit.restart(name, "this host has no %s: its package is not installed" % name)
    systemd_unit.wait(
        name, "at %s" % url, lambda: silence(url, params["certificate"]), params["timeout_s"], failed_ends_it=True
    )


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
        unit = systemd_unit.show(params["unit"])
        active = unit.get("ActiveState") == "active"
        answers = active and not silence(params["url"], params["certificate"])
        found = systemd_unit.plan(unit, systemd_unit.changed_at(params["files"]), answers)
        if found and not module.check_mode:
            run(params)
    except systemd_unit.Problem as problem:
        module.fail_json(msg=str(problem))
    except FileNotFoundError:
        module.fail_json(msg="this host has no systemd, which the registry is run with")
    systemd_unit.report(module, params["unit"], found)


if __name__ == "__main__":
    main()
