"""Helpers of the end-to-end tests: commands as a user gives them, and the official OpenAI client."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
# A site's own way to packages: its mirrors and certificates.
SITE_SETTINGS = ("PIP_", "SSL_CERT", "REQUESTS_CA", "http_proxy", "https_proxy", "no_proxy", "HTTP_", "HTTPS_", "NO_")


def site_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(SITE_SETTINGS)}


def check_openai(base_url: str, model: str = "tiny-llama") -> None:
    """What any OpenAI client relies on: models, chat, streaming, and errors of the right class."""
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
    assert model in [item.id for item in client.models.list()]
    ask = [{"role": "user", "content": "Say something."}]

    answer = client.chat.completions.create(model=model, messages=ask, max_tokens=8)
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8

    chunks = list(
        client.chat.completions.create(
            model=model, messages=ask, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len(chunks) > 2
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens >= 1

    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=ask)
    long = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=long)


def run(command: list[str], *, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
