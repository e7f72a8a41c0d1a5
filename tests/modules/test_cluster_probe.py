"""cluster_probe against a server that answers as Ray, Serve and the OpenAI API do; each failure that it must see.

One server listens on several loopback addresses: each is a node with its own proxy and its own metrics.
"""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

probe = load_module("cluster_probe")
RECORDED = json.loads((Path(__file__).parent / "fixtures/running_llm.json").read_text())

TOKEN = "0123456789abcdef"
HEAD, W1, W2 = "127.0.0.1", "127.0.0.2", "127.0.0.3"
NODES = {"h1": HEAD, "w1": W1, "w2": W2}
MODEL = "tiny-llama"
SERVER = "LLMServer:tiny-llama"


# Recorded from Ray 2.60.0 with autoscaler v2, on a head without workers; the middle is left out.
SCALED = """\
======== Autoscaler status: 2026-11-22 03:55:30.992873 ========
Node status
---------------------------------------------------------------
Active:
 (no active nodes)

From request_resources:
 (none)
Pending Demands:
{demands}"""


class FakeRay:
    """A head without replicas and two workers with one each. Tests break what they look at."""

    def __init__(self) -> None:
        self.nodes: list[Json] = [
            {
                "node_id": f"node-{name}",
                "node_ip": address,
                "state": "ALIVE",
                "is_head_node": name == "h1",
                "resources_total": {"CPU": 2.0, f"node:{address}": 1.0},
            }
            for name, address in NODES.items()
        ]
        self.serve: Json = copy.deepcopy(RECORDED)
        replica = self.serve["applications"]["tiny"]["deployments"][SERVER]["replicas"][0]
        self.deployments = self.serve["applications"]["tiny"]["deployments"]
        self.deployments[SERVER]["replicas"] = [
            {**replica, "replica_id": f"replica-{name}", "node_id": f"node-{name}", "node_ip": NODES[name]}
            for name in ("w1", "w2")
        ]
        self.deployments["OpenAiIngress"]["replicas"] = []
        self.models = [MODEL]
        self.demands = " (no resource demands)"
        self.asked: Counter[str] = Counter()
        self.counted = True
        self.text = "nonsense"
        self.tokens = 3
        self.stream_end = "data: [DONE]\n\n"
        self.cut = False
        self.down: set[str] = set()

    def chat(self, address: str, stream: bool) -> str:
        self.asked[address] += 1
        usage = {"completion_tokens": self.tokens}
        if not stream:
            message = {"role": "assistant", "content": self.text}
            return json.dumps({"model": MODEL, "choices": [{"message": message}], "usage": usage})
        chunks: list[Json] = [{"choices": [{"delta": {"content": word}}], "usage": None} for word in ("non", "sense")]
        chunks.append({"choices": [], "usage": usage})
        return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + self.stream_end

    def metrics(self, address: str) -> str:
        name = next(name for name, its in NODES.items() if its == address)
        number = float(self.asked[address]) if self.counted else 1.0
        labels = f'application="tiny",deployment="{SERVER}",replica="replica-{name}"'
        return f"# HELP x\nray_serve_deployment_request_counter_total{{{labels}}} {number}\nray_node_cpu_count 2.0\n"


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


