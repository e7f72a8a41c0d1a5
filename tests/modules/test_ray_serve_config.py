"""ray_serve_config: the plan as a table, and the module against answers recorded from Ray 2.60.0."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
TOKEN = "0123456789abcdef"

Json = dict[str, Any]


serve = load_module("ray_serve_config")


def recorded(name: str) -> Any:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def wanted(have: Json, **changes: Any) -> Json:
    """The normalised config that is exactly what runs."""
    want = {
        "proxy_location": have.get("proxy_location", "EveryNode"),
        "http_options": have.get("http_options", {"host": "127.0.0.1", "port": 8000}),
        "grpc_options": have.get("grpc_options", {"port": 9000}),
        "target_capacity": None,
        "applications": {name: app["deployed_app_config"] for name, app in have["applications"].items()},
    }
    return copy.deepcopy({**want, **changes})


def only(todo: Json) -> Json:
    """What is in the plan, without what is empty."""
    return {name: value for name, value in todo.items() if value}


# --------------------------------------------------------------------------- plan


def test_the_schema_makes_both_sides_equal() -> None:
    """What Serve says it runs is what was asked for, once both went through the schema: 2 and 2.0 included."""
    check = recorded("schema_llm")["answer"]
    assert check["errors"] == check["unknown"] == []
    have = recorded("running_llm")
    have["applications"]["tiny"]["deployed_app_config"] = check["have"]["tiny"]
    todo = serve.plan(have, check["want"])
    assert only(todo) == {"unchanged": ["tiny"]}
    assert not serve.is_change(todo)


def add(have: Json, want: Json) -> None:
    want["applications"]["new"] = {"name": "new"}


def change(have: Json, want: Json) -> None:
    want["applications"]["hello"]["route_prefix"] = "/other"


def remove(have: Json, want: Json) -> None:
    del want["applications"]["hello"]


def imperative(have: Json, want: Json) -> None:
    del want["applications"]["hello"]
    have["applications"]["hello"]["source"] = "imperative"


def leaving(have: Json, want: Json) -> None:
    del want["applications"]["hello"]
    have["applications"]["hello"]["status"] = "DELETING"


def wanted_again(have: Json, want: Json) -> None:
    have["applications"]["hello"]["status"] = "DELETING"


def never_deployed_by_config(have: Json, want: Json) -> None:
    have["applications"]["hello"]["deployed_app_config"] = None


def port(have: Json, want: Json) -> None:
    want["http_options"]["port"] = 8001


def location(have: Json, want: Json) -> None:
    want["proxy_location"] = "HeadOnly"


def capacity(have: Json, want: Json) -> None:
    want["target_capacity"] = 50.0


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda have, want: None, {"unchanged": ["hello"]}),
        (add, {"added": ["new"], "unchanged": ["hello"]}),
        (change, {"changed": ["hello"]}),
        (remove, {"removed": ["hello"]}),
        (imperative, {"foreign": ["hello"]}),
        (leaving, {}),
        (wanted_again, {"added": ["hello"]}),
        (never_deployed_by_config, {"changed": ["hello"]}),
        (port, {"unchanged": ["hello"], "fixed": [["http_options.port", 8000, 8001]]}),
        (location, {"unchanged": ["hello"], "fixed": [["proxy_location", "EveryNode", "HeadOnly"]]}),
        (capacity, {"unchanged": ["hello"], "capacity": True}),
    ],
)
def test_plan(edit: Callable[[Json, Json], None], expected: Json) -> None:
    have = recorded("running_hello")
    want = wanted(have)
    edit(have, want)
    todo = serve.plan(have, want)
    assert only(todo) == expected
    quiet = {"unchanged", "foreign", "fixed"}
    assert serve.is_change(todo) == bool(set(expected) - quiet)


@pytest.mark.parametrize(
    ("state", "failed", "deleted_first"),
    [
        ("build_failed", ["nomod"], []),
        ("replica_failed", ["broken"], ["broken"]),
        ("unhealthy", ["sick"], ["sick"]),
        ("unschedulable", [], []),
    ],
)
def test_failed_apps_are_deployed_again(state: str, failed: list[str], deleted_first: list[str]) -> None:
    have = recorded(state)
    todo = serve.plan(have, wanted(have))
    assert todo["failed"] == failed
    assert serve.is_change(todo) == bool(failed)
    assert serve.restartable(have, todo["failed"]) == deleted_first


def test_an_unhealthy_app_keeps_the_replicas_that_it_has() -> None:
    have = recorded("unhealthy")
    have["applications"]["sick"]["deployments"]["Sick"]["replicas"][0]["state"] = "RUNNING"
    assert serve.restartable(have, ["sick"]) == []


def test_options_of_a_serve_that_does_not_run_are_free() -> None:
    have = recorded("empty")
    want = wanted(have, http_options={"host": "0.0.0.0", "port": 1234}, applications={"new": {"name": "new"}})
    assert only(serve.plan(have, want)) == {"added": ["new"]}


# --------------------------------------------------------------------------- what people read


def test_summary_has_replicas_and_their_nodes() -> None:
    app = serve.summary(recorded("running_llm"))["tiny"]
    assert (app["name"], app["status"], app["route_prefix"]) == ("tiny", "RUNNING", "/")
    server = app["deployments"]["LLMServer:tiny-llama"]
    assert (server["status"], server["running_replicas"], server["target_replicas"]) == ("HEALTHY", 1, 1)
    assert set(server["replicas"][0]) == {"id", "state", "node_id", "node_ip", "pid"}


@pytest.mark.parametrize(
    ("state", "name", "says"),
    [
        ("build_failed", "nomod", ["is DEPLOY_FAILED", "ModuleNotFoundError: No module named 'nosuchmodule'"]),
        (
            "replica_failed",
            "broken",
            [
                "Broken is DEPLOY_FAILED with 0 of 1 replicas",
                "RuntimeError: no weights in /nowhere",
                "replica_broken_Broken_",
            ],
        ),
        ("unhealthy", "sick", ["is UNHEALTHY", "RuntimeError: the disk is full"]),
        ("unschedulable", "big", ["taken more than 30s to be scheduled", '{"CPU": 64.0}']),
    ],
)
def test_a_complaint_holds_what_happened_and_no_traceback(state: str, name: str, says: list[str]) -> None:
    text = serve.complaint(name, recorded(state)["applications"][name])
    for part in says:
        assert part in text
    assert "Traceback" not in text
    assert 'File "' not in text
    assert "\x1b" not in text


def test_the_diff_hides_what_looks_secret() -> None:
    have = recorded("running_llm")
    want = wanted(have)
    env = want["applications"]["tiny"]["args"]["llm_configs"][0]["runtime_env"]["env_vars"]
    env.update(HF_TOKEN="hf_verysecret", NCCL_DEBUG="INFO")
    shown = json.dumps(serve.difference(have, want, serve.plan(have, want)))
    assert "hf_verysecret" not in shown
    assert "NCCL_DEBUG" in shown


def test_a_list_below_a_secret_name_is_hidden() -> None:
    assert serve.hide({"api_keys": ["one", {"x": 1}], "words": ["two"]}) == {
        "api_keys": ["<hidden>", {"x": 1}],
        "words": ["two"],
    }


def scale(app: Json) -> None:
    app["deployments"] = [{"name": "LLMServer:tiny-llama", "num_replicas": 3}]


def scale_automatically(app: Json) -> None:
    app["deployments"] = [{"name": "LLMServer:tiny-llama", "autoscaling_config": {"max_replicas": 3}}]


def pin_to_a_gpu(app: Json) -> None:
    app["deployments"] = [{"name": "LLMServer:tiny-llama", "ray_actor_options": {"num_gpus": 1}}]


def ask_replicas_more_often(app: Json) -> None:
    router = {"request_routing_stats_period_s": 1}
    app["deployments"] = [{"name": "LLMServer:tiny-llama", "request_router_config": router}]


def give_another_model(app: Json) -> None:
    app["args"]["llm_configs"][0]["model_loading_config"]["model_id"] = "other"


def move(app: Json) -> None:
    app["route_prefix"] = "/elsewhere"


@pytest.mark.parametrize(
    ("edit", "key", "replaces"),
    [
        (scale, "deployments.LLMServer:tiny-llama.num_replicas", False),
        # Serve counts the list of the deployments' policies as code, and this makes it longer.
        (scale_automatically, "deployments.LLMServer:tiny-llama.autoscaling_config.max_replicas", True),
        (pin_to_a_gpu, "deployments.LLMServer:tiny-llama.ray_actor_options.num_gpus", True),
        (
            ask_replicas_more_often,
            "deployments.LLMServer:tiny-llama.request_router_config.request_routing_stats_period_s",
            False,
        ),
        (give_another_model, "args.llm_configs.0.model_loading_config.model_id", True),
        (move, "route_prefix", False),
    ],
)
def test_a_plan_names_the_keys_and_whether_replicas_are_replaced(
    edit: Callable[[Json], None], key: str, replaces: bool
) -> None:
    have = recorded("running_llm")
    have["applications"]["tiny"]["deployed_app_config"]["deployments"] = []
    want = wanted(have)
    edit(want["applications"]["tiny"])
    (told,) = serve.described(have, want, serve.plan(have, want))
    assert (told["what"], told["name"]) == ("app", "tiny")
    assert key in told["wanted"]
    assert told.get("disrupts") == (["app"] if replaces else None)


def test_a_plan_shows_apps_that_come_and_go_without_their_secrets() -> None:
    have = recorded("running_hello")
    want = wanted(have, applications={"new": {"name": "new", "runtime_env": {"env_vars": {"HF_TOKEN": "hf_secret"}}}})
    added, removed = serve.described(have, want, serve.plan(have, want))
    assert (added["name"], added["actual"], added.get("disrupts")) == ("new", "missing", None)
    assert "hf_secret" not in json.dumps(added)
    assert (removed["name"], removed["wanted"], removed["disrupts"]) == ("hello", "gone", ["app"])
    changed = wanted(have)
    changed["applications"]["hello"]["runtime_env"] = {"env_vars": {"HF_TOKEN": "hf_secret"}}
    (told,) = serve.described(have, changed, serve.plan(have, changed))
    assert told["wanted"]["runtime_env.env_vars.HF_TOKEN"] == "<hidden>"


def test_unknown_keys_are_named_with_those_that_exist() -> None:
    found = dict(recorded("schema_wrong")["answer"]["unknown"])
    assert "max_ongoing_requests" in found["applications[hello].deployments[Hello].max_concurrent_queries"]
    scaling = "applications[hello].deployments[Hello].autoscaling_config.target_num_ongoing_requests_per_replica"
    assert "target_ongoing_requests" in found[scaling]
    assert "applications" in found["bogus"]


@pytest.mark.parametrize(
    ("status", "trigger", "ready"),
    [
        ("HEALTHY", "CONFIG_UPDATE_COMPLETED", True),
        ("UPSCALING", "AUTOSCALING", True),
        ("DOWNSCALING", "AUTOSCALING", True),
        ("UPSCALING", "CONFIG_UPDATE_STARTED", False),
        ("UPDATING", "CONFIG_UPDATE_STARTED", False),
        ("UNHEALTHY", "HEALTH_CHECK_FAILED", False),
    ],
)
def test_ready_means_every_deployment(status: str, trigger: str, ready: bool) -> None:
    app = recorded("running_llm")["applications"]["tiny"]
    app["deployments"]["OpenAiIngress"].update(status=status, status_trigger=trigger)
    assert serve.is_ready(app) is ready


# --------------------------------------------------------------------------- over HTTP


class Dashboard:
    """Ray's dashboard as far as the module sees it: recorded answers, and what was sent."""

    def __init__(self) -> None:
        self.answers: list[Json] = [recorded("empty")]
        self.sent: list[tuple[str, Json | None]] = []
        self.put_answer = (200, "")
        dashboard = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def refused(self) -> bool:
                given = self.headers.get("Authorization")
                if given is None:
                    self.reply(401, "Unauthorized: Missing authentication token")
                elif given != f"Bearer {TOKEN}":
                    self.reply(403, "Forbidden: Invalid authentication token")
                return given != f"Bearer {TOKEN}"

            def do_GET(self) -> None:
                if not self.refused():
                    answers = dashboard.answers
                    self.reply(200, json.dumps(answers.pop(0) if len(answers) > 1 else answers[0]))

            def do_PUT(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self.refused():
                    dashboard.sent.append(("PUT", body))
                    self.reply(*dashboard.put_answer)

            def do_DELETE(self) -> None:
                if not self.refused():
                    dashboard.sent.append(("DELETE", None))
                    self.reply(200, "")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(serve.time, "sleep", lambda seconds: None)
    running = Dashboard()
    yield running
    running.server.shutdown()
    running.server.server_close()


def test_the_client_ignores_proxies_of_the_environment(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert serve.Client(dashboard.url, TOKEN).get() == recorded("empty")


@pytest.mark.parametrize(("token", "says"), [(None, "wants a token and got none"), ("wrong", "refuses the token")])
def test_a_wrong_token_is_told_with_the_fix(dashboard: Dashboard, token: str | None, says: str) -> None:
    with pytest.raises(serve.ServeError, match=says) as caught:
        serve.Client(dashboard.url, token).get()
    assert "token_file" in str(caught.value)


def test_no_head_is_told_with_the_fix(dashboard: Dashboard) -> None:
    dashboard.server.shutdown()
    dashboard.server.server_close()
    with pytest.raises(serve.NotReachable, match="Is the head started"):
        serve.Client(dashboard.url, TOKEN).get()


def test_a_refused_config_is_told_in_serves_words(dashboard: Dashboard) -> None:
    dashboard.put_answer = (400, "1 validation error for ServeDeploySchema")
    with pytest.raises(serve.ServeError, match="refused the config: 1 validation error"):
        serve.Client(dashboard.url, TOKEN).put({})


def answer_with(name: str, status: str, time: float) -> Json:
    have: Json = recorded("running_hello")
    have["applications"]["hello"].update(status=status, last_deployed_time_s=time)
    return have


def test_waits_until_the_apps_run(dashboard: Dashboard) -> None:
    dashboard.answers = [
        recorded("empty"),
        answer_with("hello", "DEPLOYING", 2.0),
        answer_with("hello", "RUNNING", 2.0),
    ]
    client = serve.Client(dashboard.url, TOKEN)
    have = serve.wait_ready(client, ["hello"], {}, 60, sleep=lambda seconds: None)
    assert have["applications"]["hello"]["status"] == "RUNNING"


def test_an_old_failure_is_no_news_and_a_new_one_is(dashboard: Dashboard) -> None:
    old = answer_with("hello", "DEPLOY_FAILED", 1.0)
    dashboard.answers = [old, old, answer_with("hello", "RUNNING", 2.0)]
    client = serve.Client(dashboard.url, TOKEN)
    serve.wait_ready(client, ["hello"], {"hello": 1.0}, 60, sleep=lambda seconds: None)

    dashboard.answers = [old, answer_with("hello", "DEPLOY_FAILED", 2.0)]
    with pytest.raises(serve.ServeError, match="app hello is DEPLOY_FAILED") as caught:
        serve.wait_ready(client, ["hello"], {"hello": 1.0}, 60, sleep=lambda seconds: None)
    assert caught.value.have["applications"]["hello"]["last_deployed_time_s"] == 2.0


def test_says_what_is_late(dashboard: Dashboard) -> None:
    dashboard.answers = [recorded("unschedulable")]
    ticks = iter(range(0, 1000, 10))
    client = serve.Client(dashboard.url, TOKEN)
    with pytest.raises(serve.ServeError, match="not ready after 30 s:\napp big is DEPLOYING"):
        serve.wait_ready(client, ["hello", "big"], {}, 30, clock=lambda: next(ticks), sleep=lambda seconds: None)


# --------------------------------------------------------------------------- the whole module


class Exit(Exception):
    def __init__(self, result: Json, failed: bool) -> None:
        super().__init__(result.get("msg", ""))
        self.result = result
        self.failed = failed


class FakeAnsible:
    """AnsibleModule at its edges: parameters in, one result out, and the schema check as it was recorded."""

    def __init__(self, params: Json, check_mode: bool) -> None:
        self.params = params
        self.check_mode = check_mode
        self.warnings: list[str] = []
        self.checked: list[Json] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def run_command(self, command: list[str], data: str, **_: Any) -> tuple[int, str, str]:
        given = json.loads(data)
        self.checked.append(given)
        applications = {app["name"]: app for app in given["config"]["applications"]}
        defaults = recorded("schema_llm")["answer"]["want"]
        want = {**defaults, "applications": applications}
        want["http_options"] = {**defaults["http_options"], **given["config"].get("http_options", {})}
        return 0, "\n" + json.dumps({"unknown": [], "errors": [], "want": want, "have": given["have"]}), ""

    def exit_json(self, **result: Any) -> None:
        raise Exit(result, False)

    def fail_json(self, **result: Any) -> None:
        raise Exit(result, True)


def run(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_mode: bool = False, **params: Any
) -> Exit:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    given = {
        "state": "present",
        "url": dashboard.url,
        "token_file": str(token),
        "config": None,
        "ray_python": __file__,  # has to be there; the recorded schema check stands for it
        "environment": {},
        "history": None,
        "number": None,
        "rollout": "auto",
        "pools": {},
        "restart_serve": False,
        "details": False,
        "wait_timeout_s": 60,
        **params,
    }
    module = FakeAnsible(given, check_mode)
    monkeypatch.setattr(serve, "AnsibleModule", lambda **_: module)
    with pytest.raises(Exit) as caught:
        serve.main()
    caught.value.result["warnings"] = module.warnings
    return caught.value


def config_of(have: Json, **changes: Any) -> Json:
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [app["deployed_app_config"] for app in have["applications"].values()],
        **changes,
    }


def test_nothing_is_sent_when_nothing_differs(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = recorded("running_llm")
    dashboard.answers = [have]
    done = run(dashboard, tmp_path, monkeypatch, config=config_of(have))
    assert not done.failed, done
    assert done.result["changed"] is False
    assert done.result["plan"]["unchanged"] == ["tiny"]
    assert list(done.result["proxies"].values()) == ["HEALTHY"]
    assert dashboard.sent == []


def test_the_whole_config_is_sent_on_a_difference(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = answer_with("hello", "RUNNING", 1.0)
    config = config_of(have)
    config["applications"][0]["route_prefix"] = "/other"
    dashboard.answers = [answer_with("hello", "RUNNING", 1.0), answer_with("hello", "RUNNING", 2.0)]
    done = run(dashboard, tmp_path, monkeypatch, config=config)
    assert not done.failed, done
    assert done.result["plan"]["changed"] == ["hello"]
    assert dashboard.sent == [("PUT", config)]
    assert '"/hello"' in done.result["diff"]["before"]
    assert '"/other"' in done.result["diff"]["after"]


def test_check_mode_sends_nothing(dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard.answers = [recorded("running_hello")]
    done = run(dashboard, tmp_path, monkeypatch, check_mode=True, config={"applications": []})
    assert (done.failed, done.result["changed"]) == (False, True)
    assert done.result["plan"]["removed"] == ["hello"]
    assert dashboard.sent == []


def test_check_mode_before_there_is_a_cluster(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard.server.shutdown()
    dashboard.server.server_close()
    missing = str(tmp_path / "not-yet")
    config = {"applications": [{"name": "new"}]}
    for ray_python in (__file__, missing):
        done = run(dashboard, tmp_path, monkeypatch, True, config=config, ray_python=ray_python, token_file=missing)
        assert (done.failed, done.result["changed"]) == (False, True)
        assert done.result["plan"]["added"] == ["new"]
        assert done.result["warnings"]


def test_a_failed_app_is_taken_away_and_sent_again(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = recorded("replica_failed")
    gone = copy.deepcopy(have)
    del gone["applications"]["broken"]
    well = copy.deepcopy(have)
    well["applications"]["broken"].update(status="RUNNING", last_deployed_time_s=9e9)
    well["applications"]["broken"]["deployments"]["Broken"]["status"] = "HEALTHY"
    dashboard.answers = [have, gone, well]
    config = config_of(have)
    done = run(dashboard, tmp_path, monkeypatch, config=config)
    assert not done.failed, done
    assert (done.result["changed"], done.result["plan"]["failed"]) == (True, ["broken"])
    names = [sorted(app["name"] for app in body["applications"]) for _, body in dashboard.sent if body]
    assert names == [["hello"], ["broken", "hello"]]


def test_options_that_cannot_change_fail_and_nothing_is_sent(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = recorded("running_hello")
    dashboard.answers = [have]
    config = config_of(have, http_options={"host": "127.0.0.1", "port": 8001})
    done = run(dashboard, tmp_path, monkeypatch, config=config)
    assert done.failed
    assert "http_options.port is 8000, declared is 8001" in str(done)
    assert "clusterkit_allow_disruption" in str(done)
    assert dashboard.sent == []


def test_options_that_cannot_change_are_in_the_plan_and_restart_serve_by_consent(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = recorded("running_hello")
    config = config_of(have, http_options={"host": "127.0.0.1", "port": 8001})
    dashboard.answers = [have]
    planned = run(dashboard, tmp_path, monkeypatch, check_mode=True, config=config)
    assert not planned.failed, planned
    (option,) = planned.result["changes"]
    assert (option["name"], option["actual"], option["wanted"]) == ("http_options.port", 8000, 8001)
    assert (planned.result["changed"], option["left"]) == (False, True)

    consent = run(dashboard, tmp_path, monkeypatch, check_mode=True, config=config, restart_serve=True)
    assert consent.result["changed"] is True
    assert [change.get("disrupts") for change in consent.result["changes"]] == [None, ["app"]]
    assert dashboard.sent == []

    dashboard.answers = [have, recorded("empty"), answer_with("hello", "RUNNING", 2.0)]
    done = run(dashboard, tmp_path, monkeypatch, config=config, restart_serve=True)
    assert not done.failed, done
    assert dashboard.sent == [("DELETE", None), ("PUT", config)]


class Silent:
    """Ray, where it does not say what its nodes have."""

    def state(self, kind: str) -> Any:
        raise serve.ServeError(kind)


@pytest.mark.parametrize(
    ("own", "wish", "how"),
    [({}, "auto", "in_place"), ({}, "surge", "surge"), ({"max_surge_percent": 50}, "auto", "surge")],
)
def test_what_the_config_says_of_its_rollout_comes_first(own: Json, wish: str, how: str) -> None:
    have = recorded("running_hello")
    want = wanted(have)
    want["applications"]["hello"]["args"] = {"word": "other"}
    want["applications"]["hello"]["deployments"][0].update(own)
    todo = serve.plan(have, want)
    (rollout,) = serve.survey(Silent(), have, want, todo, wish)
    assert (rollout["how"], rollout["room"]) == (how, None)
    assert ("nobody could say" in serve.in_words(rollout)) == (how == "in_place")
    (app,) = serve.composed({"applications": list(want["applications"].values())}, have, todo, [rollout])[
        "applications"
    ]
    assert (
        app["deployments"][0].get("max_surge_percent")
        == {"in_place": None, "surge": own.get("max_surge_percent", 100)}[how]
    )


class Roomy:
    """Ray whose nodes hold one replica of Hello, and have room for another where `cpus` is 2."""

    def __init__(self, cpus: float, **pools: int) -> None:
        node = {"state": "ALIVE", "is_head_node": False, "resources_total": {"CPU": cpus}}
        nodes = [(pool, number) for pool, count in pools.items() for number in range(count)]
        self.nodes = [{**node, "node_id": f"{p}{n}", "labels": {"ray.io/node-group": p}} for p, n in nodes]

    def state(self, kind: str) -> Any:
        (replica,) = recorded("running_hello")["applications"]["hello"]["deployments"]["Hello"]["replicas"]
        actor = {"state": "ALIVE", "required_resources": {"CPU": 1.0}, "placement_group_id": None}
        actors = [{**actor, "node_id": node["node_id"], "name": "other"} for node in self.nodes[1:]]
        actors.append({**actor, "node_id": self.nodes[0]["node_id"], "name": replica["actor_name"]})
        return {"nodes": self.nodes, "placement_groups": [], "actors": actors}[kind]


def surveyed(client: Any, wish: str, pools: Json, **app: Any) -> tuple[Json, Json]:
    """The rollout of an app whose argument changes, and the app that is sent."""
    have = recorded("running_hello")
    want = wanted(have)
    want["applications"]["hello"].update({"args": {"word": "other"}, **app})
    todo = serve.plan(have, want)
    (rollout,) = serve.survey(client, have, want, todo, wish, pools)
    sent = serve.composed({"applications": list(want["applications"].values())}, have, todo, [rollout])
    return rollout, sent["applications"][0]


@pytest.mark.parametrize("wish", ["auto", "surge", "one_at_a_time"])
def test_a_deployment_that_the_config_does_not_name_is_replaced_in_place(wish: str) -> None:
    rollout, sent = surveyed(Roomy(2, a=1), wish, {}, deployments=[])
    assert (rollout["how"], rollout["room"], rollout["unnamed"]) == ("in_place", 1, ["Hello"])
    assert "as the config does not name Hello. Until they run, Hello has none" in serve.in_words(rollout)
    assert sent["deployments"] == []
    named, sent = surveyed(Roomy(2, a=1), "auto", {})
    assert (named["how"], named["unnamed"], sent["deployments"][0]["max_surge_percent"]) == ("surge", [], 100)


def test_only_the_pool_of_the_replica_gives_it_room() -> None:
    full, _ = surveyed(Roomy(1, a=2), "auto", {"a": 2, "b": 4})
    assert (full["how"], full["room"]) == ("in_place", 0)
    grows, _ = surveyed(Roomy(1, a=2), "auto", {"a": 3, "b": 4})
    assert (grows["how"], grows["room"]) == ("surge", 1)


# --------------------------------------------------------------------------- history


class Serve(Dashboard):
    """Serve as far as its answers go: what is sent runs, unless its arguments say `fail`."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0.0
        self.dies = False
        self.loads = False  # what is sent needs a while
        self.incurable = ""  # an app that fails again, however often it is sent
        self.answers = [{"applications": {}}]

    def run(self, config: Json) -> None:
        """What the next answers tell."""
        self.clock += 1
        have = copy.deepcopy(self.answers[-1])
        before, apps = have["applications"], {}
        for app in config["applications"]:
            old = before.get(app["name"])
            if old and old["deployed_app_config"] == app and old["status"] != "DEPLOY_FAILED":
                apps[app["name"]] = old
                continue
            bad = app.get("args", {}).get("fail") or app["name"] == self.incurable
            state = "DEPLOY_FAILED" if bad else "RUNNING"
            apps[app["name"]] = {
                **answer_with("hello", state, self.clock)["applications"]["hello"],
                "message": "no weights" if state == "DEPLOY_FAILED" else "",
                "deployed_app_config": app,
                "deployments": {},
            }
        self.answers = [{**recorded("running_hello"), "applications": apps}]
        if self.loads:
            self.answers = [copy.deepcopy(self.answers[0])] * 3 + self.answers
            for app in self.answers[0]["applications"].values():
                if app["status"] == "RUNNING":
                    app["status"] = "DEPLOYING"

    def words(self) -> list[str]:
        """The argument of each app that runs."""
        return [app["deployed_app_config"]["args"]["word"] for app in self.answers[-1]["applications"].values()]


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setattr(serve.time, "sleep", lambda seconds: None)
    running = Serve()
    put = serve.Client.put

    def sent(client: Any, config: Json) -> None:
        put(client, config)
        running.run(config)
        if running.dies:
            raise KeyboardInterrupt

    monkeypatch.setattr(serve.Client, "put", sent)
    yield running
    running.server.shutdown()
    running.server.server_close()


def says(word: str, **more: Any) -> Json:
    app = {"name": "hello", "route_prefix": "/", "import_path": "hello:build", "args": {"word": word, **more}}
    return {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [app]}


@pytest.fixture
def send(live: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Exit]:
    def applied(config: Json | None = None, **more: Any) -> Exit:
        given = {"config": config, "history": str(tmp_path / "history"), "details": True, **more}
        return run(live, tmp_path, monkeypatch, **given)

    return applied


def outcomes(done: Exit) -> list[tuple[int, str]]:
    return [(entry["number"], entry["outcome"]) for entry in done.result["history"]]


def test_a_failed_config_is_taken_back(live: Serve, send: Callable[..., Exit], tmp_path: Path) -> None:
    assert not send(says("good")).failed
    failed = send(says("bad", fail=True))
    assert failed.failed
    assert "app hello is DEPLOY_FAILED: no weights" in str(failed)
    assert "The config that ran before (number 1 of" in str(failed)
    assert failed.result["restored"] == 1
    assert live.words() == ["good"]
    again = send(says("good"))
    assert (again.result["changed"], again.result["runs"]) == (False, 1)
    assert outcomes(again) == [(1, "good"), (2, "failed")]
    # They hold what the config holds: nobody else reads them.
    files = sorted((tmp_path / "history").iterdir())
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o700
    assert not any("config" in entry for entry in again.result["history"])


def test_without_a_history_nothing_is_taken_back(live: Serve, send: Callable[..., Exit]) -> None:
    send(says("good"), history=None)
    failed = send(says("bad", fail=True), history=None)
    assert failed.failed
    assert live.words() == ["bad"]


def test_with_no_earlier_config_things_are_left(live: Serve, send: Callable[..., Exit]) -> None:
    failed = send(says("bad", fail=True))
    assert "Everything is left as it is now: no config is known that ran before" in str(failed)
    assert live.words() == ["bad"]


def test_what_an_older_kit_left_running_is_gone_back_to(live: Serve, send: Callable[..., Exit]) -> None:
    live.run(says("old"))
    send(says("bad", fail=True))
    assert live.words() == ["old"]


def test_a_config_that_fails_later_is_not_exchanged_for_an_older_one(live: Serve, send: Callable[..., Exit]) -> None:
    send(says("older"))
    send(says("newer"))
    live.answers[-1]["applications"]["hello"]["status"] = "UNHEALTHY"
    failed = send(says("newer"), wait_timeout_s=0)
    assert failed.failed
    assert live.words() == ["newer"]


def test_a_run_that_was_killed_is_no_success_and_is_finished_by_the_next(
    live: Serve, send: Callable[..., Exit]
) -> None:
    send(says("good"))
    live.dies = True
    with pytest.raises(KeyboardInterrupt):
        send(says("next"))
    live.dies = False
    looked = send(says("next"), check_mode=True)
    assert outcomes(looked) == [(1, "good"), (2, "started")]
    assert outcomes(send(says("next"))) == [(1, "good"), (2, "good")]

    live.dies = True
    with pytest.raises(KeyboardInterrupt):
        send(says("bad", fail=True))
    live.dies = False
    assert send(says("bad", fail=True)).failed
    assert live.words() == ["next"]


def test_what_a_killed_run_left_loading_is_taken_back(live: Serve, send: Callable[..., Exit]) -> None:
    send(says("good"))
    live.dies = True
    with pytest.raises(KeyboardInterrupt):
        send(says("stuck"))
    live.dies = False
    live.answers[-1]["applications"]["hello"]["status"] = "DEPLOYING"
    assert send(says("stuck"), wait_timeout_s=0).failed
    assert live.words() == ["good"]


def with_other(config: Json, *names: str, **more: Any) -> Json:
    others = [{**says(name, **more)["applications"][0], "name": name} for name in names]
    return {**config, "applications": [*config["applications"], *others]}


@pytest.mark.parametrize("state", ["DEPLOYING", "UNHEALTHY", "DEPLOY_FAILED"])
def test_another_apps_illness_takes_no_removal_back(live: Serve, send: Callable[..., Exit], state: str) -> None:
    send(with_other(says("good"), "ill", "old", fail=False))
    live.answers[-1]["applications"]["ill"]["status"] = state
    # It goes on failing, if it is sent again.
    live.incurable = "ill"
    failed = send(with_other(says("good"), "ill", fail=False), wait_timeout_s=0)
    assert "app ill is" in str(failed)
    assert "Nothing is taken back for it" in str(failed)
    assert live.words() == ["good", "ill"]


def test_an_app_that_fails_while_what_was_changed_still_loads(live: Serve, send: Callable[..., Exit]) -> None:
    send(with_other(says("good"), "ill"))
    live.answers[-1]["applications"]["ill"]["status"] = "DEPLOY_FAILED"
    live.incurable, live.loads = "ill", True
    failed = send(with_other(says("better"), "ill"))
    assert "app ill is DEPLOY_FAILED" in str(failed)
    assert "The apps that were changed run, and stay as declared" in str(failed)
    assert live.words() == ["better", "ill"]


@pytest.mark.parametrize("state", ["DEPLOYING", "UNHEALTHY", "DEPLOY_FAILED"])
def test_another_apps_illness_takes_nothing_back(live: Serve, send: Callable[..., Exit], state: str) -> None:
    def two(word: str, **more: Any) -> Json:
        return with_other(says(word, **more), "ill")

    send(two("good"))
    live.answers[-1]["applications"]["ill"]["status"] = state
    live.incurable = "ill"
    failed = send(two("better"), wait_timeout_s=0)
    assert f"app ill is {state}" in str(failed)
    assert "The apps that were changed run, and stay as declared" in str(failed)
    assert live.words() == ["better", "ill"]
    # The same again, with nothing to change.
    assert send(two("better"), wait_timeout_s=0).failed
    assert live.words() == ["better", "ill"]
    # What failed by itself is taken back, and nobody waits for the other.
    failed = send(two("bad", fail=True), wait_timeout_s=0)
    assert "was put back, and runs\nFix" in str(failed)
    assert live.words() == ["good", "ill"]


def coded(word: str, path: Path, **more: Any) -> Json:
    config = says(word, **more)
    config["applications"][0]["runtime_env"] = {"working_dir": path.as_uri()}
    return config


def test_a_config_whose_code_is_gone_is_not_sent_again(live: Serve, send: Callable[..., Exit], tmp_path: Path) -> None:
    old, new = tmp_path / "old.zip", tmp_path / "new.zip"
    for code in (old, new):
        code.touch()
    send(coded("old", old))
    send(coded("new", new))
    old.unlink()
    puts = len(live.sent)
    for check_mode in (False, True):
        back = send(state="restored", check_mode=check_mode)
        assert f"the code of app hello of config 1 is gone from this head: {old} is missing" in str(back)
        assert "Fix: check out that code, and apply it" in str(back)
    assert len(live.sent) == puts

    new.unlink()
    failed = send(coded("bad", tmp_path, fail=True))
    assert "app hello is DEPLOY_FAILED" in str(failed)
    assert "Everything is left as it is now: the code of app hello of config 2 is gone" in str(failed)
    assert "sent again" not in str(failed)
    assert (len(live.sent), live.words()) == (puts + 1, ["bad"])


def test_a_refusal_after_the_consent_to_restart_brings_the_apps_back(
    live: Serve, send: Callable[..., Exit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_client: Any, _timeout_s: float) -> None:
        live.answers = [recorded("empty")]

    put = serve.Client.put

    def picky(client: Any, config: Json) -> None:
        if config["http_options"]["port"] == 8001:
            raise serve.Refused("Serve refused the config")
        put(client, config)

    monkeypatch.setattr(serve.Client, "delete", stop)
    monkeypatch.setattr(serve.Client, "put", picky)
    send(says("good"))
    failed = send({**says("good"), "http_options": {"host": "127.0.0.1", "port": 8001}}, restart_serve=True)
    assert "Serve refused the config" in str(failed)
    assert failed.result["restored"] == 1
    assert live.words() == ["good"]


def test_a_history_that_cannot_be_written_stops_before_anything_is_sent(
    live: Serve, send: Callable[..., Exit], tmp_path: Path
) -> None:
    (tmp_path / "history").write_text("a file")
    failed = send(says("good"))
    assert "the history of configs cannot be kept" in str(failed)
    assert live.sent == []


def test_going_back(live: Serve, send: Callable[..., Exit]) -> None:
    for word in ("one", "two", "three"):
        send(says(word))
    back = send(state="restored")
    assert (back.result["number"], live.words()) == (2, ["two"])
    first = send(state="restored", number=1)
    assert (first.result["changed"], live.words()) == (True, ["one"])
    assert send(state="restored", number=1).result["changed"] is False
    failed = send(says("bad", fail=True))
    assert live.words() == ["one"]
    refused = send(state="restored", number=6)
    assert "config 6 was never seen to run: those that ran are 1, 2, 3, 4, 5" in str(refused)
    assert failed.failed
    assert refused.failed


def test_twenty_are_kept_and_always_the_last_good_one(live: Serve, send: Callable[..., Exit]) -> None:
    send(says("good"))
    for number in range(22):
        send(says(str(number), fail=True))
    kept = outcomes(send(says("good")))
    assert len(kept) == 21
    assert kept[0] == (1, "good")
    assert live.words() == ["good"]


def test_an_app_that_stays_gets_what_it_has(live: Serve, send: Callable[..., Exit]) -> None:
    """How it was rolled out is part of what it runs with: sent otherwise, Serve would take it for a change."""
    config = says("a")
    config["applications"][0]["deployments"] = [{"name": "Hello", "num_replicas": 1}]
    running = copy.deepcopy(config)
    running["applications"][0]["deployments"][0]["max_surge_percent"] = 1
    live.run(running)
    assert send(config).result["changed"] is False
    config["applications"].append({**says("b")["applications"][0], "name": "other", "route_prefix": "/other"})
    assert not send(config).failed
    assert live.sent[-1][1]["applications"][0] == running["applications"][0]


def test_absent_shuts_serve_down_once(dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard.answers = [recorded("running_hello"), recorded("empty")]
    done = run(dashboard, tmp_path, monkeypatch, state="absent")
    assert (done.result["changed"], done.result["plan"]["removed"]) == (True, ["hello"])
    assert dashboard.sent == [("DELETE", None)]
    assert run(dashboard, tmp_path, monkeypatch, state="absent").result["changed"] is False
    assert dashboard.sent == [("DELETE", None)]


@pytest.mark.parametrize("text", ["", "two words", "two\nlines"])
def test_a_token_file_holds_one_token(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    done = run(dashboard, tmp_path, monkeypatch, token_file=str(path), config={"applications": []})
    assert done.failed
    assert "token file" in str(done)
