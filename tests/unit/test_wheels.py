"""Locks and wheelhouses, resolved by uv and collected by pip from an index that is a folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clusterkit import wheels
from clusterkit.errors import ClusterkitError
from clusterkit.wheels import Target, Wish

DEBIAN12 = Target("3.11", "2.36", "x86_64")
# Pinned in every lock, for hosts that have none.
PIP = "pip==99.0"


def wheel(
    folder: Path,
    name: str,
    version: str,
    *,
    requires: tuple[str, ...] = (),
    tag: str = "py3-none-any",
    python: str = "",
) -> Path:
    """A wheel with one module in it."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {item}" for item in requires]
    lines += [f"Requires-Python: {python}"] if python else []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def index(folder: Path) -> str:
    """The folder's wheels as an index (PEP 503)."""
    simple = folder / "simple"
    for path in folder.glob("*.whl"):
        page = simple / path.name.split("-")[0] / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        old = page.read_text() if page.exists() else "<!DOCTYPE html><html><body>\n"
        link = f'<a href="{path.as_uri()}">{path.name}</a>\n'
        page.write_text(old if link in old else old + link)
    return simple.as_uri()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip and uv see the folder alone; a way out would be a proxy that nobody runs."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """An index: `app` needs `lib` and `extra`; `lib` has two versions."""
    folder = tmp_path / "shop"
    wheel(folder, "app", "1.0", requires=("lib>=1", "extra"))
    wheel(folder, "lib", "1.0")
    wheel(folder, "lib", "2.0")
    wheel(folder, "extra", "1.0")
    wheel(folder, "pip", "99.0")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def wish(shop: Path, *requirements: str, **more: object) -> Wish:
    return Wish(requirements=requirements or ("app",), index_url=index(shop), **more)  # type: ignore[arg-type]


# ------------------------------------------------------------------ what fits a host


@pytest.mark.parametrize(
    ("glibc", "has", "lacks"),
    [
        ("2.36", ("manylinux_2_36", "manylinux_2_17", "manylinux2014", "manylinux1", "linux"), ("manylinux_2_37",)),
        ("2.17", ("manylinux_2_17", "manylinux2014", "manylinux2010"), ("manylinux_2_18",)),
        ("2.12", ("manylinux2010", "manylinux1"), ("manylinux2014",)),
    ],
)
def test_platforms_of_a_glibc(glibc: str, has: tuple[str, ...], lacks: tuple[str, ...]) -> None:
    found = Target("3.11", glibc, "x86_64").platforms
    assert {f"{name}_x86_64" for name in has} <= set(found)
    assert not {f"{name}_x86_64" for name in lacks} & set(found)
    assert found[0] == f"manylinux_{glibc.replace('.', '_')}_x86_64"


def test_platforms_are_of_the_machine() -> None:
    assert all(name.endswith("_aarch64") for name in Target("3.12", "2.39", "aarch64").platforms)


@pytest.mark.parametrize(
    ("glibc", "step"),
    [("2.17", "17"), ("2.27", "17"), ("2.28", "28"), ("2.30", "28"), ("2.36", "36"), ("2.40", "40"), ("2.41", "40")],
)
def test_the_platform_that_uv_is_given(glibc: str, step: str) -> None:
    """Never newer than the host; a host newer than all that uv knows gets the newest."""
    assert Target("3.12", glibc, "aarch64").uv_platform == f"aarch64-manylinux_2_{step}"


def test_uv_knows_every_platform_that_it_is_given() -> None:
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for step in wheels.UV_GLIBC:
        for machine in ("x86_64", "aarch64"):
            assert Target("3.12", f"2.{step}", machine).uv_platform in known


def test_a_wheel_for_a_newer_glibc_does_not_fit(shop: Path, store: Path) -> None:
    wheel(shop, "native", "1.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    wheel(shop, "native", "2.0", tag="cp311-cp311-manylinux_2_39_x86_64")
    wanted = wish(shop, "native")
    assert wheels.lock(wanted, DEBIAN12, store=store / "a") == ["native==1.0", PIP]
    assert wheels.lock(wanted, Target("3.11", "2.39", "x86_64"), store=store / "b") == ["native==2.0", PIP]


# ------------------------------------------------------------------ locks


def test_the_digest_names_what_is_wished_not_where_it_comes_from() -> None:
    base = Wish(requirements=("ray==2.60.0",), exclude=("triton",))
    same = [
        Wish(requirements=("ray==2.60.0",), exclude=("triton",), index_url="https://mirror.example/simple"),
        Wish(requirements=("ray==2.60.0",), exclude=("triton",), find_links=("/srv/wheels",)),
        wheels.wish_from({"requirements": ["ray==2.60.0"], "exclude": ["triton"], "python": ["3.11"], "note": "x"}),
    ]
    other = [
        Wish(requirements=("ray==2.60.1",), exclude=("triton",)),
        Wish(requirements=("ray==2.60.0",)),
        Wish(requirements=("ray==2.60.0",), exclude=("triton",), constraints="numpy<2"),
        Wish(requirements=("ray==2.60.0",), exclude=("triton",), provides_vllm="0.32.0+cpu"),
    ]
    assert {item.digest(DEBIAN12) for item in same} == {base.digest(DEBIAN12)}
    assert base.digest(DEBIAN12) not in {item.digest(DEBIAN12) for item in other}
    assert base.digest(Target("3.12", "2.36", "x86_64")) != base.digest(DEBIAN12)
    # A lock that is kept must be found by a later release, too.
    assert base.digest(DEBIAN12) == "7ce9d7a9b88b3d34"


def test_a_lock_pins_everything_that_is_needed(shop: Path, store: Path) -> None:
    assert wheels.lock(wish(shop), DEBIAN12, store=store) == ["app==1.0", "extra==1.0", "lib==2.0", PIP]


def test_what_is_left_out_is_not_in_the_lock(shop: Path, store: Path) -> None:
    assert wheels.lock(wish(shop, exclude=("Extra",)), DEBIAN12, store=store) == ["app==1.0", "lib==2.0", PIP]


def test_a_sites_constraints_hold(shop: Path, store: Path) -> None:
    found = wheels.lock(wish(shop, constraints="lib<2"), DEBIAN12, store=store)
    assert "lib==1.0" in found


def test_a_lock_stays(shop: Path, store: Path) -> None:
    """A new version, or a moved mirror, does not change what is installed."""
    before = wheels.lock(wish(shop), DEBIAN12, store=store)
    wheel(shop, "lib", "3.0")
    assert wheels.lock(wish(shop), DEBIAN12, store=store) == before
    moved = Wish(requirements=("app",), index_url="https://mirror.invalid/simple")
    assert wheels.lock(moved, DEBIAN12, store=store) == before


def test_links_beside_the_index(shop: Path, store: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "links", "torch", "2.0+cpu")
    found = wheels.lock(wish(shop, "torch", find_links=(str(tmp_path / "links"),)), DEBIAN12, store=store)
    assert found == [PIP, "torch==2.0+cpu"]


def test_pips_own_settings_name_the_index(
    shop: Path, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A site configures pip once; uv is given the same."""
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nindex-url = {index(shop)}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert wheels.lock(Wish(requirements=("extra",)), DEBIAN12, store=store) == ["extra==1.0", PIP]


