"""Numbers of replicas by policies and from outside, on a real Ray: the example of serve_apps/policy/README.md."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import threading
import zoneinfo
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.app_site import Site, app_site
from tests.support import ROOT, until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

README = (ROOT / "serve_apps/policy/README.md").read_text(encoding="utf-8")
# Whose clocks never go back, and are nine hours off.
TOKYO = zoneinfo.ZoneInfo("Asia/Tokyo")
PATIENCE_S = 240

# A site's own policy: the code of an app, with nothing of it but this module.
OWN = """
class Fixed:
    def __init__(self, numbers):
        self.numbers = numbers

    def __call__(self, contexts):
        return {key: self.numbers[key.name] for key in contexts if key.name in self.numbers}, {}
"""


class Policies:
    """The site with the apps of the README."""

    def __init__(self, site: Site) -> None:
        self.site = site
        home = site.folder / "inventory/parcels-app"
        files = re.findall(r"`(parcels/\w+\.py)`.*?:\n\n```python\n(.*?)```", README, re.DOTALL)
        assert [name for name, _ in files] == ["parcels/app.py", "parcels/presses.py"]
        (home / "parcels").mkdir(parents=True)
        for name, text in files:
            (home / name).write_text(text)
        (home / "parcels/policy.py").write_text(OWN)
        apps = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0])["clusterkit_apps"]
        site.apps = {app["name"]: app for app in apps}

    def deployment(self, name: str, app: str = "parcels") -> dict[str, Any]:
        found: dict[str, Any] = next(
            item for item in self.site.apps[app]["parameters"]["deployments"] if item["name"] == name
        )
        return found

    def ask_ray(self, method: str = "GET", path: str = "/api/serve/applications/", body: Any = None) -> httpx.Response:
        token = (self.site.folder / "host/state/node/token").read_text().strip()
        url = f"http://127.0.0.1:{self.site.ports['dashboard']}{path}"
        return httpx.request(method, url, json=body, headers={"Authorization": f"Bearer {token}"}, timeout=120)

    def replicas(self, app: str = "parcels") -> dict[str, int]:
        """Those that run, by deployment."""
        deployments = self.ask_ray().json()["applications"][app]["deployments"]
        return {
            name: sum(replica["state"] == "RUNNING" for replica in item["replicas"])
            for name, item in deployments.items()
        }

    def come_to(self, app: str = "parcels", **numbers: int) -> None:
        def there() -> bool:
            return self.replicas(app).items() >= numbers.items()

        until(there, lambda: f"{self.replicas(app)}, and not {numbers}", patience_s=PATIENCE_S, pause_s=0.5)

    @contextmanager
    def waiting(self, requests: int) -> Iterator[None]:
        """So many clients, each with one request after the other."""
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                httpx.get(self.site.url("/parcels?ask=scan"), timeout=PATIENCE_S)

        clients = [threading.Thread(target=client) for _ in range(requests)]
        for one in clients:
            one.start()
        try:
            yield
        finally:
            stop.set()
            for one in clients:
                one.join()

    def clusterkit(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "clusterkit", *words, "-i", str(self.site.inventory)]
        environment = {**os.environ, "XDG_STATE_HOME": str(self.site.folder / "state"), "NO_COLOR": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def time_of_day(minutes: int) -> str:
    return (datetime.datetime.now(TOKYO) + datetime.timedelta(minutes=minutes)).strftime("%H:%M")


@pytest.fixture(scope="module")
def here(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policies]:
    with app_site(tmp_path_factory.mktemp("site"), engine) as site:
        made = Policies(site)
        (times,) = made.deployment("Label")["scaling_policy"]["schedule"]["times"]
        # Now, in Tokyo.
        made.deployment("Label")["scaling_policy"]["schedule"]["time_zone"] = "Asia/Tokyo"
        del times["days"]
        times.update(start=time_of_day(-60), end=time_of_day(+90))
        assert site.serve() == 2
        yield made


def test_each_policy_says_how_many(here: Policies) -> None:
    # One Weigh is for one and a half Sort.
    here.come_to(Front=1, Scan=1, Label=2, Sort=2, Weigh=1)

    # Requests that wait.
    with here.waiting(6):
        here.come_to(Scan=2)
    here.come_to(Scan=1)

    # What replicas say of themselves, and those that keep a ratio with them.
    here.deployment("Sort")["user_config"] = {"belts": 100}
    assert here.site.serve() == 1
    here.come_to(Sort=3, Weigh=2)
    here.deployment("Sort")["user_config"] = {"belts": 1}
    assert here.site.serve() == 1
    here.come_to(Sort=2, Weigh=1, Label=2)
    assert here.site.serve() == 0


def test_the_number_from_outside_stays(here: Policies) -> None:
    here.come_to("presses", Press=1)
    done = here.clusterkit("app", "scale", "presses", "Press", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["changed"] == 1
    assert here.replicas("presses") == {"Press": 3}
    assert json.loads(here.clusterkit("app", "scale", "presses", "Press", "3", "--json").stdout)["changed"] == 0

    # A deploy finds nothing to do, and one that changes another app, or this one, leaves the number.
    assert here.site.serve() == 0
    here.deployment("Sort")["user_config"] = {"belts": 2}
    assert here.site.serve() == 1
    assert here.replicas("presses") == {"Press": 3}
    here.deployment("Press", "presses")["health_check_period_s"] = 5
    assert here.site.serve() == 1
    assert here.replicas("presses") == {"Press": 3}

    for words, why in (
        (("presses", "Press", "4"), "between 1 and 3"),
        (("presses", "Pres", "2"), "Press"),
        (("parcels", "Scan", "2"), "is not scaled from outside"),
    ):
        refused = here.clusterkit("app", "scale", *words)
        assert refused.returncode == 2
        assert why in " ".join(refused.stderr.split())
    assert here.ask_ray(
        "POST", "/api/v1/applications/parcels/deployments/Scan/scale", {"target_num_replicas": 2}
    ).is_error

    # The config as the inventory has it, sent as it is, sets it back.
    config = json.loads(here.clusterkit("render", "serve", "--json").stdout)
    assert here.ask_ray("PUT", body=config).status_code == 200
    here.come_to("presses", Press=1)


def test_the_same_times_in_another_zone(here: Policies) -> None:
    here.deployment("Label")["scaling_policy"]["schedule"]["time_zone"] = "UTC"
    assert here.site.serve("--check") == 1
    change = here.clusterkit("app", "diff", "--json")
    (changed,) = json.loads(change.stdout)["changes"]
    # It says beforehand that a policy costs the replicas.
    assert (changed["name"], changed["disrupts"]) == ("parcels", ["app"])
    assert here.site.serve() == 1
    here.come_to(Label=1)


def test_a_policy_of_the_sites_own(here: Policies) -> None:
    app = here.site.apps["parcels"]
    app["scaling"] = {"policy_function": "parcels.policy:Fixed", "policy_kwargs": {"numbers": {"Scan": 2, "Weigh": 2}}}
    for item in app["parameters"]["deployments"]:
        item.pop("scaling_policy", None)
    assert here.site.serve() == 1
    here.come_to(Scan=2, Weigh=2)
