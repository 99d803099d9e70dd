"""A model's facts are read as sentencepiece reads them; models that change text first are told apart."""

from __future__ import annotations

import io

import pytest
import sentencepiece

from internlm_ds.preprocess.engine.model_file import PieceType, parse, why_not

FITTING = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}


def trained(**changes):
    model = io.BytesIO()
    options = {**FITTING, "vocab_size": 330, "minloglevel": 2, **changes}
    texts = ["the cat sat on the mat, the dog sat on the log. " * 5, "猫坐在垫子上。狗坐在木头上。" * 5]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)
    return model.getvalue()


def test_pieces_as_sentencepiece_has_them(tiny_model, parsed):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tiny_model))
    assert len(parsed.pieces) == theirs.get_piece_size()
    for number, piece in enumerate(parsed.pieces):
        assert (piece.text, piece.score) == (theirs.id_to_piece(number), theirs.get_score(number))
        assert (piece.type == PieceType.CONTROL) == theirs.is_control(number)
        assert (piece.type == PieceType.BYTE) == theirs.is_byte(number)
    assert why_not(parsed, max_pieces=1000) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, "no BPE"),
        ({"byte_fallback": False, "vocab_size": 60}, "byte fallback"),
        ({"normalization_rule_name": "nfkc"}, "normalizes"),
        ({"add_dummy_prefix": True}, "space before"),
        ({"remove_extra_whitespaces": True}, "white space"),
        ({"user_defined_symbols": ["a\u2581b"]}, "user-defined|space"),
        ({"control_symbols": ["x"]}, "one character"),
    ],
)
def test_models_that_the_engines_cannot_stand_in_for(changes, reason):
    found = why_not(parse(trained(**changes)), max_pieces=1000)
    assert found is not None
    assert any(word in found for word in reason.split("|"))


def test_user_defined_pieces_are_no_obstacle():
    assert why_not(parse(trained(user_defined_symbols=["<eoh>", "——"])), max_pieces=1000) is None


def test_too_large_a_model(parsed):
    assert "more than 10 pieces" in why_not(parsed, max_pieces=10)


@pytest.mark.parametrize("content", [b"\x0a\xff\xff\x01abc", b"\x0b", b"\xff" * 30, b"PK\x03\x04 something else"])
def test_no_model(content):
    with pytest.raises(ValueError, match="no protobuf message"):
        parse(content)
