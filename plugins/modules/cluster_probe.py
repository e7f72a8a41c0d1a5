#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: cluster_probe
short_description: Look at a running cluster as its users do
description:
  - Runs on the head. Reads nodes and apps from Ray, and asks every proxy that holds a replica for real tokens.
  - Changes nothing. Never fails by itself; the caller decides what a failed check means.
author:
  - clusterkit
options:
  url:
    description: Ray's dashboard on the head.
    type: str
    required: true
  token_file:
    description: File on the head with the cluster's token.
    type: path
    required: true
  serve_port:
    description: Port of the Serve proxies.
    type: int
    required: true
  nodes:
    description: The address of every host that has to be in the cluster, by name.
    type: dict
    default: {}
  excused:
    description: >-
      Hosts whose absence is no failure, by name, with the words that say why; an empty text excuses nothing.
    type: dict
    default: {}
  pools:
    description: >-
      Pools by name, each with C(hosts), C(max) and C(pool), as the fact C(clusterkit) has them. Of one whose
      C(pool.mode) is C(autoscaled), as many nodes have to be there as C(pool.min) and C(max) say, whichever.
    type: dict
    default: {}
  node_timeout_s:
    description: How long a node of such a pool may take to come, and one too many to go.
    type: int
    default: 0
  head_ip:
    description: The head's address, for the base URLs.
    type: str
    default: 127.0.0.1
  apps:
    description: Each with C(name), C(route_prefix), C(model_id) and C(llm) (whether it speaks the OpenAI API).
    type: list
    elements: dict
    default: []
  probe:
    description: >-
      C(none) only reads. C(proxies) asks through each proxy once. C(replicas) asks until every replica has
      answered, by the request counters of Ray's metrics.
    type: str
    choices: [none, proxies, replicas]
    default: proxies
  metrics_port:
    description: Port of Ray's metrics on every node.
    type: int
    default: 8090
  timeout_s:
    description: How long one answer may take.
    type: int
    default: 120
  settle_s:
    description: How long to wait for an expected node, and for a proxy to open.
    type: int
    default: 60
"""

EXAMPLES = r"""
- name: Ask for tokens
  cluster_probe:
    url: http://127.0.0.1:8265
    token_file: /var/lib/clusterkit/node/token
    serve_port: 8000
    apps: [{name: tiny, route_prefix: /, model_id: tiny, llm: true}]
"""

RETURN = r"""
nodes:
  description: Each node with C(host), C(node_ip), C(alive), C(head), C(resources).
  returned: always
  type: list
apps:
  description: Each app with C(name), C(state), C(message), C(base_url), C(replicas).
  returned: always
  type: list
running:
  description: Replicas of all apps that run.
  returned: always
  type: int
coming:
  description: Replicas that neither run nor are being stopped; at 0 Serve has what it wants by now.
  returned: always
  type: int
demands:
  description: What Ray waits for, in its own words, one line each; only where C(probe) is C(none).
  returned: always
  type: list
checks:
  description: Each with C(name), C(ok), C(detail), C(seconds).
  returned: always
  type: list
answer:
  description: The first real answer.
  returned: when one was given
  type: dict
"""

import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule

PROMPT = "Say something."
INGRESS = "OpenAiIngress"
COUNTER = "ray_serve_deployment_request_counter_total"


class Unreachable(Exception):
    """The other side did not answer as it should."""


# What a connection can end with; an answer that breaks off is none of urllib's own errors.
BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)


def fetch(url, payload=None, token=None, timeout=30):
    """The parsed JSON of an answer; Unreachable with status and words otherwise."""
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = "Bearer " + token
    body = json.dumps(payload).encode() if payload is not None else None
    try:
        with OPENER.open(urllib.request.Request(url, data=body, headers=headers), timeout=timeout) as answer:
            return json.loads(answer.read().decode() or "null")
    except urllib.error.HTTPError as error:
        raise Unreachable("%s answered %d: %s" % (url, error.code, error.read().decode()[:300]))
    except BROKEN as error:
        raise Unreachable("%s: %s" % (url, getattr(error, "reason", error)))


# The cluster's own addresses: a site's outgoing proxy has no part in this.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_nodes(url, token, expected):
    """Ray's nodes, each with the name of the host that the inventory gives its address."""
    data = fetch(url + "/api/v0/nodes?detail=1&limit=10000", token=token)
    names = {address: host for host, address in expected.items()}
    nodes = {}
    for node in data["data"]["result"]["result"]:
        entry = {
            "host": names.get(node["node_ip"], ""),
            "node_ip": node["node_ip"],
            "alive": node["state"] == "ALIVE",
            "head": bool(node.get("is_head_node")),
            "node_id": node["node_id"],
            "resources": {
                key: value for key, value in (node.get("resources_total") or {}).items() if not key.startswith("node:")
            },
        }
        known = nodes.get(node["node_ip"])
        if known is None or (entry["alive"] and not known["alive"]):
            nodes[node["node_ip"]] = entry
    # Ray turns a head on 127.0.0.1 into the host's address, and the proxies listen where they were told.
    if len(expected) == 1 and len(nodes) == 1:
        only = next(iter(nodes.values()))
        only["host"], only["node_ip"] = next(iter(expected.items()))
    return sorted(nodes.values(), key=lambda node: (not node["head"], node["host"], node["node_ip"]))


