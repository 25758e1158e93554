"""lm-evaluation-harness, unmodified, as a process: its log-likelihoods are those of a direct computation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tenon.models.hub import resolve
from tests.server.clients.environments import told
from tests.server.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.timeout(1200)]
PAIRS = [
    ("def add(a, b):\n    return", " a + b"),
    ("def add(a, b):\n    return", " a - b"),
    ("import os\n\nfor name in os.listdir", "(path):\n    print(name)"),
    ("class", " Point:"),
    ('"""The cost model', ' of the engine."""'),
]


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
    said = told("lm_eval", server.url, server.model, json.dumps(PAIRS))
    right = direct(PAIRS, resolve("embedded"))
    for (found, is_greedy), (expected, expected_greedy) in zip(said["likelihoods"], right, strict=True):
        assert found == pytest.approx(expected, abs=2e-3)
        assert is_greedy is expected_greedy
    assert all(isinstance(text, str) for text in said["texts"])
