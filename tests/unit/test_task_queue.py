"""The queue of `async_tasks` on a real Redis: nothing is lost, nothing runs for ever, and who was silent for too long
changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_apps.async_tasks import redis as client
from serve_apps.async_tasks.redis import Address, Denied, Redis, Unreachable
from serve_apps.async_tasks.tasks import MOST_LOST, Conflict, Full, Rules, Tasks, Ticket
from tests.redis_server import RedisServer, redis_server
from tests.support import ROOT, certificate

# Short, and long enough for a busy machine.
RULES = Rules(max_retries=1, retry_backoff_s=0.05, lease_s=0.3, result_ttl_s=60, dead_letter_ttl_s=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


def with_queue(
    server: RedisServer, test: Callable[[Tasks], Awaitable[None]], rules: Rules = RULES, queue: str = "q"
) -> None:
    server.cli("FLUSHALL")

    async def whole() -> None:
        tasks = Tasks(Address(f"redis://127.0.0.1:{server.port}/3"), queue, rules)
        try:
            await test(tasks)
        finally:
            await tasks.redis.close()

    asyncio.run(whole())


async def state(tasks: Tasks, task_id: str) -> str:
    found = await tasks.get(task_id)
    return "" if found is None else str(found["state"])


async def one(tasks: Tasks, reap: bool = False) -> Ticket:
    held: list[Ticket] = await until(lambda: tasks.take(1, reap))
    return held[0]


async def until(ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """As soon as it is something."""
    limit = time.monotonic() + 20
    while not (found := await ask()):
        assert time.monotonic() < limit
        await asyncio.sleep(0.01)
    return found


def test_from_submitted_to_its_result(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        before = time.time()
        first, new = await tasks.submit({"n": 1, "text": "猫"})
        second, _ = await tasks.submit(2)
        assert new
        assert await tasks.get(first) == {
            "id": first,
            "state": "queued",
            "attempts": 0,
            "created_at": pytest.approx(before, abs=5),
        }
        held = await one(tasks)
        assert held.id == first  # the oldest first
        assert await tasks.start(held) == ({"n": 1, "text": "猫"}, 1)
        assert await tasks.count() == {"queued": 1, "running": 1, "retrying": 0, "failed": 0}
        assert await tasks.succeed(held, '{"sum": 2}')
        found = await tasks.get(first)
        assert found is not None
        assert (found["state"], found["result"], found["attempts"]) == ("succeeded", {"sum": 2}, 1)
        assert found["started_at"] <= found["finished_at"]
        assert (await one(tasks)).id == second
        assert await tasks.take(5, True) == []
        assert await tasks.get("nobody") is None

    with_queue(server, test)


def test_queues_are_apart(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        other = Tasks(tasks.redis.address, "other", RULES)
        await tasks.submit(1)
        assert await other.take(1, True) == []
        await other.redis.close()

    with_queue(server, test)


def test_retries_wait_longer_each_time_and_then_it_is_a_dead_letter(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        task_id, _ = await tasks.submit("payload")
        waits = []
        for attempt in (1, 2, 3):
            held = await one(tasks)
            assert await tasks.start(held) == ("payload", attempt)
            assert await tasks.fail(held, f"fault {attempt}", again=True)
            found = await tasks.get(task_id)
            assert found is not None
            assert found["error"] == f"fault {attempt}"
            if attempt < 3:
                assert found["state"] == "retrying"
                assert await tasks.count() == {"queued": 0, "running": 0, "retrying": 1, "failed": 0}
                waits.append(found["next_attempt_at"] - found["started_at"])
        assert waits[1] > waits[0] + 0.04
        assert await state(tasks, task_id) == "failed"
        total, letters = await tasks.dead(0, 10)
        assert (total, letters[0]["payload"], letters[0]["id"]) == (1, "payload", task_id)

        # By hand it begins anew, once.
        assert await tasks.again(task_id) == "failed"
        assert await tasks.again(task_id) == "queued"
        assert await tasks.dead(0, 10) == (0, [])
        held = await one(tasks)
        assert await tasks.start(held) == ("payload", 4)
        assert await tasks.succeed(held, "1")
        assert await tasks.again(task_id) == "succeeded"
        assert await tasks.again("nobody") == ""

    with_queue(server, test, Rules(max_retries=2, retry_backoff_s=0.05, lease_s=5))


def test_the_longest_pause_is_a_limit(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        task_id, _ = await tasks.submit(1)
        held = await one(tasks)
        await tasks.start(held)
        await tasks.fail(held, "x", again=True)
        found = await tasks.get(task_id)
        assert found is not None
        assert found["next_attempt_at"] - found["started_at"] < 5

    with_queue(server, test, Rules(retry_backoff_s=1000, retry_backoff_max_s=2))


def test_what_no_attempt_can_mend_is_not_tried_again(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        task_id, _ = await tasks.submit(1)
        held = await one(tasks)
        await tasks.start(held)
        await tasks.fail(held, "no such file", again=False)
        assert await state(tasks, task_id) == "failed"

    with_queue(server, test)


def test_who_is_silent_loses_the_task_and_can_say_nothing_more(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        task_id, _ = await tasks.submit(1)
        gone = await one(tasks)
        await tasks.start(gone)
        held = await one(tasks, reap=True)
        assert held.id == task_id
        assert await tasks.start(gone) is None
        assert not await tasks.succeed(gone, "1")
        assert not await tasks.fail(gone, "late", again=False)
        assert not await tasks.lost(gone, "late")
        assert await tasks.hold([gone]) == set()
        await tasks.give_back([gone])
        assert await tasks.start(held) == (1, 2)
        assert await tasks.succeed(held, '"now"')
        found = await tasks.get(task_id)
        assert found is not None
        assert (found["result"], found["attempts"]) == ("now", 2)

    with_queue(server, test)


def test_who_says_that_he_is_at_work_keeps_it(server: RedisServer) -> None:
    """And without that, or without anybody who looks, it is as above."""

    async def test(tasks: Tasks) -> None:
        await tasks.submit(1)
        held = await one(tasks)
        await tasks.start(held)
        for _ in range(8):
            await asyncio.sleep(RULES.lease_s / 4)
            assert await tasks.hold([held]) == {held.id}
            assert await tasks.take(1, True) == []
        await asyncio.sleep(RULES.lease_s * 1.5)
        assert await tasks.take(1, False) == []
        assert len(await tasks.take(1, True)) == 1

    with_queue(server, test)


def test_what_takes_its_replica_along_is_given_up(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        task_id, _ = await tasks.submit(1)
        for attempt in range(1, MOST_LOST + 2):
            assert await state(tasks, task_id) == "queued"
            held = await one(tasks)
            assert await tasks.start(held) == (1, attempt)
            assert await tasks.lost(held, "the replica was lost")
        found = await tasks.get(task_id)
        assert found is not None
        assert (found["state"], found["error"]) == ("failed", "the replica was lost")

    with_queue(server, test, Rules(lease_s=30))


def test_what_nobody_has_begun_is_no_attempt(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        task_id, _ = await tasks.submit(1)
        for _ in range(MOST_LOST + 2):
            await tasks.give_back([await one(tasks)])
        held = await one(tasks)
        assert await tasks.start(held) == (1, 1)
        # It is under way: it stays where it is.
        await tasks.give_back([held])
        assert await tasks.take(1, False) == []
        assert await state(tasks, task_id) == "running"

    with_queue(server, test, Rules(lease_s=30))


def test_the_same_key_is_the_same_task(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        first = await tasks.submit({"a": 1, "b": 2}, "order 7")
        assert await tasks.submit({"b": 2, "a": 1}, "order 7") == (first[0], False)
        with pytest.raises(Conflict):
            await tasks.submit({"a": 2}, "order 7")
        # Also after its end, when its payload is gone.
        held = await one(tasks)
        await tasks.start(held)
        await tasks.succeed(held, "1")
        assert await tasks.submit({"a": 1, "b": 2}, "order 7") == (first[0], False)
        assert await tasks.take(1, True) == []
        assert (await tasks.submit({"a": 1, "b": 2}))[1]
        # What is asked again after a fault, is there once.
        assert await tasks.submit(1, task_id="f00") == await tasks.submit(1, task_id="f00") == ("f00", True)
        assert len(await tasks.take(9, True)) == 2

    with_queue(server, test)


def test_only_so_many_wait(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        for number in range(3):
            await tasks.submit(number)
        with pytest.raises(Full):
            await tasks.submit(3)
        await one(tasks)
        await tasks.submit(3)

    with_queue(server, test, Rules(max_queued_tasks=3))


def test_nothing_stays_for_ever(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        for again in (True, False):
            await tasks.submit(1, f"key {again}")
            held = await one(tasks)
            await tasks.start(held)
            await (tasks.succeed(held, "1") if again else tasks.fail(held, "x", again=False))

        async def gone() -> bool:
            await tasks.take(0, True)
            return server.cli("-n", "3", "DBSIZE") == "0"

        await until(gone)

    with_queue(server, test, Rules(result_ttl_s=0.2, dead_letter_ttl_s=0.2))


def test_many_at_a_time_have_each_task_once(server: RedisServer) -> None:
    async def test(tasks: Tasks) -> None:
        others = [Tasks(tasks.redis.address, "q", RULES) for _ in range(4)]
        ids = {(await tasks.submit(number))[0] for number in range(200)}

        async def work(own: Tasks) -> list[str]:
            done = []
            while found := await own.take(7, False):
                for held in found:
                    await own.start(held)
                    await own.succeed(held, "1")
                    done.append(held.id)
            await own.redis.close()
            return done

        lists = await asyncio.gather(*map(work, others))
        assert sorted(task_id for done in lists for task_id in done) == sorted(ids)

    with_queue(server, test, Rules(lease_s=30))


# --------------------------------------------------------------------------- the connection


def asked(address: Address, *words: str) -> Any:
    async def ask() -> Any:
        redis = Redis(address)
        try:
            return await redis.run(*words)
        finally:
            await redis.close()

    return asyncio.run(ask())


def test_a_password_out_of_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A password of which a URL or a shell would make something else.
    password = "p@ss/w:rd' \"#$"
    (tmp_path / "secret").write_text(f"{password}\n")
    monkeypatch.setenv("TASKS_PASSWORD", password)
    known = hashlib.sha256(password.encode()).hexdigest()
    users = f"user default on >{'x' * 9} ~* +@all\nuser tasks on #{known} ~* +@all\n"
    (tmp_path / "users.acl").write_text(users)
    with redis_server(tmp_path, "--aclfile", str(tmp_path / "users.acl")) as server:
        url = f"redis://tasks@127.0.0.1:{server.port}"
        assert asked(Address(url, password_file=str(tmp_path / "secret")), "ACL", "WHOAMI") == b"tasks"
        assert asked(Address(url, password_env="TASKS_PASSWORD"), "ACL", "WHOAMI") == b"tasks"
        own = Address(f"redis://127.0.0.1:{server.port}", password_file=str(tmp_path / "other"))
        (tmp_path / "other").write_text("x" * 9)
        assert asked(own, "ACL", "WHOAMI") == b"default"
        (tmp_path / "other").write_text("wrong-one")
        with pytest.raises(Denied, match="WRONGPASS") as caught:
            asked(own, "PING")
        assert "wrong-one" not in str(caught.value)
        with pytest.raises(Denied, match="NOAUTH"):
            asked(Address(f"redis://127.0.0.1:{server.port}"), "PING")
        with pytest.raises(Denied, match="no OTHER_PASSWORD: put it into clusterkit_environment"):
            asked(Address(url, password_env="OTHER_PASSWORD"), "PING")
        with pytest.raises(Unreachable, match="No such file"):
            asked(Address(url, password_file=str(tmp_path / "none")), "PING")


def test_the_user_of_the_readme_can_do_all_of_it_and_nothing_else(tmp_path: Path) -> None:
    text = (ROOT / "serve_apps/async_tasks/README.md").read_text(encoding="utf-8")
    (user,) = re.findall(r"^user tasks .*", text, re.MULTILINE)
    (tmp_path / "users.acl").write_text(f"{user}\nuser default on nopass ~* +@all\n")
    (tmp_path / "secret").write_text("PASSWORD")
    with redis_server(tmp_path, "--aclfile", str(tmp_path / "users.acl")) as server:
        address = Address(f"redis://tasks@127.0.0.1:{server.port}/3", password_file=str(tmp_path / "secret"))

        async def whole() -> None:
            tasks = Tasks(address, "reports", Rules(max_retries=0))
            task_id, _ = await tasks.submit(1, "key")
            for word in ("back", "lost", "fail", "succeed"):
                held = await one(tasks, reap=True)
                if word != "back":
                    await tasks.start(held)
                await tasks.hold([held])
                if word == "back":
                    await tasks.give_back([held])
                elif word == "lost":
                    await tasks.lost(held, "x")
                elif word == "fail":
                    await tasks.fail(held, "x", again=True)
                    assert (await tasks.dead(0, 1))[0] == 1
                    await tasks.again(task_id)
                else:
                    await tasks.succeed(held, "1")
            assert (await tasks.get(task_id) or {})["state"] == "succeeded"
            assert (await tasks.count())["queued"] == 0
            with pytest.raises(Denied, match="NOPERM"):
                await tasks.redis.run("FLUSHALL")
            with pytest.raises(Denied, match=r"ACL failure|NOPERM|can't run"):
                await Tasks(address, "other", RULES).submit(1)
            await tasks.redis.close()

        asyncio.run(whole())


def test_tls_and_who_the_server_is(tmp_path: Path) -> None:
    own, key = certificate(tmp_path / "own", "redis")
    other, _ = certificate(tmp_path / "other", "redis")
    options = ["--tls-cert-file", str(own), "--tls-key-file", str(key), "--tls-ca-cert-file", str(own)]
    with redis_server(tmp_path, *options, "--tls-auth-clients", "no", tls=True) as server:
        url = f"rediss://127.0.0.1:{server.port}"
        assert asked(Address(url, ca_file=str(own)), "PING") == b"PONG"
        for authority in ("", str(other)):
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                asked(Address(url, ca_file=authority), "PING")
        with pytest.raises(Unreachable):
            asked(Address(url.replace("rediss", "redis")), "PING")


def test_a_server_that_went_and_came_back(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:

        async def test() -> None:
            redis = Redis(Address(f"redis://127.0.0.1:{server.port}"))
            assert await redis.run("PING") == b"PONG"
            server.stop()
            for _ in range(2):
                with pytest.raises(Unreachable, match=f"Redis at 127.0.0.1:{server.port}"):
                    await redis.run("PING")
            server.start()
            assert await redis.run("PING") == b"PONG"
            await redis.close()

        asyncio.run(test())


def test_an_answer_that_was_given_up_is_not_taken_for_the_next(server: RedisServer, monkeypatch: Any) -> None:
    async def test() -> None:
        redis = Redis(Address(f"redis://127.0.0.1:{server.port}"))
        await redis.run("SET", "a", "first")
        waiting = asyncio.ensure_future(redis.run("BLPOP", "nothing", 0))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert await redis.run("GET", "a") == b"first"
        monkeypatch.setattr(client, "TIMEOUT_S", 0.1)
        with pytest.raises(Unreachable, match="no answer"):
            await redis.run("BLPOP", "nothing", 0)
        assert await redis.run("GET", "a") == b"first"
        # A list with a list, nothing and a number in it.
        assert await redis.run("EVAL", "return {1, {'a', false}, {}}", 0) == [1, [b"a", None], []]
        with pytest.raises(Denied, match="unknown command"):
            await redis.run("NONSENSE")
        await redis.close()

    asyncio.run(test())
