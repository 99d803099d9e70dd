"""Is what was written what was read? Every parameter once and bit for bit, and the same logits on random tokens.

The parameters are read back under the source's own names and order of rows. The logits come from the result as a
stranger would see it: settings from its own files. Layers are built and run one at a time, so that no model is ever
whole in memory.

Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from internlm_ds.checkpoint.formats import hf, internlm
from internlm_ds.checkpoint.search import Format
from internlm_ds.checkpoint.tensorfile import raw_bytes
from internlm_ds.convert.sources import Source, open_source
from internlm_ds.errors import ConversionError
from internlm_ds.model.layers import build_layers
from internlm_ds.parallel.context import Axis

TOKENS = 32
SEGMENTS = (0, 20, 32)
HEAD_ROWS = 8192
TOLERANCE = 1e-4
"""Of logits, relative to their spread, where weights are equal but for the order of rows."""


def reread(folder: Path, kind: Format, source: Source) -> Mapping[str, Tensor]:
    """The weights as they now lie on the disk, by the source's names and in its order of rows."""
    if kind == "hf":
        return hf.read_weights(folder, arch=source.arch)
    if kind == "internlm":
        return internlm.read_weights(folder, arch=source.arch, mlp_names="2024")
    return open_source(folder, "native", config=None, mlp_names=None).weights


def compare_weights(
    written: Mapping[str, Tensor], source: Source, *, target_format: Format, dtype: torch.dtype
) -> None:
    """Every parameter once, bit for bit equal to the source in the target's dtype.

    Raises:
        ConversionError: Parameters that are missing, extra or differ; all are listed.
    """
    names = [spec.name for spec in source.arch.iter_params()]
    problems = [f"{name}: not written" for name in names if name not in written]
    problems += [f"{name}: written, but not of the model" for name in written if name not in set(names)]
    expected = source.weights
    if target_format == "hf":
        expected = hf.exported(expected, model=source.model, arch=source.arch)
    for name in names:
        # one of the two at a time is in memory
        if name in written and fingerprint(written[name]) != fingerprint(expected[name].to(dtype)):
            problems.append(f"{name}: reads back differently")
    if problems:
        raise ConversionError("the written checkpoint is not equal to its source:\n  " + "\n  ".join(problems))


def fingerprint(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, str]:
    """Shape, dtype and a checksum of every bit (so NaN equals NaN, and 0 is not -0)."""
    data = memoryview(raw_bytes(tensor).numpy()) if tensor.numel() else b""
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(data).hexdigest()


def compare_logits(folder: Path, kind: Format, source: Source, *, dtype: torch.dtype) -> float:
    """The largest difference between the logits of source and result, on the same random tokens.

    Rounding to a narrower dtype is no fault, and may change logits as it likes: the result is held against the source
    rounded alike, and its distance from the source itself is returned.

    Raises:
        ConversionError: The result computes something else, or does not open.
    """
    result = open_source(folder, kind, config=None, mlp_names="2024")
    tokens = torch.randint(source.arch.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    before, after = logits(source, tokens), logits(result, tokens)
    if source.model.norm_head and dtype != torch.float32:
        return _largest(before - after)  # normalised, then rounded: not what rounding alone would give
    alike = (
        before if dtype == source.dtype else logits(replace(source, weights=_Rounded(source.weights, dtype)), tokens)
    )
    difference, allowed = _largest(alike - after), TOLERANCE * max(1.0, float(alike.std()))
    if alike.isfinite().all() and not difference <= allowed:
        raise ConversionError(
            f"the written checkpoint computes something else than its source: logits differ by up to {difference:.3g}, "
            f"at most {allowed:.3g} was expected"
        )
    return _largest(before - after)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


class _Rounded(Mapping[str, Tensor]):
    """Weights in another dtype."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype):
        self._weights, self._dtype = weights, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@torch.no_grad()
def logits(source: Source, tokens: Tensor) -> Tensor:
    """fp32 `(T, V)` of tokens `(T,)` that lie in two segments; one layer at a time is in memory."""
    arch, model = source.arch, source.model
    entries = build_layers(arch, model, tensor=Axis.single("tensor"), seed=None, dtype=torch.float32)
    borders = torch.tensor(SEGMENTS, dtype=torch.int32)
    hidden = source.weights[arch.layers[0].params[0].name][tokens].float()
    for entry in entries[1:-1]:
        layer = entry.build(False).eval()
        for parameter in layer.parameters():
            parameter.copy_(source.weights[parameter.logical_name])
        hidden, _ = layer((hidden, borders))
        del layer, parameter
    head = source.weights[arch.layers[-1].params[0].name]
    rows = (head[start : start + HEAD_ROWS].float() for start in range(0, len(head), HEAD_ROWS))
    return torch.cat([linear(hidden, normalize(part, dim=1) if model.norm_head else part) for part in rows], dim=1)
