"""Structured output over generated JSON schemas: does every finished output validate, and what does it cost?

Schemas are drawn by a seed: objects in objects, arrays, enums, constants, patterns, lengths, bounds, unions, tagged
unions, optional members and recursion (lists and trees by ``$ref``). The embedded model samples at temperature 1 and
knows nothing of them, so that the grammar alone keeps an output valid. Outputs that ``max_tokens`` cut are counted and
not judged. ``format`` is an annotation in JSON Schema: how many outputs keep it too is a figure of its own.

Cell "schemas": each sample has schemas that no other has, 16 outputs at a time. ``free`` is the same without a grammar,
as many tokens a sequence as the constrained ones had: what masks cost is in the ratio. Cell "one by one": the rival is
transformers with xgrammar's own logits processor, a schema at a time; its schemas and its weights are the same.

``compile_ms`` and ``mask_us`` are seen from outside of the processes that do it: with what it takes to get there.
"""

from __future__ import annotations

import json
import random
from statistics import mean, median
from typing import Any

from tenon.base import clock
from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell

TITLE = "structured output: validity and cost over generated JSON schemas"
BASELINE = "free"
LIMITS = False
RATE = "tokens_per_s"

PER_SAMPLE, ROUNDS = 100, 10
MAX_TOKENS = 384
PROMPT = "An example of a JSON document:\n\n```json\n"
PATTERNS = ("^[a-z]{3,8}$", "^[A-Z]{2}-[0-9]{4}$", "^(red|green|blue)$", "^#[0-9a-f]{6}$", r"^\d{1,3}(\.\d{1,3}){3}$")
WORDS = ("id", "name", "kind", "value", "items", "size", "owner", "state", "tags", "notes", "left", "right")


def schema(seed: int) -> dict[str, Any]:
    """One schema; every third is recursive."""
    rng = random.Random(seed)
    made = _object(rng, 3)
    if seed % 3 == 0:
        made["$defs"] = {"node": _node(rng)}
        made["properties"]["tree"] = {"$ref": "#/$defs/node"}
        made["required"].append("tree")
    return made


def _node(rng: random.Random) -> dict[str, Any]:
    child = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    links = {"next": child} if rng.random() < 0.5 else {"left": child, "right": child}
    return {
        "type": "object",
        "properties": {"value": _leaf(rng)} | links,
        "required": ["value", *links],
        "additionalProperties": False,
    }


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0 or rng.random() < 0.4:
        return _leaf(rng)
    kind = rng.choice(("object", "array", "union", "tagged"))
    if kind == "object":
        return _object(rng, depth)
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": "array",
            "items": _any(rng, depth - 1),
            "minItems": least,
            "maxItems": least + rng.randint(0, 2),
        }
    if kind == "union":
        return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": tag}, tag: _any(rng, depth - 1)},
                "required": ["kind", tag],
                "additionalProperties": False,
            }
            for tag in rng.sample([word for word in WORDS if word != "kind"], 2)
        ]
    }


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return rng.choice(
        (
            {"type": "string", "maxLength": rng.randint(0, 20)},
            {"type": "string", "minLength": 1, "maxLength": 8},
            {"type": "string", "pattern": rng.choice(PATTERNS)},
            {"type": "string", "format": rng.choice(("date", "uuid", "ipv4", "email"))},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
            {"type": "integer"},
            {"type": "number"},
            {"type": "boolean"},
            {"type": ["string", "null"], "maxLength": 10},
            {"enum": rng.sample(["red", "green", 7, None, True, "a b", 2.5], 3)},
            {"const": rng.choice(["fixed", 42, False])},
        )
    )


class Model:
    """The embedded model in this process, with a grammar for each request, or without."""

    def __init__(self, constrained: bool) -> None:
        self._constrained, self._n_samples = constrained, 0

    def setup(self, cell: dict[str, Any]) -> None:
        from tenon.engine.structure import json_schema
        from tenon.llm import LLM

        self._cell, self._form = cell, json_schema
        self._llm = LLM("embedded", progress=False, max_sequences=cell["at_once"])
        self._sample([schema(10**6 + i) for i in range(2)])

    def sample(self) -> dict[str, float]:
        first = self._n_samples * self._cell["schemas"]
        self._n_samples += 1
        return self._sample([schema(first + i) for i in range(self._cell["schemas"])])

    def _sample(self, schemas: list[dict[str, Any]]) -> dict[str, float]:
        from tenon.engine.params import SamplingParams

        now, llm = clock.SYSTEM.now_s, self._llm
        if not self._constrained:
            lengths = [60] * len(schemas)  # about what constrained ones have
            params = [SamplingParams(seed=i, max_tokens=n, ignore_eos=True) for i, n in enumerate(lengths)]
            start_s = now()
            answers = llm.generate([PROMPT] * len(params), params)
            n_tokens = sum(len(answer.outputs[0].ids) for answer in answers)
            return {"tokens_per_s": n_tokens / (now() - start_s)}
        forms = [self._form(one, "schema") for one in schemas]
        compiled_s = []
        for form in forms:
            start_s = now()
            llm.compile(form)
            compiled_s.append(now() - start_s)
        params = [SamplingParams(seed=i, max_tokens=MAX_TOKENS, structure=form) for i, form in enumerate(forms)]
        masks = llm.engine.scheduler.masks
        if masks is None:
            raise RuntimeError("the engine makes no masks")
        waited_s, n_masks, start_s = masks.waited_s, masks.n_masks, now()
        answers = llm.generate([PROMPT] * len(params), params)
        spent_s = now() - start_s
        outputs = [answer.outputs[0] for answer in answers]
        done = [(one, out) for one, out in zip(schemas, outputs, strict=True) if out.finish_reason == "stop"]
        valid = sum(is_valid(out.text, one) for one, out in done)
        formats = sum(is_valid(out.text, one, formats=True) for one, out in done)
        n_tokens = sum(len(out.ids) for out in outputs)
        return {
            "tokens_per_s": n_tokens / spent_s,
            "finished": len(done),
            "valid": valid / max(1, len(done)),
            "formats_kept": formats / max(1, len(done)),
            "compile_ms": 1e3 * median(compiled_s),
            "worst_compile_ms": 1e3 * max(compiled_s),
            "mask_us": 1e6 * (masks.waited_s - waited_s) / max(1, masks.n_masks - n_masks),
            "tokens": n_tokens / len(outputs),
        }


