"""The pages for GPU hosts, followed on the servers of gpu_site.py: every ```console block, in order, compared."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.lab.conftest import ENVIRONMENT
from tests.lab.gpu_site import Site
from tests.lab.runbooks import PAGES, follow

pytestmark = [pytest.mark.docker, pytest.mark.slow]

# The stand-in of firmware and boot loader takes the kernel's command line from grub.cfg: here it keeps what it had.
BOOT = "/usr/local/sbin/stand-in-kernel"
ANOTHER_ENTRY = f"cp {BOOT} {BOOT}.grub; sed -i '/grub.cfg/d' {BOOT}"
# What can happen to a host of a page.
EVENTS: dict[str, Callable[[Site, str], object]] = {
    "GPU 3 has uncorrectable errors": lambda site, host: site.set_ecc_errors(host, gpu=3, count=2),
    "GPU 3 was exchanged": lambda site, host: site.set_ecc_errors(host, gpu=3, count=0),
    "it boots another entry than GRUB's": lambda site, host: site.lab.on(host, ANOTHER_ENTRY),
    "it boots GRUB's entry again": lambda site, host: site.lab.on(host, f"mv {BOOT}.grub {BOOT}"),
}


@pytest.mark.parametrize("page", ["gpu-driver-install", "gpu-sick", "gpu-driver-upgrade", "gpu-reboot-did-not-help"])
def test_the_pages_for_gpu_hosts_tell_the_truth(site: Site, page: str) -> None:
    """One host's life: each page begins where the one before it ended."""

    def adapt(text: str) -> str:
        return re.sub(r"\bgpu([12])\b", r"worker\1", text).replace("inventory/mysite", str(site.inventory))

    def happen(event: str) -> None:
        host, _, what = adapt(event).removeprefix("on ").partition(": ")
        if what in EVENTS:
            EVENTS[what](site, host)
        else:
            site.lab.on(host, what)

    environment = {**ENVIRONMENT, "COLUMNS": "200"}
    assert follow(PAGES / f"{page}.md", environment, adapt, happen) > 0
