"""A build in a real Docker: what comes while it runs, what is said when it fails, and what stays as it was."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import uuid
import zipfile
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
    words = [docker, "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", name]
    tags = set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    # The base last: what plain builds have left of their steps, without a name, goes with what stands on it.
    for tag in sorted(tags, key=lambda tag: tag.endswith(":base")):
        subprocess.run([docker, "image", "rm", "--force", tag], capture_output=True, check=False)


def context(folder: Path, name: str, *steps: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text("\n".join([f"FROM {name}:base", *steps]) + "\n")
    return folder


def identity(docker: str, tag: str) -> str:
    done = subprocess.run([docker, "image", "inspect", "--format", "{{.Id}}", tag], capture_output=True, text=True)
    return done.stdout.strip()


ways = pytest.mark.parametrize("plain", [False, True], ids=["BuildKit", "plain"])


@pytest.fixture(autouse=True)
def _with_buildkit(request: pytest.FixtureRequest) -> None:
    plain = getattr(request.node, "callspec", None) and request.node.callspec.params.get("plain")
    if "shell" in request.fixturenames and not plain:
        docker, _ = request.getfixturevalue("shell")
        if not images.knows_buildkit(docker):
            pytest.skip(f"{docker} has no BuildKit")


@ways
def test_a_failed_build_names_the_step_and_leaves_the_last_good_image(
    shell: tuple[str, str], tmp_path: Path, plain: bool
) -> None:
    docker, name = shell
    log, lines = tmp_path / "build.log", list[str]()
    good = context(tmp_path / "one", name, "RUN echo fine > /said")
    images.build(docker, f"{name}:1", good, log=log, labels={"note": "a b"}, plain=plain, on_line=lines.append)
    assert any("echo fine" in line for line in lines), "no live log"
    before = identity(docker, f"{name}:1")
    assert images.inspect(f"{name}:1")["labels"] == {"note": "a b"}

    many = "for n in 1 2 3 4 5 6 7 8 9; do echo line $n; echo more $n; echo rest $n; done; echo gone wrong; exit 3"
    bad = context(tmp_path / "two", name, "RUN echo fine > /said", f"RUN {many}")
    with pytest.raises(ClusterkitError) as caught:
        images.build(docker, f"{name}:1", bad, log=log, plain=plain)
    first, *rest = caught.value.message.splitlines()
    assert "failed in the step [3/3] RUN for n in" in first
    assert rest[-1].endswith("gone wrong")
    assert len(rest) == 20
    assert "line 1" not in rest, "the last lines are wanted, not the first"
    assert str(log) in (caught.value.hint or "")
    assert "line 1" in log.read_text()
    assert identity(docker, f"{name}:1") == before

    left = [docker, "ps", "--all", "--quiet", "--filter", f"ancestor={name}:1"]
    assert subprocess.run(left, capture_output=True, text=True, check=True).stdout == "", "a container of a failed step"

    # What was finished is not done again.
    lines.clear()
    mended = context(tmp_path / "two", name, "RUN echo fine > /said", "RUN true")
    images.build(docker, f"{name}:2", mended, log=log, plain=plain)
    assert ("Using cache" if plain else "CACHED") in log.read_text()


@ways
def test_an_image_that_does_not_hold_what_it_should_gets_no_name(
    shell: tuple[str, str], tmp_path: Path, plain: bool
) -> None:
    """This one has no Python at all. Without the test inside, it gets its name."""
    docker, name = shell
    log = tmp_path / "log"
    folder = context(tmp_path / "one", name, "RUN echo fine > /said", f"LABEL run-of={name}")
    with pytest.raises(ClusterkitError, match="does not hold what it should"):
        images.build(docker, f"{name}:1", folder, log=log, plain=plain, expected={"ray": "2.60.0"})
    assert identity(docker, f"{name}:1") == ""
    words = [docker, "image", "ls", "--all", "--quiet", "--filter", f"label=run-of={name}"]
    left = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert left == "", "without a name it only takes room"
    images.build(docker, f"{name}:1", folder, log=log, plain=plain)
    assert identity(docker, f"{name}:1") != ""
    assert ("Using cache" if plain else "CACHED") in log.read_text(), "its steps are done again"


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


# From a build with Docker 20.10.24 and DOCKER_BUILDKIT=0, the second time.
RECORDED_PLAIN = """\
Sending build context to Docker daemon  2.048kB
Step 1/3 : FROM clusterkit-lab-host:75ed5f6abd0e
 ---> 15f6dc40f432
Step 2/3 : RUN echo fine > /said
 ---> Using cache
 ---> cebbf2d2a253
Step 3/3 : RUN echo half; exit 3
 ---> Running in a3ceef52eda2
