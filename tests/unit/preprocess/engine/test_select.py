"""The choice of an engine, and that a wrong one is found out."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from internlm_ds.errors import TokenizerError
from internlm_ds.preprocess.engine import machine_code, select, table_cache
from internlm_ds.preprocess.engine.select import first_difference, row_encoder
from internlm_ds.preprocess.rows import Rows, TextBlock
from internlm_ds.preprocess.tokenizers import Tokenizer


@pytest.fixture
def words():
    return []


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("unigram") / "unigram.model", io.BytesIO()
    texts = iter(["the cat sat on the mat, the dog sat on the log. " * 5])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=24, hard_vocab_limit=False, minloglevel=2
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def test_compiled_for_much_text_and_sentencepiece_for_little(tiny_tokenizer, monkeypatch, words):
    assert row_encoder(tiny_tokenizer, warn=words.append).engine == "compiled"
    assert row_encoder(tiny_tokenizer, num_bytes=10**9, warn=words.append).engine == "compiled"
    assert row_encoder(tiny_tokenizer, num_bytes=1000, warn=words.append).engine == "sentencepiece"
    assert row_encoder(tiny_tokenizer, num_bytes=1000, engine="compiled").engine == "compiled"
    assert row_encoder(tiny_tokenizer, num_bytes=select.SMALL_INPUT_BYTES).engine == "compiled"
    monkeypatch.setattr(machine_code, "is_kept", lambda: False)  # then it would have to be compiled first
    assert row_encoder(tiny_tokenizer, num_bytes=select.SMALL_INPUT_BYTES).engine == "sentencepiece"
    assert row_encoder(tiny_tokenizer, engine="arrays").engine == "arrays"
    assert not words


def test_other_models_stay_with_sentencepiece(unigram, words):
    assert row_encoder(unigram, warn=words.append).engine == "sentencepiece"
    assert not words
    with pytest.raises(TokenizerError, match=r"cannot stand in for sentencepiece with unigram\.model: it is no BPE"):
        row_encoder(unigram, engine="compiled")


@pytest.mark.parametrize("engine", ["compiled", "arrays"])
def test_an_engine_that_errs_on_the_sample_is_given_up_loudly(tiny_tokenizer, monkeypatch, words, engine):
    load = table_cache.load_or_build

    def without_joins(*args, **options):
        tables = load(*args, **options)
        return tables._replace(joins=np.zeros_like(tables.joins))

    monkeypatch.setattr(table_cache, "load_or_build", without_joins)
    monkeypatch.setattr(select, "_PROBES", ("plain",))
    encoder = row_encoder(tiny_tokenizer, sample=["x", "the cat"], engine=engine, warn=words.append)
    assert encoder.engine == "sentencepiece"
    (word,) = words
    assert "'the cat'" in word
    assert tiny_tokenizer.sha256 in word


def test_without_numba_arrays_do_it_and_say_so(tiny_tokenizer, monkeypatch, words):
    monkeypatch.setitem(sys.modules, "internlm_ds.preprocess.engine.fast_rows", None)
    assert row_encoder(tiny_tokenizer, warn=words.append).engine == "arrays"
    assert "no working numba" in words[0]
    with pytest.raises(TokenizerError, match="needs a working numba"):
        row_encoder(tiny_tokenizer, engine="compiled")


def test_the_first_different_text_is_named(tiny_tokenizer):
    plain = row_encoder(tiny_tokenizer, engine="sentencepiece")
    block = TextBlock.of(["the", "cat", "sat"])
    good = plain.encode(block)
    assert first_difference(block, good, plain) is None
    other = plain.encode(TextBlock.of(["the", "cut", "sat"]))
    assert first_difference(block, other, plain) == 1
    lengths = good.lengths.copy()
    lengths[2] += 1
    assert first_difference(block, Rows(good.data, good.sizes, lengths, good.largest_id), plain) == 2
    assert first_difference(block, Rows(good.data, good.sizes, good.lengths, 319), plain) == 0


def test_numba_is_not_loaded_for_little_text(tiny_model):
    script = (
        "import sys\n"
        "from internlm_ds.preprocess.engine.select import row_encoder\n"
        "from internlm_ds.preprocess.tokenizers import Tokenizer\n"
        f"row_encoder(Tokenizer({str(tiny_model)!r}), num_bytes=1000)\n"
        "sys.exit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[4], timeout=60)
    assert done.returncode == 0
