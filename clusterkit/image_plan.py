"""What the engine's image is made of when vLLM is built from source: its recipe, rendered, and its name.

Reads the recipes of images/vllm and nothing else: the commit and the patches are given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import jinja2

RECIPES = Path(__file__).resolve().parent.parent / "images" / "vllm"
REPOSITORY = "clusterkit/vllm"
BASE_REPOSITORY = "clusterkit/base"

# vLLM's own words (its setup.py, requirements/): what it is built for, and what it then needs.
REQUIREMENTS = {"rocm": "rocm.txt", "cuda": "cuda.txt", "empty": "common.txt"}
# How PyTorch's build is told the architectures, and between them.
ARCHS = {"rocm": ("PYTORCH_ROCM_ARCH", ";"), "cuda": ("TORCH_CUDA_ARCH_LIST", " ")}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
COMMIT = re.compile(r"[0-9a-f]{40}")
# How Docker's builder before BuildKit begins a step.
PLAIN_STEP = re.compile(r"^Step (\d+/\d+) : ")
# About what one compiler process of vLLM's kernels takes; MAX_JOBS above that ends in the OOM killer.
GIB_PER_JOB = 4


@dataclass(frozen=True)
class Patch:
    """A change of the site's to vLLM's source: `git diff`'s format, applied in the order of the names."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SourceImage:
    """Everything that an image from source is made of.

    recipe       rocm or cuda, a folder of images/vllm
    base         the vendor's image, `name@sha256:…`
    base_recipe  a Dockerfile in vLLM's source that makes the base out of `base`; empty: `base` holds torch itself
    source, ref  git repository, and the tag, branch or commit that was asked for
    commit       what `ref` was resolved to; empty where the repository did not answer, and `unresolved` says why
    ray          what is installed last, Ray first
    archs        GPU architectures, such as gfx942 or 9.0
    arguments    environment of the build, such as VLLM_TARGET_DEVICE
    unknown_models  GPUs of the pools whose architecture nobody has named
    """

    recipe: str
    base: str
    source: str
    ref: str
    commit: str
    vllm: str
    ray: tuple[str, ...]
    archs: tuple[str, ...]
    base_recipe: str = ""
    arguments: tuple[tuple[str, str], ...] = ()
    patches: tuple[Patch, ...] = ()
    unresolved: str = ""
    unknown_models: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return dict(self.arguments).get("VLLM_TARGET_DEVICE", self.recipe)

    @property
    def ray_version(self) -> str:
        return self.ray[0].rpartition("==")[2]

    @cached_property
    def made_of(self) -> dict[str, str]:
        """Every input by name: another value of any of them is another image. Where the source is fetched from,
        and through which index, is none."""
        return {
            "recipe": recipe_digest(self.recipe),
            "base": self.base,
            **({"base recipe": self.base_recipe} if self.base_recipe else {}),
            "commit": self.commit,
            "vllm": self.vllm,
            "ray": " ".join(self.ray),
            "arch": self.arch_list,
            **{f"argument {name}": value for name, value in self.arguments},
            **{f"patch {patch.name}": patch.digest for patch in self.patches},
        }

    @property
    def inputs(self) -> str:
        """A digest of all inputs: a host that has an image of these needs no other."""
        return digest(self.made_of)

    @property
    def tag(self) -> str:
        return f"{REPOSITORY}-{self.recipe}:{self.inputs}"

    @property
    def base_tag(self) -> str:
        """The name of what `base_recipe` makes; the base itself where there is no such recipe."""
        if not self.base_recipe:
            return self.base
        patches = [[patch.name, patch.digest] for patch in self.patches]
        key = [self.base, self.base_recipe, self.commit, self.arch_list, patches]
        return f"{BASE_REPOSITORY}-{self.recipe}:{digest(key)}"

    @property
    def arch_list(self) -> str:
        return ARCHS[self.recipe][1].join(self.archs)

    @property
    def missing(self) -> list[str]:
        """What has to be pinned before this can be built, in words with the way to find it."""
        found = []
        if not self.base:
            found.append(
                "clusterkit_image_base: the version table names no base image for this row. Name one of the vendor's "
                "that has the toolkit vLLM is built with, by its digest: name@sha256:…"
            )
        elif not DIGEST.search(self.base):
            name = self.base.partition("@")[0]
            found.append(
                f"clusterkit_image_base: {name} has no digest in the version table. Find it: docker pull {name} && "
                f"docker image inspect --format '{{{{index .RepoDigests 0}}}}' {name}; then set "
                "clusterkit_image_base: name@sha256:…"
            )
        if self.unknown_models or not self.archs:
            which = ", ".join(self.unknown_models) or "the pools' GPUs (no clusterkit_gpu_model)"
            found.append(
                f"clusterkit_image_archs: the architecture of {which} is not in the version table. Name those of all "
                "pools, such as [gfx942] or ['9.0']"
            )
        return found

    def dockerfile(self, *, plain: bool = False) -> str:
        """The recipe, rendered: what BuildKit is given. `plain`: for Docker's builder before that."""
        return rendered(
            self.recipe,
            plain=plain,
            base=self.base_tag or "(none)",
            vllm=self.vllm,
            device=self.device,
            commit=self.commit or self.ref,
            arch_variable=ARCHS[self.recipe][0],
            arch_list=self.arch_list,
            arguments=[(name, value) for name, value in self.arguments if name != "VLLM_TARGET_DEVICE"],
            requirements=REQUIREMENTS[self.device],
            # On CUDA the index's torch is the vendor's; for ROCm the base has to bring it.
            held_needs="torch" if self.recipe == "rocm" else "",
            ray=list(self.ray),
            ray_version=self.ray_version,
        )

    def labels(self) -> dict[str, str]:
        """What the image says of itself: OCI's annotations, and ours."""
        name, _, base_digest = self.base.partition("@")
        oci = {
            "title": f"vLLM for {self.device}, with Ray",
            "version": self.vllm,
            "revision": self.commit,
            "source": without_credentials(self.source),
            "base.name": name,
            "base.digest": base_digest,
        }
        return {
            **{f"org.opencontainers.image.{key}": value for key, value in oci.items()},
            "clusterkit.image": "vllm",
            "clusterkit.inputs": self.inputs,
            "clusterkit.recipe": self.made_of["recipe"],
            "clusterkit.ray": self.ray_version,
            "clusterkit.arch": self.arch_list,
            "clusterkit.made-of": json.dumps(self.made_of, sort_keys=True),
        }

    def expected(self) -> dict[str, object]:
        """What the smoke test has to find inside. torch calls compute capability 9.0 `sm_90`."""
        archs = [f"sm_{arch.replace('.', '')}" if self.recipe == "cuda" else arch for arch in self.archs]
        return {"ray": self.ray_version, "vllm": self.vllm, "device": self.device, "archs": archs}


