"""Options that several verbs take, and what they become."""

from __future__ import annotations

import functools
import getpass
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from clusterkit.runner import Options

Inventory = Annotated[
    str | None, typer.Option("-i", "--inventory", help="The inventory; default inventory/local of the checkout.")
]
Json = Annotated[bool, typer.Option("--json", help="Data on stdout, as JSON.")]

# ansible-playbook's own, by the name of the parameter: type and default.
_ANSIBLE: dict[str, tuple[Any, Any]] = {
    "limit": (Annotated[str | None, typer.Option("--limit", help="Only these hosts.")], None),
    "tags": (Annotated[str | None, typer.Option("--tags", help="Only these roles, such as ray_node.")], None),
    "forks": (Annotated[int | None, typer.Option("--forks", min=1, help="Hosts at the same time.")], None),
    "extra_vars": (
        Annotated[list[str] | None, typer.Option("-e", "--extra-vars", help="As in ansible-playbook.")],
        None,
    ),
    "ask_become": (Annotated[bool, typer.Option("-K", "--ask-become-pass", help="Ask for the sudo password.")], False),
    "ask_vault": (Annotated[bool, typer.Option("--ask-vault-pass", help="Ask for the vault password.")], False),
    "vault_id": (Annotated[list[str] | None, typer.Option("--vault-id", help="As in ansible-playbook.")], None),
    "verbosity": (Annotated[int, typer.Option("-v", "--verbose", count=True, help="More in the log.")], 0),
}
# What reads the inventory takes these; what logs in to hosts, the next.
READS = ("extra_vars", "ask_vault", "vault_id")
RUNS = ("extra_vars", "ask_become", "ask_vault", "vault_id")


class Given:
    """What was given of Ansible's options."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    @property
    def limit(self) -> str | None:
        limit: str | None = self.given["limit"]
        return limit

    def options(self, **more: Any) -> Options:
        """What the runner takes; asks for the passwords that were announced."""
        rest = dict(self.given)
        return Options(
            extra_vars=tuple(rest.pop("extra_vars") or ()),
            vault_ids=tuple(rest.pop("vault_id") or ()),
            become_password=getpass.getpass("sudo password: ") if rest.pop("ask_become", False) else None,
            vault_password=getpass.getpass("vault password: ") if rest.pop("ask_vault") else None,
            **rest,
            **more,
        )


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb these options of Ansible's; the verb gets them together, as its first parameter."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(verb, eval_str=True).parameters.values()
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in ((name, _ANSIBLE[name]) for name in names)
        ]

        @functools.wraps(verb)
        def call(**words: Any) -> None:
            verb(Given(**{name: words.pop(name) for name in names}), **words)

        # Typer reads both; what `wraps` copied is the verb's own.
        shown = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own), *added]
        call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in shown}
        del call.__wrapped__
        return call

    return decorate
