"""An image's archive on its way to a registry: what moves, what it is called there, and what is said where it stops."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from clusterkit import registry as registries
from clusterkit.errors import ClusterkitError
from tests.support import certificate
from tests.unit.registry_server import Registry, digest

TAG = "clusterkit/vllm-cpu:abc"
CONFIG = {"architecture": "amd64", "os": "linux", "config": {"Labels": {"clusterkit.inputs": "1"}}}


def layer(seed: int, size: int = 5000) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = size
        tar.addfile(member, io.BytesIO(bytes([seed]) * size))
    return content.getvalue()


def config_of(layers: Sequence[bytes]) -> bytes:
    return json.dumps({**CONFIG, "rootfs": {"type": "layers", "diff_ids": [digest(one) for one in layers]}}).encode()


def saved(path: Path, layers: Sequence[bytes], *, oci: bool = False, twice: str | None = None) -> Path:
    """Constructed like `docker save` writes it: up to 24, or from 25 on (`oci`), where names are digests. `twice`:
    how Docker 20.10 writes the last layer where it is the first one again."""
    config = config_of(layers)
    names = [f"blobs/sha256/{digest(one)[7:]}" if oci else f"{n}/layer.tar" for n, one in enumerate(layers)]
    with tarfile.open(path, "w") as tar:

        def add(name: str, content: bytes, link: str | None = None) -> None:
            member = tarfile.TarInfo(name)
            member.size = 0 if link else len(content)
            if link:
                member.type = tarfile.SYMTYPE if link.startswith("..") else tarfile.LNKTYPE
                member.linkname = link
            tar.addfile(member, io.BytesIO(content))

        for name, one in zip(names, layers, strict=True):
            add(name, one, twice if twice and name == names[-1] else None)
        add("config.json", config)
        about = [{"Config": "config.json", "RepoTags": [TAG], "Layers": names}]
        add("manifest.json", json.dumps(about).encode())
    return path


@pytest.fixture
def server() -> Iterator[Registry]:
    made = Registry()
    yield made
    made.close()


def own(server: Registry, certificate: str = "") -> dict[str, Any]:
    return {"address": server.address, "tls": bool(certificate), "certificate": certificate}


def test_only_what_is_missing_moves(server: Registry, tmp_path: Path) -> None:
    first = [layer(1), layer(2), layer(3)]
    done = registries.push(saved(tmp_path / "a.tar", first), TAG, own(server))
    assert (done.layers, done.sent_layers, server.sent()) == (3, 3, 4)
    assert done.reference == f"{server.address}/clusterkit/vllm-cpu@{digest(server.manifests['abc'])}"
    manifest = json.loads(server.manifests["abc"])
    assert server.blobs[manifest["config"]["digest"]] == config_of(first), "the image's id is this one's digest"
    assert [server.blobs[entry["digest"]] for entry in manifest["layers"]] == first

    again = registries.push(tmp_path / "a.tar", TAG, own(server))
    assert (again.reference, again.sent, server.sent()) == (done.reference, 0, 0)

    # Another application on the same layers.
    other = registries.push(saved(tmp_path / "b.tar", [*first[:2], layer(4)]), "clusterkit/vllm-cpu:d", own(server))
    assert (other.sent_layers, server.sent()) == (1, 2)
    assert other.reference != done.reference


def test_a_layer_that_was_lost_comes_back(server: Registry, tmp_path: Path) -> None:
    done = registries.push(saved(tmp_path / "a.tar", [layer(1), layer(2)]), TAG, own(server))
    lost = digest(layer(1))
    del server.blobs[lost]
    assert registries.push(tmp_path / "a.tar", TAG, own(server)).reference == done.reference
    assert server.blobs[lost] == layer(1)


@pytest.mark.parametrize(
    "how", [{}, {"oci": True}, {"twice": "../0/layer.tar"}, {"twice": "0/layer.tar"}], ids=["24", "25", "sym", "hard"]
)
def test_each_form_of_archive_is_the_same_image(server: Registry, tmp_path: Path, how: dict[str, Any]) -> None:
    layers = [layer(1), layer(2), layer(1)]
    done = registries.push(saved(tmp_path / "a.tar", layers, **how), TAG, own(server))
    plain = registries.push(saved(tmp_path / "b.tar", layers), TAG, own(server))
    assert done.reference == plain.reference
    assert (done.sent_layers, plain.sent_layers) == (2, 0)


def test_a_large_image_has_parts_that_hold_its_first_layers(server: Registry, tmp_path: Path) -> None:
    layers = [layer(1), layer(2, 20000), layer(3), layer(4, 20000), layer(5)]
    archive = saved(tmp_path / "a.tar", layers)
    done = registries.push(archive, TAG, own(server), part=20000)
    assert len(done.parts) == 2
    for reference, count in zip(done.parts, (2, 4), strict=True):
        manifest = json.loads(server.manifests[reference.rpartition("@")[2]])
        assert [entry["digest"] for entry in manifest["layers"]] == [digest(one) for one in layers[:count]]
        config = json.loads(server.blobs[manifest["config"]["digest"]])
        assert config["config"]["Labels"] == {"clusterkit.image": "part"}, "it is nobody's engine"
        assert len(config["rootfs"]["diff_ids"]) == count
    assert registries.push(archive, TAG, own(server), part=20000).parts == done.parts
    assert registries.push(archive, TAG, own(server)).parts == ()


@pytest.mark.parametrize(
    ("sizes", "expected"), [([], []), ([9], []), ([9, 1], [1]), ([4, 4, 4, 4, 4], [3]), ([10, 10, 10], [1, 2])]
)
def test_where_parts_end(sizes: list[int], expected: list[int]) -> None:
    assert registries.ends(sizes, 9) == expected


def failure(action: Callable[[], object]) -> str:
    with pytest.raises(ClusterkitError) as caught:
        action()
    return f"{caught.value.message} | {caught.value.hint}"


def test_a_push_that_is_cut_goes_on_where_it_was(server: Registry, tmp_path: Path) -> None:
    archive = saved(tmp_path / "a.tar", [layer(1), layer(2, 5_000_000), layer(3)])
    server.cut = 2
    said = failure(lambda: registries.push(archive, TAG, own(server)))
    assert f"the registry {server.address} stopped in the middle" in said
    assert server.manifests == {}, "nothing has a name before it is whole"
    assert registries.push(archive, TAG, own(server)).sent_layers == 2


def test_a_registry_that_is_away_or_says_no(server: Registry, tmp_path: Path) -> None:
    archive = saved(tmp_path / "a.tar", [layer(1)])
    server.refuses = (405, {"errors": [{"code": "UNSUPPORTED", "message": "The operation is unsupported."}]})
    assert "pull-through cache" in failure(lambda: registries.push(archive, TAG, own(server)))
    # Both recorded from Debian 12's docker-registry 2.8.2 on a full tmpfs: in the middle of a layer, and at a start.
    path = "/srv/images/docker/registry/v2/repositories/x/_uploads/661e45eb-fe16-4fab-919e-7214970b2cf7"
    full = {"DriverName": "filesystem", "Enclosed": {"Op": "write", "Path": f"{path}/startedat", "Err": 28}}
    for detail in (f"write {path}/data: no space left on device", full):
        server.refuses = (500, {"errors": [{"code": "UNKNOWN", "message": "unknown error", "detail": detail}]})
        assert "its disk is full" in failure(lambda: registries.push(archive, TAG, own(server)))
    server.refuses = (401, {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]})
    assert "clusterkit_image_registry" in failure(lambda: registries.push(archive, TAG, own(server)))
    server.close()
    said = failure(lambda: registries.push(archive, TAG, own(server)))
    assert f"the registry {server.address} does not answer" in said
    assert "systemctl status docker-registry" in said


def test_a_damaged_archive_is_refused(server: Registry, tmp_path: Path) -> None:
    archive = saved(tmp_path / "a.tar", [layer(1), layer(2)])
    content = bytearray(archive.read_bytes())
    at = content.index(b"\2" * 100)
    content[at] = 9
    archive.write_bytes(content)
    assert "a layer of the archive is damaged" in failure(lambda: registries.push(archive, TAG, own(server)))
    assert server.manifests == {}
    (tmp_path / "b.tar").write_text("no archive")
    assert "cannot be read as an image" in failure(lambda: registries.push(tmp_path / "b.tar", TAG, own(server)))


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates: needs openssl")
def test_only_the_known_certificate_is_trusted(tmp_path: Path) -> None:
    ours, other = certificate(tmp_path / "ours", "ours"), certificate(tmp_path / "other", "other")
    archive = saved(tmp_path / "a.tar", [layer(1)])
    server = Registry(*ours)
    try:
        assert registries.push(archive, TAG, own(server, ours[0].read_text())).sent_layers == 1
        said = failure(lambda: registries.push(archive, TAG, own(server, other[0].read_text())))
        assert "does not show the certificate that this machine knows" in said
    finally:
        server.close()


def test_a_certificate_that_was_never_fetched(tmp_path: Path) -> None:
    cluster = {"name": "one", "registry": {"host": "reg", "address": "192.0.2.9:5000", "tls": True, "proxy": False}}
    said = failure(lambda: registries.own(cluster, store=tmp_path))
    assert "--limit reg --tags registry" in said
    assert registries.own(cluster, store=tmp_path, draft=True)["certificate"] == ""
    path = registries.certificate_of("one", store=tmp_path)
    path.parent.mkdir()
    path.write_text("PEM")
    assert registries.own(cluster, store=tmp_path) == {"address": "192.0.2.9:5000", "tls": True, "certificate": "PEM"}
    cluster["registry"] = {**cluster["registry"], "tls": False}
    assert registries.own(cluster, store=tmp_path)["certificate"] == ""
    assert registries.own({"name": "one", "registry": None}, store=tmp_path) == {}
