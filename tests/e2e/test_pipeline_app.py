"""The `pipeline` app on a real Ray, with a classifier and a generator of random weights: what it blocks and answers
against what the two models say by themselves.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.app_site import Site, app_site
from tests.support import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MAKER = ROOT / "roles/model_store/files/make_tiny_llama.py"
BLOCKING = ["toxic", "threat"]
# Tokens of an answer, and of one that takes a while.
SHORT, LONG = 24, 400

SUBJECTS = ["the server", "a cluster", "one of my neighbours", "the operator", "猫と犬", "Größe und Würde"]
VERBS = [
    "wakes up before anyone has asked",
    "is a fool, and everybody knows it",
    "will be sorry tomorrow",
    "counts to 10",
]
TEXTS = [f"{subject} {verb}" for subject in SUBJECTS for verb in VERBS]
# Longer than what the classifier takes at a time (64 tokens).
TEXTS += [f"{'and so on, as everybody said long before, ' * 5}{text}" for text in TEXTS[:12]]

# A classifier of random weights, with the tokenizer of the generator.
MAKE_CLASSIFIER = """
import sys, torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
source, target = sys.argv[1:]
AutoTokenizer.from_pretrained(source).save_pretrained(target)
torch.manual_seed(7)
config = BertConfig(
    vocab_size=896, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
    id2label={0: "harmless", 1: "toxic", 2: "threat"}, label2id={"harmless": 0, "toxic": 1, "threat": 2},
)
BertForSequenceClassification(config).save_pretrained(target)
"""

# What both say, one text at a time, without any of the app's code.
DIRECT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
given = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(given["generator"])
generator = AutoModelForCausalLM.from_pretrained(given["generator"]).float().eval()
classifier = AutoModelForSequenceClassification.from_pretrained(given["classifier"]).float().eval()
def scores(text):
    ids, parts, start = tokenizer(text)["input_ids"], [], 0
    while not parts or start + 16 < len(ids):
        parts.append(ids[start : start + 64])
        start += 48
    with torch.inference_mode():
        found = [classifier(torch.tensor([part])).logits[0].softmax(-1).tolist() for part in parts if part]
    return [dict(zip(["harmless", "toxic", "threat"], item)) for item in found]
def answer(text, most):
    chat = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        said = generator.generate(**ids, do_sample=False, max_new_tokens=most)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(said, skip_special_tokens=True)
    return {"text": text, "prompt": ids["input_ids"].shape[1], "tokens": len(said), "scores": scores(text)}
found = [{"scores": scores(text), "answer": answer(text, given["short"])} for text in given["texts"]]
print(json.dumps(found))
"""


# An answer whose reader goes after its first text: the tokens that are calculated all the same, with what stops them
# and without.
CUT = """
import asyncio, json, sys, threading
from serve_apps.pipeline import app
folder, long = sys.argv[1], int(sys.argv[2])
replica = app.Generator.func_or_class(app.Model(model_path=folder, dtype="float32"))
replica.reconfigure({"max_new_tokens": long})
class Counted(app.Feed):
    made = 0
    def put(self, tokens):
        super().put(tokens)
        Counted.made += 1
class Endless(Counted):
    cut = property(lambda self: False, lambda self, value: None)
async def read_some(feed):
    app.Feed, Counted.made = feed, 0
    wanted = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": long, "temperature": 0, "top_p": None}
    answer, before = replica.answer(wanted), set(threading.enumerate())
    while "text" not in await anext(answer):
        pass
    await answer.aclose()
    for thread in set(threading.enumerate()) - before:
        await asyncio.to_thread(thread.join)
    return Counted.made
print(json.dumps([asyncio.run(read_some(feed)) for feed in (Counted, Endless)]))
"""


def labels(scores: list[dict[str, float]], threshold: float) -> list[str]:
    return [label for label in BLOCKING if any(part[label] >= threshold for part in scores)]


@dataclass(frozen=True)
class Direct:
    """What the two models say by themselves, and a threshold at which there is some of everything."""

    texts: dict[str, dict[str, Any]]
    threshold: float

    @property
    def blocked(self) -> list[str]:
        return [text for text in self.texts if labels(self.texts[text]["scores"], self.threshold)]

    @property
    def withheld(self) -> list[str]:
        """Texts that pass, with answers that do not."""
        passing = [text for text in self.texts if text not in self.blocked]
        return [text for text in passing if labels(self.texts[text]["answer"]["scores"], self.threshold)]

    @property
    def passing(self) -> list[str]:
        return [text for text in self.texts if text not in {*self.blocked, *self.withheld}]

    @property
    def only_at_the_end(self) -> list[str]:
        """Texts whose first part would pass."""
        return [text for text in self.blocked if not labels(self.texts[text]["scores"][:1], self.threshold)]

    def rich(self) -> bool:
        return all(len(kind) >= 2 for kind in (self.blocked, self.withheld, self.passing, self.only_at_the_end))


