"""The `llm_pd` app: its parameters, its entry of Serve's config, and what its halves add up to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from clusterkit.render.serve import serve_config
from serve_apps.llm import template as llm
from serve_apps.llm.parameters import LlmParameters
from serve_apps.llm_pd import parameters as blocks
from serve_apps.llm_pd.parameters import OF_THE_APP, LlmPdParameters
from serve_apps.llm_pd.template import demand, ray_needs, render
from tests.unit.test_spec import findings_of, spec_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "serve_apps/llm_pd/README.md").read_text(encoding="utf-8")
KINDS = [blocks.Nixl, blocks.Moriio, blocks.LmCache, blocks.Files, blocks.Other]


def given(
    prefill: Mapping[str, Any] = {}, decode: Mapping[str, Any] = {}, connector: Any = None, **more: Any
) -> dict[str, Any]:
    return {
        "model_id": "org/tiny-1.0",
        "model_source": {"folder": "/srv/models/tiny"},
        "connector": connector or {"kind": "nixl"},
        "prefill": {"num_replicas": 2, **prefill},
        "decode": {"num_replicas": 1, **decode},
        **more,
    }


def parameters(**parts: Any) -> LlmPdParameters:
    return LlmPdParameters.model_validate(given(**parts))


def rendered(accelerator: Any = "rocm", direct_streaming: bool = False, **parts: Any) -> dict[str, Any]:
    app = render(
        name="chat",
        route_prefix="/",
        parameters=parameters(**parts),
        accelerator=accelerator,
        model_path="/srv/models/tiny",
        cache_path="/kept/abc",
        direct_streaming=direct_streaming,
    )
    json.dumps(app)  # it goes over HTTP
    return app


def identity(app: dict[str, Any]) -> str:
    """What Serve hashes: a change in it replaces every replica."""
    return json.dumps([app["import_path"], app["runtime_env"], app["args"]], sort_keys=True)


# --------------------------------------------------------------------------- Serve's config


def test_two_halves_of_their_own_parallelism() -> None:
    app = rendered(prefill={"tensor_parallel": 2}, decode={"tensor_parallel": 4, "pipeline_parallel": 2})
    assert app["import_path"] == "ray.serve.llm:build_pd_openai_app"
    bundles = {
        name: app["args"][f"{name}_config"]["placement_group_config"]["bundles"] for name in ("prefill", "decode")
    }
    assert bundles == {"prefill": [{"GPU": 1}] * 2, "decode": [{"GPU": 1}] * 8}
    models = [config["model_loading_config"] for config in app["args"].values()]
    assert models == [{"model_id": "org/tiny-1.0", "model_source": "/srv/models/tiny"}] * 2
    assert [entry["name"] for entry in app["deployments"]] == [
        "Prefill:org--tiny-1_0",
        "Decode:org--tiny-1_0",
        "OpenAiIngress",
    ]
    prefill, decode, ingress = app["deployments"]
    assert (prefill["num_replicas"], decode["num_replicas"], ingress["num_replicas"]) == (2, 1, 1)


def test_a_half_is_an_llm_app_with_a_connector() -> None:
    half = {"tensor_parallel": 4, "engine_kwargs": {"max_model_len": 8192}, "max_replicas": 3}
    app = rendered(decode={**half, "num_replicas": None}, environment={"A": "1"}, engine_start_timeout_s=900)
    config = app["args"]["decode_config"]
    assert config["engine_kwargs"].pop("kv_transfer_config")["kv_connector"] == "NixlConnector"
    assert config.pop("experimental_configs") == {"NIXL_SIDE_CHANNEL_PORT_BASE": 22000}
    alone = llm.render(
        name="chat",
        route_prefix="/",
        parameters=LlmParameters.model_validate(
            {
                "model_id": "org/tiny-1.0",
                "model_source": {"folder": "/srv/models/tiny"},
                "environment": {"A": "1"},
                "engine_start_timeout_s": 900,
                **half,
            }
        ),
        accelerator="rocm",
        model_path="/srv/models/tiny",
        cache_path="/kept/abc",
    )
    assert config == alone["args"]["llm_configs"][0]
    server, ingress = alone["deployments"]
    assert app["deployments"][1:] == [{**server, "name": "Decode:org--tiny-1_0"}, ingress]


@pytest.mark.parametrize(
    ("connector", "name", "roles", "extra"),
    [
        ({"kind": "nixl"}, "NixlConnector", ["kv_both", "kv_both"], {}),
        ({"kind": "nixl", "extra_config": {"a": 1}}, "NixlConnector", ["kv_both", "kv_both"], {"a": 1}),
        ({"kind": "moriio"}, "MoRIIOConnector", ["kv_producer", "kv_consumer"], {}),
        ({"kind": "lmcache"}, "LMCacheConnectorV1", ["kv_producer", "kv_consumer"], {}),
        (
            {"kind": "files", "folder": "/srv/kv"},
            "ExampleConnector",
            ["kv_both", "kv_both"],
            {"shared_storage_path": "/srv/kv"},
        ),
        ({"kind": "other", "kv_connector": "OwnConnector"}, "OwnConnector", ["kv_producer", "kv_consumer"], {}),
        ({"kind": "other", "kv_connector": "OwnConnector", "kv_role": "both"}, "OwnConnector", ["kv_both"] * 2, {}),
    ],
)
def test_connectors(connector: Any, name: str, roles: list[str], extra: dict[str, Any]) -> None:
    app = rendered(connector={**connector, "kv_load_failure_policy": "fail"})
    configs = [app["args"][f"{part}_config"]["engine_kwargs"]["kv_transfer_config"] for part in ("prefill", "decode")]
    assert [config["kv_connector"] for config in configs] == [name, name]
    assert [config["kv_role"] for config in configs] == roles
    assert [config.get("kv_connector_extra_config", {}) for config in configs] == [extra, extra]
    assert {config["kv_load_failure_policy"] for config in configs} == {"fail"}


def test_ports_of_the_halves_are_apart() -> None:
    """They may lie on one host, and each replica takes the next ones."""
    for connector in ({"kind": "nixl", "side_channel_port": 40000}, {"kind": "moriio", "notify_port": 40000}):
        app = rendered(connector=connector)
        prefill, decode = (app["args"][f"{part}_config"]["experimental_configs"] for part in ("prefill", "decode"))
        assert prefill.keys() == decode.keys()
        assert 40000 in prefill.values()
        assert all(decode[key] - prefill[key] >= 1000 for key in prefill)


@pytest.mark.parametrize(
    "edit",
    [
        {"prefill": {"num_replicas": 3}},
        {"decode": {"max_ongoing_requests": 8}},
        {"ingress_max_replicas": 3, "decode": {"num_replicas": None, "max_replicas": 3}},
    ],
)
def test_scaling_replaces_nothing(edit: dict[str, Any]) -> None:
    assert identity(rendered(**edit)) == identity(rendered())
    assert rendered(**edit)["deployments"] != rendered()["deployments"]


def test_an_edit_of_one_half_or_of_the_connector_replaces_replicas() -> None:
    edits = [{"prefill": {"tensor_parallel": 2}}, {"connector": {"kind": "moriio"}}, {"environment": {"A": "1"}}]
    assert len({identity(rendered(**edit)) for edit in edits} | {identity(rendered())}) == 4


def test_on_cpus_and_without_an_ingress() -> None:
    app = rendered("cpu", True, decode={"cpus_per_replica": 4})
    assert [entry["name"].partition(":")[0] for entry in app["deployments"]] == ["Prefill", "Decode"]
    threads = [config["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] for config in app["args"].values()]
    assert threads == ["1", "4"]


# --------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("parts", "place", "words"),
    [
        ({"prefill": {"model_id": "x"}}, ("prefill",), "model_id does not belong here: both halves"),
        ({"decode": {"server_class": "a:B"}}, ("decode",), "Ray's own server of this half belongs here"),
        ({"decode": {"ingress_min_replicas": 2}}, ("decode",), "say it once, of the app"),
        ({"prefill": {"engine_kwargs": {"kv_transfer_config": {}}}}, ("prefill",), "set the parameter connector"),
        ({"prefill": {"tensor_parallel": 0}}, ("prefill", "tensor_parallel"), "greater than or equal to 1"),
        ({"decode": {"min_replicas": 1}}, ("decode",), "num_replicas is for an app that does not scale"),
        ({"decode": {"num_replicas": None}, "ingress_min_replicas": 3, "ingress_max_replicas": 2}, (), "is above"),
        ({"connector": {"kind": "tcp"}}, ("connector",), "must have a kind: nixl, moriio"),
        ({"connector": {"kind": "files", "folder": "kv"}}, ("connector", "files", "folder"), "absolute path"),
        ({"connector": {"kind": "nixl", "side_channel_port": 65000}}, ("connector", "nixl", "side_channel_port"), "63"),
        ({"model_id": "white space"}, ("model_id",), "pattern"),
    ],
)
def test_what_is_refused(parts: dict[str, Any], place: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)) as caught:
        parameters(**parts)
    assert [error["loc"] for error in caught.value.errors()] == [place]


def site(**parts: Any) -> dict[str, Any]:
    """Two hosts of eight GPUs, and the app on them."""
    return {
        "clusterkit_apps": [{"name": "chat", "template": "llm_pd", "route_prefix": "/", "parameters": given(**parts)}]
    }


def test_both_halves_together_have_to_fit_the_pool() -> None:
    fits: Any = {"prefill": {"tensor_parallel": 4}, "decode": {"tensor_parallel": 8}}
    assert spec_of(site(**fits)).apps[0].name == "chat"
    # Each of the two would fit.
    found = findings_of(site(**fits | {"decode": {"tensor_parallel": 8, "num_replicas": 2}}))
    assert "needs 24 GPUs" in found["clusterkit_apps[0] chat"]


def test_findings_name_the_place() -> None:
    found = findings_of(site(prefill={"max_replicas": "x"}, connector={"kind": "files", "folder": "kv"}))
    places = {"clusterkit_apps[0].parameters.prefill.max_replicas", "clusterkit_apps[0].parameters.connector.folder"}
    assert places <= found.keys()


def test_a_half_that_fits_no_host_is_refused() -> None:
    assert findings_of(site(decode={"tensor_parallel": 16}))


def test_the_ingress_is_counted_once() -> None:
    prefill, decode = demand(parameters())
    assert (prefill.minimum_cpus, decode.minimum_cpus) == (pytest.approx(2), pytest.approx(1.1))
    assert (prefill.parameter, decode.parameter) == ("prefill", "decode")


def test_an_older_ray_is_refused_with_the_rows_that_can() -> None:
    found = findings_of({**site(), "clusterkit_stack": "rocm70"})
    assert "Ray 2.52.1 of the row 'rocm70' cannot do that" in found["clusterkit_apps[0].parameters.connector"]
    needs = ray_needs(parameters(prefill={"max_surge_percent": 10}))
    assert [need.parameter for need in needs] == ["connector", "prefill.max_surge_percent"]


# --------------------------------------------------------------------------- the README


def test_the_example_of_the_readme_holds() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (app,) = serve_config(spec_of(yaml.safe_load(example)))["applications"]
    assert app["args"]["decode_config"]["engine_kwargs"]["max_num_seqs"] == 256


def test_the_readme_lists_every_parameter_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `([\w.]+)` \| (?:`(.+?)`)? ?\|", README, re.MULTILINE))
    fields = dict(LlmPdParameters.model_fields)
    for kind in KINDS:
        fields |= {f"connector.{name}": field for name, field in kind.model_fields.items() if name != "kind"}
    expected = {}
    for name, field in fields.items():
        nothing = field.is_required() or field.default is None
        text = "" if nothing else field.default if isinstance(field.default, str) else json.dumps(field.default)
        expected[name] = text
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in KINDS}
    assert listed.keys() == expected.keys() | kinds
    assert {name: listed[name] for name in expected} == expected
    assert OF_THE_APP.keys() < LlmParameters.model_fields.keys()
    assert all(field.description for name, field in fields.items())
