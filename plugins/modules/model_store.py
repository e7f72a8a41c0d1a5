#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: model_store
short_description: Weights on a host, made, fetched or read in place, and checked
description:
  - Makes each model that is to be made, and checks every file of it against its manifest on each run.
  - Fetches a repository of the Hugging Face Hub once; then its manifest and the sizes of its files are looked at, and
    nobody outside is asked.
  - A model that is a folder of the site's is read in place; the module only checks that it is complete.
  - Removes what engines compiled for images and models that are gone.
author:
  - clusterkit
options:
  state:
    description: C(absent) takes away the models that were made, and what is left of a fetch that was cut off. What
      was fetched stays, and a site's folder is never touched.
    type: str
    choices: [present, absent]
    default: present
  models:
    description: Each with C(id), C(path) and one of C(make) (a name), C(folder) and C(hub) (a repository, with
      C(revision), C(allow_patterns), C(ignore_patterns), and C(weights), which is false where configuration and
      tokenizer are enough). A LoRA adapter has C(max_rank), the largest rank that its engine takes.
    type: list
    elements: dict
    required: true
  python:
    description: Interpreter of the Ray environment, for what is made or fetched.
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
  fetcher:
    description: The program that fetches a model.
    type: path
    default: ""
  endpoint:
    description: URL of a server that speaks the Hub's API; empty is huggingface.co.
    type: str
    default: ""
  token:
    description: For repositories that are not open to all. It reaches the program on stdin.
    type: str
    default: ""
  environment:
    description: For the program that fetches, such as C(https_proxy).
    type: dict
    default: {}
  authorities:
    description: The site's certificate authorities in PEM, trusted besides the public ones.
    type: str
    default: ""
  verify:
    description: Whether every byte of what was fetched is read and compared. Otherwise sizes are.
    type: bool
    default: false
  fetch:
    description: Whether what is wanting is fetched. Otherwise it is only told, in C(wanting).
    type: bool
    default: true
  peer:
    description: Another host that shares what it has, as C(share-models) prints it - C(url) and C(models). What it
      does not have comes from C(endpoint).
    type: dict
    default: {}
  peer_token:
    description: What the peer asks for.
    type: str
    default: ""
  caches:
    description: The folder C(path) of what engines compiled, the C(names) in it that are in use, and how many others
      to C(keep), the newest.
    type: dict
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
fetched:
  description: The models that were fetched, each with C(id), C(commit), C(bytes) and C(files); in check mode
    with C(id) alone.
  returned: always
  type: list
  elements: dict
wanting:
  description: Ids of the models that are yet to be fetched, where C(fetch) is false.
  returned: always
  type: list
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual), which names the files.
  returned: always
  type: list
  elements: dict
"""

import concurrent.futures
import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile

from ansible.module_utils.basic import AnsibleModule

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
MANIFEST = "clusterkit-manifest.json"
ADAPTER = "adapter_config.json"


class Problem(Exception):
    """It cannot be done; the message says what to do."""


def folder_problems(path, config="config.json"):
    """Why a folder is no model that vLLM can read, with the fix."""
    if not os.path.isdir(path):
        return "there is no folder %s on this host; mount or copy it there" % path
    try:
        names = os.listdir(path)
    except OSError as error:
        return "%s cannot be read: %s" % (path, error.strerror)
    if config not in names:
        what = "an adapter in PEFT's" if config == ADAPTER else "a model in Hugging Face's"
        return "%s has no %s: it is not %s layout" % (path, config, what)
    if not any(name.endswith(WEIGHTS) for name in names):
        return "%s has no weights (%s)" % (path, ", ".join(WEIGHTS))
    unreadable = [name for name in names if not os.access(os.path.join(path, name), os.R_OK)]
    if unreadable:
        return "%s: %s may not read %s" % (path, "Ray's user", ", ".join(sorted(unreadable)))
    return None


def adapter_problems(path, max_rank):
    """Why the engine would refuse an adapter's rank, with the fix. vLLM would say so to whoever asks for it first."""
    name = os.path.join(path, ADAPTER)
    try:
        with open(name, encoding="utf-8") as handle:
            config = json.load(handle)
        rank = max([config["r"]] + list((config.get("rank_pattern") or {}).values()))
        if rank > max_rank:
            return "its rank is %d (%s), and the engine takes %d: raise max_lora_rank" % (rank, name, max_rank)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "%s says no rank (`r`): it is not a LoRA adapter in PEFT's layout" % name
    return None


