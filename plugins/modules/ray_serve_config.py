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
  - An app that failed is deployed again although its config is the same.
author:
  - clusterkit
options:
  state:
    description: C(absent) shuts Serve down, with all apps.
    type: str
    choices: [present, absent]
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
  ray_python:
    description: Interpreter of the head's Ray environment. Required for I(state=present).
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
    in them fails the task; apply I(state=absent) first, which stops all apps.
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
    C(disrupts) where running replicas are stopped or replaced. Values that look secret are hidden.
  returned: always
  type: list
  elements: dict
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
import urllib.request

from ansible.module_utils.basic import AnsibleModule

APPLICATIONS = "/api/serve/applications/"
# Serve takes these when it starts and ignores later changes.
FIXED = ("proxy_location", "http_options", "grpc_options")
# What Serve changes in a deployment without replacing its replicas: docs.ray.io, serve/advanced-guides/
# inplace-updates, and serve/_private/version.py, requires_actor_restart, of Ray 2.58 (the last two). The rest of an
# app counts as new code: serve/_private/deploy_utils.py, get_app_code_version.
LIGHT = frozenset(
    "num_replicas autoscaling_config user_config max_ongoing_requests graceful_shutdown_timeout_s "
    "graceful_shutdown_wait_loop_s health_check_period_s health_check_timeout_s max_queued_requests "
    "logging_config".split()
)
TRACEBACK_LINE = re.compile(r"\s|Traceback |ray::|ray\.exceptions\.RayTaskError|RuntimeError: Traceback ")
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY", "PRIVATE")

# Runs in the head's Ray environment. Both sides go through the same schema, so that 600 and 600.0 are equal.
SCHEMA_CHECK = r"""
import json, sys, typing
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

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

    def put(self, config):
        self._ask("PUT", 180, json.dumps(config).encode())

    def delete(self, timeout_s):
        self._ask("DELETE", timeout_s)

    def _ask(self, method, timeout_s, body=None):
        try:
            request = urllib.request.Request(self.url + APPLICATIONS, data=body, method=method)
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
        if error.code == 401:
            return ServeError("Ray at %s wants a token and got none. Set token_file to the cluster's token" % self.url)
        if error.code == 403:
            return ServeError(
                "Ray at %s refuses the token. The head runs with another one than lies in token_file: "
                "restart the head, or put its token there" % self.url
            )
        if error.code == 400 and method == "PUT":
            return ServeError("Serve refused the config: %s" % text)
        if error.code == 500 and method == "PUT":
            return ServeError(
                "Serve failed on the config, most likely while it imported a policy that is not on the head's "
                "PYTHONPATH: %s" % text[:2000]
            )
        return ServeError("%s %s answered %d: %s" % (method, self.url + APPLICATIONS, error.code, text[:2000]))


def plan(have, want):
    """What there is to do. `have` is the answer of GET with normalised app configs, `want` the normalised config."""
    done = {"added": [], "changed": [], "removed": [], "failed": [], "unchanged": [], "foreign": [], "fixed": []}
    running = have.get("applications") or {}
    for name in sorted(want["applications"]):
        if name not in running:
            done["added"].append(name)
        elif (running[name].get("deployed_app_config") or {}) != want["applications"][name]:
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
        return [hide(item) for item in value]
    if isinstance(value, str) and any(word in str(key).upper() for word in SECRET_WORDS):
        return "<hidden>"
    return value


def difference(have, want, todo):
    """Ansible's diff, only of the apps that change."""
    names = todo["added"] + todo["changed"] + todo["removed"] + todo["failed"]
    running = have.get("applications") or {}
    before = {name: running[name].get("deployed_app_config") for name in names if name in running}
    after = {name: want["applications"][name] for name in names if name in want["applications"]}

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


def replaces(have, want, paths):
    """Do these changes of an app stop its replicas, for others to start?"""

    def scaled(app):
        return sorted(item.get("name", "") for item in app.get("deployments") or [] if item.get("autoscaling_config"))

    light = all(
        path[0] == "route_prefix"
        or (len(path) > 2 and path[0] == "deployments" and path[2] in LIGHT and path[3:4] != ("policy",))
        for path in paths
    )
    # Serve hashes the list of the deployments' policies, empty ones too.
    return not light or scaled(have) != scaled(want)


