"""model_store: weights that are made or fetched and checked on every run, and a site's folders, which are only read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

store = load_module("model_store")

# Stands for the program that trains the tiny model, and keeps its promises: `--check` compares what is there.
MAKER = """
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
weights = out / "model.safetensors"
if "--check" in sys.argv:
    good = weights.is_file() and weights.read_text() == "weights"
    print(json.dumps({"ok": good, "differences": ["model.safetensors has changed"]}))
    sys.exit(0 if good else 1)
if out.name == "bad":
    sys.exit("no room for weights")
out.mkdir(parents=True, exist_ok=True)
weights.write_text("weights")
pathlib.Path(os.environ["TMPDIR"], "cache").touch()
(out.parent / "environment.json").write_text(json.dumps(dict(os.environ)))
print("talk of a library")
print(json.dumps({"out": str(out)}))
"""


@pytest.fixture
def maker(tmp_path: Path) -> str:
    path = tmp_path / "make-model"
    path.write_text(MAKER)
    return str(path)


def made(path: Path, name: str = "tiny") -> Json:
    return {"id": name, "make": "tiny-llama", "folder": None, "path": str(path)}


def given(path: Path, name: str = "site") -> Json:
    return {"id": name, "make": None, "folder": str(path), "path": str(path)}


def folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_text("{}")
    return path


def run(maker: str, *models: Json, **more: Any) -> Json:
    return call(store, models=list(models), maker=maker, python=sys.executable, **more)


# ------------------------------------------------------------------ made


def test_a_model_is_made_once(maker: str, tmp_path: Path) -> None:
    first = run(maker, made(tmp_path / "models/tiny"))
    assert (first["changed"], first["made"]) == (True, ["tiny"])
    second = run(maker, made(tmp_path / "models/tiny"))
    assert (second["changed"], second["made"]) == (False, [])


@pytest.mark.parametrize("damage", ["other weights", None])
def test_a_damaged_model_is_made_anew(maker: str, tmp_path: Path, damage: str | None) -> None:
    run(maker, made(tmp_path / "tiny"))
    weights = tmp_path / "tiny/model.safetensors"
    weights.unlink() if damage is None else weights.write_text(damage)
    assert run(maker, made(tmp_path / "tiny"))["made"] == ["tiny"]
    assert weights.read_text() == "weights"


def test_a_model_is_made_without_a_network_and_leaves_no_cache(maker: str, tmp_path: Path) -> None:
    run(maker, made(tmp_path / "models/tiny"))
    environment = (tmp_path / "models/environment.json").read_text()
    assert '"HF_HUB_OFFLINE": "1"' in environment
    assert '"CUDA_VISIBLE_DEVICES": ""' in environment
    scratch = environment.partition('"TMPDIR": "')[2].partition('"')[0]
    assert scratch
    assert not os.path.exists(scratch)


def test_check_mode_makes_nothing(maker: str, tmp_path: Path) -> None:
    assert run(maker, made(tmp_path / "tiny"), check=True)["made"] == ["tiny"]
    assert not (tmp_path / "tiny").exists()
    # Nor does it need the program, which a first run would only now install.
    assert run("/nonexistent/make-model", made(tmp_path / "tiny"), check=True)["changed"]


def test_a_plan_names_the_files(maker: str, tmp_path: Path) -> None:
    tiny = made(tmp_path / "tiny")
    assert [item["actual"] for item in run(maker, tiny, check=True)["changes"]] == ["missing"]
    run(maker, tiny)
    assert run(maker, tiny, check=True)["changes"] == []
    (tmp_path / "tiny/model.safetensors").write_text("other")
    (told,) = run(maker, tiny, check=True)["changes"]
    assert (told["what"], told["name"], told["actual"]) == ("model", "tiny", "model.safetensors has changed")


def test_without_the_program_a_plan_does_not_call_a_whole_model_broken(maker: str, tmp_path: Path) -> None:
    """It was taken away by hand: that is one difference, and the next run puts it back before it asks."""
    whole = folder(tmp_path / "tiny", "manifest.json", "model.safetensors")
    assert not run("/nonexistent/make-model", made(whole), check=True)["changed"]
    assert run("/nonexistent/make-model", made(whole))["failed"]


def test_a_bare_host_is_planned_without_its_user(maker: str, tmp_path: Path) -> None:
    site = folder(tmp_path / "site", "config.json", "model.safetensors")
    assert "failed" not in run(maker, given(site), made(tmp_path / "tiny"), user="not-yet-there", check=True)


def test_a_model_that_cannot_be_made_says_why(maker: str, tmp_path: Path) -> None:
    failed = run(maker, made(tmp_path / "bad", "big"))
    assert failed["failed"]
    assert failed["msg"] == "model big could not be made: no room for weights"


# ------------------------------------------------------------------ a site's folder


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("config.json", "model-00001-of-00002.safetensors"), None),
        (("config.json", "pytorch_model.bin"), None),
        (("config.json", "model.gguf"), None),
        (("config.json",), "has no weights"),
        (("model.safetensors",), "has no config.json"),
        ((), "has no config.json"),
    ],
)
def test_what_a_folder_must_hold(tmp_path: Path, names: tuple[str, ...], problem: str | None) -> None:
    found = store.folder_problems(str(folder(tmp_path / "model", *names)))
    assert (found is None) if problem is None else (problem in found)


def test_a_folder_that_is_not_mounted(tmp_path: Path) -> None:
    found = store.folder_problems(str(tmp_path / "absent"))
    assert "there is no folder" in found
    assert "mount or copy it" in found
    (tmp_path / "file").touch()
    assert "there is no folder" in store.folder_problems(str(tmp_path / "file"))


def test_weights_that_rays_user_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder(tmp_path / "model", "config.json", "model.safetensors")
    # Root may read everything, so what the system would say to Ray's user is said for it.
    monkeypatch.setattr(store.os, "access", lambda path, _mode: not path.endswith(".safetensors"))
    assert "may not read model.safetensors" in store.folder_problems(str(model))


def adapter(path: Path, config: Any, max_rank: int = 16) -> Json:
    folder(path, "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return {**given(path, "tiny:sql"), "max_rank": max_rank}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"r": 16}, None),
        ({"r": 8, "rank_pattern": {"q_proj": 16}}, None),
        ({"r": 17}, "model tiny:sql: its rank is 17"),
        ({"r": 8, "rank_pattern": {"q_proj": 32}}, "and the engine takes 16: raise max_lora_rank"),
        ({"lora_alpha": 8}, "says no rank"),
        ({"r": "many"}, "says no rank"),
        ("no JSON", "says no rank"),
    ],
)
def test_an_adapter_that_the_engine_would_refuse(maker: str, tmp_path: Path, config: Any, problem: str | None) -> None:
    result = run(maker, adapter(tmp_path / "sql", config))
    assert problem in result["msg"] if problem else not result["changed"]


def test_a_model_is_no_adapter_and_an_adapter_no_model(maker: str, tmp_path: Path) -> None:
    model, sql = folder(tmp_path / "model", "config.json", "model.safetensors"), adapter(tmp_path / "sql", {"r": 8})
    assert "has no adapter_config.json" in run(maker, {**given(model), "max_rank": 16})["msg"]
    assert "has no config.json" in run(maker, given(Path(sql["path"])))["msg"]


def test_a_folder_is_read_in_place(maker: str, tmp_path: Path) -> None:
    model = folder(tmp_path / "model", "config.json", "model.safetensors")
    result = run(maker, given(model))
    assert (result["changed"], result["made"]) == (False, [])
    assert {item.name for item in model.iterdir()} == {"config.json", "model.safetensors"}


def test_every_folder_that_is_wrong_is_told(maker: str, tmp_path: Path) -> None:
    models = [given(tmp_path / "one", "one"), given(folder(tmp_path / "two"), "two")]
    failed = run(maker, *models)
    assert failed["failed"]
    assert [line.split(":")[0] for line in failed["msg"].splitlines()] == ["model one", "model two"]


# ------------------------------------------------------------------ away


def test_what_engines_compiled_for_no_app_goes_except_the_newest(maker: str, tmp_path: Path) -> None:
    caches = tmp_path / "engine"
    for age, name in enumerate(["newest", "newer", "older", "in-use"]):
        (caches / name).mkdir(parents=True)
        (caches / name / "kernel").touch()
        os.utime(caches / name, (1e9 - age, 1e9 - age))
    (caches / "link").symlink_to(tmp_path / "elsewhere")
    asked = {"path": str(caches), "names": ["in-use", "not-yet-there"], "keep": 1}

    told = run(maker, caches=asked, check=True)
    assert [(item["what"], item["name"], item["wanted"]) for item in told["changes"]] == [
        ("engine cache", "newer", "gone"),
        ("engine cache", "older", "gone"),
    ]
    assert (caches / "older").exists()
    assert run(maker, caches=asked)["changed"]
    assert sorted(item.name for item in caches.iterdir()) == ["in-use", "link", "newest"]
    assert not run(maker, caches=asked)["changed"]
    assert not run(maker, caches={**asked, "path": str(tmp_path / "none")})["changed"]


def test_what_was_made_goes_and_a_sites_folder_stays(maker: str, tmp_path: Path) -> None:
    models = [made(tmp_path / "tiny"), given(folder(tmp_path / "site", "config.json", "model.bin"))]
    run(maker, *models)
    told = run(maker, *models, state="absent", check=True)
    assert (told["made"], (tmp_path / "tiny").exists()) == (["tiny"], True)
    assert run(maker, *models, state="absent")["changed"]
    assert not (tmp_path / "tiny").exists()
    assert (tmp_path / "site/model.bin").exists()
    assert not run(maker, *models, state="absent")["changed"]
