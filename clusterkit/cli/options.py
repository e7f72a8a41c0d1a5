"""Options that several verbs take, and what they become."""

from __future__ import annotations

import getpass
from typing import Annotated, Any

import typer

from clusterkit.runner import Options

Inventory = Annotated[
    str | None, typer.Option("-i", "--inventory", help="The inventory; default inventory/local of the checkout.")
]
Json = Annotated[bool, typer.Option("--json", help="Data on stdout, as JSON.")]
ExtraVars = Annotated[list[str] | None, typer.Option("-e", "--extra-vars", help="As in ansible-playbook.")]
AskBecome = Annotated[bool, typer.Option("-K", "--ask-become-pass", help="Ask for the sudo password.")]
AskVault = Annotated[bool, typer.Option("--ask-vault-pass", help="Ask for the vault password.")]
VaultId = Annotated[list[str] | None, typer.Option("--vault-id", help="As in ansible-playbook.")]
Limit = Annotated[str | None, typer.Option("--limit", help="Only these hosts.")]
Tags = Annotated[str | None, typer.Option("--tags", help="Only these roles, such as ray_node.")]
Forks = Annotated[int | None, typer.Option("--forks", min=1, help="Hosts at the same time.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="More in the log.")]


def options(
    *,
    extra_vars: list[str] | None = None,
    ask_become: bool = False,
    ask_vault: bool = False,
    vault_id: list[str] | None = None,
    **rest: Any,
) -> Options:
    """What the runner takes; asks for the passwords that were announced."""
    return Options(
        extra_vars=tuple(extra_vars or ()),
        vault_ids=tuple(vault_id or ()),
        become_password=getpass.getpass("sudo password: ") if ask_become else None,
        vault_password=getpass.getpass("vault password: ") if ask_vault else None,
        **rest,
    )