def described(have, want, todo):
    """What there is to do, for a plan: [{what, name, wanted, actual}], with `disrupts` where replicas are stopped."""
    running, found = have.get("applications") or {}, []
    for name in todo["added"]:
        wanted = hide(want["applications"].get(name, {}))
        found.append({"what": "app", "name": name, "wanted": wanted, "actual": "missing"})
    for name in todo["changed"]:
        old, new = running[name].get("deployed_app_config") or {}, want["applications"][name]
        keys = changed_keys(old, new)
        change = {
            "what": "app",
            "name": name,
            "wanted": {".".join(path): pair[1] for path, pair in keys.items()},
            "actual": {".".join(path): pair[0] for path, pair in keys.items()},
        }
        found.append(dict(change, disrupts=["app"]) if replaces(old, new, keys) else change)
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
            "deployments": deployments,
        }
    return apps


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


def wait_ready(client, names, before, timeout_s, clock=time.monotonic, sleep=time.sleep):
    """Wait until the apps run; returns the last answer. `before` has the deploy times from before the PUT: a
    failure that is older than the PUT is no news. A short outage of the dashboard is waited out as well."""
    deadline = clock() + timeout_s
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
            raise ServeError("still stopping after %d s: %s" % (timeout_s, ", ".join(left)))
        sleep(1)


def apply(client, config, have, todo, timeout_s):
    """Send the config and wait for what it asks for; returns the last answer."""
    again = restartable(have, todo["failed"])
    if again:
        rest = [app for app in config["applications"] if app["name"] not in again]
        client.put(dict(config, applications=rest))
        wait_gone(client, again, timeout_s)
    redeployed = todo["added"] + todo["changed"] + todo["failed"]
    before = {
        name: have["applications"][name].get("last_deployed_time_s")
        for name in redeployed
        if name in have["applications"]
    }
    client.put(config)
    wait_gone(client, todo["removed"], timeout_s)
    return wait_ready(client, redeployed + todo["unchanged"], before, timeout_s)


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
    """Both sides as Ray's schema sees them; refuses what the schema refuses or does not know."""
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
    return answer["want"], answer["have"]


def ensure_absent(module, client, result):
    try:
        have = client.get()
    except NotReachable:
        return  # no Ray, no Serve
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
    want, have_apps = normalise(module, config, have)
    for name, data in have_apps.items():
        have["applications"][name]["deployed_app_config"] = data
    todo = plan(have, want)
    result["plan"] = {name: todo[name] for name in result["plan"]}
    result["diff"] = difference(have, want, todo)
    result["changes"] = described(have, want, todo)
    if todo["fixed"]:
        raise ServeError(
            "Serve runs with other options and takes new ones only when it starts: %s. Shut it down first with "
            "state=absent, which stops all apps, then apply again"
            % "; ".join("%s is %s, declared is %s" % tuple(item) for item in todo["fixed"])
        )
    result["changed"] = is_change(todo)
    if not module.check_mode:
        timeout_s = module.params["wait_timeout_s"]
        if result["changed"]:
            have = apply(client, config, have, todo, timeout_s)
        else:
            have = wait_ready(client, todo["unchanged"], {}, timeout_s)
    result.update(applications=summary(have), proxies=proxies(have))


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "url": {"type": "str", "default": "http://127.0.0.1:8265"},
            "token_file": {"type": "path", "no_log": False},
            "config": {"type": "dict"},
            "ray_python": {"type": "path"},
            "environment": {"type": "dict", "default": {}},
            "wait_timeout_s": {"type": "int", "default": 900},
        },
        required_if=[("state", "present", ("config", "ray_python"))],
        supports_check_mode=True,
    )
    lists = ("added", "changed", "removed", "failed", "unchanged", "foreign")
    result = {"changed": False, "plan": {name: [] for name in lists}, "changes": []}
    ensure = ensure_present if module.params["state"] == "present" else ensure_absent
    try:
        token = None
        if not (module.check_mode and not os.path.exists(module.params["token_file"] or "/")):
            token = read_token(module.params["token_file"])
        ensure(module, Client(module.params["url"], token), result)
    except ServeError as error:
        if error.have:
            result.update(applications=summary(error.have), proxies=proxies(error.have))
        module.fail_json(msg=str(error), **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