def with_threshold(said: list[dict[str, Any]]) -> Direct:
    texts = dict(zip(TEXTS, said, strict=True))
    parts = [part for item in said for part in item["scores"] + item["answer"]["scores"]]
    scores = sorted(part[label] for part in parts for label in BLOCKING)
    # Between two scores, and not close to any.
    gaps = [((low + high) / 2, high - low) for low, high in itertools.pairwise(scores)]
    for threshold, _ in sorted((gap for gap in gaps if gap[1] > 1e-3), key=lambda gap: -gap[1]):
        if (found := Direct(texts, round(threshold, 6))).rich():
            return found
    raise AssertionError("these weights block all or nothing: choose another seed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, engine: Path) -> Iterator[Site]:
    with app_site(tmp_path_factory.mktemp("site"), engine) as made:
        yield made


def python(engine: Path, *arguments: str, text: str | None = None) -> str:
    # One thread, as a replica of one CPU has.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(engine / "bin/python"), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folders(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("models")
    found = {name: str(home / name) for name in ("generator", "classifier")}
    python(engine, str(MAKER), "--out", found["generator"])
    python(engine, "-c", MAKE_CLASSIFIER, found["generator"], found["classifier"])
    return found


@pytest.fixture(scope="module")
def direct(engine: Path, folders: dict[str, str]) -> Direct:
    given = {**folders, "texts": TEXTS, "short": SHORT}
    return with_threshold(json.loads(python(engine, "-c", DIRECT, text=json.dumps(given))))


@pytest.fixture(scope="module")
def client(site: Site, folders: dict[str, str], direct: Direct) -> openai.OpenAI:
    site.apps["moderated"] = {
        "name": "moderated",
        "template": "pipeline",
        "route_prefix": "/moderated",
        "parameters": {
            "model_id": "chat",
            "max_prompt_chars": 4096,
            "classifier": {
                "model_source": {"folder": folders["classifier"]},
                "block_labels": BLOCKING,
                "threshold": direct.threshold,
                "batch_wait_timeout_s": 0.1,
                "num_replicas": 1,
            },
            "generator": {
                "model_source": {"folder": folders["generator"]},
                "dtype": "float32",
                "max_new_tokens": LONG,
                # One at a time: the next one begins when the one before has ended.
                "max_ongoing_requests": 1,
                "num_replicas": 1,
            },
        },
    }
    site.serve()
    return openai.OpenAI(base_url=site.url("/moderated/v1"), api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, text: str, **more: Any) -> Any:
    given: dict[str, Any] = {"temperature": 0, "max_tokens": SHORT, **more}
    return client.chat.completions.create(model="chat", messages=[{"role": "user", "content": text}], **given)


def test_what_is_blocked_and_answered_is_what_the_models_say(client: openai.OpenAI, direct: Direct) -> None:
    """All at once, so that texts of different lengths come into one batch."""

    def one(text: str) -> None:
        said = direct.texts[text]
        if text in direct.blocked:
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, text)
            assert caught.value.code == "content_policy_violation"
            assert caught.value.body["categories"] == labels(said["scores"], direct.threshold)  # type: ignore[index]
            return
        answer = ask(client, text)
        (choice,) = answer.choices
        counted = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
        assert counted == (said["answer"]["prompt"], said["answer"]["tokens"])
        if text in direct.withheld:
            assert (choice.finish_reason, choice.message.content) == ("content_filter", None)
            for label in labels(said["answer"]["scores"], direct.threshold):
                assert label in choice.message.refusal
            return
        assert choice.message.content == said["answer"]["text"]
        assert choice.finish_reason == ("length" if said["answer"]["tokens"] == SHORT else "stop")

    with ThreadPoolExecutor(8) as many:
        list(many.map(one, TEXTS))
    assert [model.id for model in client.models.list()] == ["chat"]


