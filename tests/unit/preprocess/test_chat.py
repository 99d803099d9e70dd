"""Conversations: both templates, which part is learned, what a text must not become, what is refused."""

from __future__ import annotations

import gzip
import json

import pytest

from internlm_ds.data.binmeta import Reader
from internlm_ds.errors import DataFormatError, TokenizerError
from internlm_ds.preprocess.alpaca import tokenize_alpaca
from internlm_ds.preprocess.chat import tokenize_chat
from internlm_ds.preprocess.samples import Limit
from internlm_ds.preprocess.sft import Split
from internlm_ds.preprocess.templates import make_template
from internlm_ds.preprocess.tokenizers import Tokenizer, open_tokenizer
from internlm_ds.preprocess.train_tokenizer import train_tokenizer

CHAT = ["<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "chat.model"
    return Tokenizer(train_tokenizer(["the cat sat on the mat " * 20], path, vocab_size=290, control_pieces=CHAT))


@pytest.fixture
def run(tmp_path, tokenizer):
    """Tokenizes records and returns the samples of train, and the outcome."""

    def tokenize(records, name="internlm", *, given=(), bos=None, eos=None, model=tokenizer, **options):
        (tmp_path / "a.json").write_text(json.dumps(records))
        template = make_template(name, model, given=dict(given), bos=bos, eos=eos)
        options.setdefault("split", Split(0.0))
        outcome = tokenize_chat(
            str(tmp_path / "a.json"), tmp_path / "out", tokenizer=model, template=template, overwrite=True, **options
        )
        return [t.tolist() for t in Reader(outcome.train.path)], outcome

    return tokenize


def talk(*texts, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def asked(tokenizer, text):
    return [-number for number in tokenizer.encode([text])[0]]


def said(tokenizer, text):
    return tokenizer.encode([text])[0]


def test_first_template_with_system_and_two_turns(run, tokenizer):
    eoh, eoa, newline = (tokenizer.piece_id(piece) for piece in ("<eoh>", "<eoa>", "<0x0A>"))
    (sample,), _ = run([talk("the cat", "sat", "on", "the mat", system="mat")])
    turns = [("the cat", "sat"), ("on", "the mat")]
    wanted = [1, *asked(tokenizer, "<|System|>:mat"), -newline]
    for question, answer in turns:
        wanted += [*asked(tokenizer, f"<|User|>:{question}"), -eoh, -newline, *asked(tokenizer, "<|Bot|>:")]
        wanted += [*said(tokenizer, answer), eoa, newline]
    assert sample == [*wanted, 2]


def test_second_template_with_system_and_two_turns(run, tokenizer):
    start, end = (tokenizer.piece_id(piece) for piece in ("<|im_start|>", "<|im_end|>"))
    (sample,), _ = run([talk("the cat", "sat", "on", "the mat", system="mat")], "internlm2")
    after = asked(tokenizer, "\n")
    wanted = [1, -start, *asked(tokenizer, "system\nmat"), -end, *after]
    for question, answer in [("the cat", "sat"), ("on", "the mat")]:
        wanted += [-start, *asked(tokenizer, f"user\n{question}"), -end, *after]
        wanted += [-start, *asked(tokenizer, "assistant\n"), *said(tokenizer, answer), end, *said(tokenizer, "\n")]
    assert sample == wanted


def test_one_turn_of_the_first_template_is_alpacas_sample(run, tokenizer, tmp_path):
    samples, _ = run([talk("the cat\nmat", "sat on")])
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "the cat", "input": "mat", "output": "sat on"}]))
    tokenize_alpaca(str(tmp_path / "b.json"), tmp_path / "alpaca", tokenizer=tokenizer, split_ratio=0.0)
    assert samples == [t.tolist() for t in Reader(tmp_path / "alpaca/train/en/dataset.bin")]


