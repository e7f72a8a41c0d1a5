"""Which versions must not move while an image is built. Runs inside the build.

held.py write [NAME...]   prints `name==version` of what is installed of HELD; fails where a NAME is missing
held.py check FILE        fails where something in FILE has another version now
held.py needs FILE        prints what a pyproject.toml needs for building, less what is HELD
"""

import importlib.metadata
import re
import sys

# Built by the vendor for its own ROCm or CUDA; an index has others under the same names.
HELD = (
    *("torch", "torchvision", "torchaudio", "triton", "pytorch-triton-rocm", "triton-rocm", "triton-kernels"),
    *("amdsmi", "flash-attn", "amd-aiter", "aiter", "mori", "vllm"),
)


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def needs(path):
    try:
        import tomllib
    except ModuleNotFoundError:  # before Python 3.11
        from pip._vendor import tomli as tomllib
    with open(path, "rb") as handle:
        wanted = tomllib.load(handle)["build-system"]["requires"]
    return [one for one in wanted if re.split(r"[^A-Za-z0-9_.-]", one)[0].lower() not in HELD]


def main(verb, *words):
    if verb == "needs":
        print("\n".join(needs(*words)))
        return 0
    if verb == "write":
        missing = [name for name in words if version(name) is None]
        if missing:
            sys.stderr.write(f"the base holds no {' and no '.join(missing)}: name a base image that does\n")
            return 1
        print("\n".join(f"{name}=={version(name)}" for name in HELD if version(name)))
        return 0
    with open(*words) as handle:
        held = dict(line.strip().split("==") for line in handle if line.strip())
    moved = {name: version(name) for name, wanted in held.items() if version(name) != wanted}
    for name, now in moved.items():
        sys.stderr.write(f"{name} is {now} now, and has to stay {held[name]}\n")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
