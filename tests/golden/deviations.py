"""Where the reference is knowingly not followed: predicates on a case's input, and what holds here instead.

One function per deviation, each naming the line of `docs/compatibility.md` it stands for. Cases are recognised by what
they contain, never by their name.
"""

from __future__ import annotations


def zero1_of_nought_means_all(case: dict) -> bool:
    """"zero1 of 0 or less": ours is all of data parallel, the reference makes 0, and what is below -1, a 1."""
    return case["zero1"] == 0 or case["zero1"] < -1


def labels_behind_short_rows(labels):  # type: ignore[no-untyped-def]
    """Unpacked data: nothing is learned behind the end of a row; the reference trains towards token 0 there.

    A label that counts is never 0 (collation turns zeros into -100), so every 0 in the reference's unpacked labels is padding.
    """
    import numpy as np

    return np.where(labels == 0, -100, labels)


def is_post_norm_of_internlm1(model_type: str, model: dict) -> bool:
    """`apply_post_layer_norm=True` with InternLM v1: the reference ignores it, here it is refused."""
    return model_type == "INTERNLM" and bool(model.get("apply_post_layer_norm"))
