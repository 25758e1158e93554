"""Structured output on the engine: real grammars, real masks, the hash executor's arbitrary logits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tenon.base.errors import RequestError
from tenon.engine.engine import Engine
from tenon.engine.grammar import Binding, Compiler, GrammarLimits, Masks, Vocabulary
from tenon.engine.messages import Add, Grammar
from tenon.engine.structure import Structure, choice, json_schema
from tenon.models.generation import read_generation
from tenon.models.hf_config import read_config
from tenon.models.hub import resolve
from tenon.models.tokenizer import Tokenizer, load_tokenizer
from tests.engine import build

PROMPT = (5, 6, 7)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
HOSTILE = "((((((a{1,99}){1,99}){1,99}){1,99}){1,99}){1,99}){1,99}"


class Bench:
    """The embedded model's vocabulary: its compiler, and engines whose masks share one worker."""

    def __init__(self) -> None:
        folder: Path = resolve("embedded")
        spec = read_config(folder)
        self.tokenizer: Tokenizer = load_tokenizer(folder, spec.vocab_size)
        self.eos_ids = read_generation(folder, spec).eos_ids
        self.vocabulary = Vocabulary(str(folder), spec.vocab_size, self.eos_ids)
        self.compiler = Compiler(self.vocabulary)
        self.masks = Masks(self.vocabulary, n_rows=16)

    def engine(self, n_blocks: int = 200, masks: Masks | None = None, **config: Any) -> Engine:
        vocab_size = self.vocabulary.vocab_size
        return build.hash_engine(n_blocks, vocab_size, masks=masks or self.masks, eos_ids=self.eos_ids, **config)

    def add(self, name: str, structure: Structure, **wishes: Any) -> Add:
        wishes = {"prompt": PROMPT, "max_tokens": 120, "seed": 1} | wishes
        return Add(name, grammar=Grammar(*self.compiler.compile(structure)), **wishes)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.compiler.close()
    made.masks.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_outputs_have_the_form_asked_for(bench: Bench, temperature: float) -> None:
    engine = bench.engine()
    forms = {
        "schema": json_schema(PERSON, "p"),
        "regex": Structure("regex", r"[A-Z][a-z]{2,5} \d{3}"),
        "choice": choice(["left", "right"], "p"),
        "grammar": Structure("ebnf", 'root ::= "(" [01]+ ")" | "<" root ">"'),
    }
    adds = [bench.add(name, form, temperature=temperature, n=3, seed=7) for name, form in forms.items()]
    reasons: dict[tuple[str, int], str | None] = {}
    texts: dict[tuple[str, int], list[int]] = {}
    for add in adds:
        engine.add(add)
    while engine.has_work:
        for delta in engine.tick(0.0):
            texts.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
            reasons[delta.request_id, delta.index] = delta.finish_reason
        engine.check_integrity()
    said = {key: bench.text(ids) for key, ids in texts.items() if reasons[key] == "stop"}
    assert len(said) > 6
    for (name, _), text in said.items():
        match name:
            case "schema":
                jsonschema.validate(json.loads(text), PERSON)
            case "regex":
                assert re.fullmatch(r"[A-Z][a-z]{2,5} \d{3}", text)
            case "choice":
                assert text in ("left", "right")
            case _:
                assert re.fullmatch(r"(<*)\([01]+\)(>*)", text)
                assert text.count("<") == text.count(">")


def test_preemption_and_another_engine_change_nothing(bench: Bench) -> None:
    form = Structure("regex", "([a-z]{1,4} ){40}")
    adds = [bench.add(f"r{i}", form, seed=i, max_tokens=40) for i in range(4)]
    calm = build.run(bench.engine(), adds)
    tight = bench.engine(n_blocks=9, max_preemptions=2)
    assert build.run(tight, adds) == calm
    assert tight.scheduler.counters.preemptions > 0
    whole = calm["r1", 0]
    again = Add("x", PROMPT, 40, 1, outputs=tuple(whole[:11]), again=True, grammar=adds[1].grammar)
    assert build.run(bench.engine(), [again])["x", 0] == whole[11:]


