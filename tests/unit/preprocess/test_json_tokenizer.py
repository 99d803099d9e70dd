"""A `tokenizer.json` of Hugging Face has the same facts and uses as a sentencepiece model."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
import tokenizers

from internlm_ds.errors import MissingExtraError, TokenizerError
from internlm_ds.preprocess.alpaca import BOT_MARK
from internlm_ds.preprocess.decode import open_decoder
from internlm_ds.preprocess.engine.select import row_encoder
from internlm_ds.preprocess.rows import TextBlock
from internlm_ds.preprocess.tokenizers import JsonTokenizer, Tokenizer, open_tokenizer

TEXTS = ["the cat sat on the mat", "", "猫坐在垫子上。", "<s>the</s> 😀", BOT_MARK]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the cat sat on the mat, the dog sat on the log. " * 20], trainer)
    model.enable_truncation(4)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


def test_the_facts(path):
    tokenizer = open_tokenizer(path)
    assert isinstance(tokenizer, JsonTokenizer)
    assert (tokenizer.name, tokenizer.path) == ("tokenizer.json", str(path))
    assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tokenizer.vocab_size == tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.piece_id("<|end|>") == 2
    assert tokenizer.piece_id("no such") is None
    assert tokenizer.piece_or_id("270", option="--eoa") == 270
    with pytest.raises(TokenizerError, match=r"the ids of tokenizer\.json run from 0 to 2"):
        tokenizer.piece_or_id("300", option="--eoa")


def test_texts_go_there_and_back_whole(path):
    tokenizer = JsonTokenizer(path)
    ids = tokenizer.encode(TEXTS)
    assert [tokenizer.decode(sample) for sample in ids] == TEXTS
    assert not {0, 1, 2} & {number for sample in ids for number in sample}  # spelled out is not meant
    assert len(ids[0]) > 4
    assert tokenizer.decode([0, *ids[0], 1]) == TEXTS[0]
    assert open_decoder(str(path)).text([0, -ids[0][0], 1]).endswith("</s>")


def test_control_tokens_are_those_that_stand_beside(path, tmp_path):
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(path.read_bytes())
    config = {"bos_token": {"content": "<|end|>"}, "eos_token": "no such"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = JsonTokenizer(copy)
    assert tokenizer.bos_id == 2
    with pytest.raises(TokenizerError, match="has no eos piece"):
        _ = tokenizer.eos_id


def test_its_rows(path):
    tokenizer = open_tokenizer(path)
    encoder = row_encoder(tokenizer, before=[0])
    assert encoder.engine == "tokenizers"
    lines = bytes(encoder.encode(TextBlock.of(TEXTS)).data).splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [[0, *ids] for ids in tokenizer.encode(TEXTS)]
    with pytest.raises(TokenizerError, match=r"compiled cannot stand in for tokenizers with tokenizer\.json"):
        row_encoder(tokenizer, engine="compiled")


def test_the_kind_is_seen_from_the_content(path, tmp_path, tiny_model):
    (tmp_path / "some").write_bytes(path.read_bytes())
    assert isinstance(open_tokenizer(tmp_path / "some"), JsonTokenizer)
    assert type(open_tokenizer(tiny_model)) is Tokenizer
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"broken\.json is no tokenizer\.json"):
        open_tokenizer(tmp_path / "broken.json")
    with pytest.raises(TokenizerError, match="cannot be read"):
        open_tokenizer(tmp_path / "absent.json")


def test_without_the_package_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"internlm-ds\[tokenizers\]"):
        open_tokenizer(path)
