"""The `llm_pd` app on a real Ray: two engines of random weights, the KV cache of a prompt goes as files from one to
the other.

Needs an engine environment; CLUSTERKIT_TEST_ENGINE names one, else it is made.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.app_site import app_site
from tests.e2e.llm_site import MAKER, WAIT_S, LlmApp, python
from tests.support import ROOT, until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

README = ROOT / "serve_apps/llm_pd/README.md"
PREFILL, DECODE = "Prefill_", "Decode_"
TOKENS = 12
# Of two blocks of the KV cache and more: only whole blocks are handed over.
BLOCK = 32
LONG = "A server wakes before anyone has asked it for anything, and counts its memory. " * 6

# What transformers say to the same prompt.
DIRECT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
ids = tokenizer(prompt, return_tensors="pt")
with torch.inference_mode():
    said = model.generate(**ids, do_sample=False, max_new_tokens=most)[0, ids["input_ids"].shape[1] :]
print(json.dumps({"text": tokenizer.decode(said, skip_special_tokens=True), "prompt": ids["input_ids"].shape[1]}))
"""
# Another cache of the same shape.
FORGE = """
import pathlib, sys, torch
from safetensors.torch import load_file, save_file
for path in pathlib.Path(sys.argv[1]).rglob("*.safetensors"):
    save_file({name: torch.randn_like(tensor) * 100 for name, tensor in load_file(path).items()}, path)
"""


class Chat(LlmApp):
    store: Path

    def complete(self, prompt: str) -> str:
        answer = self.post("/completions", {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def folder(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    python(engine, str(MAKER), "--out", str(path))
    return path


@pytest.fixture(scope="module")
def chat(engine: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with app_site(tmp_path_factory.mktemp("site"), engine) as site:
        chat = Chat(site, README, str(folder))
        chat.store = tmp_path_factory.mktemp("kv")
        chat.parameters["connector"] = {"kind": "files", "folder": str(chat.store)}
        # No cache of its own: what decode does not calculate has to come from prefill.
        kwargs = {"dtype": "float32", "block_size": BLOCK, "enable_prefix_caching": False, "max_model_len": 1024}
        for half in ("prefill", "decode"):
            chat.parameters[half] = {"num_replicas": 1, "engine_kwargs": kwargs}
        site.serve()
        numbers = [len(chat.processes(half)) for half in (PREFILL, DECODE)]
        assert numbers == [1, 1]
        yield chat


def test_an_answer_comes_from_both_halves(chat: Chat, engine: Path, folder: Path) -> None:
    direct = json.loads(python(engine, "-c", DIRECT, str(folder), LONG, str(TOKENS)))
    assert direct["prompt"] > 2 * BLOCK
    name = uuid.uuid4().hex
    asked = {"prompt": LONG, "max_tokens": TOKENS, "temperature": 0}
    answer = chat.post("/completions", asked, **{"x-request-id": name}).json()
    assert answer["choices"][0]["text"] == direct["text"]
    # Prefill's one token is nobody's.
    assert answer["usage"] == {**answer["usage"], "prompt_tokens": direct["prompt"], "completion_tokens": TOKENS}
    assert {chat.answered(name, PREFILL), chat.answered(name, DECODE)} == {
        *chat.processes(PREFILL),
        *chat.processes(DECODE),
    }


def test_decode_goes_on_from_what_prefill_has_left(chat: Chat, engine: Path) -> None:
    """With another cache in its place the same question has another answer."""
    said = chat.complete(LONG)
    assert chat.complete(LONG) == said
    assert list(chat.store.rglob("*.safetensors"))
    python(engine, "-c", FORGE, str(chat.store))
    assert chat.complete(LONG) != said


def test_what_clients_rely_on(chat: Chat) -> None:
    client = openai.OpenAI(base_url=chat.site.url("/v1"), api_key="none", max_retries=0, timeout=WAIT_S)
    model = chat.parameters["model_id"]
    assert [item.id for item in client.models.list()] == [model]
    # Shorter than a block: nothing is handed over.
    ask: Any = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model=model, messages=ask, max_tokens=TOKENS, temperature=0)
    stream = client.chat.completions.create(model=model, messages=ask, max_tokens=TOKENS, temperature=0, stream=True)
    parts = [event.choices[0].delta.content or "" for event in stream if event.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert len(parts) > 2
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=ask)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "word " * 5000}])


def test_a_half_scales_by_itself(chat: Chat) -> None:
    before = chat.processes(PREFILL) | chat.processes(DECODE)
    chat.parameters["prefill"]["num_replicas"] = 2
    assert chat.site.serve() == 1
    until(lambda: len(chat.processes(PREFILL)) == 2, "there is no other prefill replica", WAIT_S)
    assert before.items() <= (chat.processes(PREFILL) | chat.processes(DECODE)).items()
    answered = {chat.answered(name, PREFILL) for name in [named(chat) for _ in range(12)]}
    assert answered == set(chat.processes(PREFILL))
    assert chat.site.serve() == 0


def named(chat: Chat) -> str:
    name = uuid.uuid4().hex
    asked = {"prompt": "hello", "max_tokens": 1}
    assert chat.post("/completions", asked, **{"x-request-id": name}).status_code == 200
    return name
