"""What a container is given for GPUs: one table, and both who start such containers get all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT, ansible_playbook, load_script

Json = dict[str, Any]

TABLE: Json = json.loads((ROOT / "plugins/module_utils/gpu_containers.json").read_text())
ACCELERATORS = ["rocm", "cuda", "cpu"]
NODE: Json = {
    "__ray_node_image_id": {"stdout": "sha256:0f"},
    "ray_node_host": {"models": []},
    "ray_node_models_path": "/data/models",
    "ray_node_volumes": [],
    "ray_node_ulimits": {},
}
HEALTH: Json = {
    "gpu_health_state_path": "/var/lib/clusterkit",
    "gpu_health_config_path": "/etc/clusterkit",
    "gpu_health_root_path": "/opt/clusterkit",
    "gpu_health_user": "ray",
    "gpu_health_ray_python": "python3",
    "gpu_health_runtime": "container",
    "gpu_health_image": "clusterkit/vllm:current",
    "gpu_health_gpus": 8,
    "gpu_health_tier1_seconds": 1,
    "gpu_health_tier1_memory_mib": 0,
    "gpu_health_tier1_timeout_s": 60,
    "gpu_health_tier1_thresholds": {},
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """{role: {accelerator: what its container gets}}, in one run of Ansible."""
    folder = tmp_path_factory.mktemp("containers")
    tasks: list[Json] = []
    for role, name, base in (
        ("ray_node", "__ray_node_container | combine(__ray_node_devices)", NODE),
        ("gpu_health", "__gpu_health_tier1_config.container", HEALTH),
    ):
        # No check of health where there is no GPU.
        for accelerator in ACCELERATORS if role == "ray_node" else ACCELERATORS[:2]:
            given = {**base, f"{role}_accelerator": accelerator, "role_path": f"{ROOT}/roles/{role}"}
            content = {"content": "{{ " + name + " | to_json }}", "dest": f"{folder}/{role}.{accelerator}"}
            tasks.append({"name": "Render", "ansible.builtin.copy": {**content, "mode": "0600"}, "vars": given})
    files = [f"{ROOT}/roles/{role}/vars/main.yml" for role in ("ray_node", "gpu_health")]
    play = {"name": "Render", "hosts": "localhost", "gather_facts": False, "vars_files": files, "tasks": tasks}
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    done = ansible_playbook(folder, "-i", "localhost,", "-c", "local", str(folder / "play.yml"))
    assert done.code == 0, done.text
    found: Json = {"ray_node": {}, "gpu_health": {}}
    for path in folder.glob("*.[rc]*"):
        role, _, accelerator = path.name.partition(".")
        found[role][accelerator] = json.loads(path.read_text())
    return found


def chosen(container: Json, accelerator: str) -> Json:
    return {key: container[key] for key in TABLE[accelerator]}


@pytest.mark.parametrize("accelerator", ACCELERATORS[:2])
def test_a_node_and_its_health_check_get_the_whole_table(rendered: Json, accelerator: str) -> None:
    assert TABLE[accelerator]
    assert rendered["gpu_health"][accelerator] == TABLE[accelerator]
    assert chosen(rendered["ray_node"][accelerator], accelerator) == TABLE[accelerator]
    assert rendered["ray_node"][accelerator]["devices_where_present"] == ["/dev/infiniband"]


def test_a_node_without_gpus_gets_nothing_of_it(rendered: Json) -> None:
    words = {key for accelerator in ACCELERATORS for key in TABLE[accelerator]} | {"devices_where_present"}
    assert not words & set(rendered["ray_node"]["cpu"])


def test_both_programs_know_every_word_of_the_table() -> None:
    """The launcher refuses others; the check would pass them over."""
    launcher = load_script(ROOT / "roles/ray_node/files/ray-node")
    check = (ROOT / "roles/gpu_health/files/gpu-tier1").read_text()
    for key in {key for accelerator in ACCELERATORS for key in TABLE[accelerator]}:
        assert key in launcher.CONTAINER_DEFAULTS
        assert f'box.get("{key}"' in check


def test_the_table_stands_nowhere_else() -> None:
    for path in Path(ROOT / "roles").glob("*/*/*.yml"):
        assert "/dev/kfd" not in path.read_text(), path
