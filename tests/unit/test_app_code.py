"""The code of apps as zips: the same for the same files, refused where it is none, and named in Serve's config."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clusterkit import app_code, workspace
from clusterkit.errors import UsageError
from clusterkit.render.serve import serve_config
from clusterkit.spec.load import load
from serve_apps.template import AppCode
from tests.unit.test_spec import app, inventory, spec_of


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with code, beside an inventory."""
    (tmp_path / "inventory").mkdir()
    (tmp_path / "shop/parts").mkdir(parents=True)
    (tmp_path / "shop/main.py").write_text("from parts import words\n")
    (tmp_path / "shop/parts/__init__.py").write_text("")
    (tmp_path / "shop/parts/words.py").write_text("WORDS = 1\n")
    return tmp_path / "shop"


def read(folder: Path | str, module: str = "main", inventory: Path | None = None) -> Any:
    sources = [str(inventory)] if inventory is not None else []
    return app_code.read(AppCode(folder=str(folder), module=module), sources)


def names(packed: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(packed)).namelist()


# ------------------------------------------------------------------ packing


def test_the_zip_is_named_by_its_bytes_and_holds_the_code(shop: Path) -> None:
    code = read(shop)
    packed = app_code.archive(code)
    assert hashlib.sha256(packed).hexdigest() == code.digest
    # Ray takes away a folder that is the only one: the packages of the code stay below it.
    assert names(packed) == ["app/main.py", "app/parts/__init__.py", "app/parts/words.py"]


def test_the_same_files_are_the_same_zip(shop: Path, tmp_path: Path) -> None:
    """Times, modes, order, caches and what is hidden make no other one: replicas would be replaced for nothing."""
    before = read(shop)
    other = tmp_path / "elsewhere"
    for name in ("parts/words.py", "parts/__init__.py", "main.py"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes((shop / name).read_bytes())
    (other / "main.py").chmod(0o700)
    os.utime(other / "main.py", (1, 1))
    for litter in ("__pycache__/main.cpython-311.pyc", ".git/config", ".env", "parts/words.pyc"):
        (other / litter).parent.mkdir(exist_ok=True)
        (other / litter).write_text("x")
    assert read(other).digest == before.digest
    (other / "main.py").write_text("from parts import words  # more\n")
    assert read(other).digest != before.digest


def test_a_file_under_another_name_is_another_zip(shop: Path) -> None:
    before = read(shop).digest
    (shop / "parts/words.py").rename(shop / "parts/other.py")
    assert read(shop).digest != before


def test_what_was_changed_since_is_not_sent_under_the_old_name(shop: Path) -> None:
    code = read(shop)
    (shop / "main.py").write_text("changed\n")
    with pytest.raises(UsageError, match="changed while this run went on"):
        app_code.archive(code)


def test_links_within_the_folder_are_read(shop: Path) -> None:
    (shop / "alias.py").symlink_to(shop / "main.py")
    assert "app/alias.py" in names(app_code.archive(read(shop)))


def outside(shop: Path) -> None:
    (shop.parent / "secret").write_text("x")
    (shop / "key.py").symlink_to("../secret")


def outside_folder(shop: Path) -> None:
    (shop / "lib").symlink_to("/usr/lib")


def dangling(shop: Path) -> None:
    (shop / "gone.py").symlink_to("nowhere.py")


def a_pipe(shop: Path) -> None:
    os.mkfifo(shop / "pipe")


def too_large(shop: Path) -> None:
    with (shop / "weights.bin").open("wb") as handle:
        handle.truncate(app_code.LIMIT_MIB * 2**20 + 1)


def nothing_in_it(shop: Path) -> None:
    shutil.rmtree(shop)
    (shop / ".hidden").mkdir(parents=True)
    (shop / ".hidden/file.py").write_text("x")


def not_there(shop: Path) -> None:
    shutil.rmtree(shop)


def no_such_module(shop: Path) -> None:
    (shop / "main.py").rename(shop / "mane.py")


def odd_name(shop: Path) -> None:
    (shop / "a\\b.py").write_text("x")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (outside, "the link key.py leads out of"),
        (outside_folder, "the link lib leads out of"),
        (dangling, "which is no file"),
        (a_pipe, "is no plain file"),
        (too_large, "32.0 MiB in 4 files, and code may have 32 MiB; the largest is weights.bin"),
        (nothing_in_it, "holds no file that is taken along"),
        (not_there, "there is no folder"),
        (no_such_module, "there is no module main in"),
        (odd_name, "cannot stand in a zip"),
    ],
)
def test_what_is_refused(shop: Path, harm: Any, words: str) -> None:
    assert read(shop).digest
    harm(shop)
    with pytest.raises(UsageError) as caught:
        read(shop)
    assert words in caught.value.message
    assert caught.value.hint


def test_the_folder_is_relative_to_the_inventory_and_not_in_it(shop: Path) -> None:
    """Ansible reads a whole folder of an inventory, and runs what is executable there."""
    beside = read("../shop", inventory=shop.parent / "inventory")
    assert beside.folder == str(shop)
    hosts = shop.parent / "hosts.yml"
    hosts.write_text("")
    assert read("shop", inventory=hosts) == beside
    with pytest.raises(UsageError, match="Ansible reads all of that as inventory") as caught:
        read("shop", inventory=shop.parent)
    assert "../shop" in str(caught.value.hint)


