"""`docs/variables.md`: every variable of an inventory, from the models that check it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from clusterkit.spec.facts import SCOPES

_TITLES = {
    "cluster": "Facts of the cluster (`group_vars/all`)",
    "pool": "Facts of a pool (the `group_vars` of a child group of `ray_workers`)",
    "host": "Facts of a host (`host_vars`, or beside the host's name)",
}


def variables() -> str:
    """The whole page, as Markdown."""
    lines = [
        "# Variables",
        "",
        "Written by `python -m clusterkit render variables`; a test holds it against the models.",
        "Units stand in the names: `_s` seconds, `_gib` GiB, `_mib` MiB. Parameters of an app stand in",
        "`serve_apps/<template>/README.md`, options of a role in `roles/<role>/README.md`.",
    ]
    for scope, model in SCOPES.items():
        lines += ["", f"## {_TITLES[scope]}", "", "| variable | type | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            lines += _rows(f"clusterkit_{name}", field)
    return "\n".join(lines) + "\n"


def _rows(name: str, field: FieldInfo) -> list[str]:
    inner = _model(field.annotation)
    listed = get_origin(field.annotation) is list
    meaning = field.description or (inner.__doc__ or "").strip().split("\n")[0] if inner else field.description or ""
    rows = [f"| `{name}` | {_type(field.annotation)} | {_default(field, inner)} | {_cell(meaning)} |"]
    if inner is not None:
        joint = "[]." if listed else "."
        for key, item in inner.model_fields.items():
            rows += _rows(f"{name}{joint}{key}", item)
    return rows


def _model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for item in get_args(annotation) if (found := _model(item)) is not None), None)


def _type(annotation: Any) -> str:
    origin, inside = get_origin(annotation), [item for item in get_args(annotation) if item is not type(None)]
    if origin is Annotated:
        return _type(inside[0])
    if origin is Literal:
        return " or ".join(f"`{item}`" for item in inside)
    if origin is list:
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return "mapping"
    if inside and origin is not None and not isinstance(annotation, type):
        names = list(dict.fromkeys(_type(item) for item in inside))
        return "number" if set(names) <= {"whole number", "number"} else " or ".join(names)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(annotation, "value")


def _default(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    if field.is_required():
        return "**required**"
    if inner is not None and not isinstance(field.default, list):
        return ""
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
