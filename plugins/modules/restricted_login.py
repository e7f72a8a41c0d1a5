#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: restricted_login
short_description: A user that others log in as by key, with its authorized_keys and its sudo rules
description:
  - Makes the user (a system user without a password), and what only root may write - its home, C(~/.ssh), the
    C(authorized_keys) and a file of sudo rules. So nobody who has become that user can let others in.
  - C(visudo) checks the rules before they get their name. sudo reads no file with a dot in its name until then.
  - C(state=absent) takes the rules and the keys away first, then ends what the user still runs, such as a connection
    that is kept open, then takes the user. A user of that name with another home is somebody else's, and stays.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes all of it away.
    type: str
    choices: [present, absent]
    default: present
  name:
    description: The user.
    type: str
    required: true
  home:
    description: >-
      Its home. On a host with SELinux only C(/var/lib/NAME) has a C(.ssh) that sshd may read (ssh_home_t).
    type: path
    required: true
  sudoers:
    description: The file of sudo rules; a name without a dot.
    type: path
    required: true
  authorized_keys:
    description: The text of C(authorized_keys). Required for I(state=present).
    type: str
  rules:
    description: The text of the sudo rules. Required for I(state=present).
    type: str
"""

EXAMPLES = r"""
- name: Let the fleet in
  restricted_login:
    name: clusterkit-agent
    home: /var/lib/clusterkit-agent
    sudoers: /etc/sudoers.d/clusterkit-agent
    authorized_keys: "restrict,command=\"/usr/bin/true\" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB4f\n"
    rules: "clusterkit-agent ALL=(root) NOPASSWD: /usr/bin/true now\n"
"""

RETURN = r"""
host_keys:
  description: The host's own public SSH keys, each as C(type base64).
  returned: state is present
  type: list
  elements: str
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual), or C(before) and C(after).
  returned: always
  type: list
  elements: dict
"""

import glob
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

HOST_KEYS = "/etc/ssh/ssh_host_*_key.pub"
SHELL = "/bin/sh"  # sshd runs a forced command by it
END_S = 10


class Problem(Exception):
    """It cannot be done; the text says what to do."""


def plan(have, want):
    """What differs: [{what, name, wanted, actual} or {what, name, before, after}].

    want: {"name", "home", "paths": {path: (mode, text, or None of a folder)}} or with "paths": {} where it is to go.
    have: {"user": {"home", "shell"} or None, "paths": {path: (uid, mode, text) or None}}.
    """
    user, found = have["user"], []
    if user is not None and os.path.normpath(user["home"]) != want["home"]:
        if not want["paths"]:
            user = None
        else:
            raise Problem(
                "there is a user %s with the home %s on this host, which the kit did not make: rename it, or take it "
                "away" % (want["name"], user["home"])
            )
    wanted = {"home": want["home"], "shell": SHELL}
    if want["paths"] and (user is None or user["shell"] != SHELL):
        actual = "missing" if user is None else "shell=%s" % user["shell"]
        found.append({"what": "user", "name": want["name"], "wanted": wanted, "actual": actual})
    for path, is_there in have["paths"].items():
        if path not in want["paths"]:
            if is_there is not None:
                found.append({"what": "file", "name": path, "wanted": "gone", "actual": "there"})
            continue
        mode, text = want["paths"][path]
        found += differences(path, is_there, mode, text)
    if not want["paths"] and user is not None:
        found.append({"what": "user", "name": want["name"], "wanted": "gone", "actual": "there"})
    return found


def differences(path, found, mode, text):
    what = "folder" if text is None else "file"
    if text is not None and (found is None or found[2] != text):
        return [{"what": what, "name": path, "before": found[2] if found else "", "after": text}]
    if found is None:
        return [{"what": what, "name": path, "wanted": "root's, %04o" % mode, "actual": "missing"}]
    if found[:2] != (0, mode):
        actual = "uid %d, %04o" % found[:2]
        return [{"what": what, "name": path, "wanted": "root's, %04o" % mode, "actual": actual}]
    return []


def read_user(name):
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return {"home": entry.pw_dir, "shell": entry.pw_shell, "uid": entry.pw_uid}


def read_path(path):
    """(uid, mode, text; None of a folder), or None where there is nothing."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        raise Problem("%s is neither a file nor a folder: take it away" % path)
    text = None
    if stat.S_ISREG(found.st_mode):
        with open(path, encoding="utf-8", errors="replace") as handle:
            text = handle.read()
    return found.st_uid, stat.S_IMODE(found.st_mode), text


