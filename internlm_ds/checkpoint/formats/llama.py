"""Weights as Meta published them: one `.pth` file for each tensor rank, names as our Llama's.

A folder holds `consolidated.00.pth`, …, or InternLM's copies of them, `model_t0.pt`, …; rotary pairs are neighbours, so
the model is one without `adapt_hf`. The `.pth` files are opened by `unpickle`, merged by `internlm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint import unpickle
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.checkpoint.names import META_FILE
from internlm_ds.checkpoint.unpickle import LazyTensor
from internlm_ds.errors import CheckpointError

_NO_WEIGHTS = ("rope.freqs", "inv_freq")


def read_weights(folder: Path, *, arch: ModelArch) -> Mapping[str, torch.Tensor]:
    """The weights of all ranks by logical name, each read when it is asked for.

    Raises:
        CheckpointError: The model is no Llama or has `adapt_hf`, a rank's file is missing, or parameters do not fit.
    """
    if arch.family != "llama":
        raise CheckpointError(
            f"{folder} holds a Llama of Meta's; the model to be loaded is of the family {arch.family!r}"
        )
    if arch.rotary_pairs != "neighbours":
        raise CheckpointError(
            f"{folder} holds a Llama of Meta's, whose rotary pairs are neighbours: set model.adapt_hf=False"
        )
    files = find_files(folder)
    states = {(rank, 0): read_state(path) for rank, path in files.items()}
    return internlm.merged(states, folder=folder, arch=arch, mlp_names="2024")


def find_files(folder: Path) -> dict[int, Path]:
    """Tensor rank to its file.

    Raises:
        CheckpointError: There is none, or one is missing.
    """
    found = {
        int(match[1] or match[2]): path
        for path in sorted(folder.iterdir())
        if (match := META_FILE.fullmatch(path.name))
    }
    if not found:
        raise CheckpointError(f"{folder} holds neither consolidated.00.pth nor model_t0.pt")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise CheckpointError(f"{folder} lacks the files of tensor ranks {', '.join(map(str, missing))}")
    return found


def read_state(path: Path) -> dict[str, LazyTensor]:
    """The weights of one rank, left in their file.

    Raises:
        CheckpointError: It is no state dict.
    """
    state = unpickle.load(path, lazy=True)
    if not isinstance(state, dict) or not all(isinstance(tensor, LazyTensor) for tensor in state.values()):
        raise CheckpointError(f"{path} is no state dict: names with tensors were expected")
    return {name: tensor for name, tensor in state.items() if not name.endswith(_NO_WEIGHTS)}