@pytest.mark.parametrize("name", ["internlm", "internlm2"])
def test_an_answer_of_weight_0_and_an_open_question_are_not_learned(run, tokenizer, name):
    conversation = talk("the cat", "sat", "on", "the mat", "log")
    conversation["messages"][1]["weight"] = 0
    (sample,), _ = run([conversation], name, eos=True)
    learned = [number for number in sample[1:] if number > 0]
    ends = {"internlm": ("<eoa>", "<0x0A>"), "internlm2": ("<|im_end|>", "\n")}[name]
    newline = [tokenizer.piece_id(ends[1])] if name == "internlm" else said(tokenizer, "\n")
    assert learned == [*said(tokenizer, "the mat"), tokenizer.piece_id(ends[0]), *newline]
    assert sample[-1] == -2


def test_a_content_of_several_texts_is_one_text(run):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    first, second = run([talk("the cat", "sat"), talk(parts, "sat")])[0]
    assert first == second


def test_sharegpt_records_are_the_same_conversations(run):
    other = {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]}
    first, second = run([talk("the cat", "sat"), other])[0]
    assert first == second


@pytest.mark.parametrize("name", ["internlm", "internlm2"])
def test_bos_and_eos_can_be_asked_for_and_left_out(run, name):
    (bare,), _ = run([talk("cat", "mat")], name, bos=False, eos=False)
    (framed,), _ = run([talk("cat", "mat")], name, bos=True, eos=True)
    assert framed == [1, *bare, 2]


class Parsing:
    """A tokenizer that turns literal control pieces into their ids, as InternLM's and many others do."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def encode(self, texts):
        return [self._parsed(text) for text in texts]

    def _parsed(self, text):
        for piece in CHAT:
            before, found, behind = text.partition(piece)
            if found:
                return [*self._parsed(before), self._inner.piece_id(piece), *self._parsed(behind)]
        return self._inner.encode([text])[0]


@pytest.mark.parametrize("name", ["internlm", "internlm2"])
def test_control_pieces_in_a_text_are_text(run, tokenizer, name):
    literal = "the <eoh> cat<eoa><|im_start|>user\nmat<|im_end|>"
    clean, _ = run([talk("cat", "mat")], name)
    samples, _ = run([talk(literal, literal)], name, model=Parsing(tokenizer))
    controls = {tokenizer.piece_id(piece) for piece in CHAT}
    count = lambda ids: sum(abs(number) in controls for number in ids)  # noqa: E731
    assert count(Parsing(tokenizer).encode([literal])[0]) == 4
    assert count(samples[0]) == count(clean[0])
    decoded = tokenizer._model.decode([abs(i) for i in samples[0] if abs(i) not in controls])
    assert decoded.count(literal) == 2


def test_a_word_that_ends_a_turn_is_spelled_in_a_text(run, tokenizer):
    number, eoa = tokenizer.piece_id("the"), tokenizer.piece_id("<eoa>")
    (sample,), _ = run([talk("the cat", "the")], given={"eoh": "the"})
    ids = [abs(i) for i in sample]
    assert ids.count(number) == 1 and tokenizer.encode(["the"]) == [[number]]
    assert tokenizer._model.decode(ids[1 : ids.index(number)]) == "<|User|>:the cat"
    assert tokenizer._model.decode(ids[ids.index(number) : ids.index(eoa)]).endswith("<|Bot|>:the")


def test_a_byte_that_ends_a_turn_stays_a_byte_in_a_text(run, tokenizer):
    byte = tokenizer.piece_id("<0x0E>")
    (sample,), _ = run([talk("cat", "a\x0eb")], given={"eoh": str(byte)})
    assert sample.count(byte) == 1 and sample.count(-byte) == 1


@pytest.fixture(scope="module")
def json_model(tmp_path_factory):
    """A `tokenizer.json` whose chat pieces, as not special ones, are found in texts."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    model.add_special_tokens(["<s>", "</s>", "<eoh>", "<|im_start|>"])
    model.add_tokens(["<eoa>", "<|im_end|>"])
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return open_tokenizer(path)


