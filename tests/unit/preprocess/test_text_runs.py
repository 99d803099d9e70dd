"""Runs over texts: the same bytes for any threads, blocks and engines; shards; interrupted and resumed; verified."""

from __future__ import annotations

import json
import os
import resource

import numpy as np
import pytest

from internlm_ds.data.binmeta import Reader
from internlm_ds.data.partial import PartialOutput
from internlm_ds.errors import DataFormatError, TokenizerError
from internlm_ds.preprocess import texttask
from internlm_ds.preprocess.engine.plain_rows import PlainRows
from internlm_ds.preprocess.journal import Journal
from internlm_ds.preprocess.pretrain import TextOptions, Work, tokenize_texts
from internlm_ds.preprocess.rows import Rows
from internlm_ds.preprocess.textrun import TextRun

LONG = "the cat sat on the mat。" * 400
LINES = [f"the cat {i} 猫坐在垫子上。 <s>" for i in range(300)]


PLAIN = TextOptions()


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join([*LINES[:200], LONG, f"  {LONG} \u3000", *LINES[200:]]), "utf-8")
    records = [{"text": line} for line in [*LINES[:50], LONG, " "]]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(record) for record in records), "utf-8")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "c.json").write_text(json.dumps([LONG, "", *LINES[:50]]), "utf-8")
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "empty.txt", "c.json")]


def content(output):
    return {path.name: path.read_bytes() for path in sorted(output.parent.iterdir())}


@pytest.fixture
def tokenize(tmp_path, raw, tiny_tokenizer):
    warnings = []

    def run(name="x", inputs=raw, options=PLAIN, **more):
        calls = {key: more.pop(key) for key in ("append", "overwrite") if key in more}
        output = tmp_path / name / "en" / "x.bin"
        work = Work(**{"block_bytes": 700, "journal_s": 0.0, "workers": 1, **more})
        run.summary = tokenize_texts(
            inputs, output, tokenizer=tiny_tokenizer, options=options, work=work, warn=warnings.append, **calls
        )
        return content(output)

    run.warnings = warnings
    return run


OPTIONS = [PLAIN, TextOptions(bos=True, eos=True), TextOptions(bos=True, eos=True, compat=True)]


@pytest.mark.parametrize("options", OPTIONS)
def test_threads_blocks_and_engines_change_nothing(tokenize, options):
    expected = tokenize("one", options=options, block_bytes=1 << 20, engine="sentencepiece")
    for i, work in enumerate(({"workers": 3}, {"block_bytes": 64}, {"engine": "arrays"}, {"engine": "compiled"})):
        assert tokenize(f"other{i}", options=options, **work) == expected
    assert not tokenize.warnings


def test_rows_are_the_ids_of_the_slow_way(tokenize, tiny_tokenizer, tmp_path):
    tokenize("x", block_bytes=64)
    expected = [*LINES[:200], LONG, LONG, *LINES[200:], *LINES[:50], LONG, LONG, *LINES[:50]]
    found = [tokens.tolist() for tokens in Reader(tmp_path / "x/en/x.bin")]
    assert found == tiny_tokenizer.encode(expected)
    record = json.loads((tmp_path / "x/en/x.bin.json").read_text())
    assert [(s["samples"], s["empty"]) for s in record["sources"]] == [(302, 0), (51, 1), (0, 0), (51, 1)]
    assert record["counts"]["largest_id"] == max(map(max, found))


def test_shards_hold_the_rows_in_order_each_with_its_own_counts(tokenize, tmp_path):
    whole = tokenize("one")
    expected = tokenize("shards", shard_bytes=9000)
    assert tokenize("again", shard_bytes=9000, block_bytes=64, workers=3) == expected
    bins = sorted(name for name in expected if name.endswith(".bin"))
    assert b"".join(expected[name] for name in bins) == whole["x.bin"] and bins[0] == "x-00000.bin"
    sources = []
    for index, name in enumerate(bins):
        reader = Reader(tmp_path / "shards/en" / name)
        last = len(reader) - 1
        assert reader.offsets[last] < 9000 and (name == bins[-1] or len(expected[name]) >= 9000)
        record = json.loads(expected[f"{name}.json"])
        assert record["shard"] == {"index": index, "count": len(bins), "bytes": 9000}
        assert record["counts"]["samples"] == len(reader) == sum(s["samples"] for s in record["sources"])
        assert record["counts"]["largest_id"] == max(int(tokens.max()) for tokens in reader)
        assert record["counts"]["bytes"] == len(expected[name])
        sources += [source["path"] for source in record["sources"]]
    assert {source.rsplit("/", 1)[1] for source in sources} == {"a.txt", "b.jsonl", "empty.txt", "c.json"}
    assert str(tokenize.summary).startswith(f"{tmp_path}/again/en/x-00000.bin and {len(bins) - 1} more: 404 samples")


