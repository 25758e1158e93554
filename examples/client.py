"""Stream a chat from a running server (make serve): python examples/client.py [URL]

Needs the official client: pip install openai
"""

import sys

from openai import OpenAI


def main(url: str = "http://127.0.0.1:8000/v1") -> None:
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Write a function that adds two numbers."}],
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n# {chunk.usage.completion_tokens} tokens after a prompt of {chunk.usage.prompt_tokens}")


if __name__ == "__main__":
    main(*sys.argv[1:])
