"""The app that replicas run: OpenAI's API for embeddings, texts of many requests in one batch.

Needs what every engine has: Ray Serve, FastAPI, PyTorch, transformers. The last two are imported in the replica: the
app is built on the head, too. No `annotations` of the future: Serve and FastAPI look at the types themselves.
"""

import asyncio
import base64
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from ray import serve

from serve_apps.openai_api import Refused, models, new_api, own_limit, wanted_body

# OpenAI's own limit on texts of one request.
MAX_INPUTS = 2048


class Settings(BaseModel):
    """`args` of the app."""

    model_id: str
    model_path: str
    pooling: str = "mean"
    normalize: bool = True
    max_length: int | None = None
    dtype: str = "float32"
    device: str = "cpu"


def wanted_inputs(body: Any) -> list[Any]:
    """The texts, or lists of token ids, of a request; Refused where it is none."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    if not isinstance(body.get("model"), str):
        raise Refused("you must provide a model parameter", "model")
    given = body.get("input")
    single = isinstance(given, str) or (isinstance(given, list) and bool(given) and is_number(given[0]))
    inputs = [given] if single else given
    if not isinstance(inputs, list) or not inputs:
        raise Refused("input must be a text, a list of token ids, or a list of one kind of these", "input")
    if len(inputs) > MAX_INPUTS:
        raise Refused(f"input has {len(inputs)} entries, and may have {MAX_INPUTS}", "input")
    for number, item in enumerate(inputs):
        tokens = isinstance(item, list) and all(map(is_number, item))
        if not (isinstance(item, str) or tokens) or not item:
            raise Refused(f"input[{number}] must be a text or a list of token ids, and not empty", "input")
    return inputs


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def wanted_format(body: dict[str, Any]) -> str:
    form = body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise Refused("encoding_format must be float or base64", "encoding_format")
    return form


def encoded(vector: Any, form: str) -> Any:
    """A numpy vector as a list of numbers, or as base64 of 32-bit floats, the low byte first."""
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()


api = new_api()


@serve.deployment
@serve.ingress(api)
class Embeddings:
    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.settings, self.torch, self.created = settings, torch, int(time.time())
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
        model = AutoModel.from_pretrained(settings.model_path)
        self.model = model.to(device=settings.device, dtype=getattr(torch, settings.dtype)).eval()
        self.limit = settings.max_length or own_limit(self.tokenizer, model.config, 512)
        # One thread each: tokenizers and models are not made for two, and Serve's own loop must not wait for them.
        self.reading, self.working = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        # The first one on a GPU takes seconds; its size is what `dimensions` is compared with.
        self.size = len(self._work([self._read(["warm"])[0]])[0])

    def reconfigure(self, batches: dict[str, Any]) -> None:
        """`user_config`; running replicas take it."""
        self._embed.set_max_batch_size(int(batches["max_batch_size"]))
        self._embed.set_batch_wait_timeout_s(float(batches["batch_wait_timeout_s"]))

    @api.get("/v1/models")
    async def known_models(self) -> dict[str, Any]:
        return models(self.settings.model_id, self.created)

    @api.post("/v1/embeddings")
    async def embeddings(self, request: Request) -> JSONResponse:
        body = await wanted_body(request)
        inputs, form = wanted_inputs(body), wanted_format(body)
        if body["model"] != self.settings.model_id:
            raise Refused(f"there is no model {body['model']!r} here", "model", "model_not_found", 404)
        size = body.get("dimensions")
        if size is not None and size != self.size:
            # A shorter one would be another embedding only for models that were trained for it.
            raise Refused(f"this model gives {self.size} dimensions, and no other number", "dimensions")
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self.reading, self._read, inputs)
        for number, ids in enumerate(tokens):
            if len(ids) > self.limit:
                problem = f"input[{number}] has {len(ids)} tokens, and this model takes {self.limit}"
                raise Refused(problem, "input", "context_length_exceeded")
        vectors = await asyncio.gather(*map(self._embed, tokens))
        used = sum(map(len, tokens))
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encoded(vector, form)}
                for index, vector in enumerate(vectors)
            ],
            "model": self.settings.model_id,
            "usage": {"prompt_tokens": used, "total_tokens": used},
        }
        # As it is: FastAPI would look at each of the numbers first.
        return JSONResponse(answer)

    def _read(self, inputs: list[Any]) -> list[list[int]]:
        """Token ids; those that a client gives are taken as they are."""
        texts = [item for item in inputs if isinstance(item, str)]
        read = iter(self.tokenizer(texts)["input_ids"] if texts else [])
        words = len(self.tokenizer)
        for item in inputs:
            if not isinstance(item, str) and not all(0 <= token < words for token in item):
                raise Refused(f"this model knows token ids from 0 to {words - 1}", "input")
        return [next(read) if isinstance(item, str) else item for item in inputs]

    @serve.batch
    async def _embed(self, batch: list[list[int]]) -> list[Any]:
        return await asyncio.get_running_loop().run_in_executor(self.working, self._work, batch)

    def _work(self, batch: list[list[int]]) -> list[Any]:
        """One vector per list of token ids, in 32-bit floats."""
        torch, device = self.torch, self.settings.device
        filler = self.tokenizer.pad_token_id or 0
        longest = max(map(len, batch))
        ids = torch.tensor([item + [filler] * (longest - len(item)) for item in batch], device=device)
        mask = torch.tensor([[1] * len(item) + [0] * (longest - len(item)) for item in batch], device=device)
        with torch.inference_mode():
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            if self.settings.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weights = mask.unsqueeze(-1)
                pooled = (hidden * weights).sum(1) / weights.sum(1)
            if self.settings.normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=1)
            return list(pooled.cpu().numpy())


def build(settings: Settings) -> serve.Application:
    """Serve calls it with the app's `args`."""
    return Embeddings.bind(settings)
