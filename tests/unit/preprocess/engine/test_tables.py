"""Tables against the pieces they come from."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from internlm_ds.preprocess.engine.tables import ID_BITS, merge_slot, user_pieces, with_user_pieces


def may_fuse(tables, first, second):
    row = (int(tables.classes[ord(first)]) >> 32) & 0x7FFFFFFF
    column = int(tables.classes[ord(second)]) & 0xFFFFFFFF
    return bool(np.unpackbits(tables.joins, bitorder="little")[row + column])


def test_neighbours_inside_of_pieces_may_fuse_and_no_others(tables, parsed):
    texts = [piece.text for piece in parsed.pieces if piece.type == 1]
    inside = {pair for text in texts for pair in pairwise(text)}
    characters = sorted({c for text in texts for c in text})
    assert {(a, b) for a in characters for b in characters if may_fuse(tables, a, b)} == inside


def test_space_is_the_models_blank(tables):
    assert tables.classes[ord(" ")] == tables.classes[0x2581]
    assert tables.char_ids[ord(" ")] == tables.char_ids[0x2581]


def test_every_split_of_every_piece_is_found(tables, parsed):
    ids = {piece.text: i for i, piece in enumerate(parsed.pieces) if piece.type == 1}
    splits = {
        (ids[t[:i]], ids[t[i:]]): n for t, n in ids.items() for i in range(1, len(t)) if {t[:i], t[i:]} <= set(ids)
    }
    stored = tables.merges[tables.merges != 0]
    mask = (1 << ID_BITS) - 1
    found = {(int(w >> 2 * ID_BITS), int(w >> ID_BITS) & mask): int(w) & mask for w in stored}
    assert splits.items() <= found.items()
    for slot, word in enumerate(tables.merges.tolist()):
        if word:  # reached from its own slot without a gap
            pair = np.array([word >> 2 * ID_BITS]), np.array([word >> ID_BITS & mask])
            (home,) = merge_slot(*pair, num_slots=len(tables.merges))
            between = np.arange(home, slot if slot >= home else slot + len(tables.merges))
            assert tables.merges[between % len(tables.merges)].all()


def test_better_scores_have_lower_ranks_and_equal_ones_the_same(tables, parsed):
    order = sorted(range(len(parsed.pieces)), key=lambda i: -parsed.pieces[i].score)
    for a, b in pairwise(order):
        same = parsed.pieces[a].score == parsed.pieces[b].score
        assert (tables.ranks[a] == tables.ranks[b]) if same else (tables.ranks[a] < tables.ranks[b])


def test_texts_of_ids(tables):
    for number in (0, 7, 42, 319):
        text = int(tables.id_texts[number]).to_bytes(8, "little")[: tables.id_sizes[number]]
        assert text == b"%d, " % number


def test_further_pieces_are_added_unless_they_overlap(tables):
    larger = with_user_pieces(tables, {"<s>": 1, "<eox>": 5})
    assert user_pieces(larger) == {"<s>": 1, "<eox>": 5}
    assert user_pieces(tables) == {}
    for rival in ("<s>x", "<", "s", "x><eo", ">>"):
        with pytest.raises(ValueError, match="overlap"):
            with_user_pieces(larger, {rival: 7})