def test_company_changes_nothing(bench: Bench) -> None:
    forms = [json_schema(PERSON, "p"), Structure("regex", "[ab]{20}"), Structure("json_object")]
    adds = [bench.add(f"r{i}", form, seed=i, max_tokens=30) for i, form in enumerate(forms)]
    plain = Add("plain", PROMPT, 30, 9)
    together = build.run(bench.engine(), [*adds, plain])
    for add in (*adds, plain):
        assert build.run(bench.engine(), [add])[add.request_id, 0] == together[add.request_id, 0]


def test_who_kills_the_worker_is_alone_in_being_given_up(bench: Bench) -> None:
    masks = Masks(bench.vocabulary, n_rows=16, cpu_s=0.2)
    engine = bench.engine(masks=masks)
    name, compiled = bench.compiler.compile(Structure("regex", "[ab]{10}"))
    bomb = Add("bomb", PROMPT, 20, 1, grammar=Grammar("bomb", _never_done(bench)))
    good = [Add(f"g{i}", PROMPT, 20, i, grammar=Grammar(name, compiled)) for i in range(3)]
    errors: dict[str, str | None] = {}
    lengths: dict[str, int] = {}
    for add in (*good, bomb):
        engine.add(add)
    while engine.has_work:
        for delta in engine.tick(0.0):
            lengths[delta.request_id] = lengths.get(delta.request_id, 0) + len(delta.ids)
            if delta.error is not None:
                errors[delta.request_id] = delta.error
        engine.check_integrity()
    masks.close()
    assert list(errors) == ["bomb"]
    assert "too much time" in str(errors["bomb"])
    assert all(lengths[add.request_id] > 0 for add in good)
    assert lengths.get("bomb", 0) == 0


def _never_done(bench: Bench) -> str:
    """A compiled grammar whose first mask takes minutes: ambiguous in so many ways that all are followed."""
    slow = Compiler(bench.vocabulary, GrammarLimits(cpu_s=20.0, probe=False))
    try:
        return slow.compile(Structure("regex", HOSTILE))[1]
    finally:
        slow.close()


def test_more_may_wait_than_are_asked_for_at_once(bench: Bench) -> None:
    masks = Masks(bench.vocabulary, n_rows=4)
    engine = bench.engine(masks=masks, max_sequences=4)
    form = Structure("regex", "[ab]{3}")
    outputs = build.run(engine, [bench.add(f"r{i}", form, seed=i, max_tokens=9) for i in range(30)])
    masks.close()
    assert all(re.fullmatch("[ab]{3}", bench.text(ids)) for ids in outputs.values())
    assert len(outputs) == 30


def test_a_worker_that_is_killed_is_replaced(bench: Bench) -> None:
    adds = [bench.add("a", Structure("regex", "[ab]{30}"), max_tokens=30)]
    calm = build.run(bench.engine(), adds)
    masks = Masks(bench.vocabulary, n_rows=4)
    engine = bench.engine(masks=masks)
    engine.add(adds[0])
    ids: list[int] = []
    while engine.has_work:
        for delta in engine.tick(0.0):
            ids.extend(delta.ids)
            if len(ids) == 5:
                process = masks._worker_now()._process
                assert process is not None
                os.kill(process.pid, 9)
                process.wait()
    masks.close()
    assert ids == calm["a", 0]


def test_a_thought_is_free_and_what_follows_is_not(bench: Bench) -> None:
    """Ids 40 and 41 play the marks: while it thinks anything but an end may come."""
    name, compiled = bench.compiler.compile(Structure("regex", "[ab]{6}"))
    for thinking in (False, True):
        ends = 0
        for seed in range(6):
            add = Add(
                "t", PROMPT, 200, seed, logit_bias=((41, 12.0), (40, 100.0)) if thinking else ((40, 100.0), (41, 12.0)),
                grammar=Grammar(name, compiled, think=(40, 41), thinking=thinking),
            )  # fmt: skip
            ids = build.run(bench.engine(), [add])["t", 0]
            assert thinking or ids[0] == 40
            if 41 in ids:
                ends += 1
                said = bench.text(ids[ids.index(41) + 1 :])
                assert re.fullmatch("[ab]{6}", said)
            else:
                assert not set(ids) & set(bench.eos_ids)
                assert len(ids) == 200
        assert thinking or ends >= 0