def test_a_stream_is_the_same_text_and_its_prompt_is_looked_at(client: openai.OpenAI, direct: Direct) -> None:
    # The answers of the second are withheld where they are no streams: this one is with the client before its end.
    for text in (direct.passing[0], direct.withheld[0]):
        said = direct.texts[text]["answer"]
        events = list(ask(client, text, stream=True, stream_options={"include_usage": True}))
        choices = [event.choices[0] for event in events if event.choices]
        assert "".join(choice.delta.content or "" for choice in choices) == said["text"]
        assert len(choices) > 5
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == [
            "length" if said["tokens"] == SHORT else "stop"
        ]
        assert events[-1].usage.total_tokens == said["prompt"] + said["tokens"]
        assert len({event.id for event in events}) == 1
    with pytest.raises(openai.BadRequestError, match="content policy"):
        ask(client, direct.blocked[0], stream=True)


def test_every_message_is_looked_at(client: openai.OpenAI, direct: Direct) -> None:
    fine, bad = direct.passing[0], direct.only_at_the_end[0]
    for role in ("system", "user", "assistant"):
        history: Any = [{"role": role, "content": bad}, {"role": "user", "content": fine}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="chat", messages=history)
        assert caught.value.code == "content_policy_violation"


@pytest.mark.parametrize(
    ("more", "kind", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, "string_above_max_length"),
        ({"max_tokens": LONG + 1}, openai.BadRequestError, None),
        ({"max_tokens": LONG + 1, "stream": True}, openai.BadRequestError, None),
        ({"seed": 7}, openai.BadRequestError, "unsupported_parameter"),
        ({"temperature": 3}, openai.BadRequestError, None),
    ],
)
def test_errors_are_openais(client: openai.OpenAI, direct: Direct, more: dict[str, Any], kind: Any, code: Any) -> None:
    messages = [{"role": "user", "content": direct.passing[0]}]
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "chat", "messages": messages, **more})
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", b"no json", 400),
        ("GET", "/v1/chat/completions", b"", 405),
        ("GET", "/v1/nothing", b"", 404),
    ],
)
def test_what_is_no_request_at_all(
    site: Site, client: openai.OpenAI, method: str, path: str, content: bytes, status: int
) -> None:
    answer = httpx.request(method, site.url(f"/moderated{path}"), content=content, timeout=60)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_an_answer_that_nobody_reads_is_not_calculated(engine: Path, folders: dict[str, str]) -> None:
    made, without = json.loads(python(engine, "-c", CUT, folders["generator"], str(LONG)))
    assert made < LONG / 2 < LONG < without  # the prompt is the first thing that is put


def test_a_client_that_goes_leaves_its_place(client: openai.OpenAI, direct: Direct) -> None:
    text = direct.passing[0]
    before = time.monotonic()
    assert sum(1 for _ in ask(client, text, stream=True, max_tokens=LONG)) > LONG / 4
    whole = time.monotonic() - before

    stream = ask(client, text, stream=True, max_tokens=LONG)
    next(stream)
    stream.close()
    before = time.monotonic()
    # The only place of the only generator is free before the other one would have ended.
    list(ask(client, text, stream=True, max_tokens=1))
    assert time.monotonic() - before < whole / 2


def test_another_threshold_replaces_nothing(site: Site, client: openai.OpenAI, direct: Direct) -> None:
    (model,) = client.models.list()
    site.apps["moderated"]["parameters"]["classifier"]["threshold"] = 1
    assert site.serve() == 1
    assert ask(client, direct.blocked[0]).choices[0].message.content
    assert [item.created for item in client.models.list()] == [model.created]
    assert site.serve() == 0


def test_what_finds_no_place_is_told_so(site: Site, client: openai.OpenAI, direct: Direct) -> None:
    """One is answered, one may wait, and the rest is refused in OpenAI's shape."""
    site.apps["moderated"]["parameters"]["generator"]["max_queued_requests"] = 1
    assert site.serve() == 1

    def one(_: int) -> Any:
        try:
            return ask(client, direct.passing[0], max_tokens=LONG).choices[0].finish_reason
        except openai.InternalServerError as error:
            return error.status_code, error.code, error.body["type"]  # type: ignore[index]

    with ThreadPoolExecutor(6) as many:
        answers = list(many.map(one, range(6)))
    assert (503, "unavailable", "server_error") in answers
    assert {answer for answer in answers if isinstance(answer, str)} == {"length"}
    assert {answer for answer in answers if not isinstance(answer, str)} == {(503, "unavailable", "server_error")}
