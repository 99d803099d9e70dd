"""Conversations: layout of a sample, split, framing pieces, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from internlm_ds.data.binmeta import Reader
from internlm_ds.errors import DataFormatError, TokenizerError
from internlm_ds.preprocess.alpaca import ChatIds, alpaca_recipe, chat_ids, tokenize_alpaca
from internlm_ds.preprocess.samples import Limit, Tally, finished
from internlm_ds.preprocess.segments import Segment, signed
from internlm_ds.preprocess.sft import Split, draw_validation
from internlm_ds.preprocess.tokenizers import Tokenizer
from internlm_ds.preprocess.train_tokenizer import train_tokenizer

IDS = ChatIds(bos=1, eos=2, eoh=30, eoa=31, newline=13)


def sample_of(user, mark, answer, ids=IDS):
    """A sample as it stands on disk, and how many tokens it lost."""
    body = [
        Segment(user, False),
        Segment([ids.eoh, ids.newline], False),
        Segment(mark, False),
        Segment(answer, True),
        Segment([ids.eoa, ids.newline], True),
    ]
    tally = Tally()
    (sample,) = finished(body, frame=alpaca_recipe(ids).frame, limit=Limit(2048), tally=tally)
    return signed(sample), tally.truncated_tokens


def test_prompt_is_negative_and_answer_positive():
    sample, lost = sample_of([5, 6], [7], [8, 9])
    assert sample == [1, -5, -6, -30, -13, -7, 8, 9, 31, 13, 2] and lost == 0


@pytest.mark.parametrize(("answer", "lost"), [(2040, 0), (2041, 1), (3000, 960)])
def test_long_sample_is_cut_and_the_loss_counted(answer, lost):
    sample, found = sample_of([5], [7], [8] * answer)
    assert found == lost and sample[-1] == 2 and len(sample) == 2048


def test_validation_is_drawn_without_replacement():
    chosen = draw_validation(1000, split=Split(0.25, 0, replace=False))
    assert chosen.dtype == np.bool_ and chosen.sum() == 250
    assert (chosen == draw_validation(1000, split=Split(0.25, 0, replace=False))).all()
    assert (chosen != draw_validation(1000, split=Split(0.25, 1, replace=False))).any()


def test_validation_of_compat_is_numpys_choice_with_replacement():
    np.random.seed(0)
    expected = set(np.random.choice(range(100), int(100 * 0.3)).tolist())
    found = np.flatnonzero(draw_validation(100, split=Split(0.3, 0, replace=True)))
    assert set(found.tolist()) == expected and len(expected) < 30


def test_nothing_to_draw():
    assert not draw_validation(0, split=Split(0.5, 0, replace=True)).any()
    assert not draw_validation(3, split=Split(0.1, 0, replace=False)).any()
    assert draw_validation(3, split=Split(1.0, 0, replace=False)).all()


def test_framing_pieces_are_looked_up_or_given(tiny_tokenizer):
    eoh, eoa = tiny_tokenizer.piece_id("<eoh>"), tiny_tokenizer.piece_id("<eoa>")
    newline = tiny_tokenizer.piece_id("<0x0A>")
    assert chat_ids(tiny_tokenizer, eoh=None, eoa=None, compat=False) == ChatIds(1, 2, eoh, eoa, newline)
    assert chat_ids(tiny_tokenizer, eoh="17", eoa="<eoh>", compat=False) == ChatIds(1, 2, 17, eoh, newline)
    assert chat_ids(tiny_tokenizer, eoh=None, eoa=None, compat=True) == ChatIds(1, 2, 103167, 103166, 13)


def test_model_without_the_pieces(tmp_path):
    tokenizer = Tokenizer(train_tokenizer(["the cat sat on the mat " * 9], tmp_path / "t.model", vocab_size=270))
    with pytest.raises(TokenizerError, match=r"t\.model has no piece '<eoh>'; give --eoh a piece or an id"):
        chat_ids(tokenizer, eoh=None, eoa="5", compat=False)


def test_model_without_a_newline_byte(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "piece_id", lambda piece: None)
    assert chat_ids(tiny_tokenizer, eoh="5", eoa="6").newline == tiny_tokenizer.encode(["\n"])[0][0]
    monkeypatch.setattr(tiny_tokenizer, "encode", lambda texts: [[5, 6]])
    with pytest.raises(TokenizerError, match=r"neither a piece <0x0A> .* nor one piece for a newline"):
        chat_ids(tiny_tokenizer, eoh="5", eoa="6")


@pytest.fixture
def run(tmp_path, tiny_tokenizer):
    def tokenize(records, name="a.json", **options):
        text = records if isinstance(records, str) else json.dumps(records)
        (tmp_path / name).write_text(text, encoding="utf-8")
        options.setdefault("split_ratio", 0.25)
        return tokenize_alpaca(str(tmp_path / name), tmp_path / "out", tokenizer=tiny_tokenizer, **options)

    return tokenize


def record(i, **more):
    return {"instruction": f"cat {i}", "input": "", "output": f"mat {i}", **more}


def test_records_go_to_two_pairs(run, tmp_path, tiny_tokenizer):
    outcome = run([record(i) for i in range(8)])
    train, valid = outcome.train, outcome.valid
    assert (train.samples, valid.samples) == (6, 2)
    samples = [t.tolist() for share in ("train", "valid") for t in Reader(tmp_path / f"out/{share}/en/dataset.bin")]
    user, mark, answer = tiny_tokenizer.encode(["<|User|>:cat 3", "<|Bot|>:", "mat 3"])
    ids = chat_ids(tiny_tokenizer, eoh=None, eoa=None, compat=False)
    assert sample_of(user, mark, answer, ids)[0] in samples
    assert train.tokens + valid.tokens == sum(map(len, samples))
    assert np.load(tmp_path / "out/train/en/dataset.bin.meta").dtype == np.int64


def test_input_follows_the_instruction_on_its_own_line(run, tmp_path, tiny_tokenizer):
    run('{"instruction": "cat", "input": "log", "output": ""}\n{"instruction": "x", "output": ""}', "a.jsonl")
    first = Reader(tmp_path / "out/train/en/dataset.bin").tokens(0)
    (user,) = tiny_tokenizer.encode(["<|User|>:cat\nlog"])
    assert (-first[1 : 1 + len(user)]).tolist() == user


def test_truncation_is_counted_and_recorded(run, tmp_path):
    train = run([record(0, output="dog " * 3000), record(1)], split_ratio=0.0).train
    assert train.truncated == 1 and train.truncated_tokens > 0
    counts = json.loads((tmp_path / "out/train/en/dataset.bin.json").read_text())["counts"]
    assert (counts["truncated"], counts["truncated_tokens"]) == (1, train.truncated_tokens)


def test_provenance_of_both_shares(run, tmp_path, tiny_tokenizer):
    run([record(i) for i in range(8)], seed=5)
    for share in ("train", "valid"):
        found = json.loads((tmp_path / f"out/{share}/en/dataset.bin.json").read_text())
        assert found["share"] == share and found["kind"] == "alpaca" and found["seed"] == 5
        assert found["pieces"]["eoh"] == tiny_tokenizer.piece_id("<eoh>")
        assert found["counts"]["largest_id"] < tiny_tokenizer.vocab_size


def test_no_validation_samples_in_compat_is_the_references_float_meta(run, tmp_path):
    run([record(0)], compat=True, split_ratio=0.0)
    assert np.load(tmp_path / "out/valid/en/dataset.bin.meta").dtype == np.float64
    assert len(Reader(tmp_path / "out/valid/en/dataset.bin")) == 0


def test_reference_ids_outside_the_model_are_warned_of(run):
    warnings = []
    run([record(0)], compat=True, warn=warnings.append)
    assert "id 103167 of <eoh> is outside tiny.model (320 pieces)" in warnings[0] and len(warnings) == 2


def test_existing_output_is_an_error(run):
    run([record(0)])
    with pytest.raises(DataFormatError, match=r"train/en/dataset\.bin: the output exists; --overwrite replaces it"):
        run([record(0)])
    run([record(0)], overwrite=True)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ('[\n{"instruction": "a"}]', r'a\.json, line 2: record 1: it lacks "output"; a record reads'),
        ("[5]", 'line 1: record 1: it lacks "instruction" and "output"'),
        ('[{"instruction": 5, "output": ""}]', 'line 1: the field "instruction" is a number'),
        ('[{"instruction": "", "output": "", "input": null}]', 'line 1: the field "input" is null'),
        ('{"a": 1}', "line 1: a .json input is one list"),
    ],
)
def test_errors_of_records_leave_nothing(run, tmp_path, records, message):
    with pytest.raises(DataFormatError, match=message):
        run(records)
    assert not (tmp_path / "out").exists()


def test_share_outside_zero_and_one(run):
    with pytest.raises(DataFormatError, match=r"--split-ratio 1\.5: a share between 0 and 1"):
        run([record(0)], split_ratio=1.5)


def test_pattern_of_several_data_sets(run, tmp_path, tiny_tokenizer):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([record(0)]))
    outcome = tokenize_alpaca(str(tmp_path / "*.json"), tmp_path / "out", tokenizer=tiny_tokenizer)
    assert outcome.train.samples == 2
    sources = json.loads((tmp_path / "out/train/en/dataset.bin.json").read_text())["sources"]
    assert [source["path"][-6:] for source in sources] == ["a.json", "b.json"]
