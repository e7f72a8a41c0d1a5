#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: ray_serve_config
short_description: The cluster runs exactly this Ray Serve config
description:
  - Runs on the head. Compares the whole Serve config with what is running, app by app, and sends it only
    when something differs. Serve deletes the apps that a config does not list.
  - Before that, Ray's own schema checks the config in the environment of the head. Keys that the schema does
    not know are refused; Serve itself ignores them.
  - Waits until every app is RUNNING and each of its deployments HEALTHY, and fails with Serve's own messages.
  - With I(history), a config is taken back where an app that it adds or changes does not come up. The newest one that
    ran is sent again, and the task fails all the same. Where none ran before, things are left as they are, and also
    where the code of an app of that config is gone from the head.
  - An app that is not changed and does not run fails the task, and takes nothing back.
  - An app that failed is deployed again although its config is the same.
  - An app that stays as it is gets exactly the config again that it runs with.
author:
  - clusterkit
options:
  state:
    description:
      - C(absent) shuts Serve down, with all apps.
      - C(scaled) sets the number of replicas that I(scale) asks for, in place of I(config).
      - C(restored) sends a config of I(history) again, in place of I(config).
    type: str
    choices: [present, absent, restored, scaled]
    default: present
  url:
    description: Ray's dashboard on the head.
    type: str
    default: http://127.0.0.1:8265
  token_file:
    description: File on the head with the cluster's token. Leave it out where Ray runs without authentication.
    type: path
  config:
    description: The whole config as for C(PUT /api/serve/applications/). Required for I(state=present).
    type: dict
  history:
    description: >-
      Folder on the head for the last 20 configs, with how each went. Files of their owner alone: configs may hold
      secrets. Without it nothing is noted, and nothing restored. Required for I(state=restored).
    type: path
  number:
    description: >-
      The config of I(history) that I(state=restored) sends again. Without it the newest that ran and is not the one
      that runs now.
    type: int
  scale:
    description: >-
      What I(state=scaled) sets, in an app with C(external_scaler_enabled). A config that is sent later keeps the number
      that its deployments have then.
    type: dict
    suboptions:
      app:
        description: Name of the app.
        type: str
        required: true
      deployment:
        description: Serve's name of the deployment.
        type: str
        required: true
      replicas:
        description: How many. Serve's config has no number below 1.
        type: int
        required: true
  rollout:
    description:
      - How replicas are replaced whose config changed. C(surge) starts new ones first, and waits where there is no
        room; C(in_place) stops old ones first, a fifth at a time; C(one_at_a_time) does that with single ones.
        C(auto) is C(surge) where the nodes have room for one more replica of each deployment, else C(in_place).
      - C(surge) and C(one_at_a_time) need a Ray that knows C(max_surge_percent), such as 2.60.
      - A deployment that the config does not name, or whose own options say it, is left to that.
    type: str
    choices: [auto, surge, in_place, one_at_a_time]
    default: auto
  pools:
    description: How many nodes each pool may have whose nodes come as they are needed, by its name.
    type: dict
    default: {}
  restart_serve:
    description: Consent to restart Serve, with all apps, for options that are fixed while it runs.
    type: bool
    default: false
  details:
    description: Return I(history), I(runs) and I(effective), too.
    type: bool
    default: false
  ray_python:
    description: Interpreter of the head's Ray environment. Not needed for I(state=absent) and I(state=scaled).
    type: path
  environment:
    description: >-
      Environment for the schema check, such as C(PYTHONPATH) where the config names policies: the schema
      imports them.
    type: dict
    default: {}
  wait_timeout_s:
    description: How long the apps may take until all of them run, in seconds.
    type: int
    default: 900
attributes:
  check_mode:
    description: Compares and sends nothing. Where no cluster answers yet, every app counts as added.
    support: full
  diff_mode:
    description: Shows the config of every app that is added, changed or removed, without values that look secret.
    support: full
notes:
  - C(http_options), C(grpc_options) and C(proxy_location) are fixed from the moment Serve starts. A difference
    in them fails the task, unless I(restart_serve) is given; check mode lists it.
  - Apps that were started by a program and not through this API are left alone.
"""

EXAMPLES = r"""
- name: Run exactly these apps
  ray_serve_config:
    token_file: /etc/clusterkit/token
    ray_python: /opt/clusterkit/ray-env/bin/python
    config:
      proxy_location: EveryNode
      http_options: {host: 0.0.0.0, port: 8000}
      applications:
        - name: hello
          route_prefix: /hello
          import_path: hello:app

- name: Put the config back that ran before
  ray_serve_config:
    state: restored
    history: /var/lib/clusterkit/serve_history
    token_file: /etc/clusterkit/token
    ray_python: /opt/clusterkit/ray-env/bin/python

- name: Give a deployment four replicas
  ray_serve_config:
    state: scaled
    token_file: /etc/clusterkit/token
    scale: {app: hello, deployment: Hello, replicas: 4}

- name: Shut Serve down
  ray_serve_config:
    state: absent
    token_file: /etc/clusterkit/token
"""

RETURN = r"""
plan:
  description: Names of the apps, by what was to be done with them.
  returned: always
  type: dict
  contains:
    added: {description: Not there yet., type: list}
    changed: {description: There with another config., type: list}
    removed: {description: There and not in the config., type: list}
    failed: {description: There with this config but failed; deployed again., type: list}
    unchanged: {description: There with this config., type: list}
    foreign: {description: Started by a program; left alone., type: list}
changes:
  description: >-
    What differs, each with C(what), C(name), C(wanted) and C(actual), of a changed app only the keys that changed;
    C(disrupts) where running replicas are stopped or replaced, and then C(note) with how. Values that look secret
    are hidden.
  returned: always
  type: list
  elements: dict
rollouts:
  description: >-
    Apps whose replicas are replaced, each with C(app), C(how) (as in I(rollout)), C(room) (replicas that have a place
    beside the old ones; none where nobody could say), C(deployments) (replicas of each that is replaced), C(missing)
    (what is not there meanwhile, in words), C(unnamed) (those of the deployments that the config does not name; Serve
    can only replace them in place) and C(seconds) (the last rollout of it; none where none was seen).
  returned: always
  type: list
  elements: dict
number:
  description: The number in I(history) of the config that was sent again.
  returned: with I(state=restored)
  type: int
restored:
  description: The number of the config in I(history) that was put back after a failure.
  returned: when one was
  type: int
