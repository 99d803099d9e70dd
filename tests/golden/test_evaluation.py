"""The reference's evaluation: loss, accuracy and perplexity of each validation set, through our engine's evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cases import golden, read_json

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks

LOSS, METRIC = 1e-5, 1.5e-4
LINE = re.compile(r"Validation on (?P<name>\S+): (?P<pairs>.*)")
FAMILIES = {"INTERNLM"}

pytestmark = pytest.mark.timeout(120)

CONFIG = """
ckpt = dict(enable_save_ckpt=False, auto_resume=False)
data = dict(seq_len={seq_len}, micro_num=1, micro_bsz={micro_bsz}, valid_micro_num={valid_micro_num}, total_steps=10,
            skip_batches="", rampup_batch_size="", pack_sample_into_one=False, valid_folder={folder!r})
grad_scaler = dict(fp16=dict(initial_scale=1, min_scale=1, growth_interval=1000), growth_factor=2, backoff_factor=0.5,
                   max_scale=2, hysteresis=2)
hybrid_zero_optimizer = dict(reduce_bucket_size=2**20, clip_grad_norm=0.0)
loss = dict(label_smoothing={label_smoothing})
adam = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=10)
beta2_scheduler = dict(init_beta2=0.95, c=0)
model = {model}
parallel = dict(zero1=-1, tensor=1, pipeline={pipe})
"""


@pytest.mark.parametrize("pipe", [1, 2])
def test_evaluation_equals_reference(pipe: int, tmp_path: Path):
    folder = golden("evaluation")
    cases = sorted(folder.rglob("evaluation.json"))
    assert cases, f"{folder} holds no case"
    for path in cases:
        case = read_json(path)
        model_folder = (path.parent / case["model"]).resolve()
        if not model_folder.is_dir():
            pytest.skip(f"the model that the case names is not there: {model_folder}")
        summary = read_json(model_folder / "summary.json")
        if summary["model_type"] not in FAMILIES:
            continue
        _check(path, case, summary, model_folder, pipe=pipe, config=tmp_path / "config.py")


def _check(path: Path, case: dict, summary: dict, model_folder: Path, *, pipe: int, config: Path) -> None:
    config.write_text(
        CONFIG.format(
            seq_len=case["seq_len"],
            micro_bsz=case["micro_bsz"],
            valid_micro_num=case["valid_micro_num"],
            folder=str(path.parent / "valid"),
            label_smoothing=summary["label_smoothing"],
            model={**summary["model_kwargs"], "dtype": "torch.float32"},
            pipe=pipe,
        )
    )
    got = run_ranks(_evaluate, Layout(pipe=pipe), str(config), str(model_folder), timeout_s=100)[-1]
    sizes = {
        name: {"batches": n, "batch_size": size, "dataset": count} for name, (n, size, count) in got["sizes"].items()
    }
    assert sizes == case["loaders"]
    wanted = _wanted(case["lines"])
    assert set(got["results"]) == set(wanted)
    for name, want in wanted.items():
        result = got["results"][name]
        assert result["loss"] == pytest.approx(want["loss"], rel=LOSS), name
        assert result["acc"] == pytest.approx(want["acc"], abs=METRIC), name
        assert result["perplexity"] == pytest.approx(want["plex"], abs=METRIC * max(1.0, want["plex"])), name


def _wanted(lines: list[str]) -> dict[str, dict[str, float]]:
    found = {}
    for line in lines:
        match = LINE.fullmatch(line.strip())
        assert match is not None, line
        pairs = dict(pair.split("=", 1) for pair in match["pairs"].split())
        name = match["name"]
        found[name] = {kind: float(pairs[f"val/{name}_{kind}"]) for kind in ("loss", "acc", "plex")}
    return found


def _evaluate(context, config: str, model_folder: str) -> dict:
    import torch

    from internlm_ds.data.loader import build_validation_loaders
    from internlm_ds.engine import state
    from internlm_ds.engine.build import build
    from internlm_ds.runspec import resolve
    from internlm_ds.train.assemble import layer_entries, stage_bounds
    from internlm_ds.train.evaluate import evaluate
    from internlm_ds.train.metrics import StageLoss
    from internlm_ds.translate import translate

    spec = resolve(config, world_size=context.layout.world_size)
    loss = StageLoss(label_smoothing=spec.config.loss.label_smoothing, dataset_types=(), context=context)
    entries = layer_entries(spec, context, seed=1)
    engine = build(
        entries,
        bounds=stage_bounds(spec, entries),
        config=spec.config,
        ds_config=translate(spec).ds_config,
        context=context,
        loss_fn=loss,
    )
    weights = torch.load(f"{model_folder}/state_dict.pt", weights_only=True)
    state.load_weights(engine, weights.__getitem__)
    loaders = build_validation_loaders(spec.config, data_rank=0, data_size=1)
    results = evaluate(engine, loaders, validation_metrics=loss.validating)
    sizes = {name: (len(each), each.batch_size, each.num_samples) for name, each in loaders.items()}
    return {"sizes": sizes, "results": results}
