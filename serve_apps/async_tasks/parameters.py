"""Parameters of an `async_tasks` app: where the tasks are kept, what the work is, and how often it is tried."""

from __future__ import annotations

import math
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, StrictInt, field_validator, model_validator

from serve_apps.replicas import Number, Positive, Replicas, Seconds
from serve_apps.template import LoggingConfig

ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
AbsolutePath = Annotated[str, Field(pattern=r"^/\S*$")]


class AsyncTasksParameters(Replicas):
    """Long work through Redis. What scales are the workers."""

    redis_url: str = Field(
        description="`redis://HOST:PORT/DB`, or `rediss://` with TLS; a user may stand in it, a password may not"
    )
    redis_password_env: Variable | None = Field(
        None, description="the password's name in `clusterkit_environment`, where its value comes out of a vault"
    )
    redis_password_file: AbsolutePath | None = Field(
        None, description="file with the password on every host, readable by Ray's user alone; instead of that"
    )
    redis_ca_file: AbsolutePath | None = Field(
        None, description="authorities for TLS, a file on every host; none: those of the system"
    )
    queue_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = Field(
        None, description="what keeps its tasks apart from others in the same Redis; the app's name where none is said"
    )

    code: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="folder on the controller where imports begin: absolute, or relative to the inventory"
    )
    import_path: ImportPath | None = Field(
        None, description="the work in it, `module:name`: a function of a payload, or a class of such objects"
    )
    args: dict[str, Any] = Field({}, description="named arguments: of the class, or of each call of the function")
    forward_to: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")] | None = Field(
        None, description="a URL that gets each payload as a POST and answers the result; instead of code"
    )
    env_vars: dict[str, str] = Field({}, description="environment of the replicas; no secrets")
    logging_config: LoggingConfig | None = Field(None, description="instead of `clusterkit_serve.logging_config`")

    task_timeout_s: Positive = Field(600, description="how long one attempt may take")
    max_retries: StrictInt = Field(3, ge=0, description="attempts after the first that failed, then: dead letter")
    retry_backoff_s: Positive = Field(2, description="pause before the first of them; each next one is twice as long")
    retry_backoff_max_s: Positive = Field(600, description="and no longer than this")
    lease_s: Annotated[Number, Field(ge=3)] = Field(
        30, description="a worker that is silent for so long has lost its task; it says something three times as often"
    )
    result_ttl_s: Positive = Field(86400, description="how long a result is kept")
    dead_letter_ttl_s: Positive = Field(1209600, description="how long a dead letter is kept")
    max_queued_tasks: StrictInt = Field(100000, ge=1, description="so many may wait; the rest gets 429")
    max_payload_bytes: StrictInt = Field(1048576, ge=1, le=67108864, description="of a payload, and of a result")

    api_replicas: StrictInt = Field(1, ge=1, description="replicas that take tasks in and hand them out, 0.1 CPUs each")
    cpus_per_replica: Positive = Field(1, description="CPUs that Ray sets aside for one worker")
    gpus_per_replica: Number = Field(0, ge=0, description="GPUs of one worker; below 1 a share of one")

    max_ongoing_requests: StrictInt = Field(1, ge=1, description="tasks that one worker works on at a time")
    target_ongoing_requests: Positive = Field(1, description="tasks per worker, waiting ones too, that scaling aims at")
    graceful_shutdown_timeout_s: Seconds = Field(
        660, description="how long a worker that is to stop may take for its tasks; else others get them"
    )

    @field_validator("redis_url")
    @classmethod
    def _whole(cls, value: str) -> str:
        # Nothing of the value in the words: it may be a secret.
        try:
            where = urlsplit(value)
            port, host = where.port, where.hostname
        except ValueError:
            raise ValueError("this is no URL; write redis://HOST:PORT/DB") from None
        if where.password is not None:
            raise ValueError(
                "a password in it would stand in Serve's configuration and in Ray's logs: put it into "
                "clusterkit_environment, and its name there into redis_password_env"
            )
        if where.scheme not in ("redis", "rediss") or not host or port == 0:
            raise ValueError("it has to be redis://HOST:PORT/DB, or rediss:// with TLS")
        if not (where.path in ("", "/") or where.path[1:].isdigit()) or where.query or where.fragment:
            raise ValueError("what follows HOST:PORT/ has to be the number of a database, and nothing else")
        return value

    @field_validator("gpus_per_replica")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1 it has to be a whole number: Ray gives a share of one GPU only")
        return value

    @model_validator(mode="after")
    def _check_tasks(self) -> AsyncTasksParameters:
        own = [name for name in ("code", "import_path") if getattr(self, name) is not None]
        if len(own) == 1:
            raise ValueError(f"code and import_path go together, and there is {own[0]} alone")
        if bool(own) == (self.forward_to is not None):
            raise ValueError("say what the work is: either code and import_path, or forward_to")
        if self.args and self.forward_to is not None:
            raise ValueError("args are for the site's own code, and forward_to has none: take args out")
        if self.redis_password_env and self.redis_password_file:
            raise ValueError("redis_password_env and redis_password_file are two ways to one password: take one out")
        if urlsplit(self.redis_url).username and not (self.redis_password_env or self.redis_password_file):
            raise ValueError("redis_url names a user, who needs redis_password_env or redis_password_file")
        if self.redis_ca_file and urlsplit(self.redis_url).scheme != "rediss":
            raise ValueError("redis_ca_file is for TLS: begin redis_url with rediss://, or take it out")
        if self.retry_backoff_max_s < self.retry_backoff_s:
            raise ValueError(
                f"retry_backoff_max_s ({self.retry_backoff_max_s:g}) is below retry_backoff_s "
                f"({self.retry_backoff_s:g})"
            )
        if self.graceful_shutdown_timeout_s < self.task_timeout_s:
            raise ValueError(
                f"graceful_shutdown_timeout_s ({self.graceful_shutdown_timeout_s:g}) is below task_timeout_s "
                f"({self.task_timeout_s:g}): a worker that scaling or an update stops would be cut in its task"
            )
        if self.max_queued_requests != -1:
            raise ValueError("max_queued_requests is not for tasks, which wait in Redis: say max_queued_tasks")
        return self

    @property
    def window(self) -> int:
        """Tasks that an API replica hands out at a time: what keeps all workers busy, and shows Serve that it needs
        them all."""
        return math.ceil(self.most * max(self.max_ongoing_requests, self.target_ongoing_requests))
