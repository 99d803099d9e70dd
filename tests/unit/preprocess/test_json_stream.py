"""The incremental list reader gives what `json.loads` gives, however the text is cut."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess import json_stream
from internlm_ds.preprocess.json_stream import list_elements

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def elements(text):
    return list(list_elements(io.StringIO(text), path="a.json"))


@given(st.lists(values, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_equals_the_whole_decoder(data, indent, ascii_only, chunk):
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    whole, json_stream._CHUNK_CHARS = json_stream._CHUNK_CHARS, chunk
    try:
        found = [value for _, value in elements(text)]
    finally:
        json_stream._CHUNK_CHARS = whole
    assert json.dumps(found) == json.dumps(data)


def test_elements_carry_the_line_on_which_they_begin():
    assert elements('\n[1,\n\n {"a":\n 2}\n, "x"]\n') == [(2, 1), (4, {"a": 2}), (6, "x")]


def test_byte_order_mark_and_blanks_around_the_list():
    assert elements("\ufeff [ ] \n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.json, line 1: an empty file is no JSON"),
        ('\n{"text": "x"}', r"line 2: a \.json input is one list of records.*name the file \.jsonl"),
        ("[1,\n2,\n]", r"line 3: no JSON: Expecting value"),
        ("[1\n2]", r"line 2: ',' or '\]' expected behind an element, found '2'"),
        ("[1,\n2", r"line 2: ',' or '\]' expected behind an element, the file ends here"),
        ('["a",\n{"b": 1,\n', r"line 3: no JSON: .*\(the file ends here\)"),
        ('["a",\n"b', r"line 2: no JSON: Unterminated string"),
        ("[1]\n[2]", r"line 2: the list has ended, nothing may follow, found '\['"),
        ('["a\nb"]', r"line 1: no JSON: Invalid control character"),
        ("[" + "[" * 100_000, r"line 1: unusable JSON: .*recursion"),
    ],
)
def test_errors_name_file_and_line(text, message):
    with pytest.raises(DataFormatError, match=message):
        elements(text)


def test_error_far_behind_the_first_buffer_is_found():
    text = "[" + '{"text": "abcdefgh"},\n' * 20_000 + "{]"
    with pytest.raises(DataFormatError, match="line 20001: no JSON: Expecting property name"):
        elements(text)


def test_bytes_that_are_no_utf8():
    stream = io.TextIOWrapper(io.BytesIO(b'["a",\n"\xfe"]'), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataFormatError, match="line 2: byte 0xfe is no UTF-8"):
        list(list_elements(stream, path="a.json"))
