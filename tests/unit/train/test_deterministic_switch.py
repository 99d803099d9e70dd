"""`internlm_ds.deterministic`: which switches of torch it turns on a device, and that a CPU is left alone."""

import os
from pathlib import Path

import pytest
import torch

from internlm_ds.config import load
from internlm_ds.train.assemble import set_global_state

CONFIG = Path(__file__).resolve().parents[3] / "model_configs" / "debug_cpu.py"


@pytest.fixture(autouse=True)
def torch_as_before(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    kept = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    yield
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_switches(asked, device):
    config = load(CONFIG, [f"internlm_ds.deterministic={asked}"]).config
    set_global_state(config, seed=1, device=torch.device(device))
    on = asked and device == "cuda"
    assert torch.are_deterministic_algorithms_enabled() == on
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # a warning would leave flash kernels as they are
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if on else None)
    assert torch.utils.deterministic.fill_uninitialized_memory != on


def test_a_workspace_that_was_chosen_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    config = load(CONFIG, ["internlm_ds.deterministic=True"]).config
    set_global_state(config, seed=1, device=torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
