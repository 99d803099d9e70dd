"""Converting holds little more than the largest parameter, in reading, writing and verifying."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from internlm_ds.arch import blueprint
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.config.schema import ModelConfig
from internlm_ds.convert.run import Request, convert
from internlm_ds.convert.sources import dict_of_model

STATUS = Path("/proc/self/status")
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=512,
    vocab_size=32000,
    num_attention_heads=8,
    mlp_ratio=8 / 3,
    dtype="float32",
    no_bias=True,
)
ARCH = blueprint("LLAMA2", MODEL)
LARGEST = 4 * max(spec.numel for spec in ARCH.iter_params())


def resident_bytes() -> int:
    """Memory of this process, pages of mapped files included."""
    return 1024 * int(next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS")).split()[1])


class Peak:
    """The most memory that is seen while a block runs, beyond what there was before."""

    def __enter__(self) -> Peak:
        self._before, self.extra, self._over = resident_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.extra = max(self.extra, resident_bytes() - self._before)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "ilm"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    weights = {spec.name: 0.02 * torch.randn(spec.shape, generator=generator) for spec in ARCH.iter_params()}
    settings = dict_of_model(MODEL, dtype=torch.float32, model_type="LLAMA2")
    internlm.write_weights(folder, weights, arch=ARCH, tensor_size=2, model_config=settings)
    return folder


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["hf", "native", "internlm"])
def test_memory_of_a_conversion(tmp_path, source, kind):
    assert 4 * ARCH.num_params > 3 * LARGEST, "the whole model would be seen"
    with Peak() as peak:
        convert(Request(str(source), str(tmp_path / kind), "internlm", kind, tensor=2 if kind == "internlm" else 1))
    assert peak.extra < 2 * LARGEST, f"{peak.extra / 2**20:.0f} MiB beside a parameter of {LARGEST / 2**20:.0f} MiB"
