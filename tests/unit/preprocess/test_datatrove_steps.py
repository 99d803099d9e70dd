"""The steps in datatrove's local executor make the rows that `preprocess text` makes."""

from __future__ import annotations

import json

import pytest

from internlm_ds.data.binmeta import Reader
from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.pretrain import TextOptions, tokenize_texts

pytest.importorskip("datatrove")
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor

from internlm_ds.preprocess import datatrove as steps


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat\n\n  sat on the mat \n", "utf-8")
    (folder / "b.jsonl").write_text('{"text": "猫"}\n{"text": " "}\n"the dog\\n"\n', "utf-8")
    (folder / "c.json").write_text(json.dumps(["the log"]), "utf-8")
    return folder


def test_local_executor_gives_the_rows_of_the_command(tmp_path, raw, tiny_tokenizer):
    pipeline = [
        steps.TextReader(str(raw)),
        steps.RowTokenizer(tiny_tokenizer.path, eos=True, engine="sentencepiece"),
        steps.BinWriter(tmp_path / "en", name="web"),
    ]
    for workers in (2, 1):  # the second time over what is there
        logs = str(tmp_path / "logs")
        LocalPipelineExecutor(pipeline, tasks=4, workers=workers, skip_completed=False, logging_dir=logs).run()
    assert sorted(path.name for path in (tmp_path / "en").glob("*.bin")) == [f"web-0000{i}.bin" for i in range(3)]
    for index, name in enumerate(("a.txt", "b.jsonl", "c.json")):
        output = tmp_path / "cn" / f"{name}.bin"
        tokenize_texts([str(raw / name)], output, tokenizer=tiny_tokenizer, options=TextOptions(eos=True))
        found = tmp_path / "en" / f"web-0000{index}.bin"
        assert found.read_bytes() == output.read_bytes() and len(Reader(found)) == len(Reader(output))
        record, expected = (json.loads(path.with_name(f"{path.name}.json").read_text()) for path in (found, output))
        assert record["tokenizer"] == expected["tokenizer"] and record["eos"] is True
        assert record["counts"] | {"empty": 0} == expected["counts"] | {"empty": 0}
        assert [source["path"] for source in record["sources"]] == [str(raw / name)]


def test_long_documents_are_one_row(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(steps, "BLOCK_BYTES", 16)
    text = "the cat sat on the mat。" * 50
    documents = [Document(text, "0"), Document(" ", "1"), Document("cat", "2")]
    found = list(steps.RowTokenizer(tiny_tokenizer.path, bos=True, engine="arrays").run(documents))
    assert [document.id for document in found] == ["0", "2"]
    expected = [[1, *ids] for ids in tiny_tokenizer.encode([text, "cat"])]
    assert [json.loads(document.metadata[steps.ROW].line)["tokens"] for document in found] == expected
    assert [document.metadata["token_count"] for document in found] == [len(ids) for ids in expected]


def test_document_without_tokens_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(DataFormatError, match="document 7 carries no tokens; put RowTokenizer before BinWriter"):
        list(steps.BinWriter(tmp_path).run([Document("a", "7")]))
    assert list(tmp_path.iterdir()) == []


def test_remote_folder_is_refused(tmp_path):
    with pytest.raises(DataFormatError, match="TextReader reads local folders"):
        steps.TextReader("memory://raw")
