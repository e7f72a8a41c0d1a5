"""The app that replicas run: OpenAI's API for chats, where a classifier looks at texts before and after a generator.

Three deployments: the ingress asks the other two by their handles. Needs what every engine has: Ray Serve, FastAPI,
PyTorch, transformers. The last two are imported in the replicas: the app is built on the head, too. No `annotations`
of the future: Serve and FastAPI look at the types themselves.
"""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_apps.openai_api import FAULT, Refused, models, new_api, own_limit, wanted_body
from serve_apps.pipeline.chat import Text, sampling, wanted_chat, wanted_stream


class Model(BaseModel):
    """Where the weights lie, and what they run on."""

    model_path: str
    dtype: str
    device: str = "cpu"
    max_length: int | None = None


class Settings(BaseModel):
    """`args` of the app."""

    model_id: str
    max_prompt_chars: int
    classifier: Model
    generator: Model


# --------------------------------------------------------------------------- the models


def put_on_device(torch: Any, model: Any, settings: Model) -> Any:
    """The model, ready. On a GPU that others share, this process takes no more of its memory than Ray gave it."""
    if settings.device == "cuda":
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1)
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    return model.to(device=settings.device, dtype=getattr(torch, settings.dtype)).eval()


@serve.deployment
class Classifier:
    def __init__(self, settings: Model) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.settings, self.torch = settings, torch
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
        if not self.tokenizer.is_fast:
            raise ValueError(f"the tokenizer in {settings.model_path} cannot cut long texts: it has no tokenizer.json")
        model = AutoModelForSequenceClassification.from_pretrained(settings.model_path)
        self.model = put_on_device(torch, model, settings)
        self.limit = settings.max_length or own_limit(self.tokenizer, model.config, 512)
        self.labels = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
        # Labels that exclude each other share one; such as each may be true by itself have one each.
        self.alone = model.config.problem_type == "multi_label_classification" or len(self.labels) == 1
        # One thread each: tokenizers and models are not made for two, and Serve's own loop must not wait for them.
        self.reading, self.working = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.block_labels: list[str] = []
        self.threshold = 1.0
        self._work(self._read(["warm"]))

    def reconfigure(self, given: dict[str, Any]) -> None:
        """`user_config`; running replicas take it."""
        unknown = [label for label in given["block_labels"] if label not in self.labels]
        if unknown:
            raise ValueError(f"block_labels: the classifier has no label {unknown[0]!r}, but {', '.join(self.labels)}")
        self.block_labels, self.threshold = given["block_labels"], given["threshold"]
        self._score.set_max_batch_size(int(given["max_batch_size"]))
        self._score.set_batch_wait_timeout_s(float(given["batch_wait_timeout_s"]))

    async def categories(self, texts: list[str]) -> list[str]:
        """The labels that block any of the texts; of a long one each part is looked at."""
        parts = await asyncio.get_running_loop().run_in_executor(self.reading, self._read, texts)
        found = await asyncio.gather(*map(self._score, parts))
        return [label for label in self.block_labels if any(scores[label] >= self.threshold for scores in found)]

    def _read(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, cut into overlapping parts where they are long: what stands on a cut is in one whole."""
        some = [text for text in texts if text.strip()]
        if not some:
            return []
        cut = {"truncation": True, "max_length": self.limit, "stride": self.limit // 4}
        parts: list[list[int]] = self.tokenizer(some, return_overflowing_tokens=True, **cut)["input_ids"]
        return [part for part in parts if part]

    @serve.batch
    async def _score(self, batch: list[list[int]]) -> list[dict[str, float]]:
        return await asyncio.get_running_loop().run_in_executor(self.working, self._work, batch)

    def _work(self, batch: list[list[int]]) -> list[dict[str, float]]:
        torch, device = self.torch, self.settings.device
        filler = self.tokenizer.pad_token_id or 0
        longest = max(map(len, batch))
        ids = torch.tensor([part + [filler] * (longest - len(part)) for part in batch], device=device)
        mask = torch.tensor([[1] * len(part) + [0] * (longest - len(part)) for part in batch], device=device)
        with torch.inference_mode():
            logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
            scores = logits.sigmoid() if self.alone else logits.softmax(-1)
        return [dict(zip(self.labels, row, strict=True)) for row in scores.tolist()]


class Cut(Exception):
    """Nobody waits for this answer any more."""


class Feed:
    """What `generate` gives its tokens to, in its own thread: they go to the loop of the one who waits for them."""

    def __init__(self) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self.prompt, self.cut = True, False

    def put(self, tokens: Any) -> None:
        if self.cut:
            raise Cut
        if self.prompt:
            self.prompt = False  # what comes first is the prompt itself
        else:
            self.say(tokens.flatten().tolist())

    def end(self) -> None:
        self.say(None)

    def say(self, item: Any) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


@serve.deployment
class Generator:
    def __init__(self, settings: Model) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.settings, self.torch = settings, torch
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
        if not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {settings.model_path} has no chat template: this model does not chat")
        self.model = put_on_device(torch, AutoModelForCausalLM.from_pretrained(settings.model_path), settings)
        self.limit = own_limit(self.tokenizer, self.model.config, 2048)
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.max_new_tokens = 0

    def reconfigure(self, given: dict[str, Any]) -> None:
        """`user_config`; running replicas take it."""
        self.max_new_tokens = int(given["max_new_tokens"])

    async def answer(self, wanted: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """First {prompt_tokens}, then {text} as often as there is some, and {finish, tokens} at the end; or only
        {refused}: message, parameter, code."""
        from jinja2 import TemplateError

        # All that the tokenizer does is done here, in one thread: it is not made for two.
        try:
            read = self.tokenizer.apply_chat_template(
                wanted["messages"], add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            yield {"refused": [f"the model takes no such messages: {error}", "messages", None]}
            return
        prompt: list[int] = read["input_ids"]
        asked, room = wanted["max_tokens"], self.limit - len(prompt)
        if asked is not None and asked > self.max_new_tokens:
            yield {"refused": [f"max_tokens is {asked}, and may be {self.max_new_tokens}", "max_tokens", None]}
            return
        if room < (asked or 1):
            problem = f"this model takes {self.limit} tokens, and the messages have {len(prompt)}"
            problem += f" beside the {asked} of the answer" if asked else ""
            yield {"refused": [problem, "messages", "context_length_exceeded"]}
            return
        yield {"prompt_tokens": len(prompt)}

        most, feed, text = asked or min(self.max_new_tokens, room), Feed(), Text(self.tokenizer)
        arguments = {"max_new_tokens": most, **sampling(wanted)}
        # As many threads as Serve lets requests in.
        threading.Thread(target=self._work, args=(prompt, arguments, feed), daemon=True).start()
        try:
            while (tokens := await feed.queue.get()) is not None:
                if isinstance(tokens, Exception):
                    raise tokens
                if said := text.add(tokens):
                    yield {"text": said}
        finally:
            feed.cut = True
        if rest := text.add([], last=True):
            yield {"text": rest}
        ended = bool(text.tokens) and text.tokens[-1] in self.ends
        yield {"finish": "stop" if ended else "length", "tokens": len(text.tokens)}

    def _work(self, prompt: list[int], arguments: dict[str, Any], feed: Feed) -> None:
        torch = self.torch
        try:
            ids = torch.tensor([prompt], device=self.settings.device)
            with torch.inference_mode():
                self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=feed, **arguments)
        except Cut:
            pass
        except Exception as error:
            feed.say(error)


# --------------------------------------------------------------------------- the ingress

api = new_api()

# Serve takes a copy of the ingress with all that it uses when it comes to the decorator: nothing of it stands below.


def _usage(usage: dict[str, int], last: dict[str, Any]) -> dict[str, int]:
    return {**usage, "completion_tokens": last["tokens"], "total_tokens": usage["prompt_tokens"] + last["tokens"]}


async def _events(
    head: dict[str, Any], answer: AsyncIterator[dict[str, Any]], usage: dict[str, int], with_usage: bool
) -> AsyncIterator[str]:
    """The stream, as OpenAI has it. An error in its midst ends it: the status has been sent already."""
    head = {**head, "object": "chat.completion.chunk"}

    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        async for part in answer:
            if "text" in part:
                yield event({"content": part["text"]})
            else:
                usage = _usage(usage, part)
                yield event({}, part["finish"])
    except Exception:
        yield f"data: {json.dumps(FAULT.body)}\n\n"
        raise
    if with_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


@serve.deployment
@serve.ingress(api)
class Ingress:
    def __init__(self, settings: Settings, classifier: DeploymentHandle, generator: DeploymentHandle) -> None:
        self.settings, self.created = settings, int(time.time())
        self.classifier, self.generator = classifier, generator.options(stream=True)

    @api.get("/v1/models")
    async def known_models(self) -> dict[str, Any]:
        return models(self.settings.model_id, self.created)

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        try:
            return await self._chat(request)
        except (BackPressureError, DeploymentUnavailableError) as error:
            # Here, as Serve puts a handler of its own in the place of one of the app's.
            raise Refused(str(error), code="unavailable", status=503) from None

    async def _chat(self, request: Request) -> Response:
        body = await wanted_body(request)
        wanted, (stream, with_usage) = wanted_chat(body), wanted_stream(body)
        if body["model"] != self.settings.model_id:
            raise Refused(f"there is no model {body['model']!r} here", "model", "model_not_found", 404)
        # The history as well: nothing says that it is the one that this server gave.
        texts = [message["content"] for message in wanted["messages"]]
        if (length := sum(map(len, texts))) > self.settings.max_prompt_chars:
            problem = f"messages have {length} characters, and may have {self.settings.max_prompt_chars}"
            raise Refused(problem, "messages", "string_above_max_length")
        # Where the classifier fails, so does the request: nothing passes unseen.
        if categories := await self.classifier.categories.remote(texts):
            problem = f"the messages are blocked by this server's content policy: {', '.join(categories)}"
            raise Refused(problem, "messages", "content_policy_violation", categories=categories)
        answer = self._answer(wanted)
        # Before anything is sent: what the generator refuses has a status of its own.
        usage = {"prompt_tokens": (await anext(answer))["prompt_tokens"]}
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.settings.model_id}
        if stream:
            return StreamingResponse(_events(head, answer, usage, with_usage), media_type="text/event-stream")
        text, finish = "", "stop"
        async for part in answer:
            text += part.get("text", "")
            if "finish" in part:
                finish, usage = part["finish"], _usage(usage, part)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if categories := await self.classifier.categories.remote([text]):
            finish = "content_filter"
            message |= {"content": None, "refusal": f"the answer was withheld: {', '.join(categories)}"}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _answer(self, wanted: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """What the generator gives. Serve ends that where the client has gone."""
        async for part in self.generator.answer.remote(wanted):
            if "refused" in part:
                raise Refused(*part["refused"])
            yield part


def build(settings: Settings) -> serve.Application:
    """Serve calls it with the app's `args`."""
    return Ingress.bind(settings, Classifier.bind(settings.classifier), Generator.bind(settings.generator))
