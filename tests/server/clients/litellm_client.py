"""Run in an environment of its own: LiteLLM against a server, what it got as JSON at the end.

usage: python litellm_client.py URL MODEL KEY [NAME ...]    NAME: a function below; by default all of ``ALL``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import litellm
import openai

litellm.suppress_debug_info = True
TEXT = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n" * 6
LONG = "hello " * 4000


class Server:
    """The same requests on each of the routes that LiteLLM has to it."""

    def __init__(self, url: str, model: str, key: str) -> None:
        wishes = {"api_key": key, "max_retries": 0, "temperature": 0, "max_tokens": 12}
        self.openai = wishes | {"model": f"openai/{model}", "api_base": url + "/v1"}
        self.legacy = self.openai | {"model": f"text-completion-openai/{model}"}
        self.anthropic = wishes | {"model": f"anthropic/{model}", "api_base": url}

    def chats(self) -> Any:
        return [_whole(litellm.completion(messages=_user(TEXT), **self.openai)) for _ in range(2)]

    def streamed(self) -> Any:
        usage = {"stream_options": {"include_usage": True}}
        return _added(litellm.completion(messages=_user(TEXT), stream=True, **usage, **self.openai))

    def completions(self) -> Any:
        answers = [litellm.text_completion(prompt="def add(a, b):", **at) for at in (self.openai, self.legacy)]
        chunks = litellm.text_completion(prompt="def add(a, b):", stream=True, **self.legacy)
        return [answer.choices[0].text for answer in answers] + ["".join(c.choices[0].text or "" for c in chunks)]

    def messages(self) -> Any:
        """Anthropic's API."""
        streamed = litellm.completion(messages=_user(TEXT), stream=True, **self.anthropic)
        return [_whole(litellm.completion(messages=_user(TEXT), **self.anthropic)), _added(streamed)]

    def response(self) -> Any:
        """OpenAI's Responses API."""
        asked = {name: value for name, value in self.openai.items() if name != "max_tokens"}
        answer = litellm.responses(input=TEXT, max_output_tokens=16, **asked)
        return {"text": answer.output[0].content[0].text, "cached": answer.usage.input_tokens_details.cached_tokens}

    def overflows(self) -> Any:
        return [
            _raised(lambda: litellm.completion(messages=_user(LONG), **self.openai)),
            _raised(lambda: litellm.completion(messages=_user(LONG), stream=True, **self.openai)),
            _raised(lambda: litellm.text_completion(prompt=LONG, **self.legacy)),
            _raised(lambda: litellm.completion(messages=_user(LONG), **self.anthropic)),
        ]

    def strangers(self) -> Any:
        """The wrong key."""
        wrong = {"api_key": "nobody's key"}
        return [
            _raised(lambda: litellm.completion(messages=_user("hello"), **self.openai | wrong)),
            _raised(lambda: litellm.text_completion(prompt="hello", **self.legacy | wrong)),
            _raised(lambda: litellm.completion(messages=_user("hello"), **self.anthropic | wrong)),
        ]


ALL = ("chats", "streamed", "completions", "messages", "response", "overflows")


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _told(text: str | None, reason: str | None, usage: Any) -> dict[str, Any]:
    cached = usage.prompt_tokens_details.cached_tokens if usage else None
    counts = [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens] if usage else None
    return {"text": text, "reason": reason, "counts": counts, "cached": cached}


def _whole(answer: Any) -> dict[str, Any]:
    return _told(answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage)


def _added(stream: Any) -> dict[str, Any]:
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    reason = next((choice.finish_reason for choice in choices if choice.finish_reason), None)
    usage = next((chunk.usage for chunk in chunks if getattr(chunk, "usage", None)), None)
    return _told("".join(choice.delta.content or "" for choice in choices), reason, usage)


def _raised(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except openai.APIStatusError as error:
        return {"kind": type(error).__name__, "status": error.status_code, "said": str(error)}
    raise AssertionError("nothing was raised")


def main(url: str, model: str, key: str, *names: str) -> None:
    server = Server(url, model, key)
    print(json.dumps({name: getattr(server, name)() for name in names or ALL}))


if __name__ == "__main__":
    main(*sys.argv[1:])
