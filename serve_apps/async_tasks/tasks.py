"""Tasks in Redis: who waits, who runs, who failed. Each change is one script, so that it happens as a whole or not.

Keys begin with `{clusterkit:tasks:<queue>}` (the brackets keep them in one place of a cluster):

    :task:<id>   hash; `state` is queued, running, retrying, succeeded or failed
    :ready       list of ids; the oldest is at its right end
    :delayed     ids that failed and are tried again, by when
    :leased      ids that somebody has taken, by the time until when he is believed to work on it
    :dead        ids that failed for good, by when
    :key:<k>     id of the task that was submitted with this idempotency key

Whoever takes a task gets a `ticket`. A ticket that was replaced, because its holder was silent for too long, changes
nothing any more. Times are the server's own, in seconds.
"""

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from serve_apps.async_tasks.redis import Address, Redis

# Starts that may end with their replica, and not with an answer. A task that takes its replica along would go on doing
# so for ever.
MOST_LOST = 5
# Of what is due, at a time: no script shall keep the server for long.
BATCH = 100


@dataclass(frozen=True)
class Rules:
    """What happens to tasks; `args` of the app."""

    max_retries: int = 3
    retry_backoff_s: float = 2
    retry_backoff_max_s: float = 600
    lease_s: float = 30
    max_queued_tasks: int = 100000
    result_ttl_s: float = 86400
    dead_letter_ttl_s: float = 1209600


@dataclass(frozen=True)
class Ticket:
    """A task that somebody has taken."""

    id: str
    ticket: str


_COMMON = """
local base, rules, cmd = KEYS[1], cjson.decode(ARGV[1]), redis.call
local time = cmd('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local function name(id) return base .. ':task:' .. id end
-- Lua would write it with 14 digits, and a time needs 16.
local function text(number) return string.format('%.6f', number) end
local function mine(id, ticket) return cmd('HGET', name(id), 'ticket') == ticket end
local function let_go(id)
  cmd('ZREM', base .. ':leased', id)
  cmd('HDEL', name(id), 'ticket')
end
local function keep(id, seconds)
  cmd('PEXPIRE', name(id), math.floor(seconds * 1000))
  local key = cmd('HGET', name(id), 'key')
  if key then cmd('PEXPIRE', base .. ':key:' .. key, math.floor(seconds * 1000)) end
end
local function give_up(id, why)
  cmd('HSET', name(id), 'state', 'failed', 'error', why, 'finished', text(now))
  cmd('ZADD', base .. ':dead', text(now), id)
  keep(id, rules.dead_letter_ttl_s)
end
local function lost(id, why)
  let_go(id)
  if cmd('EXISTS', name(id)) == 0 then return end
  -- Nobody had begun: that is no fault of the task's.
  local begun = cmd('HGET', name(id), 'state') == 'running'
  if begun and cmd('HINCRBY', name(id), 'lost', 1) > rules.most_lost then return give_up(id, why) end
  cmd('HSET', name(id), 'state', 'queued')
  if begun then cmd('HSET', name(id), 'error', why) end
  cmd('RPUSH', base .. ':ready', id)
end
"""

_SUBMIT = """
local id, payload, digest, key = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
-- The same once more, after an answer that was lost.
if cmd('EXISTS', name(id)) == 1 then return {'new', id} end
if key ~= '' then
  local known = cmd('GET', base .. ':key:' .. key)
  if known and cmd('EXISTS', name(known)) == 1 then
    return {cmd('HGET', name(known), 'digest') == digest and 'known' or 'other', known}
  end
end
local waiting = cmd('LLEN', base .. ':ready') + cmd('ZCARD', base .. ':delayed')
if waiting >= rules.max_queued_tasks then return {'full', ''} end
cmd('HSET', name(id), 'state', 'queued', 'payload', payload, 'digest', digest, 'created', text(now),
    'attempts', 0, 'failures', 0, 'lost', 0)
if key ~= '' then
  cmd('HSET', name(id), 'key', key)
  cmd('SET', base .. ':key:' .. key, id)
end
cmd('LPUSH', base .. ':ready', id)
return {'new', id}
"""

