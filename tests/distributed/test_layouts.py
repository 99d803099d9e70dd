"""The layouts of this version against one process: weights, losses, norms and the updated weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)

CONFIG = """
ckpt = dict(enable_save_ckpt=False, auto_resume=False)
data = dict(seq_len=16, micro_num=4, micro_bsz=2, total_steps=10, skip_batches="", rampup_batch_size="",
            pack_sample_into_one=False)
grad_scaler = dict(fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000), growth_factor=2,
                   backoff_factor=0.5, max_scale=2**24, hysteresis=2)
hybrid_zero_optimizer = dict(reduce_bucket_size=2**20, clip_grad_norm=0.5)
loss = dict(label_smoothing=0.1)
adam = dict(lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=10, warmup_ratio=0.2, eta_min=1e-3)
beta2_scheduler = dict(init_beta2=0.95, c=0)
model = dict(num_layers=4, hidden_size=32, num_attention_heads=2, vocab_size=64, mlp_ratio=2, embed_split_hidden=True,
             checkpoint={checkpoint}, dtype="torch.{dtype}")
parallel = dict(zero1={zero1}, tensor=1, pipeline={pipe})
"""
STEPS = 3
# (layout, recomputed fraction); gradients of data-parallel ranks are summed in another order than one process does
LAYOUTS = [
    (Layout(pipe=2), 0.0),
    (Layout(pipe=4), 0.5),
    (Layout(data=2, zero=2), 0.0),
    (Layout(data=2, zero=1), 1.0),
    (Layout(pipe=2, data=2, zero=2), 0.5),
]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, list[dict]]:
    """Weights before, losses, norms and weights after on one process, by dtype."""
    folder = tmp_path_factory.mktemp("single")
    return {
        dtype: run_ranks(_train, Layout(), str(_config(folder, Layout(), dtype=dtype)), 1, timeout_s=100)
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize(("layout", "checkpoint"), LAYOUTS, ids=lambda v: str(v) if isinstance(v, float) else _name(v))
def test_layout_equals_one_process(layout: Layout, checkpoint: float, single, tmp_path: Path):
    path = _config(tmp_path, layout, checkpoint=checkpoint)
    ranks = run_ranks(_train, layout, str(path), layout.data, timeout_s=150)
    whole = single["float32"][0]
    before, after = _merged(ranks, "before"), _merged(ranks, "after")
    assert before.keys() == whole["before"].keys()
    for name, weight in whole["before"].items():
        assert before[name].equal(weight), f"initial {name}"
    for rank in ranks:
        assert [o[0] for o in rank["outcomes"]] == pytest.approx([o[0] for o in whole["outcomes"]], rel=2e-6)
        assert [o[1] for o in rank["outcomes"]] == pytest.approx([o[1] for o in whole["outcomes"]], rel=2e-5)
    for name, weight in whole["after"].items():
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "layout", [Layout(pipe=2), Layout(data=2, zero=2), Layout(data=2, zero=1)], ids=lambda v: _name(v)
)
def test_bf16_layout_equals_one_process(layout: Layout, single, tmp_path: Path):
    path = _config(tmp_path, layout, dtype="bfloat16")
    ranks = run_ranks(_train, layout, str(path), layout.data, timeout_s=150)
    whole = single["bfloat16"][0]
    losses = [o[0] for o in ranks[0]["outcomes"]]
    assert losses == pytest.approx([o[0] for o in whole["outcomes"]], rel=2e-3)
    norms = [o[1] for o in ranks[0]["outcomes"]]
    assert norms == pytest.approx([o[1] for o in whole["outcomes"]], rel=2e-2)


def test_replicas_of_a_data_axis_are_equal(tmp_path: Path):
    layout = Layout(data=4, zero=2)
    ranks = run_ranks(_train, layout, str(_config(tmp_path, layout)), layout.data, timeout_s=200)
    for rank in ranks[1:]:
        for name, weight in ranks[0]["after"].items():
            assert rank["after"][name].equal(weight), name


def _name(layout: Layout) -> str:
    return f"pipe{layout.pipe}-data{layout.data}-zero{layout.zero}"


def _config(folder: Path, layout: Layout, *, checkpoint: float = 0.0, dtype: str = "float32") -> Path:
    path = folder / f"{dtype}.py"
    path.write_text(CONFIG.format(checkpoint=checkpoint, dtype=dtype, zero1=layout.zero, pipe=layout.pipe))
    return path


def _merged(ranks: list[dict], key: str) -> dict[str, torch.Tensor]:
    return {name: weight for rank in ranks for name, weight in rank[key].items()}


def _train(context, path: str, data_size: int) -> dict:
    from internlm_ds.engine.build import build
    from internlm_ds.optim.schedules import LrSchedule
    from internlm_ds.runspec import resolve
    from internlm_ds.train.assemble import layer_entries, stage_bounds
    from internlm_ds.train.metrics import StageLoss
    from internlm_ds.translate import translate

    spec = resolve(path, world_size=context.layout.world_size)
    loss = StageLoss(label_smoothing=0.1, dataset_types=(), context=context)
    entries = layer_entries(spec, context, seed=7)
    engine = build(
        entries,
        bounds=stage_bounds(spec, entries),
        config=spec.config,
        ds_config=translate(spec).ds_config,
        context=context,
        loss_fn=loss,
    )
    before = {name: param.detach().clone() for name, param in engine.logical_parameters()}
    schedule = LrSchedule.from_config(spec.config)
    outcomes = []
    for step in range(STEPS):
        engine.set_hyperparameters(lr=schedule.at(step), betas=(0.9, 0.95))
        # the same 4 micro-batches, dealt out over the data axis: their mean is the same loss
        mine = [_micro_batch(step, j) for j in range(4)][context.data.rank :: data_size]
        outcome = engine.train_step(mine)
        outcomes.append((outcome.loss, outcome.grad_norm))
    after = {name: param.detach().clone() for name, param in engine.logical_parameters()}
    return {"before": before, "after": after, "outcomes": outcomes}


def _micro_batch(step: int, j: int):
    generator = torch.Generator().manual_seed(100 * step + j)
    tokens = torch.randint(1, 64, (33,), generator=generator)
    borders = torch.full((33,), 32, dtype=torch.int32)
    borders[:4] = torch.tensor([0, 5 + j, 16, 32], dtype=torch.int32)
    return (tokens[:-1].clone(), borders), (tokens[1:].clone(), torch.zeros(32, dtype=torch.int64))