def test_no_engine_for_this_python(shop: Path, store: Path) -> None:
    """The error names the Python versions that would fit, and keeps no lock."""
    wheel(shop, "engine", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64")
    target = Target("3.12", "2.36", "x86_64")
    with pytest.raises(ClusterkitError) as caught:
        wheels.lock(wish(shop, "engine"), target, store=store, other_pythons=("3.11", "3.12", "3.13"))
    assert "no engine for Python 3.12 on glibc 2.36 (x86_64)" in caught.value.message
    assert caught.value.hint == "Python 3.11 would fit: set ray_env_python to such an interpreter"
    assert not (store / "locks").exists()


def test_no_engine_at_all(shop: Path, store: Path) -> None:
    with pytest.raises(ClusterkitError) as caught:
        wheels.lock(wish(shop, "absent"), DEBIAN12, store=store, other_pythons=("3.11", "3.12"))
    assert "absent" in caught.value.message
    assert "ray_env_find_links" in str(caught.value.hint)


# ------------------------------------------------------------------ wheelhouses


def names(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return tar.getnames()


def test_a_wheelhouse_has_one_wheel_for_each_pin(shop: Path, store: Path) -> None:
    wheel(shop, "native", "1.0", tag="cp312-cp312-manylinux_2_17_x86_64")
    wheel(shop, "native", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64")
    wanted = wish(shop, "app", "native")
    pins = ["app==1.0", "lib==1.0", "native==1.0"]
    archive = wheels.wheelhouse(wanted, Target("3.12", "2.36", "x86_64"), pins, store=store)
    assert names(archive) == [
        "app-1.0-py3-none-any.whl",
        "lib-1.0-py3-none-any.whl",
        "native-1.0-cp312-cp312-manylinux_2_17_x86_64.whl",
    ]
    assert list(archive.parent.iterdir()) == [archive]


def test_a_wheelhouse_is_made_once(shop: Path, store: Path) -> None:
    wanted = wish(shop, "lib")
    archive = wheels.wheelhouse(wanted, DEBIAN12, ["lib==1.0"], store=store)
    (shop / "lib-1.0-py3-none-any.whl").unlink()
    assert wheels.wheelhouse(wanted, DEBIAN12, ["lib==1.0"], store=store) == archive
    assert wheels.wheelhouse(wanted, DEBIAN12, ["lib==2.0"], store=store) != archive


def test_a_collection_that_stopped_goes_on(shop: Path, store: Path) -> None:
    wanted, pins = wish(shop), ["extra==1.0", "late==1.0"]
    with pytest.raises(ClusterkitError, match="could not be collected") as caught:
        wheels.wheelhouse(wanted, DEBIAN12, pins, store=store)
    assert "late==1.0" in caught.value.message
    assert "run again" in str(caught.value.hint)
    wheel(shop, "late", "1.0")
    assert names(wheels.wheelhouse(wish(shop), DEBIAN12, pins, store=store)) == [
        "extra-1.0-py3-none-any.whl",
        "late-1.0-py3-none-any.whl",
    ]


# ------------------------------------------------------------------ the name under which vLLM looks for itself


def test_the_metadata_wheel_is_what_vllm_reads(store: Path, tmp_path: Path) -> None:
    path = wheels.vllm_metadata_wheel("0.32.0+cpu", store=store)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target", str(tmp_path / "site")]
    subprocess.run([*command, str(path)], check=True, capture_output=True)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    assert (found.metadata["Name"], found.version) == ("vllm", "0.32.0+cpu")
    # Nothing else: a module `vllm` would hide the real one.
    assert [item.name for item in (tmp_path / "site").iterdir()] == ["vllm-0.32.0+cpu.dist-info"]


def test_the_metadata_wheel_is_the_same_wherever_it_is_made(store: Path, tmp_path: Path) -> None:
    made = [wheels.vllm_metadata_wheel("0.32.0+cpu", store=place) for place in (store, tmp_path / "other")]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in made}) == 1
    assert wheels.vllm_metadata_wheel("0.32.0+cpu", store=store) == made[0]


# ------------------------------------------------------------------ links that answer


@pytest.fixture
def server() -> Iterator[str]:
    """Answers by path: /200 with 200, and so on."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(int(self.path.strip("/")))
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()
        thread.join()


def test_only_links_that_answer_are_asked(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stays, and so does a server that wants another method; uv would fail on a dead one."""
    monkeypatch.delenv("http_proxy")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    links = ["/srv/wheels", f"{server}/200", f"{server}/404", f"{server}/405", f"{server}/403", dead]
    assert wheels.reachable(links) == ["/srv/wheels", f"{server}/200", f"{server}/405", f"{server}/403"]
