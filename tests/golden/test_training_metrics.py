"""The metric values of the reference's first training steps, from its initial weights and batches."""

import numpy as np
import pytest
import torch
from cases import case_folders, golden, read_json
from test_models import blueprint_of

from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.model.metrics import TokenMetrics
from internlm_ds.parallel.context import Axis

FOLDERS = case_folders("training", "curve.json")
TOLERANCE = 1.5e-4


def test_there_are_curves():
    golden("training")
    assert FOLDERS, "the kind exists but holds no case"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_first_step(folder):
    curve, batches = read_json(folder / "curve.json"), np.load(folder / "batches.npz")
    config, arch = blueprint_of(curve)
    dtype = torch.float32 if curve["compute"] == "fp32" else torch.float64
    model = LanguageModel(build_layers(arch, config, tensor=Axis.single("tensor"), seed=None, dtype=dtype))
    weights = torch.load(folder / "initial_state_dict.pt", weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_logical_parameters():
            parameter.copy_(weights[name])
    metrics, losses = TokenMetrics(curve["dataset_types"]), []
    for j in range(curve["micro_num"]):
        tokens, labels, types = (
            torch.tensor(batches[f"b0_{key}"][j]).long() for key in ("input_ids", "labels", "type_ids")
        )
        logits = model(tokens, torch.tensor(batches[f"b0_cu{j}"]).int())
        losses.append(cross_entropy(logits, labels, label_smoothing=curve["label_smoothing"]).item())
        metrics.update(logits, labels, types)
    step = curve["steps"][0]
    assert sum(losses) / len(losses) == pytest.approx(step["loss"], rel=1e-5)
    found = metrics.finish()
    assert found.keys() == step["metric"].keys()
    for key, value in step["metric"].items():
        expected = float("nan") if value is None else value
        assert found[key] == pytest.approx(expected, abs=TOLERANCE, rel=1e-5, nan_ok=True), key
