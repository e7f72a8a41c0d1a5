"""From bare hosts to an answer, and then with nothing to do: a lab of three, the image at hand on the controller.

python -m bench.cold     makes a lab, and takes it away
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench import noop
from bench.common import BIN, clusterkit, run, seconds, table

NAME = "benchcold"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        inventory = str(Path(folder) / "inventory")
        words = ["--name", NAME, "--inventory", inventory]
        try:
            up = seconds(lambda: clusterkit("lab", "up", "--workers", "2", *words))
            ping = seconds(lambda: run(str(BIN / "ansible"), "all", "-i", inventory, "-m", "ansible.builtin.ping"))
            site = seconds(lambda: run(str(BIN / "ansible-playbook"), "site.yml", "-i", inventory))
            table(
                "Cold deploy of three hosts in containers (the image is built already if it was built before)",
                ["what", "seconds", "pings"],
                [
                    ["clusterkit lab up --workers 2", f"{up:.1f}", "-"],
                    ["ansible -m ping", f"{ping:.1f}", "1.0"],
                    ["ansible-playbook site.yml, bare Debian to an answer", f"{site:.0f}", f"{site / ping:.0f}"],
                ],
            )
            noop.measure(inventory)
        finally:
            clusterkit("lab", "down", *words)


if __name__ == "__main__":
    main()