def rendered(recipe: str, *, plain: bool, **names: object) -> str:
    """A recipe's Dockerfile. `plain`: without mounts and secrets, which only BuildKit knows; the image holds the same
    packages. The digest that names an image is not made from this text where it is plain."""
    text = _environment().get_template(f"{recipe}/Dockerfile.j2").render(plain=plain, **names)
    return re.sub(r"\n{3,}", "\n\n", text)


def digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def recipe_digest(recipe: str) -> str:
    """Of every file that a recipe from source is rendered from or brings along."""
    files = [RECIPES / "source.Dockerfile.j2", RECIPES / recipe / "Dockerfile.j2", *sorted((RECIPES / "kit").iterdir())]
    return digest([[file.name, file.read_text(encoding="utf-8")] for file in files if file.is_file()])


def why(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """Which inputs differ from those of the last image that was built, in words; nothing where none does."""
    if before is None:
        return ["no image of this recipe was built here before"]
    found = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if old is None:
            found.append(f"{name} is new: {new}")
        elif new is None:
            found.append(f"{name} is gone; it was {old}")
        else:
            found.append(f"{name} changed: {old} -> {new}")
    return found


def jobs(cores: int, memory_gib: float) -> int:
    """How many compilers may run at once: one a core, and one for each 4 GiB of memory."""
    return max(1, min(cores, int(memory_gib // GIB_PER_JOB)))


def without_credentials(url: str) -> str:
    """A URL that may stand in a label; a path or git's `host:path` is as it was."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def quoted(value: str) -> str:
    """A word of a Dockerfile's ENV that means itself; a requirement that bash reads has no character but these."""
    escaped = re.sub(r'([\\"$])', r"\\\1", value)
    return f'"{escaped}"'


def step_of(line: str) -> tuple[str, str] | None:
    """(number, rest) of a line of BuildKit's plain progress, such as `#12 [build 3/5] RUN make`."""
    match = re.match(r"#(\d+) (.*)", line)
    return (match[1], match[2]) if match else None


def failed_step(log: Sequence[str]) -> tuple[str, list[str]]:
    """(name, last 20 lines) of the step that a build ended in, from the log of either builder."""
    steps = [number for number, line in enumerate(log) if PLAIN_STEP.match(line)]
    if steps:
        # One at a time: what failed is what began last.
        after = [line for line in log[steps[-1] + 1 :] if line.strip()]
        spoken = [line for line in after if not line.startswith((" --->", "Removing intermediate", "The command '"))]
        return re.sub(PLAIN_STEP, r"[\1] ", log[steps[-1]]), (spoken or after)[-20:]
    names: dict[str, str] = {}
    said: dict[str, list[str]] = {}
    failed = ""
    for line in log:
        if (step := step_of(line)) is None:
            continue
        number, rest = step
        if rest.startswith("["):
            # The mounts are long, and the same in every step.
            names.setdefault(number, re.sub(r"--mount=\S+\s+", "", rest))
        elif rest.startswith("ERROR"):
            failed = number
        elif not rest.startswith(("DONE", "CACHED", "CANCELED", "sha256:")):
            said.setdefault(number, []).append(re.sub(r"^\d+\.\d+ ", "", rest))
    if not failed:
        return "", [line for line in log if line.strip()][-20:]
    return names.get(failed, f"step {failed}"), (said.get(failed) or [line for line in log if line.strip()])[-20:]


def _environment() -> jinja2.Environment:
    # Dockerfiles, no HTML; a name that is not given is a mistake.
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(RECIPES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    made.filters["quoted"] = quoted
    return made
