"""Long streams of a model, one after the other: what a client sees of a change."""

from __future__ import annotations

import threading

import openai

# From off to a first token: a boot, a container, Ray, an engine.
COLD_S = 420


class Streams(threading.Thread):
    """Long answers, one after the other, until it is told to stop; each ends in `ended`, "length" where it is whole."""

    def __init__(self, url: str, tokens: int = 1900) -> None:
        super().__init__(daemon=True)
        self.tokens = tokens
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=COLD_S)
        self.running, self.enough = threading.Event(), threading.Event()
        self.ended: list[str] = []
        self.start()

    def run(self) -> None:
        while not self.enough.is_set():
            try:
                self.ended.append(self.one())
            except openai.OpenAIError as error:
                self.ended.append(repr(error))

    def one(self) -> str:
        reason = "cut"
        for chunk in self.client.completions.create(
            model="tiny-llama", prompt="Much", max_tokens=self.tokens, stream=True, extra_body={"ignore_eos": True}
        ):
            self.running.set()
            if chunk.choices:
                reason = chunk.choices[0].finish_reason or reason
        return reason

    def stop(self) -> list[str]:
        self.enough.set()
        self.join(COLD_S)
        return self.ended