def test_the_kits_own_code_is_what_runs_in_replicas() -> None:
    """Not what only renders: a release that words a README or a check anew replaces no replica."""
    code = app_code.read(AppCode(template="embeddings"), [])
    packed = names(app_code.archive(code))
    assert packed == [
        "app/serve_apps/__init__.py",
        "app/serve_apps/embeddings/__init__.py",
        "app/serve_apps/embeddings/app.py",
        # The one that it shares with others.
        "app/serve_apps/openai_api.py",
    ]


def test_the_kits_code_and_the_sites_go_along_in_one(shop: Path) -> None:
    """Where a template calls what the site wrote."""
    wanted = AppCode(template="async_tasks", folder=str(shop), module="main")
    both = app_code.read(wanted, [])
    held = names(app_code.archive(both))
    assert {"app/main.py", "app/parts/words.py", "app/serve_apps/async_tasks/app.py"} <= set(held)
    (shop / "main.py").write_text("changed\n")
    assert app_code.read(wanted, []).digest != both.digest
    (shop / "serve_apps").mkdir()
    (shop / "serve_apps/own.py").write_text("")
    with pytest.raises(UsageError, match="serve_apps is the package of the kit's own code"):
        app_code.read(wanted, [])


@pytest.mark.parametrize(
    "template", [path.parent.name for path in sorted((workspace.ROOT / "serve_apps").glob("*/app.py"))]
)
def test_the_kits_own_code_imports_nothing_else_of_the_kit(template: str) -> None:
    """On a host there is only what the zip holds."""
    packed = zipfile.ZipFile(io.BytesIO(app_code.archive(app_code.read(AppCode(template=template), []))))
    held = {name.removeprefix("app/").removesuffix(".py").replace("/", ".") for name in packed.namelist()}
    for name in packed.namelist():
        for node in ast.walk(ast.parse(packed.read(name))):
            wanted = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wanted += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = {item for item in wanted if item.partition(".")[0] in ("serve_apps", "clusterkit")}
            assert ours <= held, name


# ------------------------------------------------------------------ in the spec


def site(folder: str, name: str = "shop") -> dict[str, Any]:
    parameters = {"code": folder, "import_path": "main:app"}
    return {"name": name, "template": "custom", "route_prefix": f"/{name}", "parameters": parameters}


def reader(home: Path) -> Any:
    return partial(app_code.read, inventories=[str(home / "inventory")])


def test_serve_is_told_where_the_code_lies(shop: Path) -> None:
    apps = {"clusterkit_apps": [site("../shop"), site("../shop", "twin"), app("chat")]}
    spec, findings = load(inventory(apps), reader(shop.parent))
    assert spec is not None, findings
    digest = read(shop).digest
    fact = spec.published()["code"]
    assert fact == {
        "path": "/var/lib/clusterkit/node/cache/apps",
        "apps": [{"digest": digest, "template": "", "folder": str(shop)}],
    }
    wanted = {item["name"]: item["runtime_env"].get("working_dir") for item in serve_config(spec)["applications"]}
    uri = f"file://{fact['path']}/{digest}.zip"
    assert wanted == {"shop": uri, "twin": uri, "chat": None}


def test_in_containers_it_lies_in_the_folder_that_they_share_with_the_host(shop: Path) -> None:
    image = {"clusterkit_runtime": "container", "clusterkit_image": "r.example/v:1"}
    spec, _ = load(inventory({"clusterkit_apps": [site("../shop")], **image}), reader(shop.parent))
    assert spec is not None
    assert spec.code_path == "/var/lib/clusterkit/ray/cache/apps"


def test_no_app_with_code_is_no_code() -> None:
    assert spec_of({"clusterkit_apps": [app()]}).published()["code"]["apps"] == []


def test_a_fault_of_the_code_is_a_finding_among_the_others(shop: Path) -> None:
    outside(shop)
    apps = {"clusterkit_apps": [site("../shop"), site("../nowhere", "lost"), app("chat", min_replicas=2)]}
    spec, findings = load(inventory(apps), reader(shop.parent))
    assert spec is None
    found = {finding.subject: finding for finding in findings}
    assert {"clusterkit_apps[0].parameters.code", "clusterkit_apps[1].parameters.code"} < found.keys()
    assert len(found) == 3
    lost = found["clusterkit_apps[1].parameters.code"]
    assert str(shop.parent / "nowhere") in lost.problem
    assert (lost.place.file, lost.place.line) == ("all.yml", 1)
    assert "relative to the inventory" in lost.fix


def test_no_release_gives_the_same_code_another_name() -> None:
    """Else an upgrade of the kit, or of the controller's Python, would replace every replica."""
    packed = app_code.pack({"a.py": b"A = 1\n"})
    assert hashlib.sha256(packed).hexdigest() == "32665fc5839cd0e29ab0e5aa1b858dde3422f135870514e3a7bee1186707219f"
