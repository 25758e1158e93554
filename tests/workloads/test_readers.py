"""Public formats: what is read, and each thing that can be wrong with file, line and field in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from tenon.base.errors import ConfigError
from tenon.workloads import readers
from tenon.workloads.blocks import identify
from tenon.workloads.trace import Segment

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "given.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def mooncake(**fields: Any) -> str:
    row = {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]} | fields
    return json.dumps({key: value for key, value in row.items() if value is not ...}) + "\n"


def test_mooncake_hashes_become_shared_beginnings(tmp_path: Path) -> None:
    rows = [
        mooncake(input_length=1100, hash_ids=[1, 2, 3]),
        mooncake(timestamp=3000, input_length=1536, hash_ids=[1, 2, 4]),
        mooncake(timestamp=3000, input_length=2000, hash_ids=[1, 2, 4, 5], output_length=0),
        mooncake(timestamp=4500, input_length=1100, hash_ids=[1, 2, 3]),
        mooncake(timestamp=4500, input_length=600, hash_ids=[7, 8]),
    ]
    made = readers.mooncake(write(tmp_path, "".join(rows) + "\n"))
    assert [r.arrival_s for r in made.requests] == [0.0, 3.0, 3.0, 4.5, 4.5]
    assert [r.n_prompt for r in made.requests] == [1100, 1536, 2000, 1100, 600]
    assert [r.n_output for r in made.requests] == [5, 5, 1, 5, 5]
    assert [len(r.prompt) for r in made.requests] == [1, 2, 2, 1, 1]
    blocks = identify(made.requests, readers.MOONCAKE_BLOCK)
    lists = [blocks.id[a:b].tolist() for a, b in zip(blocks.start, blocks.start[1:], strict=False)]
    given = [[1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [1, 2, 3], [7, 8]]
    pairs = {(a, b) for one, other in zip(given, lists, strict=True) for a, b in zip(one, other, strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 7


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{\n", "line 2 is not JSON"),
        ("[1]\n", "line 2: the line must be an object"),
        (mooncake(timestamp=...), "line 2: timestamp must be a number, is missing"),
        (mooncake(timestamp=-1), "line 2: timestamp must be at least 0, is -1"),
        (mooncake(timestamp="soon"), "line 2: timestamp must be a number, is 'soon'"),
        (mooncake(timestamp=True), "line 2: timestamp must be a number, is True"),
        (mooncake(input_length=0, hash_ids=[]), "line 2: input_length must be a whole number of at least 1"),
        (mooncake(input_length=1.5), "line 2: input_length must be a whole number"),
        (mooncake(output_length=-3), "line 2: output_length must be at least 0"),
        (mooncake(hash_ids=...), "line 2: hash_ids must be a list of whole numbers, is missing"),
        (mooncake(hash_ids=[1, "x"]), r"line 2: hash_ids\[1\] must be a number"),
        (mooncake(hash_ids=[1, 2, 3]), "line 2: hash_ids must be 2 hashes of 512 tokens for 1000 tokens, is 3"),
        (mooncake(hash_ids=[2, 1]), r"line 2: hash_ids\[0\] must be after 1 as before"),
    ],
)
def test_a_wrong_mooncake_row_is_refused(tmp_path: Path, row: str, said: str) -> None:
    path = write(tmp_path, mooncake() + row + mooncake())
    with pytest.raises(ConfigError, match=f"given.txt {said}"):
        readers.mooncake(path)


def test_azure_times_count_from_the_first_request(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n"
    text += "2024-05-12 00:00:00.000000+00:00,0,0\n"
    made = readers.azure(write(tmp_path, text))
    assert [r.arrival_s for r in made.requests[:2]] == [0.0, 4.314579]
    assert [(r.n_prompt, r.n_output) for r in made.requests] == [(374, 44), (396, 109), (1, 1)]
    assert len({r.prompt[0].content for r in made.requests}) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1 has no column TIMESTAMP, ContextTokens, GeneratedTokens; it has nothing"),
        ("TIMESTAMP,GeneratedTokens\n", "line 1 has no column ContextTokens; it has TIMESTAMP, GeneratedTokens"),
        (AZURE, "has no requests"),
        (AZURE + "2023-11-16 18:15:46,1\n", "line 2: the row must be 3 fields"),
        (AZURE + "yesterday,1,2\n", "line 2: TIMESTAMP must be a time as .*, is 'yesterday'"),
        (AZURE + "2023-13-16 18:15:46,1,2\n", "line 2: TIMESTAMP must be a time"),
        (AZURE + "2023-11-16 18:15:46,-4,2\n", "line 2: ContextTokens must be at least 0, is '-4'"),
        (AZURE + "2023-11-16 18:15:46,4,\n", "line 2: GeneratedTokens must be a number, is ''"),
        (AZURE + "2023-11-16 18:15:46,4,nan\n", "line 2: GeneratedTokens must be a number, is 'nan'"),
        (AZURE + "2023-11-16 18:15:46,4,2\n2023-11-16 18:15:47,4,2.5\n", "line 3: GeneratedTokens must be a whole"),
    ],
)
def test_a_wrong_azure_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"given.txt {said}"):
        readers.azure(write(tmp_path, text))


def test_burstgpt_keeps_models_types_and_sessions_and_leaves_failures_out(tmp_path: Path) -> None:
    text = "Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += "5,s1,ChatGPT,472,18,490,Conversation log\n45,,GPT-4,10,0,10,API log\n118.5,s1,ChatGPT,1,2,3,API log\n"
    made = readers.burstgpt(write(tmp_path, text))
    assert [(r.arrival_s, r.session, r.tenant, r.slo_class) for r in made.requests] == [
        (5.0, "s1", "ChatGPT", "Conversation log"),
        (118.5, "s1", "ChatGPT", "API log"),
    ]
    assert made.header.parameters == {"failures_left_out": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BURST.replace("Model,", ""), "line 1 has no column Model; it has Timestamp, Request tokens"),
        (BURST + "-5,ChatGPT,1,2,3,API log\n", "line 2: Timestamp must be at least 0, is '-5'"),
        (BURST + "5,ChatGPT,1,2,4,API log\n", "line 2: Total tokens must be the sum of request and response tokens, 3"),
        (BURST + "5,ChatGPT,x,2,4,API log\n", "line 2: Request tokens must be a number, is 'x'"),
        (BURST + "5,ChatGPT,1,0,1,API log\n", "has no requests"),
    ],
)
def test_a_wrong_burstgpt_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"given.txt {said}"):
        readers.burstgpt(write(tmp_path, text))


def share(*texts: str, first: str = "human") -> dict[str, Any]:
    other = {"human": "gpt", "gpt": "human", "system": "human"}
    who, messages = first, []
    for text in texts:
        messages.append({"from": who, "value": text})
        who = other[who]
    return {"id": "x", "conversations": messages}


@pytest.mark.parametrize("as_list", [True, False])
def test_conversations_become_sessions_of_growing_prompts(tmp_path: Path, as_list: bool) -> None:
    rows = [
        share("a" * 40, "b" * 80, "c" * 20, "d" * 8),
        share("orphan answer", "question", "answer", first="gpt"),
        share("be brief", "hello", first="system"),
        {"conversation": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    text = json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows))
    made = readers.conversations(write(tmp_path, text), apart_s=5.0, think_s=2.0)
    by_id = {r.id: r for r in made.requests}
    assert set(by_id) == {"0.0", "0.1", "1.0", "3.0"}
    first, second = by_id["0.0"], by_id["0.1"]
    assert (first.n_prompt, first.n_output, first.after) == (10, 20, "")
    assert (second.n_prompt, second.n_output, second.after, second.gap_s) == (35, 2, "0.0", 2.0)
    assert second.prompt[:2] == (*first.prompt, Segment(first.output, 20))
    assert by_id["3.0"].arrival_s == 15.0
    assert made.header.parameters["tokens_counted_by"] == "characters / 4"


def test_a_given_count_is_used_and_said(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(share("one two three", "four five")))
    made = readers.conversations(path, lambda text: len(text.split()))
    assert (made.requests[0].n_prompt, made.requests[0].n_output) == (3, 2)
    assert made.header.parameters["tokens_counted_by"] == "a tokenizer"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{]", "is not JSON"),
        ('{"a": 1', "line 1 is not JSON"),
        ("[3]", "item 0: the item must be an object, is 3"),
        ('[{"id": 1}]', "item 0: conversations must be a list of messages, is missing"),
        ('{"conversations": [3]}', r"line 1: conversations\[0\] must be an object, is 3"),
        ('{"conversation": [{"role": "user"}]}', r"line 1: conversation\[0\]'s text .* must be text, is missing"),
        (
            '{"conversations": [{"from": "cat", "value": "x"}]}',
            r"line 1: conversations\[0\]'s speaker .* must be one of",
        ),
        ("[]", "no conversation has a question and its answer"),
    ],
)
def test_a_wrong_conversation_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"given.txt:? {said}"):
        readers.conversations(write(tmp_path, text))


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.csv"):
        readers.read(tmp_path / "missing.csv", "azure")
    with pytest.raises(ConfigError, match="is not UTF-8 at byte 0"):
        readers.read(write(tmp_path, b"\xff\xfe"), "mooncake")
    with pytest.raises(ConfigError, match="there is no trace format 'parquet'; there are tenon, mooncake"):
        readers.read(tmp_path, "parquet")


@pytest.mark.parametrize(
    ("text", "form"),
    [(mooncake(), "mooncake"), (AZURE + "2023-11-16 18:15:46,1,2\n", "azure"),
     (BURST + "5,ChatGPT,1,2,3,API log\n", "burstgpt"), (json.dumps(share("a", "b")), "sharegpt"),
     (json.dumps([share("a", "b")], indent=1), "sharegpt")],
)  # fmt: skip
def test_formats_are_told_apart_by_their_beginning(tmp_path: Path, text: str, form: str) -> None:
    path = write(tmp_path, text)
    assert readers.guess(path) == form
    assert readers.read(path) == readers.read(path, form)


def test_a_file_of_no_known_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"given\.txt is of none of the formats tenon, mooncake"):
        readers.read(write(tmp_path, "hello\n"))


# -- a server's events -------------------------------------------------------------------------------------------


def events(*records: dict[str, object]) -> str:
    return "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in ({"kind": "run", "at_s": 99.0}, *records))


def asked(name: str, at_s: float, n_prompt: int, n_output: int, n: int = 1, **more: object) -> list[dict[str, object]]:
    """A request that came then and took two seconds."""
    end = {"reason": "stop", "n_output": n_output, "e2e_s": 2.0} | more
    return [
        {"kind": "started", "at_s": at_s + 0.01, "request_id": name, "n_prompt": n_prompt, "n": n},
        {"kind": "finished", "at_s": at_s + 2.0, "request_id": name} | end,
    ]


def test_what_a_server_answered_is_a_trace(tmp_path: Path) -> None:
    slo = {"class": "chat", "ttft_ms": 500.0, "tpot_ms": None, "met": True}
    path = write(
        tmp_path,
        events(
            *asked("a", 100.0, 30, 7, slo=slo, cache={"cached_tokens": 16}),
            {"kind": "stats", "at_s": 101.0, "running": 1},
            *asked("b", 101.5, 40, 8, n=2, cache=None, slo=None),
            *asked("c", 102.0, 5, 0, reason="rejected"),
            *asked("d", 103.0, 16, 3, cache={"cached_tokens": 16}),
            {"kind": "finished", "at_s": 104.0, "request_id": "e", "reason": "stop", "n_output": 1, "e2e_s": 9.0},
        ),
    )
    assert readers.guess(path) == "server"
    made = readers.read(path)
    found = [(one.id, one.arrival_s, one.n_prompt, one.n_output, one.slo_class) for one in made.requests]
    assert found == [
        ("a#0", 0.0, 30, 7, "chat"),
        ("b#0", 1.5, 40, 4, ""),
        ("b#1", 1.5, 40, 4, ""),
        ("d#0", 3.0, 16, 3, ""),
    ]
    a, b, sibling, d = made.requests
    assert b.prompt == sibling.prompt
    assert len({a.prompt[-1].content, b.prompt[-1].content, d.prompt[-1].content}) == 3
    assert (a.prompt[0], d.prompt[0]) == (Segment(1, 16), Segment(1, 15))  # a row is always computed
    assert made.header.parameters["slo"] == {"chat": {"ttft_s": 0.5}}
    assert made.header.parameters["dropped"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_output": -1}, "line 3: n_output must be at least 0, is -1"),
        ({"e2e_s": None}, "line 3: e2e_s must be a number, is missing"),
        ({"cache": {"cached_tokens": 1.5}}, "line 3: cache.cached_tokens must be a whole number"),
    ],
)
def test_a_damaged_record_of_a_server_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    started, finished = asked("a", 100.0, 30, 7)
    path = write(tmp_path, events(started, finished | change))
    with pytest.raises(ConfigError, match=said):
        readers.read(path)


def test_a_server_that_answered_nothing_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no requests"):
        readers.read(write(tmp_path, events(*asked("a", 1.0, 3, 0, reason="abort"))))
