"""One small tokenizer for the tests of this room."""

from __future__ import annotations

import pytest

from internlm_ds.preprocess.tokenizers import Tokenizer
from internlm_ds.preprocess.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    texts = ["the cat sat on the mat, the dog sat on the log. " * 20, "猫坐在垫子上。狗坐在木头上。" * 20]
    return train_tokenizer(texts, path, vocab_size=320, control_pieces=["<eoh>", "<eoa>"])


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model):
    return Tokenizer(tiny_model)
