"""Modules as Ansible runs them: arguments in as JSON, one result out."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

ROOT = Path(__file__).resolve().parents[2]

Json = dict[str, Any]


def load_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"plugins/modules/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_module(module: ModuleType, *, check: bool = False, **arguments: Any) -> Json:
    """Runs a module's main(); `check` is check mode. A failure is a result with `failed`."""
    out = io.StringIO()
    given = {**arguments, "_ansible_check_mode": check}
    with patch_module_args(given), contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        module.main()
    result: Json = json.loads(out.getvalue())
    return result
