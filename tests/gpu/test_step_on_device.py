"""On a CUDA device: a step of each family in half precision, compiled against eager, memory against the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internlm_ds.layout.ranks import Layout
from internlm_ds.plan import describe
from internlm_ds.runspec import resolve
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.translate import translate
from internlm_ds.verify import training
from internlm_ds.verify.case import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FAMILIES = ["INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"]


def losses(context, path: str, case: Case) -> tuple[list[float], int]:
    """Losses of the steps, and the most memory that was allocated."""
    result = training.train(context, path, case)
    return result.losses, torch.cuda.max_memory_allocated()


def run(tmp_path: Path, **changes) -> tuple[list[float], int]:
    case = Case(steps=4, hidden=128, heads=4, vocab=256, **changes)
    (result,) = run_ranks(losses, Layout(), case.write(tmp_path), case, timeout_s=500, backend="nccl")
    return result


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_half_precision_follows_fp32(tmp_path: Path, family: str, dtype: str):
    half, _ = run(tmp_path, model_type=family, dtype=dtype)
    whole, _ = run(tmp_path, model_type=family)
    # bfloat16 keeps 8 bits of each number
    torch.testing.assert_close(torch.tensor(half), torch.tensor(whole), rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled_follows_eager(tmp_path: Path, dtype: str):
    compiled, _ = run(tmp_path, model_type="LLAMA2", dtype=dtype, own="compile=True")
    eager, _ = run(tmp_path, model_type="LLAMA2", dtype=dtype)
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=1e-2, atol=0)


def test_memory_is_what_the_plan_says(tmp_path: Path):
    """A model whose states outweigh its few tokens: what the plan counts exactly."""
    case = Case(steps=3, layers=8, hidden=1024, heads=8, vocab=8192, dtype="bfloat16", model_type="LLAMA2")
    path = case.write(tmp_path)
    (result,) = run_ranks(losses, Layout(), path, case, timeout_s=500, backend="nccl")
    spec = resolve(path, world_size=1)
    planned = max(stage.peak_bytes for stage in describe(spec, translate(spec)).stages)
    assert 0.8 < result[1] / planned < 1.1, f"{result[1]} bytes allocated at most, {planned} planned"
