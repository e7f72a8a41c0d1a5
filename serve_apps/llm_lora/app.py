"""What Ray LLM's server and ingress lack for adapters that lie on the host: its own loader reads only clouds' stores.

Needs Ray 2.60 and vLLM. The classes have Ray's names, by which deployments are known.
"""

import asyncio
import hashlib
from typing import Any

from ray import serve
from ray.serve.llm import deployment, ingress
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from serve_apps.openai_api import Refused


class LLMServer(deployment.LLMServer):
    """A model whose adapters are told to it by `user_config`: {"adapters": {id: folder}}."""

    def _init_multiplex_loader(self, model_downloader_cls: Any = None) -> None:
        self._adapters: dict[str, str] = {}
        self._loading = asyncio.Lock()

        async def load(name: str) -> str:
            await self._load(name)
            return name

        # Serve learns from it which replica has which adapter, and sends requests there.
        most = self._llm_config.lora_config.max_num_adapters_per_replica
        self._load_model = serve.multiplexed(max_num_models_per_replica=most)(load)

    async def start(self) -> None:
        await super().start()
        models = self.engine._oai_models
        engines_name = models.model_name

        def model_name(lora_request: Any = None) -> str:
            return str(engines_name(lora_request)).partition("@")[0]

        # What an answer says of its model; see `_load`.
        models.model_name = model_name

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        base = self._llm_config.model_id
        self._adapters = {f"{base}:{name}": path for name, path in user_config["adapters"].items()}

    async def _maybe_resolve_lora_from_multiplex(self) -> None:
        name = serve.get_multiplexed_model_id()
        if not name:
            return
        if name not in self._adapters:
            raise unknown(name)
        await self._load_model(name)
        # Serve still counts it as loaded where it was declared anew, with other weights.
        loaded = self.engine._oai_models.lora_requests.get(name)
        if loaded is None or loaded.lora_path != self._adapters.get(name):
            await self._load(name)

    async def _load(self, name: str) -> None:
        """Gives the engine an adapter, or tells it that this is not the one to drop next.

        vLLM takes two adapters of one name for the same, even in one batch (LoRARequest.__eq__ of 0.32.0). Other
        weights get another name, so that answers that have begun end with those that they began with.
        """
        from vllm.lora.request import LoRARequest

        models = self.engine._oai_models
        async with self._loading:
            path = self._adapters.get(name)
            if path is None:
                raise unknown(name)
            wanted = models.lora_requests.get(name)
            if wanted is None or wanted.lora_path != path:
                version = hashlib.sha256(path.encode()).hexdigest()[:8]
                wanted = LoRARequest(f"{name}@{version}", models.lora_id_counter.inc(1), path)
            try:
                await models.engine_client.add_lora(wanted)
            except Exception as error:
                last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise HTTPException(503, f"the adapter {name} cannot be loaded: {last}") from None
            models.lora_requests[name] = wanted


class OpenAiIngress(ingress.OpenAiIngress):
    """Knows the adapters by `user_config`: {"adapters": [id]}."""

    _adapters: tuple[str, ...] = ()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        (base,) = self._model_cards
        self._adapters = tuple(f"{base}:{name}" for name in user_config["adapters"])

    async def _get_model_id(self, model: str | None) -> str:
        name: str = await super()._get_model_id(model)
        # A replica would be looked for before anybody looked for the adapter.
        if name not in self._model_cards and name not in self._adapters:
            raise unknown(name)
        return name

    async def _process_llm_request(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._process_llm_request(*args, **kwargs)
        except HTTPException as error:
            code = "model_not_found" if error.status_code == 404 else None
            return JSONResponse(Refused(error.detail, "model", code, error.status_code).body, error.status_code)

    async def model(self, model_id: str) -> Any:
        if model_id not in self._adapters:
            return await super().model(model_id)
        (base,) = self._model_cards.values()
        return base.model_copy(update={"id": model_id, "metadata": {**base.metadata, "base_model_id": base.id}})

    async def models(self) -> Any:
        listed = await super().models()
        return listed.model_copy(update={"data": [*listed.data, *[await self.model(name) for name in self._adapters]]})


def unknown(name: str) -> HTTPException:
    return HTTPException(404, f"there is no model {name}; GET /v1/models lists those that there are")
