"""Which model is taken, what it refuses, and literal control pieces in a text."""

from __future__ import annotations

import hashlib

import pytest

from internlm_ds.errors import TokenizerError
from internlm_ds.preprocess.tokenizers import PlainEncoder, ReferenceEncoder, Tokenizer, find_model


@pytest.fixture
def folder(tmp_path):
    for name in ("given", "env", "constant", "V7_sft.model", "tokenizer_internlm.model"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_model_is_looked_for_in_the_promised_order(folder):
    given, environ = str(folder / "given"), {"INTERNLM_DS_TOKENIZER": str(folder / "env")}
    assert find_model(given, environ=environ, constant="constant", folder=folder) == given
    assert find_model(None, environ=environ, constant="constant", folder=folder) == str(folder / "env")
    assert find_model(None, environ={}, constant="constant", folder=folder) == str(folder / "constant")
    absolute = str(folder / "given")
    assert find_model(None, environ={}, constant=absolute, folder=folder / "elsewhere") == absolute
    assert find_model(None, environ={}, folder=folder) == str(folder / "V7_sft.model")
    (folder / "V7_sft.model").unlink()
    assert find_model(None, environ={"INTERNLM_DS_TOKENIZER": ""}, folder=folder).endswith("tokenizer_internlm.model")


def test_folder_of_a_hugging_face_model(folder):
    (folder / "tokenizer.model").write_bytes(b"x")
    assert find_model(str(folder), environ={}) == str(folder / "tokenizer.model")


def test_folder_with_a_tokenizer_json_only(folder):
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert find_model(str(folder), environ={}) == str(folder / "tokenizer.json")


def test_no_model_says_how_to_supply_one(tmp_path):
    with pytest.raises(TokenizerError, match=r"give --tokenizer MODEL .* or set \$INTERNLM_DS_TOKENIZER$"):
        find_model(None, environ={})
    with pytest.raises(
        TokenizerError, match=r"set TOKENIZER at the top of .*tokenizer\.py or put V7_sft\.model beside"
    ):
        find_model(None, environ={}, folder=tmp_path)


@pytest.mark.parametrize(
    ("given", "environ", "constant", "origin"),
    [
        ("no.model", {}, "", "from --tokenizer"),
        (None, {"INTERNLM_DS_TOKENIZER": "no.model"}, "", r"from \$INTERNLM_DS_TOKENIZER"),
        (None, {}, "no.model", "from TOKENIZER at the top"),
    ],
)
def test_named_model_that_does_not_exist(folder, given, environ, constant, origin):
    with pytest.raises(TokenizerError, match=rf"no\.model does not exist \({origin}"):
        find_model(given, environ=environ, constant=constant, folder=folder)


def test_folder_without_a_model(folder):
    with pytest.raises(TokenizerError, match=r"is a folder without tokenizer\.model"):
        find_model(str(folder), environ={})


def test_file_that_is_no_model(folder):
    with pytest.raises(TokenizerError, match="given is no sentencepiece model"):
        Tokenizer(folder / "given")
    with pytest.raises(TokenizerError, match="nowhere cannot be read"):
        Tokenizer(folder / "nowhere")


def test_facts_of_a_model(tiny_model, tiny_tokenizer):
    assert tiny_tokenizer.name == "tiny.model" and tiny_tokenizer.vocab_size == 320
    assert tiny_tokenizer.sha256 == hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    assert (tiny_tokenizer.bos_id, tiny_tokenizer.eos_id) == (1, 2)
    assert tiny_tokenizer.piece_id("<unk>") == 0 and tiny_tokenizer.piece_id("<nope>") is None


def test_pieces_and_ids_of_options(tiny_tokenizer):
    assert tiny_tokenizer.piece_or_id("17", option="--eoh") == 17
    assert tiny_tokenizer.piece_or_id("<eoh>", option="--eoh") == tiny_tokenizer.piece_id("<eoh>")
    with pytest.raises(TokenizerError, match=r"tiny\.model has no piece '<nope>'; give --eoh a piece or an id"):
        tiny_tokenizer.piece_or_id("<nope>", option="--eoh")
    with pytest.raises(TokenizerError, match=r"--eoa 320: the ids of tiny\.model run from 0 to 319"):
        tiny_tokenizer.piece_or_id("320", option="--eoa")


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_model_without_bos_or_eos(tiny_model, monkeypatch, name):
    tokenizer = Tokenizer(tiny_model)
    monkeypatch.setattr(tokenizer, "_model", type("Model", (), {"bos_id": lambda s: -1, "eos_id": lambda s: -1})())
    with pytest.raises(TokenizerError, match=rf"has no {name} piece; run without it \(--no-{name}\)"):
        getattr(tokenizer, f"{name}_id")


def test_literal_control_pieces_are_text(tiny_tokenizer):
    encoder = PlainEncoder(tiny_tokenizer)
    for text in ("<s>", "a</s> b", "<unk>", "<eoh>"):
        (ids,) = encoder.encode([text])
        chat = tiny_tokenizer.piece_id("<eoh>")
        assert not {0, 1, 2, chat} & set(ids) and tiny_tokenizer._model.decode(ids) == text


def test_reference_turns_literal_control_pieces_into_ids(tiny_tokenizer):
    def plain(text):
        return tiny_tokenizer.encode([text])[0]

    encoder = ReferenceEncoder(tiny_tokenizer)
    texts = ["the <s> cat", "</s><unk>", "<<s>>", "no pieces", ""]
    assert encoder.encode(texts) == [
        [*plain("the "), 1, *plain(" cat")],
        [2, 0],
        [*plain("<"), 1, *plain(">")],
        plain("no pieces"),
        [],
    ]
