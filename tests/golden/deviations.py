"""Where the reference is knowingly not followed: predicates on a case's input, and what holds here instead.

One function per deviation, each naming the line of `docs/compatibility.md` it stands for. Cases are recognised by what
they contain, never by their name.
"""

from __future__ import annotations


def zero1_of_nought_means_all(case: dict) -> bool:
    """ "zero1 of 0 or less": ours is all of data parallel, the reference makes 0, and what is below -1, a 1."""
    return case["zero1"] == 0 or case["zero1"] < -1


def labels_behind_short_rows(labels):  # type: ignore[no-untyped-def]
    """Unpacked data: nothing is learned behind the end of a row; the reference trains towards token 0 there.

    A label that counts is never 0 (collation turns zeros into -100), so every 0 in the reference's unpacked labels is
    padding.
    """
    import numpy as np

    return np.where(labels == 0, -100, labels)


def is_post_norm_of_internlm1(model_type: str, model: dict) -> bool:
    """`apply_post_layer_norm=True` with InternLM v1: the reference ignores it, here it is refused."""
    return model_type == "INTERNLM" and bool(model.get("apply_post_layer_norm"))


def drops_biases_of_queries(names) -> bool:  # type: ignore[no-untyped-def]
    """compatibility: biases of a Hugging Face folder are kept; the reference's script drops them."""
    return any(name.endswith("q_proj.bias") for name in names)


def has_mlp_names_of_2023(args: dict) -> bool:
    """compatibility: an import has the MLP names of 2024; `--version 1` of the reference's script those of 2023."""
    return args.get("ver") == 1


def names_the_embedding_as_if_split(args: dict) -> bool:
    """compatibility: an imported embedding is named as the model has it; the script's option decides the name alone."""
    return not args["embed_split"] and not args.get("use_flash", False)


# --- config: which configurations are accepted, and as what ---------------------------------------------------------


def config_deviation(values: dict):  # type: ignore[no-untyped-def]
    """What holds here for a configuration (its plain values) where the reference differs; None where it does not.

    Returns:
        A check of what was loaded, which returns the dotted keys that it has dealt with.
    """
    model, data, ckpt, parallel = (values.get(name, {}) for name in ("model", "data", "ckpt", "parallel"))
    if model.get("use_flash_attn", True) != data.get("use_packed_dataset", True):
        return _packing_and_attention_are_free
    if model.get("num_chunks", 1) > 1 and not _dict(parallel, "pipeline").get("interleaved_overlap"):
        return _chunks_without_overlap
    if parallel.get("sequence_parallel"):
        if _dict(parallel, "tensor").get("mode") == "mtp":
            return _contradicting_sequence_parallel
        if "mode" not in _dict(parallel, "tensor"):
            return _sequence_parallel_is_msp
    saving, folder = ckpt.get("enable_save_ckpt", True), str(ckpt.get("save_ckpt_folder"))
    if saving and ckpt.get("async_upload") and not folder.startswith(("boto3:", "volc:", "oss2:")):
        return _asynchronous_saving_to_local_folders
    return None


def _dict(tree: dict, key: str) -> dict:
    below = tree.get(key)
    return below if isinstance(below, dict) else {}


def _packing_and_attention_are_free(loaded):  # type: ignore[no-untyped-def]
    """compatibility: packed data goes with plain attention, unpacked with any; `use_flash_attn=False` alone unpacks."""
    assert not loaded.problems
    written = {leaf.key: leaf.value for leaf in loaded.leaves if leaf.origin == "file"}
    packed = written.get("data.use_packed_dataset", loaded.config.model.use_flash_attn)
    assert loaded.config.data.use_packed_dataset is packed
    return ("data.use_packed_dataset",)


def _chunks_without_overlap(loaded):  # type: ignore[no-untyped-def]
    """compatibility: `num_chunks > 1` does not need `interleaved_overlap`; the reference asserts it."""
    assert not loaded.problems
    return ()


def _sequence_parallel_is_msp(loaded):  # type: ignore[no-untyped-def]
    """compatibility: `sequence_parallel=True` beside an integer `tensor` means mode msp; the reference drops it."""
    assert loaded.config.parallel.sequence_parallel is True
    assert loaded.config.parallel.tensor.mode == "msp"
    return ("parallel.sequence_parallel", "parallel.tensor.mode")


def _contradicting_sequence_parallel(loaded):  # type: ignore[no-untyped-def]
    """compatibility: `sequence_parallel=True` beside mode mtp is refused; the reference drops it."""
    assert [problem.key for problem in loaded.problems] == ["parallel.sequence_parallel"]


def _asynchronous_saving_to_local_folders(loaded):  # type: ignore[no-untyped-def]
    """compatibility: `async_upload` is kept for `local:` folders; the reference switches it off."""
    assert loaded.config.ckpt.async_upload is True
    assert loaded.config.ckpt.async_upload_tmp_folder
    return ("ckpt.async_upload", "ckpt.async_upload_tmp_folder")


def zero1_deviation(parallel: dict, *, data: int) -> dict:
    """compatibility: `zero1` of 0 or less is all of data parallel; the reference makes 0 and below -1 a 1."""
    zero1 = parallel.get("zero1", -1)
    size = zero1.get("size", -1) if isinstance(zero1, dict) else zero1
    return {"zero1": data} if size <= 0 else {}


def content_without_model(content: list) -> bool:
    """compatibility: a `content` that leaves out "model" loads what it names; the reference loads nothing."""
    return not {"model", "all"} & {name.lower() for name in content}
