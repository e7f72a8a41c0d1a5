"""ray_serve_config and apps whose number of replicas is set from outside: setting it, and not fighting it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.test_ray_serve_config import Dashboard, Exit, recorded, run

serve = load_module("ray_serve_config")
Json = dict[str, Any]


def answer(replicas: int, running: int | None = None, external: bool = True) -> Json:
    """A running app of one deployment, whose config says 1."""
    have: Json = copy.deepcopy(recorded("running_hello"))
    app = have["applications"]["hello"]
    (name,) = app["deployments"]
    deployment = app["deployments"][name]
    (replica,) = deployment["replicas"]
    deployment["target_num_replicas"] = replicas
    deployment["replicas"] = [copy.deepcopy(replica) for _ in range(replicas if running is None else running)]
    app["external_scaler_enabled"] = external
    app["deployed_app_config"]["deployments"] = [{"name": name, "num_replicas": 1}]
    if external:
        app["deployed_app_config"]["external_scaler_enabled"] = True
    return have


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(serve.time, "sleep", lambda seconds: None)
    told = Dashboard()
    handler = told.server.RequestHandlerClass

    def do_POST(self: Any) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.refused():
            told.sent.append((self.path, body))
            self.reply(200, "{}")

    handler.do_POST = do_POST  # type: ignore[attr-defined]
    yield told
    told.server.shutdown()
    told.server.server_close()


@pytest.fixture
def scale(live: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Exit]:
    def scaled(replicas: int, app: str = "hello", deployment: str = "Hello", **more: Any) -> Exit:
        wish = {"app": app, "deployment": deployment, "replicas": replicas}
        return run(live, tmp_path, monkeypatch, state="scaled", scale=wish, **more)

    return scaled


def test_the_number_is_set_and_awaited(live: Dashboard, scale: Callable[..., Exit]) -> None:
    live.answers = [answer(1), answer(3, 1), answer(3, 2), answer(3)]
    done = scale(3)
    assert not done.failed, done
    assert live.sent == [("/api/v1/applications/hello/deployments/Hello/scale", {"target_num_replicas": 3})]
    assert len(live.answers) == 1
    assert done.result["changes"] == [{"what": "replicas", "name": "hello/Hello", "wanted": 3, "actual": 1}]
    assert done.result["applications"]["hello"]["deployments"]["Hello"]["running_replicas"] == 3


def test_the_same_number_again_changes_nothing(live: Dashboard, scale: Callable[..., Exit]) -> None:
    live.answers = [answer(3)]
    assert scale(3).result["changed"] is False
    assert live.sent == []


def test_check_mode_says_what_it_would_do(live: Dashboard, scale: Callable[..., Exit]) -> None:
    live.answers = [answer(1)]
    assert scale(2, check_mode=True).result["changed"] is True
    assert live.sent == []


@pytest.mark.parametrize(
    ("given", "external", "says"),
    [
        ({"app": "halo"}, True, "no app halo runs\nFix: name one of hello"),
        ({"deployment": "Halo"}, True, "no deployment Halo\nFix: name one of Hello"),
        ({"replicas": 0}, True, "no number below 1"),
        ({}, False, "app hello is not scaled from outside"),
    ],
)
def test_what_is_refused(live: Dashboard, scale: Callable[..., Exit], given: Json, external: bool, says: str) -> None:
    live.answers = [answer(1, external=external)]
    done = scale(**{"replicas": 2, **given})
    assert done.failed
    assert says in done.result["msg"]
    assert live.sent == []


def test_a_number_that_finds_no_room_is_told(live: Dashboard, scale: Callable[..., Exit]) -> None:
    wanting = answer(3, 1)
    wanting["applications"]["hello"]["deployments"]["Hello"]["message"] = "2 replicas have taken more than 30 s"
    live.answers = [answer(1), wanting]
    done = scale(3, wait_timeout_s=0)
    assert done.failed
    assert "told to have 3 replicas; after 0 s 1 run" in done.result["msg"]
    assert "2 replicas have taken more than 30 s" in done.result["msg"]


def test_another_scaler_is_seen(live: Dashboard, scale: Callable[..., Exit]) -> None:
    live.answers = [answer(1), answer(5, 1)]
    assert "something else has set 5 since" in scale(3).result["msg"]


def config(have: Json, **other: Any) -> Json:
    app = have["applications"]["hello"]["deployed_app_config"]
    return {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [{**app, **other}]}


def test_a_deploy_leaves_the_number(live: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inventory says 1 for the first start; 4 run."""
    live.answers = [answer(4)]
    declared = config(answer(1))
    assert run(live, tmp_path, monkeypatch, config=declared).result["changed"] is False
    # The config that Serve has may say another number: it was sent while so many ran.
    live.answers[0]["applications"]["hello"]["deployed_app_config"]["deployments"][0]["num_replicas"] = 2
    assert run(live, tmp_path, monkeypatch, config=declared).result["changed"] is False
    assert live.sent == []


@pytest.mark.parametrize(("external", "number"), [(True, 4), (False, 1)])
def test_what_is_sent_has_the_number_that_runs(
    live: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, number: int
) -> None:
    """And where no scaler is outside, the number of the config, which sets it back."""
    live.answers = [answer(4, external=external)]
    changed = config(answer(1, external=external), route_prefix="/elsewhere")
    after = answer(4, external=external)
    after["applications"]["hello"].update(last_deployed_time_s=2e9, deployed_app_config=changed["applications"][0])
    live.answers.append(after)
    done = run(live, tmp_path, monkeypatch, config=changed)
    assert not done.failed, done
    ((method, sent),) = live.sent
    assert method == "PUT"
    assert sent is not None
    assert sent["applications"][0]["deployments"] == [{"name": "Hello", "num_replicas": number}]


def test_an_app_that_gets_a_scaler_outside_keeps_what_it_has() -> None:
    have = answer(4, external=False)
    given = config(answer(1))
    (app,) = serve.as_scaled(given, have)["applications"]
    assert app["deployments"] == [{"name": "Hello", "num_replicas": 4}]
    # Where nothing runs, it starts with the config's.
    assert serve.as_scaled(given, {"applications": {}}) == given


def test_the_policys_code_is_looked_for_before_a_config_is_sent_again(tmp_path: Path) -> None:
    there, gone = tmp_path / "there.zip", tmp_path / "gone.zip"
    there.touch()
    app = {"name": "hello", "runtime_env": {"working_dir": there.as_uri(), "py_modules": [there.as_uri()]}}
    todo = {"added": ["hello"], "changed": [], "failed": [], "unchanged": [], "fixed": []}
    serve.check_code({"applications": [app]}, todo, 3)
    app["runtime_env"] = {"py_modules": [gone.as_uri()]}
    with pytest.raises(serve.CodeGone, match=r"gone\.zip is missing"):
        serve.check_code({"applications": [app]}, todo, 3)
