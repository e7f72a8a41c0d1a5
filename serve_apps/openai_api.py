"""What every app that speaks a part of OpenAI's API has in common: its refusals, its faults, its list of models.

Runs in replicas, and needs FastAPI only where an app has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse


class Refused(Exception):
    """An answer in OpenAI's shape; `more` stands beside what every error has."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400, **more: Any
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}


# What happened stands in the replica's log; it is no business of the client's.
FAULT = Refused("the server had an error while it worked on this request", status=500)


def models(model_id: str, created: int) -> dict[str, Any]:
    """The answer to GET /v1/models; `created` in seconds since 1970."""
    entry = {"id": model_id, "object": "model", "created": created, "owned_by": "clusterkit"}
    return {"object": "list", "data": [entry]}


async def wanted_body(request: Request) -> Any:
    """The JSON of a request; Refused where it is none."""
    try:
        return await request.json()
    except ValueError:
        raise Refused("the body is no JSON") from None


def new_api() -> FastAPI:
    """An API without pages of its own, that gives every error in OpenAI's shape."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused)
        return JSONResponse(error.body, status_code=error.status)

    async def no_such_page(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        shaped = Refused(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
        return JSONResponse(shaped.body, status_code=shaped.status, headers=error.headers)

    async def fault(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(FAULT.body, status_code=500)

    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    api.add_exception_handler(Refused, refused)
    api.add_exception_handler(HTTPException, no_such_page)
    api.add_exception_handler(Exception, fault)
    return api


def own_limit(tokenizer: Any, config: Any, otherwise: int) -> int:
    """Tokens that the model can take. Tokenizers without a limit say a number that is none."""
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit and limit < 10**9), default=otherwise)