@pytest.fixture
def port(ray: FakeRay) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        @property
        def address(self) -> str:
            host: str = self.connection.getsockname()[0]
            return host

        def answer(self, text: str, status: int = 200) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + (100 if ray.cut else 0)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path.startswith("/api/"):
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    self.answer("Unauthorized", 401)
                elif self.path.startswith("/api/v0/nodes"):
                    self.answer(json.dumps({"data": {"result": {"result": ray.nodes}}}))
                elif self.path == "/api/cluster_status?format=1":
                    self.answer(json.dumps({"data": {"clusterStatus": SCALED.format(demands=ray.demands)}}))
                else:
                    self.answer(json.dumps(ray.serve))
            elif self.path == "/metrics":
                self.answer(ray.metrics(self.address))
            elif self.address in ray.down:
                self.answer("no healthy replica", 503)
            else:
                self.answer(json.dumps({"object": "list", "data": [{"id": name} for name in ray.models]}))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.address in ray.down:
                self.answer("no healthy replica", 503)
            elif asked["model"] not in ray.models:
                self.answer(json.dumps({"error": {"message": "no such model"}}), 404)
            else:
                self.answer(ray.chat(self.address, asked.get("stream", False)))

        def log_message(self, *_args: object) -> None:
            return None

    with ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting takes no time: the clock goes on where the module sleeps, in long steps, and nowhere else."""

    class Clock:
        now = 1000.0

        def time(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += max(seconds, 15)

    monkeypatch.setattr(probe, "time", Clock())


@pytest.fixture
def look(port: int, tmp_path: Path) -> Callable[..., Json]:
    """Runs the module; the answer, its checks by name."""
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")

    def run(**more: Any) -> Json:
        given: Json = {
            "url": f"http://{HEAD}:{port}",
            "token_file": str(token),
            "serve_port": port,
            "metrics_port": port,
            "nodes": NODES,
            "head_ip": HEAD,
            "apps": [{"name": "tiny", "route_prefix": "/", "model_id": MODEL, "llm": True}],
            "probe": "replicas",
            **more,
        }
        result = call(probe, **given)
        assert not result.get("failed")
        assert not result["changed"]
        result["by_name"] = {check["name"]: check for check in result["checks"]}
        result["bad"] = {name: check["detail"] for name, check in result["by_name"].items() if not check["ok"]}
        assert ("msg" in result) == bool(result["bad"])
        return result

    return run


# ------------------------------------------------------------------ a cluster that is well


def test_a_cluster_that_is_well(look: Callable[..., Json], port: int) -> None:
    seen = look()
    assert seen["bad"] == {}
    assert [(node["host"], node["alive"], node["head"]) for node in seen["nodes"]] == [
        ("h1", True, True),
        ("w1", True, False),
        ("w2", True, False),
    ]
    assert seen["nodes"][1]["resources"] == {"CPU": 2.0}
    (app,) = seen["apps"]
    assert (app["name"], app["state"], app["base_url"]) == ("tiny", "RUNNING", f"http://{HEAD}:{port}/v1")
    assert seen["answer"] == {"content": "nonsense", "tokens": 3, "model": MODEL}
    assert [name for name in seen["by_name"] if " via " in name] == [
        f"tiny {what} via {address}" for address in (W1, W2) for what in ("models", "chat", "stream")
    ]
    assert "all 2 replicas answered" in seen["by_name"]["tiny replicas"]["detail"]


def test_only_proxies_beside_a_replica_are_asked(look: Callable[..., Json], ray: FakeRay) -> None:
    look()
    assert ray.asked[HEAD] == 0
    assert ray.asked[W1] > 0
    assert ray.asked[W2] > 0


def test_inside_a_deploy_each_proxy_is_asked_once(look: Callable[..., Json], ray: FakeRay) -> None:
    seen = look(probe="proxies")
    assert seen["bad"] == {}
    assert "tiny replicas" not in seen["by_name"]
    # Once for an answer, once for a stream.
    assert ray.asked == {W1: 2, W2: 2}


def test_replicas_are_counted(look: Callable[..., Json], ray: FakeRay, tmp_path: Path) -> None:
    found = look(probe="none")
    assert (found["running"], found["coming"]) == (2, 0)
    first, second = ray.deployments[SERVER]["replicas"]
    first["state"], second["state"] = "STARTING", "STOPPING"
    found = look(probe="none")
    assert (found["running"], found["coming"]) == (0, 1)
    found = look(probe="none", token_file=str(tmp_path / "none"))
    assert (found["reachable"], found["running"], found["coming"]) == (False, 0, 0)


def test_only_reading_asks_nobody(look: Callable[..., Json], ray: FakeRay) -> None:
    seen = look(probe="none")
    assert (seen["reachable"], seen["checks"], seen["answer"]) == (True, [], None)
    assert len(seen["apps"][0]["replicas"]) == 2
    assert not ray.asked


def test_what_ray_has_no_place_for(look: Callable[..., Json], ray: FakeRay) -> None:
    assert look(probe="none")["demands"] == []
    # The same cluster, with work for two more hosts than there are.
    lines = [
        "{'CPU': 2.0}: 2+ pending tasks/actors (2+ using placement groups)",
        "{'CPU': 2.0} * 2 (STRICT_SPREAD): 1+ pending placement groups",
    ]
    ray.demands = "\n".join(f" {line}" for line in lines)
    assert look(probe="none")["demands"] == lines


def test_a_prefix_stands_before_v1(look: Callable[..., Json], ray: FakeRay, port: int) -> None:
    ray.serve["applications"]["tiny"]["route_prefix"] = "/models/tiny"
    assert look(probe="none")["apps"][0]["base_url"] == f"http://{HEAD}:{port}/models/tiny/v1"


def test_the_one_box_answers_where_it_was_told(look: Callable[..., Json], ray: FakeRay) -> None:
    """Ray replaces 127.0.0.1 by an address of its own choice; the proxies stay where they are."""
    ray.nodes = [{**ray.nodes[0], "node_ip": "192.0.2.7"}]
    ray.deployments[SERVER]["replicas"] = [{**ray.deployments[SERVER]["replicas"][0], "node_id": "node-h1"}]
    seen = look(nodes={"box": HEAD}, probe="proxies")
    assert seen["bad"] == {}
    assert [(node["host"], node["node_ip"]) for node in seen["nodes"]] == [("box", HEAD)]
    assert set(ray.asked) == {HEAD}


# ------------------------------------------------------------------ what must be seen


def test_a_node_that_is_missing(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.nodes = ray.nodes[:2]
    assert look()["bad"] == {"nodes": "not in the cluster: w2"}


def test_a_host_that_is_off_by_policy_may_be_missing_and_nobody_else(look: Callable[..., Json], ray: FakeRay) -> None:
    held = {"w1": "", "w2": "in maintenance: new fan (by kim)"}
    assert look(excused=held, probe="proxies")["by_name"]["nodes"]["detail"] == "3 of 3"
    ray.nodes[2]["state"] = "DEAD"
    seen = look(excused=held, probe="proxies")["by_name"]["nodes"]
    assert (seen["ok"], seen["detail"]) == (True, "2 of 3; w2 in maintenance: new fan (by kim)")
    ray.nodes[1]["state"] = "DEAD"
    assert look(excused=held, probe="proxies")["bad"]["nodes"] == "not in the cluster: w1"


def scaled(least: int = 0, most: int = 2) -> Json:
    """The pool of both workers, as the fact `clusterkit` has it."""
    return {"gpus": {"hosts": ["w1", "w2"], "max": most, "pool": {"mode": "autoscaled", "min": least}}}


def test_nodes_that_come_and_go_may_be_away(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.nodes[2]["state"] = "DEAD"
    seen = look(pools=scaled(), probe="proxies")["by_name"]["nodes"]
    assert (seen["ok"], seen["detail"]) == (True, "2 of 3; gpus: 1 of 0 to 2 as asked for")
    ray.nodes = ray.nodes[:1]
    assert look(pools=scaled(), probe="proxies")["by_name"]["nodes"]["ok"]
    fixed = {"gpus": {**scaled()["gpus"], "pool": {"mode": "fixed", "min": 0}}}
    assert look(pools=fixed, probe="proxies")["bad"]["nodes"] == "not in the cluster: w1, w2"
    # The head is in no pool.
    ray.nodes = []
    assert look(pools=scaled(), probe="proxies")["bad"]["nodes"] == "not in the cluster: h1"


def test_fewer_than_the_least_or_more_than_the_most_is_told(look: Callable[..., Json], ray: FakeRay) -> None:
    bad = look(pools=scaled(most=1), probe="proxies")["bad"]
    assert bad == {"nodes": "gpus has 2 nodes, and at most 1 are to be there"}
    ray.nodes[2]["state"] = "DEAD"
    assert look(pools=scaled(1), probe="proxies")["bad"] == {}
    bad = look(pools=scaled(2), probe="proxies")["bad"]
    assert bad == {"nodes": "gpus has 1 nodes, and at least 2 are to be there"}
    # Who is kept out cannot come.
    assert look(pools=scaled(2), excused={"w2": "in maintenance"}, probe="proxies")["bad"] == {}


@pytest.mark.parametrize(("patience", "comes"), [(900, True), (60, False)])
def test_a_host_that_has_to_boot_is_waited_for(
    look: Callable[..., Json], ray: FakeRay, monkeypatch: pytest.MonkeyPatch, patience: int, comes: bool
) -> None:
    ray.nodes[2]["state"] = "DEAD"
    began, read = probe.time.time(), probe.read_nodes

    def later(*given: Any) -> Any:
        if probe.time.time() - began > 600:
            ray.nodes[2]["state"] = "ALIVE"
        return read(*given)

    monkeypatch.setattr(probe, "read_nodes", later)
    assert look(pools=scaled(2), node_timeout_s=patience, probe="proxies")["by_name"]["nodes"]["ok"] is comes


def test_a_node_that_died(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.nodes[1]["state"] = "DEAD"
    seen = look()
    assert seen["bad"]["nodes"] == "not in the cluster: w1"
    assert [node["alive"] for node in seen["nodes"]] == [True, False, True]


def test_a_node_that_came_back_is_one(look: Callable[..., Json], ray: FakeRay) -> None:
    """Ray goes on listing the dead one under the same address."""
    ray.nodes.insert(0, {**ray.nodes[1], "node_id": "old", "state": "DEAD"})
    ray.nodes.append({**ray.nodes[2], "node_id": "older", "state": "DEAD"})
    seen = look()
    assert seen["bad"] == {}
    assert len(seen["nodes"]) == 3


def test_an_app_that_is_not_there(look: Callable[..., Json]) -> None:
    wanted = [{"name": "other", "route_prefix": "/", "model_id": MODEL, "llm": True}]
    assert look(apps=wanted)["bad"] == {"other state": "it is not deployed"}


def test_an_app_that_does_not_run(look: Callable[..., Json], ray: FakeRay) -> None:
    app = ray.serve["applications"]["tiny"]
    app.update(status="DEPLOY_FAILED", message="No module named 'vllm'")
    assert look()["bad"]["tiny state"] == "DEPLOY_FAILED: No module named 'vllm'"


def test_replicas_that_have_not_started(look: Callable[..., Json], ray: FakeRay) -> None:
    for replica in ray.deployments[SERVER]["replicas"]:
        replica["state"] = "STARTING"
    ray.serve["applications"]["tiny"]["status"] = "DEPLOYING"
    bad = look()["bad"]
    assert "DEPLOYING" in bad["tiny state"]
    assert "no replica runs" in bad["tiny replicas"]


def test_a_replica_that_waits_for_its_host_is_only_more_to_come(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.deployments[SERVER]["replicas"][1]["state"] = "STARTING"
    seen = look()
    assert seen["bad"] == {}
    assert "all 1 replicas answered" in seen["by_name"]["tiny replicas"]["detail"]
    # Where the app does not run, it is missed.
    ray.serve["applications"]["tiny"]["status"] = "DEPLOYING"
    assert "no answer counted from replica-w2" in look()["bad"]["tiny replicas"]


@pytest.mark.parametrize("last", [[], [{"state": "STOPPING"}]])
def test_an_app_that_sleeps_is_not_woken(look: Callable[..., Json], ray: FakeRay, last: list[Json]) -> None:
    """Its min_replicas is 0, and its ingress is there: a question would switch hosts on."""
    (ingress, *_) = replicas = ray.deployments[SERVER]["replicas"]
    ray.deployments["OpenAiIngress"]["replicas"] = [{**ingress, "replica_id": "ingress"}]
    ray.deployments[SERVER]["replicas"] = [{**replicas[1], **one} for one in last]
    seen = look()
    assert seen["bad"] == {}
    assert "none is asked for" in seen["by_name"]["tiny replicas"]["detail"]
    assert not ray.asked


def test_a_wrong_model(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.models = ["another"]
    bad = look(probe="proxies")["bad"]
    assert bad[f"tiny models via {W1}"] == f"{MODEL} is not among another"
    assert "answered 404" in bad[f"tiny chat via {W1}"]
    assert f"tiny stream via {W2}" in bad


def test_an_answer_without_a_token(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.tokens = 0
    bad = look(probe="proxies")["bad"]
    assert bad[f"tiny chat via {W1}"] == "an answer without a token"
    assert "0 tokens" in bad[f"tiny stream via {W1}"]


def test_a_stream_without_its_end(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.stream_end = ""
    assert look(probe="proxies")["bad"] == {
        f"tiny stream via {address}": "the stream ended after 3 chunks and 3 tokens, [DONE] False"
        for address in (W1, W2)
    }


def test_a_stream_of_something_else(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.stream_end = "data: {half a chunk\n\n"
    assert set(look(probe="proxies")["bad"]) == {f"tiny stream via {W1}", f"tiny stream via {W2}"}


def test_one_proxy_that_does_not_answer(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.down = {W2}
    seen = look(probe="proxies")
    assert set(seen["bad"]) == {f"tiny {what} via {W2}" for what in ("models", "chat", "stream")}
    assert "answered 503: no healthy replica" in seen["bad"][f"tiny chat via {W2}"]
    assert seen["answer"]["content"] == "nonsense"


def test_a_replica_that_is_never_counted(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.counted = False
    bad = look()["bad"]
    assert list(bad) == ["tiny replicas"]
    assert "no answer counted from replica-w1, replica-w2" in bad["tiny replicas"]


def test_a_replica_of_a_class_of_its_own_is_asked_too(look: Callable[..., Json], ray: FakeRay) -> None:
    """`server_class` gives the deployment another name; its replicas answer all the same."""
    ray.counted = False
    ray.deployments["MyServer:tiny-llama"] = ray.deployments.pop(SERVER)
    assert "no answer counted" in look()["bad"]["tiny replicas"]


def test_an_answer_that_breaks_off(look: Callable[..., Json], ray: FakeRay) -> None:
    """The other side closes in the middle: a failed check, not a broken module."""
    ray.cut = True
    bad = look()["bad"]
    assert list(bad) == ["head"]


# ------------------------------------------------------------------ a head that cannot be read


def test_no_token(look: Callable[..., Json], tmp_path: Path) -> None:
    seen = look(token_file=str(tmp_path / "absent"))
    assert seen["bad"] == {"head": "no token: No such file or directory"}
    assert not seen["reachable"]


def test_a_wrong_token(look: Callable[..., Json], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("wrong")
    seen = look()
    assert "answered 401" in seen["bad"]["head"]
    assert not seen["reachable"]


def test_no_head(look: Callable[..., Json]) -> None:
    with socket.create_server((HEAD, 0)) as unused:
        url = f"http://{HEAD}:{unused.getsockname()[1]}"
    seen = look(url=url)
    assert "refused" in seen["bad"]["head"]
    assert (seen["reachable"], seen["apps"]) == (False, [])


def test_serve_was_never_started(look: Callable[..., Json], ray: FakeRay) -> None:
    ray.serve = json.loads((Path(__file__).parent / "fixtures/empty.json").read_text())
    assert look(probe="none")["apps"] == []
    assert look()["bad"] == {"tiny state": "it is not deployed"}


def test_a_proxy_for_the_way_out_has_no_part_in_this(
    look: Callable[..., Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert look(probe="proxies")["bad"] == {}
