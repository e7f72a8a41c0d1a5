"""package_repository: real keys made by gpg, fetched from real URLs, in folders of their own."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

repository = load_module("package_repository")

pytestmark = pytest.mark.skipif(shutil.which("gpg") is None, reason="makes keys: needs gpg")


class Keys:
    """A keyring with one key."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        folder.mkdir(mode=0o700)
        self.gpg("--quick-gen-key", "Publisher <publisher@example.com>", "ed25519", "sign", "never")
        self.armored, self.binary = self.gpg("--armor", "--export"), self.gpg("--export")
        listed = self.gpg("--list-keys", "--with-colons").decode()
        self.fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr"))

    def gpg(self, *words: str) -> bytes:
        command = ["gpg", "-q", "--batch", "--pinentry-mode", "loopback", "--passphrase", "", *words]
        environment = {**os.environ, "GNUPGHOME": str(self.home)}
        return subprocess.run(command, env=environment, check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("k") / "g")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("s") / "g")


class Site:
    """A host's folders, and a publisher's web server that counts."""

    def __init__(self, folder: Path, url: str, asked: list[str]) -> None:
        self.host, self.web, self.url, self.asked = folder / "host", folder / "web", url, asked

    def publish(self, data: bytes) -> None:
        (self.web / "key").write_bytes(data)

    def run(self, *, content: str = "Types: deb\n", name: str = "key.gpg", **more: Any) -> Json:
        key = {"path": str(self.host / "keyrings" / name), "url": f"{self.url}/key", **more.pop("key", {})}
        files = [{"path": str(self.host / "sources/a.sources"), "content": content}]
        return call(repository, keys=[key], files=files, **more)

    @property
    def key(self) -> Path:
        return self.host / "keyrings/key.gpg"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "web").mkdir()
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            asked.append(self.path)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Site(tmp_path, f"http://127.0.0.1:{server.server_port}", asked)
    server.shutdown()
    server.server_close()


def test_key_and_files_are_written_once(site: Site, keys: Keys) -> None:
    site.publish(keys.armored)
    shown = site.run(check=True)
    assert [(item["name"], item.get("actual")) for item in shown["changes"]] == [
        (str(site.key), "missing"),
        (str(site.host / "sources/a.sources"), None),
    ]
    assert not site.host.exists()
    assert site.asked == []

    assert site.run()["changed"]
    assert site.key.read_bytes() == keys.binary, "apt reads it in binary form"
    assert [oct(path.stat().st_mode & 0o777) for path in (site.key, site.key.parent)] == ["0o644", "0o755"]
    assert (site.host / "sources/a.sources").read_text() == "Types: deb\n"
    # A host without internet stays converged.
    (site.web / "key").unlink()
    assert site.run() == {**site.run(), "changed": False, "changes": []}
    assert site.asked == ["/key"]


def test_rpm_gets_its_key_armored(site: Site, keys: Keys) -> None:
    site.publish(keys.armored)
    assert site.run(name="RPM-GPG-KEY-a")["changed"]
    assert (site.host / "keyrings/RPM-GPG-KEY-a").read_bytes() == keys.armored
    site.publish(keys.binary)
    refused = site.run(name="RPM-GPG-KEY-b")
    assert "rpm reads armored keys only" in refused["msg"]


def test_another_pin_fetches_the_key_anew(site: Site, keys: Keys, stranger: Keys) -> None:
    site.publish(keys.armored)
    site.run()
    site.publish(stranger.armored)
    assert not site.run()["changed"], "nothing asks for it"
    changed = site.run(content="Types: deb\nURIs: x\n")
    assert {item["name"] for item in changed["changes"]} == {str(site.key), str(site.host / "sources/a.sources")}
    assert site.key.read_bytes() == stranger.binary


def test_two_keys_in_one_file(site: Site, keys: Keys, stranger: Keys) -> None:
    site.publish(keys.armored + stranger.armored)
    assert site.run(key={"fingerprints": [keys.fingerprint.lower(), stranger.fingerprint]})["changed"]
    assert site.key.read_bytes() == keys.binary + stranger.binary


def test_a_damaged_key_is_fetched_again(site: Site, keys: Keys) -> None:
    site.publish(keys.binary)
    site.run()
    site.key.write_bytes(keys.binary[:-3])
    assert [item["actual"] for item in site.run(check=True)["changes"]] == ["damaged: it is cut off"]
    assert site.run()["changed"]
    assert site.key.read_bytes() == keys.binary


