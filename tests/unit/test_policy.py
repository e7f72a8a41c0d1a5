"""Policies and scaling from outside: parameters, findings, the entry of Serve's config, and what a policy decides."""

from __future__ import annotations

import datetime
import json
import re
import sys
import zoneinfo
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from clusterkit import app_code, operations
from clusterkit.errors import UsageError
from clusterkit.render.serve import serve_config
from clusterkit.spec.cluster import ClusterSpec
from clusterkit.spec.facts import AppFacts, AppScaling
from clusterkit.spec.load import load
from serve_apps.policy.parameters import QueueDepth, ScalingPolicy, Schedule, Times, zone_rule
from serve_apps.replicas import Replicas
from tests.support import load_script
from tests.unit.test_spec import findings_of, inventory, spec_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "serve_apps/policy/README.md").read_text(encoding="utf-8")
CODE = ROOT / "serve_apps/policy/code/clusterkit_policies.py"
policies = load_script(CODE)

QUEUE = {"queue_depth": {"target_queued_requests": 2}}
DAY = {"start": "08:00", "end": "18:30", "min_replicas": 3}


def schedule(*times: dict[str, Any], zone: str = "Europe/Berlin") -> dict[str, Any]:
    return {"schedule": {"time_zone": zone, "times": list(times) or [DAY]}}


# --------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "says nothing"),
        (schedule({**DAY, "start": 1080}), "in quotes"),
        (schedule({**DAY, "start": "8:00"}), "pattern"),
        (schedule({**DAY, "end": "24:30"}), "pattern"),
        (schedule({**DAY, "end": "08:00"}), "a whole day is '00:00' to '24:00'"),
        (schedule({**DAY, "days": ["monday"]}), "mon"),
        (schedule({**DAY, "days": []}), "at least 1 item"),
        (schedule({**DAY, "min_replicas": 0}), "greater than or equal to 1"),
        (schedule(zone="berlin"), "did you mean 'Europe/Berlin'?"),
        (schedule(zone="Mars/Olympus"), "no time zone"),
        ({"schedule": {"time_zone": "UTC", "times": []}}, "at least 1 item"),
        ({"queue_depth": {"target_queued_requests": 0}}, "greater than 0"),
        ({"replica_stats": {"gpu_use": -1}}, "greater than 0"),
        ({"gpu_use": 70}, "Extra inputs"),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        ScalingPolicy.model_validate(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_replicas": 2}, "num_replicas is a fixed number, and scaling_policy belongs to scaling"),
        ({"max_replicas": 2}, "times[0].min_replicas (3) is above max_replicas (2)"),
    ],
)
def test_what_is_refused_with_the_other_numbers(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        Replicas.model_validate({"scaling_policy": schedule(), **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "either ratio or policy_function"),
        ({"ratio": {"A": 1, "B": 2}, "policy_function": "a:b"}, "either ratio or policy_function"),
        ({"ratio": {"A": 1}}, "two deployments"),
        ({"ratio": {"A": 1, "B": 0}}, "greater than 0"),
        ({"ratio": {"A": 1, "B": 2}, "policy_kwargs": {"a": 1}}, "for a policy_function"),
        ({"policy_function": "a/b.py"}, "pattern"),
    ],
)
def test_what_is_refused_of_an_app(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        AppScaling.model_validate(given)


def test_the_readme_lists_exactly_the_parameters() -> None:
    listed = set(re.findall(r"^\| `([\w.]+)` \|", README, re.MULTILINE))
    wanted = {f"queue_depth.{name}" for name in QueueDepth.model_fields} | {"replica_stats"}
    wanted |= {f"schedule.{name}" for name in Schedule.model_fields} | set(Times.model_fields)
    assert ScalingPolicy.model_fields.keys() == {name.partition(".")[0] for name in wanted} - Times.model_fields.keys()
    assert listed == wanted | set(AppScaling.model_fields)


# --------------------------------------------------------------------------- the Serve config


def example() -> list[dict[str, Any]]:
    apps: list[dict[str, Any]] = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0])[
        "clusterkit_apps"
    ]
    return apps


