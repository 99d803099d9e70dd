"""`data show`: samples and batches as they are on disk and in training, decoded and marked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import CHAT_BIN, Place, chats, sound_set, texts, write

from internlm_ds.cli.main import main
from internlm_ds.config import load
from internlm_ds.data.doctor.display import runs_of, segment_starts
from internlm_ds.data.trainset import open_sampler, open_train_set
from internlm_ds.preprocess.decode import open_decoder
from internlm_ds.preprocess.tokenizers import Tokenizer
from internlm_ds.preprocess.train_tokenizer import train_tokenizer

CONFIG = Path(__file__).parents[4] / "model_configs" / "debug_cpu.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    text = ["the cat sat on the mat, the dog sat on the log. " * 20]
    return str(train_tokenizer(text, path, vocab_size=300, control_pieces=["<eoh>"]))


@pytest.fixture(autouse=True)
def no_model_around(monkeypatch):
    monkeypatch.delenv("INTERNLM_DS_TOKENIZER", raising=False)


def shown(capsys, *words) -> str:
    assert main(["data", "show", *map(str, words)]) == 0
    return capsys.readouterr().out


@given(tokens=st.lists(st.integers(-3, 3), max_size=20), seq_len=st.integers(1, 6), place=st.integers(0, 9))
def test_runs_hold_every_token_once(tokens, seq_len, place):
    for rows in (False, True):
        borders = segment_starts(len(tokens), seq_len=seq_len, place=place, rows=rows)
        runs = runs_of(np.array(tokens, dtype=np.int64), first=place, borders=borders)
        assert [abs(i) for i in tokens] == [i for run in runs for i in run.ids]
        assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
        for run in runs:
            places = range(run.start - place, run.stop - place)
            assert all((tokens[i] > 0 and i > 0) == run.learned for i in places)
            where = (place % seq_len) if rows else 0
            assert all((where + i) // seq_len == run.segment for i in places)


def test_a_sample_with_its_masked_part(model, tmp_path, capsys):
    tokenizer = Tokenizer(model)
    ask, answer = tokenizer.encode(["the cat sat\non", " the mat."])
    path = tmp_path / "en" / "a.bin"
    write(path, [[3], [1, *(-i for i in ask), -tokenizer.piece_id("<eoh>"), *answer, 2]])
    out = shown(capsys, path, "--sample", 1, "--tokenizer", model)
    split = len(ask) + 2
    assert out.splitlines() == [
        f"{path}, line 2, byte 16: {split + len(answer) + 1} tokens, {len(answer) + 1} learned",
        f"  [0:{split}] masked",
        "    ⟨s⟩the cat sat⏎",
        "    on⟨eoh⟩",
        f"  [{split}:{split + len(answer) + 1}] learned",
        "     the mat.⟨/s⟩",
    ]
    record = json.loads(shown(capsys, path, "--line", 2, "--tokenizer", model, "--json"))
    assert [run["learned"] for run in record["runs"]] == [False, True]
    assert record["runs"][1]["text"] == " the mat.⟨/s⟩"


def test_ids_are_shown_without_a_model_and_each_token_on_request(tmp_path, capsys):
    write(tmp_path / "a.bin", [[7, -8, 9]])
    assert "    7 8\n  [2:3] learned\n    9\n" in shown(capsys, tmp_path / "a.bin", "--sample", 0)
    assert shown(capsys, tmp_path / "a.bin", "--sample", 0, "--tokens").count("\n") == 4
    assert "… 1 tokens more" in shown(capsys, tmp_path / "a.bin", "--sample", 0, "--limit", 1)


def test_a_line_is_found_whatever_the_meta_says(tmp_path, capsys):
    place = Place(sound_set(tmp_path / "set"))
    place.meta.unlink()
    assert f"{len(texts(60)[6])} tokens" in shown(capsys, place.path, "--line", 7)
    assert main(["data", "show", str(place.path), "--sample", "6"]) == 2
    assert main(["data", "show", str(place.path), "--line", "61"]) == 2
    assert "its 60 lines are counted from 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--batch", "0"], ["x.bin"], ["x.bin", "--batch", "0", "--config", "c.py"]])
def test_too_little_or_too_much_asked_is_wrong_usage(words, capsys):
    assert main(["data", "show", *words]) == 2
    assert "--batch N" in capsys.readouterr().err


@pytest.mark.parametrize(
    "switches", [[], ["data.use_packed_dataset=False"], ["data.pack_sample_into_one=True"]], ids=["cut", "rows", "one"]
)
def test_a_batch_is_what_training_is_given(switches, tmp_path, capsys):
    folder = sound_set(tmp_path / "set")
    changes = [f"data.train_folder={folder}", "model.vocab_size=10000", "data.seq_len=16", *switches]
    words = [word for change in changes for word in ("--set", change)]
    record = json.loads(shown(capsys, "--config", CONFIG, *words, "--batch", 3, "--json"))
    config = load(CONFIG, changes).config
    data = open_train_set(config.data, vocab_size=10_000, log=False)
    sampler = open_sampler(config.data, data.packs, data.files, data_rank=0, data_size=1)
    batches = [sampler.next_batch() for _ in range(4)]
    micro_batches = record["ranks"][0]["micro_batches"]
    assert [one["pack"] for one in micro_batches] == batches[3]
    for one in micro_batches:
        pack = data.packs[one["pack"]]
        ids = [i for piece in one["pieces"] for run in piece["runs"] for i in run["ids"]]
        held = np.abs(pack.tokens[pack.tokens != 0]) if "rows" in str(switches) else np.abs(pack.tokens)
        assert ids == held[: len(ids)].tolist() and len(ids) == np.count_nonzero(pack.tokens)
        segments = {run["segment"] for piece in one["pieces"] for run in piece["runs"]}
        if not switches:
            assert len(segments) == len(pack.cu_seqlens) - 1
        targets = np.concatenate([[0], pack.labels[:-1]])  # what each place was to be predicted as
        learned = [run["learned"] for piece in one["pieces"] for run in piece["runs"] for _ in run["ids"]]
        if "False" not in str(switches):
            assert learned == (targets > 0).tolist()
    text = shown(capsys, "--config", CONFIG, *words, "--batch", 3)
    assert text.startswith("batch 3, epoch 0\nrank 0, micro-batch 0 (pack ") and ".bin, line " in text


def test_every_rank_has_its_own_micro_batches(tmp_path, capsys):
    folder = sound_set(tmp_path / "set")
    words = ["--config", CONFIG, "--set", f"data.train_folder={folder}", "--set", "model.vocab_size=10000"]
    words += ["--set", "data.seq_len=16", "--batch", 0, "--world-size", 2]
    both = json.loads(shown(capsys, *words, "--json"))["ranks"]
    (second,) = json.loads(shown(capsys, *words, "--rank", 1, "--json"))["ranks"]
    assert second == both[1] != both[0]
    assert main(["data", "show", *map(str, words), "--rank", "2"]) == 2
    assert "counted from 0" in capsys.readouterr().err


def test_samples_are_those_of_the_file(tmp_path, capsys):
    folder = sound_set(tmp_path / "set")
    record = json.loads(shown(capsys, folder / CHAT_BIN, "--sample", 4, "--json"))
    assert [i for run in record["runs"] for i in run["ids"]] == [abs(i) for i in chats(30)[4]]


def test_what_has_no_text_is_made_visible(model):
    decoder, tokenizer = open_decoder(model), Tokenizer(model)
    assert decoder.text([1, 300, 2]) == "⟨s⟩⟨id 300⟩⟨/s⟩"
    cat = tokenizer.encode(["é猫\0\t"])[0]
    assert decoder.text(cat) == "é猫⟨00⟩\t"
    assert decoder.text(cat[:1]) == "⟨C3⟩" and decoder.text([-i for i in cat[:2]]) == "é"
    assert "".join(decoder.pieces(tokenizer.encode(["the cat"])[0])) == "the cat"


def test_a_run_that_is_none_is_wrong_usage(tmp_path, capsys):
    assert main(["data", "show", "--run", str(tmp_path), "--step", "0"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
