"""docs/runbooks/autoscaled.md, followed on a lab whose hosts have BMCs: every ```console block, in order, compared."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import bcrypt
import pytest

from tests.lab.conftest import ENVIRONMENT, Maker, playbook
from tests.lab.runbooks import PAGES, follow
from tests.lab.scaled_site import USER, ScaledSite, scaled_site, until

pytestmark = [pytest.mark.docker, pytest.mark.slow]

LONG_S = 600


def load(count: int) -> Callable[[ScaledSite], None]:
    """Tasks that take a host each for as long as the page needs; the hosts that may come have come."""

    def begin(site: ScaledSite) -> None:
        # Apart: what has no place must not keep the others waiting.
        for _ in range(count):
            site.work(1, LONG_S)
        until(lambda: len(site.nodes()) == min(count, able(site)), site.told)

    return begin


def able(site: ScaledSite) -> int:
    return sum(state not in ("maintenance", "quarantined") for state in site.states().values())


def end(site: ScaledSite) -> None:
    for work in site.works:
        work.process.kill()
    site.works.clear()
    # The drivers live on in the head's container, which has no pkill; its host sees them. Their tasks go with them.
    site.lab.on("head", "pkill -f '[r]ay.init'")
    until(lambda: not site.nodes(), site.told)


def hang(site: ScaledSite) -> None:
    until(lambda: site.is_off("worker1"), site.told)
    (site.bmcs / "worker1").write_text("hangs")


def boot(site: ScaledSite) -> None:
    (site.bmcs / "worker1").unlink()
    site.lab.container("worker1").unpause()


def rotate(site: ScaledSite) -> None:
    password = secrets.token_urlsafe(12)
    (site.bmcs / "htpasswd").write_text(f"{USER}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}\n")
    until(lambda: "401" in str(site.host("worker1")["power_error"]), site.told)
    site.declare(fleet_bmc_credentials={"default": {"user": USER, "password": password}})


def asked_again(site: ScaledSite) -> None:
    until(lambda: not any(site.host(name)["power_error"] for name in ("worker1", "worker2")), site.told)


EVENTS: dict[str, Callable[[ScaledSite], None]] = {
    "load that wants one host": load(1),
    "load that wants two hosts": load(2),
    "load that wants three hosts": load(3),
    "the load has ended": end,
    "on worker1: it hangs in its boot": hang,
    "on worker1: it boots again": boot,
    "the BMCs have another password, and so has the vault": rotate,
    "each BMC was asked again": asked_again,
}


def test_the_page_tells_the_truth(lab_of: Maker, tmp_path: Path) -> None:
    with scaled_site(lab_of, tmp_path, "scaledpage", 2, clusterkit_apps=[]) as site:
        done = playbook("site.yml", site.inventory)
        assert done.returncode == 0, done.stdout[-6000:]
        site.wait_for(worker1="off", worker2="off")

        def adapt(text: str) -> str:
            return text.replace("inventory/mysite", str(site.inventory))

        environment = {**ENVIRONMENT, "COLUMNS": "220"}
        assert follow(PAGES / "autoscaled.md", environment, adapt, lambda event: EVENTS[event](site)) > 5