def with_code(*apps: dict[str, Any], folder: Path) -> ClusterSpec:
    """The spec, as Ansible reads it: with the code of the apps."""
    for name, text in re.findall(r"`(parcels/\w+\.py)`.*?:\n\n```python\n(.*?)```", README, re.DOTALL):
        (folder / "parcels-app" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "parcels-app" / name).write_text(text)
    (folder / "inventory").mkdir(exist_ok=True)
    read = partial(app_code.read, inventories=[str(folder / "inventory")])
    spec, findings = load(inventory({"clusterkit_apps": list(apps)}), read)
    assert [str(finding) for finding in findings] == []
    assert spec is not None
    return spec


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    spec = with_code(*example(), folder=tmp_path)
    parcels, presses = serve_config(spec)["applications"]
    json.dumps([parcels, presses])
    policy = parcels["autoscaling_policy"]
    assert policy["policy_function"] == "clusterkit_policies:Policies"
    assert policy["policy_kwargs"]["deployments"].keys() == {"Scan", "Label", "Sort"}
    assert policy["policy_kwargs"]["ratio"] == {"Sort": 3, "Weigh": 2}
    # With a deployment, Serve would import it where no app's code is.
    assert not [item for item in parcels["deployments"] if "policy" in (item.get("autoscaling_config") or {})]
    # Its code goes to every host, as that of the apps does.
    zips = {f"file://{spec.code_path}/{code['digest']}.zip" for code in spec.published()["code"]["apps"]}
    assert {parcels["runtime_env"]["working_dir"], *parcels["runtime_env"]["py_modules"]} == zips
    assert len(zips) == 2
    assert "py_modules" not in presses["runtime_env"]

    assert presses["external_scaler_enabled"] is True
    (press,) = presses["deployments"]
    assert (press["num_replicas"], press["autoscaling_config"]) == (1, None)
    assert spec.published()["apps"][1]["external"] == {"Press": [1, 3]}


@pytest.mark.parametrize(
    ("template", "given", "deployment"),
    [
        ("llm", {"model_id": "m", "model_source": {"make": "tiny-llama"}}, "LLMServer:m"),
        ("embeddings", {"model_id": "m", "model_source": {"make": "tiny-llama"}}, "Embeddings"),
    ],
)
def test_every_template_that_scales_takes_it(
    template: str, given: dict[str, Any], deployment: str, tmp_path: Path
) -> None:
    app: dict[str, Any] = {"name": "a", "template": template, "parameters": {**given, "max_replicas": 3}}
    (plain,) = serve_config(with_code(app, folder=tmp_path))["applications"]
    assert "autoscaling_policy" not in plain
    app["parameters"]["scaling_policy"] = {**QUEUE, **schedule()}
    (entry,) = serve_config(with_code(app, folder=tmp_path))["applications"]
    said = entry["autoscaling_policy"]["policy_kwargs"]["deployments"]
    assert said.keys() == {deployment}
    assert said[deployment]["schedule"]["rule"] == "CET-1CEST,M3.5.0,M10.5.0/3"
    # Without the policy it is what it was.
    del entry["autoscaling_policy"], entry["runtime_env"]["py_modules"]
    assert entry == plain
    external = {**app, "parameters": {**given, "initial_replicas": 2, "max_replicas": 3}, "external_scaler": True}
    (entry,) = serve_config(with_code(external, folder=tmp_path))["applications"]
    assert {item["num_replicas"] for item in entry["deployments"]} == {2}


# --------------------------------------------------------------------------- findings


def shop(*deployments: dict[str, Any], **more: Any) -> dict[str, Any]:
    given = {"code": "../shop", "import_path": "shop:app", "deployments": list(deployments)}
    return {"clusterkit_apps": [{"name": "shop", "template": "custom", "parameters": given, **more}]}


A, B = {"name": "A", "max_replicas": 3}, {"name": "B", "max_replicas": 3}
RATIO = {"ratio": {"A": 1, "B": 2}}


@pytest.mark.parametrize(
    ("site", "subject", "words"),
    [
        (shop(A, scaling=RATIO), "scaling.ratio.B", "no deployment 'B'"),
        (shop(A, {"name": "B", "num_replicas": 2}, scaling=RATIO), "scaling.ratio.B", "does not scale"),
        (shop(A, {"name": "B"}, scaling=RATIO), "scaling.ratio.B", "does not scale"),
        (shop(A, B, scaling=RATIO, external_scaler=True), "scaling", "comes from outside"),
        (
            shop({**A, "scaling_policy": QUEUE}, external_scaler=True),
            "parameters.deployments[0].scaling_policy",
            "comes from outside",
        ),
        (
            shop({"name": "A", "num_replicas": 2}, external_scaler=True),
            "parameters.deployments[0].num_replicas",
            "comes from outside",
        ),
        (
            shop({**A, "scaling_policy": QUEUE}, scaling={"policy_function": "a:b"}),
            "parameters.deployments[0].scaling_policy",
            "the app's own policy_function decides",
        ),
    ],
)
def test_what_does_not_go_together(site: dict[str, Any], subject: str, words: str) -> None:
    found = findings_of(site)
    assert words in found[f"clusterkit_apps[0].{subject}"]


def test_a_policy_function_needs_code_of_the_site() -> None:
    parameters = {"model_id": "m", "model_source": {"make": "tiny-llama"}}
    app = {"name": "a", "template": "llm", "parameters": parameters, "scaling": {"policy_function": "a:b"}}
    assert "has none" in findings_of({"clusterkit_apps": [app]})["clusterkit_apps[0].scaling.policy_function"]


