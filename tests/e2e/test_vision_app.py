"""The `vision` app on a real Ray, with a small ResNet of random weights: labels against what the model says by itself,
from no replica to several and back.

Needs an engine environment; CLUSTERKIT_TEST_ENGINE names one.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT
from tests.e2e.test_app_templates import Site
from tests.support import until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

README = (ROOT / "serve_apps/vision/README.md").read_text(encoding="utf-8")
LABELS = 12

# A model, images of all kinds, and what the model says of each: transformers alone, one image at a time.
MAKE = """
import json, sys
from pathlib import Path
import numpy, torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification
home = Path(sys.argv[1])
torch.manual_seed(3)
names = {number: f"kind {number}" for number in range(int(sys.argv[2]))}
config = ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic",
    id2label=names, label2id={name: number for number, name in names.items()},
)
model = ResNetForImageClassification(config).eval()
with torch.no_grad():
    model.classifier[1].weight *= 30  # or all images get nearly the same
model.save_pretrained(home / "model")
ConvNextImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(home / "model")

def pattern(seed, width, height):
    random = numpy.random.default_rng(seed)
    small = random.integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)

files = {f"{seed}.png": (pattern(seed, 90, 70), {}) for seed in range(6)}
files["photo.jpg"] = (pattern(10, 800, 600), {"quality": 90})
files["gray.jpg"] = (pattern(11, 120, 120).convert("L"), {})
files["cmyk.jpg"] = (pattern(12, 120, 120).convert("CMYK"), {})
files["palette.gif"] = (pattern(13, 100, 80).convert("P"), {})
files["alpha.png"] = (pattern(14, 100, 80).convert("RGBA"), {})
files["some.webp"] = (pattern(15, 100, 80), {"lossless": True})
files["some.bmp"] = (pattern(16, 100, 80), {})
turned = pattern(17, 200, 100)
exif = turned.getexif()
exif[0x0112] = 6
files["turned.jpg"] = (turned, {"exif": exif})
moving = pattern(18, 64, 64).convert("P")
files["moving.gif"] = (moving, {"save_all": True, "append_images": [pattern(19, 64, 64).convert("P")]})

for name, (image, options) in files.items():
    image.save(home / name, **options)
processor = AutoImageProcessor.from_pretrained(home / "model", backend="pil")
model, found = ResNetForImageClassification.from_pretrained(home / "model").eval(), {}
for name in files:
    image = ImageOps.exif_transpose(Image.open(home / name)).convert("RGB")
    with torch.inference_mode():
        scores = model(**processor(images=image, return_tensors="pt")).logits[0].softmax(-1).tolist()
    found[name] = {"scores": scores, "size": Image.open(home / name).size}

