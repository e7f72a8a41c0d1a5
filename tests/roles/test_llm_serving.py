"""An `llm` app on a real Ray with a real engine: a fixed number of replicas, and none until somebody asks, through each
way that requests can take."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterkit.render.serve import serve_config
from clusterkit.spec.cluster import ClusterSpec
from tests.roles.test_engine_launcher import MAKER, Node, apply, ask, nodes_engine, wait_for
from tests.support import free_block
from tests.unit.test_spec import spec_of

__all__ = ["nodes_engine"]  # a fixture

pytestmark = [pytest.mark.engine, pytest.mark.slow]

Json = dict[str, Any]

WAYS: dict[str, Json] = {
    "proxy": {},
    "haproxy": {"ingress": "haproxy"},
    "direct": {"ingress": "haproxy", "direct_streaming": True},
}
SCALED: Json = {"min_replicas": 0, "max_replicas": 1, "initial_replicas": 1, "upscale_delay_s": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, engine: Path) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    subprocess.run([f"{engine}/bin/python", str(MAKER), "--out", str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(params=list(WAYS))
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path, WAYS[request.param])
    yield found
    found.node.clean_up()


class Site:
    """A cluster of one host, as the kit renders it."""

    def __init__(self, folder: Path, serve: Json) -> None:
        self.folder, self.serve = folder, serve
        self.node = Node(folder, "head")
        block = free_block(30) + 50  # the node has the first of these
        own = {name: self.node.ports[name] for name in ("gcs", "dashboard", "client", "serve", "metrics")}
        names = ("haproxy_stats", "haproxy_metrics", "fallback", "fallback_grpc", "grpc")
        self.ports = {**own, **{name: block + number for number, name in enumerate(names)}}
        low = self.node.config["ports"]["worker_min"]
        self.ports |= {"worker_min": low, "worker_max": low + 199, "replica_min": low + 200, "replica_max": low + 499}
        published = self.spec().published()
        self.node.config |= {
            "env": published["ingress_environment"],
            "temp_dir": f"{self.node.temp_dir}/t",
            "num_cpus": 4,
        }
        self.node.save()

    def spec(self, model: Path = Path("/none"), **parameters: Any) -> ClusterSpec:
        app = {
            "name": "tiny",
            "template": "llm",
            "route_prefix": "/one",
            "parameters": {
                "model_id": "tiny",
                "model_source": {"folder": str(model)},
                "engine_kwargs": {"max_model_len": 512, "max_num_seqs": 4},
                **parameters,
            },
        }
        cluster = {
            "clusterkit_stack": "cpu",
            "clusterkit_ports": self.ports,
            "clusterkit_paths": {"ray_temp": str(self.node.temp_dir), "state": str(self.folder)},
            "clusterkit_serve": {"http_host": "127.0.0.1", **self.serve},
            "clusterkit_apps": [app],
        }
        return spec_of(cluster, pools={"cpus": {"clusterkit_accelerator": "cpu"}}, workers={"h1": "cpus"})

    def apply(self, model: Path, **parameters: Any) -> Json:
        return apply(self.node, serve_config(self.spec(model, **parameters)), self.folder)

    def deployments(self) -> dict[str, Json]:
        """As Serve has them now."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.node.ports['dashboard']}/api/serve/applications/")
        request.add_header("Authorization", f"Bearer {self.node.token.read_text()}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.load(answer)["applications"]["tiny"]["deployments"]
        assert isinstance(found, dict)
        return found

    def running(self, deployment: str) -> list[int]:
        """The processes of its replicas; one that starts or stops has none to show."""
        return [item["pid"] for item in self.deployments()[deployment]["replicas"] if item["state"] == "RUNNING"]

    def ask(self, **more: Any) -> str:
        url = f"http://127.0.0.1:{self.ports['serve']}/one/v1/chat/completions"
        return ask(url, {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "Count"}], **more})


def test_a_fixed_number_and_none_at_all(site: Site, model: Path) -> None:
    site.node.run("start")
    first = site.apply(model, num_replicas=1)
    server = site.deployments()["LLMServer:tiny"]
    # Ray LLM brings a scaling of its own, which must not stay in force beside the number.
    assert (server["deployment_config"]["num_replicas"], "autoscaling_config" in server["deployment_config"]) == (
        1,
        False,
    )
    assert json.loads(site.ask())["usage"]["completion_tokens"] > 0
    stream = [line for line in site.ask(stream=True).splitlines() if line]
    assert len(stream) > 2
    assert stream[-1] == "data: [DONE]"
    assert site.apply(model, num_replicas=1)["changed"] is False
    assert ("OpenAiIngress" in first["applications"]["tiny"]["deployments"]) is ("direct_streaming" not in site.serve)

    fixed = site.running("LLMServer:tiny")
    assert len(fixed) == 1, server
    scaled = site.apply(model, **SCALED)
    assert scaled["plan"]["changed"] == ["tiny"]
    names = [name for name in scaled["applications"]["tiny"]["deployments"] if name != "LLMRouter"]
    before = {name: site.running(name) for name in names}
    assert not set(fixed) & set(before["LLMServer:tiny"]), "from a number to scaling replaces the engine"

    site.apply(model, **SCALED, downscale_to_zero_delay_s=30)
    assert {name: site.running(name) for name in names} == before, "a scaling edit restarts nothing"
    wait_for(lambda: not any(site.deployments()[name]["replicas"] for name in names), 240)

    # The request that wakes the model is answered, and not told to come again.
    assert json.loads(site.ask())["usage"]["completion_tokens"] > 0
    assert len(site.running("LLMServer:tiny")) == 1
