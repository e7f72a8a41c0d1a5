"""The `custom` app: what the inventory says becomes Serve's own, and what it leaves open stays the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve_apps import template as templates
from serve_apps.custom.parameters import CustomParameters, Deployment
from serve_apps.custom.template import code, demand, ray_needs, render
from tests.unit.test_spec import GPUS, findings_of, spec_of

ROOT = Path(__file__).resolve().parents[2]
URI = "file:///cache/apps/0.zip"


def parameters(*deployments: dict[str, Any], **given: Any) -> CustomParameters:
    whole = {"code": "../shop", "import_path": "shop.app:build", "deployments": list(deployments), **given}
    return CustomParameters.model_validate(whole)


def rendered(*deployments: dict[str, Any], accelerator: Any = "rocm", **given: Any) -> dict[str, Any]:
    app = render(
        name="shop",
        route_prefix="/shop",
        parameters=parameters(*deployments, **given),
        accelerator=accelerator,
        model_path="",
        code_uri=URI,
    )
    json.dumps(app)  # it goes over HTTP
    return app


def test_the_least() -> None:
    assert rendered() == {
        "name": "shop",
        "route_prefix": "/shop",
        "import_path": "shop.app:build",
        "runtime_env": {"env_vars": {}, "working_dir": URI},
        "deployments": [],
    }
    assert code(parameters()) == templates.AppCode(folder="../shop", module="shop.app", parameter="code")


def test_what_is_said_is_passed_on() -> None:
    app = rendered(args={"size": 3}, env_vars={"A": "b"}, logging_config={"log_level": "DEBUG"})
    assert app["args"] == {"size": 3}
    assert app["runtime_env"]["env_vars"] == {"A": "b"}
    assert app["logging_config"]["log_level"] == "DEBUG"


def only(**said: Any) -> dict[str, Any]:
    (entry,) = rendered({"name": "Shop", **said})["deployments"]
    assert entry.pop("name") == "Shop"
    return dict(entry)


def test_what_is_not_said_of_a_deployment_is_as_the_code_has_it() -> None:
    assert only() == {}
    assert only(max_ongoing_requests=9) == {"max_ongoing_requests": 9}
    assert only(user_config={"k": 1}) == {"user_config": {"k": 1}}
    # A number takes the place of the code's scaling.
    assert only(num_replicas=2) == {"num_replicas": 2, "autoscaling_config": None}


def test_what_the_code_may_say_is_not_guessed() -> None:
    """How many requests a replica takes, and how many scaling aims at, may each be the code's own."""
    assert only(max_ongoing_requests=1) == {"max_ongoing_requests": 1}
    assert only(target_ongoing_requests=8)["autoscaling_config"]["target_ongoing_requests"] == 8


def test_what_serve_replaces_as_a_whole_is_said_as_a_whole() -> None:
    assert only(num_gpus=0.5) == {"ray_actor_options": {"num_cpus": 1, "num_gpus": 0.5}}
    scaling = only(max_replicas=3)["autoscaling_config"]
    assert scaling == {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 30,
        "downscale_delay_s": 600,
    }


def test_on_cpu_no_gpu_is_asked_for() -> None:
    """So that the same app runs on the CPU pool of a lab."""
    item = {"name": "Shop", "num_gpus": 2, "accelerator_type": "H100", "num_cpus": 4}
    (entry,) = rendered(item, accelerator="cpu")["deployments"]
    assert entry["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 0}
    (entry,) = rendered(item)["deployments"]
    assert entry["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 2, "accelerator_type": "H100"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"import_path": "shop/app.py"}, "import_path"),
        ({"import_path": "shop.app"}, "import_path"),
        ({"pip": ["left-pad"]}, "Extra inputs"),
        ({"deployments": [{"name": "A"}, {"name": "A"}]}, "'A' stands there twice"),
        ({"deployments": [{"name": "A", "num_gpus": 1.5}]}, "whole number"),
        ({"deployments": [{"name": "A", "num_replicas": 2, "max_replicas": 3}]}, "take one of them out"),
        ({"deployments": [{"name": "A", "min_replicas": 2}]}, "above max_replicas"),
        ({"deployments": [{"name": "A", "initial_replicas": 2}]}, "initial_replicas (2) is not between"),
        (
            {"deployments": [{"name": "A", "target_ongoing_requests": 6, "max_ongoing_requests": 5}]},
            "never scale up",
        ),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        CustomParameters.model_validate({"code": "x", "import_path": "a:b", **given})


def test_what_only_newer_rays_can() -> None:
    needs = ray_needs(parameters({"name": "A", "max_surge_percent": 20}, {"name": "B"}))
    assert [(need.parameter, need.ray) for need in needs] == [("deployments.0.max_surge_percent", "2.60.0")]


# ------------------------------------------------------------------ room


def app(*deployments: dict[str, Any]) -> dict[str, Any]:
    given = {"code": "../shop", "import_path": "shop:app", "deployments": list(deployments)}
    return {"clusterkit_apps": [{"name": "shop", "template": "custom", "route_prefix": "/", "parameters": given}]}


def test_deployments_are_added_up() -> None:
    """Two hosts of eight GPUs."""
    front, back = {"name": "Front", "num_replicas": 4}, {"name": "Back", "num_gpus": 2, "max_replicas": 8}
    assert demand(parameters(front, back))[1].gpus == 2
    spec_of(app(front, back))
    found = findings_of(app(front, back, {"name": "More", "num_gpus": 0.5}))
    assert "at max_replicas it needs 16.5 GPUs, and the pool gpus has 16" in found["clusterkit_apps[0] shop"]
    found = findings_of(app({"name": "Wide", "num_gpus": 16}))
    assert "one replica needs 16 GPUs on one host" in found["clusterkit_apps[0] shop"]
    pools = {"gpus": {**GPUS, "clusterkit_cpus": 1}}
    assert "need 4 CPUs" in findings_of(app(front), pools=pools)["clusterkit_apps"]


def test_the_readme_lists_exactly_the_parameters() -> None:
    text = (ROOT / "serve_apps/custom/README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert names == CustomParameters.model_fields.keys() | Deployment.model_fields.keys()
