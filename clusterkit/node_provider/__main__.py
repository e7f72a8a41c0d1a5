"""`python -m clusterkit.node_provider FILE`, in Ray's environment: prints {"problems": [...]}, ends with 1 for any."""

from __future__ import annotations

import json
import sys

from clusterkit.node_provider.check import problems


def main() -> int:
    # YAML is what Ray reads; JSON is YAML, and needs no parser that Ray's environment may lack.
    with open(sys.argv[1], encoding="utf-8") as handle:
        found = problems(json.load(handle))
    print(json.dumps({"problems": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
