"""lm-evaluation-harness, unmodified, as a process: its log-likelihoods are those of a direct computation."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tenon.models.hub import resolve
from tests.server.clients.environments import HERE, python_of
from tests.server.conftest import PATIENCE_S, Running, free_port, launch

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.timeout(1200)]
PAIRS = [
    ("def add(a, b):\n    return", " a + b"),
    ("def add(a, b):\n    return", " a - b"),
    ("import os\n\nfor name in os.listdir", "(path):\n    print(name)"),
    ("class", " Point:"),
    ('"""The cost model', ' of the engine."""'),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The embedded model, really computed."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENON_STATE", str(tmp_path_factory.mktemp("state")))
        port = free_port()
        words = ["-m", "tenon.cli", "serve", "--dtype", "float32", "--port", str(port), "--served-name", "embedded"]
        running = launch(words, port, "embedded")
    yield running
    assert running.stop() == 0
    running.close()


def direct(pairs: list[tuple[str, str]], folder: Path) -> list[tuple[float, bool]]:
    """Sum of log-probabilities of the continuation's tokens, and whether each is the likeliest, in fp64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for context, continuation in pairs:
        whole = tokenizer(context + continuation, add_special_tokens=False).input_ids
        n = len(tokenizer(context, add_special_tokens=False).input_ids)
        with torch.inference_mode():
            logp = torch.log_softmax(model(torch.tensor([whole])).logits[0], -1)
        targets = torch.tensor(whole[n:])
        rows = logp[n - 1 : -1]
        total = rows[torch.arange(len(targets)), targets].sum()
        found.append((float(total), bool((rows.argmax(-1) == targets).all())))
    return found


def test_log_likelihoods_equal_a_direct_computation(server: Running) -> None:
    command = [str(python_of("lm_eval")), str(HERE / "lm_eval_client.py"), server.url, server.model, json.dumps(PAIRS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S * 5, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    right = direct(PAIRS, resolve("embedded"))
    for (found, is_greedy), (expected, expected_greedy) in zip(said["likelihoods"], right, strict=True):
        assert found == pytest.approx(expected, abs=2e-3)
        assert is_greedy is expected_greedy
    assert all(isinstance(text, str) for text in said["texts"])