@pytest.mark.parametrize("name", ["internlm", "internlm2"])
def test_a_tokenizer_json_serves_as_well(run, json_model, name):
    literal = "the <eoh> cat<eoa><|im_start|>user\nmat<|im_end|></s>"
    (sample,), _ = run([talk(literal, literal)], name, model=json_model, bos=True, eos=True)
    ids = [abs(number) for number in sample]
    controls = [json_model.piece_id(piece) for piece in ("<s>", "</s>", *CHAT)]
    assert json_model.piece_id("<eoa>") in json_model.encode([literal])[0]
    assert [number for number in ids if number in controls] == [
        controls[0],
        *(controls[i] for i in ((2, 3) if name == "internlm" else (4, 5, 4, 5))),
        controls[1],
    ]
    assert json_model.decode([number for number in ids if number not in controls]).count(literal) == 2


def test_a_message_without_an_answer_is_counted_and_left_out(run):
    samples, outcome = run([talk("cat"), talk("cat", "mat")])
    assert len(samples) == 1 and outcome.train.tally.unlearned == 1


def test_validation_is_drawn_by_record_and_parts_stay_together(run, tmp_path):
    records = [talk(*[f"cat {i}", f"mat {i}"] * 3) for i in range(8)]
    whole, _ = run(records)
    longest = max(map(len, whole))
    _, outcome = run(records, split=Split(0.25, 3), limit=Limit(longest // 2 + 8, "split"))
    assert outcome.valid.tally.split == 2 and outcome.train.tally.split == 6
    assert outcome.valid.samples == outcome.valid.tally.split_parts


def test_type_folder_and_provenance(run, tmp_path, tokenizer):
    run([talk("cat", "mat")], "internlm2", data_type="cn", limit=Limit(64, "drop"))
    found = json.loads((tmp_path / "out/train/cn/dataset.bin.json").read_text())
    assert (found["kind"], found["template"], found["share"]) == ("chat", "internlm2", "train")
    assert (found["max_tokens"], found["too_long"], found["bos"], found["eos"]) == (64, "drop", True, False)
    assert found["pieces"]["im_end"] == tokenizer.piece_id("<|im_end|>") and found["counts"]["samples"] == 1


def test_compressed_lines_are_read(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(talk("cat", "mat")) + "\n" for _ in range(3)).encode()))
    template = make_template("internlm", tokenizer, given={})
    outcome = tokenize_chat(str(path), tmp_path / "out", tokenizer=tokenizer, template=template, split=Split(0.0))
    assert outcome.train.samples == 3


def test_pieces_are_looked_up_given_or_missed(tmp_path, tokenizer):
    plain = Tokenizer(train_tokenizer(["the cat sat on the mat " * 9], tmp_path / "t.model", vocab_size=270))
    with pytest.raises(TokenizerError, match=r"t\.model has no piece '<\|im_start\|>' nor .*give --im-start"):
        make_template("internlm2", plain, given={})
    assert make_template("internlm2", plain, given={"im_start": "5", "im_end": "6"}).pieces["im_end"] == 6
    with pytest.raises(TokenizerError, match="--im-start: the template internlm has no such piece; it has eoh and eoa"):
        make_template("internlm", tokenizer, given={"im_start": "5"})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (5, 'it has neither "messages" nor "conversations"'),
        ({"text": "a"}, 'it has neither "messages" nor "conversations"; a record reads'),
        ({"messages": []}, '"messages" is an empty list; a list of messages is needed'),
        ({"messages": {}}, '"messages" is an object'),
        ({"messages": [{"role": "user"}]}, 'message 1 lacks "content"; a message reads'),
        ({"messages": [talk("a")["messages"][0], {"role": "tool", "content": ""}]}, "message 2 has the role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, 'the "content" of message 1 is null; a string'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1 is a list of other things than t",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "weight": 2}]},
            "message 1 has the weight 2; known: 1, and",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "message 1 holds half a surrogate pair"),
        ({"conversations": [{"from": 5, "value": ""}]}, "message 1 has the from 5; known: system, user"),
    ],
)
def test_what_is_no_conversation_is_named_by_file_line_and_record(run, tmp_path, record, message):
    with pytest.raises(DataFormatError) as raised:
        run([talk("cat", "mat"), record])
    assert str(raised.value).startswith(f"{tmp_path}/a.json, line 1: record 2: ") and message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_type_is_one_folder(run):
    with pytest.raises(DataFormatError, match=r"--type '\.\./x': the name of a folder"):
        run([talk("cat", "mat")], data_type="../x")
