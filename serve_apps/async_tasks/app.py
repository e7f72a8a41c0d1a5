"""Runs in replicas: takes tasks over HTTP, and hands them to workers.

The API takes tasks out of Redis and asks workers by Serve's own handle. What waits for a worker is a queue that Serve
knows of: it scales on it, wakes workers that are at zero, and stops none that has a task. Workers write results
themselves, so that an API replica may go at any time.

No `from __future__ import annotations` here: Serve and FastAPI look at the types themselves.
"""

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from ray import serve
from ray.util.metrics import Gauge

from serve_apps.async_tasks.redis import Address, Denied, Unreachable
from serve_apps.async_tasks.tasks import Conflict, Full, Rules, Tasks, Ticket, new_id
from serve_apps.async_tasks.work import Failed, Work
from serve_apps.openai_api import Refused, new_api

log = logging.getLogger("ray.serve")
T = TypeVar("T")
NO_REDIS = (Unreachable, Denied, OSError)

# How often a replica looks for tasks that others took in, or that are due again.
LOOK_S = 0.5
COUNT_S = 15
# Redis may be starting at the same time as the replica.
FIRST_ANSWER_S = 20
MOST_DEAD_LETTERS = 100


class Settings(BaseModel):
    """`args` of the app."""

    queue: str
    redis: Address
    import_path: str = ""
    args: dict[str, Any] = {}
    forward_to: str = ""


api = new_api()


async def _no_redis(_: Request, error: Exception) -> JSONResponse:
    # Where it is, is no business of the client's.
    log.warning("%s", error)
    shaped = Refused("the queue of tasks cannot be reached; try again later", status=503)
    return JSONResponse(shaped.body, status_code=shaped.status)


async def _no_numbers(_: Request, error: Exception) -> JSONResponse:
    shaped = Refused("first and limit have to be numbers")
    return JSONResponse(shaped.body, status_code=shaped.status)


api.add_exception_handler(RequestValidationError, _no_numbers)
for _kind in NO_REDIS:
    api.add_exception_handler(_kind, _no_redis)


# Serve copies what the API below uses at the moment of its definition: it has to stand above.
def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


async def first_answer(tasks: Tasks) -> None:
    """Denied, Unreachable: with a wrong address the app shall not come up."""
    until = time.monotonic() + FIRST_ANSWER_S
    while True:
        try:
            await tasks.redis.run("PING")
            return
        except Unreachable:
            if time.monotonic() > until:
                raise
        await asyncio.sleep(1)