@pytest.mark.parametrize(
    ("site", "subject"),
    [
        (shop(A, B, scaling=RATIO), "scaling"),
        (shop(A, external_scaler=True), "external_scaler"),
        (shop({**A, "scaling_policy": QUEUE}), "parameters.deployments[0].scaling_policy"),
    ],
)
def test_an_older_ray_is_refused(site: dict[str, Any], subject: str) -> None:
    found = findings_of({**site, "clusterkit_stack": "rocm70"})
    assert "cannot do that; Ray 2.60.0 can" in found[f"clusterkit_apps[0].{subject}"]


def test_which_numbers_are_taken_from_outside() -> None:
    given = {**A, "min_replicas": 2}
    spec = spec_of(shop(given, {"name": "B"}, external_scaler=True, route_prefix="/shop"))
    cluster = json.loads(json.dumps(spec.published()))
    operations._check_scale(cluster, "shop", "A", 2)
    for name, deployment, replicas, words in (
        ("shp", "A", 2, "no app"),
        ("shop", "C", 2, "no deployment"),
        ("shop", "B", 2, "no bounds"),
        ("shop", "A", 1, "may not have 1 replicas"),
        ("shop", "A", 4, "may not have 4 replicas"),
    ):
        with pytest.raises(UsageError, match=words):
            operations._check_scale(cluster, name, deployment, replicas)
    with pytest.raises(UsageError, match="Serve decides itself"):
        operations._check_scale(json.loads(json.dumps(spec_of(shop(A)).published())), "shop", "A", 2)


def test_every_fact_of_an_app_is_described() -> None:
    assert all(field.description for field in AppFacts.model_fields.values())


# --------------------------------------------------------------------------- what a policy decides


def at(text: str, zone: str = "Europe/Berlin") -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zoneinfo.ZoneInfo(zone)).timestamp()


NIGHT = {"start": "22:00", "end": "06:00", "min_replicas": 2, "days": ["fri"]}
WEEK = {**DAY, "days": ["mon", "tue", "wed", "thu", "fri"]}


@pytest.mark.parametrize(
    ("when", "times", "wanted"),
    [
        # 2026-11-20 is a Friday.
        ("2026-11-20T07:59:59", [WEEK], 0),
        ("2026-11-20T08:00:00", [WEEK], 3),
        ("2026-11-20T18:29:59", [WEEK], 3),
        ("2026-11-20T18:30:00", [WEEK], 0),
        ("2026-11-21T12:00:00", [WEEK], 0),
        # In summer as well, by the clocks there.
        ("2026-07-20T08:00:00", [WEEK], 3),
        ("2026-11-20T21:59:00", [NIGHT], 0),
        ("2026-11-20T23:00:00", [NIGHT], 2),
        ("2026-11-21T05:59:00", [NIGHT], 2),
        ("2026-11-21T06:00:00", [NIGHT], 0),
        ("2026-11-20T05:00:00", [NIGHT], 0),
        ("2026-11-21T23:00:00", [NIGHT], 0),
        ("2026-11-20T23:59:00", [{**DAY, "start": "20:00", "end": "24:00"}], 3),
        ("2026-11-20T12:00:00", [WEEK, {**DAY, "start": "11:00", "min_replicas": 5}, {**DAY, "min_replicas": 1}], 5),
    ],
)
def test_a_schedule(when: str, times: list[dict[str, Any]], wanted: int) -> None:
    given = ScalingPolicy.model_validate(schedule(*times)).rendered()["policy_kwargs"]["schedule"]
    assert policies.planned(given, at(when)) == wanted


