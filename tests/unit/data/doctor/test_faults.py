"""`data check`: each planted fault is found with its file and line, alone; nothing is found in sound sets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import FAULTS, TEXT_BIN, VOCAB_SIZE, Place, row, sound_set, write

from internlm_ds.cli.main import main
from internlm_ds.data.doctor.checks import Expected, examine
from internlm_ds.data.doctor.findings import KINDS
from internlm_ds.data.doctor.scan import scan_bins
from internlm_ds.preprocess.tokenizers import Tokenizer
from internlm_ds.preprocess.train_tokenizer import train_tokenizer

CONFIG = Path(__file__).parents[4] / "model_configs" / "debug_cpu.py"

# what a fault cannot help bringing about besides
FOLLOWS = {"damaged-line": {"note-mismatch", "meta-stale"}, "torn-tail": {"note-mismatch"}}


def check(capsys, *arguments) -> tuple[int, list[dict]]:
    code = main(["data", "check", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)["findings"]


@pytest.mark.parametrize(("plant", "kind", "name", "line"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_planted_fault_is_found_with_file_and_line(plant, kind, name, line, tmp_path, capsys):
    folder = sound_set(tmp_path / "set")
    plant(Place(folder))
    code, found = check(capsys, folder, "--vocab-size", VOCAB_SIZE)
    mine = [one for one in found if one["kind"] == kind]
    assert mine, found
    assert (mine[0]["file"], mine[0]["line"]) == (str(folder / name), line)
    assert {one["kind"] for one in found} <= {kind} | FOLLOWS.get(kind, set()), found
    assert code == int(KINDS[kind].severity == "error")
    assert mine[0]["remedy"] and mine[0]["message"]


def test_offsets_are_where_the_lines_begin(tmp_path, capsys):
    place = Place(sound_set(tmp_path / "set"))
    place.replace_line(17, row(3, 4, VOCAB_SIZE, 5), meta=True)
    (finding,) = check(capsys, place.path, "--vocab-size", VOCAB_SIZE)[1]
    assert place.path.read_bytes()[finding["offset_bytes"] :].startswith(row(3, 4, VOCAB_SIZE, 5))
    assert "token 2 of 4 is id 10000" in finding["message"]


def test_a_sound_set_has_nothing(tmp_path, capsys):
    assert check(capsys, sound_set(tmp_path / "set")) == (0, [])


@settings(max_examples=25)
@given(
    samples=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), max_size=30, unique_by=tuple),
    masked=st.booleans(),
)
def test_nothing_is_found_in_what_the_writer_wrote(samples, masked, tmp_path_factory):
    if masked:
        samples = [[-i for i in sample] + [7] for sample in samples]
    path = tmp_path_factory.mktemp("set") / "en" / "a.bin"
    write(path, samples)
    for engine in ("plain", "compiled"):
        (lines,) = scan_bins([str(path)], engine=engine)
        found = examine(str(path), lines, Expected(vocab_size=VOCAB_SIZE)).findings
        # samples that all begin alike may be anything: a warning that says so
        assert {one.kind for one in found} <= ({"same-start"} if samples else {"empty-bin"})


def test_short_samples_are_faults_if_asked_for_and_named_if_dropped(tmp_path, capsys):
    write(tmp_path / "en/a.bin", [[3, 4, 5], [6, 7]])
    code, found = check(capsys, tmp_path, "--min-length", 3)
    assert (code, [(one["kind"], one["line"]) for one in found]) == (1, [("short", 2)])
    asked = ["--set", f"data.train_folder={tmp_path}", "--set", "model.vocab_size=6"]
    code, found = check(capsys, "--config", CONFIG, *asked, "--set", "data.min_length=3")
    assert (code, {one["kind"] for one in found}) == (1, {"dropped", "id-range"})
    code, found = check(capsys, "--config", CONFIG, *asked[:2], "--set", "data.min_length=4")
    assert (code, {one["kind"] for one in found}) == (1, {"all-dropped"})


def test_a_damaged_line_does_not_shift_what_is_said_of_others(tmp_path, capsys):
    place = Place(sound_set(tmp_path / "set"))
    place.replace_line(7, place.lines[6].replace(b"[", b"(", 1))
    table = np.load(place.meta)
    table[30, 1] = 99
    place.write_table(table)
    found = {(one["kind"], one["line"]) for one in check(capsys, place.path)[1]}
    assert found == {("damaged-line", 7), ("meta-length", 31), ("note-mismatch", None)}


def test_strict_counts_warnings(tmp_path, capsys):
    write(tmp_path / "eng/a.bin", [[3, 4, 5]])
    assert check(capsys, tmp_path)[0] == 0
    assert check(capsys, tmp_path, "--strict")[0] == 1


def test_a_long_list_ends_with_a_number(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("internlm_ds.data.doctor.findings.MOST_OF_A_KIND", 4)
    write(tmp_path / "en/a.bin", [[1, -2 - i] for i in range(7)])
    found = check(capsys, tmp_path)[1]
    assert [one["times"] for one in found if one["kind"] == "all-masked"] == [1, 1, 1, 1, 3]
    main(["data", "check", str(tmp_path)])
    out = capsys.readouterr().out
    assert "(7 times)" in out and "… and 4 more" in out and "7 errors" in out


def test_texts_that_changed_are_told_on_request(tmp_path, capsys):
    place = Place(sound_set(tmp_path / "set"))
    text = tmp_path / "raw.txt"
    text.write_text("new")
    note = json.loads(place.note.read_text())
    place.note.write_text(json.dumps({**note, "sources": [{"path": str(text), "sha256": "00"}]}))
    assert check(capsys, place.path) == (0, [])
    assert [one["kind"] for one in check(capsys, place.path, "--sources")[1]] == ["source-changed"]


def test_workers_make_no_difference(tmp_path, capsys):
    place = Place(sound_set(tmp_path / "set"))
    place.replace_line(7, b"?\n")
    assert check(capsys, place.folder, "--workers", 1) == check(capsys, place.folder, "--workers", 3)


def test_what_the_reference_wrote(capsys):
    """Its files are sound, but hold JSON syntax where records were read."""
    folder = Path(os.environ.get("INTERNLM_DS_GOLDEN", Path(__file__).parents[5] / "shared" / "golden")) / "tokenizer"
    bins = sorted(folder.glob("*.bin"))
    if not bins:
        pytest.skip(f"no golden files in {folder}")
    for path in bins:
        found = check(capsys, path)[1]
        assert [one["kind"] for one in found] == ["json-syntax"] * path.stem.endswith(("_json", "_jsonl")), path


def test_a_doubled_file_of_the_reference_tool(tmp_path, capsys):
    """Its tool appends and makes the meta of the whole: nothing but the samples tells."""
    place = Place(tmp_path, TEXT_BIN)
    write(place.path, [[1, 9, 8, 2], [1, 7, 2], [1, 6, 5, 4, 2]])
    place.write_lines(place.lines * 2, meta=True)
    (finding,) = check(capsys, tmp_path)[1]
    assert (finding["kind"], finding["line"]) == ("doubled", 4) and "2 times" in finding["message"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    text = ['the cat sat on the mat, {"text": "the dog sat on the log"}. ' * 20]
    return str(train_tokenizer(text, path, vocab_size=300))


def test_json_syntax_is_read_with_the_tokenizer(model, tmp_path, capsys):
    tokenizer = Tokenizer(model)
    for name, form in (("json", '{{"text": "the cat sat on {}"}}\n'), ("text", "the cat sat on {}")):
        samples = tokenizer.encode([form.format("the mat, " * number) for number in range(1, 30)])
        write(tmp_path / name / "en" / "a.bin", [[1, *sample, 2] for sample in samples])
        (tmp_path / name / "en" / "a.bin.json").unlink()
        found = check(capsys, tmp_path / name, "--tokenizer", model)[1]
        assert [one["kind"] for one in found] == ["json-syntax"] * (name == "json")


def test_another_tokenizer_is_told_by_its_hash(model, tmp_path, capsys):
    place = Place(sound_set(tmp_path / "set"))
    code, found = check(capsys, place.path, "--tokenizer", model, "--vocab-size", VOCAB_SIZE)
    assert (code, [one["kind"] for one in found]) == (1, ["other-tokenizer"])
    assert {one["kind"] for one in check(capsys, place.path, "--tokenizer", model)[1]} > {"id-range"}


def test_validation_folders_may_have_any_name(tmp_path, capsys):
    write(tmp_path / "checks" / "a.bin", [list(range(1, 60))])
    words = ["--config", CONFIG, "--set", f"data.valid_folder={tmp_path / 'checks'}", "--set", "data.train_folder=None"]
    assert check(capsys, *words) == (0, [])
    assert [one["kind"] for one in check(capsys, tmp_path / "checks")[1]] == ["no-type-folder"]
