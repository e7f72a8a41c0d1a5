"""The work on one task: the site's own, or a request to a URL."""

import asyncio
import functools
import importlib
import inspect
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# What another attempt may mend, of the statuses that are the request's own fault.
WORTH_ANOTHER = (408, 425, 429)
LONGEST_ERROR = 2000


class Failed(Exception):
    """A task's own fault. retry: whether another attempt may go better."""

    def __init__(self, why: str, retry: bool = True) -> None:
        super().__init__(why[:LONGEST_ERROR])
        self.retry = retry


class Forward:
    """Each payload as JSON to a URL; what comes back is the result."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __call__(self, payload: Any, task: dict[str, Any]) -> Any:
        import aiohttp

        headers = {"Idempotency-Key": task["id"]}
        # The limit on the task is the one that counts.
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
            session.post(self.url, json=payload, headers=headers) as answer,
        ):
            text = await answer.text()
            if answer.status >= 400:
                retry = answer.status >= 500 or answer.status in WORTH_ANOTHER
                raise Failed(f"{self.url} answered {answer.status}: {text}", retry)
            try:
                return json.loads(text)
            except ValueError:
                raise Failed(f"{self.url} answered with no JSON: {text}", False) from None


class Work:
    """Calls it, in a thread where it is no coroutine."""

    def __init__(self, import_path: str, args: dict[str, Any], forward_to: str) -> None:
        self.call = Forward(forward_to) if forward_to else made(import_path, args)
        inner = self.call.func if isinstance(self.call, functools.partial) else self.call
        self.waits = any(map(inspect.iscoroutinefunction, (inner, getattr(inner, "__call__", None))))  # noqa: B004
        self.wants_task = "task" in inspect.signature(self.call).parameters
        # As many as there are requests: how many may change while this runs.
        self.threads = ThreadPoolExecutor(1000, thread_name_prefix="task")
        self.overrun = ""

    async def do(self, payload: Any, task: dict[str, Any], timeout_s: float, longest: int) -> str:
        """The result as JSON, of so many bytes at most; Failed."""
        more = {"task": task} if self.wants_task else {}
        try:
            result = await self._in_time(functools.partial(self.call, payload, **more), task["id"], timeout_s)
        except (Failed, asyncio.CancelledError):
            raise
        # All others: an exit() in it is no reason to end the replica.
        except BaseException as error:
            raise Failed(f"{type(error).__name__}: {error}", getattr(error, "retry", True) is not False) from error
        try:
            text = json.dumps(result, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Failed(f"the result is no JSON: {error}", False) from None
        if len(text) > longest:
            raise Failed(f"the result has {len(text)} bytes, and may have {longest}", False)
        return text

    async def _in_time(self, call: Callable[[], Any], task_id: str, timeout_s: float) -> Any:
        running: asyncio.Future[Any]
        if self.waits:
            running = asyncio.ensure_future(call())
        else:
            running = asyncio.get_running_loop().run_in_executor(self.threads, call)
        done, _ = await asyncio.wait([running], timeout=timeout_s)
        if done:
            return await running
        running.cancel()
        if not self.waits:
            # A thread cannot be ended: the replica has to go.
            self.overrun = task_id
        raise Failed(f"not done in {timeout_s:g} s")


def made(import_path: str, args: dict[str, Any]) -> Callable[..., Any]:
    """What is called with each payload: an object of a class, made here, or a function."""
    module, _, name = import_path.partition(":")
    found = getattr(importlib.import_module(module), name)
    call = found(**args) if inspect.isclass(found) else functools.partial(found, **args)
    if not callable(call):
        raise TypeError(f"{import_path} has no __call__: it cannot be given a task")
    return call
