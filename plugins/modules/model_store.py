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
"""

import json
import os
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


def run(command):
    # Libraries leave caches in TMPDIR; here they go with it.
    with tempfile.TemporaryDirectory() as scratch:
        environment = dict(
            os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TMPDIR=scratch
        )
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=environment
        )
    return done.returncode, done.stdout, done.stderr


def whole(maker, path):
    """Does every file match the manifest? Needs no engine."""
    return run([sys.executable, maker, "--out", path, "--check"])[0] == 0


def make(module, model):
    code, out, err = run([module.params["python"], module.params["maker"], "--out", model["path"]])
    if code != 0:
        module.fail_json(msg="model %s could not be made: %s" % (model["id"], (err or out).strip()[-1500:]))
    return json.loads(out.strip().splitlines()[-1])


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "models": {"type": "list", "elements": "dict", "required": True},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "maker": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    made, problems = [], []
    for model in module.params["models"]:
        if module.params["state"] == "absent":
            if model["make"] and os.path.isdir(model["path"]):
                made.append(model["id"])
                if not module.check_mode:
                    shutil.rmtree(model["path"])
        elif model["folder"]:
            problem = folder_problems(model["path"])
            if problem:
                problems.append("model %s: %s" % (model["id"], problem))
        elif not (os.path.exists(module.params["maker"]) and whole(module.params["maker"], model["path"])):
            made.append(model["id"])
            if not module.check_mode:
                make(module, model)
    if problems:
        module.fail_json(msg="\n".join(problems))
    module.exit_json(changed=bool(made), made=made)


if __name__ == "__main__":
    main()
