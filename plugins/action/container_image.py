"""The engine's image on a host: as the host has it, built on the controller or the builder host, or pulled."""

from __future__ import annotations

import os
import shlex
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from clusterkit import images, transfer, wheels, workspace
from clusterkit.errors import ClusterkitError
from clusterkit.tunnel import Way

STORE = workspace.cache_home()


class ActionModule(ActionBase):
    """Options: name, keep, reference (pulled as it is) or recipe, engine and sources (built); mirror; builder (how its
    host is reached) and buildkit (auto or never); registry, own_registry (how that one is reached, where it is the
    cluster's own), pull_registry (a cache in front of it).

    With `state: reached` nothing is done but to return `reached`: how Ansible logs in to the task's host.
    """

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        args = dict(self._task.args)
        if args.get("state") == "reached":
            # Delegated, it is the other host's connection; before anything opens it.
            host = self._task.delegate_to or (task_vars or {})["inventory_hostname"]
            return {"changed": False, "reached": reached(str(host), self._connection)}
        super().run(tmp, task_vars)
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
        recipe, at = args["recipe"], Way.of(args.get("builder"))
        wish = wheels.wish_from({**args["engine"], **args["sources"]})

        machine = os.uname().machine
        plan = images.planned(recipe, wish, machine, store=STORE)
        info = self._module({**base, "state": "info", "inputs": plan.inputs}, task_vars)
        if info.get("failed"):
            return info
        # From wheels the base is made here; from source all is done where Docker is.
        if info["machine"] != machine and (at is None or isinstance(plan, images.WheelImage)):
            raise AnsibleActionFail(
                f"the host is {info['machine']}, the controller {machine}: images are built for one's own\n"
                "Fix: run from a controller of that architecture, or name an image: clusterkit_image; one from source "
                "can be built on a host of the group image_builder"
            )
        if info["current"] and not info["prunable"]:
            return info
        if info["tag"]:
            return self._module({**base, "tag": info["tag"]}, task_vars)
        if self._task.check_mode:
            return self._module({**base, "tag": f"{images.REPOSITORY}-{recipe['name']}:(to be built)"}, task_vars)
        made = images.archive(
            plan,
            store=STORE,
            site=images.Site.of(recipe, debian_mirror=args.get("mirror") or ""),
            at=at,
            machine=info["machine"],
            buildkit=args.get("buildkit") or "auto",
        )
        to = args.get("registry")
        if to:
            pushed = images.push(made.tag, to, made.archive, args.get("own_registry"), store=STORE, at=at)
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


def reached(host: str, connection: Any) -> dict[str, Any]:
    """What a `clusterkit.tunnel.Way` is made of, from a connection that Ansible has set up and not opened yet."""
    kind = connection.ansible_name.rpartition(".")[2]
    if kind == "local":
        return {"host": host}
    if kind != "ssh":
        raise AnsibleActionFail(
            f"the builder {host} is reached by {kind}, and a tunnel to its Docker needs ssh\n"
            "Fix: put a host that is reached by ssh (or local) into the group image_builder"
        )

    def option(name: str) -> Any:
        # Not every release of Ansible has them all.
        return connection.get_option(name) if connection.has_option(name) else None

    if option("password") or option("private_key"):
        raise AnsibleActionFail(
            f"the image is built on {host} through a tunnel of ssh, which logs in by key and takes no password\n"
            "Fix: let a key in there (ansible_ssh_private_key_file, or ssh-agent), and take the password off this host"
        )
    # As Ansible orders them: of several values of one option ssh takes the first.
    words = [option("ssh_executable"), *shlex.split(option("ssh_args") or "")]
    if option("host_key_checking") is False:
        words += ["-o", "StrictHostKeyChecking=no"]
    for name, key in (("port", "Port"), ("private_key_file", "IdentityFile"), ("remote_user", "User")):
        if value := option(name):
            value = os.path.expanduser(value) if name == "private_key_file" else value
            words += ["-o", f'{key}="{value}"' if name != "port" else f"{key}={value}"]
    words += ["-o", f"ConnectTimeout={option('timeout')}"]
    for name in ("ssh_common_args", "ssh_extra_args"):
        words += shlex.split(option(name) or "")
    return {"host": host, "address": str(option("host")), "ssh": [str(word) for word in words]}
