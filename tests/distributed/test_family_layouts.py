"""InternLM2 and Llama on layouts against one process: losses, norms and weights of ten clipped steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from layout_runs import Case, assert_follows, train

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)

CLIP = 0.1
GROUPED = (("num_kv_attention_heads", 2), ("no_bias", True))
BIASED = (("num_kv_attention_heads", 2), ("embed_split_hidden", True), ("adapt_hf", True))
POST_NORM = (*GROUPED, ("apply_post_layer_norm", True), ("norm_head", True))


def internlm2(layout: Layout, model=GROUPED, **more) -> Case:
    return Case(layout=layout, model_type="INTERNLM2_PUBLIC", model=model, clip=CLIP, **more)


def llama(layout: Layout, model=GROUPED, **more) -> Case:
    return Case(layout=layout, model_type="LLAMA2", model=model, clip=CLIP, **more)


CASES = {
    "internlm2-pp2-2chunks": internlm2(Layout(pipe=2, chunks=2), (*GROUPED, ("num_chunks", 2))),
    "internlm2-tp2-sp": internlm2(Layout(tensor=2), BIASED, mode="msp"),
    "internlm2-pp2-post-norm": internlm2(Layout(pipe=2), POST_NORM),
    "llama-pp2-tp2-sp": llama(Layout(pipe=2, tensor=2), mode="msp"),
    "llama-tp2-biases": llama(Layout(tensor=2), BIASED),
}
MORE = {
    "internlm2-pp2-tp2-zb": internlm2(Layout(pipe=2, tensor=2), own='pipeline_schedule="zb-h1"'),
    "internlm2-dp2-recompute": internlm2(Layout(data=2, zero=2), (*GROUPED, ("checkpoint", 0.5))),
    "internlm2-tp2-post-norm-sp": internlm2(Layout(tensor=2), POST_NORM, mode="msp"),
    "llama-pp2-2chunks": llama(Layout(pipe=2, chunks=2), (*GROUPED, ("num_chunks", 2))),
    "llama-pp4": llama(Layout(pipe=4), BIASED),
    "llama-tp2-dp2": llama(Layout(tensor=2, data=2, zero=2)),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.soak) for name in MORE)])
def test_layout_follows_one_process(name: str, single, tmp_path: Path):
    case = (CASES | MORE)[name]
    ranks = run_ranks(train, case.layout, case.write(tmp_path), case, timeout_s=200)
    assert_follows(ranks, single(case), clip=case.clip)