# ARGV: how many, whether leases that ran out count, and as many tickets as tasks are wanted.
_TAKE = """
local wanted, reap = tonumber(ARGV[2]), ARGV[3] == '1'
for _, id in ipairs(cmd('ZRANGEBYSCORE', base .. ':delayed', '-inf', text(now), 'LIMIT', 0, rules.batch)) do
  cmd('ZREM', base .. ':delayed', id)
  cmd('HSET', name(id), 'state', 'queued')
  cmd('HDEL', name(id), 'next')
  cmd('LPUSH', base .. ':ready', id)
end
if reap then
  for _, id in ipairs(cmd('ZRANGEBYSCORE', base .. ':leased', '-inf', text(now), 'LIMIT', 0, rules.batch)) do
    lost(id, 'whoever had this task was not heard of any more')
  end
end
cmd('ZREMRANGEBYSCORE', base .. ':dead', '-inf', text(now - rules.dead_letter_ttl_s))
local taken = {}
while #taken < wanted do
  local id = cmd('RPOP', base .. ':ready')
  if not id then break end
  if cmd('EXISTS', name(id)) == 1 then
    taken[#taken + 1] = id
    cmd('HSET', name(id), 'ticket', ARGV[3 + #taken])
    cmd('ZADD', base .. ':leased', text(now + rules.lease_s), id)
  end
end
return taken
"""

_START = """
local id, ticket = ARGV[2], ARGV[3]
if not mine(id, ticket) then return false end
cmd('HSET', name(id), 'state', 'running', 'started', text(now))
cmd('ZADD', base .. ':leased', text(now + rules.lease_s), id)
return {cmd('HGET', name(id), 'payload'), cmd('HINCRBY', name(id), 'attempts', 1)}
"""

_HOLD = """
local held = {}
for number = 2, #ARGV, 2 do
  local id = ARGV[number]
  if mine(id, ARGV[number + 1]) then
    cmd('ZADD', base .. ':leased', text(now + rules.lease_s), id)
    held[#held + 1] = id
  end
end
return held
"""

_SUCCEED = """
local id, ticket, result = ARGV[2], ARGV[3], ARGV[4]
if not mine(id, ticket) then return 0 end
let_go(id)
cmd('HSET', name(id), 'state', 'succeeded', 'result', result, 'finished', text(now))
cmd('HDEL', name(id), 'payload', 'error')
keep(id, rules.result_ttl_s)
return 1
"""

_FAIL = """
local id, ticket, why, again, chance = ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1', tonumber(ARGV[6])
if not mine(id, ticket) then return 0 end
let_go(id)
local failures = cmd('HINCRBY', name(id), 'failures', 1)
if not again or failures > rules.max_retries then
  give_up(id, why)
  return 1
end
local wait = math.min(rules.retry_backoff_s * 2 ^ math.min(failures - 1, 60), rules.retry_backoff_max_s) * chance
cmd('HSET', name(id), 'state', 'retrying', 'error', why, 'next', text(now + wait))
cmd('ZADD', base .. ':delayed', text(now + wait), id)
return 1
"""

_LOST = """
local id, ticket, why = ARGV[2], ARGV[3], ARGV[4]
if not mine(id, ticket) then return 0 end
lost(id, why)
return 1
"""

_GIVE_BACK = """
for number = 2, #ARGV, 2 do
  local id = ARGV[number]
  if mine(id, ARGV[number + 1]) and cmd('HGET', name(id), 'state') ~= 'running' then lost(id, '') end
end
"""

_AGAIN = """
local id = ARGV[2]
local state = cmd('HGET', name(id), 'state')
if not state then return '' end
if state ~= 'failed' then return state end
cmd('PERSIST', name(id))
local key = cmd('HGET', name(id), 'key')
if key then cmd('PERSIST', base .. ':key:' .. key) end
cmd('ZREM', base .. ':dead', id)
cmd('HSET', name(id), 'state', 'queued', 'failures', 0, 'lost', 0)
cmd('HDEL', name(id), 'finished')
cmd('LPUSH', base .. ':ready', id)
return 'failed'
"""

_DEAD = """
local found = {}
for _, id in ipairs(cmd('ZREVRANGE', base .. ':dead', ARGV[2], ARGV[3])) do
  found[#found + 1] = {id, cmd('HGETALL', name(id))}
end
return {cmd('ZCARD', base .. ':dead'), found}
"""

_COUNT = """
local running = 0
local taken = cmd('ZRANGE', base .. ':leased', 0, -1)
for _, id in ipairs(taken) do
  if cmd('HGET', name(id), 'state') == 'running' then running = running + 1 end
end
return {cmd('LLEN', base .. ':ready') + #taken - running, running, cmd('ZCARD', base .. ':delayed'),
        cmd('ZCARD', base .. ':dead')}
"""

# Numbers that a client is shown, by the name that he is shown.
_TIMES = {
    "created": "created_at",
    "started": "started_at",
    "finished": "finished_at",
    "next": "next_attempt_at",
}


class Conflict(Exception):
    """The idempotency key belongs to a task with another payload."""


