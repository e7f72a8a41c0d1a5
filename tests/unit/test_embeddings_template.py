"""The `embeddings` app: its parameters, and the entry of Serve's config that they become."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_apps import template as templates
from serve_apps.embeddings.parameters import EmbeddingsParameters
from serve_apps.embeddings.template import code, demand, model_source, ray_needs, render
from tests.unit.test_spec import findings_of, spec_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = {"folder": "/srv/models/minilm"}


def parameters(**given: Any) -> EmbeddingsParameters:
    return EmbeddingsParameters.model_validate({"model_id": "minilm", "model_source": FOLDER, **given})


def rendered(accelerator: Any = "rocm", **given: Any) -> dict[str, Any]:
    app = render(
        name="embed",
        route_prefix="/embed",
        parameters=parameters(**given),
        accelerator=accelerator,
        model_path="/srv/models/minilm",
        code_uri="file:///cache/apps/0.zip",
    )
    json.dumps(app)  # it goes over HTTP
    return app


def identity(app: dict[str, Any]) -> str:
    """What Serve hashes: a change in it replaces every replica."""
    return json.dumps([app["import_path"], app["runtime_env"], app["args"]], sort_keys=True)


def test_an_app() -> None:
    app = rendered(pooling="cls", max_length=256)
    assert app["runtime_env"]["working_dir"] == "file:///cache/apps/0.zip"
    assert app["runtime_env"]["env_vars"]["HF_HUB_OFFLINE"] == "1"
    assert (app["args"]["model_path"], app["args"]["device"]) == ("/srv/models/minilm", "cuda")
    assert (app["args"]["pooling"], app["args"]["max_length"]) == ("cls", 256)
    (entry,) = app["deployments"]
    assert entry["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    assert entry["autoscaling_config"]["max_replicas"] == 1
    (on_cpu,) = rendered("cpu", cpus_per_replica=4)["deployments"]
    assert on_cpu["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 0}
    assert rendered("cpu")["args"]["device"] == "cpu"


def test_the_import_path_is_in_the_code_that_goes_along() -> None:
    module = templates.load("embeddings").render.__globals__["IMPORT_PATH"].partition(":")[0]
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert code(parameters()) == templates.AppCode(template="embeddings")
    assert model_source(parameters())["folder"] == FOLDER["folder"]


@pytest.mark.parametrize(
    "edit",
    [
        {"max_batch_size": 8},
        {"batch_wait_timeout_s": 0.1},
        {"max_replicas": 3},
        {"num_replicas": 2},
        {"max_ongoing_requests": 200},
        {"graceful_shutdown_timeout_s": 5},
    ],
)
def test_what_replaces_no_replica(edit: dict[str, Any]) -> None:
    assert identity(rendered(**edit)) == identity(rendered())
    assert rendered(**edit)["deployments"] != rendered()["deployments"]


@pytest.mark.parametrize("edit", [{"pooling": "cls"}, {"normalize": False}, {"dtype": "float16"}, {"model_id": "m"}])
def test_what_does(edit: dict[str, Any]) -> None:
    assert identity(rendered(**edit)) != identity(rendered())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_batch_size": 65}, "would never fill a batch"),
        ({"pooling": "last"}, "'mean' or 'cls'"),
        ({"num_replicas": 1, "min_replicas": 1}, "take one of them out"),
        ({"gpu_fraction": 1}, "less than 1"),
        ({"max_length": 0}, "greater than or equal to 1"),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        parameters(**given)


def test_what_it_asks_of_the_pool() -> None:
    asked = demand(parameters(gpu_fraction=0.25, num_replicas=4, cpus_per_replica=2))
    assert (asked.gpus, asked.min_replicas, asked.max_replicas, asked.minimum_cpus) == (0.25, 4, 4, 8)
    assert [need.parameter for need in ray_needs(parameters(rolling_update_percentage=0.5))] == [
        "rolling_update_percentage"
    ]


def site(**given: Any) -> dict[str, Any]:
    given = {"model_id": "minilm", "model_source": FOLDER, **given}
    return {"clusterkit_apps": [{"name": "embed", "template": "embeddings", "route_prefix": "/", "parameters": given}]}


def test_its_weights_are_on_every_host_of_the_pool() -> None:
    hosts = spec_of(site()).published()["hosts"]
    assert [model["path"] for model in hosts["w1"]["models"]] == [FOLDER["folder"]]
    assert "needs 17 GPUs" in findings_of(site(num_replicas=17))["clusterkit_apps[0] embed"]


def test_the_example_of_the_readme_holds() -> None:
    text = (ROOT / "serve_apps/embeddings/README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert [item.name for item in spec_of(yaml.safe_load(example)).apps] == ["embed"]


def test_the_readme_lists_exactly_the_parameters() -> None:
    text = (ROOT / "serve_apps/embeddings/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == EmbeddingsParameters.model_fields.keys()
