"""The `pipeline` app: its parameters, its entry of Serve's config, and what its GPU memory adds up to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from clusterkit.render.serve import serve_config
from clusterkit.spec.load import load
from serve_apps import template as templates
from serve_apps.pipeline.chat import Refused, Text, sampling, wanted_chat, wanted_stream
from serve_apps.pipeline.parameters import Classifier, Generator, PipelineParameters
from serve_apps.pipeline.template import IMPORT_PATH, code, demand, ray_needs, render
from serve_apps.template import gpu_share
from tests.unit.test_spec import GPUS, app, findings_of, inventory, spec_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "serve_apps/pipeline/README.md").read_text(encoding="utf-8")
CARD = {**GPUS, "clusterkit_gpu_memory_gib": 192}


def given(classifier: Mapping[str, Any] = {}, generator: Mapping[str, Any] = {}, **more: Any) -> dict[str, Any]:
    return {
        "model_id": "chat",
        "classifier": {"model_source": {"folder": "/srv/toxic"}, "block_labels": ["toxic"], **classifier},
        "generator": {"model_source": {"folder": "/srv/chat"}, **generator},
        **more,
    }


def parameters(**parts: Any) -> PipelineParameters:
    return PipelineParameters.model_validate(given(**parts))


def rendered(accelerator: Any = "rocm", card: float | None = 192, **parts: Any) -> dict[str, Any]:
    made = render(
        name="moderated",
        route_prefix="/moderated",
        parameters=parameters(**parts),
        accelerator=accelerator,
        model_paths={"classifier": "/srv/toxic", "generator": "/srv/chat"},
        code_uri="file:///cache/apps/0.zip",
        gpu_memory_gib=card,
    )
    json.dumps(made)  # it goes over HTTP
    return made


def identity(made: dict[str, Any]) -> str:
    """What Serve hashes: a change in it replaces every replica."""
    return json.dumps([made["import_path"], made["runtime_env"], made["args"]], sort_keys=True)


def resources(made: dict[str, Any]) -> dict[str, tuple[float, float]]:
    options = {entry["name"]: entry["ray_actor_options"] for entry in made["deployments"]}
    return {name: (option["num_cpus"], option["num_gpus"]) for name, option in options.items()}


def site(pools: Mapping[str, Any] = CARD, apps: tuple[Any, ...] = (), **parts: Any) -> tuple[Any, Any]:
    """Two hosts of eight GPUs, and the app on them."""
    own = {"name": "moderated", "template": "pipeline", "route_prefix": "/", "parameters": given(**parts)}
    return {"clusterkit_apps": [own, *apps]}, {"gpus": pools}


# --------------------------------------------------------------------------- Serve's config


def test_an_app() -> None:
    made = rendered(classifier={"gpu_memory_gib": 4.8, "threshold": 0.8}, generator={"gpu_memory_gib": 48})
    assert made["runtime_env"]["working_dir"] == "file:///cache/apps/0.zip"
    assert made["args"]["classifier"] == {
        "model_path": "/srv/toxic",
        "dtype": "float32",
        "device": "cuda",
        "max_length": None,
    }
    assert made["args"]["generator"] == {"model_path": "/srv/chat", "dtype": "bfloat16", "device": "cuda"}
    assert resources(made) == {"Ingress": (0.1, 0), "Classifier": (1, 0.025), "Generator": (1, 0.25)}
    _, classifier, generator = made["deployments"]
    assert classifier["user_config"] == {
        "block_labels": ["toxic"],
        "threshold": 0.8,
        "max_batch_size": 32,
        "batch_wait_timeout_s": 0.01,
    }
    assert generator["user_config"] == {"max_new_tokens": 512}


def test_without_a_budget_the_classifier_has_cpus_and_the_generator_a_gpu() -> None:
    made = rendered(classifier={"cpus_per_replica": 2})
    assert resources(made) == {"Ingress": (0.1, 0), "Classifier": (2, 0), "Generator": (1, 1)}
    assert (made["args"]["classifier"]["device"], made["args"]["generator"]["device"]) == ("cpu", "cuda")


def test_on_cpus_nothing_asks_for_a_gpu() -> None:
    made = rendered("cpu", None, classifier={"gpu_memory_gib": 4}, generator={"gpu_memory_gib": 40})
    assert {gpus for _, gpus in resources(made).values()} == {0}
    assert (made["args"]["classifier"]["device"], made["args"]["generator"]["device"]) == ("cpu", "cpu")


def test_each_deployment_scales_by_itself_and_the_ingress_as_the_generator() -> None:
    made = rendered(classifier={"num_replicas": 2}, generator={"min_replicas": 0, "max_replicas": 6})
    ingress, classifier, generator = made["deployments"]
    assert (classifier["num_replicas"], classifier["autoscaling_config"]) == (2, None)
    assert (generator["autoscaling_config"]["min_replicas"], generator["autoscaling_config"]["max_replicas"]) == (0, 6)
    assert ingress["autoscaling_config"] == generator["autoscaling_config"]
    # It waits for its answers as long as the generator takes for them.
    assert ingress["graceful_shutdown_timeout_s"] == generator["graceful_shutdown_timeout_s"] == 600


@pytest.mark.parametrize(
    "edit",
    [
        {"classifier": {"threshold": 0.9}},
        {"classifier": {"block_labels": ["toxic", "threat"]}},
        {"classifier": {"max_batch_size": 8}},
        {"classifier": {"num_replicas": 2}},
        {"classifier": {"gpu_memory_gib": 8}},
        {"generator": {"max_new_tokens": 16}},
        {"generator": {"max_replicas": 3}},
        {"generator": {"gpu_memory_gib": 80}},
    ],
)
def test_what_does_not_replace_the_whole_app(edit: dict[str, Any]) -> None:
    parts = {"classifier": {"gpu_memory_gib": 4}, "generator": {"gpu_memory_gib": 40}}
    edited = {name: {**part, **edit.get(name, {})} for name, part in parts.items()}
    assert identity(rendered(**edited)) == identity(rendered(**parts))
    assert rendered(**edited)["deployments"] != rendered(**parts)["deployments"]


@pytest.mark.parametrize(
    "edit",
    [
        {"classifier": {"dtype": "float16"}},
        {"classifier": {"max_length": 64}},
        {"model_id": "x"},
        {"env_vars": {"A": "1"}},
    ],
)
def test_what_does(edit: dict[str, Any]) -> None:
    assert identity(rendered(**edit)) != identity(rendered())


def test_the_import_path_is_in_the_code_that_goes_along() -> None:
    assert (ROOT / f"{IMPORT_PATH.partition(':')[0].replace('.', '/')}.py").is_file()
    assert code(parameters()) == templates.AppCode(template="pipeline")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"classifier": {"block_labels": []}}, "at least 1 item"),
        ({"classifier": {"threshold": 0}}, "greater than 0"),
        ({"classifier": {"threshold": 1.5}}, "less than or equal to 1"),
        ({"classifier": {"model_source": {"make": "tiny-llama"}}}, "tiny-llama classifies nothing"),
        ({"classifier": {"gpu_memory_gib": 0}}, "greater than 0"),
        ({"generator": {"num_replicas": 1, "min_replicas": 1}}, "take one of them out"),
        ({"generator": {"max_ongoing_requests": 1}}, "never scale up"),
        ({"generator": {"gpu_fraction": 0.5}}, "Extra inputs"),
    ],
)
def test_what_is_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        parameters(**parts)


def test_what_only_a_newer_ray_can_do_is_found_by_its_place() -> None:
    newer = {"max_surge_percent": 10}
    assert [need.parameter for need in ray_needs(parameters(generator=newer))] == ["generator.max_surge_percent"]
    assert "clusterkit_apps[0].parameters.classifier.threshold" in findings_of(site(classifier={"threshold": 2})[0])


# --------------------------------------------------------------------------- two models


def test_both_models_are_on_every_host_and_clients_ask_for_the_generator() -> None:
    cluster, pools = site()
    spec = spec_of(cluster, pools)
    published = spec.published()
    assert [(model["path"], model["weights"]) for model in published["hosts"]["w1"]["models"]] == [
        ("/srv/chat", True),
        ("/srv/toxic", True),
    ]
    assert published["apps"][0]["model_id"] == "chat"
    # Nothing is compiled that would need a place of its own.
    assert published["hosts"]["w1"]["caches"] == []
    (made,) = serve_config(spec)["applications"]
    paths = {name: made["args"][name]["model_path"] for name in ("classifier", "generator")}
    assert paths == {"classifier": "/srv/toxic", "generator": "/srv/chat"}


def test_each_model_is_fetched_into_a_folder_of_its_own() -> None:
    commit = "c" * 40
    cluster, pools = site(
        classifier={"model_source": {"hub": "org/toxic", "revision": commit}},
        generator={"model_source": {"make": "tiny-llama"}},
    )
    found = {model.path.rpartition("/")[2]: model.id for model in spec_of(cluster, pools).models()}
    assert found == {"chat": "chat", f"org--toxic--{commit[:12]}": "chat-classifier"}


# --------------------------------------------------------------------------- GPU memory


@pytest.mark.parametrize(
    ("asked", "of", "share"),
    # Three thirds have to be one, for Ray as well, which counts in ten-thousandths.
    [(48, 192, 0.25), (57.6, 192, 0.3), (64, 192, 0.3333), (192, 192, 1), (200, 192, 1), (0.001, 192, 0.0001)],
)
def test_the_share_of_a_gpu(asked: float, of: float, share: float) -> None:
    assert gpu_share(asked, of) == share


def test_what_it_asks_of_the_pool() -> None:
    parts = {"classifier": {"gpu_memory_gib": 4.8, "num_replicas": 2}, "generator": {"gpu_memory_gib": 96}}
    asked = templates.load("pipeline").demands(parameters(**parts), 192)
    assert [(item.parameter, item.gpus, item.max_replicas) for item in asked] == [
        ("classifier", 0.025, 2),
        ("generator", 0.5, 1),
    ]
    assert [item.minimum_cpus for item in demand(parameters(**parts))] == [2, 1.1]


def fits(pool: Mapping[str, Any] = CARD, apps: tuple[Any, ...] = (), **parts: Any) -> list[str]:
    """What validation says, as subject, problem and fix."""
    _, findings = load(inventory(*site(pool, apps, **parts)))
    return [f"{item.subject}: {item.problem}; {item.fix}" for item in findings]


ONE_GPU = {**CARD, "clusterkit_gpus": 1}


@pytest.mark.parametrize(
    ("classifier", "replicas", "found"),
    [
        # Two hosts of one GPU: on each 120 + 60 + 4 GiB at most.
        (4, 2, ""),
        (60, 2, ""),
        (72, 2, ""),
        # Together 3/4 of what is there, and yet no third one of 120 finds a GPU with room.
        (
            4,
            3,
            "clusterkit_apps[0] moderated: at max_replicas it needs 3 GPUs, and the pool gpus has 2 "
            "(classifier 2 x 4 GiB, generator 3 x 120 GiB); lower gpu_memory_gib or max_replicas, or add hosts",
        ),
        (73, 2, "it needs 3 GPUs, and the pool gpus has 2 (classifier 2 x 73 GiB, generator 2 x 120 GiB)"),
    ],
)
def test_what_lies_on_one_gpu_is_added_up(classifier: float, replicas: int, found: str) -> None:
    said = fits(
        ONE_GPU,
        classifier={"gpu_memory_gib": classifier, "num_replicas": 2},
        generator={"gpu_memory_gib": 120, "max_replicas": replicas},
    )
    assert len(said) == bool(found), said
    assert found in "".join(said)


def test_by_shares_alone_it_would_pass() -> None:
    """What the sum of shares says, which Ray can never place: three of 0.6 on two GPUs."""
    parts = {"generator": {"gpu_memory_gib": 115.2, "max_replicas": 3}}
    (_, generator) = templates.load("pipeline").demands(parameters(**parts), 192)
    assert generator.gpus * 3 < 2
    assert "it needs 3 GPUs" in "".join(fits(ONE_GPU, **parts))


@pytest.mark.parametrize(
    ("pool", "found"),
    [
        (GPUS, "nothing says what memory those of the pool gpus have; set clusterkit_gpu_memory_gib for the pool"),
        ({**GPUS, "clusterkit_gpu_memory_gib": 80}, "is 120, and a GPU of the pool gpus has 80 GiB; lower it"),
        (CARD, ""),
    ],
)
def test_one_replica_against_one_gpu(pool: dict[str, Any], found: str) -> None:
    said = fits(pool, generator={"gpu_memory_gib": 120})
    assert len(said) == bool(found), said
    assert found in "".join(said)
    assert not found or said[0].startswith("clusterkit_apps[0].parameters.generator.gpu_memory_gib: ")


def test_apps_of_one_pool_are_added_up_together() -> None:
    mine = {"classifier": {"gpu_memory_gib": 4}, "generator": {"gpu_memory_gib": 100, "num_replicas": 2}}
    # Each GPU has a generator, so that none is left for an engine that wants one to itself.
    assert fits(ONE_GPU, (app("one", gpu_fraction=0.4),), **mine) == []
    (said,) = fits(ONE_GPU, (app("one"),), **mine)
    assert "need 3 GPUs at min_replicas, and it has 2 (moderated classifier 1 x 4 GiB" in said
    assert "moderated generator 2 x 100 GiB, one 1 x 1 GPU)" in said


def test_without_a_budget_gpus_are_counted_as_ever() -> None:
    (said,) = fits(ONE_GPU, generator={"max_replicas": 3})
    assert "at max_replicas it needs 3 GPUs, and the pool gpus has 2; " in said


# --------------------------------------------------------------------------- the README


def test_the_example_of_the_readme_holds() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert [item.name for item in spec_of(yaml.safe_load(example)).apps] == ["moderated"]


def test_the_readme_lists_exactly_the_parameters() -> None:
    listed = set(re.findall(r"^\| `([\w.]+)` \|", README, re.MULTILINE))
    both = {name for name in listed if "." not in name} - PipelineParameters.model_fields.keys()
    for name, model in (("classifier", Classifier), ("generator", Generator)):
        own = {item.partition(".")[2] for item in listed if item.startswith(f"{name}.")}
        assert own | both == model.model_fields.keys()
    assert listed > PipelineParameters.model_fields.keys()
    defaults = re.findall(r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|", README, re.MULTILINE)
    for name, of_classifier, of_generator in defaults:
        assert Classifier.model_fields[name].default == yaml.safe_load(of_classifier), name
        assert Generator.model_fields[name].default == yaml.safe_load(of_generator), name
    assert len(defaults) > 8


# --------------------------------------------------------------------------- requests

HELLO = [{"role": "user", "content": "hello"}]


def test_a_request() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    body = {"model": "m", "messages": messages, "temperature": 0, "n": 1, "user": "x", "tools": None, "max_tokens": 3}
    assert wanted_chat(body) == {
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a\nb"}],
        "max_tokens": 3,
        "temperature": 0,
        "top_p": None,
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ({"messages": HELLO}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "m", "messages": []}, "messages"),
        ({"model": "m", "messages": ["hello"]}, "messages"),
        ({"model": "m", "messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"model": "m", "messages": [{"role": "user"}]}, "messages"),
        ({"model": "m", "messages": [{"role": "user", "content": []}]}, "messages"),
        # A part that is no text would reach the model unseen by the classifier.
        ({"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"model": "m", "messages": [{**HELLO[0], "tool_calls": [{}]}]}, "messages"),
        ({"model": "m", "messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"model": "m", "messages": HELLO, "max_completion_tokens": True}, "max_tokens"),
        ({"model": "m", "messages": HELLO, "temperature": 3}, "temperature"),
        ({"model": "m", "messages": HELLO, "top_p": "1"}, "top_p"),
        ({"model": "m", "messages": HELLO, "n": 2}, "n"),
        ({"model": "m", "messages": HELLO, "stop": ["x"]}, "stop"),
        ({"model": "m", "messages": HELLO, "seed": 7}, "seed"),
        ({"model": "m", "messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_no_request(body: Any, param: str | None) -> None:
    with pytest.raises(Refused) as caught:
        wanted_chat(body)
    assert (caught.value.status, caught.value.body["error"]["param"]) == (400, param)


def test_a_stream_and_its_usage() -> None:
    assert wanted_stream({"model": "m"}) == (False, False)
    assert wanted_stream({"stream": True, "stream_options": {"include_usage": True}}) == (True, True)
    with pytest.raises(Refused):
        wanted_stream({"stream": True, "stream_options": "usage"})


@pytest.mark.parametrize(
    ("temperature", "top_p", "found"),
    [
        (None, None, {}),
        (0, 0.9, {"do_sample": False}),
        (0.5, None, {"do_sample": True, "temperature": 0.5}),
        (1, 0.9, {"do_sample": True, "temperature": 1.0, "top_p": 0.9}),
    ],
)
def test_what_is_not_said_is_left_to_the_model(temperature: Any, top_p: Any, found: dict[str, Any]) -> None:
    assert sampling({"temperature": temperature, "top_p": top_p}) == found


class Bytes:
    """A tokenizer whose tokens are single bytes: characters of several come in halves."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(token for token in tokens if not (skip_special_tokens and token == 0)).decode(errors="replace")


def test_characters_come_whole() -> None:
    text = Text(Bytes())
    said = [text.add([byte]) for byte in "aé猫b".encode()]
    assert said == ["a", "", "é", "", "", "猫", "b"]
    assert text.add([], last=True) == ""
    # What is broken at the end is said as it is.
    assert (text.add([0xE7]), text.add([0]), text.add([], last=True)) == ("", "", "\ufffd")
