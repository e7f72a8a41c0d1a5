"""The recipe `rocm` builds real vLLM from source, on a Debian that stands in for the vendor's image.

No ROCm is at hand: VLLM_TARGET_DEVICE=empty leaves out the kernels, torch is the CPU build, and amd_smi is a package
of that name. Everything else is as on a site: a git repository with a tag, a patch, the constraints, Ray last.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterkit import debian, images, wheels
from clusterkit.errors import ToolMissing
from clusterkit.image_plan import Patch, SourceImage
from clusterkit.spec.stacks import table

pytestmark = [pytest.mark.docker, pytest.mark.slow]

ROW = table().get("rocm72")
PATCH = "--- /dev/null\n+++ b/vllm/site_note.py\n@@ -0,0 +1 @@\n+NOTE = 'patched by the site'\n"
PACKAGES = ("ca-certificates", "gcc", "libc6-dev", "libgomp1", "libnuma1", "python3", "python3-dev", "python3-pip")
# What AMD's own images do too: a variable that breaks one GPU per replica, and an amdsmi of the ROCm release.
VENDOR = """
FROM {base}
RUN --mount=type=bind,source=wheels,target=/wheels \
    python3 -m pip install --break-system-packages --no-index --find-links /wheels torch
RUN mkdir -p /opt/rocm/share/amd_smi/amdsmi && cd /opt/rocm/share/amd_smi && touch amdsmi/__init__.py \
 && echo 'from setuptools import setup; setup(name="amdsmi", version="7.2.3", packages=["amdsmi"])' > setup.py
ENV RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES=1
"""


class StandIn(SourceImage):
    """A base that no registry has given a digest."""

    @property
    def missing(self) -> list[str]:
        return []


def must(*words: str, **more: object) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    said: str = done.stdout
    return said


@pytest.fixture(scope="module")
def docker() -> str:
    try:
        return images.builder()
    except ToolMissing as error:
        pytest.skip(f"{error.message}: {error.hint}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's released source at its tag, in a git repository of this machine."""
    assert ROW is not None
    folder = tmp_path_factory.mktemp("sdist")
    # pip asks the source for its metadata after the download, and that needs torch: the unpacked tree is enough.
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--no-clean", "--no-deps", "--no-build-isolation"),
            *("--no-binary", ":all:", "--dest", str(folder), f"vllm=={ROW.vllm}"),
        ],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        check=False,
    )
    trees = [path.parent for path in folder.glob("**/vllm_*/pyproject.toml")]
    if not trees:
        pytest.skip(f"no index gave the source of vLLM {ROW.vllm}")
    (tree,) = trees
    git = ("git", "-C", str(tree), "-c", "user.name=test", "-c", "user.email=test@example.invalid")
    must(*git, "init", "--quiet", "--initial-branch", "main")
    must(*git, "add", "--all", "--force")
    must(*git, "commit", "--quiet", "--message", "the released source")
    must(*git, "tag", "--annotate", "--message", "release", f"v{ROW.vllm}")
    return tree


@pytest.fixture(scope="module")
def vendor(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian with torch for CPUs, standing in for a vendor's image."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("there is no mmdebstrap")
    context, store = tmp_path_factory.mktemp("vendor"), tmp_path_factory.mktemp("store")
    cpu = table().get("cpu")
    assert cpu is not None
    assert cpu.engine is not None
    (torch,) = (one for one in cpu.engine.requirements if one.startswith("torch=="))
    wish = wheels.Wish((torch, "setuptools"), exclude=("triton",), find_links=cpu.engine.find_links)
    target = wheels.Target("3.11", "2.36", os.uname().machine)
    house = wheels.wheelhouse(wish, target, wheels.lock(wish, target, store=store), store=store)
    images.unpack(house, context / "wheels")
    tag = f"clusterkit-test/vendor:{uuid.uuid4().hex[:8]}"
    debian.bootstrap(context / "base.tar", PACKAGES, debian.debian_sources(None))
    must(docker, "import", str(context / "base.tar"), f"{tag}-debian")
    (context / "base.tar").unlink()
    (context / "Dockerfile").write_text(VENDOR.format(base=f"{tag}-debian"))
    images.build(docker, tag, context, log=context.parent / "vendor.log")
    yield tag
    subprocess.run([docker, "image", "rm", tag, f"{tag}-debian"], capture_output=True, check=False)


def test_the_recipe_builds_real_source(
    docker: str, repository: Path, vendor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ROW is not None
    assert ROW.image is not None
    ref = f"v{ROW.vllm}"
    commit = images.resolve(str(repository), ref, store=tmp_path)
    plan = StandIn(
        recipe="rocm",
        base=vendor,
        source=str(repository),
        ref=ref,
        commit=commit,
        vllm=ROW.vllm,
        ray=(f"ray[{ROW.ray_extra}]=={ROW.ray}", *ROW.image.requirements),
        archs=("gfx942",),
        arguments=(("VLLM_TARGET_DEVICE", "empty"),),
        patches=(Patch("0001-note.patch", PATCH),),
    )
    (authority, *_) = [*wheels._pip_settings().get("cert", []), ""]
    site = images.Site(ca_bundle=authority)
    lines: list[str] = []
    try:
        made = images.archive(plan, store=tmp_path, site=site, on_line=lines.append)
        assert made.built
        assert any(line.startswith("#") for line in lines), "no live log"
        # The same inputs are the same image: nothing is built, nor asked of Docker.
        again = images.archive(plan, store=tmp_path, site=site)
        assert again == images.Built(made.tag, made.archive, built=False)

        labels = images.inspect(made.tag)["labels"]
        assert labels["org.opencontainers.image.revision"] == commit
        assert labels["clusterkit.arch"] == "gfx942"
        assert labels["clusterkit.inputs"] == plan.inputs
        assert json.loads(labels["clusterkit.made-of"])["patch 0001-note.patch"] == plan.patches[0].digest

        def inside(script: str) -> str:
            return must(docker, "run", "--rm", "--network", "none", made.tag, "sh", "-c", script).strip()

        versions = inside("cat /usr/share/clusterkit/versions.txt").splitlines()
        assert f"vllm=={ROW.vllm}+empty" in versions
        assert f"ray=={ROW.ray}" in versions
        assert "amdsmi==7.2.3" in versions
        assert [line for line in versions if line.startswith("torch==")] == ["torch==2.13.0+cpu"], "pip took its own"
        assert inside("python3 -c 'import vllm.site_note as n; print(n.NOTE)'").endswith("patched by the site")
        assert inside('echo "${RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES:-off}"') == "off"
        assert inside("command -v ccache git cmake ninja || echo none") == "none", "tools of the build are in the image"
        # As a build for GPUs the same image is refused, and not because an app could not be built without one.
        with pytest.raises(images.ClusterkitError, match="is not built for ROCm") as caught:
            images.smoke(docker, made.tag, {**plan.expected(), "ray": "2.52.1", "device": "rocm"}, named=made.tag)
        assert f"ray is {ROW.ray}, and 2.52.1 was wanted" in caught.value.message
    finally:
        with capsys.disabled():
            print("\n".join(lines[-5:]))
        subprocess.run([docker, "image", "rm", plan.tag], capture_output=True, check=False)
