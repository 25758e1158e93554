"""Journals, and when a refusal is an answer: what ``tenon batch`` and the server share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenon.base.errors import ConfigError, ResourceError
from tenon.server.batch_lines import BadLine, Journal, Line, answered, check_file, parse_line, sound_lines
from tenon.server.batch_run import Answer, BatchRun, wait_s

URL = "/v1/completions"
BODY = b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}'


def lines(n: int) -> Iterator[Line]:
    return (Line(i + 1, f"c{i}", URL, b"{}", None) for i in range(n))


def test_a_journal_goes_on_after_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path) as journal:
        journal.append(answered("a", 200, "r", BODY))
        journal.append(answered("b", 400, "r", b"{}"))
    whole = path.read_bytes()
    assert [json.loads(text)["custom_id"] for text in whole.splitlines()] == ["a", "b"]
    for cut in (b"", b"{", whole.splitlines()[0]):
        path.write_bytes(whole + cut)
        with Journal(path) as journal:
            assert journal.done == {"a": 1, "b": 2}
            assert (journal.tally.completed, journal.tally.failed) == (1, 1)
            assert (journal.tally.prompt_tokens, journal.tally.output_tokens) == (5, 2)
        assert path.read_bytes() == whole


def test_what_is_no_journal_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for content, said in ((b"notes\n", "line 1 is no line of a batch's output"), (b"[" * 10**5 + b"\n", "line 1")):
        path.write_bytes(content + b"torn")
        with pytest.raises(ConfigError, match=said):
            Journal(path)
        assert path.read_bytes() == content + b"torn"
    with Journal(tmp_path / "two") as journal:
        journal.append(answered("a", 200, "r", BODY))
    path.write_bytes((tmp_path / "two").read_bytes() * 2)
    with pytest.raises(ConfigError, match="line 2 answers custom_id 'a' again, after line 1"):
        Journal(path)
    with pytest.raises(ResourceError, match="cannot write"):
        Journal(tmp_path)


def test_one_at_a_time_writes_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "out"), pytest.raises(ResourceError, match="is being written by another process"):
        Journal(tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "n"),
    [({}, 1), ({"n": 4}, 4), ({"prompt": ["a", "b"], "best_of": 3}, 6), ({"prompt": [1, 2, 3]}, 1), ({"n": "x"}, 1)],
)
def test_how_many_sequences_a_line_makes(fields: dict[str, Any], n: int) -> None:
    text = json.dumps({"custom_id": "a", "method": "POST", "url": URL, "body": fields})
    assert parse_line(1, text.encode()).n_sequences == n
    text = text.replace(URL, "/v1/embeddings").replace('"prompt"', '"input"')
    assert parse_line(1, text.encode()).n_sequences == n


def test_a_file_has_so_many_lines_and_no_more_are_told_wrong_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    each = [json.dumps({"custom_id": f"c{i}", "method": "POST", "url": URL, "body": {"model": "m"}}) for i in range(5)]
    path.write_text("\n\n".join(each) + "\n \n")
    check = check_file(path)
    assert check.ids == {f"c{i}": 1 + 2 * i for i in range(5)}
    assert (check.models, check.bad) == ({"m": 1}, [])
    assert "line 9: a batch may have 4 requests" in str(check_file(path, max_lines=4).bad[0])
    path.write_text("\n".join(["{"] * 5))
    assert len(check_file(path, max_bad=2).bad) == 2
    with pytest.raises(BadLine, match="line 1"):
        next(sound_lines(path))
    with pytest.raises(ConfigError, match="cannot read"):
        check_file(tmp_path / "none")


def refused(status: int, code: str | None = None, retry_after_s: float | None = None) -> Answer:
    body = json.dumps({"error": {"message": "no", "type": "t", "param": None, "code": code}})
    return Answer(status, "r", body.encode(), retry_after_s)


@pytest.mark.parametrize(
    ("answer", "tries", "waits"),
    [
        (refused(429, "rate_limit_exceeded", 3), 99, 3.0),
        (refused(429), 1, 1.0),
        (refused(429, None, 10**6), 1, 60.0),
        (refused(503, "engine_restarting", 1), 99, 1.0),
        (refused(503, "engine_dead", 5), 1, 5.0),
        (refused(503, "engine_dead", 5), 2, None),
        (refused(499), 99, 1.0),
        (refused(500, "internal_error"), 1, None),
        (refused(400), 1, None),
        (Answer(200, "r", BODY), 1, None),
    ],
)
def test_which_refusals_are_no_answer_yet(answer: Answer, tries: int, waits: float | None) -> None:
    assert wait_s(answer, tries) == waits


def test_a_run_asks_each_once_so_many_at_a_time_and_what_is_left_after_a_stop(tmp_path: Path) -> None:
    asked: list[str] = []
    n_now = most = 0

    async def ask(line: Line) -> Answer:
        nonlocal n_now, most
        n_now += 1
        most = max(most, n_now)
        asked.append(line.custom_id)
        await asyncio.sleep(0)
        n_now -= 1
        if len(asked) == 10:
            run.stop()
        return Answer(200, "r", BODY)

    for _ in range(2):
        with Journal(tmp_path / "out") as journal:
            run = BatchRun(lines(20), ask, journal, n_at_once=3)
            asyncio.run(run.run())
            assert len(journal.done) == len(set(asked)) == len(asked)
            assert 10 <= len(asked) <= 20
    assert len(asked) == 20
    assert most == 3


def test_a_refused_line_is_asked_again_and_what_asking_raises_ends_the_run(tmp_path: Path) -> None:
    answers = [refused(429, None, 0.001), refused(503, "model_loading", 0.001), Answer(200, "r", BODY)]

    async def ask(line: Line) -> Answer:
        if not answers:
            raise ResourceError("gone")
        return answers.pop(0)

    with Journal(tmp_path / "out") as journal:
        with pytest.raises(ResourceError, match="gone"):
            asyncio.run(BatchRun(lines(5), ask, journal, n_at_once=1).run())
        assert journal.done == {"c0": 1}
