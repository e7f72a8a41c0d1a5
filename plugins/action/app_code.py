"""The code of apps on a host: only what is wanting there is packed and brought."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from clusterkit import app_code, transfer
from clusterkit.errors import ClusterkitError
from clusterkit.spec.cluster import Code


class ActionModule(ActionBase):
    """Options: those of the module, but for `incoming`."""

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        options = dict(self._task.args)
        looked = self._module(options, task_vars)
        wanting = looked.get("wanting")
        if looked.get("failed") or self._task.check_mode or not wanting:
            return looked
        codes = [Code(**code) for code in options["apps"] if code["digest"] in wanting]
        try:
            with tempfile.TemporaryDirectory() as folder:
                files = []
                for code in codes:
                    files.append(Path(folder) / f"{code.digest}.zip")
                    files[-1].write_bytes(app_code.archive(code))
                there = dict(zip([code.digest for code in codes], transfer.bring(self, *files), strict=True))
                return self._module({**options, "incoming": there}, task_vars)
        except ClusterkitError as error:
            raise AnsibleActionFail(f"the code of an app: {error.message}\nFix: {error.hint}") from None
        finally:
            transfer.clear(self)

    def _module(self, options: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        done: dict[str, Any] = self._execute_module(module_name="app_code", module_args=options, task_vars=task_vars)
        return done
