"""The `llm_lora` app: its parameters, its entry of Serve's config, and where its adapters lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from clusterkit import app_code
from clusterkit.render.serve import serve_config
from clusterkit.spec.load import load
from serve_apps import template as templates
from serve_apps.llm.template import render as render_llm
from serve_apps.llm_lora.parameters import Adapter, LlmLoraParameters
from serve_apps.llm_lora.template import INGRESS_CLASS, SERVER_CLASS, code, demand, render
from tests.unit.test_spec import GPUS, findings_of, inventory, spec_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "serve_apps/llm_lora/README.md").read_text(encoding="utf-8")

SQL = {"id": "sql", "source": {"folder": "/srv/lora/sql"}}
POEM = {"id": "poem", "source": {"folder": "/srv/lora/poem"}}
COMMIT = "c" * 40


def given(*adapters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_id": "tiny", "model_source": {"folder": "/srv/tiny"}, "adapters": list(adapters), **more}


def parameters(*adapters: dict[str, Any], **more: Any) -> LlmLoraParameters:
    return LlmLoraParameters.model_validate(given(*adapters, **more))


def rendered(*adapters: dict[str, Any], accelerator: Any = "rocm", **more: Any) -> dict[str, Any]:
    paths = {f"adapter {item['id']}": item["source"]["folder"] for item in adapters}
    made = render(
        name="tuned",
        route_prefix="/tuned",
        parameters=parameters(*adapters, **more),
        accelerator=accelerator,
        model_paths={"model": "/srv/tiny", **paths},
        code_uri="file:///cache/apps/0.zip",
    )
    json.dumps(made)  # it goes over HTTP
    return made


def identity(made: dict[str, Any]) -> str:
    """What Serve hashes: a change in it replaces every replica."""
    return json.dumps([made["import_path"], made["runtime_env"], made["args"]], sort_keys=True)


def site(*adapters: dict[str, Any], cluster: dict[str, Any] | None = None, **more: Any) -> tuple[Any, Any]:
    app = {"name": "tuned", "template": "llm_lora", "route_prefix": "/", "parameters": given(*adapters, **more)}
    return {"clusterkit_apps": [app], **(cluster or {})}, {"gpus": GPUS}


# --------------------------------------------------------------------------- Serve's config


def test_an_app() -> None:
    made = rendered(SQL, POEM, max_lora_rank=64, engine_kwargs={"max_model_len": 512})
    (config,) = made["args"]["llm_configs"]
    assert (config["server_cls"], made["args"]["ingress_cls_config"]) == (SERVER_CLASS, {"ingress_cls": INGRESS_CLASS})
    assert config["lora_config"] == {"max_num_adapters_per_replica": 16}
    added = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 64, "max_cpu_loras": 16}
    assert config["engine_kwargs"].items() >= {**added, "max_model_len": 512}.items()
    assert made["runtime_env"]["working_dir"] == "file:///cache/apps/0.zip"
    server, ingress = made["deployments"]
    # The names that Ray LLM gives: an override of any other would be refused.
    assert (server["name"], ingress["name"]) == ("LLMServer:tiny", "OpenAiIngress")
    assert server["user_config"] == {"adapters": {"sql": "/srv/lora/sql", "poem": "/srv/lora/poem"}}
    assert ingress["user_config"] == {"adapters": ["poem", "sql"]}


def test_requests_pass_the_ingress_whatever_the_cluster_says() -> None:
    made = rendered(SQL)
    (config,) = made["args"]["llm_configs"]
    for environment in (made["runtime_env"], config["runtime_env"]):
        assert environment["env_vars"]["RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"] == "0"
    assert not templates.load("llm_lora").direct_streaming


def test_on_cpu_no_request_shares_a_batch_unless_it_is_asked_for() -> None:
    def most(accelerator: str, **kwargs: Any) -> Any:
        (config,) = rendered(SQL, accelerator=accelerator, engine_kwargs=kwargs)["args"]["llm_configs"]
        return config["engine_kwargs"].get("max_num_seqs")

    assert [most("cpu"), most("cpu", max_num_seqs=8), most("rocm"), most("cuda", max_num_seqs=8)] == [1, 8, None, 8]


def test_all_else_is_as_llm_has_it() -> None:
    more = {"tensor_parallel": 2, "max_replicas": 3, "max_ongoing_requests": 32}
    own = rendered(SQL, **more)
    other = render_llm(
        name="tuned",
        route_prefix="/tuned",
        parameters=LlmLoraParameters.model_validate(given(**more)),
        accelerator="rocm",
        model_path="/srv/tiny",
    )
    for entry in own["deployments"]:
        del entry["user_config"]
    assert own["deployments"] == other["deployments"]
    (config,), (others,) = own["args"]["llm_configs"], other["args"]["llm_configs"]
    assert {name: config[name] for name in others if name not in ("engine_kwargs", "runtime_env")} == {
        name: others[name] for name in others if name not in ("engine_kwargs", "runtime_env")
    }
    assert demand(parameters(SQL, **more)).gpus == 2


@pytest.mark.parametrize(
    "adapters", [(), (SQL, POEM), (POEM,), ({"id": "sql", "source": {"folder": "/srv/lora/sql-v2"}},)]
)
def test_other_adapters_replace_no_replica(adapters: tuple[Any, ...]) -> None:
    before, after = rendered(SQL), rendered(*adapters)
    assert identity(before) == identity(after)
    for old, new in zip(before["deployments"], after["deployments"], strict=True):
        assert {**old, "user_config": None} == {**new, "user_config": None}
    assert before["deployments"] != after["deployments"]


@pytest.mark.parametrize("edit", [{"max_loras": 2}, {"max_lora_rank": 32}, {"max_num_adapters_per_replica": 8}])
def test_what_the_engine_sets_aside_does(edit: dict[str, Any]) -> None:
    assert identity(rendered(SQL, **edit)) != identity(rendered(SQL))


def test_its_classes_are_in_the_code_that_goes_along() -> None:
    assert code(parameters()) == templates.AppCode(template="llm_lora")
    (name,) = {path.partition(":")[0].replace(".", "/") + ".py" for path in (SERVER_CLASS, INGRESS_CLASS)}
    files = app_code._kit("llm_lora")
    assert {name, "serve_apps/openai_api.py"} < files.keys()
    for path in (SERVER_CLASS, INGRESS_CLASS):
        assert f"class {path.partition(':')[2]}(" in files[name].decode()


# --------------------------------------------------------------------------- where adapters lie


def test_adapters_are_on_every_host_and_clients_ask_for_the_model() -> None:
    hub = {"id": "poem", "source": {"hub": "org/poem-lora", "revision": COMMIT}}
    spec = spec_of(*site(SQL, hub, max_lora_rank=32))
    found = {item["path"].rpartition("/")[2]: item for item in spec.published()["hosts"]["w1"]["models"]}
    assert {name: (item["id"], item["max_rank"]) for name, item in found.items()} == {
        "tiny": ("tiny", None),
        "sql": ("tiny:sql", 32),
        f"org--poem-lora--{COMMIT[:12]}": ("tiny:poem", 32),
    }
    (published,) = spec.published()["apps"]
    assert (published["llm"], published["model_id"]) == (True, "tiny")
    (made,) = serve_config(spec)["applications"]
    assert made["deployments"][0]["user_config"]["adapters"] == {
        "sql": "/srv/lora/sql",
        "poem": f"/var/lib/clusterkit/models/org--poem-lora--{COMMIT[:12]}",
    }


def test_the_first_adapter_moves_nothing_of_what_the_engine_compiled() -> None:
    without, one = spec_of(*site()), spec_of(*site(SQL))
    (before,), (after,) = serve_config(without)["applications"], serve_config(one)["applications"]
    assert "VLLM_CACHE_ROOT" in before["runtime_env"]["env_vars"]
    assert identity(before) == identity(after)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("adapters", "more", "words"),
    [
        ([{"id": "a:b", "source": {"folder": "/x"}}], {}, "String should match pattern"),
        ([{"id": "a", "source": {"make": "tiny-llama"}}], {}, "tiny-llama is no adapter"),
        ([{"id": "a", "source": "/x"}], {}, "must be {hub: org/name, revision: commit}, {folder: /path}"),
        ([{"id": "a"}], {}, "Field required"),
        ([SQL, {**POEM, "id": "sql"}], {}, "the id 'sql' is there more than once"),
        ([], {"max_loras": 17}, "max_loras (17) is above max_num_adapters_per_replica (16)"),
        ([], {"max_loras": 0}, "greater than or equal to 1"),
        ([], {"max_lora_rank": 24}, "Input should be 1, 8, 16"),
        ([], {"engine_kwargs": {"max_cpu_loras": 9}}, "set the parameter max_num_adapters_per_replica"),
        ([], {"engine_kwargs": {"enable_lora": True}}, "this template sets it"),
        ([], {"engine_kwargs": {"model": "x"}}, "set the parameter model_source"),
        ([], {"server_class": "my.module:Server"}, "server_class: this template has its own"),
        ([], {"user_config": {"a": 1}}, "user_config: this template has its own"),
    ],
)
def test_what_is_refused(adapters: list[Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        parameters(*adapters, **more)


def test_a_finding_has_its_place() -> None:
    found = findings_of(*site(SQL, {"id": "poem", "source": {"folder": "lora/poem"}}))
    assert found["clusterkit_apps[0].parameters.adapters[1].source.folder"] == "must be an absolute path"


def test_an_older_ray_is_refused_with_the_rows_that_can() -> None:
    _, findings = load(inventory(*site(SQL, cluster={"clusterkit_stack": "rocm70"})))
    (found,) = [item for item in findings if item.subject.endswith(".adapters")]
    assert "Ray 2.52.1 of the row 'rocm70' cannot do that; Ray 2.60.0 can" in found.problem
    assert "rocm72" in found.fix


# --------------------------------------------------------------------------- the README


def test_the_example_of_the_readme_holds() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (app,) = spec_of(yaml.safe_load(example)).apps
    assert isinstance(app.parameters, LlmLoraParameters)
    asked = set(re.findall(rf'"model": "({app.parameters.model_id}[^"]*)"', README))
    assert asked <= {app.parameters.model_id, *(f"{app.parameters.model_id}:{a.id}" for a in app.parameters.adapters)}
    assert len(asked) > 0


def test_the_readme_lists_exactly_what_llm_does_not_have() -> None:
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in README.splitlines() if line.startswith("| `")]
    told = {name: default for _, name, default, *_ in rows}
    fields = {f"adapters.{name}": field for name, field in Adapter.model_fields.items()}
    own = LlmLoraParameters.__annotations__
    fields |= {name: field for name, field in LlmLoraParameters.model_fields.items() if name in own}
    assert told == {name: "" if field.is_required() else json.dumps(field.default) for name, field in fields.items()}
