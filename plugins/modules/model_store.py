#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: model_store
short_description: Weights on a host, made or read in place, and checked
description:
  - Makes each model that is to be made, and checks every file of it against its manifest on each run.
  - A model that is a folder of the site's is read in place; the module only checks that it is complete.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes away the models that were made; a site's folder is never touched.
    type: str
    choices: [present, absent]
    default: present
  models:
    description: Each with C(id), C(path) and either C(make) (a name) or C(folder).
    type: list
    elements: dict
    required: true
  python:
    description: Interpreter of the Ray environment, for what is made.
    type: path
    default: /usr/bin/python3
  user:
    description: Ray's user, who has to be able to read the weights and who owns what is made; where the module
      itself runs as root.
    type: str
    default: ""
  python_becomes_user:
    description: Whether C(python) is a command that becomes Ray's user by itself.
    type: bool
    default: false
  maker:
    description: The program that makes a model.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Make the model
  model_store:
    models: [{id: tiny, make: tiny-llama, folder: null, path: /var/lib/clusterkit/models/tiny}]
    python: /opt/clusterkit/ray-env/bin/python
    maker: /opt/clusterkit/bin/make-tiny-llama
"""

RETURN = r"""
made:
  description: Ids of the models that were made.
  returned: always
  type: list
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual), which names the files.
  returned: always
  type: list
  elements: dict
"""

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile

from ansible.module_utils.basic import AnsibleModule

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


def folder_problems(path):
    """Why a folder is no model that vLLM can read, with the fix."""
    if not os.path.isdir(path):
        return "there is no folder %s on this host; mount or copy it there" % path
    try:
        names = os.listdir(path)
    except OSError as error:
        return "%s cannot be read: %s" % (path, error.strerror)
    if "config.json" not in names:
        return "%s has no config.json: it is not a model in Hugging Face's layout" % path
    if not any(name.endswith(WEIGHTS) for name in names):
        return "%s has no weights (%s)" % (path, ", ".join(WEIGHTS))
    unreadable = [name for name in names if not os.access(os.path.join(path, name), os.R_OK)]
    if unreadable:
        return "%s: %s may not read %s" % (path, "Ray's user", ", ".join(sorted(unreadable)))
    return None


def problems_for(user, path):
    """The same, as Ray's user sees it."""
    if not user or os.geteuid() != 0:
        return folder_problems(path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "%s could not be looked at as %s" % (path, user)
        try:
            os.setgroups(os.getgrouplist(user, pwd.getpwnam(user).pw_gid))
            os.setgid(pwd.getpwnam(user).pw_gid)
            os.setuid(pwd.getpwnam(user).pw_uid)
            said = folder_problems(path) or ""
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(child, 0)
    return said or None


def run(command, user=""):
    who = {}
    if user and os.geteuid() == 0:
        entry = pwd.getpwnam(user)
        who = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": os.getgrouplist(user, entry.pw_gid)}
    # Libraries leave caches in TMPDIR; here they go with it.
    with tempfile.TemporaryDirectory() as scratch:
        if who:
            os.chown(scratch, who["user"], who["group"])
        environment = dict(
            os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TMPDIR=scratch
        )
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=environment, **who
        )
    return done.returncode, done.stdout, done.stderr


def differences(maker, path, check=False):
    """What is wrong with a made model, as lines; none where every file matches the manifest. Needs no engine."""
    if not os.path.isdir(path):
        return ["missing"]
    if check and not os.path.exists(maker):
        # It is only now to be installed; what it would say of the files is not known.
        return [] if os.path.exists(os.path.join(path, "manifest.json")) else ["no manifest"]
    code, out, err = run([sys.executable, "-B", maker, "--out", path, "--check"])
    if code == 0:
        return []
    try:
        return json.loads(out.strip().splitlines()[-1])["differences"]
    except (ValueError, LookupError, TypeError):
        return [(err or out).strip()[-500:] or "exit code %d" % code]


def user_on_host(module):
    """Ray's user; on a bare host, in check mode, there is none yet."""
    name = module.params["user"]
    try:
        pwd.getpwnam(name or "root")
    except KeyError:
        return "" if module.check_mode else name
    return name


def change(model, wanted, actual):
    return {"what": "model", "name": model["id"], "wanted": wanted, "actual": actual}


def make(module, model):
    user = "" if module.params["python_becomes_user"] else module.params["user"]
    code, out, err = run([module.params["python"], module.params["maker"], "--out", model["path"]], user)
    if code != 0:
        module.fail_json(msg="model %s could not be made: %s" % (model["id"], (err or out).strip()[-1500:]))
    return json.loads(out.strip().splitlines()[-1])


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "models": {"type": "list", "elements": "dict", "required": True},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "user": {"type": "str", "default": ""},
            "python_becomes_user": {"type": "bool", "default": False},
            "maker": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    made, problems, changes = [], [], []
    for model in module.params["models"]:
        if module.params["state"] == "absent":
            if model["make"] and os.path.isdir(model["path"]):
                made.append(model["id"])
                changes.append(change(model, "gone", "there"))
                if not module.check_mode:
                    shutil.rmtree(model["path"])
        elif model["folder"]:
            problem = problems_for(user_on_host(module), model["path"])
            if problem:
                problems.append("model %s: %s" % (model["id"], problem))
        else:
            wrong = differences(module.params["maker"], model["path"], module.check_mode)
            if wrong:
                made.append(model["id"])
                changes.append(change(model, "%s in %s" % (model["make"], model["path"]), "; ".join(wrong)))
                if not module.check_mode:
                    make(module, model)
    if problems:
        module.fail_json(msg="\n".join(problems))
    module.exit_json(changed=bool(made), made=made, changes=changes)


if __name__ == "__main__":
    main()
