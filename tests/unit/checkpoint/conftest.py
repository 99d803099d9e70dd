"""Several ranks in one process (threads with a fake `Comm`), a tiny blueprint, and weights for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from internlm_ds.arch import internlm
from internlm_ds.arch.spec import ModelArch
from internlm_ds.config.schema import ModelConfig


class ThreadComm:
    """`Comm` of one thread among several; a collective that not all join breaks after ten seconds."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier):
        self.rank, self.world_size = rank, len(board)
        self._board, self._barrier = board, barrier

    def barrier(self) -> None:
        self._barrier.wait(timeout=10)

    def _exchange(self, obj: Any) -> list[Any]:
        self._board[self.rank] = obj
        self.barrier()
        seen = list(self._board)
        self.barrier()
        return seen

    def gather(self, obj: Any) -> list[Any] | None:
        seen = self._exchange(obj)
        return seen if self.rank == 0 else None

    def broadcast(self, obj: Any) -> Any:
        return self._exchange(obj)[0]

    def largest(self, value: int) -> int:
        return max(self._exchange(value))


def _run_threads(world_size: int, work: Callable[[ThreadComm], Any]) -> list[Any]:
    """What `work(comm)` returned or raised on each rank."""
    board: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size)
    results: list[Any] = [None] * world_size

    def body(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(rank, board, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def run_threads() -> Callable[[int, Callable[[ThreadComm], Any]], list[Any]]:
    return _run_threads


@pytest.fixture
def tiny_model() -> ModelConfig:
    return ModelConfig(
        num_layers=4,
        hidden_size=16,
        vocab_size=24,
        num_attention_heads=4,
        mlp_ratio=2.0,
        embed_split_hidden=True,
        max_position_embeddings=64,
    )


@pytest.fixture
def tiny_arch(tiny_model: ModelConfig) -> ModelArch:
    return internlm.build(tiny_model)


@pytest.fixture
def tiny_weights(tiny_arch: ModelArch) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in tiny_arch.iter_params()}
