"""Every engine writes the rows that sentencepiece's ids make, whatever the text, the block and the threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.data.binformat import encode_line
from internlm_ds.preprocess.engine.array_rows import ArrayRows
from internlm_ds.preprocess.engine.fast_rows import FastRows
from internlm_ds.preprocess.engine.plain_rows import PlainRows
from internlm_ds.preprocess.engine.select import first_difference
from internlm_ds.preprocess.engine.slow_bpe import SlowBpe
from internlm_ds.preprocess.engine.tables import with_user_pieces
from internlm_ds.preprocess.rows import TextBlock
from internlm_ds.preprocess.tokenizers import PlainEncoder, ReferenceEncoder

CHARACTERS = "thecatsondlgm,. 猫坐在垫子上。狗木头\u2581\0<>s/é😀\u200b\u0301\nＡ"
TEXTS = st.text(st.one_of(st.sampled_from(CHARACTERS), st.characters(exclude_categories=["Cs"])), max_size=80)
CORPUS = [
    "the cat sat on the mat",
    "",
    "猫坐在垫子上。",
    " \u2581the",
    "a\0b\0",
    "the" * 900,
    "x",
    "😀👩‍👩‍👧 e\u0301",
    "\n",
]


@pytest.fixture(scope="module", params=["compiled", "arrays"])
def make(request, tables, tiny_tokenizer):
    kind = {"compiled": FastRows, "arrays": ArrayRows}[request.param]
    return lambda **options: kind(tables, PlainEncoder(tiny_tokenizer), **options)


def as_strings(rows):
    ends = np.cumsum(rows.sizes)
    return [bytes(rows.data)[e - s : e] for s, e in zip(rows.sizes.tolist(), ends.tolist())]


@pytest.mark.parametrize(("before", "behind"), [((), ()), ((1,), (2,)), ((), (2, 319))])
def test_rows_are_lines_of_sentencepieces_ids(make, tiny_tokenizer, before, behind):
    rows = make(before=before, behind=behind).encode(TextBlock.of(CORPUS))
    samples = [[*before, *ids, *behind] for ids in tiny_tokenizer.encode(CORPUS)]
    assert as_strings(rows) == [encode_line(sample) for sample in samples]
    assert rows.lengths.tolist() == [len(sample) for sample in samples]
    assert rows.largest_id == max(max(sample, default=-1) for sample in samples)


def test_no_text_at_all(make):
    rows = make().encode(TextBlock.of([]))
    assert (bytes(rows.data), len(rows.sizes), rows.largest_id) == (b"", 0, -1)
    rows = make().encode(TextBlock.of(["", ""]))
    assert (bytes(rows.data), rows.lengths.tolist(), rows.largest_id) == (b'{"tokens": []}\n' * 2, [0, 0], -1)


def test_bytes_between_texts_belong_to_none(make, tiny_tokenizer):
    text = " the cat \r\nsat on the mat\n\n 猫坐 ".encode()
    spans = [(1, 8), (11, 25), (28, 34)]
    begins, ends = (np.array(column) for column in zip(*spans))
    rows = make().encode(TextBlock(text, begins, ends))
    assert as_strings(rows) == [
        encode_line(ids) for ids in tiny_tokenizer.encode(["the cat", "sat on the mat", "猫坐"])
    ]


@pytest.fixture(scope="module")
def engines(tables, tiny_tokenizer):
    encoder = PlainEncoder(tiny_tokenizer)
    return PlainRows(encoder), [FastRows(tables, encoder, slots=64), ArrayRows(tables, encoder, max_segments=20)]


@given(texts=st.lists(TEXTS, max_size=6))
def test_any_text_with_a_cache_that_is_always_full(engines, texts):
    plain, others = engines
    block = TextBlock.of(texts)
    assert [first_difference(block, other.encode(block), plain) for other in others] == [None, None]


@given(text=TEXTS.map(lambda text: text.replace("\0", "")))
def test_the_slow_one_agrees(parsed, tiny_tokenizer, text):
    assert SlowBpe(parsed).encode(text) == tiny_tokenizer.encode([text])[0]


@given(parts=st.lists(st.one_of(st.sampled_from(["<s>", "</s>", "<unk>", "<s", "/s>", " "]), TEXTS), max_size=8))
def test_control_pieces_that_are_spelled_out(tables, tiny_tokenizer, parts):
    encoder = ReferenceEncoder(tiny_tokenizer)
    larger = with_user_pieces(tables, encoder.specials)
    block = TextBlock.of(["".join(parts), *parts])
    plain = PlainRows(encoder)
    for kind in (FastRows, ArrayRows):
        assert first_difference(block, kind(larger, encoder).encode(block), plain) is None


def test_threads_and_block_sizes_change_nothing(make, tiny_tokenizer):
    texts = [text * repeat for repeat in range(1, 9) for text in CORPUS]
    expected = b"".join(map(encode_line, tiny_tokenizer.encode(texts)))
    for threads, size in ((1, 1), (3, 7), (4, 50), (2, len(texts))):
        encoder = make()
        blocks = [TextBlock.of(texts[i : i + size]) for i in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            # all rows are held at once: a buffer must not come back too early
            assert b"".join([rows.data for rows in list(pool.map(encoder.encode, blocks))]) == expected


def test_rows_outgrow_their_buffer(make, tiny_tokenizer):
    texts = ["\ue000" * 30_000, "", "\U0010ffff" * 1000]
    rows = make(before=[1], behind=[2]).encode(TextBlock.of(texts))
    assert as_strings(rows) == [encode_line([1, *ids, 2]) for ids in tiny_tokenizer.encode(texts)]


def test_a_buffer_comes_back_when_its_rows_are_gone(tables, tiny_tokenizer):
    encoder = FastRows(tables, PlainEncoder(tiny_tokenizer))
    block = TextBlock.of(CORPUS)
    first = encoder.encode(block)
    part = memoryview(first.data)[5:]
    address = np.frombuffer(first.data, np.uint8).ctypes.data
    del first
    second = encoder.encode(block)
    assert np.frombuffer(second.data, np.uint8).ctypes.data != address  # a part of the first is still held
    del part, second
    assert address in {np.frombuffer(rows.data, np.uint8).ctypes.data for rows in [encoder.encode(block) for _ in "12"]}