def read_demands(url, token):
    """What Ray's autoscaler has no place for. It gives that as a text alone (ray 2.60.0, the dashboard's
    reporter_head.py); without an autoscaler, or before its first round, there is none."""
    data = fetch(url + "/api/cluster_status?format=1", token=token)
    text = ((data or {}).get("data") or {}).get("clusterStatus") or ""
    lines = text.partition("Pending Demands:\n")[2].splitlines()
    return [line.strip() for line in lines if line.startswith(" ") and not line.startswith(" (no ")]


def read_apps(url, token, wanted, nodes, serve_port, head_ip):
    """Serve's apps with the replicas of every deployment."""
    data = fetch(url + "/api/serve/applications/", token=token) or {}
    apps = []
    facts = {app["name"]: app for app in wanted}
    addresses = {node["node_id"]: node["node_ip"] for node in nodes}
    for name, app in sorted((data.get("applications") or {}).items()):
        replicas = []
        for deployment, detail in sorted(app.get("deployments", {}).items()):
            for replica in detail.get("replicas", []):
                replicas.append(
                    {
                        "deployment": deployment,
                        "id": replica.get("replica_id", ""),
                        "state": replica.get("state", ""),
                        "node_ip": addresses.get(replica.get("node_id"), replica.get("node_ip", "")),
                        "pid": replica.get("pid"),
                    }
                )
        prefix = (app.get("route_prefix") or "/").rstrip("/")
        suffix = "/v1" if facts.get(name, {}).get("llm") else ""
        apps.append(
            {
                "name": name,
                "state": app.get("status", ""),
                "message": app.get("message", ""),
                "base_url": "http://%s:%d%s%s" % (head_ip, serve_port, prefix, suffix),
                "route_prefix": app.get("route_prefix") or "/",
                "replicas": replicas,
            }
        )
    proxies = {}
    for node_id, proxy in (data.get("proxies") or {}).items():
        proxies[node_id] = {"node_ip": proxy.get("node_ip", ""), "status": proxy.get("status", "")}
    return apps, proxies


def tally(apps):
    """How many replicas run, and how many are still to."""
    states = [replica["state"] for app in apps for replica in app["replicas"]]
    return {
        "running": states.count("RUNNING"),
        "coming": sum(state not in ("RUNNING", "STOPPING") for state in states),
    }


def chat(base, model, timeout):
    payload = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
    answer = fetch(base + "/chat/completions", payload, timeout=timeout)
    content = answer["choices"][0]["message"]["content"]
    tokens = answer["usage"]["completion_tokens"]
    if tokens < 1:
        raise Unreachable("an answer without a token")
    return {"content": content, "tokens": tokens, "model": answer["model"]}


def stream(base, model, timeout):
    """Number of chunks with text in them; the stream has to end with [DONE]."""
    payload = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        base + "/chat/completions",
        data=json.dumps(payload).encode(),
        headers={"Content-Type": "application/json"},
    )
    chunks, ended, tokens = 0, False, 0
    try:
        with OPENER.open(request, timeout=timeout) as answer:
            for line in answer:
                text = line.decode().strip()
                if text == "data: [DONE]":
                    ended = True
                elif text.startswith("data: "):
                    chunk = json.loads(text[6:])
                    chunks += 1
                    tokens = max(tokens, (chunk.get("usage") or {}).get("completion_tokens", 0))
    except BROKEN as error:
        raise Unreachable("%s: %s" % (base, error))
    if not ended or tokens < 1:
        raise Unreachable("the stream ended after %d chunks and %d tokens, [DONE] %s" % (chunks, tokens, ended))
    return {"chunks": chunks, "tokens": tokens}