def wrong(keys: Keys) -> dict[str, bytes]:
    body = keys.armored.decode()
    secret = keys.gpg("--armor", "--export-secret-keys")
    return {
        "a page": b"<html><body>Please log in</body></html>\n",
        "nothing": b"",
        "half of it": body[: len(body) // 2].encode(),
        "bits of it": body.replace(body.splitlines()[3], "!" + body.splitlines()[3][1:]).encode(),
        "a secret key": secret,
        "a signature": base64.b64decode("iHUEABYKAB0WIQ=="),
    }


@pytest.mark.parametrize("kind", ["a page", "nothing", "half of it", "bits of it", "a secret key", "a signature"])
def test_what_is_no_public_key_is_refused_before_anything_is_written(site: Site, keys: Keys, kind: str) -> None:
    site.publish(wrong(keys)[kind])
    refused = site.run()
    assert refused["failed"]
    assert f"what lies at {site.url}/key cannot be used as the repository's key" in refused["msg"]
    assert not site.host.exists()


def test_a_key_that_is_not_the_declared_one(site: Site, keys: Keys, stranger: Keys) -> None:
    site.publish(stranger.armored)
    refused = site.run(key={"fingerprints": [keys.fingerprint]})
    assert f"it holds {stranger.fingerprint}, and only {keys.fingerprint} is declared" in refused["msg"]
    assert site.run()["changed"], "without a declaration it is taken"
    # And it is found where it lies already.
    site.publish(keys.armored)
    assert site.run(key={"fingerprints": [keys.fingerprint]})["changed"]
    assert site.key.read_bytes() == keys.binary


def test_the_checksum_of_the_published_file(site: Site, keys: Keys) -> None:
    site.publish(keys.armored)
    refused = site.run(key={"checksum": "0" * 64})
    assert hashlib.sha256(keys.armored).hexdigest() in refused["msg"]
    assert site.run(key={"checksum": hashlib.sha256(keys.armored).hexdigest()})["changed"]


def test_a_key_that_is_not_there_names_the_address(site: Site) -> None:
    refused = site.run()
    assert f"cannot be fetched from {site.url}/key: HTTP Error 404" in refused["msg"]
    assert "clusterkit_proxy" in refused["msg"]


def test_the_proxy_of_the_environment_is_used(site: Site, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    site.publish(keys.armored)
    monkeypatch.setenv("http_proxy", site.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # A process of its own would have read the environment at its start.
    monkeypatch.setattr(urllib.request, "_opener", None)
    refused = site.run(key={"url": "http://repository.invalid/key"})
    # A plain web server is no proxy; it was asked as one.
    assert "404" in refused["msg"]
    assert site.asked == ["http://repository.invalid/key"]


def test_what_is_to_be_gone_goes(site: Site, keys: Keys) -> None:
    site.publish(keys.armored)
    site.run()
    link = site.host / "wants"
    link.symlink_to("/nonexistent")
    paths = [str(site.key), str(link), str(site.host / "never")]
    assert len(call(repository, state="absent", gone=paths, check=True)["changes"]) == 2
    assert site.key.exists()
    assert call(repository, state="absent", gone=paths)["changed"]
    assert not site.key.exists()
    assert not link.is_symlink()
    assert not call(repository, state="absent", gone=paths)["changed"]


def test_what_the_host_is() -> None:
    told = call(repository, state="read")
    assert not told["changed"]
    assert told["host"]["kernel"] == os.uname().release
    assert told["host"]["architecture"] == os.uname().machine


def test_pci_devices(tmp_path: Path) -> None:
    """A switch of NVLink (H100's, twice) and a GPU, as sysfs says them."""
    for number, words in enumerate(("0x10de 0x22a3 0x068000", "0x10de 0x22a3 0x068000", "0x10de 0x2330 0x030200")):
        folder = tmp_path / f"0000:0{number}:00.0"
        folder.mkdir()
        for name, word in zip(("vendor", "device", "class"), words.split(), strict=True):
            (folder / name).write_text(word + "\n")
    assert repository.pci(str(tmp_path)) == ["10de:22a3:0680", "10de:2330:0302"]
