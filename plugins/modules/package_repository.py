#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: package_repository
short_description: Package repositories with their keys, pins and options, in one task
description:
  - Writes keys and files for apt or dnf, each as a whole. A key is fetched on the host, with the proxies of the
    environment, and is refused where it is no OpenPGP public key.
  - A key is fetched where it is missing, damaged or not the declared one, and where one of I(files) is about to
    change - publishers change keys between releases. A host without internet stays converged.
  - C(state=read) tells what such files are made of - distribution, running kernel, processor, PCI devices.
author:
  - clusterkit
options:
  state:
    description: C(read) changes nothing. C(absent) takes I(gone) away.
    type: str
    choices: [present, absent, read]
    default: present
  keys:
    description: The keys.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where it lies. With C(.gpg) at the end it is stored in binary form, as apt reads it;
          otherwise it is stored armored, as rpm reads it.
        type: path
        required: true
      url:
        description: Where it is fetched from.
        type: str
        required: true
      checksum:
        description: SHA-256 of the published file in hexadecimal; empty for any.
        type: str
        default: ""
      fingerprints:
        description: The primary keys that may lie in it, version 4, in hexadecimal; empty for any.
        type: list
        elements: str
        default: []
  files:
    description: Sources, pins and options of the package manager.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where it lies. Its folder is made where it is missing.
        type: path
        required: true
      content:
        description: The whole text.
        type: str
        required: true
  gone:
    description: Files that are not to be there.
    type: list
    elements: path
    default: []
"""

EXAMPLES = r"""
- name: Name the repository to apt
  package_repository:
    keys:
      - {path: /etc/apt/keyrings/rocm.gpg, url: "https://repo.radeon.com/rocm/rocm.gpg.key"}
    files:
      - {path: /etc/apt/sources.list.d/rocm.sources, content: "{{ lookup('ansible.builtin.template', 'a.j2') }}"}
"""

RETURN = r"""
changes:
  description: What differs, each with C(what), C(name), and C(before) and C(after) or C(wanted) and C(actual).
  returned: always
  type: list
  elements: dict
host:
  description: >-
    C(id) and C(version) as in os-release, C(major), C(manager) (apt, dnf or none), C(architecture) as the kernel
    names it, C(kernel), C(cpu) (the vendor's id), C(pci) (C(vendor:device:class), each kind once).
  returned: state is read
  type: dict
"""

import base64
import glob
import hashlib
import os
import platform
import re
import shutil
import tempfile
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule

FETCH_S = 60
KEY_LIMIT = 1 << 20  # bytes; keyrings of publishers have some thousand
PUBLIC_KEY = 6  # RFC 4880, 4.3
ARMOR = re.compile(
    r"-----BEGIN PGP PUBLIC KEY BLOCK-----[^\S\n]*\n(?:[^\n]*:[^\n]*\n)*\s*\n(.*?)-----END PGP PUBLIC KEY BLOCK-----",
    re.DOTALL,
)


class Problem(Exception):
    """It cannot be done; the message says what to do."""


# What a key is


def dearmored(data):
    """The binary form of a published key file, of each block in it."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    if "-----BEGIN PGP" not in text:
        return data
    blocks = ARMOR.findall(text)
    if not blocks:
        raise Problem("it is cut off, or it is something else than a public key")
    try:
        # The line with the checksum begins with "=".
        return b"".join(
            base64.b64decode("".join(line for line in block.split() if not line.startswith("=")), validate=True)
            for block in blocks
        )
    except ValueError:
        raise Problem("its armor is damaged")


def packets(data):
    """(tag, body) of each OpenPGP packet (RFC 4880, 4.2); Problem where they do not fill the data."""
    found, at = [], 0
    while at < len(data):
        head = data[at]
        at += 1
        try:
            if not head & 0x80:
                raise Problem("it is no OpenPGP data")
            if head & 0x40:
                tag, first = head & 0x3F, data[at]
                if first < 192:
                    size, at = first, at + 1
                elif first < 224:
                    size, at = ((first - 192) << 8) + data[at + 1] + 192, at + 2
                elif first == 255:
                    size, at = int.from_bytes(data[at + 1 : at + 5], "big"), at + 5
                else:
                    raise Problem("it is no OpenPGP key")
            else:
                tag, width = (head >> 2) & 0x0F, {0: 1, 1: 2, 2: 4}.get(head & 3)
                if width is None:
                    raise Problem("it is no OpenPGP key")
                size, at = int.from_bytes(data[at : at + width], "big"), at + width
        except IndexError:
            raise Problem("it is cut off")
        if at + size > len(data):
            raise Problem("it is cut off")
        found.append((tag, data[at : at + size]))
        at += size
    return found


def fingerprints(data):
    """Those of the primary keys in a binary key file; None for a key of another version than 4."""
    found = packets(data)
    if not found or found[0][0] != PUBLIC_KEY:
        raise Problem("it is no OpenPGP public key")
    return [
        hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).hexdigest().upper() if body[:1] == b"\x04" else None
        for tag, body in found
        if tag == PUBLIC_KEY
    ]


def checked(data, allowed):
    """The key's binary form; Problem where it is none, or not an allowed one."""
    binary = dearmored(data)
    found = fingerprints(binary)
    wanted = [text.replace(" ", "").upper() for text in allowed]
    strange = [name or "a key of another version than 4" for name in found if name not in wanted]
    if wanted and strange:
        raise Problem("it holds %s, and only %s is declared" % (", ".join(strange), ", ".join(wanted)))
    return binary


def stored(key, data):
    """What goes into the file: rpm reads armored keys only."""
    binary = checked(data, key["fingerprints"])
    if key["path"].endswith(".gpg"):
        return binary
    if b"-----BEGIN PGP" not in data:
        raise Problem("it is in binary form, and rpm reads armored keys only")
    return data


