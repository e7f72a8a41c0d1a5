#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: trusted_authority
short_description: A site's certificate authorities in the distribution's store
description:
  - Writes a PEM file where the distribution looks for a site's authorities, and has the store made anew.
  - Whether the store really holds them is read on each run, so a run that was cut in between converges.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes them out again.
    type: str
    choices: [present, absent]
    default: present
  name:
    description: Name of the file, without a suffix.
    type: str
    required: true
  content:
    description: The certificates in PEM, one after the other. Required for I(state=present).
    type: str
"""

EXAMPLES = r"""
- name: Trust the site's certificate authority
  trusted_authority:
    name: clusterkit
    content: "{{ lookup('ansible.builtin.file', '/srv/site-ca.pem') }}"
"""

RETURN = r"""
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile

from ansible.module_utils.basic import AnsibleModule

CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
# Program that makes the store anew, what it needs to forget an authority, folder of a site's own, the store.
STORES = (
    (
        "update-ca-certificates",
        ["--fresh"],
        "/usr/local/share/ca-certificates",
        "/etc/ssl/certs/ca-certificates.crt",
    ),
    ("update-ca-trust", [], "/etc/pki/ca-trust/source/anchors", "/etc/pki/tls/certs/ca-bundle.crt"),
)


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def digests(text):
    """SHA-256 of each certificate in a PEM text, whatever its line breaks."""
    return {hashlib.sha256(re.sub(r"\s+", "", body).encode()).hexdigest() for body in CERTIFICATE.findall(text)}


def plan(file, store, wanted, state, path):
    """What differs: [{what, name, wanted, actual}]. file, store: what they hold now; wanted: the PEM text."""
    found = []
    if state == "absent":
        if file:
            found.append({"what": "authority", "name": path, "wanted": "gone", "actual": "there"})
        return found
    if file != wanted:
        actual = "other certificates" if file else "missing"
        found.append({"what": "authority", "name": path, "wanted": "the site's certificates", "actual": actual})
    missing = len(digests(wanted) - digests(store))
    if missing:
        actual = "%d of them missing" % missing
        found.append({"what": "authority", "name": "the system's store", "wanted": "trusted", "actual": actual})
    return found


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except FileNotFoundError:
        return ""


def write(path, text):
    handle, temporary = tempfile.mkstemp(prefix=".clusterkit-", dir=os.path.dirname(path))
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(text)
    os.chmod(temporary, 0o644)
    os.rename(temporary, path)


def store_of_host():
    for store in STORES:
        if shutil.which(store[0]):
            return store
    return None


def update(program, *words):
    done = subprocess.run([program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise Problem("%s failed: %s" % (program, done.stdout.decode("utf-8", "replace").strip()[-800:]))


def ensure(params, check):
    store = store_of_host()
    wanted, state = (params["content"] or "").strip() + "\n", params["state"]
    if state == "present" and not digests(wanted):
        raise Problem("clusterkit_ca_bundle holds no certificate in PEM (-----BEGIN CERTIFICATE-----)")
    if store is None:
        if state == "absent":
            return []
        if check:  # on a bare host, the package that brings it is only now to be installed
            return plan("", "", wanted, state, params["name"])
        raise Problem("this host has no update-ca-certificates; install the package ca-certificates")
    program, fresh, folder, bundle = store
    path = os.path.join(folder, params["name"] + ".crt")
    # Debian links each authority beside the bundle; the link is left where a removal was cut after the file.
    link = os.path.join(os.path.dirname(bundle), params["name"] + ".pem")
    file = read(path) or ("a link without its file" if state == "absent" and os.path.islink(link) else "")
    changes = plan(file, read(bundle), wanted, state, path)
    if check or not changes:
        return changes
    if state == "absent":
        if os.path.exists(path):
            os.unlink(path)
        update(program, *fresh)
        return changes
    os.makedirs(folder, exist_ok=True)
    if file != wanted:
        write(path, wanted)
    update(program)
    left = len(digests(wanted) - digests(read(bundle)))
    if left:
        raise Problem("%s ran, and %s still lacks %d of the certificates in %s" % (program, bundle, left, path))
    return changes


def difference(changes):
    """Ansible's diff: a line per change."""

    def lines(key):
        return "".join("%s: %s\n" % (change["name"], change[key]) for change in changes)

    return {"before": lines("actual"), "after": lines("wanted")}


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "name": {"type": "str", "required": True},
            "content": {"type": "str"},
        },
        required_if=[("state", "present", ("content",))],
        supports_check_mode=True,
    )
    try:
        changes = ensure(module.params, module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or "the store", error.strerror))
    module.exit_json(changed=bool(changes), changes=changes, diff=difference(changes))


if __name__ == "__main__":
    main()