class Full(Exception):
    """As many tasks wait as may."""


class Tasks:
    """One queue. Every call raises what the client of Redis raises."""

    def __init__(self, address: Address, queue: str, rules: Rules = Rules()) -> None:
        self.redis, self.base = Redis(address), f"{{clusterkit:tasks:{queue}}}"
        self.obey(rules)

    def obey(self, rules: Rules) -> None:
        """From now on."""
        self.rules = json.dumps({**asdict(rules), "most_lost": MOST_LOST, "batch": BATCH})

    async def _script(self, script: str, *words: str | float) -> Any:
        return await self.redis.run("EVAL", _COMMON + script, 1, self.base, self.rules, *words)

    async def submit(self, payload: Any, key: str = "", task_id: str = "") -> tuple[str, bool]:
        """(id, whether it is new). With `task_id` it may be asked again after a fault. Conflict, Full."""
        digest = hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
        # Clients may put anything there, and of any length.
        short = hashlib.sha256(key.encode()).hexdigest() if key else ""
        word, known = await self._script(_SUBMIT, task_id or new_id(), json.dumps(payload), digest, short)
        if word == b"other":
            raise Conflict(known.decode())
        if word == b"full":
            raise Full
        return known.decode(), word == b"new"

    async def take(self, wanted: int, reap: bool) -> list[Ticket]:
        """Up to so many, the oldest first; before that, what is due comes back. reap: so do those whose holder is
        silent."""
        tickets = [uuid.uuid4().hex for _ in range(wanted)]
        ids = await self._script(_TAKE, wanted, int(reap), *tickets)
        return [Ticket(found.decode(), ticket) for found, ticket in zip(ids, tickets, strict=False)]

    async def start(self, held: Ticket) -> tuple[Any, int] | None:
        """(payload, which attempt it is); None where another has it now."""
        found = await self._script(_START, held.id, held.ticket)
        return (json.loads(found[0]), found[1]) if found else None

    async def hold(self, held: list[Ticket]) -> set[str]:
        """Says that they are still worked on; which of them are."""
        return {found.decode() for found in await self._script(_HOLD, *_words(held))} if held else set()

    async def give_back(self, held: list[Ticket]) -> None:
        """Those that nobody has begun."""
        await self._script(_GIVE_BACK, *_words(held))

    async def succeed(self, held: Ticket, result: str) -> bool:
        """Whether it counted, as for the next two."""
        return bool(await self._script(_SUCCEED, held.id, held.ticket, result))

    async def fail(self, held: Ticket, why: str, again: bool, chance: float = 1) -> bool:
        """again: false where another attempt would be of no use. chance spreads what failed at the same time."""
        return bool(await self._script(_FAIL, held.id, held.ticket, why, int(again), chance))

    async def lost(self, held: Ticket, why: str) -> bool:
        return bool(await self._script(_LOST, held.id, held.ticket, why))

    async def get(self, task_id: str) -> dict[str, Any] | None:
        found = await self.redis.run("HGETALL", f"{self.base}:task:{task_id}")
        return shown(task_id, found) if found else None

    async def again(self, task_id: str) -> str:
        """A dead letter waits again, as if it were new. The state that the task was in; empty where there is none."""
        return str((await self._script(_AGAIN, task_id)).decode())

    async def dead(self, first: int, most: int) -> tuple[int, list[dict[str, Any]]]:
        """(how many there are, some of them), the newest first, with their payloads."""
        total, found = await self._script(_DEAD, first, first + most - 1)
        return total, [shown(item.decode(), fields, payload=True) for item, fields in found if fields]

    async def count(self) -> dict[str, int]:
        found = await self._script(_COUNT)
        return dict(zip(("queued", "running", "retrying", "failed"), found, strict=True))


def _words(held: list[Ticket]) -> list[str]:
    return [word for item in held for word in (item.id, item.ticket)]


def new_id() -> str:
    return uuid.uuid4().hex


def shown(task_id: str, fields: list[bytes], payload: bool = False) -> dict[str, Any]:
    """A task as clients see it."""
    known = {fields[at].decode(): fields[at + 1] for at in range(0, len(fields), 2)}
    task: dict[str, Any] = {"id": task_id, "state": known["state"].decode(), "attempts": int(known["attempts"])}
    task |= {title: float(known[name]) for name, title in _TIMES.items() if name in known}
    if "result" in known:
        task["result"] = json.loads(known["result"])
    if "error" in known:
        task["error"] = known["error"].decode(errors="replace")
    if payload and "payload" in known:
        task["payload"] = json.loads(known["payload"])
    return task