class Transformers:
    """The same checkpoint in transformers, with xgrammar's logits processor."""

    def setup(self, cell: dict[str, Any]) -> None:
        import torch
        import transformers
        import xgrammar

        from tenon.models.hub import resolve

        folder = str(resolve("embedded"))
        torch.manual_seed(0)
        self._n_samples, self._cell, self._x, self._torch = 0, cell, xgrammar, torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        info = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._model.config.vocab_size)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._sample([schema(10**6)])

    def sample(self) -> dict[str, float]:
        first = self._n_samples * self._cell["schemas"]
        self._n_samples += 1
        return self._sample([schema(first + i) for i in range(self._cell["schemas"])])

    def _sample(self, schemas: list[dict[str, Any]]) -> dict[str, float]:
        now, rates, compiled_s, valid = clock.SYSTEM.now_s, [], [], []
        for one in schemas:
            start_s = now()
            compiled = self._compiler.compile_json_schema(json.dumps(one), max_whitespace_cnt=16)
            compiled_s.append(now() - start_s)
            processor = self._x.contrib.hf.LogitsProcessor(compiled)
            ids = self._tokenizer(PROMPT, return_tensors="pt")
            start_s = now()
            out = self._model.generate(
                **ids,
                max_new_tokens=MAX_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                logits_processor=[processor],
                pad_token_id=0,
            )[0, ids["input_ids"].shape[1] :]
            rates.append(len(out) / (now() - start_s))
            if len(out) < MAX_TOKENS:
                valid.append(is_valid(self._tokenizer.decode(out, skip_special_tokens=True), one))
        return {
            "tokens_per_s": median(rates), "compile_ms": 1e3 * median(compiled_s), "finished": len(valid),
            "valid": mean(valid) if valid else 1.0,
        }  # fmt: skip


def is_valid(text: str, wanted: dict[str, Any], *, formats: bool = False) -> bool:
    import jsonschema

    try:
        found = json.loads(text)
    except ValueError:
        return False
    formats_kept = jsonschema.FormatChecker() if formats else None
    return bool(jsonschema.Draft202012Validator(wanted, format_checker=formats_kept).is_valid(found))


CONTENDERS = {
    "tenon": ContenderEntry("bench.grammar:Model", {"constrained": True}),
    "free": ContenderEntry("bench.grammar:Model", {"constrained": False}),
    "transformers": ContenderEntry("bench.grammar:Transformers", {}),
}


def cells(quick: bool) -> list[Cell]:
    n = 20 if quick else PER_SAMPLE
    many = {"schemas": n, "at_once": 16}
    few = {"schemas": 3 if quick else 6, "at_once": 1}
    rounds = 2 if quick else ROUNDS
    return [
        Cell("schemas", many, rounds, 0, ("tenon", "free"), sample_s=n * 0.15, limit_s=900),
        Cell("one by one", few, 2 if quick else 5, 0, sample_s=few["schemas"] * 3.0, limit_s=900),
    ]


def checks(result: Result) -> list[Check]:
    """Validity has no tolerance; the rest says what it costs."""
    found = [
        at_least(f"{cell}: finished outputs that validate", min(result.find(cell, "tenon", "valid").samples), 1.0)
        for cell in result.cells
    ]
    many = result.find("schemas", "tenon", "finished").samples
    asked = len(many) * result.cells["schemas"]["schemas"]
    found.append(at_least("schemas: share of outputs that finished", sum(many) / asked, 0.7))
    found.append(at_most("schemas: ms to compile one", result.median("schemas", "tenon", "compile_ms"), 50.0))
    found.append(at_least("schemas: tokens/s with over without", result.ratio("schemas", "tenon", "free", RATE), 0.5))
    over = result.ratio("one by one", "tenon", "transformers", RATE)
    found.append(at_least("one by one: tokens/s over transformers with xgrammar", over, 1.0))
    return found
