"""The `llm_router` app on a real Ray: which of two engines answers what, and what becomes of it when one dies.

Needs an engine environment; CLUSTERKIT_TEST_ENGINE names one, else it is made.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.app_site import app_site
from tests.e2e.llm_site import MAKER, WAIT_S, LlmApp, python
from tests.support import ROOT, until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

README = ROOT / "serve_apps/llm_router/README.md"
ENGINE, INGRESS = "Server_", "OpenAiIngress"

# The routers with replicas that say what the test wants them to say: for each case, what happened.
ROUTERS = """
import asyncio, collections, json, sys, types
import ray
from ray import serve
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import RequestRouterConfig
from ray.serve.llm.request_router import PrefixCacheAffinityRouter
from serve_apps.llm_router.app import PrefixRouter, StatisticsRouter

ray.init(include_dashboard=False, num_cpus=2, object_store_memory=10**8, _temp_dir=sys.argv[1])
serve.start(proxy_location="Disabled")

@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=8)
class Replica:
    def __init__(self):
        self.id, self.said = serve.get_replica_context().replica_id.unique_id, {}
    async def __call__(self, asked, hold_s=0):
        await asyncio.sleep(hold_s)
        return self.id
    async def say(self, busy):
        self.said = {"kv_cache_usage": 1.0 if self.id == busy else 0.0, "waiting": 0}
    async def record_routing_stats(self):
        return self.said

def start(name, router, **kwargs):
    config = RequestRouterConfig(
        request_router_class=router, request_router_kwargs=kwargs, request_routing_stats_period_s=0.2
    )
    return serve.run(Replica.options(request_router_config=config).bind(), name=name, route_prefix=None)

def ask(handle, hold_s=0, **fields):
    try:
        return handle.remote(types.SimpleNamespace(**fields), hold_s).result(timeout_s=5)
    except Exception as error:
        return type(error).__name__

found = {}
for name, router in (("ray", PrefixCacheAffinityRouter), ("kit", PrefixRouter)):
    handle = start(name, router, imbalanced_threshold=4)
    first = ask(handle, prompt="a text to begin with")
    odd = {"tokens": {"prompt": [1, 2, 3]}, "empty": {"prompt": ""}, "no text": {"input": "embed this"}}
    answers = {kind: ask(handle, **fields) for kind, fields in odd.items()}
    # What another ingress would have told the tree of a replica that this one does not know yet.
    tree = ray.get_actor("LlmPrefixTreeActor", namespace="serve::%s::Replica" % name)
    unknown = ReplicaID("unknown", deployment_id=DeploymentID("Replica", name)).to_full_id_str()
    ray.get(tree.add_tenants.remote([unknown], 0))
    answers["unknown replica"] = ask(handle, prompt="zzz nothing like it was asked before")
    again = ask(handle, prompt="a text to begin with, and something after it")
    found[name] = {"answers": answers, "same": first == again}
    serve.delete(name)

# A hot beginning: with Ray's own threshold it has one replica for itself, with the kit's the load decides.
for name, kwargs in (("no limit", {}), ("limit", {"imbalanced_threshold": 2})):
    handle = start(name.replace(" ", "-"), PrefixRouter, **kwargs)
    ask(handle, prompt="the same beginning")
    asked = types.SimpleNamespace(prompt="the same beginning")
    answers = [handle.remote(asked, 1.0) for _ in range(8)]
    found[name] = len({answer.result(timeout_s=30) for answer in answers})
    serve.delete(name.replace(" ", "-"))

handle = start("statistics", StatisticsRouter, max_kv_cache_usage=0.9, max_waiting=0)
def spread(number, hold_s=0.0):
    answers = [handle.remote(types.SimpleNamespace(), hold_s) for _ in range(number)]
    return collections.Counter(answer.result(timeout_s=60) for answer in answers)
everywhere = spread(40)
busy, idle = sorted(everywhere)
def say(who):
    # Through a handle of its own, so that both replicas hear it.
    from ray.llm._internal.serve.utils.broadcast import broadcast
    broadcast(handle, "say", args=[who])
    return who
def until(rule):
    for _ in range(100):
        if rule(spread(20)):
            return True
    return False
