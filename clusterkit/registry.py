"""Bring an image's archive to the cluster's own registry, by its HTTP API. A layer that is there does not move.

Not by `docker push`: this machine's dockerd would have to trust the registry's certificate, which takes root, and it
compresses each layer, so that nobody knows beforehand how it will be called. Here a layer moves as it lies in the
archive; its name is the digest that the image's configuration has for it. The same archive always makes the same
manifest, so its digest is known here, and hosts pull by that: what others push to the registry cannot reach them.

dockerd forgets the layers of a pull that failed. So an image of several GB also goes there in parts: images of its
first layers, which a host pulls at the same time; each layer moves once, and what a finished part holds stays.

Media types and requests are those of OCI's image and distribution specifications, version 1.0.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import ssl
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from clusterkit.errors import ClusterkitError

CHUNK = 1 << 20
# A part ends with the layer that fills it, in bytes.
PART = 1 << 30
PART_LABEL = {"clusterkit.image": "part"}
ANSWER_S = 30
# A registry on slow disks may take long for the last part of a layer of many GB.
TRANSFER_S = 600
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
# What a layer is packed with, by its first bytes. `docker save` packs none; newer ones keep what was pulled.
PACKED = {b"\x1f\x8b": "+gzip", b"\x28\xb5\x2f\xfd": "+zstd"}
ENOSPC = 28


@dataclass(frozen=True)
class Pushed:
    """`reference` and `parts` name images by their digest. `sent`: bytes of layers and configurations that moved."""

    reference: str
    parts: tuple[str, ...]
    sent: int
    layers: int
    sent_layers: int


@dataclass(frozen=True)
class Layer:
    """One file of the archive, and what it is called in a registry."""

    member: tarfile.TarInfo
    media_type: str
    digest: str

    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.member.size}


def certificate_of(cluster: str, *, store: Path) -> Path:
    """Where this machine keeps the certificate of a cluster's registry, as it was fetched from the registry's host."""
    return store / "registries" / f"{cluster}.crt"


def own(cluster: Mapping[str, Any], *, store: Path, draft: bool = False) -> dict[str, Any]:
    """How the cluster's own registry is reached: `address`, `tls`, `certificate` (PEM). Empty where there is none.

    `cluster` is what validation publishes. Raises ClusterkitError where the certificate was never fetched; for a
    `draft` it is empty then.
    """
    about = cluster["registry"]
    if not about:
        return {}
    found = {"address": about["address"], "tls": about["tls"], "certificate": ""}
    if about["tls"]:
        path = certificate_of(cluster["name"], store=store)
        try:
            found["certificate"] = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if not draft:
                raise ClusterkitError(
                    f"this machine does not know the certificate of the registry {about['address']} yet",
                    hint=f"run once without --limit and --tags, or ansible-playbook playbooks/hosts.yml "
                    f"--limit {about['host']} --tags registry",
                ) from None
    return found


def push(archive: Path, tag: str, own: Mapping[str, Any], *, part: int = PART) -> Pushed:
    """Bring the image of a `docker save` archive to a registry, as `tag`.

    `own`: `address` (host:port), `tls`, `certificate` (PEM, that alone is trusted). Raises ClusterkitError where the
    registry does not answer or refuses, or where the archive is no image. What is there already is asked for each
    time: a layer that was lost comes back. `part`: bytes after which a part ends.
    """
    address = own["address"]
    repository, _, version = tag.rpartition(":")
    scheme = "https" if own["tls"] else "http"
    try:
        with (
            tarfile.open(archive, "r:") as tar,
            httpx.Client(
                base_url=f"{scheme}://{address}",
                verify=_trusting(own["certificate"]) if own["tls"] else True,
                timeout=httpx.Timeout(ANSWER_S, read=TRANSFER_S, write=TRANSFER_S),
                # The cluster's own network: no proxy stands between.
                trust_env=False,
            ) as client,
        ):
            return _Push(client, address, repository).run(tar, version, part)
    except httpx.TransportError as error:
        raise _unreachable(address, error) from None
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise ClusterkitError(
            f"{archive} cannot be read as an image: {error}", hint=f"delete {archive}; it is made again"
        ) from None


class _Push:
    def __init__(self, client: httpx.Client, address: str, repository: str) -> None:
        self.client, self.address, self.repository = client, address, repository
        self.home = f"/v2/{repository}"
        self.sent = self.sent_layers = 0

    def run(self, tar: tarfile.TarFile, version: str, part: int) -> Pushed:
        (image,) = json.loads(_bytes(tar, "manifest.json"))
        config = _bytes(tar, image["Config"])
        whole = json.loads(config)
        names = whole["rootfs"]["diff_ids"]
        layers = [_layer(tar, path, name) for path, name in zip(image["Layers"], names, strict=True)]
        # Is this a registry that takes anybody's word?
        self._accepted(self.client.request("GET", "/v2/"))
        # One that is in the image twice moves once.
        for layer in {layer.digest: layer for layer in layers}.values():
            if not self._has(f"blobs/{layer.digest}"):
                self._send(layer.digest, layer.member.size, _chunks(_open(tar, layer.member)))
                self.sent_layers += 1
        parts = []
        for end in ends([layer.member.size for layer in layers], part):
            known = {key: whole[key] for key in ("architecture", "os", "variant") if key in whole}
            rootfs = {"type": "layers", "diff_ids": names[:end]}
            first = json.dumps({**known, "config": {"Labels": PART_LABEL}, "rootfs": rootfs}, sort_keys=True)
            parts.append(self._name(first.encode(), layers[:end]))
        reference = self._name(config, layers, version)
        return Pushed(reference, tuple(parts), self.sent, len(layers), self.sent_layers)

    def _name(self, config: bytes, layers: list[Layer], version: str | None = None) -> str:
        """Make an image of layers that are there; its reference by digest."""
        digest = _sha256(config)
        if not self._has(f"blobs/{digest}"):
            self._send(digest, len(config), iter([config]))
        about = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": digest, "size": len(config)},
            "layers": [layer.descriptor() for layer in layers],
        }
        manifest = json.dumps(about, sort_keys=True).encode()
        name = _sha256(manifest)
        where = f"{self.home}/manifests/{version or name}"
        found = self.client.request("HEAD", where, headers={"Accept": MANIFEST})
        if found.headers.get("Docker-Content-Digest") != name:
            self._accepted(self.client.request("PUT", where, content=manifest, headers={"Content-Type": MANIFEST}))
        return f"{self.address}/{self.repository}@{name}"

    def _has(self, path: str) -> bool:
        found = self.client.request("HEAD", f"{self.home}/{path}")
        if found.status_code not in (200, 404):
            self._accepted(found)
        return found.status_code == 200

    def _send(self, digest: str, size: int, chunks: Iterator[bytes]) -> None:
        begun = self.client.request("POST", f"{self.home}/blobs/uploads/")
        self._accepted(begun)
        where = httpx.URL(str(begun.url)).join(begun.headers["Location"])
        done = self.client.request(
            "PUT",
            where.copy_merge_params({"digest": digest}),
            content=chunks,
            headers={"Content-Length": str(size), "Content-Type": "application/octet-stream"},
        )
        self._accepted(done)
        self.sent += size

    def _accepted(self, answer: httpx.Response) -> None:
        if answer.status_code < 400:
            return
        raise refusal(self.address, answer.status_code, answer.text)


def ends(sizes: Sequence[int], part: int) -> list[int]:
    """After how many layers each part ends. The whole image is no part."""
    found, filled = [], 0
    for number, size in enumerate(sizes, 1):
        filled += size
        if filled >= part:
            found.append(number)
            filled = 0
    return [end for end in found if end < len(sizes)]


def refusal(address: str, status: int, text: str) -> ClusterkitError:
    """What a registry's refusal means, and what to do. The codes are the distribution specification's."""
    try:
        errors = json.loads(text)["errors"]
        words = "; ".join(f"{error['code']}: {error.get('message', '')}".rstrip(": ") for error in errors)
        codes = {error["code"] for error in errors}
    except (ValueError, KeyError, TypeError):
        words, codes = text.strip()[:300] or f"status {status}", set()
    hint = "its own log says more: journalctl -u docker-registry, on its host"
    if re.search(rf'"Err":\s*{ENOSPC}\b|no space left on device', text):
        words, hint = "its disk is full", "free some space on its host (registry_storage), and run again"
    elif "UNSUPPORTED" in codes:
        hint = "a pull-through cache (registry_proxy_remote_url) cannot be pushed to: name the registry behind it"
    elif "DIGEST_INVALID" in codes:
        words += ": a layer of the archive is damaged"
        hint = "delete the archive (clusterkit image plan says where it lies), and build again"
    elif status in (401, 403):
        hint = "it asks for a login: name it in clusterkit_image_registry, for `docker login` to hold"
    return ClusterkitError(f"the registry {address} refused: {words}", hint=hint)


def _unreachable(address: str, error: httpx.TransportError) -> ClusterkitError:
    said = str(error) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return ClusterkitError(
            f"the registry {address} does not show the certificate that this machine knows: {said}",
            hint="run once without --limit and --tags: the certificate is fetched from its host",
        )
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ClusterkitError(
            f"the registry {address} does not answer: {said}",
            hint="is it up (systemctl status docker-registry, on its host)? does a firewall stand between?",
        )
    return ClusterkitError(
        f"the registry {address} stopped in the middle: {said}",
        hint="run again: the layers that it has do not move again",
    )


def _trusting(certificate: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=certificate)
    # The registry's own certificate may be the only one that is known of its chain, and a site's need not keep to
    # all that RFC 5280 asks of an authority: as for dockerd.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _layer(tar: tarfile.TarFile, path: str, name: str) -> Layer:
    """A layer of the archive. `name`: the digest of what is in it, unpacked."""
    member = tar.getmember(path)
    while member.issym() or member.islnk():
        # Docker before 25 links a layer that it has written already.
        folder = posixpath.dirname(member.name) if member.issym() else ""
        member = tar.getmember(posixpath.normpath(posixpath.join(folder, member.linkname)))
    with _open(tar, member) as file:
        first = file.read(4)
    kind = next((suffix for magic, suffix in PACKED.items() if first.startswith(magic)), "")
    own = re.fullmatch(r"blobs/sha256/([0-9a-f]{64})", member.name)
    return Layer(member, LAYER + kind, f"sha256:{own[1]}" if own else name)


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file


def _bytes(tar: tarfile.TarFile, path: str) -> bytes:
    with _open(tar, tar.getmember(path)) as file:
        return file.read()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
