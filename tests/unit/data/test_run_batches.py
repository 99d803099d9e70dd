"""Batches of a run directory as lines and as JSON: losses, texts, what has changed, what is not known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internlm_ds.cli.data_show_run import run_show_run
from internlm_ds.config.schema import DataConfig
from internlm_ds.data import binmeta, record
from internlm_ds.data.run_batches import RunBatches, as_text
from internlm_ds.data.trainset import open_sampler, open_train_set
from internlm_ds.errors import DataFormatError, TokenizerError
from internlm_ds.preprocess.decode import open_decoder
from internlm_ds.preprocess.train_tokenizer import train_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of ten batches, two samples of four tokens a batch; batch 3 is left out, batch 6 has no finite loss."""
    with binmeta.Writer(tmp_path / "data/en/x.bin") as writer:
        for number in range(8):
            writer.write([10 * number + place for place in range(1, 5)])
    data = DataConfig(train_folder=str(tmp_path / "data"), seq_len=4, micro_bsz=1, micro_num=2, skip_batches="3")
    found = open_train_set(data, vocab_size=100, log=False)
    folder = tmp_path / "run"
    folder.mkdir()
    record.note_launch(
        folder,
        data=data,
        vocab_size=100,
        dataset_types=found.dataset_types,
        data_size=1,
        position=open_sampler(data, found.packs, found.files, data_rank=0, data_size=1).state_dict(),
        packs=found.packs,
        files=found.files,
    )
    losses = {index: 5 - index / 10 for index in range(10) if index != 3} | {6: None}
    lines = [json.dumps({"step": index, "loss": loss}) for index, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_lines_of_a_batch(run: Path) -> None:
    batches = RunBatches(run)
    lines = list(as_text(batches.documents(5, decode=lambda ids: f"text\nof {ids}")))
    assert lines[0] == "batch 5: loss 4.5000; epoch 1, 1 data-parallel rank x 2 micro-batches, 2 documents"
    assert [line.split(" (")[0] for line in lines[1::3]] == ["  rank 0, micro-batch 0", "  rank 0, micro-batch 1"]
    path = run.parent / "data/en/x.bin"
    for document, text in zip(lines[2::3], lines[3::3]):
        line = int(document.split(" line ")[1].split(",")[0])
        assert document == f"    {path} line {line}, tokens [0, 4) of 4, at 0"
        assert text == f"      text⏎of {[10 * (line - 1) + place for place in range(1, 5)]}"


def test_long_texts_are_shortened_in_lines_only(run: Path) -> None:
    batch = RunBatches(run).documents(0, decode=lambda ids: "x" * 500)
    assert [len(line) for line in list(as_text(batch))[3::3]] == [166, 166]
    assert len(batch["ranks"][0][0]["documents"][0]["text"]) == 500


def test_batches_that_were_not_trained_say_so(run: Path) -> None:
    batches = RunBatches(run)
    heads = {index: next(as_text(batches.documents(index))).split(";")[0] for index in (3, 6, 10)}
    assert heads == {3: "batch 3: left out by skip_batches", 6: "batch 6: loss not finite", 10: "batch 10: not trained"}


def test_largest_losses(run: Path) -> None:
    batches = RunBatches(run)
    assert batches.worst(4) == [6, 0, 1, 2]
    assert len(batches.worst(100)) == 9
    assert batches.without([6, 0, 1, 2]) == "0-3,6"


def test_a_launch_that_died_before_a_batch_did_not_train_it(run: Path) -> None:
    """Launch 0 trained all; a later one, with larger steps, began at batch 4 and wrote nothing."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, "time": 100.0}) + "\n" for line in lines))
    wanted = RunBatches(run).documents(5)
    note = json.loads((run / "data.json").read_text())
    (first,) = note["launches"]
    later = {**first, "time": 200.0, "position": {**first["position"], "batch_count": 4}}
    later["data"] = {**first["data"], "micro_num": 4}
    (run / "data.json").write_text(json.dumps({**note, "launches": [first, later]}))
    batches = RunBatches(run)
    assert batches.documents(5) == wanted
    assert len(batches.documents(10)["ranks"][0]) == 4  # the next one is its


def test_changed_files_are_named(run: Path) -> None:
    path = run.parent / "data/en/x.bin"
    samples = [sample.tolist() for sample in binmeta.Reader(path)]
    with binmeta.Writer(path, overwrite=True) as writer:
        for sample in [[*samples[0][::-1], 1, 2], samples[1][:2], *samples[2:]]:
            writer.write(sample)
    lines = list(as_text(RunBatches(run).documents(0)))
    assert lines[1].startswith(f"  warning: {path} has ") and "may not be what was trained on" in lines[1]


def test_printed(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERNLM_DS_TOKENIZER", raising=False)
    path = run.parent / "data/en/x.bin"
    path.with_name("x.bin.json").write_text('{"tokenizer": {"name": "t.model"}}')
    assert run_show_run(str(run), step=8, top_loss=1) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("batch ")] == [
        "batch 8: loss 4.2000; epoch 2, 1 data-parallel rank x 2 micro-batches, 2 documents",
        "batch 6: loss not finite; epoch 1, 1 data-parallel rank x 2 micro-batches, 2 documents",
    ]
    assert out.endswith('to leave these batches out: data.skip_batches = "3,6,8"\n')
    assert err == "no text is shown without --tokenizer MODEL; these were made with t.model\n"


def test_texts_of_a_tokenizer(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.parent / "tiny.model"
    train_tokenizer(["the cat sat on the mat, the dog sat on the log. " * 20], path, vocab_size=300)
    monkeypatch.setenv("INTERNLM_DS_TOKENIZER", str(path))
    assert run_show_run(str(run), step=2, as_json=True) == 0
    out, err = capsys.readouterr()
    decoder = open_decoder(str(path))
    for pack in json.loads(out)["batches"][0]["ranks"][0]:
        (document,) = pack["documents"]
        assert document["text"] == decoder.text([10 * (document["line"] - 1) + place for place in range(1, 5)])
    assert err == ""


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"step": None}, DataFormatError, "which batch of the run"),
        ({"step": -1}, DataFormatError, "counts from 0"),
        ({"step": 1, "tokenizer": "/nowhere.model"}, TokenizerError, r"/nowhere\.model does not exist"),
    ],
)
def test_what_cannot_be_asked(run: Path, asked: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run_show_run(str(run), **asked)


def test_no_losses_yet(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert next(as_text(RunBatches(run).documents(0))).startswith("batch 0: not trained; ")
    with pytest.raises(DataFormatError, match=r"no step has been written to metrics\.jsonl yet"):
        run_show_run(str(run), step=None, top_loss=2)
