"""Resolve on the controller, bring wheels where asked, then let the module make the environment."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from clusterkit import transfer, wheels, workspace
from clusterkit.errors import ClusterkitError

STORE = workspace.cache_home()


class ActionModule(ActionBase):
    """Options: path, python, engine, source (index or wheelhouse), and what overrides the engine's links."""

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        if args.get("state", "present") == "absent":
            return self._module({"state": "absent", "path": args["path"]}, task_vars)
        base = {"path": args["path"], "python": args["python"]}
        info = self._module({**base, "state": "info"}, task_vars)
        if info.get("failed"):
            return info
        try:
            return self._present(args, base, info, task_vars)
        except ClusterkitError as error:
            raise AnsibleActionFail(f"{error.message}\nFix: {error.hint}") from None

    def _present(
        self, args: dict[str, Any], base: dict[str, Any], info: dict[str, Any], task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        engine = args["engine"]
        allowed = engine["python"]
        if info["python"] not in allowed:
            raise AnsibleActionFail(
                f"{args['python']} is Python {info['python']}; this stack runs on {', '.join(allowed)}\n"
                "Fix: set ray_env_python to such an interpreter"
            )
        wish = wheels.wish_from({**engine, **args["sources"]})
        target = wheels.Target(info["python"], info["glibc"], info["machine"])
        inputs = wish.digest(target)
        # What a host was made from stays: a later run, or another controller, does not drift.
        kept = info["lock"]
        pins = (
            kept["pins"]
            if kept.get("inputs") == inputs
            else wheels.lock(wish, target, store=STORE, other_pythons=allowed)
        )
        behind = kept.get("inputs") != inputs or bool(info["missing"])
        options = {
            **base,
            "state": "present",
            "pins": pins,
            "inputs": inputs,
            "index_url": wish.index_url,
            "extra_index_urls": list(wish.extra_index_urls),
            "find_links": wheels.reachable(wish.find_links) if behind else [],
        }
        shim = wheels.vllm_metadata_wheel(wish.provides_vllm, store=STORE) if wish.provides_vllm else None
        if shim is not None:
            options["extra_wheels"] = [str(shim)]
        behind = behind or (shim is not None and info["vllm"] != wish.provides_vllm)
        if self._task.check_mode or not behind:
            return self._module(options, task_vars)
        files = [shim] if shim is not None else []
        if args["source"] == "wheelhouse":
            files.append(wheels.wheelhouse(wish, target, pins, store=STORE))
        try:
            remote = dict(zip(files, transfer.bring(self, *files), strict=True)) if files else {}
            if shim is not None:
                options["extra_wheels"] = [remote[shim]]
            if args["source"] == "wheelhouse":
                options["wheelhouse"] = remote[files[-1]]
            return self._module(options, task_vars)
        finally:
            if files:
                transfer.clear(self)

    def _module(self, options: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        done: dict[str, Any] = self._execute_module(module_name="ray_env", module_args=options, task_vars=task_vars)
        return done
