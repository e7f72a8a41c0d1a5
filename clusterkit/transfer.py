"""Bring large files to a host: into one folder of a fixed name, so that a killed run leaves nothing that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from clusterkit.errors import ClusterkitError

FOLDER = "~/.clusterkit-incoming"


class Connected(Protocol):
    """The part of Ansible's ActionBase that this needs."""

    def _low_level_execute_command(self, cmd: str, sudoable: bool = True) -> dict[str, Any]: ...

    def _transfer_file(self, local_path: str, remote_path: str) -> Any: ...


def bring(action: Connected, *files: Path) -> list[str]:
    """Paths of the files on the host, readable for the connection's user and root. Clears what was there."""
    folder = _execute(action, f"umask 77 && rm -rf {FOLDER} && mkdir {FOLDER} && cd {FOLDER} && pwd")
    return [str(action._transfer_file(str(file), f"{folder}/{file.name}")) for file in files]


def clear(action: Connected) -> None:
    """Take the folder away."""
    _execute(action, f"rm -rf {FOLDER}")


def _execute(action: Connected, command: str) -> str:
    # As the connection's own user: its home is where it may write, whatever the task becomes.
    done = action._low_level_execute_command(command, sudoable=False)
    if done["rc"] != 0:
        raise ClusterkitError(
            f"the host takes no files: {str(done.get('stderr', '')).strip()[-300:]}",
            hint="is the disk of the user's home full?",
        )
    lines: list[str] = str(done["stdout"]).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
