"""Run in an environment of its own: lm-evaluation-harness against a server, its answers as JSON on the last line.

usage: python lm_eval_client.py URL MODEL PAIRS_JSON    PAIRS: lists of a context and a continuation
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def main(url: str, model: str, pairs: list[tuple[str, str]]) -> None:
    client = LocalCompletionsAPI(
        base_url=url + "/v1/completions", model=model, tokenizer_backend="remote", batch_size=4, max_length=1024
    )
    likelihoods = client.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    until = [(context, {"until": ["\n"], "max_gen_toks": 8}) for context, _ in pairs]
    texts = client.generate_until(instances("generate_until", until), disable_tqdm=True)
    ids = [client.tok_encode(context) for context, _ in pairs]
    print(json.dumps({"likelihoods": likelihoods, "texts": texts, "ids": ids}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [tuple(pair) for pair in json.loads(sys.argv[3])])