history:
  description: >-
    What was applied, oldest first: C(number), C(time), C(why), C(outcome) (started, good or failed), C(message),
    C(restored), C(seconds) (by app), C(apps), C(digest). A started one was never seen to its end.
  returned: with I(details)
  type: list
  elements: dict
reachable:
  description: Whether Ray answered.
  returned: always
  type: bool
runs:
  description: The number of the newest config in I(history) that is what runs; none where there is none.
  returned: with I(details)
  type: int
effective:
  description: What runs, by app and deployment, with every default that Ray adds; values that look secret are hidden.
  returned: with I(details), when the cluster answered
  type: dict
applications:
  description: The apps as they run, by name.
  returned: when the cluster answered
  type: dict
  sample:
    hello:
      name: hello
      route_prefix: /hello
      status: RUNNING
      message: ""
      since: "2026-11-22T06:16:22Z"
      deployments:
        Hello:
          status: HEALTHY
          message: ""
          target_replicas: 1
          running_replicas: 1
          replicas: [{id: 375qd3tp, state: RUNNING, node_id: 153d5b, node_ip: 192.0.2.2, pid: 4711}]
proxies:
  description: The HTTP proxies, by the address of their node.
  returned: when the cluster answered
  type: dict
  sample: {192.0.2.2: HEALTHY}
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from ansible.module_utils import serve_history, serve_rollout
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.serve_history import History, digest, plain

APPLICATIONS = "/api/serve/applications/"
SCALE = "/api/v1/applications/%s/deployments/%s/scale"
STATE = "/api/v0/%s?detail=true&limit=10000"
# Serve takes these when it starts and ignores later changes.
FIXED = ("proxy_location", "http_options", "grpc_options")
# What Serve changes in a deployment without replacing its replicas: docs.ray.io, serve/advanced-guides/
# inplace-updates, and serve/_private/version.py, requires_actor_restart, of Ray 2.58 (the last two). The rest of an
# app counts as new code: serve/_private/deploy_utils.py, get_app_code_version.
LIGHT = frozenset(
    "num_replicas autoscaling_config user_config max_ongoing_requests graceful_shutdown_timeout_s "
    "graceful_shutdown_wait_loop_s health_check_period_s health_check_timeout_s max_queued_requests "
    "logging_config request_router_config".split()
)
TRACEBACK_LINE = re.compile(r"\s|Traceback |ray::|ray\.exceptions\.RayTaskError|RuntimeError: Traceback ")
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY", "PRIVATE")

# Runs in the head's Ray environment. Both sides go through the same schema, so that 600 and 600.0 are equal.
SCHEMA_CHECK = r"""
import json, sys, typing
from pydantic import BaseModel, ValidationError
import ray
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

def models(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models(part)]

def unknown(model, value, path):
    found = []
    for key, inner in value.items():
        here = path + [str(key)]
        field = model.model_fields.get(key)
        if field is None:
            found.append([".".join(here), sorted(model.model_fields)])
            continue
        below = models(field.annotation)
        if len(below) != 1:
            continue
        if isinstance(inner, dict):
            found += unknown(below[0], inner, here)
        elif isinstance(inner, list):
            for index, item in enumerate(inner):
                if isinstance(item, dict):
                    name = item.get("name", index) if isinstance(item.get("name", index), str) else index
                    found += unknown(below[0], item, path + ["%s[%s]" % (key, name)])
    return found

def app(data):
    return ServeApplicationSchema.model_validate(data).model_dump(mode="json", exclude_unset=True)

given = json.load(sys.stdin)
answer = {"unknown": unknown(ServeDeploySchema, given["config"], []), "errors": [], "want": None, "have": {}}
answer["ray"] = ray.__version__
answer["surge"] = "max_surge_percent" in DeploymentSchema.model_fields
try:
    want = ServeDeploySchema.model_validate(given["config"])
    answer["want"] = {
        "proxy_location": want.proxy_location.value,
        "http_options": want.http_options.model_dump(mode="json"),
        "grpc_options": want.grpc_options.model_dump(mode="json"),
        "target_capacity": want.target_capacity,
        "applications": {a.name: a.model_dump(mode="json", exclude_unset=True) for a in want.applications},
    }
except ValidationError as error:
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        answer["errors"].append("%s: %s" % (".".join(str(part) for part in item["loc"]) or "config", item["msg"]))
for name, data in given["have"].items():
    try:
        answer["have"][name] = app(data)
    except ValidationError:
        answer["have"][name] = data
sys.stdout.write("\n" + json.dumps(answer))
"""


class ServeError(Exception):
    """It went wrong; the message says what to do. `have` is Serve's last answer, where there was one."""

    def __init__(self, message, have=None):
        super().__init__(message)
        self.have = have


class NotReachable(ServeError):
    """No cluster answers."""


class Refused(ServeError):
    """Serve did not take a config; what ran goes on running."""


class Others(ServeError):
    """What was changed runs, and something else does not go as it should."""


class CodeGone(ServeError):
    """A config is not sent, as the head lacks the code of its apps."""


