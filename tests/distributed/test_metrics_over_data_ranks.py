"""Metrics of two data ranks equal those of one process that saw both shares."""

import math

import torch

from internlm_ds.layout.ranks import Layout
from internlm_ds.model.metrics import TokenMetrics
from internlm_ds.testing.ranks import run_ranks

TYPES = ["cn", "en", "ja"]


def micro_batch(number):
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 9, (20,), generator=generator)
    labels[:: number + 2] = -100
    return torch.randn(20, 9, generator=generator), labels, torch.randint(0, 2, (20,), generator=generator)


def share_of_rank(context):
    metrics = TokenMetrics(TYPES)
    for number in (context.data.rank, context.data.rank + 2):
        metrics.update(*micro_batch(number))
    return metrics.finish(context.data.group)


def test_sums_over_data_ranks():
    whole = TokenMetrics(TYPES)
    for number in range(4):
        whole.update(*micro_batch(number))
    expected = whole.finish()
    for found in run_ranks(share_of_rank, Layout(data=2)):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == value or (math.isnan(found[key]) and math.isnan(value)), key
