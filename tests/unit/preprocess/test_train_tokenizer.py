"""The small model of the demo is of InternLM's kind."""

from __future__ import annotations

import pytest

from internlm_ds.errors import TokenizerError
from internlm_ds.preprocess.train_tokenizer import train_tokenizer


def test_text_survives_a_round_trip(tiny_tokenizer):
    texts = ["the cat\n\n  sat\ton", "  leading", "🙂 unseen €", "猫", "trailing  "]
    assert [tiny_tokenizer._model.decode(ids) for ids in tiny_tokenizer.encode(texts)] == texts


def test_kind_of_model(tiny_tokenizer):
    model = tiny_tokenizer._model
    assert [model.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"] and model.pad_id() == -1
    assert tiny_tokenizer.piece_id("<0x0A>") is not None and model.is_control(tiny_tokenizer.piece_id("<eoh>"))


def test_training_reads_no_more_than_asked(tmp_path):
    def texts():
        yield "the cat sat on the mat " * 10
        raise AssertionError("read on")

    train_tokenizer(texts(), tmp_path / "deep" / "t.model", vocab_size=270, max_chars=100)


def test_no_text(tmp_path):
    with pytest.raises(TokenizerError, match="no text to train a tokenizer on"):
        train_tokenizer(["", "\n"], tmp_path / "t.model", vocab_size=300)


def test_vocabulary_that_the_text_does_not_give(tmp_path):
    with pytest.raises(TokenizerError, match="cannot train a tokenizer of 5000 pieces on this text"):
        train_tokenizer(["abc"], tmp_path / "t.model", vocab_size=5000)
    assert list(tmp_path.iterdir()) == []
