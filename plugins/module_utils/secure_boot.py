"""Secure Boot of a host: whether it is on, and whether the key that DKMS signs drivers with is enrolled."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess

# The order in which DKMS takes them: Ubuntu's own first.
KEYS = ("/var/lib/shim-signed/mok/MOK.der", "/var/lib/dkms/mok.pub")
TIMEOUT_S = 60


def read(root="/"):
    """{enabled, key, enrolled, pending}; enabled and enrolled are None where nobody can tell."""
    key = next((path for path in KEYS if os.path.exists(under(root, path))), None)
    said = mokutil("--sb-state")
    enabled = None
    if "SecureBoot enabled" in said:
        enabled = "validation is disabled" not in said
    elif "SecureBoot disabled" in said or not os.path.isdir(under(root, "/sys/firmware/efi")):
        enabled = False
    else:
        for path in glob.glob(under(root, "/sys/firmware/efi/efivars/SecureBoot-*")):
            with open(path, "rb") as handle:
                # Four bytes of attributes, then the value (UEFI specification, Globally Defined Variables).
                enabled = handle.read()[4:5] == b"\x01"
    enrolled, pending = None, False
    if enabled and key:
        # Its exit code means the opposite in older releases; the words are the same.
        said = mokutil("--test-key", under(root, key))
        pending = "in the enrollment request" in said
        if pending or "is not enrolled" in said:
            enrolled = False
        elif "is already enrolled" in said or "built-in trusted keyring" in said:
            enrolled = True
    return {"enabled": enabled, "key": key, "enrolled": enrolled, "pending": pending}


def under(root, path):
    return os.path.join(root, path.lstrip("/"))


def mokutil(*arguments):
    """What it says; nothing where it is not installed or does not end."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    program = shutil.which("mokutil", path=path)
    if program is None:
        return ""
    try:
        done = subprocess.run(
            (program,) + arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            env=dict(os.environ, LC_ALL="C"),
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout
