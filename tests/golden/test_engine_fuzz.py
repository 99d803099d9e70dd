"""The engines against sentencepiece with InternLM's own models: thousands of made-up texts, no difference.

The texts are made of what went wrong somewhere once: pieces of the model and parts of them, special pieces spelled
out, user-defined ones one after another, controls, NUL, emoji, invisible and combining characters, full-width forms,
private and unassigned code points, long repetitions.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_ds.preprocess.engine import model_file, select
from internlm_ds.preprocess.engine.plain_rows import texts_of
from internlm_ds.preprocess.engine.slow_bpe import SlowBpe
from internlm_ds.preprocess.rows import TextBlock
from internlm_ds.preprocess.tokenizers import Tokenizer

MODELS = ("tokenizer_internlm.model", "tokenizer_internlm2.model")
ENGINES = ("compiled", "arrays")
SPECIAL = ["<s>", "</s>", "<unk>", "<0x0A>", "<eoh>", "<eoa>", "<eo", "h>", "<TOKENS_UNUSED_2>", "<TOKENS_UNUSED_20>"]
SPECIAL += [
    "<TOKENS",
    "[UNUSED_TOKEN_1]",
    "[UNUSED_TOKEN_145]",
    "[UNUSED",
    "——",
    "———",
    "……",
    "…",
    "Ｅ",
    "ＡＢＣ",
    "１２",
]
ODD = "\0\x01\x07\x1b\x7f\x85\xa0\u2581\u200b\u200d\u2028\ufeff\ufffd\u0301\u0338\u3000\ue000\U000e0067\U0010ffff"
ODD += "😀👩🏽🇨🇳ﷺ"
ORDINARY = "etaoinshr ETA 0123456789.,;:!?()[]{}<>=_-/\\'\"\t\n的一是不了在人有我他这中国，。「」カタかな한국어"


class Maker:
    """Made-up texts of a model, the same ones for the same seed."""

    def __init__(self, model, seed):
        self._random = random.Random(seed)
        self._pieces = [piece.text.replace("\u2581", " ") for piece in model.pieces]

    def texts(self, count):
        return [self._text() for _ in range(count)]

    def _text(self):
        draw = self._random
        kind = draw.random()
        if kind < 0.02:  # one stretch, longer than the kernel cares for
            return draw.choice([self._part(), draw.choice(ORDINARY)]) * draw.randrange(300, 900)
        if kind < 0.12:
            return "".join(self._any_character() for _ in range(draw.randrange(30)))
        return "".join(self._part() for _ in range(draw.randrange(16)))

    def _part(self):
        draw = self._random
        kind = draw.randrange(6)
        if kind == 0:
            return draw.choice(SPECIAL)
        if kind == 1:
            return draw.choice(ODD)
        if kind == 2:
            return "".join(draw.choice(ORDINARY) for _ in range(draw.randrange(12)))
        piece = draw.choice(self._pieces)
        return piece if kind < 5 else piece[draw.randrange(len(piece)) :]

    def _any_character(self):
        code = self._random.choice([self._random.randrange(0x110000), self._random.randrange(0x3000)])
        return chr(code) if not 0xD800 <= code < 0xE000 else " "


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request):
    return Tokenizer(tokenizers() / request.param)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_file.parse(Path(tokenizer.path).read_bytes())


@pytest.fixture(scope="module")
def engines(tokenizer, tmp_path_factory):
    """sentencepiece, and the others."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp() / "engine-cache")
    try:
        words: list[str] = []
        found = {name: select.row_encoder(tokenizer, engine=name, warn=words.append) for name in select.ENGINES[1:]}
    finally:
        os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)
    assert [found[name].engine for name in found] == list(found), words
    return found


def check(engines, texts, *, size, threads):
    """Blocks of `size` texts by `threads` threads: no text may differ."""
    plain = engines["sentencepiece"]
    blocks = [TextBlock.of(texts[i : i + size]) for i in range(0, len(texts), size)]
    for name in ENGINES:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(engines[name].encode, blocks))
        for block, rows in zip(blocks, results):
            different = select.first_difference(block, rows, plain)
            assert different is None, f"{name}: {texts_of(block)[different]!r}"


@pytest.mark.parametrize("size", [1, 37, 1000])
def test_made_up_texts(model, engines, size):
    check(engines, Maker(model, seed=size).texts(700), size=size, threads=1 + size % 3)


@pytest.mark.soak
def test_many_made_up_texts(model, engines):
    for seed, size in enumerate((1, 10, 100, 1000, 5000)):
        check(engines, Maker(model, seed=seed).texts(5000), size=size, threads=1 + seed)


@settings(max_examples=60)
@given(texts=st.lists(st.text(max_size=60), max_size=5))
def test_any_text(engines, texts):
    check(engines, texts, size=5, threads=1)


def test_the_slow_one_agrees(tokenizer, model):
    """A third opinion: what the tables are made from is what sentencepiece does."""
    slow = SlowBpe(model)
    texts = [text for text in Maker(model, seed=5).texts(300) if "\0" not in text and len(text) < 200]
    assert [slow.encode(text) for text in texts] == tokenizer.encode(texts)


def test_lone_surrogates_are_refused():
    """They are no text; readers of files never let them through."""
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        TextBlock.of(["a\ud800b"])
