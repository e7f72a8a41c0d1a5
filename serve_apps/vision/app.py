"""The app that replicas run: labels for an image, those of many requests in one batch.

Two deployments: a cheap ingress that stays, and classifiers that come when it asks them. Needs what every engine has:
Ray Serve, FastAPI, Pillow, PyTorch, transformers. The last three are imported in the replicas: the app is built on the
head, too. No `annotations` of the future: Serve and FastAPI look at the types themselves.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_apps.openai_api import Refused, models, new_api
from serve_apps.vision.image import FORMATS, Limits, decoded, look, wanted_image


class Settings(BaseModel):
    """`args` of the app."""

    model_id: str
    model_path: str
    dtype: str = "float32"
    device: str = "cpu"
    readers: int = 1


@serve.deployment
class Classifier:
    def __init__(self, settings: Settings) -> None:
        import torch
        import transformers

        self.settings, self.torch, self.dtype = settings, torch, getattr(torch, settings.dtype)
        # The same numbers on every host, whether it has torchvision or not.
        pillow: dict[str, Any] = {"backend": "pil"}
        if int(transformers.__version__.partition(".")[0]) < 5:
            pillow = {"use_fast": False}
        self.processor = transformers.AutoImageProcessor.from_pretrained(settings.model_path, **pillow)
        model = transformers.AutoModelForImageClassification.from_pretrained(settings.model_path)
        if settings.device == "cuda":
            # On a GPU that others share, no more of its memory than Ray gave.
            share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1)
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        self.model = model.to(device=settings.device, dtype=self.dtype).eval()
        self.names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
        # Labels that exclude each other share one; such as each may be true by itself have one each.
        self.alone = model.config.problem_type == "multi_label_classification" or len(self.names) == 1
        # Images are read side by side; a model is not made for two.
        self.reading, self.working = ThreadPoolExecutor(settings.readers), ThreadPoolExecutor(1)
        self._warm()

    def _warm(self) -> None:
        # The first one on a GPU takes seconds. An image that is as large as some, for what cannot enlarge.
        from PIL import Image

        self._work([self._pixels(Image.new("RGB", (640, 480)))])

    def reconfigure(self, batches: dict[str, Any]) -> None:
        """`user_config`; running replicas take it."""
        self._score.set_max_batch_size(int(batches["max_batch_size"]))
        self._score.set_batch_wait_timeout_s(float(batches["batch_wait_timeout_s"]))

    async def labels(self) -> dict[str, Any]:
        return {"labels": self.names, "multi_label": self.alone}

    async def classify(self, data: bytes, top_k: int) -> dict[str, Any]:
        """The best labels; `refused` where the image is broken: an exception would not come as it is."""
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(self.reading, self._read, data)
        except Refused as error:
            shaped = error.body["error"]
            return {"refused": (shaped["message"], shaped["param"], shaped["code"], error.status)}
        scores = await self._score(pixels)
        best = sorted(range(len(scores)), key=lambda number: -scores[number])[:top_k]
        return {"labels": [{"label": self.names[n], "index": n, "score": scores[n]} for n in best]}

    def _read(self, data: bytes) -> Any:
        return self._pixels(decoded(data))

    def _pixels(self, image: Any) -> Any:
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]

    @serve.batch
    async def _score(self, batch: list[Any]) -> list[list[float]]:
        return await asyncio.get_running_loop().run_in_executor(self.working, self._work, batch)

    def _work(self, batch: list[Any]) -> list[list[float]]:
        """The scores of all labels, in the order of the batch. Most models have one size of image; those that have
        several are given each by itself."""
        found: list[list[float]] = [[] for _ in batch]
        for shape in {tuple(pixels.shape) for pixels in batch}:
            same = [number for number, pixels in enumerate(batch) if tuple(pixels.shape) == shape]
            stacked = self.torch.stack([batch[number] for number in same])
            with self.torch.inference_mode():
                logits = self.model(pixel_values=stacked.to(self.settings.device, self.dtype)).logits.float()
                scores = logits.sigmoid() if self.alone else logits.softmax(-1)
            for number, row in zip(same, scores.tolist(), strict=True):
                found[number] = row
        return found


api = new_api()


@serve.deployment
@serve.ingress(api)
class Ingress:
    def __init__(self, settings: Settings, classifier: DeploymentHandle) -> None:
        self.settings, self.classifier, self.created = settings, classifier, int(time.time())
        self.known: dict[str, Any] | None = None

    def reconfigure(self, given: dict[str, Any]) -> None:
        """`user_config`; running replicas take it."""
        self.limits = Limits(given["max_image_bytes"], given["max_pixels"], given["top_k"])
        self.patience_s = float(given["response_timeout_s"])

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return models(self.settings.model_id, self.created)

    @api.get("/v1/labels")
    async def labels(self) -> JSONResponse:
        """What the model can say, and what it takes. The first one wakes it; then this replica knows."""
        if self.known is None:
            self.known = await self._ask("labels")
        takes = {
            "formats": FORMATS,
            "max_image_bytes": self.limits.max_image_bytes,
            "max_pixels": self.limits.max_pixels,
        }
        return JSONResponse({"model": self.settings.model_id, **self.known, "takes": takes, "top_k": self.limits.top_k})

    @api.post("/v1/classify")
    async def classify(self, request: Request) -> JSONResponse:
        wanted = await wanted_image(request, self.limits)
        if wanted.model not in (None, self.settings.model_id):
            raise Refused(f"there is no model {wanted.model!r} here", "model", "model_not_found", 404)
        # Here, before anybody is woken for it.
        seen = look(wanted.data, self.limits.max_pixels)
        answer = await self._ask("classify", wanted.data, wanted.top_k)
        if "refused" in answer:
            raise Refused(*answer["refused"])
        return JSONResponse({"model": self.settings.model_id, "image": seen, **answer})

    async def _ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        """A classifier's answer. Where there is none, Serve starts one for the request that waits here."""
        response = getattr(self.classifier, method).remote(*arguments)
        try:
            found: dict[str, Any] = await asyncio.wait_for(response, self.patience_s)
            return found
        except TimeoutError:
            response.cancel()
            problem = f"there was no answer for {self.patience_s:g} s; the model may be starting: ask again later"
            raise Refused(problem, code="unavailable", status=503) from None
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise Refused(str(error), code="unavailable", status=503) from None


def build(settings: Settings) -> serve.Application:
    """Serve calls it with the app's `args`."""
    return Ingress.bind(settings, Classifier.bind(settings))