def test_shards_of_nothing_are_one_empty_bin(tokenize, raw):
    found = tokenize(inputs=raw[2:3], shard_bytes=10)
    assert found["x-00000.bin"] == b"" and "no sample was written" in tokenize.warnings[0]


def test_overwrite_leaves_no_bin_of_the_other_kind(tokenize):
    whole, shards = tokenize("one"), tokenize("shards", shard_bytes=9000)
    with pytest.raises(DataFormatError, match=r"x-00000\.bin: the output exists; --overwrite replaces it"):
        tokenize("shards")
    with pytest.raises(DataFormatError, match=r"x\.bin: the output exists"):
        tokenize("one", shard_bytes=9000)
    assert tokenize("shards", overwrite=True) == whole
    assert tokenize("one", overwrite=True, shard_bytes=9000) == shards


class Stopped(BaseException):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Runs stop after so many pieces, as if the process were gone: nothing is cleared up."""

    def stop(pieces):
        written = 0
        real = TextRun._write

        def write(self, place, encoded):
            nonlocal written
            written += 1
            if written > pieces:
                raise Stopped
            real(self, place, encoded)

        def note(self, state, handles, real=Journal.note):
            real(self, state, handles)
            self._pending.result()  # each is on disk before the run goes on

        monkeypatch.setattr(TextRun, "_write", write)
        monkeypatch.setattr(Journal, "note", note)
        monkeypatch.setattr(PartialOutput, "discard", PartialOutput.leave)

    yield stop
    monkeypatch.undo()


@pytest.mark.parametrize("pieces", [1, 20, 45, 70])
@pytest.mark.parametrize("more", [{}, {"shard_bytes": 5000}])
def test_stopped_run_is_resumed(tokenize, stop_after, monkeypatch, pieces, more):
    expected = tokenize("whole", **more)
    stop_after(pieces)
    with pytest.raises(Stopped):
        tokenize("x", **more)
    monkeypatch.undo()
    read = []
    real = TextRun._write
    monkeypatch.setattr(TextRun, "_write", lambda self, place, rows: (read.append(place), real(self, place, rows)))
    assert tokenize("x", resume=True, workers=3, **more) == expected
    assert len(read) <= 100 - pieces + 30  # the long text in which it stopped was begun again, nothing before it


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"options": TextOptions(eos=True)}, "cannot resume: --eos was False, now True"),
        ({"shard_bytes": 4096}, "--shard-size was not given, now 4096"),
        ({"verify": True}, "--verify was False, now True. Use what it was begun with, or start over without --resume"),
    ],
)
def test_resume_with_other_options_names_them(tokenize, stop_after, monkeypatch, tmp_path, more, message):
    stop_after(40)
    with pytest.raises(Stopped):
        tokenize()
    monkeypatch.undo()
    with pytest.raises(DataFormatError, match=message):
        tokenize(resume=True, **more)
    assert (tmp_path / "x/en/.x.bin.partial").is_dir()
    expected = tokenize("other", options=more.get("options", PLAIN), shard_bytes=more.get("shard_bytes"))
    assert tokenize(**more) == expected  # without --resume it starts over


@pytest.mark.parametrize("number", [0, 1, 3])
def test_resume_with_changed_inputs_is_refused(tokenize, stop_after, monkeypatch, raw, number):
    stop_after(60)
    with pytest.raises(Stopped):
        tokenize()
    monkeypatch.undo()
    for inputs, what in ((raw[1:], r"a\.txt \(\d+ bytes\) not any more"), (raw[::-1], "another order")):
        with pytest.raises(DataFormatError, match=f"cannot resume: inputs: .*{what}"):
            tokenize(resume=True, inputs=inputs)
    with open(raw[number], "r+b") as file:
        file.seek(12)
        file.write(b"X")
    if number == 3:  # not read yet: what it holds now counts
        tokenize(resume=True)
        return
    with pytest.raises(DataFormatError, match="cannot resume: this input is not what it was"):
        tokenize(resume=True)


def test_resume_of_a_complete_output_changes_nothing(tokenize, raw, tmp_path):
    for more in ({}, {"shard_bytes": 9000}):
        name = str(len(more))
        expected = tokenize(name, resume=True, **more)
        assert not tokenize.summary.was_complete
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / name / "en").iterdir()}
        assert tokenize(name, resume=True, **more) == expected
        assert tokenize.summary.was_complete and "complete already, 404 samples" in str(tokenize.summary)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / name / "en").iterdir()} == before
        for other in ({"options": TextOptions(eos=True)}, {"inputs": raw[:1]}, {"shard_bytes": 77}):
            with pytest.raises(DataFormatError, match="the output exists, and nothing says that this run made it"):
                tokenize(name, resume=True, **{**more, **other})


def test_full_disk_keeps_what_is_done_for_resume_only(tokenize, tmp_path):
    expected = tokenize("whole", workers=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for resume in (False, True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected["x.bin"]) - 100, limits[1]))
        try:
            with pytest.raises(OSError, match=r"cannot be written: File too large: '.*x\.bin'"):
                tokenize("full", resume=resume)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in (tmp_path / "full/en").iterdir()] == [".x.bin.partial"] * resume
    assert "keeps what is done; --resume goes on from there" in tokenize.warnings[-1]
    assert tokenize("full", resume=True) == expected


@pytest.mark.parametrize("content", [b"good\n" * 500 + b"b\xffd\n", b"good\n" * 500 + b"\xe4\xb8"])
@pytest.mark.parametrize("workers", [1, 3])
def test_bad_text_is_named_and_leaves_nothing(tokenize, tmp_path, content, workers):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataFormatError, match=r"bad\.txt, line 501: byte 0x(ff|e4) is no UTF-8"):
        tokenize(inputs=[str(tmp_path / "bad.txt")], workers=workers)
    assert list((tmp_path / "x/en").iterdir()) == []


class Wrong(PlainRows):
    """Goes wrong on one text."""

    def __init__(self, encoder):
        super().__init__(encoder)
        self.engine = "wrong"

    def encode(self, block):
        rows = super().encode(block)
        return Rows(bytes(rows.data).replace(b"[", b"[9", 1), rows.sizes, rows.lengths, rows.largest_id)


def test_verify_finds_a_difference_and_the_output_is_right(tokenize, tiny_tokenizer, monkeypatch):
    expected = tokenize("right")
    assert tokenize("verified", verify=True, workers=2) == expected and not tokenize.warnings
    monkeypatch.setattr(texttask, "row_encoder", lambda tokenizer, **_: Wrong(tokenizer))
    assert tokenize("mended", verify=True) == expected
    assert len(tokenize.warnings) == 1 and "THE ENGINE 'wrong' GAVE OTHER TOKENS than sentenc" in tokenize.warnings[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"workers": 0}, "--workers 0: at least 1"),
        ({"shard_bytes": 0}, "--shard-size 0: at least 1 byte"),
        ({"append": True, "shard_bytes": 5}, "--append and --shard-size exclude each other"),
        ({"append": True, "resume": True}, "--append and --resume exclude each other"),
        ({"append": True, "overwrite": True}, "--append and --overwrite exclude each other"),
        ({"shard_bytes": 5, "options": TextOptions(compat=True)}, "--shard-size and --compat reference exclude"),
    ],
)
def test_wishes_that_exclude_each_other(tokenize, more, message):
    with pytest.raises(DataFormatError, match=message):
        tokenize(**more)


def test_compat_resumed_is_not_appended(tokenize):
    options = TextOptions(bos=True, eos=True, compat=True)
    once = tokenize(options=options, resume=True)
    assert tokenize(options=options, resume=True) == once
    twice = tokenize(options=options)
    assert twice["x.bin"] == 2 * once["x.bin"]


def test_model_without_the_piece_leaves_nothing(tokenize, tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(type(tiny_tokenizer), "_control_id", lambda self, name: -1)
    with pytest.raises(TokenizerError, match="has no bos piece"):
        tokenize(options=TextOptions(bos=True))
    assert not np.any([path.is_file() for path in (tmp_path / "x").rglob("*")])


@pytest.mark.parametrize("note", [False, True])
def test_interrupted_run_keeps_what_it_has_noted(tokenize, monkeypatch, tmp_path, note):
    expected = tokenize("whole")
    written = []
    real, real_note = TextRun._write, Journal.note

    def write(self, place, encoded):
        written.append(place)
        if len(written) > 30:
            raise KeyboardInterrupt
        real(self, place, encoded)

    def noted(self, state, handles):
        real_note(self, state, handles)
        self._pending.result()

    monkeypatch.setattr(TextRun, "_write", write)
    monkeypatch.setattr(Journal, "note", noted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(journal_s=0.0 if note else 3600.0)
    assert [path.name for path in (tmp_path / "x/en").iterdir()] == [".x.bin.partial"] * note
    monkeypatch.undo()
    assert tokenize(resume=True) == expected


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file at hand that opens and cannot be read")
def test_input_that_cannot_be_read_is_named(tokenize, tmp_path):
    (tmp_path / "x.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataFormatError, match=r"x\.txt, byte 0: cannot be read: Input/output error"):
        tokenize(inputs=[str(tmp_path / "x.txt")])
    assert list((tmp_path / "x/en").iterdir()) == []


def test_two_runs_into_one_output_are_one_too_many(tokenize, tmp_path):
    other = PartialOutput(tmp_path / "x/en/x.bin")
    other.open()
    for resume in (False, True):
        with pytest.raises(DataFormatError, match=r"x\.bin: another process is writing this output"):
            tokenize(resume=resume)
    other.discard()
    tokenize()
