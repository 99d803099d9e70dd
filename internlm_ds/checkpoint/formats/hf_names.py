"""What parameters are called in Hugging Face folders, and how they lie there; one table a family, used both ways.

InternLM v1 and Llama have the names of transformers' `LlamaForCausalLM`: v1's packed `Wqkv` is three tensors there.
InternLM2 has its own names behind `model.`. Rows of queries and keys are in the order of halves there (`qkv`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from internlm_ds.arch.spec import ModelArch, ParamSpec
from internlm_ds.checkpoint.formats.qkv import Heads

LLAMA_EMBEDDING, LLAMA_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_INTERNLM = {
    "embedding.weight": LLAMA_EMBEDDING,
    "embedding.word_embeddings.weight": LLAMA_EMBEDDING,
    "norm.weight": "model.norm.weight",
    "head.weight": LLAMA_HEAD,
    "mixer.Wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mixer.Wqkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "mixer.out_proj.weight": "self_attn.o_proj.weight",
    "mixer.out_proj.bias": "self_attn.o_proj.bias",
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
    "mlp.w3.weight": "mlp.up_proj.weight",
}
_LLAMA = {
    "tok_embeddings.weight": LLAMA_EMBEDDING,
    "tok_embeddings.word_embeddings.weight": LLAMA_EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": LLAMA_HEAD,
    **{
        f"attention.{ours}.{kind}": f"self_attn.{theirs}_proj.{kind}"
        for ours, theirs in (("wq", "q"), ("wk", "k"), ("wv", "v"), ("wo", "o"))
        for kind in ("weight", "bias")
    },
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_OWN = (
    *(f"attention.{matrix}.{kind}" for matrix in ("wqkv", "wo") for kind in ("weight", "bias")),
    *("attention_norm.weight", "ffn_norm.weight"),
    *(f"feed_forward.{matrix}.weight" for matrix in ("w1", "w2", "w3")),
)
_INTERNLM2 = {
    "tok_embeddings.weight": "model.tok_embeddings.weight",
    "tok_embeddings.word_embeddings.weight": "model.tok_embeddings.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "output.weight",
    **{name: name for name in _OWN},
}
_NAMES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "internlm": _INTERNLM,
    "internlm2": _INTERNLM2,
    "llama": _LLAMA,
}
_PADDED = {"w1": 0, "w2": 1, "w3": 0}


@dataclass(frozen=True)
class Piece:
    """One tensor of a folder.

    Attributes:
        name, shape: There.
        source: The logical parameter of which it is part `part` of `parts` equal blocks of rows.
        heads: Its heads, where their rows lie in another order than there.
        mlp_dim: The dimension that is the width of the MLP.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    part: int = 0
    parts: int = 1
    heads: Heads | None = None
    mlp_dim: int | None = None


def pieces_of(arch: ModelArch, spec: ParamSpec) -> tuple[Piece, ...]:
    """What a parameter is in a folder: several tensors if its parts lie apart there."""
    local = spec.name if spec.layer is None else spec.name.split(".", 2)[2]
    found = _NAMES[arch.family][local]
    names = (found,) if isinstance(found, str) else found
    prefix = "" if spec.layer is None else f"model.layers.{spec.layer}."
    shape = (spec.shape[0] // len(names), *spec.shape[1:])
    words = local.split(".")
    heads, mlp_dim = _heads(arch, words), _PADDED.get(words[1]) if len(words) > 1 else None
    return tuple(
        Piece(prefix + name, shape, spec.name, part, len(names), heads, mlp_dim) for part, name in enumerate(names)
    )


def pieces(arch: ModelArch) -> Iterator[Piece]:
    """All tensors of a folder, in the order of the model."""
    for spec in arch.iter_params():
        yield from pieces_of(arch, spec)


def _heads(arch: ModelArch, words: list[str]) -> Heads | None:
    if arch.rotary_pairs == "halves" or words[0] != "attention":
        return None
    if words[1] in ("wq", "wk"):
        return Heads(arch.head_dim)
    if words[1] == "wqkv":
        queries = arch.num_attention_heads // arch.num_kv_attention_heads
        return Heads(arch.head_dim, size=queries + 2, rotated=queries + 1)
    return None
