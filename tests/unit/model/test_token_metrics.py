"""Metrics over micro-batches: counts per type, rounding, reset, nothing counted."""

import math

import torch

from internlm_ds.model import metrics
from internlm_ds.model.metrics import TokenMetrics


def batches():
    torch.manual_seed(0)
    for _ in range(3):
        labels = torch.randint(0, 9, (20,))
        labels[::4] = -100
        logits = torch.randn(20, 9)
        logits[1, labels[1]] = logits[2, labels[2]] = 9.0
        yield logits, labels, torch.randint(0, 2, (20,))


def test_equals_the_obvious_loop():
    collected, rows = TokenMetrics(["cn", "en", "ja"]), []
    for logits, labels, types in batches():
        collected.update(logits, labels, types)
        for x, y, t in zip(logits.double(), labels.tolist(), types.tolist()):
            if y != -100:
                rows.append((int(x.argmax()) == y, -x.log_softmax(-1)[y].item(), t))
    found = collected.finish()
    loss = sum(r[1] for r in rows) / len(rows)
    assert found["acc"] == round(sum(r[0] for r in rows) / len(rows), 4)
    assert math.isclose(found["perplexity"], math.exp(loss), abs_tol=1e-3)
    assert math.isclose(found["loss_from_metric"], loss, abs_tol=1e-4)
    for k, name in enumerate(("cn", "en")):
        own = [r for r in rows if r[2] == k]
        assert found[f"tokens/{name}"] == len(own) and isinstance(found[f"tokens/{name}"], int)
        assert found[f"acc/{name}"] == round(sum(r[0] for r in own) / (len(own) + 1e-5), 4)
        assert math.isclose(found[f"loss/{name}"], sum(r[1] for r in own) / len(own), abs_tol=1e-4)
    assert found["acc/ja"] == 0.0 and found["tokens/ja"] == 0 and math.isnan(found["loss/ja"])
    assert list(found) == [
        *("acc", "perplexity", "acc/cn", "acc/en", "acc/ja", "tokens/cn", "tokens/en", "tokens/ja"),
        *("loss_from_metric", "loss/cn", "loss/en", "loss/ja"),
    ]


def test_finish_starts_anew():
    collected = TokenMetrics()
    results = []
    for _ in range(2):
        for logits, labels, _types in batches():
            collected.update(logits, labels)
        results.append(collected.finish())
    assert results[0] == results[1] and list(results[0]) == ["acc", "perplexity", "loss_from_metric"]


def test_nothing_counted_is_nan():
    collected = TokenMetrics()
    collected.update(torch.randn(3, 5), torch.full((3,), -100))
    assert all(math.isnan(value) for value in collected.finish().values())


def test_chunks_change_nothing(monkeypatch):
    logits, labels, _ = next(iter(batches()))
    whole = metrics.token_values(logits, labels)
    monkeypatch.setattr(metrics, "CHUNK_ROWS", 3)
    assert torch.equal(metrics.token_values(logits, labels), whole)


def test_huge_loss_is_infinite_perplexity():
    collected = TokenMetrics()
    logits = torch.zeros(1, 4)
    logits[0, 1] = 1e5
    collected.update(logits, torch.tensor([0]))
    assert collected.finish()["perplexity"] == math.inf