half
Removing intermediate container a3ceef52eda2
The command '/bin/sh -c echo half; exit 3' returned a non-zero code: 3""".splitlines()


def test_the_failed_step_of_a_plain_build_is_read_from_its_log() -> None:
    assert image_plan.failed_step(RECORDED_PLAIN) == (
        "[3/3] RUN echo half; exit 3",
        ["half"],
    )
    silent = [line for line in RECORDED_PLAIN if line != "half"]
    assert image_plan.failed_step(silent)[1][-1].endswith("returned a non-zero code: 3")


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


# --------------------------------------------------------------------------- without BuildKit

STAND_INS = {"ray": "2.60.0", "torch": "2.13.0", "vllm": "0.29.0"}


def stand_in(folder: Path, name: str, version: str) -> None:
    """A wheel with as much in it as an import needs."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")


def pip_wheel(folder: Path) -> str:
    """The pip that this environment has, as a wheel again; its version."""
    import pip

    version, home = pip.__version__, Path(pip.__file__).parent.parent
    with zipfile.ZipFile(folder / f"pip-{version}-py3-none-any.whl", "w") as wheel:
        for path in [*(home / "pip").rglob("*.py"), *(home / "pip").rglob("*.pem")]:
            wheel.write(path, path.relative_to(home))
        for name in ("METADATA", "WHEEL"):
            wheel.write(home / f"pip-{version}.dist-info" / name, f"pip-{version}.dist-info/{name}")
        wheel.writestr(f"pip-{version}.dist-info/RECORD", "")
    return version


def listing(docker: str, image: str) -> set[str]:
    """Every file of the engine's environment in an image."""
    words = [
        docker,
        "run",
        "--rm",
        "--network",
        "none",
        "--entrypoint",
        "find",
        image,
        "/opt/engine",
        "!",
        "-type",
        "d",
    ]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


def test_the_recipe_cpu_makes_the_same_image_either_way(tmp_path: Path) -> None:
    """The whole recipe, on the base of a lab's host and with stand-ins for the wheels."""
    try:
        docker = images.builder()
    except ToolMissing as error:
        pytest.skip(f"{error.message}: {error.hint}")
    listed = [docker, "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", "clusterkit-lab-host"]
    base = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    if not base or not images.knows_buildkit(docker):
        pytest.skip("there is no lab's host image here, or no BuildKit to compare with")
    folder = tmp_path / "context"
    house = folder / "wheels"
    house.mkdir(parents=True)
    pins = [f"pip=={pip_wheel(house)}"]
    for name, version in STAND_INS.items():
        stand_in(house, name, version)
        pins.append(f"{name}=={version}")
    (house / "pins.txt").write_text("\n".join(pins) + "\n")
    found = {}
    tags = {plain: f"clusterkit-test/cpu:{uuid.uuid4().hex[:8]}" for plain in (False, True)}
    try:
        for plain, tag in tags.items():
            (folder / "Dockerfile").write_text(image_plan.rendered("cpu", plain=plain))
            words = {"BASE": base[0], "INPUTS": "one"}
            images.build(docker, tag, folder, log=tmp_path / f"{plain}.log", arguments=words, plain=plain)
            found[plain] = listing(docker, tag)
            assert images.inspect(tag)["labels"]["clusterkit.inputs"] == "one"
        assert found[True] == found[False]
        assert "/opt/engine/lib/python3.11/site-packages/vllm.py" in found[True]
        # The wheels are in a stage that is left behind.
        subprocess.run([docker, "save", "--output", str(tmp_path / "plain.tar"), tags[True]], check=True)
        with tarfile.open(tmp_path / "plain.tar") as tar:
            for member in (one for one in tar.getmembers() if one.name.endswith("layer.tar")):
                with tarfile.open(fileobj=tar.extractfile(member)) as layer:
                    assert not [name for name in layer.getnames() if name.startswith("wheels")]
    finally:
        subprocess.run([docker, "image", "rm", *tags.values()], capture_output=True, check=False)


def test_a_login_of_the_index_is_kept_out_of_a_plain_build() -> None:
    """It would be in a layer; BuildKit's secrets are in none."""
    for index in ("https://me:hush-hush@mirror.example/simple", "https://mirror.example/simple?token=hush-hush"):
        with pytest.raises(ClusterkitError) as caught:
            images._without_secrets(images.Site(index_url=index))
        assert "hush-hush" not in f"{caught.value.message} {caught.value.hint}"
    images._without_secrets(images.Site(index_url="https://mirror.example/simple"))


def test_an_output_that_nobody_reads_ends_the_build(shell: tuple[str, str], tmp_path: Path) -> None:
    docker, name = shell

    def broken(_line: str) -> None:
        raise BrokenPipeError

    # It says more than a pipe holds, and would wait for ever to be read.
    loud = "while :; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; done"
    with pytest.raises(BrokenPipeError):
        images.build(
            docker, f"{name}:1", context(tmp_path / "one", name, f"RUN {loud}"), log=tmp_path / "log", on_line=broken
        )
