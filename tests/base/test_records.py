"""Run records survive a process that dies in the middle of a line, and nothing else."""

from pathlib import Path

import pytest

from tenon.base.clock import ManualClock
from tenon.base.errors import ConfigError
from tenon.base.records import FILE_NAME, VERSION, RecordWriter, read_records


def write(folder: Path, *kinds: str) -> None:
    with RecordWriter(folder, clock=ManualClock(epoch_s=100.0)) as writer:
        for kind in kinds:
            writer.write(kind, text="größe\n")


def kinds(folder: Path) -> list[str]:
    return [record["kind"] for record in read_records(folder)]


def test_records_are_read_back_after_the_opening_one(tmp_path: Path) -> None:
    write(tmp_path / "run", "a", "b")
    opening, first, _ = read_records(tmp_path / "run")
    assert opening == {"kind": "run", "at_s": 100.0, "version": VERSION}
    assert first == {"kind": "a", "at_s": 100.0, "text": "größe\n"}


def test_a_torn_tail_is_dropped_at_every_length_and_cut_by_the_next_writer(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    start_of_b = whole[:-1].rindex(b"\n") + 1
    for length in range(start_of_b, len(whole)):
        path.write_bytes(whole[:length])
        assert kinds(tmp_path) == ["run", "a"]
        write(tmp_path, "c")
        assert kinds(tmp_path) == ["run", "a", "c"]


def test_a_file_torn_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b'{"kind": "ru')
    write(tmp_path, "a")
    assert kinds(tmp_path) == ["run", "a"]


def test_a_long_torn_tail_is_cut(tmp_path: Path) -> None:
    write(tmp_path, "a")
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b"x" * 200_000)
    write(tmp_path, "b")
    assert kinds(tmp_path) == ["run", "a", "b"]


@pytest.mark.parametrize("line", [b"{\n", b"[1]\n", b'{"at_s": 1}\n', b'"\xff"\n'])
def test_damage_before_the_tail_is_an_error_naming_the_line(tmp_path: Path, line: bytes) -> None:
    write(tmp_path, "a")
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ConfigError, match="line 3"):
        kinds(tmp_path)


@pytest.mark.parametrize("opening", [b'{"kind": "run", "version": 99}\n', b'{"kind": "other", "version": 1}\n'])
def test_another_version_is_refused(tmp_path: Path, opening: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(opening)
    with pytest.raises(ConfigError, match="this reader knows"):
        kinds(tmp_path)


def test_reserved_fields_are_refused(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer, pytest.raises(ValueError, match="at_s"):
        writer.write("a", at_s=1.0)
