"""Run in an environment of its own: LangChain's adapter for OpenAI against a server, what it got as JSON at the end.

usage: python langchain_client.py URL MODEL
"""

from __future__ import annotations

import json
import sys
from functools import reduce
from operator import add
from typing import Any

import openai
from langchain_openai import ChatOpenAI, OpenAI

TEXT = "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n" * 5
LONG = "hello " * 4000


def message(answer: Any) -> dict[str, Any]:
    """Of a message, or of chunks added up."""
    return {"text": answer.text, "usage": answer.usage_metadata, "metadata": answer.response_metadata}


def refused(call: Any) -> dict[str, Any]:
    try:
        call()
    except openai.BadRequestError as error:
        return {"code": error.code, "status": error.status_code, "said": str(error)}
    raise AssertionError("nothing was raised")


def main(url: str, model: str) -> None:
    at: dict[str, Any] = {"base_url": url + "/v1", "api_key": "none", "model": model, "max_retries": 0}
    greedy = at | {"temperature": 0, "max_tokens": 12}
    chat = ChatOpenAI(**greedy, stream_usage=True)
    responses = ChatOpenAI(**greedy, use_responses_api=True)
    seeded = ChatOpenAI(**at, temperature=1.0, max_tokens=24, seed=5)
    complete = OpenAI(**greedy)
    generated = complete.generate(["def add(a, b):", "class"])
    said = {
        "first": message(chat.invoke(TEXT)),
        "again": message(chat.invoke(TEXT)),
        "streamed": message(reduce(add, chat.stream(TEXT))),
        "batch": [message(answer)["text"] for answer in chat.batch([TEXT, "hello"])],
        "scored": message(chat.bind(logprobs=True, top_logprobs=2).invoke("hello")),
        "seeds": [seeded.bind(seed=seed).invoke("hello").text for seed in (5, 5, 6)] + [seeded.invoke("hello").text],
        "refused": [refused(lambda: chat.invoke(LONG)), refused(lambda: list(chat.stream(LONG)))],
        "refused_completion": refused(lambda: complete.invoke(LONG)),
        "completions": [generation[0].text for generation in generated.generations],
        "reasons": [generation[0].generation_info["finish_reason"] for generation in generated.generations],
        "completion_usage": generated.llm_output["token_usage"],
        "streamed_completion": "".join(complete.stream("def add(a, b):")),
        "response": message(responses.invoke(TEXT)),
        "streamed_response": message(reduce(add, responses.stream(TEXT))),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