class Client:
    """Serve's REST API. `opener` is what opens a request; no proxy stands between the head and itself."""

    def __init__(self, url, token=None, opener=None):
        self.url = url.rstrip("/")
        self.token = token
        self.opener = opener or urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def get(self):
        text = self._ask("GET", 30)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "applications" not in answer:
            raise ServeError("%s is no Ray dashboard: it answered %r" % (self.url, text[:200]))
        return answer

    def state(self, kind):
        """What Ray's state API lists: nodes, actors, placement_groups."""
        answer = json.loads(self._ask("GET", 60, path=STATE % kind))
        return answer["data"]["result"]["result"]

    def put(self, config):
        self._ask("PUT", 180, json.dumps(config).encode())

    def scale(self, app, deployment, replicas):
        path = SCALE % tuple(urllib.parse.quote(name, safe="") for name in (app, deployment))
        self._ask("POST", 60, json.dumps({"target_num_replicas": replicas}).encode(), path)

    def delete(self, timeout_s):
        self._ask("DELETE", timeout_s)

    def _ask(self, method, timeout_s, body=None, path=APPLICATIONS):
        try:
            request = urllib.request.Request(self.url + path, data=body, method=method)
        except ValueError as error:
            raise ServeError("the url %s cannot be asked: %s" % (self.url, error)) from error
        request.add_header("User-Agent", "clusterkit")  # browsers get their environments blacked out
        if body is not None:
            request.add_header("Content-Type", "application/json")
        if self.token:
            request.add_header("Authorization", "Bearer " + self.token)
        try:
            with self.opener(request, timeout=timeout_s) as answer:
                return answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            raise self._http_problem(method, error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise NotReachable(
                "Ray's dashboard does not answer at %s (%s). Is the head started? `ray-node status` on the head "
                "tells" % (self.url, reason)
            ) from error

    def _http_problem(self, method, error):
        text = error.read().decode("utf-8", "replace").strip()
        problem = Refused if method == "PUT" else ServeError
        if error.code == 401:
            return problem("Ray at %s wants a token and got none. Set token_file to the cluster's token" % self.url)
        if error.code == 403:
            return problem(
                "Ray at %s refuses the token. The head runs with another one than lies in token_file: "
                "restart the head, or put its token there" % self.url
            )
        if error.code == 400 and method == "PUT":
            return problem("Serve refused the config: %s" % text)
        if error.code == 500 and method == "PUT":
            return problem(
                "Serve failed on the config, most likely while it imported a policy that is not on the head's "
                "PYTHONPATH: %s" % text[:2000]
            )
        return problem("%s %s answered %d: %s" % (method, error.url, error.code, text[:2000]))


def plan(have, want):
    """What there is to do. `have` is the answer of GET with normalised app configs, `want` the normalised config."""
    done = {"added": [], "changed": [], "removed": [], "failed": [], "unchanged": [], "foreign": [], "fixed": []}
    running = have.get("applications") or {}
    for name in sorted(want["applications"]):
        if name not in running:
            done["added"].append(name)
        elif plain(running[name].get("deployed_app_config") or {}) != plain(want["applications"][name]):
            done["changed"].append(name)
        elif running[name].get("status") == "DELETING":
            done["added"].append(name)
        elif running[name].get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
            done["failed"].append(name)
        else:
            done["unchanged"].append(name)
    for name in sorted(set(running) - set(want["applications"])):
        if running[name].get("source", "declarative") != "declarative":
            done["foreign"].append(name)
        elif running[name].get("status") != "DELETING":
            done["removed"].append(name)
    if have.get("controller_info"):
        done["fixed"] = fixed_differences(have, want)
    done["capacity"] = have.get("target_capacity") != want.get("target_capacity") and bool(running)
    return done


def is_change(todo):
    return bool(todo["added"] or todo["changed"] or todo["removed"] or todo["failed"] or todo["capacity"])


def fixed_differences(have, want):
    """Options of a running Serve that differ and cannot change: [name, have, want]."""
    found = []
    for section in FIXED:
        old, new = have.get(section), want.get(section)
        if old is None or new is None:
            continue
        if not isinstance(new, dict):
            if old != new:
                found.append([section, old, new])
            continue
        for key in sorted(new):
            if key in old and old[key] != new[key]:
                found.append(["%s.%s" % (section, key), old[key], new[key]])
    return found


def restartable(have, names):
    """Those of the failed apps that are to be deleted before they are sent again, as Serve takes the same
    config twice for no news: they serve nobody, and their replicas do not start. Any other app keeps what it
    has, and Serve goes on restoring it by itself."""
    found = []
    for name in names:
        app = have["applications"][name]
        deployments = (app.get("deployments") or {}).values()
        states = [replica.get("state") for deployment in deployments for replica in deployment.get("replicas", [])]
        hopeless = app.get("status") == "DEPLOY_FAILED" or any(
            deployment.get("status_trigger") == "REPLICA_STARTUP_FAILED" for deployment in deployments
        )
        if deployments and hopeless and "RUNNING" not in states:
            found.append(name)
    return found


def hide(value, key=""):
    """The value without what looks secret."""
    if isinstance(value, dict):
        return {name: hide(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [hide(item, key) for item in value]
    if isinstance(value, str) and any(word in str(key).upper() for word in SECRET_WORDS):
        return "<hidden>"
    return value


def difference(have, want, todo):
    """Ansible's diff, only of the apps that change."""
    names = todo["added"] + todo["changed"] + todo["removed"] + todo["failed"]
    running = have.get("applications") or {}
    before = {name: plain(running[name].get("deployed_app_config")) for name in names if name in running}
    after = {name: plain(want["applications"][name]) for name in names if name in want["applications"]}

    def text(apps):
        return json.dumps(hide(apps), indent=2, sort_keys=True) + "\n" if apps else ""

    return {"before_header": "running", "after_header": "declared", "before": text(before), "after": text(after)}


def leaves(value, path=()):
    """(path, value) of everything in a config; in a list, things are known by their name, else by their place."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {
            str(item.get("name", place)): {key: inner for key, inner in item.items() if key != "name"}
            for place, item in enumerate(value)
        }
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, path + (str(key),))]
    return [] if value == [] else [(path, value)]


def changed_keys(have, want):
    """{path: (have, want)} of two configs of an app; None stands for a key that is not there."""
    old, new = dict(leaves(hide(have))), dict(leaves(hide(want)))
    plain_old, plain_new = dict(leaves(have)), dict(leaves(want))
    return {
        path: (old.get(path), new.get(path))
        for path in sorted(set(plain_old) | set(plain_new))
        if plain_old.get(path) != plain_new.get(path)
    }


def is_light(path):
    """Does Serve change this key of an app without a new replica?"""
    in_place = len(path) > 2 and path[0] == "deployments" and path[2] in LIGHT and path[3:4] != ("policy",)
    return path[0] in ("route_prefix", "logging_config") or in_place


def replaced(app, want, paths):
    """Names of the running deployments whose replicas these changes stop, for others to start."""
    have = app.get("deployed_app_config") or {}
    names = sorted(app.get("deployments") or {})
    if not replaces(have, want, paths):
        return []
    heavy = [path for path in paths if not is_light(path)]
    if heavy and all(path[0] == "deployments" and len(path) > 2 and path[2] != "autoscaling_config" for path in heavy):
        return [name for name in names if name in {path[1] for path in heavy}]
    return names


def replaces(have, want, paths):
    """Do these changes of an app stop its replicas, for others to start?"""

    def scaled(app):
        return sorted(item.get("name", "") for item in app.get("deployments") or [] if item.get("autoscaling_config"))

    # Serve hashes the list of the deployments' policies, empty ones too.
    return not all(is_light(path) for path in paths) or scaled(have) != scaled(want)


def described(have, want, todo, rollouts=(), restart=False):
    """What there is to do, for a plan: [{what, name, wanted, actual}], with `disrupts` where replicas are stopped.
    restart: Serve may be restarted for options that are fixed while it runs."""
    running, found = have.get("applications") or {}, []
    notes = {rollout["app"]: in_words(rollout) for rollout in rollouts}
    for name, actual, wanted in todo.get("fixed", []):
        item = {"what": "Serve option", "name": name, "wanted": wanted, "actual": actual}
        found.append(item if restart else dict(item, left=True))
    if restart and todo.get("fixed"):
        for name in sorted(running):
            found.append({"what": "app", "name": name, "wanted": "restarted with Serve", "disrupts": ["app"]})
    for name in todo["added"]:
        wanted = hide(want["applications"].get(name, {}))
        found.append({"what": "app", "name": name, "wanted": wanted, "actual": "missing"})
    for name in todo["changed"]:
        old, new = plain(running[name].get("deployed_app_config") or {}), plain(want["applications"][name])
        keys = changed_keys(old, new)
        change = {
            "what": "app",
            "name": name,
            "wanted": {".".join(path): pair[1] for path, pair in keys.items()},
            "actual": {".".join(path): pair[0] for path, pair in keys.items()},
        }
        if replaces(old, new, keys):
            change["disrupts"] = ["app"]
        if name in notes:
            change["note"] = notes[name]
        found.append(change)
    for name in todo["failed"]:
        found.append({"what": "app", "name": name, "wanted": "RUNNING", "actual": running[name].get("status")})
    for name in todo["removed"]:
        actual = running[name].get("status")
        found.append({"what": "app", "name": name, "wanted": "gone", "actual": actual, "disrupts": ["app"]})
    if todo["capacity"]:
        wanted, actual = want.get("target_capacity"), have.get("target_capacity")
        found.append({"what": "app", "name": "target_capacity", "wanted": wanted, "actual": actual})
    return found


def summary(have):
    """The apps as they run, small enough to read."""
    apps = {}
    for name, app in (have.get("applications") or {}).items():
        deployments = {}
        for label, deployment in (app.get("deployments") or {}).items():
            replicas = [
                dict(
                    {key: replica.get(key) for key in ("state", "node_id", "node_ip", "pid")},
                    id=replica.get("replica_id"),
                )
                for replica in deployment.get("replicas", [])
            ]
            deployments[label] = {
                "status": deployment.get("status"),
                "message": deployment.get("message", ""),
                "target_replicas": deployment.get("target_num_replicas"),
                "running_replicas": sum(replica["state"] == "RUNNING" for replica in replicas),
                "replicas": replicas,
            }
        apps[name] = {
            "name": name,
            "route_prefix": app.get("route_prefix"),
            "status": app.get("status"),
            "message": app.get("message", ""),
            "since": at(app.get("last_deployed_time_s")),
            "deployments": deployments,
        }
    return apps


def at(seconds):
    return time.strftime(serve_history.TIME, time.gmtime(seconds)) if seconds else None


def effective(have):
    """What runs, with every default that Ray adds; without what looks secret."""
    found = {name: have.get(name) for name in FIXED if have.get(name) is not None}
    found["applications"] = {
        name: {
            "config": app.get("deployed_app_config"),
            "deployments": {
                label: deployment.get("deployment_config")
                for label, deployment in sorted((app.get("deployments") or {}).items())
            },
        }
        for name, app in sorted((have.get("applications") or {}).items())
    }
    return hide(found)


def proxies(have):
    return {proxy.get("node_ip") or node: proxy.get("status") for node, proxy in (have.get("proxies") or {}).items()}


def is_ready(app):
    """Running, with every deployment healthy; one that the autoscaler moves right now is as good."""
    if not app or app.get("status") != "RUNNING":
        return False
    for deployment in (app.get("deployments") or {}).values():
        moving = deployment.get("status") in ("UPSCALING", "DOWNSCALING")
        if deployment.get("status") != "HEALTHY" and not (moving and deployment.get("status_trigger") == "AUTOSCALING"):
            return False
    return True


def essence(message):
    """Serve's message without the tracebacks in it: what remains is what happened."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", message or "").strip().splitlines()
    kept = [line for line in lines if line.strip() and not TRACEBACK_LINE.match(line)]
    return "\n    ".join(kept or lines[-1:])


def complaint(name, app):
    """All that Serve says about an app that does not run."""
    if not app:
        return "app %s: it is not there" % name
    lines = ["app %s is %s: %s" % (name, app.get("status"), essence(app.get("message")) or "no reason given")]
    for label, deployment in sorted((app.get("deployments") or {}).items()):
        if deployment.get("status") == "HEALTHY":
            continue
        replicas = deployment.get("replicas", [])
        running = sum(replica.get("state") == "RUNNING" for replica in replicas)
        line = "  %s is %s with %d of %s replicas" % (
            label, deployment.get("status"), running, deployment.get("target_num_replicas")
        )  # fmt: skip
        if deployment.get("message"):
            line += ": " + essence(deployment["message"])
        lines.append(line)
        for replica in (deployment.get("recent_dead_replicas") or [])[-1:] or replicas[-1:]:
            if replica.get("log_file_path"):
                lines.append(
                    "    logs of its last replica on %s, in session_latest/logs of Ray's temp_dir: %s, worker-%s*"
                    % (replica.get("node_ip"), replica["log_file_path"].lstrip("/"), replica.get("worker_id"))
                )
    return "\n".join(lines)


def wait_ready(client, names, before, timeout_s, clock=time.monotonic, sleep=time.sleep, times=None):
    """Wait until the apps run; returns the last answer. `before` has the deploy times from before the PUT: a
    failure that is older than the PUT is no news. A short outage of the dashboard is waited out as well. `times`
    gets the seconds until each app ran."""
    began = clock()
    deadline = began + timeout_s
    have, problem = {}, None
    while True:
        try:
            have, problem = client.get(), None
        except NotReachable as error:
            problem = error
        apps = have.get("applications") or {}
        if problem is None:
            fresh = [name for name in names if is_fresh(apps.get(name), before.get(name))]
            failed = [name for name in fresh if apps[name].get("status") == "DEPLOY_FAILED"]
            if failed:
                raise ServeError("\n".join(complaint(name, apps[name]) for name in failed), have)
            for name in fresh:
                if times is not None and name not in times and is_ready(apps[name]):
                    times[name] = round(clock() - began, 1)
            if len(fresh) == len(names) and all(is_ready(apps[name]) for name in names):
                return have
        if clock() >= deadline:
            if problem is not None:
                raise problem
            late = [complaint(name, apps.get(name)) for name in names if not is_ready(apps.get(name))]
            late = late or ["the apps run, but Serve never took the new config"]
            raise ServeError("not ready after %d s:\n%s" % (timeout_s, "\n".join(late)), have)
        sleep(2)


def is_fresh(app, time_before):
    return bool(app) and (time_before is None or app.get("last_deployed_time_s") != time_before)


def wait_gone(client, names, timeout_s, clock=time.monotonic, sleep=time.sleep):
    """Wait until the apps are gone; `names` None means Serve itself."""
    deadline = clock() + timeout_s
    while True:
        have = client.get()
        left = sorted(set(names) & set(have["applications"])) if names is not None else []
        if names is None and have.get("controller_info"):
            left = ["Serve"]
        if not left:
            return have
        if clock() >= deadline:
            raise ServeError("still stopping after %d s: %s" % (timeout_s, ", ".join(left)), have)
        sleep(1)


def survey(client, have, want, todo, wish, pools=None, history=None):
    """How the replicas of changed apps are to be replaced, and what that costs: see `rollouts` in RETURN."""
    found, seen = [], None
    for name in todo["changed"]:
        app, new = have["applications"][name], want["applications"][name]
        names = replaced(app, new, changed_keys(plain(app.get("deployed_app_config") or {}), plain(new)))
        # Nothing runs that could be missed where no replica does.
        up = {label: app["deployments"][label] for label in names}
        up = {label: item for label, item in up.items() if running_replicas(item)}
        if not names:
            continue
        seen = seen or (capacity(client) if up else None)
        targets = {label: item.get("target_num_replicas") or running_replicas(item) for label, item in up.items()}
        room = room_for(seen, up, targets, pools or {}) if up and seen else None
        how = serve_rollout.choose(own_surge(new, targets) or wish, room, bool(up))
        # What the config does not name cannot be told how: Serve stops old replicas of it first.
        unnamed = sorted(set(up) - {item.get("name") for item in new.get("deployments") or []})
        if unnamed:
            how = serve_rollout.IN_PLACE
        found.append(
            {
                "app": name,
                "how": how,
                "room": room,
                "deployments": targets,
                "unnamed": unnamed,
                "missing": serve_rollout.missing(how, targets),
                "seconds": history.seconds(name) if history else None,
            }
        )
    return found


def own_surge(app, names):
    """What the config itself says of these deployments; None where it leaves it to the rollout."""
    items = [item for item in app.get("deployments") or [] if item.get("name") in names]
    said = [item["max_surge_percent"] for item in items if "max_surge_percent" in item]
    if not said:
        return None
    return serve_rollout.SURGE if min(said) > 0 else serve_rollout.IN_PLACE


def running_replicas(deployment):
    return sum(replica.get("state") == "RUNNING" for replica in deployment.get("replicas", []))


def capacity(client):
    """What the nodes have free, or None where Ray does not say."""
    try:
        nodes, groups, actors = (client.state(kind) for kind in ("nodes", "placement_groups", "actors"))
    except (ServeError, ValueError, KeyError, TypeError):
        return None
    return {"free": serve_rollout.free(nodes, groups, actors), "groups": groups, "actors": actors}


def room_for(seen, deployments, targets, pools):
    """How many more replicas of all these deployments have a place at once; None where one cannot be looked at."""
    demands = [serve_rollout.demand(item, seen["groups"], seen["actors"]) for item in deployments.values()]
    if None in demands:
        return None
    found = serve_rollout.rooms(seen["free"], demands, serve_rollout.most(targets.values()))
    # Nodes that come for it have room for one.
    return found or int(serve_rollout.can_grow(seen["free"], demands, pools))


def in_words(rollout):
    """A rollout, for people."""
    took = "the last one took %d s" % rollout["seconds"] if rollout["seconds"] else "no earlier one was timed"
    if not rollout["deployments"]:
        return "no replica of it runs now"
    if rollout["how"] == serve_rollout.SURGE:
        if rollout["room"]:
            return "new replicas start before old ones stop; nothing is missing meanwhile (%s)" % took
        return "new replicas start before old ones stop, and wait until there is room for them: there is none now"
    why = "" if rollout["room"] else ", and there is no room for new ones beside them"
    if rollout["unnamed"]:
        why = ", as the config does not name %s" % ", ".join(rollout["unnamed"])
    elif rollout["room"] is None:
        why = ", and nobody could say whether there is room for new ones beside them"
    return "old replicas stop before new ones start%s. Until they run, %s (%s); requests wait" % (
        why, rollout["missing"], took,
    )  # fmt: skip


def composed(config, have, todo, rollouts):
    """The config to send: apps that stay get what they have, those that change are told how."""
    how = {rollout["app"]: rollout for rollout in rollouts}
    apps = []
    for app in config.get("applications", []):
        name = app.get("name")
        if name in todo["unchanged"]:
            app = have["applications"][name].get("sent") or app
        elif name in how:
            targets = how[name]["deployments"]
            deployments = [
                dict(serve_rollout.knobs(how[name]["how"], how[name]["room"], targets[item["name"]]), **item)
                if item.get("name") in targets
                else item
                for item in app.get("deployments") or []
            ]
            app = dict(app, deployments=deployments) if deployments else app
        apps.append(app)
    return dict(config, applications=apps)


def as_scaled(config, have):
    """The config with the numbers of replicas that the scaler outside has set, of the apps that have one: Serve would
    take those of the config."""
    apps = []
    for app in config.get("applications", []):
        running = (have.get("applications") or {}).get(app.get("name")) or {}
        if app.get("external_scaler_enabled") and app.get("deployments"):
            targets = {
                name: item.get("target_num_replicas") for name, item in (running.get("deployments") or {}).items()
            }
            app = dict(
                app,
                deployments=[
                    dict(item, num_replicas=targets[item["name"]])
                    if item.get("num_replicas") and targets.get(item.get("name"))
                    else item
                    for item in app["deployments"]
                ],
            )
        apps.append(app)
    return dict(config, applications=apps)


def moved(have, todo):
    """(apps that have to come up by what is done, those that stay as they are): names, by the answer from before."""
    sent, rest = todo["added"] + todo["changed"] + todo.get("unseen", []), todo["failed"] + todo["unchanged"]
    if todo["fixed"] or todo["capacity"]:
        # All are touched; one that was ill before proves nothing.
        well = [name for name in todo["unchanged"] if is_ready(have["applications"][name])]
        sent = sent + [name for name in well if name not in sent]
    return sent, [name for name in rest if name not in sent]


def apply(client, config, have, todo, timeout_s, rollouts=(), times=None, ill=()):
    """Send the config and wait for what it asks for, but not for those that are `ill`; returns the last answer.
    Raises Others where all that was changed came up."""
    (sent, rest), ran = moved(have, todo), have
    if todo["fixed"]:
        client.delete(timeout_s)
        have = wait_gone(client, None, timeout_s)
        names = sorted(app["name"] for app in config["applications"])
        todo = dict(todo, added=names, changed=[], removed=[], failed=[], unchanged=[])
        rollouts = ()
    config = as_scaled(composed(config, have, todo, rollouts), ran)
    again = restartable(have, todo["failed"])
    if again:
        others = [app for app in config["applications"] if app["name"] not in again]
        client.put(dict(config, applications=others))
        wait_gone(client, again, timeout_s)
    redeployed = todo["added"] + todo["changed"] + todo["failed"]
    before = {
        name: have["applications"][name].get("last_deployed_time_s")
        for name in redeployed
        if name in have["applications"]
    }
    client.put(config)
    seen = {}
    rest = [name for name in rest if name not in ill]
    have = settle(client, sent, rest, timeout_s, gone=todo["removed"], before=before, times=seen)
    if times is not None:
        times.update({name: seen[name] for name in redeployed if name in seen})
    return have


def settle(client, sent, rest, timeout_s, gone=(), before=None, times=None):
    """Wait for what was sent, then for all the rest: another app's illness says nothing of it."""
    deadline = time.monotonic() + timeout_s
    if sent:
        wait_ready(client, sent, before or {}, timeout_s, times=times)
    try:
        wait_gone(client, gone, max(0, deadline - time.monotonic()))
        return wait_ready(client, sent + rest, before or {}, max(0, deadline - time.monotonic()))
    except NotReachable:
        raise
    except ServeError as error:
        raise Others(str(error), error.have) from error


def read_token(path):
    if not path:
        return None
    try:
        with open(path) as handle:
            token = handle.read().strip()
    except OSError as error:
        raise ServeError("cannot read the token: %s" % error) from error
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ServeError("the token file %s is empty or holds something else than one token" % path)
    return token


def normalise(module, config, have):
    """Both sides as Ray's schema sees them, `have` in place; refuses what the schema refuses or does not know.
    The answer has `want`, and of Ray `surge` and its version."""
    python = module.params["ray_python"]
    if not os.path.exists(python):
        raise ServeError("there is no Ray environment on the head: %s is missing" % python)
    apps = {name: app.get("deployed_app_config") for name, app in have["applications"].items()}
    given = {"config": config, "have": {name: data for name, data in apps.items() if data}}
    env = dict(module.params["environment"], RAY_USAGE_STATS_ENABLED="0", DO_NOT_TRACK="1")
    code, out, err = module.run_command(
        [python, "-c", SCHEMA_CHECK],
        data=json.dumps(given),
        environ_update={name: str(value) for name, value in env.items()},
        handle_exceptions=False,
    )
    try:
        answer = json.loads(out.strip().splitlines()[-1]) if code == 0 else None
    except (ValueError, IndexError):
        answer = None
    if answer is None:
        raise ServeError("Ray's schema could not be asked with %s:\n%s" % (python, (err or out).strip()[-3000:]))
    problems = list(answer["errors"])
    for path, known in answer["unknown"]:
        problems.append("%s: no such key; Serve would ignore it. Known here: %s" % (path, ", ".join(known)))
    if problems:
        raise ServeError("the Serve config is wrong:\n" + "\n".join(problems))
    for name, data in answer["have"].items():
        app = have["applications"][name]
        app["sent"] = app.get("sent") or app["deployed_app_config"]
        app["deployed_app_config"] = data
    return answer


def ensure_absent(module, client, result):
    try:
        have = client.get()
    except NotReachable:
        return  # no Ray, no Serve
    result["reachable"] = True
    result["plan"]["removed"] = sorted(have["applications"])
    result["changed"] = bool(have.get("controller_info"))
    result["changes"] = described(have, {"applications": {}}, dict(result["plan"], capacity=False))
    if result["changed"] and not module.check_mode:
        timeout_s = module.params["wait_timeout_s"]
        client.delete(timeout_s)
        have = wait_gone(client, None, timeout_s)
    result.update(applications=summary(have), proxies=proxies(have))


def ensure_present(module, client, result):
    config = module.params["config"]
    try:
        have = client.get()
    except NotReachable:
        if not module.check_mode:
            raise
        module.warn("Ray does not answer yet: every app counts as added")
        have = {"applications": {}}
    else:
        result["reachable"] = True
    if module.check_mode and not os.path.exists(module.params["ray_python"]):
        module.warn("there is no Ray environment yet: the config was not checked against Ray's schema")
        names = [app["name"] for app in config.get("applications", [])]
        result["plan"].update(added=sorted(set(names) - set(have["applications"])))
        result["changed"] = bool(result["plan"]["added"])
        result["changes"] = described(
            have,
            {"applications": {app["name"]: app for app in config.get("applications", [])}},
            dict(result["plan"], capacity=False),
        )
        return
    converge(module, client, result, have, config, "applied")


def ensure_restored(module, client, result):
    have = client.get()
    result["reachable"] = True
    normalise(module, {"applications": []}, have)
    history = History(module.params["history"])
    entry = restorable(history, module.params["number"], running_digest(have))
    result["number"] = entry["number"]
    why = "number %d of %s again" % (entry["number"], entry["time"])
    converge(module, client, result, have, entry["config"], why, number=entry["number"])


def ensure_scaled(module, client, result):
    wish = module.params["scale"]
    have = client.get()
    result["reachable"] = True
    app, name, wanted = scalable(have, wish), "%s/%s" % (wish["app"], wish["deployment"]), wish["replicas"]
    actual = app["deployments"][wish["deployment"]].get("target_num_replicas")
    result.update(changed=wanted != actual, applications=summary(have), proxies=proxies(have))
    if not result["changed"]:
        return
    result["changes"] = [{"what": "replicas", "name": name, "wanted": wanted, "actual": actual}]
    if module.check_mode:
        return
    client.scale(wish["app"], wish["deployment"], wanted)
    have = wait_scaled(client, wish, module.params["wait_timeout_s"])
    result.update(applications=summary(have), proxies=proxies(have))


def scalable(have, wish):
    """The app of which a deployment is to be scaled."""
    apps = have.get("applications") or {}
    app = apps.get(wish["app"])
    if app is None:
        raise ServeError("no app %s runs\nFix: name one of %s" % (wish["app"], ", ".join(sorted(apps)) or "none"))
    config = app.get("deployed_app_config") or {}
    if not (app.get("external_scaler_enabled") and config.get("external_scaler_enabled")):
        raise ServeError(
            "app %s is not scaled from outside: what it runs with decides itself\nFix: set external_scaler of the app "
            "to true, and apply it" % wish["app"]
        )
    if wish["replicas"] < 1:
        raise ServeError("%d replicas cannot be kept: Serve's config has no number below 1" % wish["replicas"])
    names = sorted(app.get("deployments") or {})
    if wish["deployment"] not in names:
        raise ServeError(
            "app %s has no deployment %s\nFix: name one of %s" % (wish["app"], wish["deployment"], ", ".join(names))
        )
    return app


def wait_scaled(client, wish, timeout_s, clock=time.monotonic, sleep=time.sleep):
    """Wait until so many replicas run; returns the last answer."""
    deadline = clock() + timeout_s
    while True:
        have = client.get()
        app = (have.get("applications") or {}).get(wish["app"]) or {}
        deployment = (app.get("deployments") or {}).get(wish["deployment"]) or {}
        target, running = deployment.get("target_num_replicas"), running_replicas(deployment)
        told = "%s of app %s was told to have %d replicas" % (wish["deployment"], wish["app"], wish["replicas"])
        if target != wish["replicas"]:
            raise ServeError("%s, and something else has set %s since" % (told, target), have)
        if running == wish["replicas"]:
            return have
        if clock() >= deadline:
            said = essence(deployment.get("message") or "") or "it gives no reason"
            raise ServeError(
                "%s; after %d s %d run. Serve goes on trying, and says: %s" % (told, timeout_s, running, said), have
            )
        sleep(1)


def restorable(history, number, running):
    """The entry that is to run again."""
    good = [entry["number"] for entry in history.entries() if entry["outcome"] == serve_history.GOOD]
    there = "those that ran are %s" % ", ".join(map(str, good)) if good else "none is known that ran"
    if number is None:
        entry = history.newest(serve_history.GOOD, other_than=running)
        if entry is None:
            raise ServeError("there is no earlier config to go back to: %s" % there)
        return entry
    entry = history.get(number)
    if entry is None:
        raise ServeError("the history has no config %d: %s" % (number, there))
    if entry["outcome"] != serve_history.GOOD:
        raise ServeError("config %d was never seen to run: %s" % (number, there))
    return entry


def check_code(config, todo, number):
    """Raises CodeGone where the head lacks the code of an app that config `number` of the history would start.
    Other hosts cannot be asked here."""
    starts = todo["added"] + todo["changed"] + todo["failed"]
    starts += todo["unchanged"] if todo["fixed"] else []
    for app in config.get("applications", []):
        environment = app.get("runtime_env") or {}
        for uri in [str(environment.get("working_dir") or ""), *(environment.get("py_modules") or [])]:
            path = urllib.request.url2pathname(uri[len("file://") :])
            if app.get("name") in starts and uri.startswith("file://") and not os.path.exists(path):
                raise CodeGone(
                    "the code of app %s of config %d is gone from this head: %s is missing\nFix: check out that code, "
                    "and apply it" % (app["name"], number, path)
                )


def running_digest(have):
    """Of what runs, `have` as the schema sees it."""
    configs = {name: app["deployed_app_config"] for name, app in declared(have).items()}
    return digest(configs, have.get("target_capacity"))


def declared(have):
    """The apps that run by a config, by name."""
    return {
        name: app
        for name, app in (have.get("applications") or {}).items()
        if app.get("source", "declarative") == "declarative"
        and app.get("deployed_app_config")
        and app.get("status") != "DELETING"
    }


def note_running(history, have):
    """What runs well and nobody noted, such as an older kit's config, can be gone back to as well."""
    apps = list(declared(have).values())
    mark, good = running_digest(have), history.newest(serve_history.GOOD)
    if not apps or not all(is_ready(app) for app in apps) or (good and good["digest"] == mark):
        return
    config = {name: have[name] for name in FIXED if have.get(name) is not None}
    if have.get("target_capacity") is not None:
        config["target_capacity"] = have["target_capacity"]
    history.add(dict(config, applications=[app["sent"] for app in apps]), mark, "found running", serve_history.GOOD)


def unseen(history, config, todo):
    """Apps of a run that was killed which stay as it sent them: nobody saw them run so."""
    newest, good = history.newest(), history.newest(serve_history.GOOD)
    if newest is None or newest["outcome"] != serve_history.STARTED:
        return []
    ran = [plain(app) for app in good["config"].get("applications", [])] if good else []
    stay = todo["failed"] + todo["unchanged"]
    return [app["name"] for app in config["applications"] if app["name"] in stay and plain(app) not in ran]


def begin(history, config, mark, why, todo, changed):
    """The entry whose end is to be noted; None where the config ran before and nothing of it changes."""
    good, newest = history.newest(serve_history.GOOD), history.newest()
    same = not (todo["added"] or todo["changed"] or todo["removed"] or todo["capacity"] or todo["fixed"])
    if good and good["digest"] == mark and same:
        return None
    if not changed and newest and newest["digest"] == mark and newest["outcome"] == serve_history.STARTED:
        return newest  # of a run that was killed
    return history.add(config, mark, why)


def converge(module, client, result, have, config, why, number=None):
    """Bring the cluster to the config, and note how that went. number: the config is this one of the history."""
    given = module.params
    history = History(given["history"]) if given["history"] else None
    answer = normalise(module, config, have)
    want, todo = answer["want"], plan(have, answer["want"])
    if number is not None:
        check_code(config, todo, number)
    wish = wanted_rollout(given["rollout"], answer)
    rollouts = survey(client, have, want, todo, wish, given["pools"], history)
    result["plan"] = {name: todo[name] for name in result["plan"]}
    result["rollouts"] = rollouts
    result["diff"] = difference(have, want, todo)
    result["changes"] = described(have, want, todo, rollouts, given["restart_serve"])
    restarts = bool(todo["fixed"]) and given["restart_serve"]
    result["changed"] = is_change(todo) or restarts
    if not module.check_mode:
        if todo["fixed"] and not restarts:
            raise ServeError(
                "Serve runs with other options and takes new ones only when it starts: %s\nFix: give the consent to "
                "stop all apps for it (clusterkit_allow_disruption=true), or declare what runs"
                % "; ".join("%s is %s, declared is %s" % tuple(item) for item in todo["fixed"])
            )
        have = carry_out(module, client, result, have, config, want, todo, history, why)
    # What was carried out runs; Serve's new answer did not go through the schema.
    runs = running_digest(have) if module.check_mode else digest(want["applications"], want.get("target_capacity"))
    tell(module, result, have, history, runs)


def wanted_rollout(wish, answer):
    """What of the wish this Ray can do."""
    if answer.get("surge") or wish == serve_rollout.IN_PLACE:
        return wish
    if wish == serve_rollout.AUTO:
        return serve_rollout.IN_PLACE
    raise ServeError(
        "Ray %s does not know max_surge_percent, and so no rollout %s\nFix: set it to auto or in_place, or take a "
        "stack with Ray 2.60" % (answer.get("ray"), wish)
    )


def carry_out(module, client, result, have, config, want, todo, history, why):
    """Apply the config, or see that it runs; where it does not, go back. Returns the last answer."""
    timeout_s, entry, times, before = module.params["wait_timeout_s"], None, {}, have
    mark = digest(want["applications"], want.get("target_capacity"))
    if history:
        if result["changed"]:
            note_running(history, have)
        todo = dict(todo, unseen=unseen(history, config, todo))
        entry = begin(history, config, mark, why, todo, result["changed"])
    try:
        if result["changed"]:
            have = apply(client, config, have, todo, timeout_s, result["rollouts"], times)
        else:
            have = settle(client, *moved(have, todo), timeout_s=timeout_s)
    except NotReachable:
        raise  # nobody saw how it ended
    except ServeError as error:
        if entry is None:
            raise
        history.end(entry, serve_history.FAILED, str(error))
        # With other options, Serve was stopped before it refused: nothing runs then.
        if isinstance(error, Refused) and not todo["fixed"]:
            raise
        apps, (sent, _) = (error.have or {}).get("applications") or {}, moved(before, todo)
        if isinstance(error, Others) and all(is_ready(apps.get(name)) for name in sent):
            left = "The apps that were changed run, and stay as declared" if sent else "Nothing is taken back for it"
            raise ServeError("%s\n%s" % (error, left), error.have)
        go_back(module, client, result, history, entry, error, bool(todo["fixed"]), before)
    if entry:
        history.end(entry, serve_history.GOOD, seconds=times)
    return have


def go_back(module, client, result, history, entry, error, restarted, before):
    """Send the newest config again that ran. Always raises, with the reason why that was needed. restarted: Serve was
    stopped for the one that failed; before: the answer from before it was sent."""
    good = history.newest(serve_history.GOOD)
    fix = "\nFix: mend what is declared, and apply it again; the config that failed is number %d" % entry["number"]
    # Options that are fixed while Serve runs are in no digest.
    if good is None or (good["digest"] == entry["digest"] and not restarted):
        why = "no config is known that ran before" if good is None else "it is the config that ran last"
        raise ServeError("%s\nEverything is left as it is now: %s%s" % (error, why, fix), error.have)
    name, rest = "number %d of %s" % (good["number"], good["time"]), ""
    try:
        have = client.get()
        answer = normalise(module, good["config"], have)
        want, todo = answer["want"], plan(have, answer["want"])
        if not module.params["restart_serve"]:
            todo["fixed"] = []  # the apps alone
        check_code(good["config"], todo, good["number"])
        wish = wanted_rollout(module.params["rollout"], answer)
        rollouts = survey(client, have, want, todo, wish, module.params["pools"])
        # An app that was ill before and stays as it is keeps nobody waiting.
        stay = [name for name in todo["unchanged"] + todo["failed"] if name in before["applications"]]
        ill = [name for name in stay if not is_ready(before["applications"][name])]
        have = apply(client, good["config"], have, todo, module.params["wait_timeout_s"], rollouts, ill=ill)
    except CodeGone as gone:
        raise ServeError("%s\nEverything is left as it is now: %s%s" % (error, gone, fix), error.have)
    except Others as others:
        have, rest = others.have, "; what did not have to change does not:\n%s" % others
    except ServeError as second:
        raise ServeError(
            "%s\nThe config that ran before (%s) was sent again, and does not come up either:\n%s%s"
            % (error, name, second, fix),
            second.have or error.have,
        )
    history.end(entry, serve_history.FAILED, str(error), restored=good["number"])
    result["restored"] = good["number"]
    raise ServeError("%s\nThe config that ran before (%s) was put back, and runs%s%s" % (error, name, rest, fix), have)


def tell(module, result, have, history, mark):
    result.update(applications=summary(have), proxies=proxies(have))
    if not module.params["details"]:
        return
    entries = history.entries() if history else []
    # The answer after an apply is Serve's own words again, as the schema did not see them.
    runs = [entry["number"] for entry in entries if entry["digest"] == mark]
    result["effective"] = effective(have)
    result["history"] = [serve_history.told(entry) for entry in entries]
    result["runs"] = runs[-1] if runs else None


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent", "restored", "scaled"], "default": "present"},
            "url": {"type": "str", "default": "http://127.0.0.1:8265"},
            "token_file": {"type": "path", "no_log": False},
            "config": {"type": "dict"},
            "ray_python": {"type": "path"},
            "environment": {"type": "dict", "default": {}},
            "history": {"type": "path"},
            "number": {"type": "int"},
            "scale": {
                "type": "dict",
                "options": {
                    "app": {"type": "str", "required": True},
                    "deployment": {"type": "str", "required": True},
                    "replicas": {"type": "int", "required": True},
                },
            },
            "rollout": {"type": "str", "choices": list(serve_rollout.CHOICES), "default": serve_rollout.AUTO},
            "pools": {"type": "dict", "default": {}},
            "restart_serve": {"type": "bool", "default": False},
            "details": {"type": "bool", "default": False},
            "wait_timeout_s": {"type": "int", "default": 900},
        },
        required_if=[
            ("state", "present", ("config", "ray_python")),
            ("state", "restored", ("history", "ray_python")),
            ("state", "scaled", ("scale",)),
        ],
        supports_check_mode=True,
    )
    lists = ("added", "changed", "removed", "failed", "unchanged", "foreign")
    result = {"changed": False, "reachable": False, "plan": {name: [] for name in lists}, "changes": [], "rollouts": []}
    states = {"present": ensure_present, "absent": ensure_absent, "restored": ensure_restored, "scaled": ensure_scaled}
    ensure = states[module.params["state"]]
    try:
        token = None
        if not (module.check_mode and not os.path.exists(module.params["token_file"] or "/")):
            token = read_token(module.params["token_file"])
        ensure(module, Client(module.params["url"], token), result)
    except ServeError as error:
        if error.have:
            result.update(applications=summary(error.have), proxies=proxies(error.have))
        module.fail_json(msg=str(error), **result)
    except OSError as error:
        module.fail_json(msg="the history of configs cannot be kept: %s" % error, **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
