"""Texts out of lines and records, for people and as the reference reads them."""

from __future__ import annotations

import pytest

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.documents import Document, batches, read_documents, read_reference_documents
from internlm_ds.preprocess.files import SourceFile


@pytest.fixture
def source(tmp_path):
    def make(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return SourceFile(str(path))

    return make


def read(source, **options):
    return [(d.text, d.line) for d in read_documents(source, **options)]


def read_reference(source):
    return [(d.text, d.line) for d in read_reference_documents(source)]


def test_lines_of_a_text_file_are_stripped_and_blank_ones_dropped(source):
    made = source("a.txt", "\ufeffone \n\n \t\n  two\n")
    assert read(made) == [("one", 1), ("two", 4)]
    assert read_reference(made) == [("\ufeffone", 1), ("two", 4)]


def test_records_give_their_text_field(source):
    lines = '{"text": "a\\n", "content": "x"}\n\n{"content": "b"}\n"c"\n{"text": ""}\n'
    expected = [("a\n", 1), ("b", 3), ("c", 4), ("", 5)]
    assert read(source("a.jsonl", lines)) == expected
    listed = "[" + lines.replace("}\n", "},\n").replace('"c"\n', '"c",\n').rstrip(",\n") + "]"
    assert read(source("a.json", listed)) == expected


def test_text_key_chooses_the_field(source):
    assert read(source("a.jsonl", '{"text": "a", "body": "b"}'), text_key="body") == [("b", 1)]


def test_reference_reads_records_as_raw_json(source):
    assert read_reference(source("a.json", '[{"b": "中", "a": 1.0}, "x", [NaN]]')) == [
        ('{"b": "\\u4e2d", "a": 1.0}', 1),
        ('"x"', 1),
        ("[NaN]", 1),
    ]
    assert read_reference(source("a.jsonl", '{"a":1}\n\nno json')) == [('{"a":1}\n', 1), ("\n", 2), ("no json", 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', 'has no field "text" or "content"; its fields: "body". Name the one .* --text-key'),
        ("{}", "its fields: none"),
        ("[1]", "a record is an object with a text field, or a string; this is a list"),
        ("5", "this is a number"),
        ("null", "this is null"),
        ('{"text": true}', 'the field "text" is true or false, a string is needed'),
        ('{"text": {}}', 'the field "text" is an object'),
        ('{"text": "\\ud83d"}', r'the field "text" holds half a surrogate pair \(\\ud83d\)'),
        ("{text}", r"no JSON: Expecting property name.*one record a line"),
        ("[" * 100_000, "no JSON: .*recursion"),
    ],
)
def test_errors_of_records_name_file_and_line(source, line, message):
    with pytest.raises(DataFormatError, match=rf"a\.jsonl, line 2: .*{message}"):
        read(source("a.jsonl", '"good"\n' + line + "\n"))


def test_missing_text_key_is_named(source):
    with pytest.raises(DataFormatError, match='line 1: this record has no field "body"; its fields: "text"'):
        read(source("a.jsonl", '{"text": "a"}'), text_key="body")


def test_batches_hold_everything_in_order():
    documents = [Document("x" * (i % 7) * 1000, i) for i in range(3000)]
    found = list(batches(iter(documents)))
    assert [d for batch in found for d in batch] == documents
    assert len(found) > 3 and all(len(batch) <= 1024 for batch in found)