Image.fromarray(numpy.arange(10000, dtype=numpy.uint16).reshape(100, 100)).save(home / "deep.png")
Image.new("RGB", (10, 10)).save(home / "some.tiff")
whole = (home / "photo.jpg").read_bytes()
(home / "broken.jpg").write_bytes(whole[: len(whole) // 3])
print(json.dumps(found))
"""


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 3,600,000,000 pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    made = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + made


class Vision:
    """The app, and what the model alone says of each image."""

    def __init__(self, site: Site, home: Path, direct: dict[str, Any]) -> None:
        self.site, self.home, self.direct = site, home, direct
        self.url = site.url("/vision")
        # One for all: each has certificates to read, which takes longer than an image.
        self.http = httpx.Client(timeout=300)

    def apply(self, **parameters: Any) -> int:
        """How many tasks changed something."""
        (app,) = [item for item in self.site.apps.values() if item["template"] == "vision"]
        app["parameters"] |= parameters
        return self.site.serve()

    def replicas(self, deployment: str = "Classifier") -> list[int]:
        """The processes of its running replicas, as Serve's own API says."""
        token = (self.site.folder / "host/state/node/token").read_text().strip()
        url = f"http://127.0.0.1:{self.site.ports['dashboard']}/api/serve/applications/"
        answer = self.http.get(url, headers={"Authorization": f"Bearer {token}"}).json()
        found = answer["applications"]["vision"]["deployments"][deployment]["replicas"]
        return [item["pid"] for item in found if item["state"] == "RUNNING"]

    def post(self, data: bytes, kind: str = "image/png", query: str = "") -> httpx.Response:
        return self.http.post(f"{self.url}/v1/classify{query}", content=data, headers={"content-type": kind})

    def check(self, name: str, answer: Any, top_k: int = 5) -> None:
        scores = self.direct[name]["scores"]
        best = sorted(range(LABELS), key=lambda number: -scores[number])[:top_k]
        found = answer["labels"]
        assert [item["index"] for item in found] == best
        assert [item["label"] for item in found] == [f"kind {number}" for number in best]
        assert all(abs(item["score"] - scores[item["index"]]) < 1e-5 for item in found)
        assert [answer["image"]["width"], answer["image"]["height"]] == self.direct[name]["size"]


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vision]:
    given = os.environ.get("CLUSTERKIT_TEST_ENGINE")
    if not given:
        pytest.skip("needs an engine environment: CLUSTERKIT_TEST_ENGINE=/path/of/its/venv")
    home = tmp_path_factory.mktemp("images")
    # One thread, as a replica of one CPU has.
    command = [f"{given}/bin/python", "-c", MAKE, str(home), str(LABELS)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    site = Site(tmp_path_factory.mktemp("site"), Path(given))
    try:
        site.start()
        site.apps["vision"] = {
            "name": "vision",
            "template": "vision",
            "route_prefix": "/vision",
            "parameters": {
                "model_id": "resnet",
                "model_source": {"folder": str(home / "model")},
                "max_replicas": 3,
                "target_ongoing_requests": 0.5,
                "max_batch_size": 4,
                "max_ongoing_requests": 8,
                "upscale_delay_s": 1,
                # Nothing goes until the last test lets it.
                "downscale_delay_s": 3600,
                "batch_wait_timeout_s": 0.05,
                "max_image_mib": 1,
            },
        }
        assert site.serve() == 2
        yield Vision(site, home, json.loads(done.stdout))
    finally:
        site.stop()


def test_what_is_no_image_wakes_nobody_and_what_is_does(vision: Vision) -> None:
    assert (vision.replicas(), len(vision.replicas("Ingress"))) == ([], 1)
    assert vision.http.get(f"{vision.url}/v1/models").json()["data"][0]["id"] == "resnet"
    refused = [
        (bomb(), "image/png", 413, "image_too_large"),
        (b"a" * (2**20 + 1), "image/png", 413, "image_too_large"),
        ((vision.home / "some.tiff").read_bytes(), "image/tiff", 415, "unsupported_image"),
        ((vision.home / "deep.png").read_bytes(), "image/png", 415, "unsupported_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "image/jpeg", 415, "unsupported_image"),
        (b"", "image/png", 400, "no_image"),
        (b"a picture", "text/plain", 415, "no_image"),
    ]
    for data, kind, status, code in refused:
        answer = vision.post(data, kind)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    answer = vision.post((vision.home / "0.png").read_bytes(), query="?model=other")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert vision.replicas() == []

    # The request that wakes the model is answered, and not told to come again.
    answer = vision.post((vision.home / "0.png").read_bytes())
    assert answer.status_code == 200, answer.text
    vision.check("0.png", answer.json())
    assert len(vision.replicas()) == 1


def test_the_commands_of_the_readme(vision: Vision) -> None:
    """Curl and Python, as they stand there."""

    def here(text: str) -> str:
        return text.replace("http://HEAD:8000", vision.site.url("")).replace("cat.jpg", str(vision.home / "photo.jpg"))

    (shell,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = here(shell).splitlines()
    said = [
        json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout)
        for line in lines
    ]
    for answer in said[:2]:
        vision.check("photo.jpg", answer, 3)
    assert said[2]["labels"] == [f"kind {number}" for number in range(LABELS)]
    assert said[2]["takes"]["max_image_bytes"] == 2**20

    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", here(program)], capture_output=True, text=True, check=True)
    first = done.stdout.splitlines()[0]
    assert first.rpartition(" ")[0] == said[0]["labels"][0]["label"]


def test_every_kind_of_image_and_every_way_to_bring_it(vision: Vision) -> None:
    for name in vision.direct:
        data = (vision.home / name).read_bytes()
        answer = vision.post(data, "application/octet-stream", f"?top_k={LABELS}")
        assert answer.status_code == 200, (name, answer.text)
        vision.check(name, answer.json(), LABELS)
    scores = [item["scores"] for item in vision.direct.values()]
    assert len({tuple(round(score, 3) for score in row) for row in scores}) == len(scores)

    data = (vision.home / "1.png").read_bytes()
    url = f"{vision.url}/v1/classify"
    form = vision.http.post(url, files={"image": ("x.png", data)}, data={"top_k": "2", "model": "resnet"})
    vision.check("1.png", form.json(), 2)
    text = "data:image/png;base64," + base64.b64encode(data).decode()
    vision.check("1.png", vision.http.post(url, json={"image": text, "top_k": 1000}).json(), LABELS)
    for files, fields in (({"picture": data}, {}), ({"image": data, "other": data}, {}), ({}, {"image": "x"})):
        answer = vision.http.post(url, files=files or {"x": b""}, data=fields)
        assert answer.status_code == 400, answer.text
    answer = vision.http.post(url, files={"image": b"a" * 2**21})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "image_too_large")
    answer = vision.post((vision.home / "broken.jpg").read_bytes(), "image/jpeg")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "broken_image")
    assert vision.http.get(url).json()["error"]["message"]


def test_load_brings_more_and_none_gets_the_answer_of_another(vision: Vision) -> None:
    names = [f"{number}.png" for number in range(6)] + ["photo.jpg"]
    data = {name: (vision.home / name).read_bytes() for name in names}
    enough, sent = threading.Event(), []

    def one(number: int) -> None:
        while not enough.is_set():
            name = names[(number + len(sent)) % len(names)]
            answer = vision.post(data[name], "application/octet-stream")
            assert answer.status_code == 200, answer.text
            vision.check(name, answer.json())
            sent.append(name)

    with ThreadPoolExecutor(16) as many:
        clients = [many.submit(one, number) for number in range(16)]
        try:
            until(lambda: len(vision.replicas()) == 3, "load brought no more", patience_s=400, pause_s=1)
        finally:
            enough.set()
        for client in clients:
            client.result()
    print(f"{len(sent)} images, 0 failed, 3 replicas")


def test_an_edit_replaces_nothing_and_idle_goes_to_zero(vision: Vision) -> None:
    assert vision.apply() == 0
    before = sorted(vision.replicas())
    assert vision.apply(top_k=2, max_pixels=60_000) == 1
    assert sorted(vision.replicas()) == before
    vision.check("0.png", vision.post((vision.home / "0.png").read_bytes()).json(), 2)
    assert vision.post((vision.home / "photo.jpg").read_bytes(), "image/jpeg").status_code == 413

    # From several, while somebody asks for the last time.
    assert vision.apply(downscale_delay_s=1, response_timeout_s=0.5) == 1
    until(lambda: vision.replicas() == [], "it never went to zero", patience_s=240, pause_s=1)
    assert len(vision.replicas("Ingress")) == 1

    # A model takes longer to load than this app lets clients wait: told so, and the model comes for the next.
    answer = vision.post((vision.home / "0.png").read_bytes())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert "may be starting" in answer.json()["error"]["message"]
