"""What a request for a chat asks for, and what its answer is made of: nothing that needs Ray or a model."""

from __future__ import annotations

from typing import Any

from serve_apps.openai_api import Refused

# What of OpenAI's request is obeyed; `user` and the like are about OpenAI's own accounts.
OBEYED = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
}
PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Others are refused where they ask for something: an answer that is not what was asked for is none.
ASKS_NOTHING: dict[str, list[Any]] = {
    "n": [1],
    "logprobs": [False],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "response_format": [{"type": "text"}],
    "stop": [[]],
    "tools": [[]],
}
# OpenAI's newer name of what models are trained with.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def wanted_chat(body: Any) -> dict[str, Any]:
    """What the generator is to do: messages, max_tokens, temperature, top_p. Refused where it cannot."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    if not isinstance(body.get("model"), str):
        raise Refused("you must provide a model parameter", "model")
    for name, value in body.items():
        if name not in OBEYED | PASSED_OVER and value is not None and value not in ASKS_NOTHING.get(name, []):
            raise Refused(f"this server cannot do {name} as asked", name, "unsupported_parameter")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list, and not empty", "messages")
    limits = [body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    if any(not isinstance(limit, int) or isinstance(limit, bool) or limit < 1 for limit in limits):
        raise Refused("max_tokens must be a whole number above 0", "max_tokens")
    return {
        "messages": [wanted_message(number, message) for number, message in enumerate(messages)],
        "max_tokens": limits[0] if limits else None,
        "temperature": wanted_number(body, "temperature", 2),
        "top_p": wanted_number(body, "top_p", 1),
    }


def wanted_message(number: int, message: Any) -> dict[str, str]:
    where = f"messages[{number}]"
    role = ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
    if role is None:
        raise Refused(f"{where} must have a role: {', '.join(ROLES)}", "messages")
    if message.get("tool_calls"):
        raise Refused(f"{where}: this server knows no tools", "messages", "unsupported_parameter")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    given = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    texts = [text for text in given if isinstance(text, str)]
    if not texts or len(texts) != len(parts):
        raise Refused(f"{where} must have a text as its content, or a list of parts that are texts", "messages")
    return {"role": role, "content": "\n".join(texts)}


def wanted_number(body: dict[str, Any], name: str, most: float) -> float | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most):
        raise Refused(f"{name} must be a number from 0 to {most:g}", name)
    return value


def wanted_stream(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the answer is to be a stream, and whether its usage is wanted at the end."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refused("stream_options must be an object", "stream_options")
    return bool(body.get("stream")), bool(options.get("include_usage"))


def sampling(wanted: dict[str, Any]) -> dict[str, Any]:
    """What the client says; all else is as the model's generation_config.json has it."""
    if wanted["temperature"] == 0 or wanted["top_p"] == 0:
        return {"do_sample": False}
    given = {name: float(wanted[name]) for name in ("temperature", "top_p") if wanted[name] is not None}
    return {"do_sample": True, **given} if given else {}


class Text:
    """The text of tokens that come one by one; half a character waits for its other half."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        # Whole characters end here; what comes before it is decoded again for the space between words.
        self.start = self.said = 0

    def add(self, tokens: list[int], last: bool = False) -> str:
        self.tokens += tokens
        before = self._decoded(self.tokens[self.start : self.said])
        text = self._decoded(self.tokens[self.start :])
        if not last and (text.endswith("\ufffd") or len(text) <= len(before)):
            return ""
        self.start, self.said = self.said, len(self.tokens)
        return text[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
