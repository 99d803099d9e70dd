"""Meta's Llama files: merged over their ranks, at any number of them."""

from __future__ import annotations

import pytest
import torch

from internlm_ds.arch import blueprint
from internlm_ds.checkpoint.formats import internlm, llama
from internlm_ds.checkpoint.search import detect
from internlm_ds.checkpoint.start import plan_start
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError, ConversionError

MODEL = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    vocab_size=64,
    mlp_ratio=2.0,
    no_bias=True,
)


def llama_arch(**changes):
    return blueprint("LLAMA2", ModelConfig(**{**MODEL, **changes}))


@pytest.fixture
def written(tmp_path):
    """Weights, and a folder of files as Meta splits them."""
    arch = llama_arch()
    generator = torch.Generator().manual_seed(3)
    weights = {spec.name: torch.randn(spec.shape, generator=generator) for spec in arch.iter_params()}

    def write(ranks: int, pattern: str = "consolidated.{:02d}.pth"):
        folder = tmp_path / f"{ranks}{pattern[:5]}"
        folder.mkdir()
        for rank in range(ranks):
            held = {s.name: internlm.split(weights[s.name], s, tensor_size=ranks)[rank] for s in arch.iter_params()}
            torch.save({**held, "rope.freqs": torch.ones(4)}, folder / pattern.format(rank))
        return folder

    return weights, write


@pytest.mark.parametrize("pattern", ["consolidated.{:02d}.pth", "model_t{}.pt"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_files_of_all_ranks_merge(written, ranks, pattern):
    weights, write = written
    folder = write(ranks, pattern)
    assert detect(folder) == "llama"
    found = llama.read_weights(folder, arch=llama_arch())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_a_run_starts_from_them(written):
    from test_plan_start import Config, LoadInfo

    start = plan_start(Config(None, load_ckpt_info=LoadInfo(str(written[1](2)), ckpt_type="llama")))
    assert (start.kind, start.parts) == ("llama", {"model"})
    assert torch.equal(start.weights(llama_arch())["norm.weight"], written[0]["norm.weight"])


def test_they_are_inspected_and_converted(written, tmp_path):
    from internlm_ds.checkpoint.inspection import inspect
    from internlm_ds.convert.sources import open_source

    folder = written[1](2)
    (found,) = inspect(folder, verify=True)
    assert (found.format, found.layout, found.problems) == ("llama", {"tensor": 2}, ())
    with pytest.raises(ConversionError, match="give --config CONFIG"):
        open_source(folder, "llama", config=None, mlp_names=None)


def test_a_missing_rank_and_another_order_of_pairs_are_said(written):
    folder = written[1](2)
    with pytest.raises(CheckpointError, match="adapt_hf=False"):
        llama.read_weights(folder, arch=llama_arch(adapt_hf=True))
    with pytest.raises(CheckpointError, match="of the family 'internlm2'"):
        llama.read_weights(folder, arch=blueprint("INTERNLM2_PUBLIC", ModelConfig(**MODEL)))
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match="lacks the files of tensor ranks 0"):
        llama.read_weights(folder, arch=llama_arch())
