"""The `vision` app: its parameters, its entry of Serve's config, and what a request brings."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from starlette.requests import Request

from clusterkit import app_code
from serve_apps import template as templates
from serve_apps.openai_api import Refused
from serve_apps.vision.image import Limits, Wanted, wanted_image
from serve_apps.vision.parameters import VisionParameters
from serve_apps.vision.template import IMPORT_PATH, code, demand, model_source, ray_needs, render
from tests.unit.test_spec import findings_of, spec_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "serve_apps/vision/README.md").read_text(encoding="utf-8")
FOLDER = {"folder": "/srv/models/resnet"}


def parameters(**given: Any) -> VisionParameters:
    return VisionParameters.model_validate({"model_id": "resnet", "model_source": FOLDER, **given})


def rendered(accelerator: Any = "rocm", **given: Any) -> dict[str, Any]:
    app = render(
        name="vision",
        route_prefix="/vision",
        parameters=parameters(**given),
        accelerator=accelerator,
        model_path="/srv/models/resnet",
        code_uri="file:///cache/apps/0.zip",
    )
    json.dumps(app)  # it goes over HTTP
    return app


def identity(app: dict[str, Any]) -> str:
    """What Serve hashes: a change in it replaces every replica."""
    return json.dumps([app["import_path"], app["runtime_env"], app["args"]], sort_keys=True)


def test_an_app() -> None:
    app = rendered(max_replicas=4, gpu_fraction=0.25)
    assert app["runtime_env"]["working_dir"] == "file:///cache/apps/0.zip"
    assert app["runtime_env"]["env_vars"]["HF_HUB_OFFLINE"] == "1"
    assert (app["args"]["model_path"], app["args"]["device"]) == ("/srv/models/resnet", "cuda")
    ingress, classifier = app["deployments"]
    assert classifier["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.25}
    assert ingress["ray_actor_options"]["num_gpus"] == 0
    on_cpu = rendered("cpu", cpus_per_replica=4)
    assert on_cpu["deployments"][1]["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 0}
    assert (on_cpu["args"]["device"], on_cpu["args"]["readers"]) == ("cpu", 4)


def test_an_idle_one_leaves_its_ingress() -> None:
    ingress, classifier = (entry["autoscaling_config"] for entry in rendered(max_replicas=4)["deployments"])
    assert (classifier["min_replicas"], classifier["max_replicas"]) == (0, 4)
    assert (ingress["min_replicas"], ingress["max_replicas"]) == (1, 4)
    # It would take a busy app back to one replica with every edit.
    assert "initial_replicas" not in classifier
    first = [entry["autoscaling_config"]["initial_replicas"] for entry in rendered(initial_replicas=0)["deployments"]]
    assert first == [1, 0]
    fixed = rendered(num_replicas=3)["deployments"]
    assert [entry["num_replicas"] for entry in fixed] == [3, 3]


def test_who_waits_in_the_ingress_is_not_cut() -> None:
    ingress, classifier = rendered(response_timeout_s=120)["deployments"]
    assert (ingress["graceful_shutdown_timeout_s"], classifier["graceful_shutdown_timeout_s"]) == (120, 60)
    assert ingress["user_config"]["response_timeout_s"] == 120
    assert rendered(graceful_shutdown_timeout_s=900)["deployments"][0]["graceful_shutdown_timeout_s"] == 900


def test_the_code_that_goes_along() -> None:
    found = app_code._kit("vision")
    assert {f"{IMPORT_PATH.partition(':')[0].replace('.', '/')}.py", "serve_apps/openai_api.py"} <= found.keys()
    assert "serve_apps/vision/parameters.py" not in found
    assert code(parameters()) == templates.AppCode(template="vision")
    assert model_source(parameters())["folder"] == FOLDER["folder"]


@pytest.mark.parametrize(
    "edit",
    [
        {"top_k": 3},
        {"max_image_mib": 2},
        {"max_pixels": 100},
        {"response_timeout_s": 30},
        {"max_batch_size": 8},
        {"max_replicas": 3},
        {"num_replicas": 2},
        {"graceful_shutdown_timeout_s": 5},
    ],
)
def test_what_replaces_no_replica(edit: dict[str, Any]) -> None:
    assert identity(rendered(**edit)) == identity(rendered())
    assert rendered(**edit)["deployments"] != rendered()["deployments"]


@pytest.mark.parametrize("edit", [{"dtype": "float16"}, {"model_id": "m"}, {"env_vars": {"A": "b"}}])
def test_what_does(edit: dict[str, Any]) -> None:
    assert identity(rendered(**edit)) != identity(rendered())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_batch_size": 65}, "would never fill a batch"),
        ({"model_source": {"make": "tiny-llama"}}, "tiny-llama sees nothing"),
        ({"num_replicas": 1, "min_replicas": 1}, "take one of them out"),
        ({"min_replicas": 2}, "min_replicas (2) is above max_replicas (1)"),
        ({"gpu_fraction": 1}, "less than 1"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"max_pixels": 1.5}, "valid integer"),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        parameters(**given)


def test_what_it_asks_of_the_pool() -> None:
    idle = demand(parameters(max_replicas=4))
    assert (idle.gpus, idle.min_replicas, idle.max_replicas, idle.minimum_cpus) == (1, 0, 4, 0.1)
    asked = demand(parameters(gpu_fraction=0.25, num_replicas=4, cpus_per_replica=2))
    assert (asked.gpus, asked.min_replicas, asked.minimum_cpus) == (0.25, 4, pytest.approx(8.4))
    assert [need.parameter for need in ray_needs(parameters(max_surge_percent=5))] == ["max_surge_percent"]


def site(**given: Any) -> dict[str, Any]:
    given = {"model_id": "resnet", "model_source": FOLDER, **given}
    return {"clusterkit_apps": [{"name": "vision", "template": "vision", "route_prefix": "/", "parameters": given}]}


def test_its_weights_are_on_every_host_of_the_pool() -> None:
    hosts = spec_of(site()).published()["hosts"]
    assert [model["path"] for model in hosts["w1"]["models"]] == [FOLDER["folder"]]
    assert "needs 17 GPUs" in findings_of(site(max_replicas=17))["clusterkit_apps[0] vision"]


def test_the_example_of_the_readme_holds() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert [item.name for item in spec_of(yaml.safe_load(example)).apps] == ["vision"]


def test_the_readme_lists_exactly_the_parameters() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == VisionParameters.model_fields.keys()


# --------------------------------------------------------------------------- what a request brings

LIMITS = Limits(max_image_bytes=1000, max_pixels=1, top_k=5)


class Client:
    """A request whose body comes in parts of 100 bytes, and how much of it was read."""

    def __init__(self, body: bytes, kind: str | None, query: str = "", declared: int | None = None) -> None:
        self.parts = [body[start : start + 100] for start in range(0, len(body), 100)] or [b""]
        self.read = 0
        headers = [(b"content-type", kind.encode())] if kind else []
        if declared is not None:
            headers.append((b"content-length", str(declared).encode()))
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": query.encode()}
        self.request = Request(scope, self.receive)

    async def receive(self) -> dict[str, Any]:
        part = self.parts[self.read]
        self.read += 1
        return {"type": "http.request", "body": part, "more_body": self.read < len(self.parts)}

    def wanted(self) -> Wanted:
        return asyncio.run(wanted_image(self.request, LIMITS))


def in_object(data: bytes, **more: Any) -> bytes:
    return json.dumps({"image": base64.b64encode(data).decode(), **more}).encode()


@pytest.mark.parametrize(
    ("body", "kind", "query", "wanted"),
    [
        (b"abc", "image/jpeg", "", Wanted(b"abc", 5, None)),
        (b"abc", "image/jpeg; x=y", "top_k=3&model=m", Wanted(b"abc", 3, "m")),
        (b"a" * 1000, "application/octet-stream", "", Wanted(b"a" * 1000, 5, None)),
        (in_object(b"a" * 1000), "application/json", "", Wanted(b"a" * 1000, 5, None)),
        (in_object(b"abc", top_k=2, model="m"), "application/json; charset=utf-8", "", Wanted(b"abc", 2, "m")),
        (b'{"image": "data:image/png;base64,YWJj"}', "application/json", "top_k=9", Wanted(b"abc", 9, None)),
    ],
)
def test_an_image_comes_in_several_ways(body: bytes, kind: str, query: str, wanted: Wanted) -> None:
    assert Client(body, kind, query).wanted() == wanted


@pytest.mark.parametrize(
    ("body", "kind", "query", "status", "words"),
    [
        (b"abc", None, "", 415, "and is missing"),
        (b"abc", "application/x-www-form-urlencoded", "", 415, "image/jpeg"),
        (b"", "image/png", "", 400, "no image in the request"),
        (b"abc", "image/png", "top_k=0", 400, "from 1 to 1000"),
        (b"abc", "image/png", "top_k=two", 400, "from 1 to 1000"),
        (b"abc", "image/png", "size=3", 400, "knows no 'size'"),
        (b"no json", "application/json", "", 400, "no JSON"),
        (b"[]", "application/json", "", 400, "in base64 as image"),
        (b'{"image": 3}', "application/json", "", 400, "in base64 as image"),
        (b'{"image": "%%%"}', "application/json", "", 400, "is no base64"),
        (in_object(b"abc", top_k=True), "application/json", "", 400, "from 1 to 1000"),
        (in_object(b"abc", top_k=2.5), "application/json", "", 400, "from 1 to 1000"),
        (in_object(b"a" * 1001), "application/json", "", 413, "larger than"),
        (in_object(b"abc", size=3), "application/json", "", 400, "knows no 'size'"),
    ],
)
def test_what_is_no_request(body: bytes, kind: str | None, query: str, status: int, words: str) -> None:
    with pytest.raises(Refused, match=re.escape(words)) as caught:
        Client(body, kind, query).wanted()
    assert caught.value.status == status


def test_what_is_too_large_is_not_read_to_its_end() -> None:
    endless = Client(b"a" * 100_000, "image/png")
    with pytest.raises(Refused) as caught:
        endless.wanted()
    assert (caught.value.status, endless.read) == (413, 11)
    # One that says so itself is not read at all.
    honest = Client(b"a" * 100_000, "image/png", declared=100_000)
    with pytest.raises(Refused):
        honest.wanted()
    assert honest.read == 0
