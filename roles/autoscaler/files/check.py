"""Would Ray take these files? They come by stdin as {path: text}: a container sees no file of the host.

`python -m clusterkit.node_provider` answers, in the environment that this runs in. sys.argv[1]: where they are to lie;
here they lie in an empty folder instead.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile

sys.dont_write_bytecode = True
with tempfile.TemporaryDirectory() as folder:
    for name, text in json.load(sys.stdin).items():
        path = os.path.join(folder, os.path.relpath(name, sys.argv[1]))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as handle:
            handle.write(text)
    sys.path.insert(0, os.path.join(folder, "lib"))
    sys.argv[1:] = [os.path.join(folder, "autoscaling.yaml")]
    runpy.run_module("clusterkit.node_provider", run_name="__main__")
