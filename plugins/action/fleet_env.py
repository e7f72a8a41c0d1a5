"""The fleet daemon's environment: packages resolved on the controller, the daemon itself as a wheel of the kit."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clusterkit import transfer, wheels, workspace
from clusterkit.errors import ClusterkitError

STORE = workspace.cache_home()
PROJECT = tomllib.loads((workspace.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Of Redfish; without such hosts it and all that it brings along stay out.
REDFISH = "sushy"


def pythons() -> list[str]:
    """The minor versions of Python that the kit runs on."""
    allowed = SpecifierSet(PROJECT["requires-python"])
    return [version for version in (f"3.{minor}" for minor in range(9, 40)) if version in allowed]


def requirements(redfish: bool) -> tuple[str, ...]:
    named = PROJECT["optional-dependencies"]["fleet"]
    return tuple(item for item in named if redfish or Requirement(item).name != REDFISH)


def kit_wheel(root: Path, store: Path) -> Path:
    """A wheel with the daemon and nothing else of the kit, the same for the same files; made once."""
    package = root / "clusterkit"
    sources = [package / "__init__.py", package / "errors.py", *sorted((package / "fleet").rglob("*.py"))]
    files = {str(path.relative_to(root)): path.read_bytes() for path in sources}
    digest = hashlib.sha256(b"\0".join(part for name, data in files.items() for part in (name.encode(), data)))
    version = f"{PROJECT['version']}+g{digest.hexdigest()[:16]}"
    metadata = f"Requires-Python: {PROJECT['requires-python']}\n"
    return wheels.pure_wheel("clusterkit", version, metadata, files, store=store)


def _hint(error: ClusterkitError) -> str:
    """What is said of an engine's packages names options of another role."""
    own = "name an index that the controller reaches (clusterkit_mirrors.pypi, or pip's own configuration)"
    return own if error.hint is None or "ray_env_" in error.hint else error.hint


class ActionModule(ActionBase):
    """Options: path, pythons, redfish, source, index_url."""

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        try:
            return self._present(dict(self._task.args), task_vars)
        except ClusterkitError as error:
            raise AnsibleActionFail(f"the fleet daemon's environment: {error.message}\nFix: {_hint(error)}") from None

    def _present(self, args: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        base, info, found = self._interpreter(args, task_vars)
        if info is None:
            seen = ", ".join(f"{name} is {version}" for name, version in found.items()) or "there is none"
            needed = f"Python {' or '.join(pythons())}"
            if self._task.check_mode:
                # What brings one may only have been planned.
                change = {"what": "environment", "name": args["path"], "wanted": f"made with {needed}"}
                return {"changed": True, "changes": [{**change, "actual": f"missing; of Python, {seen}"}]}
            raise AnsibleActionFail(
                f"the fleet daemon runs on {needed}, and on this host {seen}\n"
                "Fix: have such a Python installed (baseline_extra_packages: [python3.11, python3.11-venv] on Ubuntu "
                "22.04, [python3.11] on EL 9), or name one in fleet_pythons"
            )
        wish = wheels.Wish(requirements(args["redfish"]), index_url=args["index_url"])
        target = wheels.Target(info["python"], info["glibc"], info["machine"])
        inputs, kept = wish.digest(target), info["lock"]
        # What the host was made from stays: a later run, or another controller, does not drift.
        pins = kept["pins"] if kept.get("inputs") == inputs else wheels.lock(wish, target, store=STORE)
        own = kit_wheel(workspace.ROOT, STORE)
        options = {
            **base,
            "state": "present",
            "pins": pins,
            "inputs": inputs,
            "index_url": args["index_url"],
            "extra_wheels": [str(own)],
        }
        planned = self._module(options, task_vars, check=True)
        if self._task.check_mode or planned.get("failed") or not planned["changed"]:
            return planned
        files = [own, wheels.wheelhouse(wish, target, pins, store=STORE)] if args["source"] == "wheelhouse" else [own]
        try:
            there = transfer.bring(self, *files)
            options["extra_wheels"] = there[:1]
            if there[1:]:
                options["wheelhouse"] = there[1]
            return self._module(options, task_vars)
        finally:
            transfer.clear(self)

    def _interpreter(
        self, args: dict[str, Any], task_vars: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, str]]:
        """The options and the facts of the first that fits; the versions of those that do not."""
        found: dict[str, str] = {}
        for name in args["pythons"]:
            base = {"path": args["path"], "python": name}
            info = self._module({**base, "state": "info"}, task_vars)
            if info.get("failed"):
                continue
            if info["python"] in pythons():
                return base, info, found
            found[name] = info["python"]
        return {}, None, found

    def _module(
        self, options: dict[str, Any], task_vars: dict[str, Any] | None, *, check: bool = False
    ) -> dict[str, Any]:
        """ray_env's answer; its environment is another one here, and no node runs from it."""
        asked = self._task.check_mode
        self._task.check_mode = asked or check
        try:
            done: dict[str, Any] = self._execute_module(module_name="ray_env", module_args=options, task_vars=task_vars)
        finally:
            self._task.check_mode = asked
        for change in done.get("changes", ()):
            change.pop("disrupts", None)
        return done
