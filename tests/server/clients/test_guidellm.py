"""guidellm, unmodified, as a process: a short benchmark on each API, whose report has no error and what it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tenon.models.hub import resolve
from tests.server.clients.environments import run
from tests.server.conftest import PATIENCE_S, Running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
N_REQUESTS, N_OUTPUT, N_PREFIX = 6, 12, 64


def benchmark(server: Running, route: str, profile: str, report: Path) -> Any:
    """The one benchmark of ``guidellm run``'s report. Its prompts begin with a prefix that they share."""
    backend = {"kind": "openai_http", "target": server.url, "request_format": route}
    backend |= {"extras": {"body": {"temperature": 0}}}
    words = {
        "backend": json.dumps(backend),
        "profile": profile,
        "constraint": f"kind=max_requests,count={N_REQUESTS}",
        "tokenizer": f"kind=huggingface_auto,model={resolve('embedded')}",
        "data": "kind=synthetic_text,prompt_tokens=40,prefix_count=1,"
        f"prefix_tokens={N_PREFIX},output_tokens={N_OUTPUT}",
        "output": f"kind=json,path={report}",
    }
    options = [word for name, value in words.items() for word in (f"--{name}", value)]
    run("guidellm", "-m", "guidellm", "run", *options, "--disable-console")
    (measured,) = json.loads(report.read_text())["benchmarks"]
    return measured


def n_prompt_tokens(server: Running, body: Any) -> int:
    """As the server's tokenizer counts what guidellm sent."""
    messages = body.get("messages") or [{"role": "system", "content": body.get("instructions")}, *body.get("input", [])]
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
    asked = {"prompt": body["prompt"]} if "prompt" in body else {"messages": messages}
    answer = httpx.post(server.url + "/tokenize", json=asked, timeout=PATIENCE_S)
    return len(answer.json()["tokens"])


@pytest.mark.parametrize(
    ("route", "profile"),
    [
        ("/v1/completions", "kind=synchronous"),
        ("/v1/chat/completions", "kind=constant,rate=10"),
        ("/v1/responses", "kind=synchronous"),
    ],
)
def test_a_benchmark_has_what_it_asks_for(server: Running, tmp_path: Path, route: str, profile: str) -> None:
    finished = 'tenon_requests_finished_total{reason="length"}'
    before = server.metrics()[finished]
    measured = benchmark(server, route, profile, tmp_path / "report.json")
    assert server.metrics()[finished] - before == N_REQUESTS
    totals = measured["metrics"]["request_totals"]
    n = totals["successful"]
    assert totals == {"successful": n, "errored": 0, "incomplete": 0, "total": n}
    # guidellm leaves out the last answer where its wait for the next one times out just as that one arrives.
    assert N_REQUESTS - 1 <= n <= N_REQUESTS
    requests = measured["requests"]["successful"]
    assert [request["output_metrics"]["text_tokens"] for request in requests] == [N_OUTPUT] * n
    for request in requests:
        body = json.loads(request["request_args"])["body"]
        assert body["temperature"] == 0
        assert request["input_metrics"]["text_tokens"] == n_prompt_tokens(server, body)
        assert isinstance(request["input_metrics"]["cached_tokens"], int)
    assert max(request["input_metrics"]["cached_tokens"] for request in requests) >= N_PREFIX - 16
    for name, count in {"time_to_first_token_ms": n, "inter_token_latency_ms": n * (N_OUTPUT - 1)}.items():
        found = measured["metrics"][name]["successful"]
        assert found["count"] == count, name
        assert found["mean"] > 0, name
