"""Blocks as compiled code: `torch.compile` of what stands before and behind attention (`internlm_ds.compile`).

Attention itself, the segments and the rotary tables stay as they are: a number of segments that changes with every
micro-batch never reaches the compiler. It sees the number of tokens alone; the first is compiled for, a second makes
it a variable, and from then on nothing is compiled anew. All blocks of a shape share the code.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from internlm_ds.attention.segments import Segments
from internlm_ds.errors import MachineError
from internlm_ds.model.block import Block
from internlm_ds.model.rotary import Tables

KEY = "internlm_ds.compile = True"


def require_compiler(device_type: str) -> None:
    """Raises `MachineError` when this machine lacks what torch.compile needs for the device."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cc", "gcc", "clang")):
        raise MachineError(
            f"{KEY}: torch.compile needs a C++ compiler, and neither g++ nor clang++ is on the PATH; install one "
            "(package g++), or use --set internlm_ds.compile=False"
        )
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise MachineError(
            f"{KEY}: torch.compile needs triton for a GPU, and it is not installed; pip install triton, or use "
            "--set internlm_ds.compile=False"
        )


class CompiledParts:
    """What a `Block` calls in the place of its own way; one for all blocks of a stage."""

    def __init__(self) -> None:
        self._before = torch.compile(_before, fullgraph=True)
        self._after = torch.compile(_after, fullgraph=True)

    def __call__(self, block: Block, hidden: Tensor, segments: Segments) -> Tensor:
        """`(T, H) -> (T, H)`, as `Block` computes it."""
        mixer = block.mixer
        dtype = next(mixer.parameters()).dtype
        residual, q, k, v = self._before(block, hidden, mixer.rotary.tables_of(segments, dtype))
        context = mixer.attend(q, k, v, segments, dropout=mixer.dropout if mixer.training else 0.0)
        # how attention lays out its result, and in which larger tensor, depends on the segments, and code on both
        flat = context.flatten(1)
        return self._after(block, residual, flat.clone() if flat._is_view() else flat)


def _before(block: Block, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return block.before_attention(hidden, tables)


def _after(block: Block, residual: Tensor, context: Tensor) -> Tensor:
    return block.after_attention(residual, context)


def compile_blocks(layers: Iterable[nn.Module]) -> str:
    """Let every block among `layers` run compiled; returns what the log says.

    Blocks stay as they are where the compiler cannot follow: over several tensor ranks, whose messages lie inside a
    block, and where a schedule puts weight gradients off. Without either, norms need not be recomputed one by one:
    the compiler does that by itself.
    """
    blocks = [layer for layer in layers if isinstance(layer, Block)]
    for found, why in (
        (not blocks, "there are no blocks of this package's families"),
        (any(block.mixer.tensor.size > 1 for block in blocks), "blocks over several tensor ranks exchange messages"),
        (any(_puts_off(block) for block in blocks), "the zero-bubble schedule puts weight gradients off"),
    ):
        if found:
            return f"torch.compile: not used ({why})"
    parts = CompiledParts()
    for block in blocks:
        block.compiled, block.recompute_norms = parts, False
    return f"torch.compile: {len(blocks)} blocks, compiled in the first step"


def _puts_off(block: Block) -> bool:
    return any(getattr(layer, "weight_grads", None) is not None for layer in block.modules())
