"""The launcher's container path without Docker: what `docker run` is given, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_launcher import given, ray_node

ME = pwd.getpwuid(os.getuid())


def config(container: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    box = {"image": "sha256:0f", **(container or {})}
    checked = ray_node.check_config(
        given(
            **{
                "runtime": "container",
                "venv": None,
                "user": ME.pw_name,
                "cache_dir": "/var/cache/node",
                "container": box,
                **changes,
            }
        )
    )
    assert isinstance(checked, dict)
    return checked


def run_argv(container: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    argv = ray_node.container_argv(config(container, **changes), "/run/node.env", ["ROCR_VISIBLE_DEVICES"])
    assert isinstance(argv, list)
    return argv


def values(argv: list[str], flag: str) -> list[str]:
    return [value for name, value in itertools.pairwise(argv) if name == flag]


def test_docker_is_given_ray_as_its_user_on_the_hosts_network() -> None:
    argv = run_argv()
    assert argv[:3] == ["run", "--detach", "--init"]
    assert values(argv, "--network") == values(argv, "--ipc") == ["host"]
    assert values(argv, "--user") == [f"{ME.pw_uid}:{ME.pw_gid}"]
    assert values(argv, "--restart") == ["no"], "dockerd must not start by itself what the unit knows nothing of"
    assert "no-new-privileges" in values(argv, "--security-opt")
    assert "--privileged" not in argv
    inside = argv[argv.index("sha256:0f") + 1 :]
    assert inside[:4] == ["-u", "ROCR_VISIBLE_DEVICES", "ray", "start"]


def test_gpus_are_given_as_devices_and_groups() -> None:
    group = ray_node.grp.getgrgid(ME.pw_gid).gr_name
    argv = run_argv(
        {
            "devices": ["/dev/kfd"],
            "devices_where_present": ["/dev/null", "/dev/there-is-none"],
            "groups": [group, "44"],
            "cap_add": ["SYS_PTRACE"],
            "security_opt": ["seccomp=unconfined"],
            "ulimits": {"memlock": "-1:-1"},
            "gpus": "all",
        }
    )
    assert values(argv, "--device") == ["/dev/kfd", "/dev/null"]
    assert values(argv, "--group-add") == [str(ME.pw_gid), "44"], "numbers: the image has names of its own"
    assert values(argv, "--cap-add") == ["SYS_PTRACE"]
    assert values(argv, "--security-opt") == ["no-new-privileges", "seccomp=unconfined"]
    assert values(argv, "--ulimit") == ["memlock=-1:-1"]
    assert values(argv, "--gpus") == ["all"]
    with pytest.raises(ray_node.Problem, match="no group there-is-none"):
        run_argv({"groups": ["there-is-none"]})


def test_only_rays_own_folders_can_be_written() -> None:
    argv = run_argv({"read_only": ["/data/models"], "volumes": [{"source": "/a", "target": "/b", "read_only": False}]})
    mounts = values(argv, "--mount")
    writable = {mount.split("source=")[1].split(",")[0] for mount in mounts if not mount.endswith(",readonly")}
    assert writable == {"/tmp/node", "/var/cache/node", "/a"}
    assert "type=bind,source=/data/models,target=/data/models,readonly" in mounts
    assert "type=bind,source=/etc/node/token,target=/etc/node/token,readonly" in mounts


def test_a_head_that_scales_sees_folders_that_others_write(tmp_path: Path) -> None:
    """A file that is replaced, and a socket that is made anew, would be the old ones in the container for ever."""
    etc, run = tmp_path / "etc", tmp_path / "run/fleet"
    scales = {"config": f"{etc}/a.yaml", "lib": f"{etc}/lib", "environment": {}, "folders": [str(etc), str(run)]}
    mounts = values(run_argv(autoscaler=scales), "--mount")
    for folder in (etc, run):
        assert f"type=bind,source={folder},target={folder},readonly" in mounts
    node = config(autoscaler=scales)
    with pytest.raises(ray_node.Problem, match=r"a\.yaml: the role autoscaler writes it"):
        ray_node.prepare_autoscaler(node)
    (etc / "lib").mkdir(parents=True)
    (etc / "a.yaml").touch()
    ray_node.prepare_autoscaler(node)
    assert stat.S_IMODE(run.stat().st_mode) == 0o755, "Docker mounts no folder that is missing, and Ray has to enter it"


def test_the_images_own_python_path_stays_behind_the_providers() -> None:
    image = {"PYTHONPATH": "/app/aiter", "PATH": "/bin"}
    assert ray_node.with_path_of_image({"PYTHONPATH": "/lib"}, image)["PYTHONPATH"] == "/lib:/app/aiter"
    assert ray_node.with_path_of_image({"PYTHONPATH": "/lib"}, {"PATH": "/bin"})["PYTHONPATH"] == "/lib"


def test_what_is_secret_goes_by_a_file_of_its_own(tmp_path: Path) -> None:
    secrets = tmp_path / "environment.json"
    secrets.write_text(json.dumps({"HF_TOKEN": "hf_secret"}))
    node = config(env_file=str(secrets), state_dir=str(tmp_path))
    env = ray_node.ray_env(node, {}, {"PATH": "/shell", "HOME": "/root"})
    assert env["HF_TOKEN"] == "hf_secret"
    assert "PATH" not in env, "the image's own stands"
    assert env["HOME"] == "/tmp/node/tmp"
    written = Path(ray_node.write_env_file(node, env))
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert "HF_TOKEN=hf_secret\n" in written.read_text()
    assert "hf_secret" not in " ".join(ray_node.container_argv(node, str(written)))
    with pytest.raises(ray_node.Problem, match="no line breaks in its environment: KEY") as caught:
        ray_node.write_env_file(node, {"KEY": "a\nb"})
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"container": {"name": "x y"}}, "container.name is 'x y'"),
        ({"container": {"image": ""}}, "container.image is missing"),
        ({"container": {"privileged": True}}, "unknown key container.privileged"),
        ({"container": {"volumes": [{"source": "relative", "target": "/b"}]}}, "no absolute source"),
        ({"container": {"volumes": [{"source": "/a,b", "target": "/b"}]}}, "a path with a comma"),
    ],
)
def test_a_wrong_container(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ray_node.Problem, match=says) as caught:
        config(**changes)
    assert caught.value.code == 2


def test_the_runtime_says_what_it_needs() -> None:
    for runtime, missing in (("venv", "venv is missing"), ("container", "container is missing; user is missing")):
        with pytest.raises(ray_node.Problem, match=missing):
            ray_node.check_config(given(runtime=runtime, venv=None))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_folders_are_prepared_as_rays_user() -> None:
    """What Ray's user could have put there has no power over root; done as root, the link would be followed."""
    nobody = pwd.getpwnam("nobody")
    # Below pytest's folders the path would be too long for Ray's sockets.
    base = Path(tempfile.mkdtemp(prefix="ckc-", dir="/tmp"))
    try:
        base.chmod(0o755)
        mine, home = base / "mine", base / "ray"
        mine.mkdir(mode=0o700)
        home.mkdir()
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        (home / "t").symlink_to(mine)
        node = config(temp_dir=str(home / "t"), cache_dir=str(home / "cache"), user="nobody")
        with pytest.raises(ray_node.Problem, match=r"not a folder that belongs to this user|Permission denied"):
            ray_node.as_node_user(node, ray_node.prepare_folders)
        assert list(mine.iterdir()) == []
        (home / "t").unlink()
        ray_node.as_node_user(node, ray_node.prepare_folders)
        assert (home / "t" / "tmp").stat().st_uid == nobody.pw_uid
    finally:
        shutil.rmtree(base)
