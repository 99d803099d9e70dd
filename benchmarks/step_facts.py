"""What every contestant of `step.py` is told: the model and the step, and the tokens that it trains on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

Step = Callable[[], float]
"""Takes a step and returns its loss."""
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "fused": True}


@dataclass(frozen=True)
class Sizes:
    """A model and a step.

    Attributes:
        name: In the table.
        hidden, layers, heads, mlp, vocab: Of the model.
        seq, rows, micro_batches: Tokens of a row, rows of a micro-batch, micro-batches of a step on all ranks together.
        dtype: `float32` or `bfloat16`.
        packed: Rows hold samples of many lengths. This trainer and torchtitan keep them apart; the other peers take
            each row as one.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    seq: int
    rows: int
    micro_batches: int
    dtype: str = "float32"
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seq * self.rows * self.micro_batches


@dataclass(frozen=True)
class Facts:
    """What a contestant's process must know.

    Attributes:
        kind: `plain`, `hf`, `torchtitan`, `ours` or `matmul`.
        sizes: What is trained.
        device: `cpu` or `cuda`.
        data, pipe, chunks: Ranks along the axes, chunks of a stage.
        own: Body of `internlm_ds = dict(...)`.
        compile: A peer's model is compiled, block by block.
        store: File over which the ranks meet.
    """

    kind: str
    sizes: Sizes
    device: str
    data: int = 1
    pipe: int = 1
    chunks: int = 1
    own: str = ""
    compile: bool = False
    store: str = ""

    @property
    def world_size(self) -> int:
        return self.data * self.pipe

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Facts:
        values = json.loads(text)
        return cls(**{**values, "sizes": Sizes(**values["sizes"])})


def rows_of_tokens(facts: Facts, rank: int) -> list[Any]:
    """`(tokens, targets)` of this rank's micro-batches, int64 `(rows, seq)` each, on the host."""
    import torch

    sizes, generator = facts.sizes, torch.Generator().manual_seed(1)
    shape = (sizes.micro_batches, sizes.rows, sizes.seq + 1)
    tokens = torch.randint(1, sizes.vocab, shape, generator=generator)
    place = rank % facts.data
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens[place :: facts.data]]


def borders(sizes: Sizes, number: int) -> list[int]:
    """Where samples of a micro-batch begin, its rows laid end to end, and where the last one ends."""
    total = sizes.rows * sizes.seq
    rows = range(0, total + 1, sizes.seq)
    if not sizes.packed:
        return list(rows)
    draw = random.Random(number)
    return sorted({*rows, *draw.sample(range(1, total), k=max(1, total // 400))})


def places(sizes: Sizes, number: int) -> Any:
    """Of each token in its sample, counted from 0: int64 `(rows, seq)`."""
    import torch

    ends = borders(sizes, number)
    samples = [torch.arange(end - start) for start, end in pairwise(ends)]
    return torch.cat(samples).view(sizes.rows, sizes.seq)