def as_user(user, function, *arguments):
    """What a function answers, as Ray's user; it must be something that JSON knows. Root would follow his links."""
    if not user or os.geteuid() != 0:
        return function(*arguments)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = {"problem": "%s failed as %s" % (function.__name__, user)}
        try:
            entry = pwd.getpwnam(user)
            os.setgroups(os.getgrouplist(user, entry.pw_gid))
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            said = {"answer": function(*arguments)}
        except Exception as error:
            said["problem"] += ": %s" % error
        finally:
            with os.fdopen(writer, "wb") as out:
                out.write(json.dumps(said).encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = json.loads(answer.read().decode())
    os.waitpid(child, 0)
    if "problem" in said:
        raise Problem(said["problem"])
    return said["answer"]


def run(command, user="", given=None, variables=None):
    """(exit code, stdout, stderr); `given` goes to stdin, where no other user can read it."""
    who = {}
    if user and os.geteuid() == 0:
        entry = pwd.getpwnam(user)
        who = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": os.getgrouplist(user, entry.pw_gid)}
    # Libraries leave caches in TMPDIR; here they go with it.
    with tempfile.TemporaryDirectory() as scratch:
        if who:
            os.chown(scratch, who["user"], who["group"])
        if variables is None:
            variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", TMPDIR=scratch, **variables)
        try:
            done = subprocess.run(
                command,
                input=given or "",
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                universal_newlines=True,
                env=environment,
                **who,
            )
        except OSError as error:
            raise Problem("%s cannot be started: %s; put the engine on the host first" % (command[0], error.strerror))
    return done.returncode, done.stdout, done.stderr


# --------------------------------------------------------------------------- fetched


def hub_state(path, verify=False):
    """What a fetched folder holds: {"there", "manifest", "files": {name: {"size", "sha256" where asked for}}}."""
    state = {"there": os.path.isdir(path) and bool(os.listdir(path)), "manifest": None, "files": {}}
    try:
        with open(os.path.join(path, MANIFEST), encoding="utf-8") as handle:
            manifest = json.load(handle)
        names = sorted(manifest["files"])
        state["manifest"] = manifest
    except (OSError, ValueError, KeyError, TypeError):
        return state
    for name in names:
        try:
            state["files"][name] = {"size": os.stat(os.path.join(path, name)).st_size}
        except OSError:
            continue
    if verify:
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            read = {name: pool.submit(sha256_of, os.path.join(path, name)) for name in state["files"]}
            for name, digest in read.items():
                state["files"][name]["sha256"] = digest.result()
    return state


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def plan(have, want):
    """What is wrong with a fetched folder: [(file or None, text)]; nothing where its manifest satisfies the model."""
    manifest = have["manifest"]
    if manifest is None:
        return [(None, "no manifest" if have["there"] else "missing")]
    if (manifest.get("hub"), manifest.get("revision")) != (want["hub"], want["revision"]):
        return [(None, "holds %s at %s" % (manifest.get("hub"), manifest.get("revision")))]
    wrong = []
    if want["weights"] and not manifest.get("weights"):
        wrong.append((None, "its weights are not there yet"))
    for name, about in sorted(manifest["files"].items()):
        found = have["files"].get(name)
        if found is None:
            wrong.append((name, "%s is missing" % name))
        elif found["size"] != about["size"]:
            wrong.append((name, "%s has %d bytes, not %d" % (name, found["size"], about["size"])))
        elif found.get("sha256", about["sha256"]) != about["sha256"]:
            wrong.append((name, "%s has changed" % name))
    return wrong


def source_of(model, params):
    """Whom to ask for a model: the peer, where it has just this one, or the Hub."""
    same = ("hub", "revision", "allow_patterns", "ignore_patterns")
    for other in params["peer"].get("models", []):
        if all(other[key] == model[key] for key in same) and (other["weights"] or not model["weights"]):
            # Straight to it: a proxy is for the world outside.
            return {
                "endpoint": params["peer"]["url"],
                "token": params["peer_token"],
                "environment": {"no_proxy": "*", "NO_PROXY": "*"},
                "authorities": "",
            }
    return {key: params[key] for key in ("endpoint", "token", "environment", "authorities")}


def fetch(module, model, broken):
    """Let the engine's own library fetch a model; what it says of that."""
    params = module.params
    source = source_of(model, params)
    request = {
        "hub": model["hub"],
        "revision": model["revision"],
        "allow_patterns": model["allow_patterns"],
        "ignore_patterns": model["ignore_patterns"],
        "weights": model["weights"],
        "out": model["path"],
        "broken": broken,
        "in_use": [other["path"] for other in params["models"]],
        **source,
    }
    user = "" if params["python_becomes_user"] else params["user"]
    command = [params["python"], params["fetcher"]]
    # The engine's image is given no network otherwise.
    code, out, err = run(command, user, json.dumps(request), {"RAY_PYTHON_NETWORK": "host", "HF_HUB_OFFLINE": "0"})
    try:
        said = json.loads(out.strip().splitlines()[-1])
    except (ValueError, LookupError):
        said = {"ok": False, "problem": (err or out).strip()[-1500:] or "exit code %d" % code}
    if not said["ok"]:
        raise Problem("model %s: %s" % (model["id"], said["problem"]))
    return dict(said, id=model["id"])


# --------------------------------------------------------------------------- what engines compiled


def stale_caches(caches):
    """Folders of no app that is declared, beyond the newest that are kept."""
    try:
        entries = [entry for entry in os.scandir(caches["path"]) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    unused = [entry for entry in entries if entry.name not in caches["names"]]
    unused.sort(key=lambda entry: (entry.stat(follow_symlinks=False).st_mtime, entry.name), reverse=True)
    return sorted(entry.name for entry in unused[caches["keep"] :])


def drop_caches(path, names):
    for name in names:
        shutil.rmtree(os.path.join(path, name))
    return names


# --------------------------------------------------------------------------- made


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


def put(module, model, changes):
    """One model that is made or fetched: (was it made, what was fetched)."""
    check = module.check_mode
    if model.get("make"):
        wrong = differences(module.params["maker"], model["path"], check)
        if wrong:
            changes.append(change(model, "%s in %s" % (model["make"], model["path"]), "; ".join(wrong)))
            if not check:
                make(module, model)
        return bool(wrong), None
    wrong = plan(hub_state(model["path"], module.params["verify"]), model)
    if not wrong:
        return False, None
    if wrong[0][1] == "no manifest" or wrong[0][1].startswith("holds "):
        raise Problem(
            "model %s: %s is not what the kit fetched there (%s). Move it away; or serve it as it is, with "
            "model_source: {folder: %s}" % (model["id"], model["path"], wrong[0][1], model["path"])
        )
    texts = [text for _, text in wrong]
    told = "; ".join(texts[:5]) + ("; and %d more" % (len(texts) - 5) if len(texts) > 5 else "")
    changes.append(change(model, "%s at %s in %s" % (model["hub"], model["revision"], model["path"]), told))
    if check or not module.params["fetch"]:
        return False, {"id": model["id"]}
    return False, fetch(module, model, [name for name, _ in wrong if name])


def problem_of(module, model):
    """Why what is there cannot be served, or None."""
    user, path, max_rank = user_on_host(module), model["path"], model.get("max_rank")
    problem = None
    if model.get("folder"):
        problem = as_user(user, folder_problems, path, "config.json" if max_rank is None else ADAPTER)
    if max_rank is not None and not problem:
        problem = as_user(user, adapter_problems, path, max_rank)
    return problem and "model %s: %s" % (model["id"], problem)


def take_away(module, model, changes):
    """What was made, and what a fetch that was cut off left. Weights that took hours to come are data: they stay."""
    parent, name = os.path.split(model["path"])
    left = [os.path.join(parent, ".%s.part%s" % (name, end)) for end in ("", ".old")]
    there = [path for path in ([model["path"]] if model.get("make") else left) if os.path.isdir(path)]
    if model.get("folder") or not there:
        return False
    changes.append(change(model, "gone", "there"))
    if not module.check_mode:
        for path in there:
            shutil.rmtree(path)
    return True


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "models": {"type": "list", "elements": "dict", "required": True},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "user": {"type": "str", "default": ""},
            "python_becomes_user": {"type": "bool", "default": False},
            "maker": {"type": "path", "required": True},
            "fetcher": {"type": "path", "default": ""},
            "endpoint": {"type": "str", "default": ""},
            "token": {"type": "str", "default": "", "no_log": True},
            "environment": {"type": "dict", "default": {}},
            "authorities": {"type": "str", "default": ""},
            "verify": {"type": "bool", "default": False},
            "fetch": {"type": "bool", "default": True},
            "peer": {"type": "dict", "default": {}},
            "peer_token": {"type": "str", "default": "", "no_log": True},
            "caches": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    made, fetched, problems, changes, dropped = [], [], [], [], []
    absent = module.params["state"] == "absent"
    for model in module.params["models"]:
        try:
            if absent:
                made += [model["id"]] if take_away(module, model, changes) else []
                continue
            came = None
            if not model.get("folder"):
                was_made, came = put(module, model, changes)
                made += [model["id"]] if was_made else []
                fetched += [came] if came else []
            # What is yet to come is looked at when it is there.
            if not came or (module.params["fetch"] and not module.check_mode):
                problem = problem_of(module, model)
                problems += [problem] if problem else []
        except Problem as problem:
            problems.append(str(problem))
    caches = module.params["caches"]
    if caches and not absent:
        dropped = stale_caches(caches)
        for name in dropped:
            changes.append({"what": "engine cache", "name": name, "wanted": "gone", "actual": "of no app"})
        try:
            if dropped and not module.check_mode:
                as_user(user_on_host(module), drop_caches, caches["path"], dropped)
        except (Problem, OSError) as problem:
            problems.append("what engines compiled could not be removed: %s" % problem)
    if problems:
        module.fail_json(msg="\n".join(problems), changes=changes)
    wanting = [] if module.params["fetch"] else [came["id"] for came in fetched]
    if wanting and not module.check_mode:
        fetched, changes = [], [item for item in changes if item["name"] not in wanting]
    module.exit_json(
        changed=bool(made or fetched or dropped), made=made, fetched=fetched, wanting=wanting, changes=changes
    )


if __name__ == "__main__":
    main()
