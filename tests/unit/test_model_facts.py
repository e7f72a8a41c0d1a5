"""Where models and compile caches lie, as the spec publishes it to roles and to Serve's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clusterkit.render.serve import serve_config
from clusterkit.spec.cluster import ClusterSpec
from tests.unit.test_spec import GPUS, app, findings_of, spec_of

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"hub": "org/name", "revision": COMMIT}
MODELS = "/var/lib/clusterkit/models"


def path_of(source: dict[str, Any]) -> str:
    (model,) = spec_of({"clusterkit_apps": [app(model_source=source)]}).models()
    return model.path.removeprefix(f"{MODELS}/")


def test_another_revision_is_another_folder() -> None:
    """Serve compares the path alone: under one path it would keep the old engine."""
    assert path_of(HUB) == "org--name--0123456789ab"
    assert path_of({**HUB, "revision": "v1"}) == "org--name--v1"
    assert path_of({**HUB, "revision": "refs/pr/1"}) == "org--name--refs--pr--1"
    chosen = path_of({**HUB, "allow_patterns": ["*Q4*"]})
    assert chosen.startswith("org--name--0123456789ab--")
    assert chosen != path_of({**HUB, "ignore_patterns": ["*Q4*"]})


def test_what_a_host_is_told_of_a_repository() -> None:
    hosts = spec_of({"clusterkit_apps": [app(model_source=HUB)]}).published()["hosts"]
    told = {
        "id": "one",
        "make": None,
        "folder": None,
        **HUB,
        "allow_patterns": [],
        "ignore_patterns": [],
        "max_rank": None,
        "path": f"{MODELS}/org--name--0123456789ab",
    }
    assert hosts["w1"]["models"] == [{**told, "weights": True}]
    # A head without replicas builds the app: it reads the configuration, and needs no weights.
    assert hosts["h1"]["models"] == [{**told, "weights": False}]
    assert (hosts["w1"]["caches"], hosts["h1"]["caches"]) != ([], hosts["w1"]["caches"])


def test_a_revision_is_asked_for() -> None:
    found = findings_of({"clusterkit_apps": [app(model_source={"hub": "org/name"})]})
    assert "is missing" in found["clusterkit_apps[0].parameters.model_source.revision"]
    found = findings_of({"clusterkit_apps": [app(model_source={"hub": "org/name", "revison": "main"})]})
    assert "no such key" in found["clusterkit_apps[0].parameters.model_source.revison"]


def test_a_mirror_is_a_url() -> None:
    assert spec_of({"clusterkit_mirrors": {"huggingface": "https://hub.example"}}).published()["mirrors"] == {
        "pypi": None,
        "huggingface": "https://hub.example",
    }
    found = findings_of({"clusterkit_mirrors": {"huggingface": "hub.example"}})
    assert "characters" in found["clusterkit_mirrors.huggingface"]


# ------------------------------------------------------------------ caches


def cache(cluster: dict[str, Any] | None = None, pool: dict[str, Any] | None = None, **parameters: Any) -> str:
    pools = {"gpus": {**GPUS, **(pool or {})}}
    spec = spec_of({"clusterkit_apps": [app(**parameters)], **(cluster or {})}, pools=pools)
    return spec.engine_cache(spec.apps[0]) or ""


def test_what_is_compiled_for_one_image_is_never_read_by_another() -> None:
    same = cache()
    assert len(same) == 16
    assert cache(max_replicas=4, engine_kwargs={"max_model_len": 4096}) == same
    others = [
        cache({"clusterkit_image": "registry.example/vllm@sha256:" + "0" * 64}),
        cache({"clusterkit_ray_version": "2.58.1", "clusterkit_vllm_version": "0.26.0"}),
        cache(pool={"clusterkit_gpu_model": "AMD-Instinct-MI325X-OAM"}),
        cache(model_source=HUB),
        cache(model_source={**HUB, "revision": "f" * 40}),
        cache(tensor_parallel=2),
        cache(pipeline_parallel=2),
    ]
    assert len({same, *others}) == len(others) + 1


def caches_in_serve(spec: ClusterSpec) -> list[str]:
    return [item["runtime_env"]["env_vars"]["VLLM_CACHE_ROOT"] for item in serve_config(spec)["applications"]]


def test_the_engine_and_the_role_mean_the_same_folder() -> None:
    spec = spec_of({"clusterkit_apps": [app("one"), app("two")]})
    fact = spec.published()
    names = fact["hosts"]["w1"]["caches"]
    assert len(names) == 2
    assert sorted(caches_in_serve(spec)) == [f"{fact['engine_caches']}/{name}/vllm" for name in names]


def test_the_caches_lie_where_a_node_may_write_and_nothing_is_cleared() -> None:
    """In the folder that ray_node gives to Ray's user as its cache: only that one is mounted in a container."""
    rendered = (ROOT / "roles/ray_node/vars/main.yml").read_text(encoding="utf-8")
    assert (
        "cache_dir: \"{{ ray_node_temp_path ~ '/cache' if ray_node_runtime == 'container' "
        "else ray_node_state_path ~ '/node/cache' }}\"" in rendered
    )
    image = {"clusterkit_runtime": "container", "clusterkit_image": "registry.example/vllm:1"}
    assert spec_of(image).engine_caches == "/var/lib/clusterkit/ray/cache/engine"
    assert spec_of().engine_caches == "/var/lib/clusterkit/node/cache/engine"