def run(*command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        said = done.stdout.decode("utf-8", "replace").strip()
        raise Problem("%s failed: %s" % (" ".join(command), said or "exit code %d" % done.returncode))


def visudo(path):
    program = shutil.which("visudo", path="%s:/usr/sbin:/sbin" % os.environ.get("PATH", ""))
    if program is None:
        raise Problem("this host has no visudo: install the package sudo")
    done = subprocess.run(
        [program, "-c", "-f", path], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        said = done.stdout.decode("utf-8", "replace").replace(path, "the rules").strip()
        raise Problem("visudo refuses the sudo rules, and nothing was written: %s" % said)


def make_folder(module, path, mode):
    if not os.path.isdir(path):
        os.makedirs(path)
    os.chown(path, 0, 0)
    os.chmod(path, mode)
    module.set_default_selinux_context(path, False)


def make_file(module, path, mode, text, check=None):
    handle, temporary = tempfile.mkstemp(prefix=".%s." % os.path.basename(path), dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            os.fchmod(out.fileno(), mode)
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
        # Made in another place's name: on a host with SELinux, the label is the final path's.
        module.set_default_selinux_context(path, False)
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def put_right(module, have, want, changes):
    name, home = want["name"], want["home"]
    if have["user"] is None:
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", home, "--shell", SHELL]
        run(*command, name)
    elif have["user"]["shell"] != SHELL:
        run("usermod", "--shell", SHELL, name)
    wrong = {change["name"] for change in changes}
    for path, (mode, text) in want["paths"].items():
        if path in wrong and text is None:
            make_folder(module, path, mode)
        elif path in wrong:
            make_file(module, path, mode, text, visudo if path == module.params["sudoers"] else None)


def processes(uid):
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat("/proc/" + name).st_uid == uid:
                found.append(int(name))
        except OSError:
            continue
    return found


def take_away(have, want):
    for path in sorted(have["paths"], key=len, reverse=True):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
    user = have["user"]
    if user is None or os.path.normpath(user["home"]) != want["home"]:
        return
    # A connection that is kept open is the user's, and userdel refuses one who runs something.
    deadline = time.monotonic() + END_S
    while processes(user["uid"]):
        for pid in processes(user["uid"]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise Problem("processes of %s do not end; see: ps -u %s" % (want["name"], want["name"]))
        time.sleep(0.1)
    run("userdel", want["name"])


def host_keys():
    found = []
    for path in sorted(glob.glob(HOST_KEYS)):
        with open(path, encoding="utf-8") as handle:
            words = handle.read().split()
        if len(words) >= 2:
            found.append(" ".join(words[:2]))
    return found


def needs_host_keys(found):
    if not found:
        raise Problem("this host has no %s, so nobody can know it by its key: install openssh-server" % HOST_KEYS)


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "name": {"type": "str", "required": True},
            "home": {"type": "path", "required": True},
            "sudoers": {"type": "path", "required": True},
            "authorized_keys": {"type": "str", "no_log": False},
            "rules": {"type": "str"},
        },
        required_if=[("state", "present", ("authorized_keys", "rules"))],
        supports_check_mode=True,
    )
    given = module.params
    home, sudoers = os.path.normpath(given["home"]), given["sudoers"]
    folder = os.path.join(home, ".ssh")
    wanted = {home: (0o755, None), folder: (0o755, None)}
    wanted[os.path.join(folder, "authorized_keys")] = (0o644, given["authorized_keys"])
    wanted[sudoers] = (0o440, given["rules"])
    present = given["state"] == "present"
    want = {"name": given["name"], "home": home, "paths": wanted if present else {}}
    result = {}
    try:
        if present:
            result["host_keys"] = host_keys()
        have = {"user": read_user(given["name"]), "paths": {path: read_path(path) for path in wanted}}
        changes = plan(have, want)
        if present and not module.check_mode:
            needs_host_keys(result["host_keys"])
        if changes and not module.check_mode and present:
            put_right(module, have, want, changes)
        elif changes and not module.check_mode:
            take_away(have, want)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except OSError as error:
        module.fail_json(msg="%s: %s" % (error.filename or given["name"], error.strerror or error))
    module.exit_json(changed=bool(changes), changes=changes, diff=[difference(change) for change in changes], **result)


def difference(change):
    header = {"before_header": change["name"], "after_header": change["name"]}
    if "before" in change:
        return dict(header, before=change["before"], after=change["after"])
    return dict(header, before="%s\n" % change["actual"], after="%s\n" % change["wanted"])


if __name__ == "__main__":
    main()
