"""Parameters of an `llm_lora` app: one model of `llm`, and the adapters that go with it."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, field_validator, model_validator

from serve_apps.llm.parameters import LlmParameters, MadeModel, ModelSource
from serve_apps.replicas import Strict

# Engine arguments that the template sets, beside those of `llm`.
OWNED_ENGINE_KWARGS = {
    "enable_lora": "this template sets it",
    "max_loras": "set the parameter max_loras",
    "max_lora_rank": "set the parameter max_lora_rank",
    "max_cpu_loras": "set the parameter max_num_adapters_per_replica",
    "lora_modules": "list the adapters in the parameter adapters",
}


class Adapter(Strict):
    """A LoRA adapter in PEFT's layout: adapter_config.json beside its weights."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        description="clients ask for it as `model_id:id`"
    )
    source: ModelSource = Field(
        description="where it comes from: `{hub: org/name, revision: commit}` or `{folder: /path}`"
    )

    @field_validator("source")
    @classmethod
    def _is_an_adapter(cls, value: ModelSource) -> ModelSource:
        if isinstance(value, MadeModel):
            raise ValueError("tiny-llama is no adapter: name one by hub or folder")
        return value


class LlmLoraParameters(LlmParameters):
    """One model and its adapters, served with the OpenAI API."""

    adapters: tuple[Adapter, ...] = Field(
        (), description="each with `id` and `source`; more or fewer of them restart no engine"
    )
    max_num_adapters_per_replica: StrictInt = Field(
        16, ge=1, description="adapters that a replica keeps in its host's memory; others are read when they are asked"
    )
    max_loras: StrictInt = Field(
        4, ge=1, description="adapters that the engine calculates at a time, for which it sets GPU memory aside"
    )
    # What vLLM has (config/lora.py of 0.32.0); Ray LLM would only fail to start with another.
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = Field(
        16, description="the largest rank of an adapter: 1, 8, 16, 32, 64, 128, 256, 320 or 512"
    )

    @model_validator(mode="before")
    @classmethod
    def _say_what_is_the_templates(cls, value: Any) -> Any:
        for name in ("server_class", "user_config"):
            if isinstance(value, dict) and name in value:
                raise ValueError(f"{name}: this template has its own; take it out, or use the template llm")
        return value

    @field_validator("engine_kwargs")
    @classmethod
    def _check_lora_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in OWNED_ENGINE_KWARGS:
                raise ValueError(f"{name} does not belong here: {OWNED_ENGINE_KWARGS[name]}")
        return value

    @field_validator("adapters")
    @classmethod
    def _check_ids(cls, value: tuple[Adapter, ...]) -> tuple[Adapter, ...]:
        twice = [name for name, number in Counter(adapter.id for adapter in value).items() if number > 1]
        if twice:
            raise ValueError(f"the id {twice[0]!r} is there more than once: give each adapter its own")
        return value

    @model_validator(mode="after")
    def _check_adapters(self) -> LlmLoraParameters:
        if self.max_loras > self.max_num_adapters_per_replica:
            raise ValueError(
                f"max_loras ({self.max_loras}) is above max_num_adapters_per_replica "
                f"({self.max_num_adapters_per_replica}): what is calculated has to be there"
            )
        return self
