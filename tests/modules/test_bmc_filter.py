"""The filters that hand BMCs' users and passwords to the role fleet; the daemon's own model reads what they make."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clusterkit.fleet.config import PowerConfig
from tests.support import ROOT, load_script

Json = dict[str, Any]

bmc = load_script(ROOT / "plugins/filter/bmc.py")

FOLDER = "/etc/clusterkit/fleet/bmc"
HOSTS: Json = {
    "w1": {"pool": "p", "power": {"kind": "ipmi", "address": "192.0.2.1", "system": None}},
    "w2": {"pool": "p", "power": {"kind": "redfish", "address": "https://192.0.2.2", "system": None}},
    "w3": {"pool": "p", "power": {"kind": "wol", "mac": "00:00:5e:00:53:01"}},
    "w4": {"pool": "p", "power": {"kind": "none"}},
}
DEFAULT = {"user": "all", "password": "s3cret"}


def test_each_bmc_gets_its_own_or_the_default() -> None:
    own = {"user": "ADMIN", "password": 'quo"ted'}
    first, second = bmc.bmc_files(HOSTS, {"default": DEFAULT, "w2": own}, FOLDER)
    assert (first["path"], json.loads(first["secret_content"])) == (f"{FOLDER}/w1.json", DEFAULT)
    assert (second["path"], json.loads(second["secret_content"])) == (f"{FOLDER}/w2.json", own)
    assert {item["mode"] for item in (first, second)} == {"0600"}


def test_the_daemon_takes_the_paths() -> None:
    found = bmc.bmc_paths(HOSTS, FOLDER, "/etc/ca.pem")
    assert {name: host["pool"] for name, host in found.items()} == dict.fromkeys(HOSTS, "p")
    power = {name: PowerConfig.model_validate(host["power"]) for name, host in found.items()}
    assert (power["w1"].credentials, power["w1"].ca) == (f"{FOLDER}/w1.json", None)
    assert (power["w2"].credentials, power["w2"].ca) == (f"{FOLDER}/w2.json", "/etc/ca.pem")
    assert power["w3"].credentials is None
    assert PowerConfig.model_validate(bmc.bmc_paths(HOSTS, FOLDER, "")["w2"]["power"]).ca is None


@pytest.mark.parametrize(
    ("credentials", "lacking"),
    [
        ({}, ["w1", "w2"]),
        ({"default": DEFAULT}, []),
        ({"w1": DEFAULT}, ["w2"]),
        ({"w1": DEFAULT, "w3": DEFAULT}, ["w2"]),
        # An own entry that is not whole is a mistake, not a wish for the default.
        ({"default": DEFAULT, "w1": {"user": "x"}}, ["w1"]),
        ({"default": DEFAULT, "w1": {"user": "x", "password": ""}}, ["w1"]),
        ({"default": DEFAULT, "w2": "s3cret"}, ["w2"]),
    ],
)
def test_who_has_none_is_named(credentials: Json, lacking: list[str]) -> None:
    assert bmc.bmc_lacking(HOSTS, credentials) == lacking
