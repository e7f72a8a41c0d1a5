"""What Ansible passes over with a warning, or refuses without a place: files that are missing or do not parse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from clusterkit.spec.findings import Finding, Place

YAML_SUFFIXES = {".yml", ".yaml", ".json"}
VAULT_HEADER = "$ANSIBLE_VAULT"


class _Loader(yaml.SafeLoader):
    """YAML with Ansible's own tags, whose values do not matter here."""


_Loader.add_constructor(None, lambda _loader, _node: "")


def broken_sources(sources: Sequence[str]) -> list[Finding]:
    """What is wrong with the files that `-i` names."""
    findings = []
    for source in sources:
        path = Path(source)
        if path.exists():
            files = [path] if path.is_file() else sorted(path.iterdir())
            findings += unparsable(file for file in files if file.suffix in YAML_SUFFIXES and file.is_file())
        elif "," not in source:  # a list of hosts is no file
            fix = "name one with -i, such as inventory/local"
            findings.append(Finding(Place(source), "inventory", "no such file or folder", fix))
    return findings


def variable_files(inventory: str) -> list[Path]:
    """The files of group_vars and host_vars beside an inventory."""
    home = Path(inventory)
    folder = home if home.is_dir() else home.parent
    files = [*folder.glob("group_vars/**/*"), *folder.glob("host_vars/**/*")]
    return sorted(file for file in files if file.is_file() and file.suffix in {*YAML_SUFFIXES, ""})


def encrypted(file: Path) -> bool:
    """Is it a whole vault file?"""
    try:
        with file.open("rb") as handle:
            return handle.read(len(VAULT_HEADER)) == VAULT_HEADER.encode()
    except OSError:
        return False


def unparsable(files: Iterable[Path]) -> list[Finding]:
    """YAML files that do not parse, or that hold no mapping."""
    findings = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            content = None if text.startswith(VAULT_HEADER) else yaml.load(text, _Loader)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            fix = "give the user who runs this the right to"
            findings.append(Finding(Place(str(file)), "inventory", problem, fix))
        except UnicodeDecodeError:
            findings.append(Finding(Place(str(file)), "inventory", "is not text in UTF-8", "rewrite the file"))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 0
            problem = f"does not parse: {error.problem}"
            findings.append(Finding(Place(str(file), line), "inventory", problem, "mend the YAML there"))
        except yaml.YAMLError:
            findings.append(Finding(Place(str(file)), "inventory", "does not parse", "mend the YAML there"))
        else:
            if content is not None and not isinstance(content, dict):
                fix = "begin with `all:` in an inventory, with `name: value` in variables"
                findings.append(Finding(Place(str(file), 1), "inventory", "is no YAML mapping", fix))
    return findings