def counters(addresses, port, timeout=10):
    """Requests that each replica has handled, by replica id, from the metrics of its node."""
    found = {}
    for address in sorted(addresses):
        url = "http://%s:%d/metrics" % (address, port)
        try:
            with OPENER.open(url, timeout=timeout) as answer:
                text = answer.read().decode()
        except BROKEN as error:
            raise Unreachable("%s: %s" % (url, error))
        for line in text.splitlines():
            if line.startswith(COUNTER + "{"):
                replica = re.search(r'replica="([^"]+)"', line)
                if replica:
                    found[replica.group(1)] = found.get(replica.group(1), 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def counted(found, replica):
    """The counter of one replica: metrics name it by the id alone or with its deployment."""
    return sum(value for name, value in found.items() if name == replica or name.endswith("#" + replica))


class Checks(object):
    def __init__(self):
        self.list = []

    def fail(self, name, detail):
        self.list.append({"name": name, "ok": False, "detail": detail, "seconds": 0.0})

    def run(self, name, check, *args):
        """Run one check, note how it went, return what it gave."""
        start = time.time()
        try:
            result, ok = check(*args), True
            detail = json.dumps(result) if isinstance(result, dict) else str(result)
        except (Unreachable, KeyError, IndexError, TypeError) as error:
            result, ok, detail = None, False, "%s" % error
        self.list.append({"name": name, "ok": ok, "detail": detail, "seconds": round(time.time() - start, 2)})
        return result


def until(deadline, attempt):
    """Repeat an attempt until it gives something true or the time is over."""
    while True:
        result = attempt()
        if result or time.time() >= deadline:
            return result
        time.sleep(0.5)


class Present(object):
    """Which nodes have to be there, and which are."""

    def __init__(self, given):
        self.hosts = sorted(given["nodes"])
        self.excused = {host: why for host, why in given["excused"].items() if why}
        scaled = {name: pool for name, pool in given["pools"].items() if pool["pool"]["mode"] == "autoscaled"}
        self.pools = sorted(scaled.items())
        self.scaled = {host for pool in scaled.values() for host in pool["hosts"]}
        self.gone = []

    def missing(self):
        return [host for host in self.gone if host not in self.excused and host not in self.scaled]

    def counts(self):
        """(pool, nodes that are there, least, most). Who is kept out does not count among those that could come."""
        for name, pool in self.pools:
            able = [host for host in pool["hosts"] if host not in self.excused]
            there = [host for host in pool["hosts"] if host not in self.gone]
            yield name, len(there), min(pool["pool"]["min"], len(able)), pool["max"]

    def wrong(self):
        found = []
        for name, there, least, most in self.counts():
            if there < least:
                found.append("%s has %d nodes, and at least %d are to be there" % (name, there, least))
            elif there > most:
                found.append("%s has %d nodes, and at most %d are to be there" % (name, there, most))
        return found

    def text(self):
        told = ["%d of %d" % (len(self.hosts) - len(self.gone), len(self.hosts))]
        told += ["%s: %d of %d to %d as asked for" % count for count in self.counts()]
        return "; ".join(told + ["%s %s" % (host, self.excused[host]) for host in self.gone if host in self.excused])


def check_nodes(checks, given, token):
    present = Present(given)

    def look():
        alive = {node["node_ip"] for node in read_nodes(given["url"], token, given["nodes"]) if node["alive"]}
        present.gone = [host for host in present.hosts if given["nodes"][host] not in alive]
        return not present.missing() and not present.wrong()

    def there():
        began = time.time()
        if not until(began + given["settle_s"], look) and not present.missing():
            # Only nodes that come and go: a host of theirs may have to boot.
            until(began + given["node_timeout_s"], look)
        wrong = ["not in the cluster: %s" % ", ".join(present.missing())] if present.missing() else []
        wrong += present.wrong()
        if wrong:
            raise Unreachable("; ".join(wrong))
        return present.text()

    checks.run("nodes", there)


def check_app(checks, given, app, wanted):
    """Ask one app through every proxy that holds a replica of it."""
    name = app["name"]

    def running():
        if app["state"] != "RUNNING":
            raise Unreachable("%s: %s" % (app["state"], app["message"][-500:]))
        return "RUNNING"

    checks.run("%s state" % name, running)
    if app["state"] == "RUNNING" and wanted["llm"] and not engines(app):
        # As its min_replicas say. A question would bring hosts.
        checks.run("%s replicas" % name, lambda: "none runs, and none is asked for: it comes with the next request")
        return None
    addresses = sorted({item["node_ip"] for item in app["replicas"] if item["state"] == "RUNNING"})
    prefix = app["route_prefix"].rstrip("/")
    answer = None
    if wanted["llm"]:
        for address in addresses:
            base = "http://%s:%d%s/v1" % (address, given["serve_port"], prefix)

            def models(base=base):
                listed = [item["id"] for item in fetch(base + "/models", timeout=given["timeout_s"])["data"]]
                if wanted["model_id"] not in listed:
                    raise Unreachable("%s is not among %s" % (wanted["model_id"], ", ".join(listed)))
                return ", ".join(listed)

            def opened(base=base):
                try:
                    fetch(base + "/models", timeout=10)
                    return True
                except Unreachable:
                    return False

            until(time.time() + given["settle_s"], opened)
            checks.run("%s models via %s" % (name, address), models)
            got = checks.run("%s chat via %s" % (name, address), chat, base, wanted["model_id"], given["timeout_s"])
            answer = answer or got
            checks.run("%s stream via %s" % (name, address), stream, base, wanted["model_id"], given["timeout_s"])
        if given["probe"] == "replicas":
            arguments = (given, addresses, prefix, wanted["model_id"], asked_of(app))
            checks.run("%s replicas" % name, every_replica, *arguments)
    return answer


def engines(app):
    return [item for item in app["replicas"] if item["deployment"] != INGRESS and item["state"] != "STOPPING"]


def asked_of(app):
    """The engines that have to answer: of an app that runs, one that waits for its host is only more to come."""
    running = [item for item in engines(app) if item["state"] == "RUNNING"]
    return running if app["state"] == "RUNNING" and running else engines(app)


def every_replica(given, addresses, prefix, model, replicas):
    """Ask, many at once, until the counter of every engine replica has grown."""
    if replicas and not addresses:
        raise Unreachable("no replica runs: %s" % ", ".join(sorted({item["state"] for item in replicas})))
    before = counters(addresses, given["metrics_port"])
    deadline = time.time() + max(given["settle_s"], 45)
    silent = [item["id"] for item in replicas]
    asked = [0]

    def one(base):
        try:
            chat(base, model, given["timeout_s"])
        except (Unreachable, KeyError, IndexError, TypeError):
            return
        asked[0] += 1

    while silent and time.time() < deadline:
        threads = []
        for index in range(4 * len(replicas)):
            base = "http://%s:%d%s/v1" % (addresses[index % len(addresses)], given["serve_port"], prefix)
            threads.append(threading.Thread(target=one, args=(base,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = counters(addresses, given["metrics_port"])
        silent = [item for item in silent if counted(after, item) <= counted(before, item)]
        if silent:
            time.sleep(1)
    if silent:
        raise Unreachable("no answer counted from %s in %d requests" % (", ".join(silent), asked[0]))
    return "all %d replicas answered (%d requests)" % (len(replicas), asked[0])


def finish(module, result):
    failed = ["%(name)s: %(detail)s" % check for check in result["checks"] if not check["ok"]]
    if failed:
        result["msg"] = "%d of %d checks failed:\n  %s" % (len(failed), len(result["checks"]), "\n  ".join(failed))
    module.exit_json(**result)


def main():
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "token_file": {"type": "path", "required": True, "no_log": False},
            "serve_port": {"type": "int", "required": True},
            "nodes": {"type": "dict", "default": {}},
            "excused": {"type": "dict", "default": {}},
            "pools": {"type": "dict", "default": {}},
            "node_timeout_s": {"type": "int", "default": 0},
            "head_ip": {"type": "str", "default": "127.0.0.1"},
            "apps": {"type": "list", "elements": "dict", "default": []},
            "probe": {"type": "str", "choices": ["none", "proxies", "replicas"], "default": "proxies"},
            "metrics_port": {"type": "int", "default": 8090},
            "timeout_s": {"type": "int", "default": 120},
            "settle_s": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    given = module.params
    checks = Checks()
    result = {"changed": False, "reachable": False, "nodes": [], "apps": [], "checks": checks.list, "answer": None}
    result.update(tally([]), demands=[])
    try:
        with open(given["token_file"]) as handle:
            token = handle.read().strip()
    except OSError as error:
        checks.fail("head", "no token: %s" % error.strerror)
        finish(module, result)
    try:
        result["nodes"] = read_nodes(given["url"], token, given["nodes"])
        result["reachable"] = True
        if given["probe"] != "none":
            check_nodes(checks, given, token)
            result["nodes"] = read_nodes(given["url"], token, given["nodes"])
        apps, proxies = read_apps(
            given["url"], token, given["apps"], result["nodes"], given["serve_port"], given["head_ip"]
        )
        result["apps"], result["proxies"] = apps, proxies
        result.update(tally(apps))
        if given["probe"] == "none":
            result["demands"] = read_demands(given["url"], token)
    except (Unreachable, KeyError, TypeError) as error:
        checks.fail("head", str(error))
        finish(module, result)
    if given["probe"] != "none":
        by_name = {app["name"]: app for app in apps}
        for wanted in given["apps"]:
            app = by_name.get(wanted["name"])
            if app is None:
                checks.fail("%s state" % wanted["name"], "it is not deployed")
                continue
            result["answer"] = check_app(checks, given, app, wanted) or result["answer"]
    finish(module, result)


if __name__ == "__main__":
    main()
