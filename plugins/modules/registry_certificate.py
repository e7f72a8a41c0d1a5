#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: registry_certificate
short_description: A certificate that a server signs itself, made once and kept
description:
  - Makes a key (EC, P-256) and a certificate with C(openssl), where there is none, or where it is no longer fit -
    it does not name an address or a name, it is not the key's, or it ends within 30 days. Else it is kept.
  - The key never leaves the host, and is in no argument and no output.
author:
  - clusterkit
options:
  certificate:
    description: Where the certificate lies, readable by everybody. Its folder has to be there.
    type: path
    required: true
  key:
    description: Where the key lies, with mode 0640.
    type: path
    required: true
  group:
    description: The key's group.
    type: str
    required: true
  addresses:
    description: IP addresses that it is for.
    type: list
    elements: str
    required: true
  names:
    description: Host names that it is for.
    type: list
    elements: str
    default: []
  days:
    description: How long a new one holds, in days.
    type: int
    default: 3650
"""

EXAMPLES = r"""
- name: Make the certificate
  registry_certificate:
    certificate: /etc/clusterkit-registry/tls.crt
    key: /etc/clusterkit-registry/tls.key
    group: docker-registry
    addresses: [192.0.2.10]
"""

RETURN = r"""
changes:
  description: Why it is made, with C(what), C(name), C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
"""

import grp
import ipaddress
import os
import re
import shutil
import subprocess
import tempfile

from ansible.module_utils.basic import AnsibleModule

RENEW_S = 30 * 24 * 3600
# The extensions that today's clients ask for; not those of the host's own openssl.cnf.
REQUEST = """\
[req]
distinguished_name = subject
x509_extensions = server
prompt = no
[subject]
CN = %(name)s
[server]
subjectAltName = %(alternatives)s
basicConstraints = critical,CA:TRUE
keyUsage = critical,digitalSignature,keyCertSign
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
"""


class Problem(Exception):
    """It cannot be done; the text says what to do."""


def plan(have, wanted):
    """Why a new one is needed; empty where it is not.

    have: {"names", "paired", "lasting"} of the one that is there, or None; wanted: the names it has to have.
    """
    if have is None:
        return "missing"
    if not have["paired"]:
        return "not the key's"
    lacking = [name for name in wanted if name not in have["names"]]
    if lacking:
        return "not for %s" % ", ".join(lacking)
    return "" if have["lasting"] else "about to end"


def names_in(text):
    """The names in openssl's words on subjectAltName, as REQUEST has them."""
    found = re.findall(r"(DNS|IP Address):([^,\s]+)", text)
    return {named(value) if kind == "IP Address" else "DNS:%s" % value for kind, value in found}


def named(address):
    """openssl writes 2001:DB8:0:0:0:0:0:1 where one gave it 2001:db8::1."""
    return "IP:%s" % ipaddress.ip_address(address)


def openssl(*words):
    try:
        done = subprocess.run(
            ["openssl"] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise Problem("this host has no openssl: install it, or give the registry a certificate (registry_certificate)")
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def read(certificate, key):
    """What is there, as plan() takes it."""
    if not (os.path.isfile(certificate) and os.path.isfile(key)):
        return None
    code, said, _err = openssl("x509", "-noout", "-ext", "subjectAltName", "-in", certificate)
    if code != 0:
        return None
    theirs, ours = openssl("x509", "-noout", "-pubkey", "-in", certificate), openssl("pkey", "-pubout", "-in", key)
    lasting = openssl("x509", "-noout", "-checkend", str(RENEW_S), "-in", certificate)[0] == 0
    return {"names": names_in(said), "paired": ours[0] == 0 and ours[1] == theirs[1], "lasting": lasting}


def make(params, wanted):
    try:
        group = grp.getgrnam(params["group"]).gr_gid
    except KeyError:
        raise Problem("there is no group %s on this host: is the registry's package installed?" % params["group"])
    certificate, key = params["certificate"], params["key"]
    folder = tempfile.mkdtemp(prefix=".certificate-", dir=os.path.dirname(key))
    try:
        request, new, new_key = (os.path.join(folder, name) for name in ("request", "crt", "key"))
        with open(request, "w", encoding="utf-8") as out:
            out.write(REQUEST % {"name": params["addresses"][0], "alternatives": ",".join(wanted)})
        words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"]
        words += ["-days", str(params["days"]), "-config", request, "-keyout", new_key, "-out", new]
        code, _out, err = openssl(*words)
        if code != 0:
            raise Problem("openssl made no certificate: %s" % err.strip()[-500:])
        os.chown(new_key, -1, group)
        os.chmod(new_key, 0o640)
        os.chmod(new, 0o644)
        # A run that is cut between the two leaves a pair that does not fit: the next one sees that.
        os.replace(new_key, key)
        os.replace(new, certificate)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    module = AnsibleModule(
        argument_spec={
            "certificate": {"type": "path", "required": True},
            "key": {"type": "path", "required": True, "no_log": False},
            "group": {"type": "str", "required": True},
            "addresses": {"type": "list", "elements": "str", "required": True},
            "names": {"type": "list", "elements": "str", "default": []},
            "days": {"type": "int", "default": 3650},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        wanted = [named(each) for each in params["addresses"]] + ["DNS:%s" % each for each in params["names"]]
        why = plan(read(params["certificate"], params["key"]), wanted)
        if why and not module.check_mode:
            make(params, wanted)
    except (Problem, ValueError) as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or params["key"], error.strerror or error))
    wish = "one for %s" % ", ".join(wanted)
    change = {"what": "certificate", "name": params["certificate"], "wanted": wish, "actual": why}
    diff = {"before": "%s\n" % why if why else "", "after": "%s\n" % wish if why else ""}
    module.exit_json(changed=bool(why), changes=[change] if why else [], diff=diff)


if __name__ == "__main__":
    main()
