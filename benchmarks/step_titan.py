"""torchtitan as a contestant of `step.py`, with the names that release 0.3 has.

Its Llama 3 blocks, mixed precision by FSDP, compilation by blocks, loss in chunks; on a GPU varlen attention, which
keeps samples of a packed row apart. Its CUDA graphs are left out: they do not work with that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from step_facts import ADAMW, Facts, Sizes, Step, places, rows_of_tokens
from torch import nn
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_, set_spmd_backend
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention, VarlenAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

NORMAL: dict[str, Callable[..., Any]] = {"weight": partial(nn.init.normal_, std=0.02)}
SHARDING = "partial_dtensor"  # how tensors on one rank are described; no operator depends on it


def torchtitan(facts: Facts, rank: int) -> Step:
    """A loop over its parts, as its trainer puts them together."""
    sizes, compiling = facts.sizes, CompileConfig(enable=facts.compile)
    set_spmd_backend(SHARDING)
    with torch.device("meta"):
        model = _config(sizes, facts.device).build()
    if facts.device == "cuda":  # one rank in fp32 on a CPU has nothing to shard, nor to cast
        model = parallelize_llama(
            model,
            parallel_dims=ParallelDims(1, 1, 1, 1, 1, 1, world_size=1, spmd_backend=SHARDING),
            training=TrainingConfig(seq_len=sizes.seq, mixed_precision_param=sizes.dtype),
            parallelism=ParallelismConfig(spmd_backend=SHARDING),
            compile_config=compiling,
            ac_config=None,
            dump_folder="",
        )
    model.to_empty(device=facts.device)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    loss_of = ChunkedLossWrapper.Config(
        loss_fn=CrossEntropyLoss.Config(global_vocab_size=sizes.vocab),
    ).build(compile_config=compiling)
    loss_of.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    data = [(*rows, places(sizes, number)) for number, rows in enumerate(rows_of_tokens(facts, rank))]
    counted = torch.tensor(float(sizes.tokens), device=facts.device)

    def step() -> float:
        total = 0.0
        for rows in data:
            tokens, targets, positions = (x.to(facts.device) for x in rows)
            masks = model.get_attention_masks(positions=positions) if facts.device == "cuda" else None
            hidden = model(tokens, positions=positions, attention_masks=masks)
            loss, _ = loss_of(hidden, targets, counted)
            loss.backward()
            total += loss.detach()
        clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def _config(sizes: Sizes, device: str) -> Llama3Model.Config:
    inner = VarlenAttention.Config() if device == "cuda" else ScaledDotProductAttention.Config()
    rope = ComplexRoPE.Config(dim=sizes.hidden // sizes.heads, max_seq_len=sizes.seq, theta=10000.0)

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=sizes.hidden, eps=1e-5, param_init={"weight": nn.init.ones_})

    def block() -> Llama3TransformerBlock.Config:
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=sizes.hidden,
                n_heads=sizes.heads,
                wqkv_param_init=NORMAL,
                wo_param_init=NORMAL,
                inner_attention=inner,
                fuse_qkv=True,
                rope=rope,
            ),
            feed_forward=make_ffn_config(
                dim=sizes.hidden, hidden_dim=sizes.mlp, w1_param_init=NORMAL, w2w3_param_init=NORMAL
            ),
        )

    return Llama3Model.Config(
        dim=sizes.hidden,
        vocab_size=sizes.vocab,
        tok_embeddings=Embedding.Config(num_embeddings=sizes.vocab, embedding_dim=sizes.hidden, param_init=NORMAL),
        norm=norm(),
        lm_head=Linear.Config(in_features=sizes.hidden, out_features=sizes.vocab, param_init=NORMAL),
        layers=[block() for _ in range(sizes.layers)],
    )
