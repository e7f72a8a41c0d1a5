"""The code that an app imports, as one zip named by its digest: the same files are the same zip, on any machine."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clusterkit import workspace
from clusterkit.errors import UsageError
from clusterkit.spec.cluster import Code
from serve_apps.template import AppCode

# It goes to every host, and each replica's environment unpacks it: weights have a way of their own.
LIMIT_MIB = 32
# Ray takes away a folder that is the only one at the top (ray 2.60.0, _private/runtime_env/packaging.py,
# unzip_package), which would be the package itself where there is one only. This one is there for that.
TOP = "app"
# Of a template's folder, what only the controller reads: another wording there restarts no replica.
CONTROLLER_ONLY = ("template.py", "parameters.py")
# The earliest that a zip can say.
TIME = (1980, 1, 1, 0, 0, 0)


def read(wanted: AppCode, inventories: Sequence[str]) -> Code:
    """Reads and packs; relative folders begin at that of the first inventory. UsageError where the folder is not
    there, too large, leads out of itself, or would be read as an inventory."""
    if not wanted.folder:
        return Code(digest=_digest(_kit(wanted.template)), template=wanted.template)
    sources = [Path(source).absolute() for source in inventories if Path(source).exists()]
    homes = [source if source.is_dir() else source.parent for source in sources]
    folder = Path(os.path.normpath((homes or [Path.cwd()])[0] / Path(wanted.folder).expanduser()))
    inside = next((source for source in sources if folder.is_relative_to(source)), None)
    if inside is not None:
        raise UsageError(
            f"{folder} lies in the inventory {inside}, and Ansible reads all of that as inventory, or runs it",
            hint=f"move the code beside it, and name it so: ../{folder.name}",
        )
    _has_module(_site(folder), wanted.module, folder)
    return Code(digest=_digest(_all(wanted.template, str(folder))), template=wanted.template, folder=str(folder))


def archive(code: Code) -> bytes:
    """The zip. UsageError where the files are no longer those that `read` saw."""
    packed = pack(_all(code.template, code.folder))
    if hashlib.sha256(packed).hexdigest() != code.digest:
        raise UsageError(
            f"{code.folder or code.template} was changed while this run went on",
            hint="run the same again; it takes the code as it is then",
        )
    return packed


def pack(files: Mapping[str, bytes]) -> bytes:
    """A zip with nothing in it that a clock, a machine or a version of zlib could make different."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{TOP}/{name}", TIME)
            entry.create_system = 3
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            target.writestr(entry, files[name])
    return out.getvalue()


def _digest(files: Mapping[str, bytes]) -> str:
    return hashlib.sha256(pack(files)).hexdigest()


def _all(template: str, folder: str) -> dict[str, bytes]:
    """The kit's and the site's, where a template calls what the site wrote."""
    kit = _kit(template) if template else {}
    site = _site(Path(folder)) if folder else {}
    hidden = next((name for name in sorted(site) if kit and name.split("/")[0] == "serve_apps"), None)
    if hidden is not None:
        raise UsageError(
            f"{folder} has {hidden}, and serve_apps is the package of the kit's own code, which goes along",
            hint="give the site's folder or module another name",
        )
    return {**site, **kit}


def _kit(template: str) -> dict[str, bytes]:
    """The template's modules that run in replicas, and those beside the templates that these import."""
    package = workspace.ROOT / "serve_apps"
    modules = [path for path in sorted((package / template).glob("*.py")) if path.name not in CONTROLLER_ONLY]
    found = {path: path.read_bytes() for path in [package / "__init__.py", *modules]}
    todo = list(modules)
    while todo:
        for name in _imported(found[todo.pop()]):
            path = package / f"{name}.py"
            if path not in found and path.is_file():
                found[path] = path.read_bytes()
                todo.append(path)
    return {str(path.relative_to(workspace.ROOT)): text for path, text in found.items()}


def _imported(text: bytes) -> list[str]:
    """What `from serve_apps.NAME import …` names in a module."""
    modules = (node.module or "" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom))
    return [name.removeprefix("serve_apps.") for name in modules if name.startswith("serve_apps.")]


def _site(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder} on the controller",
            hint="name one that is there: absolute, or relative to the inventory's folder",
        )
    try:
        found = dict(_walk(folder.resolve()))
        sizes = {name: path.stat().st_size for name, path in found.items()}
        _small(sizes, folder)
        return {name: path.read_bytes() for name, path in found.items()}
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder} cannot be read: {error.strerror}", hint="let this user read it"
        ) from None


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(name in the zip, file) of everything but caches and what is hidden."""

    def refuse(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(root, onerror=refuse):
        here = Path(where)
        kept = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        folders[:] = [name for name in kept if not (here / name).is_symlink()]
        links = [name for name in kept if (here / name).is_symlink()]
        for name in [*links, *(name for name in names if not name.startswith(".") and not name.endswith(".pyc"))]:
            path, shown = here / name, str((here / name).relative_to(root))
            if "\\" in shown or not shown.isprintable():
                raise UsageError(f"the name {shown!r} cannot stand in a zip", hint="give the file another name")
            if path.is_symlink():
                _stays_inside(path, root, shown)
            if not path.is_file():
                raise UsageError(f"{path} is no plain file", hint="take it out of the folder of the code")
            yield shown, path


def _stays_inside(path: Path, root: Path, shown: str) -> None:
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(root):
        problem = f"the link {shown} leads out of {root}, to {target}"
    elif not target.is_file():
        problem = f"the link {shown} leads to {target}, which is no file"
    else:
        return
    raise UsageError(problem, hint="put the files themselves into the folder")


def _small(sizes: Mapping[str, int], folder: Path) -> None:
    if not sizes:
        raise UsageError(
            f"{folder} holds no file that is taken along (what is hidden is not)", hint="put the app's code there"
        )
    total, largest = sum(sizes.values()), max(sizes, key=lambda name: sizes[name])
    if total > LIMIT_MIB * 2**20:
        raise UsageError(
            f"{folder} holds {total / 2**20:.1f} MiB in {len(sizes)} files, and code may have {LIMIT_MIB} MiB; the "
            f"largest is {largest} with {sizes[largest] / 2**20:.1f} MiB",
            hint="leave what is no code out of this folder: hidden files and __pycache__ do not count, and data has "
            "its place on the hosts",
        )


def _has_module(files: Mapping[str, bytes], module: str, folder: Path) -> None:
    """Serve would say it only after the code has gone to every host."""
    path = module.replace(".", "/")
    if module and not {f"{path}.py", f"{path}/__init__.py"} & files.keys():
        raise UsageError(
            f"there is no module {module} in {folder}: neither {path}.py nor {path}/__init__.py",
            hint="correct import_path, or the folder; the folder itself is what imports begin at",
        )