def test_strings_of_bounded_length_are_json(bench: Bench) -> None:
    """The library's own lengths let control characters in."""
    form = json_schema({"type": "string", "minLength": 1, "maxLength": 4}, "p")
    adds = [bench.add(f"r{i}", form, temperature=100.0, seed=i, max_tokens=30) for i in range(60)]
    for ids in build.run(bench.engine(), adds).values():
        assert isinstance(json.loads(bench.text(ids)), str)


@pytest.mark.parametrize(
    ("outputs", "thinking", "start"),
    [((), False, 0), ((8,), False, 0), ((1, 8), False, None), ((1, 8, 2, 9), False, 3), ((9, 1), False, 0),
     ((), True, None), ((5, 2), True, 2), ((2, 1, 2), True, 1)],
)  # fmt: skip
def test_where_a_grammar_binds(outputs: tuple[int, ...], thinking: bool, start: int | None) -> None:
    whole = Binding(Grammar("g", "", think=(1, 2), thinking=thinking))
    whole.look(np.array(outputs, np.int32))
    assert whole.start == start
    steps = Binding(Grammar("g", "", think=(1, 2), thinking=thinking))
    for n in range(len(outputs) + 1):
        steps.look(np.array(outputs[:n], np.int32))
    assert (steps.start, steps.may_think) == (whole.start, whole.may_think)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (Structure("regex", "[ab"), "Unclosed"),
        (Structure("ebnf", "root ::= foo"), 'Rule "foo" is not defined'),
        (json_schema({"type": "objct"}, "p"), "Unsupported type"),
        (json_schema({"$ref": "#/nowhere"}, "p"), "Cannot find field nowhere"),
        (json_schema({"$ref": "#"}, "p"), "there is no text of this form"),
        (json_schema({"allOf": [{"type": "integer"}, {"type": "number"}]}, "p"), "allOf with multiple options"),
        (json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "p"), "oneOf with overlapping"),
        (json_schema({"type": "string", "pattern": "^a+$", "maxLength": 3}, "p"), "pattern combined with"),
    ],
)
def test_a_grammar_that_cannot_be_is_refused_in_words(bench: Bench, form: Structure, said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)) as raised:
        bench.compiler.compile(form)
    assert ".cc:" not in str(raised.value)
    assert bench.compiler.compile(Structure("regex", "[ab]"))[1]


def test_one_that_takes_too_long_is_refused_and_the_next_is_not(bench: Bench) -> None:
    hasty = Compiler(bench.vocabulary, GrammarLimits(cpu_s=0.1))
    for _ in range(2):
        with pytest.raises(RequestError, match=r"took more than 0\.1 s"):
            hasty.compile(Structure("regex", HOSTILE))
        assert hasty.compile(Structure("regex", "[ab]"))[1]
    hasty.close()


def test_what_was_compiled_is_kept_within_bounds(bench: Bench) -> None:
    small = Compiler(bench.vocabulary, GrammarLimits(cache_bytes=20_000))
    first = small.compile(Structure("regex", "a"))
    assert small.compile(Structure("regex", "a")) is first
    assert small.compile(Structure("regex", "a"), owner="other") is not first
    for i in range(40):
        small.compile(Structure("regex", f"[ab]{{{i + 1}}}"))
    assert small.kept_bytes <= 20_000
    assert small.compile(Structure("regex", "a")) is not first
    small.close()


@pytest.mark.parametrize("wish", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_what_a_grammar_cannot_keep_is_refused(bench: Bench, wish: dict[str, Any]) -> None:
    engine = bench.engine()
    with pytest.raises(RequestError, match="cannot be had with a grammar"):
        engine.add(bench.add("a", Structure("regex", "a"), **wish))
    assert not engine.has_work


def test_an_engine_without_masks_refuses_grammars(bench: Bench) -> None:
    with pytest.raises(RequestError, match="structured output is not available"):
        build.hash_engine().add(bench.add("a", Structure("regex", "a")))


def test_a_mask_costs_no_compiling(bench: Bench) -> None:
    """One grammar goes to the worker once, however many requests have it; what nobody uses is dropped there."""
    engine = bench.engine()
    form = Structure("regex", "[xyz]{4}")
    build.run(engine, [bench.add(f"r{i}", form, seed=i) for i in range(5)])
    assert len(bench.masks._sent) <= 1
    build.run(engine, [bench.add("next", Structure("regex", "[uvw]{4}"))])
    assert len(bench.masks._live) <= 5
    assert len(bench.masks._sent) <= 2
