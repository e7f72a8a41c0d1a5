"""A build in a real Docker: what comes while it runs, what is said when it fails, and what stays as it was."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterkit import image_plan, images
from clusterkit.errors import ClusterkitError, ToolMissing, UsageError

pytestmark = pytest.mark.docker


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(docker, the name of an image with nothing but a shell): no registry is asked."""
    images.builder.cache_clear()
    try:
        docker = images.builder()
    except ToolMissing as error:
        pytest.skip(f"{error.message}: {error.hint}")
    program = Path(shutil.which("dash") or "/bin/sh").resolve()
    linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    name = f"clusterkit-test/shell-{uuid.uuid4().hex[:8]}"
    with tarfile.open(tmp_path / "root.tar", "w") as tar:
        tar.add(program, "bin/sh")
        for library in re.findall(r"(/\S+) \(0x", linked):
            tar.add(Path(library).resolve(), library.lstrip("/"))
    subprocess.run([docker, "import", str(tmp_path / "root.tar"), f"{name}:base"], capture_output=True, check=True)
    yield docker, name
    listed = subprocess.run([docker, "image", "ls", "--quiet", name], capture_output=True, text=True, check=True)
    subprocess.run([docker, "image", "rm", "--force", *set(listed.stdout.split())], capture_output=True, check=False)


def context(folder: Path, name: str, *steps: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text("\n".join([f"FROM {name}:base", *steps]) + "\n")
    return folder


def identity(docker: str, tag: str) -> str:
    done = subprocess.run([docker, "image", "inspect", "--format", "{{.Id}}", tag], capture_output=True, text=True)
    return done.stdout.strip()


def test_a_failed_build_names_the_step_and_leaves_the_last_good_image(shell: tuple[str, str], tmp_path: Path) -> None:
    docker, name = shell
    log, lines = tmp_path / "build.log", list[str]()
    good = context(tmp_path / "one", name, "RUN echo fine > /said")
    images.build(docker, f"{name}:1", good, log=log, labels={"note": "a b"}, on_line=lines.append)
    assert any("echo fine" in line for line in lines), "no live log"
    before = identity(docker, f"{name}:1")
    assert images.inspect(f"{name}:1")["labels"] == {"note": "a b"}

    many = "for n in 1 2 3 4 5 6 7 8 9; do echo line $n; echo more $n; echo rest $n; done; echo gone wrong; exit 3"
    bad = context(tmp_path / "two", name, "RUN echo fine > /said", f"RUN {many}")
    with pytest.raises(ClusterkitError) as caught:
        images.build(docker, f"{name}:1", bad, log=log)
    first, *rest = caught.value.message.splitlines()
    assert "failed in the step [3/3] RUN for n in" in first
    assert rest[-1].endswith("gone wrong")
    assert len(rest) == 20
    assert "line 1" not in rest, "the last lines are wanted, not the first"
    assert str(log) in (caught.value.hint or "")
    assert "line 1" in log.read_text()
    assert identity(docker, f"{name}:1") == before

    # What was finished is not done again.
    lines.clear()
    images.build(docker, f"{name}:2", context(tmp_path / "two", name, "RUN echo fine > /said", "RUN true"), log=log)
    assert "CACHED" in log.read_text()


def test_an_image_that_does_not_hold_what_it_should_gets_no_name(shell: tuple[str, str], tmp_path: Path) -> None:
    """This one has no Python at all. Without the test inside, it gets its name."""
    docker, name = shell
    folder = context(tmp_path / "one", name, f"LABEL run-of={name}", "RUN echo fine > /said")
    with pytest.raises(ClusterkitError, match="does not hold what it should"):
        images.build(docker, f"{name}:1", folder, log=tmp_path / "log", expected={"ray": "2.60.0"})
    assert identity(docker, f"{name}:1") == ""
    words = [docker, "image", "ls", "--all", "--quiet", "--filter", f"label=run-of={name}"]
    left = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert left == "", "without a name it only takes room"
    images.build(docker, f"{name}:1", folder, log=tmp_path / "log")
    assert identity(docker, f"{name}:1") != ""


def test_a_given_image_is_tried_too(shell: tuple[str, str]) -> None:
    _, name = shell
    with pytest.raises(ClusterkitError, match=f"{name}:base does not hold what it should"):
        images.check(f"{name}:base", {"ray": "2.60.0"})
    with pytest.raises(ClusterkitError, match="could not be pulled"):
        images.check("registry.invalid/vllm:1", {})
    with pytest.raises(UsageError, match="is not on this machine"):
        images.inspect(f"{name}:none")


def test_a_secret_is_there_for_a_step_and_in_no_layer(shell: tuple[str, str], tmp_path: Path) -> None:
    docker, name = shell
    (tmp_path / "secret").write_text("hush-hush")
    step = 'RUN --mount=type=secret,id=index read said < /run/secrets/index; [ "$said" = hush-hush ] || exit 1'
    # BuildKit does not do again what it did for an earlier run of this test.
    folder = context(tmp_path / "one", name, f"ENV RUN_OF={name}", step)
    with pytest.raises(ClusterkitError):
        images.build(docker, f"{name}:1", folder, log=tmp_path / "log")
    # `read` is true only where a line ends.
    (tmp_path / "secret").write_text("hush-hush\n")
    secrets = {"index": tmp_path / "secret"}
    images.build(docker, f"{name}:1", folder, log=tmp_path / "log", secrets=secrets)
    subprocess.run([docker, "save", "--output", str(tmp_path / "image.tar"), f"{name}:1"], check=True)
    with tarfile.open(tmp_path / "image.tar") as tar:
        files = [tar.extractfile(member) for member in tar.getmembers() if member.isfile()]
        assert not [file for file in files if file is not None and b"hush-hush\n" in file.read()]


# From a build with Docker 20.10.24 (BuildKit 0.8), shortened.
RECORDED = """\
#1 [internal] load build definition from Dockerfile
#1 sha256:ab12
#1 DONE 0.0s
#4 [build 1/2] RUN ninja
#4 0.211 [1/2] Building CXX object a.o
#4 1.402 error: too much
#4 ERROR: executor failed running [/bin/sh -c ninja]: exit code: 1
------
 > [build 1/2] RUN ninja:
------
executor failed running [/bin/sh -c ninja]: exit code: 1""".splitlines()


def test_the_failed_step_is_read_from_the_log() -> None:
    assert image_plan.failed_step(RECORDED) == (
        "[build 1/2] RUN ninja",
        ["[1/2] Building CXX object a.o", "error: too much"],
    )


def test_a_build_that_ended_before_any_step_says_its_last_lines() -> None:
    assert image_plan.failed_step(["Cannot connect to the Docker daemon", ""]) == (
        "",
        ["Cannot connect to the Docker daemon"],
    )


def test_a_test_inside_that_hangs_is_ended(
    shell: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker, name = shell
    folder = context(tmp_path / "one", name, "COPY python3 /bin/python3")
    (folder / "python3").write_text("#!/bin/sh\nread never < /dev/zero\n")
    (folder / "python3").chmod(0o755)
    monkeypatch.setattr(images, "SMOKE_TIMEOUT_S", 2)
    with pytest.raises(ClusterkitError, match="did not end its test within 2 s"):
        images.build(docker, f"{name}:1", folder, log=tmp_path / "log", expected={})
    words = [docker, "ps", "--all", "--quiet", "--filter", f"ancestor={name}:base"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == ""
