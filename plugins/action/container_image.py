"""The engine's image on a host: as the host has it, built on the controller, or pulled."""

from __future__ import annotations

import os
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from clusterkit import images, transfer, wheels, workspace
from clusterkit.errors import ClusterkitError

STORE = workspace.cache_home()


class ActionModule(ActionBase):
    """Options: name, keep, reference (pulled as it is) or recipe, engine and sources (built); mirror; registry,
    own_registry (how that one is reached, where it is the cluster's own), pull_registry (a cache in front of it)."""

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        base = {"name": args["name"]}
        if args.get("state", "present") == "absent":
            return self._module({**base, "state": "absent"}, task_vars)
        base["keep"] = args.get("keep")
        if args.get("reference"):
            return self._module({**base, "tag": args["reference"], "pull": args["reference"]}, task_vars)
        try:
            return self._built(args, base, task_vars)
        except ClusterkitError as error:
            raise AnsibleActionFail(f"{error.message}\nFix: {error.hint}") from None

    def _built(self, args: dict[str, Any], base: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        recipe = args["recipe"]
        wish = wheels.wish_from({**args["engine"], **args["sources"]})

        machine = os.uname().machine
        plan = images.planned(recipe, wish, machine, store=STORE)
        info = self._module({**base, "state": "info", "inputs": plan.inputs}, task_vars)
        if info.get("failed"):
            return info
        if info["machine"] != machine:
            raise AnsibleActionFail(
                f"the host is {info['machine']}, the controller {machine}: images are built for one's own\n"
                "Fix: run from a controller of that architecture, or name an image: clusterkit_image"
            )
        if info["current"] and not info["prunable"]:
            return info
        if info["tag"]:
            return self._module({**base, "tag": info["tag"]}, task_vars)
        if self._task.check_mode:
            return self._module({**base, "tag": f"{images.REPOSITORY}-{recipe['name']}:(to be built)"}, task_vars)
        made = images.archive(plan, store=STORE, site=images.Site.of(recipe, debian_mirror=args.get("mirror") or ""))
        to = args.get("registry")
        if to:
            pushed = images.push(made.tag, to, made.archive, args.get("own_registry"), store=STORE)
            by = args.get("pull_registry") or to
            source, *parts = (by + name.removeprefix(to) for name in (pushed.reference, *pushed.parts))
            return self._module({**base, "tag": made.tag, "pull": source, "parts": parts}, task_vars)
        try:
            (remote,) = transfer.bring(self, made.archive)
            return self._module({**base, "tag": made.tag, "archive": remote}, task_vars)
        finally:
            transfer.clear(self)

    def _module(self, options: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        done: dict[str, Any] = self._execute_module(
            module_name="container_image", module_args=options, task_vars=task_vars
        )
        return done