say(busy)
found["statistics"] = {
    "all": len(everywhere),
    "passes over the full one": until(lambda answered: set(answered) == {idle}),
    # More than the other can take at a time: better a full engine than none.
    "but not for ever": len(spread(16, 0.5)),
}
say("nobody")
found["statistics"]["comes back"] = until(lambda answered: len(answered) == 2)
# Ray itself writes to stdout.
open(sys.argv[2], "w").write(json.dumps(found))
serve.shutdown()
"""


# --------------------------------------------------------------------------- with engines


class Chat(LlmApp):
    """Two engines, and an ingress for each."""

    def serve(self, routing: dict[str, Any], **parameters: Any) -> int:
        self.parameters |= {"routing": routing, "tensor_parallel": 1, **parameters}
        changed = self.site.serve()
        self.whole()
        return changed

    def whole(self) -> None:
        """Both are there, and nothing else."""

        def numbers() -> list[int]:
            return [len(self.processes(name)) for name in (ENGINE, INGRESS)]

        until(lambda: numbers() == [2, 2], lambda: f"engines and ingress replicas: {numbers()}", WAIT_S)


@pytest.fixture(scope="module")
def chat(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    python(engine, str(MAKER), "--out", str(folder))
    with app_site(tmp_path_factory.mktemp("site"), engine) as site:
        yield Chat(site, README, str(folder))


# Longer than a block of the KV cache, and different from the first word on.
BEGINNINGS = [f"{word} is how this text begins, and so does everything that is asked of it. " for word in "abcdefgh"]


def test_the_same_beginning_finds_the_same_engine(chat: Chat) -> None:
    chat.serve({"policy": "prefix"})
    homes = [chat.ask(text) for text in BEGINNINGS]
    assert len(set(homes)) == 2
    for ending in ("What is it?", "And then?"):
        assert [chat.ask(text + ending) for text in BEGINNINGS] == homes
    # What has no text to go by is answered all the same, or refused by the engine.
    assert chat.ask([1, 2, 3])
    chat.ask("", status=400)


def test_another_policy_is_given_to_the_ingress_that_runs(chat: Chat) -> None:
    before = chat.processes(ENGINE) | chat.processes(INGRESS)
    homes = [chat.ask(text) for text in BEGINNINGS]
    assert chat.serve({"policy": "session"}) == 1
    assert chat.processes(ENGINE) | chat.processes(INGRESS) == before
    assert chat.site.serve() == 0
    # It knows no beginnings: the same text goes here and there, and Ray's own header holds a session.
    assert len({chat.ask(BEGINNINGS[0]) for _ in range(12)}) == 2
    assert len({chat.ask(text, {"x-session-id": "one"}) for text in BEGINNINGS}) == 1
    # And back: what the engines have seen is still known.
    assert chat.serve({"policy": "prefix", "imbalanced_threshold": 3}) == 1
    assert chat.processes(ENGINE) | chat.processes(INGRESS) == before
    assert [chat.ask(text) for text in BEGINNINGS] == homes


def test_a_session_stays_and_moves_on_when_its_engine_dies(chat: Chat) -> None:
    engines = chat.processes(ENGINE)
    chat.serve({"policy": "session", "header": "x-user"})
    # Another header is another ingress, and the same engines.
    assert chat.processes(ENGINE) == engines
    users = [{"x-user": f"user-{number}"} for number in range(12)]

    def everyone(text: str) -> list[str]:
        with ThreadPoolExecutor(4) as many:
            return list(many.map(lambda user: chat.ask(text, user), users))

    homes = everyone("one")
    assert len(set(homes)) == 2
    # Whatever they ask, and however Ray's own header is set.
    assert everyone(BEGINNINGS[0]) == homes
    assert [chat.ask("two", {**user, "x-session-id": "other"}) for user in users] == homes
    # Without the header it is as with any app: the same text goes here and there.
    assert len({chat.ask(BEGINNINGS[0]) for _ in range(12)}) == 2

    gone = homes[0]
    os.kill(chat.processes(ENGINE)[gone], signal.SIGKILL)
    after = everyone("three")
    assert gone not in after
    moved = {before: now for before, now in zip(homes, after, strict=True) if before != now}
    # Those of the engine that died; one that has come since may have some of the others'.
    assert gone in moved
    chat.whole()


def test_engines_say_how_full_they_are(chat: Chat) -> None:
    """A cache that one long answer fills, so that all that is short goes to the other engine."""
    small = {"max_model_len": 1024, "num_gpu_blocks_override": 10, "block_size": 128}
    routing = {"policy": "statistics", "max_kv_cache_usage": 0.3, "request_routing_stats_period_s": 0.2}
    chat.serve(routing, engine_kwargs=small)
    assert len({chat.ask("short") for _ in range(12)}) == 2

    def long() -> str:
        return chat.ask("long", max_tokens=1000, ignore_eos=True)

    def short(_: int) -> str:
        return chat.ask("short", max_tokens=30, ignore_eos=True)

    with ThreadPoolExecutor(5) as many:
        full = many.submit(long)
        # Several at a time: the other one is the busier one by number, and has them all the same.
        rounds = []
        while not full.done():
            rounds.append(set(many.map(short, range(4))))
    assert {frozenset(answered) for answered in rounds} >= {frozenset(chat.processes(ENGINE)) - {full.result()}}


# --------------------------------------------------------------------------- the routers


def test_the_routers(engine: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ckr-", dir="/tmp") as temp:
        python(engine, "-c", ROUTERS, temp, str(tmp_path / "found"), PYTHONPATH=str(ROOT))
    found = json.loads((tmp_path / "found").read_text())
    # What Ray's own leaves without an answer the kit's passes on, and a beginning that is known finds its replica.
    assert set(found["ray"]["answers"].values()) == {"TimeoutError"}
    assert "TimeoutError" not in found["kit"]["answers"].values()
    assert len(set(found["kit"]["answers"].values())) <= 2
    assert found["kit"]["same"]
    assert (found["no limit"], found["limit"]) == (1, 2)
    assert found["statistics"] == {
        "all": 2,
        "passes over the full one": True,
        "but not for ever": 2,
        "comes back": True,
    }
