"""Training curves of the reference, replayed through the DeepSpeed engine: loss, norm, rates, scales, metrics, weights.

Curves called fp32 run without clipping (the switch that gives the reference's way); the others compute in fp32 here,
with the clip as given and InternLM's loss scale installed. Where a curve injects infinities and NaN, verdicts and loss
scales are replayed with whatever model exists.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from cases import case_folders, golden, read_json

from internlm_ds.arch import BLUEPRINTS
from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks

CASES = case_folders("training", "curve.json")
LOSS, NORM, RATE, METRIC, WEIGHT = 1e-5, 1e-5, 1e-9, 1.5e-4, 1e-4

pytestmark = pytest.mark.timeout(180)

CONFIG = """
JOB_NAME = "replay"
model_type = "{model_type}"
ckpt = dict(enable_save_ckpt=False, auto_resume=False)
data = dict(seq_len={seq_len}, micro_num={micro_num}, micro_bsz={micro_bsz}, total_steps={total_steps},
            skip_batches="", rampup_batch_size="", pack_sample_into_one=False)
grad_scaler = {grad_scaler}
hybrid_zero_optimizer = dict(reduce_bucket_size=2**20, clip_grad_norm={clip})
loss = dict(label_smoothing={label_smoothing})
adam = {adam}
lr_scheduler = {lr_scheduler}
beta2_scheduler = {beta2_scheduler}
model = {model}
parallel = dict(zero1=-1, tensor=1, pipeline=dict(size={pipe}, interleaved_overlap=False), sequence_parallel=False)
internlm_ds = dict(compat=dict(no_clip_in_fp32={no_clip}), chunked_loss={chunked_loss})
"""


def test_there_are_cases():
    golden("training")
    assert CASES


@pytest.mark.parametrize(("pipe", "chunked_loss"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_curve_equals_reference(case: Path, pipe: int, chunked_loss: bool, tmp_path: Path):
    curve = _curve(case)
    if curve["model_type"] not in BLUEPRINTS:
        pytest.skip(f"model family {curve['model_type']} does not exist in this version")
    path = _write_config(curve, tmp_path, pipe=pipe, chunked_loss=chunked_loss)
    got = run_ranks(_replay, Layout(pipe=pipe), str(path), str(case), timeout_s=150)[-1]
    for want, step in zip(curve["steps"], got["steps"], strict=True):
        where = f"batch {want['batch']}"
        _compare_state(step, want, where)
        _compare_values(step, want, where)
    for name, (norm, difference) in got["weights"].items():
        assert difference <= WEIGHT * max(1.0, norm), name


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_verdicts_and_loss_scales_equal_reference(case: Path, tmp_path: Path):
    curve = _curve(case)
    if not curve["injected"]:
        pytest.skip("nothing is injected in this curve")
    curve = {**curve, "model_kwargs": {**_tiny_model(curve)}}
    path = _write_config({**curve, "model_type": "INTERNLM"}, tmp_path, pipe=1)
    got = run_ranks(_replay_verdicts, Layout(), str(path), str(case), timeout_s=150)[0]
    for want, step in zip(curve["steps"], got, strict=True):
        _compare_state(step, want, f"batch {want['batch']}")


def _curve(case: Path) -> dict:
    return read_json(case / "curve.json")


def _tiny_model(curve: dict) -> dict:
    return dict(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        mlp_ratio=2,
        vocab_size=curve["model_kwargs"]["vocab_size"],
        embed_split_hidden=True,
        dtype="torch.float32",
    )


def _write_config(curve: dict, folder: Path, *, pipe: int, chunked_loss: bool = False) -> Path:
    model = {**curve["model_kwargs"], "dtype": "torch.float32"}
    text = CONFIG.format(
        model_type=curve["model_type"],
        seq_len=curve["seq_len"],
        micro_num=curve["micro_num"],
        micro_bsz=curve["packed_length"] // curve["seq_len"],
        total_steps=curve["lr_scheduler"]["total_steps"],
        grad_scaler=curve["grad_scaler"],
        clip=curve["clip_grad_norm"],
        label_smoothing=curve["label_smoothing"],
        adam=curve["adam"],
        lr_scheduler=curve["lr_scheduler"],
        beta2_scheduler=curve["beta2_scheduler"],
        model=model,
        pipe=pipe,
        chunked_loss=chunked_loss,
        no_clip=curve["compute"].startswith("fp32"),
    )
    path = folder / "replay.py"
    path.write_text(text)
    return path


def _compare_state(got: dict, want: dict, where: str) -> None:
    for key in ("success", "step_count", "inf_nan_skip_batches"):
        assert got[key] == want[key], (where, key)
    for key in ("lr_used", "lr_logged", "loss_scale_used", "loss_scale_logged", "adam_beta2"):
        assert got[key] == pytest.approx(want[key], rel=RATE, abs=0), (where, key)


def _compare_values(got: dict, want: dict, where: str) -> None:
    assert got["loss"] == pytest.approx(want["loss"], rel=LOSS), where
    if want["success"]:
        whole = math.sqrt(sum(norm**2 for norm in want["grad_norm"].values()))
        assert got["grad_norm"] == pytest.approx(whole, rel=NORM), where
    for key, value in want["metric"].items():
        if value is None or math.isnan(value):
            assert math.isnan(got["metric"][key]), (where, key)
        else:
            scale = abs(value) if key == "perplexity" else 1.0
            assert abs(got["metric"][key] - value) <= METRIC * max(1.0, scale), (where, key)


# ---- on the ranks ---------------------------------------------------------------------------------------------------


def _replay(context, path: str, case: str) -> dict:
    import numpy as np
    import torch

    curve, batches = read_json(Path(case) / "curve.json"), np.load(Path(case) / "batches.npz")
    engine, loss, settings = _engine(context, path, curve)
    initial = torch.load(Path(case) / "initial_state_dict.pt", weights_only=True)
    from internlm_ds.engine import state

    state.load_weights(engine, initial.__getitem__)
    state.refresh_masters(engine, initial.__getitem__)
    steps = _steps(engine, loss, settings, curve, lambda b: _micro_batches(batches, b, curve))
    final = torch.load(Path(case) / "final_state_dict.pt", weights_only=True)
    weights = {
        name: (float(final[name].norm()), float((param.detach() - final[name]).norm()))
        for name, param in engine.logical_parameters()
    }
    return {"steps": steps, "weights": weights}


def _replay_verdicts(context, path: str, case: str) -> list[dict]:
    import numpy as np

    curve, batches = read_json(Path(case) / "curve.json"), np.load(Path(case) / "batches.npz")
    engine, loss, settings = _engine(context, path, curve)
    return _steps(engine, loss, settings, curve, lambda b: _micro_batches(batches, b, curve))


def _engine(context, path: str, curve: dict):
    from internlm_ds.engine.build import build
    from internlm_ds.optim.loss_scale import DynamicLossScale
    from internlm_ds.runspec import resolve
    from internlm_ds.train.assemble import layer_entries, stage_bounds
    from internlm_ds.train.metrics import StageLoss
    from internlm_ds.translate import translate

    spec = resolve(path, world_size=context.layout.world_size)
    loss = StageLoss(label_smoothing=curve["label_smoothing"], dataset_types=curve["dataset_types"], context=context)
    entries = layer_entries(spec, context, seed=1)
    engine = build(
        entries,
        bounds=stage_bounds(spec, entries),
        config=spec.config,
        ds_config=translate(spec).ds_config,
        context=context,
        loss_fn=loss,
    )
    if not curve["compute"].startswith("fp32"):
        engine.install_loss_scale(DynamicLossScale.from_config(spec.config.grad_scaler))
    return engine, loss, spec.config


def _steps(engine, loss, config, curve: dict, micro_batches) -> list[dict]:
    from internlm_ds.optim.schedules import Beta2Schedule, LrSchedule

    lr, beta2 = LrSchedule.from_config(config), Beta2Schedule.from_config(config)
    updates = skipped = 0
    steps = []
    for b in range(len(curve["steps"])):
        engine.on_gradients = _injection(curve["injected"].get(str(b)))
        used = {"lr_used": lr.at(updates), "loss_scale_used": engine.current_loss_scale}
        engine.set_hyperparameters(lr=used["lr_used"], betas=(config.adam.adam_beta1, beta2.at(updates)))
        outcome = engine.train_step(micro_batches(b))
        updates, skipped = updates + outcome.applied, skipped + (not outcome.applied)
        steps.append(
            {
                **used,
                "loss": outcome.loss,
                "grad_norm": outcome.grad_norm,
                "success": outcome.applied,
                "step_count": updates,
                "inf_nan_skip_batches": skipped,
                "lr_logged": lr.at(updates),
                "loss_scale_logged": engine.current_loss_scale,
                "adam_beta2": beta2.at(updates),
                "metric": loss.finish_step(),
            }
        )
    return steps


def _injection(value: str | None):
    if value is None:
        return None

    def inject(engine) -> None:
        if engine.is_first_stage():
            next(iter(engine.module.parameters())).grad.view(-1)[0] = float(value)

    return inject


def _micro_batches(batches, b: int, curve: dict) -> list:
    import torch

    made = []
    for j in range(curve["micro_num"]):
        tokens = torch.from_numpy(batches[f"b{b}_input_ids"][j]).long()
        borders = torch.from_numpy(batches[f"b{b}_cu{j}"]).int()
        padded = torch.full((len(tokens) + 1,), len(tokens), dtype=torch.int32)
        padded[: len(borders)] = borders
        labels = torch.from_numpy(batches[f"b{b}_labels"][j]).long()
        types = torch.from_numpy(batches[f"b{b}_type_ids"][j]).long()
        made.append(((tokens, padded), (labels, types)))
    return made
