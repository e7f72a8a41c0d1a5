"""The `llm_router` app: its parameters, and the entry of Serve's config that they become."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from clusterkit.render.serve import serve_config
from serve_apps import template as templates
from serve_apps.llm import template as llm
from serve_apps.llm.parameters import LlmParameters
from serve_apps.llm_router import parameters as blocks
from serve_apps.llm_router import template
from serve_apps.llm_router.parameters import LlmRouterParameters
from serve_apps.llm_router.template import code, demand, ray_needs, render
from tests.unit.test_spec import findings_of, spec_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "serve_apps/llm_router/README.md").read_text(encoding="utf-8")
BLOCKS = [blocks.Prefix, blocks.Session, blocks.Statistics, blocks.Custom]
CUSTOM = {"policy": "custom", "router_class": "by_client:ByClient"}


def parameters(routing: Any = None, **given: Any) -> LlmRouterParameters:
    base = {"model_id": "tiny", "model_source": {"make": "tiny-llama"}, "num_replicas": 2}
    return LlmRouterParameters.model_validate({**base, "routing": routing or {"policy": "prefix"}, **given})


def rendered(routing: Any = None, direct_streaming: bool = False, **given: Any) -> dict[str, Any]:
    asked = parameters(routing, **given)
    app = render(
        name="chat",
        route_prefix="/",
        parameters=asked,
        accelerator="rocm",
        model_path="/srv/models/tiny",
        code_uri="file:///cache/apps/0.zip" if code(asked) else None,
        direct_streaming=direct_streaming,
    )
    json.dumps(app)  # it goes over HTTP
    return app


def identity(app: dict[str, Any]) -> str:
    """What Serve hashes: a change in it replaces every replica."""
    return json.dumps([app["import_path"], app["runtime_env"], app["args"]], sort_keys=True)


def built_with(app: dict[str, Any]) -> dict[str, Any]:
    (config,) = app["args"]["llm_configs"]
    found: dict[str, Any] = config["deployment_config"]["request_router_config"]
    return found


# --------------------------------------------------------------------------- Serve's config


@pytest.mark.parametrize("policy", ["prefix", "session", "statistics"])
def test_it_is_an_llm_app_with_an_ingress_of_its_own(policy: str) -> None:
    app = rendered({"policy": policy})
    server, ingress = app["deployments"]
    assert ingress.pop("user_config")["policy"] == policy
    assert app["args"].pop("ingress_cls_config") == {"ingress_cls": "serve_apps.llm_router.app:OpenAiIngress"}
    assert app["runtime_env"].pop("working_dir").endswith(".zip")
    plain = {"model_id": "tiny", "model_source": {"make": "tiny-llama"}, "num_replicas": 2}
    if policy == "statistics":
        plain["server_class"] = "serve_apps.llm_router.app:MeasuredServer"
        assert server.pop("request_router_config") == {"request_routing_stats_period_s": 1}
    assert app == llm.render(
        name="chat",
        route_prefix="/",
        parameters=LlmParameters.model_validate(plain),
        accelerator="rocm",
        model_path="/srv/models/tiny",
    )


def test_the_kits_classes_are_in_the_code_that_goes_along() -> None:
    text = (ROOT / "serve_apps/llm_router/app.py").read_text()
    for path in (template.INGRESS, template.MEASURED_SERVER):
        module, _, name = path.partition(":")
        assert module == "serve_apps.llm_router.app"
        assert f"class {name}(" in text
    for policy in ("prefix", "session", "statistics"):
        assert code(parameters({"policy": policy})) == templates.AppCode(template="llm_router")
        # The names by which the ingress knows them.
        assert f'"{policy}": ' in text


def test_a_class_that_lies_on_every_node() -> None:
    app = rendered({**CUSTOM, "request_router_kwargs": {"field": "user"}}, server_class="own:Server")
    server, _ = app["deployments"]
    assert server["name"] == "Server:tiny"
    assert server["request_router_config"] == {
        "request_router_class": "by_client:ByClient",
        "request_router_kwargs": {"field": "user"},
        "request_routing_stats_period_s": 10,
    }
    assert built_with(app) == {"request_router_class": "by_client:ByClient"}
    assert code(parameters(CUSTOM)) is None
    assert "ingress_cls_config" not in app["args"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"policy": "prefix"}, {"policy": "prefix", "imbalanced_threshold": 4}),
        ({"policy": "session"}, {"policy": "session", "num_fallback_replicas": 0}),
        ({"policy": "statistics"}, {"policy": "statistics", "max_waiting": 3}),
        ({"policy": "prefix"}, {"policy": "session"}),
    ],
)
def test_an_edit_is_given_to_the_ingress_that_runs(before: Any, after: Any) -> None:
    apps = [rendered(routing) for routing in (before, after)]
    assert identity(apps[0]) == identity(apps[1])
    (server, ingress), (other_server, other_ingress) = (app["deployments"] for app in apps)
    assert server == other_server
    assert ingress.pop("user_config") != other_ingress.pop("user_config")
    assert ingress == other_ingress


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"policy": "session"}, {"policy": "session", "header": "x-user"}),
        (CUSTOM, {**CUSTOM, "request_router_kwargs": {"a": 1}}),
    ],
)
def test_an_edit_that_replaces_the_ingress_only(before: Any, after: Any) -> None:
    """A process that routes keeps the router that it has made, and the header that it has read."""
    apps = [rendered(routing) for routing in (before, after)]
    assert identity(apps[0]) == identity(apps[1])
    (server, ingress), (other_server, other_ingress) = (app["deployments"] for app in apps)
    assert ingress["ray_actor_options"] != other_ingress["ray_actor_options"]
    server.pop("request_router_config", None), other_server.pop("request_router_config", None)
    assert server == other_server


def test_another_class_is_another_app() -> None:
    """Ray keeps a class that it has imported until it builds the app again."""
    assert identity(rendered(CUSTOM)) != identity(rendered({**CUSTOM, "router_class": "by_client:Other"}))
    assert identity(rendered({"policy": "statistics"})) != identity(rendered({"policy": "session"}))


def test_scaling_replaces_nothing() -> None:
    apps = [rendered(num_replicas=replicas) for replicas in (2, 3)]
    assert identity(apps[0]) == identity(apps[1])
    options = [[entry.get("ray_actor_options") for entry in app["deployments"]] for app in apps]
    assert options[0] == options[1]


def test_a_header_is_read_where_the_session_is() -> None:
    _, ingress = rendered({"policy": "session", "header": "x-user"})["deployments"]
    assert ingress["ray_actor_options"]["runtime_env"]["env_vars"]["RAY_SERVE_SESSION_ID_HEADER_KEY"] == "x-user"


def test_without_an_ingress_sessions_have_rays_own_router() -> None:
    app = rendered({"policy": "session"}, direct_streaming=True)
    (server,) = app["deployments"]
    assert server["request_router_config"]["request_router_class"].endswith(":ConsistentHashRouter")
    assert built_with(app) == server["request_router_config"]
    assert "ingress_cls_config" not in app["args"]


def test_what_direct_streaming_takes_away() -> None:
    named = {
        policy: template.needs_ingress(parameters({"policy": policy})) for policy in ("prefix", "session", "statistics")
    }
    assert named == {"prefix": ["routing.policy"], "session": [], "statistics": ["routing.policy"]}
    assert template.needs_ingress(parameters({"policy": "session", "header": "x-user"})) == ["routing.header"]
    assert template.needs_ingress(parameters(CUSTOM)) == []


# --------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("routing", "given", "words"),
    [
        ({"policy": "random"}, {}, "must have a policy: prefix, session"),
        ({"policy": "prefix", "header": "x"}, {}, "Extra inputs"),
        ({"policy": "prefix", "match_rate_threshold": 2}, {}, "less than or equal to 1"),
        ({"policy": "session", "header": "no header"}, {}, "header"),
        ({"policy": "custom"}, {}, "router_class"),
        ({"policy": "custom", "router_class": "module.Class"}, {}, "router_class"),
        ({"policy": "statistics"}, {"server_class": "own:Server"}, "take it out, or use the policy custom"),
        ({"policy": "statistics"}, {"engine_kwargs": {"disable_log_stats": True}}, "take disable_log_stats out"),
    ],
)
def test_what_is_refused(routing: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        parameters(routing, **given)


def site(example: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"clusterkit_apps": [example], **facts}


def of_readme() -> dict[str, Any]:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (app,) = yaml.safe_load(example)["clusterkit_apps"]
    found: dict[str, Any] = app
    return found


def test_an_older_ray_is_refused_with_the_rows_that_can() -> None:
    found = findings_of(site(of_readme(), clusterkit_stack="rocm70"))
    assert "cannot do that; Ray 2.60.0 can" in found["clusterkit_apps[0].parameters.routing"]
    assert [need.parameter for need in ray_needs(parameters(max_surge_percent=10))] == ["routing", "max_surge_percent"]


def test_findings_name_the_place() -> None:
    example = of_readme()
    example["parameters"]["routing"] = {"policy": "session", "header": "no header"}
    assert "clusterkit_apps[0].parameters.routing.header" in findings_of(site(example))


def test_the_example_of_the_readme_is_valid_and_asks_for_its_gpus() -> None:
    asked = demand(LlmRouterParameters.model_validate(of_readme()["parameters"]))
    assert (asked.gpus, asked.min_replicas) == (4, 2)
    (app,) = serve_config(spec_of(site(of_readme())))["applications"]
    assert app["deployments"][1]["user_config"]["policy"] == "session"


def test_the_readme_lists_every_parameter_with_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`(.+?)`)? ?\|", README, re.MULTILINE)
    fields = [(name, block.model_fields[name]) for block in BLOCKS for name in block.model_fields if name != "policy"]
    expected = [("routing", "")]
    for name, field in fields:
        nothing = field.is_required() or field.default is None
        text = "" if nothing else field.default if isinstance(field.default, str) else json.dumps(field.default)
        expected.append((f"routing.{name}", text))
    assert rows == expected
    assert set(LlmRouterParameters.model_fields) - set(LlmParameters.model_fields) == {"routing"}
    members = get_args(get_args(blocks.Routing)[0])
    assert [get_args(member)[0] for member in members] == BLOCKS
    assert all(field.description for _, field in fields)
