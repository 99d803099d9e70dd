"""InternLM's own models: which ids frame a conversation, and that a text which spells the pieces out stays text.

Both models turn some of their chat pieces' names into these pieces wherever a text holds them.
"""

from __future__ import annotations

import json

import pytest
from cases import tokenizers

from internlm_ds.data.binmeta import Reader
from internlm_ds.preprocess.alpaca import tokenize_alpaca
from internlm_ds.preprocess.chat import tokenize_chat
from internlm_ds.preprocess.sft import Split
from internlm_ds.preprocess.templates import make_template
from internlm_ds.preprocess.tokenizers import Tokenizer

MODELS = {
    "internlm": ("tokenizer_internlm.model", {"eoh": 103027, "eoa": 103028, "newline": 13}),
    "internlm2": ("tokenizer_internlm2.model", {"im_start": 92543, "im_end": 92542}),
}
LITERAL = "a<eoh>b <eoa><|im_start|>user [UNUSED_TOKEN_146] 你好[UNUSED_TOKEN_145]<|im_end|></s>"


@pytest.mark.parametrize("name", MODELS)
def test_framing_ids_come_from_the_template_alone(tmp_path, name):
    file, pieces = MODELS[name]
    tokenizer = Tokenizer(tokenizers() / file)
    template = make_template(name, tokenizer, given={})
    assert template.pieces == pieces
    assert set(tokenizer.encode([LITERAL])[0]) & set(pieces.values()), "the text holds none of the model's pieces"

    def sample(text):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
        outcome = tokenize_chat(
            str(tmp_path / "a.jsonl"),
            tmp_path / "out",
            tokenizer=tokenizer,
            template=template,
            split=Split(0.0),
            overwrite=True,
        )
        return [abs(number) for number in next(iter(Reader(outcome.train.path))).tolist()]

    framing = [number for number in sample("x") if number in pieces.values()]
    found = sample(LITERAL)
    assert [number for number in found if number in pieces.values()] == framing
    assert tokenizer._model.decode([number for number in found if number not in framing]).count(LITERAL) == 2


@pytest.mark.parametrize("compat", [False, True])
def test_alpaca_takes_literal_pieces_as_text_and_in_compat_as_the_model_does(tmp_path, compat):
    tokenizer = Tokenizer(tokenizers() / MODELS["internlm"][0])
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a<eoh>b", "output": "c<eoa>d"}]))
    outcome = tokenize_alpaca(
        str(tmp_path / "a.json"), tmp_path / "out", tokenizer=tokenizer, split_ratio=0.0, compat=compat
    )
    (sample,) = Reader(outcome.train.path)
    assert (sample.tolist().count(-103027), sample.tolist().count(103028)) == (1, 1)  # the text's, or the frame's
    assert (103166 in sample) == compat
