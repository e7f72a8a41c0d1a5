"""Runs inside an engine's image, without a device: is everything there, and of the right version?

    docker run --rm -i --network none IMAGE python3 - '{"ray": "2.60.0", "vllm": "0.29.0", ...}' < smoke.py

Prints one line of JSON with what was found; exit code 1 and the reasons on stderr where it is not as expected.
Expected keys: ray, vllm (release numbers), device (rocm, cuda, cpu, empty), archs (of which the engine needs all).
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile

# Set by some vendors' images; with it every replica sees all GPUs of the host.
NOSET = "RAY_EXPERIMENTAL_NOSET_"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


def found():
    """What the image holds; raises where an import fails."""
    import ray
    import torch
    import vllm  # noqa: F401

    said = {
        "python": ".".join(str(part) for part in sys.version_info[:2]),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "vllm": importlib.metadata.version("vllm"),
        "hip": getattr(torch.version, "hip", None),
        "cuda": getattr(torch.version, "cuda", None),
        # The list that torch was compiled for, readable without a device.
        "torch_archs": torch._C._cuda_getArchFlags().split() if hasattr(torch._C, "_cuda_getArchFlags") else [],
        "noset": sorted(name for name, value in os.environ.items() if value and name.startswith(NOSET)),
    }
    try:
        said["amdsmi"] = importlib.metadata.version("amdsmi")
    except importlib.metadata.PackageNotFoundError:
        said["amdsmi"] = None
    return said


def command_line(device):
    """The version that `vllm --version` prints. A build for GPUs looks for one before it answers (vLLM 0.29)."""
    done = subprocess.run(["vllm", "--version"], capture_output=True, text=True, check=False)
    if device != "cpu" and "Failed to infer device type" in done.stderr:
        return "needs a device"
    if done.returncode != 0:
        raise RuntimeError(f"vllm --version failed: {done.stderr.strip()[-600:]}")
    return done.stdout.strip().splitlines()[-1]


def app(device):
    """Build an LLM app's config as Serve's head does: from the model's files, without a device."""
    from ray.serve.llm import LLMConfig, build_openai_app

    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as handle:
            json.dump(TINY, handle)
        config = {
            "model_loading_config": {"model_id": "smoke", "model_source": folder},
            "engine_kwargs": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1},
            "placement_group_config": {"bundles": [{"GPU": 1}], "strategy": "STRICT_PACK"},
        }
        if device in ("cpu", "empty"):
            config["engine_kwargs"]["enforce_eager"] = True
            if "accelerator_config" in LLMConfig.model_fields:
                config["accelerator_config"] = {"kind": "cpu"}
            config["placement_group_config"] = {"bundles": [{"CPU": 1}], "strategy": "STRICT_PACK"}
        return type(build_openai_app({"llm_configs": [LLMConfig(**config)]})).__name__


def wrong(said, expect):
    """Why the image is not what was asked for."""
    reasons = []
    for name in ("ray", "vllm"):
        # A build for ROCm says 0.10.2+rocm700.
        if expect.get(name) and said[name].split("+")[0] != expect[name]:
            reasons.append(f"{name} is {said[name]}, and {expect[name]} was wanted")
    device = expect.get("device")
    if device == "rocm" and not said["hip"]:
        reasons.append(f"torch {said['torch']} is not built for ROCm: something replaced the base's")
    if device == "rocm" and not said["amdsmi"]:
        reasons.append("amdsmi is missing: Ray and vLLM would see no GPU")
    if device == "cuda" and not said["cuda"]:
        reasons.append(f"torch {said['torch']} is not built for CUDA")
    if device in ("rocm", "cuda"):
        lacking = [arch for arch in expect.get("archs", []) if not any(arch in one for one in said["torch_archs"])]
        if lacking:
            reasons.append(f"torch is built for {', '.join(said['torch_archs'])}, not for {', '.join(lacking)}")
    for name in said["noset"]:
        reasons.append(f"{name} is set: every replica would see all GPUs")
    return reasons


def main():
    expect = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    try:
        said = found()
        said["command"] = command_line(expect.get("device"))
        said["app"] = app(expect.get("device"))
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {str(error)[-800:]}\n")
        return 1
    reasons = wrong(said, expect)
    sys.stderr.write("".join(f"{reason}\n" for reason in reasons))
    sys.stdout.write(json.dumps(said, sort_keys=True) + "\n")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
