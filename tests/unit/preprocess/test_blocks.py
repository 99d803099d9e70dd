"""Pieces of a file hold the texts that the slow reader finds, whatever the size of a block, and fail where it fails."""

from __future__ import annotations

import gzip
import json

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.blanks import BLANKS, stripped_lines
from internlm_ds.preprocess.blocks import pieces, split
from internlm_ds.preprocess.documents import read_documents
from internlm_ds.preprocess.files import SourceFile
from internlm_ds.preprocess.longtext import Cuts
from internlm_ds.preprocess.window import Window, count_lines

CUTS = Cuts(["ab", "a\u2581", "一丁", "\u2581\u2581"])
ODD = [*"".join(BLANKS), *"\n\n\n\r", "\r\n", *"aabb cd一丁é😀\u200b\u2010\u3001\ufeff\x85\u00c2\u0405\0"]
odd_text = st.lists(st.sampled_from(ODD), max_size=60).map("".join)
block_sizes = st.sampled_from([1, 2, 3, 5, 8, 13, 40, 1 << 19])


def texts(path, *, block_bytes, cuts=CUTS):
    """All texts of a file by way of pieces, those in parts put together."""
    found, open_text = [], None
    for piece in pieces(SourceFile(str(path)), text_key=None, cuts=lambda: cuts, block_bytes=block_bytes):
        block = split(piece, text_key=None).block
        got = [block.text[b:e].decode() for b, e in zip(block.begins.tolist(), block.ends.tolist())]
        if piece.kind != "part":
            assert open_text is None
            found += got
            continue
        assert (open_text is None) == piece.begins and len(got) <= 1
        open_text = (open_text or "") + "".join(got)
        if piece.ends:
            found.append(open_text)
            open_text = None
    assert open_text is None
    return found


def outcome(read):
    try:
        return [text for text in read() if text and not text.isspace()]
    except DataFormatError as error:
        return str(error)


def check(folder, name, content, block_bytes):
    path = folder / name
    path.write_bytes(content)
    expected = outcome(lambda: [document.text for document in read_documents(SourceFile(str(path)))])
    assert outcome(lambda: texts(path, block_bytes=block_bytes)) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("blocks")


def test_blanks_are_all_that_python_knows():
    assert sorted("".join(BLANKS)) == [chr(i) for i in range(0x110000) if chr(i).isspace()]


@given(text=odd_text)
def test_lines_are_stripped_as_strings_are(text):
    data = text.encode()
    expected = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found = [data[b:e].decode() for b, e in zip(*stripped_lines(data))]
    assert found == [line.strip() for line in expected if line.strip()]


@pytest.mark.parametrize("blank", ["".join(BLANKS).replace("\n", "").replace("\r", ""), " ", "\u3000", "\xa0 "])
@pytest.mark.parametrize("count", [1, 47, 48, 49, 200])
def test_wide_margins(blank, count):
    margin = blank * count
    data = f"{margin}\n{margin}a{margin}b{margin}\n{margin}".encode()
    assert [data[b:e].decode() for b, e in zip(*stripped_lines(data))] == [f"a{margin}b"]


@given(text=odd_text, block_bytes=block_sizes)
def test_text_files_give_the_slow_readers_texts(folder, text, block_bytes):
    check(folder, "a.txt", text.encode(), block_bytes)


@given(
    content=st.lists(st.sampled_from([b"a", b" ", b"\n", b"\r", b"\xe4\xb8\x80", b"\xff", b"\xe4", b"\x80"])).map(
        b"".join
    )
)
@pytest.mark.parametrize("block_bytes", [2, 1 << 19])
def test_bytes_that_are_no_utf8_are_found_on_the_same_line(folder, content, block_bytes):
    check(folder, "a.txt", content, block_bytes)


records = st.one_of(
    odd_text,
    odd_text.map(lambda text: {"text": text}),
    odd_text.map(lambda text: {"content": text, "n": [1]}),
    st.sampled_from([{}, 3, None, {"text": 5}, {"text": "\ud800"}]),
)


@example(values=[{}, {"text": "\ud800"}], block_bytes=40, ends="\n")
@given(values=st.lists(records, max_size=6), block_bytes=block_sizes, ends=st.sampled_from(["\n", "\r\n", "\n \n"]))
def test_records_give_the_slow_readers_texts(folder, values, block_bytes, ends):
    lines = ends.join(json.dumps(value, ensure_ascii=i % 2 == 0) for i, value in enumerate(values))
    check(folder, "a.jsonl", lines.encode("utf-8", "surrogatepass"), block_bytes)
    check(folder, "a.json", json.dumps(values).encode(), block_bytes)


@pytest.mark.parametrize("line", ['{"text": "a"', '["text"]', "\ufeff5", "{}", '"a"\v', '"\x01"'])
def test_lines_that_are_no_records_fail_alike(folder, line):
    for block_bytes in (4, 1 << 19):
        check(folder, "a.jsonl", f'"good"\r\n"good"\r{line}\n'.encode(), block_bytes)


def test_byte_order_mark_is_dropped_once(folder):
    for name, text in (("a.txt", "\ufeff\ufeffa\n\ufeffb"), ("a.jsonl", '\ufeff"a"\n"b"'), ("a.json", '\ufeff["a"]')):
        check(folder, name, text.encode(), 1 << 19)


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_few_compressed_bytes_that_are_many(folder, ending, pack):
    check(folder, f"a.txt.{ending}", pack(b"ab c" * 500_000 + b"\n" + b" " * 3_000_000 + b"d"), 1 << 12)


def test_text_that_cannot_be_cut_has_a_limit(folder, monkeypatch):
    monkeypatch.setattr("internlm_ds.preprocess.longtext.MAX_CHARS", 1000)
    path = folder / "a.txt"
    path.write_bytes(b"one\n" + b"c" * 100 + b"ab" * 400 + b"\n")
    assert texts(path, block_bytes=16)[1] == "c" * 100 + "ab" * 400
    path.write_bytes(b"one\n" + b"a" * 900 + b"\n" + "一".encode() * 1001)
    assert texts(path, block_bytes=16, cuts=Cuts(["x"]))[2] == "一" * 1001
    with pytest.raises(DataFormatError, match=r"a\.txt, line 3: more than 1000 characters .* split this text"):
        texts(path, block_bytes=16, cuts=None)
    with pytest.raises(DataFormatError, match=r"a\.txt, line 3: more than 1000 characters"):
        texts(path, block_bytes=16, cuts=Cuts(["一一"]))


def test_places_to_cut():
    assert CUTS.last(b"abab") == 2 and CUTS.last(b"cdcdcd") == 4
    assert CUTS.last("一丁一一x".encode()) == 9 and CUTS.last(b"c  ") == 1 and CUTS.last(b"a ") == 0
    assert CUTS.last(b"") == CUTS.last(b"c") == CUTS.last("一".encode()[:2]) == 0


@given(text=odd_text, chunk=st.integers(1, 9), size=st.integers(1, 12))
def test_window_gives_everything_in_whole_lines(text, chunk, size):
    data = text.encode()
    window = Window(data[i : i + chunk] for i in range(0, len(data), chunk))
    taken = b""
    while not window.is_empty():
        line = 1 + count_lines(taken)
        assert window.line == line
        lines = window.whole_lines(size)
        assert len(lines) <= size + 1
        taken += lines or window.next_line()
    assert taken == data
