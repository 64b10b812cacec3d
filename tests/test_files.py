"""JSONL files: errors name the line, whole files appear at once, growing files lose only a torn last line."""

import json

import pytest

from conj import InputError
from conj.data import files
from conj.data.files import (
    cut_torn_line,
    dump_line,
    locate_jsonl,
    read_at,
    read_jsonl,
    recover_jsonl,
    write_atomic,
    write_jsonl,
)


@pytest.mark.parametrize(("line", "message"), [
    ('{"id": 1', "expected a JSON object, found '{\"id\": 1'"), ("[1]", "expected a JSON object, found list"),
    ("", "expected a JSON object, found ''"), ("[" * 100_000, "expected a JSON object"),
    ('{"text": "x"}', "missing column id; found text"),
])  # fmt: skip
def test_bad_line_is_named(line, message, tmp_path):
    """File, line, what was expected and what was found."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n' * 16 + line + '\n{"id": 2}\n')
    with pytest.raises(InputError) as error:
        read_jsonl(path, {"id": int})
    assert str(error.value).startswith(f"{path}:17: {message}")


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), (b"", "at least one row"), (b"\xff", "read")])
def test_unreadable_file_is_an_input_error(content, message, tmp_path):
    """Missing, empty, or not UTF-8."""
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


def test_any_text_survives_the_file(tmp_path):
    """Line separators inside a text must not split its line; lone surrogates must not stop a stage at its last row."""
    rows = [{"text": text} for text in ("回答", "a\u2028b\x85c\r\nd\x00", "\ud83d", "e\u0301", "\ufeff")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_text_is_not_escaped():
    """People read these files, and half of the text is Chinese."""
    assert dump_line({"原因": "好"}) == '{"原因": "好"}\n'


def test_torn_last_line_is_cut_off(tmp_path):
    """What a killed run leaves: the torn line goes, from the file too, so that appending goes on after whole lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n{"id": 3, "te')
    assert recover_jsonl(path, {"id": int}) == [{"id": 1}, {"id": 2}]
    with open(path, "a") as file:
        file.write('{"id": 3}\n')
    assert [row["id"] for row in read_jsonl(path)] == [1, 2, 3]


@pytest.mark.parametrize("content", [None, "", '{"id": 1'])
def test_nothing_whole_recovers_to_nothing(content, tmp_path):
    """A run killed before its first whole line starts from the beginning."""
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    assert recover_jsonl(path) == []


def test_broken_line_in_the_middle_is_not_recovered_from(tmp_path):
    """Only the last line can be torn by a kill; anything else is damage that the user must see."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": \n{"id": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2"):
        recover_jsonl(path)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A kill before the rename must not leave half a file under the artefact's name."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": 1}])

    def fail(source, target):
        raise OSError("killed")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_atomic(path, json.dumps({"id": 2}).encode())
    assert read_jsonl(path) == [{"id": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_that_end_in_an_error_leave_the_old_file_and_nothing_beside_it(tmp_path):
    """A stage writes rows as it makes them, and may refuse the last one."""

    def rows():
        yield {"id": 2}
        raise InputError("no")

    write_jsonl(tmp_path / "rows.jsonl", [{"id": 1}])
    with pytest.raises(InputError):
        write_jsonl(tmp_path / "rows.jsonl", rows())
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"id": 1}] and len(list(tmp_path.iterdir())) == 1


def test_rows_are_read_again_from_the_byte_where_they_start(tmp_path):
    rows = [{"text": text} for text in ("回答", "a\u2028b\r\n", "\ud83d", "")]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    places = {number: offset for number, offset, _ in locate_jsonl(path)}
    with open(path, "rb") as file:
        assert [read_at(file, places[number]) for number in (4, 1, 3, 2)] == [rows[i] for i in (3, 0, 2, 1)]


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_a_torn_line_is_cut_off_wherever_blocks_end(block, tmp_path, monkeypatch):
    """Files are larger than memory: the end is looked for from the end."""
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    path = tmp_path / "rows.jsonl"
    for whole, torn in ((b"", b""), (b"", b"{"), (b"{}\n", b""), (b"{}\n{}\n", b'{"a": 1'), (b"\n", b"x" * 30)):
        path.write_bytes(whole + torn)
        assert cut_torn_line(path) == len(whole) and path.read_bytes() == whole