@pytest.mark.parametrize("name", ["Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "UTC"])
def test_a_head_without_time_zones_goes_by_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [at(f"2027-{month:02d}-{day:02d}T12:00:00", "UTC") for month in range(1, 13) for day in (1, 14, 28)]
    wanted = [datetime.datetime.fromtimestamp(moment, zoneinfo.ZoneInfo(name)).isoformat() for moment in moments]
    zoneinfo.ZoneInfo.clear_cache()
    # Nor may the package that carries them be there.
    monkeypatch.setitem(sys.modules, "tzdata", None)
    rule = zone_rule(name)
    zoneinfo.reset_tzpath(to=[])
    try:
        with pytest.raises(zoneinfo.ZoneInfoNotFoundError):
            policies.zone(name, "")
        found = policies.zone(name, rule)
        assert [datetime.datetime.fromtimestamp(moment, found).isoformat() for moment in moments] == wanted
    finally:
        zoneinfo.reset_tzpath()
        zoneinfo.ZoneInfo.clear_cache()


def context(name: str, running: int = 1, **said: Any) -> SimpleNamespace:
    """What Serve says of a deployment (ray 2.60.0, serve/config.py, AutoscalingContext)."""
    given = {"waiting": 0.0, "busy": 0.0, "low": 1, "high": 9, "target": running, "now": 0.0, "stats": {}, **said}
    return SimpleNamespace(
        deployment_name=name,
        current_num_replicas=running,
        target_num_replicas=given["target"],
        total_queued_requests=given["waiting"],
        total_running_requests=given["busy"],
        total_num_requests=given["waiting"] + given["busy"],
        aggregated_metrics=given["stats"],
        capacity_adjusted_min_replicas=given["low"],
        capacity_adjusted_max_replicas=given["high"],
        current_time=given["now"],
        policy_state={},
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 4),
    )


def decided(*contexts: SimpleNamespace, **given: Any) -> dict[str, float]:
    found, _ = policies.Policies(**given)({one.deployment_name: one for one in contexts})
    return dict(found)


def test_without_a_word_it_is_as_serve_does_it() -> None:
    assert decided(context("A", 2, busy=6, waiting=2), deployments={"B": QUEUE}) == {"A": 2}


def test_requests_that_wait_bring_more_replicas() -> None:
    given = {"deployments": {"A": QUEUE}}
    assert decided(context("A", 2, busy=8, waiting=6), **given) == {"A": 5}
    assert decided(context("A", 2, busy=4), **given) == {"A": 1}


def test_replicas_own_numbers() -> None:
    given = {"deployments": {"A": {"replica_stats": {"gpu_use": 70}}}}
    busy = {"gpu_use": {"r1": 90.0, "r2": 85.0}}
    assert decided(context("A", 2, stats=busy), **given)["A"] == pytest.approx(2.5)
    # A third that has said nothing yet counts as these do.
    assert decided(context("A", 3, stats=busy), **given)["A"] == pytest.approx(3.75)
    # Nobody has said anything: things stay.
    assert decided(context("A", 2, target=3), **given) == {"A": 3}


def test_the_most_counts() -> None:
    rendered = ScalingPolicy.model_validate({**QUEUE, **schedule()}).rendered()["policy_kwargs"]
    noon = at("2026-11-20T12:00:00")
    assert decided(context("A", 1, now=noon), deployments={"A": rendered}) == {"A": 3}
    assert decided(context("A", 1, waiting=20, now=noon), deployments={"A": rendered}) == {"A": 10}
    # Where none runs, the schedule starts them; without it a start is let go on.
    assert decided(context("A", 0, target=0, now=noon), deployments={"A": rendered}) == {"A": 3}
    assert decided(context("A", 0, target=2, now=0), deployments={"A": rendered}) == {"A": 2}


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        # A asks for one by each four requests.
        ({"busy": 12}, {}, {"A": 3, "B": 2}),
        ({"busy": 1}, {}, {"A": 2, "B": 1}),
        ({}, {"busy": 16}, {"A": 6, "B": 4}),
        ({"low": 3}, {}, {"A": 3, "B": 2}),
        ({"busy": 400, "high": 6}, {}, {"A": 6, "B": 4}),
        ({"low": 0}, {"low": 0}, {"A": 0, "B": 0}),
    ],
)
def test_a_ratio(a: dict[str, Any], b: dict[str, Any], wanted: dict[str, int]) -> None:
    found = decided(context("A", **a), context("B", **b), context("C", busy=8), ratio={"A": 3, "B": 2})
    assert found == {**wanted, "C": 2}


def test_nothing_it_stumbles_over_leaves_it(caplog: pytest.LogCaptureFixture) -> None:
    """Serve's controller would look after no app any more."""
    ill = context("A", 2, target=3)
    del ill.total_queued_requests
    rendered = ScalingPolicy.model_validate({**QUEUE, **schedule()}).rendered()["policy_kwargs"]
    broken = {**rendered["schedule"], "time_zone": "Mars/Olympus", "rule": ""}
    policy = policies.Policies(
        deployments={"A": QUEUE, "B": {"schedule": broken}, "C": {"replica_stats": {"gpu_use": 70}}}
    )
    nan = context("C", 2, stats={"gpu_use": {"r1": float("nan")}})
    for _ in range(3):
        found, _ = policy({"A": ill, "B": context("B", 1), "C": nan})
    assert found == {"A": 3, "B": 3, "C": 2}
    # Once, not ten times a second.
    assert len(caplog.records) == 3
    assert policies.Policies(deployments={"A": {}})({"A": None}) == ({}, {})


def test_its_module_needs_nothing_that_a_head_lacks() -> None:
    """Serve carries this one module to the controller."""
    imported = set(re.findall(r"^(?:import|from) (\w+)", CODE.read_text(encoding="utf-8"), re.MULTILINE))
    assert imported <= sys.stdlib_module_names