@serve.deployment
class Worker:
    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self.tasks = Tasks(settings.redis, settings.queue)
        self.config: dict[str, Any] = {}
        await first_answer(self.tasks)
        self.work = Work(settings.import_path, settings.args, settings.forward_to)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """`user_config`; running replicas take it."""
        self.config = config
        self.tasks.obey(Rules(**config["rules"]))

    def check_health(self) -> None:
        if self.work.overrun:
            raise RuntimeError(f"task {self.work.overrun} was not done in time and cannot be ended")

    async def do(self, task_id: str, ticket: str) -> None:
        held = Ticket(task_id, ticket)
        begun = await self._sure(lambda: self.tasks.start(held))
        if begun is None:
            return
        payload, attempt = begun
        beat = asyncio.ensure_future(self._beat(held))
        try:
            task = {"id": task_id, "attempt": attempt}
            result = await self.work.do(payload, task, self.config["task_timeout_s"], self.config["max_payload_bytes"])
        except Failed as error:
            why, again = str(error), error.retry
            log.warning("task %s, attempt %d: %s", task_id, attempt, why, exc_info=error.__cause__)
            await self._sure(lambda: self.tasks.fail(held, why, again, random.uniform(0.8, 1.2)))
        else:
            await self._sure(lambda: self.tasks.succeed(held, result))
        finally:
            beat.cancel()

    async def _sure(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Without Redis there is nothing else to do than to wait for it: a result is not to be lost."""
        while True:
            try:
                return await ask()
            except NO_REDIS as error:
                log.warning("%s", error)
            await asyncio.sleep(1)

    async def _beat(self, held: Ticket) -> None:
        """Also where the replica that sent the task is gone."""
        while True:
            await asyncio.sleep(self.config["rules"]["lease_s"] / 3)
            await self._sure(lambda: self.tasks.hold([held]))


@serve.deployment
@serve.ingress(api)
class Api:
    async def __init__(self, settings: Settings, workers: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        self.tasks, self.workers = Tasks(settings.redis, settings.queue), workers
        self.config: dict[str, Any] = {}
        self.sent: dict[str, Ticket] = {}
        self.asked: set[asyncio.Task[None]] = set()
        self.loops: list[asyncio.Task[None]] = []
        self.nudge, self.reap_from = asyncio.Event(), 0.0
        self.gauge = Gauge("clusterkit_tasks", "tasks in a queue, by state", tag_keys=("queue", "state"))
        self.gauge.set_default_tags({"queue": settings.queue})
        await first_answer(self.tasks)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """`user_config`; running replicas take it."""
        self.config = config
        self.tasks.obey(Rules(**config["rules"]))
        if not self.loops:
            self.loops = [asyncio.ensure_future(self._again(*item)) for item in self._duties()]

    def check_health(self) -> None:
        if any(loop.done() for loop in self.loops):
            raise RuntimeError("this replica hands out no tasks any more")

    async def __del__(self) -> None:
        """What no worker has begun need not wait until it is missed."""
        for loop in self.loops:
            loop.cancel()
        if self.sent:
            await self.tasks.give_back(list(self.sent.values()))

    # ------------------------------------------------------------------ to the workers

    def _duties(self) -> list[tuple[Callable[[], Awaitable[None]], Callable[[], float]]]:
        return [
            (self._hand_out, lambda: LOOK_S),
            (self._hold, lambda: self.config["rules"]["lease_s"] / 3),
            (self._count, lambda: COUNT_S),
        ]

    async def _again(self, duty: Callable[[], Awaitable[None]], pause: Callable[[], float]) -> None:
        while True:
            try:
                await duty()
            except NO_REDIS as error:
                log.warning("%s", error)
                # Nobody could say that he is still at work: they get the time to.
                self.reap_from = time.monotonic() + self.config["rules"]["lease_s"]
            if duty != self._hand_out:
                await asyncio.sleep(pause())
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.nudge.wait(), pause())
            self.nudge.clear()

    async def _hand_out(self) -> None:
        """Enough for all workers that there may be, so that Serve sees how many it needs; the rest waits in Redis."""
        free = max(0, self.config["window"] - len(self.sent))
        for held in await self.tasks.take(free, time.monotonic() >= self.reap_from):
            self.sent[held.id] = held
            task = asyncio.ensure_future(self._ask(held))
            self.asked.add(task)
            task.add_done_callback(self.asked.discard)

    async def _ask(self, held: Ticket) -> None:
        try:
            await self.workers.do.remote(held.id, held.ticket)
        except Exception as error:
            log.warning("task %s: its worker is gone: %s", held.id, error)
            await self._lost(held)
        finally:
            if self.sent.get(held.id) == held:
                del self.sent[held.id]
            self.nudge.set()

    async def _lost(self, held: Ticket) -> None:
        # Serve may need a moment to see it, too.
        await asyncio.sleep(1)
        try:
            await self.tasks.lost(held, "the replica that worked on it was lost")
        except NO_REDIS as error:
            log.warning("%s", error)  # it will be missed

    async def _hold(self) -> None:
        await self.tasks.hold(list(self.sent.values()))

    async def _count(self) -> None:
        for state, number in (await self.tasks.count()).items():
            self.gauge.set(number, tags={"state": state})

    # ------------------------------------------------------------------ to clients

    @api.post("/tasks")
    async def submit(self, request: Request) -> JSONResponse:
        payload = await self._payload(request)
        key, task_id = request.headers.get("idempotency-key", ""), new_id()
        try:
            try:
                known, new = await self.tasks.submit(payload, key, task_id)
            except Unreachable:
                # Once more: the same id is the same task, and a connection may just have grown old.
                known, new = await self.tasks.submit(payload, key, task_id)
        except Conflict:
            raise Refused("another payload was submitted with this Idempotency-Key", status=409) from None
        except Full:
            most = self.config["rules"]["max_queued_tasks"]
            raise Refused(f"{most} tasks wait already; try again later", status=429) from None
        self.nudge.set()
        state = "queued" if new else (await self._known(known))["state"]
        where = f"{request.scope.get('root_path', '')}/tasks/{known}"
        return JSONResponse({"id": known, "state": state}, status_code=202, headers={"Location": where})

    async def _payload(self, request: Request) -> Any:
        most, body = self.config["max_payload_bytes"], b""
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise Refused(f"a payload may have {most} bytes", status=413)
        try:
            return json.loads(body, parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise Refused("the body is no JSON; all of it is the payload", status=400) from None

    @api.get("/tasks/{task_id}")
    async def task(self, task_id: str) -> JSONResponse:
        return JSONResponse(await self._known(task_id))

    async def _known(self, task_id: str) -> dict[str, Any]:
        found = await self.tasks.get(task_id)
        if found is None:
            raise Refused("there is no such task; the results of old ones are not kept", status=404)
        return found

    @api.get("/queue")
    async def queue(self) -> JSONResponse:
        return JSONResponse(await self.tasks.count())

    @api.get("/dead-letters")
    async def dead_letters(self, first: int = 0, limit: int = 20) -> JSONResponse:
        if first < 0 or not 1 <= limit <= MOST_DEAD_LETTERS:
            raise Refused(f"first has to be 0 or more, and limit from 1 to {MOST_DEAD_LETTERS}", status=400)
        total, found = await self.tasks.dead(first, limit)
        return JSONResponse({"total": total, "tasks": found})

    @api.post("/dead-letters/{task_id}/retry")
    async def retry(self, task_id: str) -> JSONResponse:
        state = await self.tasks.again(task_id)
        if not state:
            raise Refused("there is no such task", status=404)
        if state != "failed":
            raise Refused(f"the task is no dead letter: it is {state}", status=409)
        self.nudge.set()
        return JSONResponse({"id": task_id, "state": "queued"}, status_code=202)


def build(settings: Settings) -> serve.Application:
    """Serve calls it with the app's `args`."""
    return Api.bind(settings, Worker.bind(settings))
