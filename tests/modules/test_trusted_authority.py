"""trusted_authority: the distribution's own program, on a store of its own."""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

authority = load_module("trusted_authority")

REAL = shutil.which("update-ca-certificates", path="/usr/sbin:/usr/bin:/sbin:/bin")
pytestmark = pytest.mark.skipif(REAL is None, reason="this machine has no update-ca-certificates")


def certificate(words: str) -> str:
    """As PEM looks; who reads the store as text asks for no more."""
    body = base64.encodebytes(words.encode() * 20).decode()
    return f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"


SITE = certificate("the site's authority") + certificate("and its second")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/usr/local/share/ca-certificates and /etc/ssl/certs below one folder; `openssl rehash` has nothing to say."""
    for name in ("bin", "local", "etc", "shared"):
        (tmp_path / name).mkdir()
    (tmp_path / "conf").write_text("# none of the distribution's\n")
    wrapper = (
        f"#!/bin/sh\nexec {REAL} --certsconf {tmp_path}/conf --certsdir {tmp_path}/shared "
        f'--localcertsdir {tmp_path}/local --etccertsdir {tmp_path}/etc --hooksdir /nonexistent "$@"\n'
    )
    for name, text in {"update-ca-certificates": wrapper, "openssl": "#!/bin/sh\nexit 0\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    ours = ("update-ca-certificates", ["--fresh"], str(tmp_path / "local"), str(tmp_path / "etc/ca-certificates.crt"))
    monkeypatch.setattr(authority, "STORES", (ours,))
    return tmp_path


def run(**more: Any) -> Json:
    return call(authority, name="kit", content=SITE, **more)


def bundle(store: Path) -> str:
    return (store / "etc/ca-certificates.crt").read_text()


def test_the_store_holds_them_after_one_run(store: Path) -> None:
    assert run(check=True)["changed"]
    assert not (store / "local/kit.crt").exists()
    assert run()["changed"]
    assert authority.digests(SITE) <= authority.digests(bundle(store))
    assert not run()["changed"]


def test_a_run_that_was_cut_before_the_store_converges(store: Path) -> None:
    """The file is in place, and the store was never made anew."""
    (store / "local/kit.crt").write_text(SITE)
    told = run(check=True)["changes"]
    assert [(item["name"], item["actual"]) for item in told] == [("the system's store", "2 of them missing")]
    assert run()["changed"]
    assert authority.digests(SITE) <= authority.digests(bundle(store))


def test_another_authority_replaces_the_first(store: Path) -> None:
    run()
    other = certificate("the new one")
    assert call(authority, name="kit", content=other)["changed"]
    assert authority.digests(bundle(store)) == authority.digests(other)


def test_it_goes_and_the_others_stay(store: Path) -> None:
    (store / "local/theirs.crt").write_text(certificate("another of the site's"))
    run()
    assert run(state="absent", check=True)["changed"]
    assert run(state="absent")["changed"]
    assert authority.digests(bundle(store)) == authority.digests(certificate("another of the site's"))
    assert [path.name for path in (store / "etc").glob("*.pem")] == ["theirs.pem"]
    assert not run(state="absent")["changed"]


def test_a_removal_that_was_cut_converges(store: Path) -> None:
    (store / "local/theirs.crt").write_text(certificate("another of the site's"))
    run()
    (store / "local/kit.crt").unlink()
    assert run(state="absent")["changed"]
    assert authority.digests(bundle(store)) == authority.digests(certificate("another of the site's"))
    assert not run(state="absent")["changed"]


def test_what_is_no_certificate_is_refused(store: Path) -> None:
    failed = call(authority, name="kit", content="-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n")
    assert "holds no certificate in PEM" in failed["msg"]
    assert not (store / "local/kit.crt").exists()


def test_a_bare_host_is_planned_and_then_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "bin/update-ca-certificates").unlink()
    monkeypatch.setenv("PATH", str(store / "bin"))
    assert run(check=True)["changed"]
    assert "install the package ca-certificates" in run()["msg"]
