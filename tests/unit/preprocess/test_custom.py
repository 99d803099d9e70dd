"""A function of the user's: what it may return, and how its faults are shown."""

from __future__ import annotations

import json

import pytest

from internlm_ds.data.binmeta import Reader
from internlm_ds.errors import DataFormatError, TokenizerError
from internlm_ds.preprocess.custom import custom_recipe, load_function
from internlm_ds.preprocess.samples import Frame
from internlm_ds.preprocess.sft import Split, tokenize_records

SOURCE = """
from internlm_ds.preprocess.custom import control

def make_sample(record):
    if record.get("skip"):
        return None
    return [(record["q"], False), (control("<eoh>"), False), (record["a"], True), ([5, 6], True), (7, False)]

def broken(record):
    return 1 / 0

def wrong(record):
    return record["made"]

def unknown(record):
    return [(control("<nope>"), True)]

number = 5
"""


@pytest.fixture
def run(tmp_path, tiny_tokenizer):
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "syntax.py").write_text("def (:\n")
    (tmp_path / "import.py").write_text("\nimport no_such_module\n")

    def tokenize(records, name="make_sample", file="mine.py"):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        address = f"{tmp_path}/{file}:{name}"
        recipe = custom_recipe(
            load_function(address), name=f"{file}:{name}", frame=Frame((1,), (2,)), vocab_size=tiny_tokenizer.vocab_size
        )
        output = tmp_path / "out"
        return tokenize_records(
            recipe, str(tmp_path / "a.jsonl"), output, tokenizer=tiny_tokenizer, split=Split(0.0), overwrite=True
        )

    return tokenize


def test_texts_ids_and_control_pieces(run, tmp_path, tiny_tokenizer):
    outcome = run([{"q": "the cat", "a": "mat"}, {"skip": True}])
    question, answer = tiny_tokenizer.encode(["the cat", "mat"])
    eoh = tiny_tokenizer.piece_id("<eoh>")
    (sample,) = Reader(tmp_path / "out/train/en/dataset.bin")
    assert sample.tolist() == [1, *[-i for i in question], -eoh, *answer, 5, 6, -7, -2]
    assert outcome.skipped == 1
    found = json.loads((tmp_path / "out/train/en/dataset.bin.json").read_text())
    assert (found["kind"], found["function"], found["counts"]["skipped"]) == ("custom", "mine.py:make_sample", 1)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], r'\[\]; a list such as \[\("text", True\)\] is needed, or None'),
        ("text", "'text'; a list"),
        ([["text"]], r"the element \['text'\]; \(content, True or False\) is needed"),
        ([["text", 1]], "the element"),
        ([[-1, True]], "the content -1; a text, an id "),
        ([[320, True]], r"the content 320; a text, an id \(0 to 319\)"),
        ([[[1, True], True]], "the content"),
        ([[None, True]], "the content None"),
        ([["\ud800", True]], "half a surrogate pair"),
    ],
)
def test_what_it_must_not_return(run, tmp_path, made, message):
    with pytest.raises(DataFormatError, match=rf"a\.jsonl, line 2: record 2: mine\.py:wrong returned .*{message}"):
        run([{"made": [["text", True]]}, {"made": made}], "wrong")
    assert not (tmp_path / "out").exists()


def test_what_it_raises_is_shown_with_record_and_line(run):
    expected = r"a\.jsonl, line 1: record 1: mine\.py:broken, line 10 raised ZeroDivisionError: division by zero"
    with pytest.raises(DataFormatError, match=expected):
        run([{}], "broken")


def test_a_control_piece_that_the_model_lacks(run, tmp_path):
    with pytest.raises(TokenizerError, match=r"tiny\.model has no piece '<nope>', which a sample asks for"):
        run([{}], "unknown")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("mine.py", "nothing", "the file has no function nothing"),
        ("mine.py", "number", "the file has no function number"),
        ("no.py", "make_sample", "no such file"),
        ("mine.py", "", r"write FILE\.py:NAME"),
        ("syntax.py", "x", r"syntax\.py, line 1: SyntaxError"),
        ("import.py", "x", r"import\.py, line 2: ModuleNotFoundError"),
        ("a.jsonl", "x", "a Python file is needed"),
    ],
)
def test_a_function_that_cannot_be_loaded(run, file, name, message):
    with pytest.raises(DataFormatError, match=message):
        run([{}], name, file)