def fetch(key):
    try:
        with urllib.request.urlopen(key["url"], timeout=FETCH_S) as answer:
            data = answer.read(KEY_LIMIT + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise Problem(
            "the repository's key cannot be fetched from %s: %s. Check the address (a mirror's variable stands in the "
            "role's README) and the way to it (clusterkit_proxy), then run again" % (key["url"], error)
        )
    digest = hashlib.sha256(data).hexdigest()
    if key["checksum"] and digest != key["checksum"].lower():
        raise Problem(
            "the key at %s has the SHA-256 %s, and %s is declared. Ask its publisher which is right"
            % (key["url"], digest, key["checksum"])
        )
    try:
        return stored(key, data)
    except Problem as problem:
        raise Problem(
            "what lies at %s cannot be used as the repository's key: %s. A login page or an error page of a proxy or "
            "a mirror looks like this too" % (key["url"], problem)
        )


# Files


def read(path):
    """The file's bytes; None where there is none."""
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except FileNotFoundError:
        return None


def write(module, path, data):
    """All or nothing; readable for all: apt reads keys and lists as a user of its own."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".clusterkit-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    module.set_default_selinux_context(path, False)


def key_fault(key):
    """Why the key on the host is not the declared one; empty where it is."""
    data = read(key["path"])
    if data is None:
        return "missing"
    try:
        stored(key, data)
    except Problem as problem:
        return "damaged: %s" % problem
    return ""


def plan(have, files, faults, gone):
    """What differs: [{what, name, ...}].

    have: {path: text or None}; files: [{path, content}]; faults: {path of a key: why it has to be fetched};
    gone: paths that are there and are not to be.
    """
    found = [
        {"what": "file", "name": name, "wanted": "a public key", "actual": faults[name]} for name in sorted(faults)
    ]
    for file in files:
        if have[file["path"]] != file["content"]:
            found.append(
                {"what": "file", "name": file["path"], "before": have[file["path"]] or "", "after": file["content"]}
            )
    return found + [{"what": "file", "name": path, "wanted": "absent", "actual": "present"} for path in gone]


def converge(module, keys, files, gone):
    texts = {file["path"]: read(file["path"]) for file in files}
    have = {path: None if data is None else data.decode("utf-8", "replace") for path, data in texts.items()}
    faults = {key["path"]: fault for key, fault in ((key, key_fault(key)) for key in keys) if fault}
    changes = plan(have, files, faults, [path for path in gone if os.path.lexists(path)])
    if module.check_mode or not changes:
        return changes
    renewed = any(have[file["path"]] != file["content"] for file in files)
    # Keys first, and all of them before anything is written: a file that names a missing key stops apt as a whole.
    fetched = {key["path"]: fetch(key) for key in keys if renewed or key["path"] in faults}
    for path, data in sorted(fetched.items()):
        before = read(path)
        if before != data:
            write(module, path, data)
        if before != data and path not in faults:
            changes.append({"what": "file", "name": path, "wanted": "the published key", "actual": "another key"})
    for file in files:
        if have[file["path"]] != file["content"]:
            write(module, file["path"], file["content"].encode())
    for path in gone:
        if os.path.lexists(path):
            os.unlink(path)
    return changes


# What the host is


def os_release(path="/etc/os-release"):
    found = {}
    with open(path) as handle:
        for line in handle:
            name, _, value = line.strip().partition("=")
            found[name] = value.strip("\"'")
    return found


def word(path):
    with open(path) as handle:
        return handle.read().strip()[2:]


def pci(root="/sys/bus/pci/devices"):
    """`vendor:device:class` without the class's interface, each kind once."""
    found = set()
    for folder in glob.glob(os.path.join(root, "*")):
        try:
            names = [word(os.path.join(folder, name)) for name in ("vendor", "device", "class")]
        except OSError:
            continue
        found.add("%s:%s:%s" % (names[0], names[1], names[2][:4]))
    return sorted(found)


def host():
    release = os_release()
    cpu = re.search(r"^vendor_id\s*:\s*(\S+)", (read("/proc/cpuinfo") or b"").decode("utf-8", "replace"), re.MULTILINE)
    version = release.get("VERSION_ID", "")
    return {
        "id": release.get("ID", "unknown"),
        "version": version,
        "major": version.split(".")[0],
        "manager": "apt" if shutil.which("apt-get") else "dnf" if shutil.which("dnf") else "none",
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "cpu": cpu.group(1) if cpu else "unknown",
        "pci": pci(),
    }


def difference(changes):
    """Ansible's diff: a file's text, or one line."""
    return [
        {
            "before_header": item["name"],
            "after_header": item["name"],
            "before": item["before"] if "before" in item else "%s\n" % item["actual"],
            "after": item["after"] if "after" in item else "%s\n" % item["wanted"],
        }
        for item in changes
    ]


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent", "read"], "default": "present"},
            "keys": {
                "type": "list",
                "elements": "dict",
                "default": [],
                # Public keys.
                "no_log": False,
                "options": {
                    "path": {"type": "path", "required": True},
                    "url": {"type": "str", "required": True},
                    "checksum": {"type": "str", "default": ""},
                    "fingerprints": {"type": "list", "elements": "str", "default": []},
                },
            },
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str", "required": True},
                },
            },
            "gone": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        if given["state"] == "read":
            module.exit_json(changed=False, changes=[], host=host())
        present = given["state"] == "present"
        changes = converge(module, given["keys"] if present else [], given["files"] if present else [], given["gone"])
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or "the package manager's files", error.strerror))
    module.exit_json(changed=bool(changes), changes=changes, diff=difference(changes))


if __name__ == "__main__":
    main()
