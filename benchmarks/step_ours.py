"""This trainer as a contestant of `step.py`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from step_facts import Facts, Sizes, Step, borders, rows_of_tokens

CONFIG = """
ckpt = dict(enable_save_ckpt=False, auto_resume=False)
model_type = "LLAMA2"
data = dict(seq_len={seq}, micro_num={micro_num}, micro_bsz={rows}, total_steps=1000, skip_batches="",
            rampup_batch_size="", train_folder=None, pack_sample_into_one=False)
grad_scaler = dict(fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000), growth_factor=2,
                   backoff_factor=0.5, max_scale=2**24, hysteresis=2)
hybrid_zero_optimizer = dict(reduce_bucket_size=512 * 1024 * 1024, clip_grad_norm=1.0)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=1000, warmup_ratio=0.01, eta_min=1e-5)
beta2_scheduler = dict(init_beta2=0.95, c=0)
model = dict(num_layers={layers}, hidden_size={hidden}, num_attention_heads={heads}, num_kv_attention_heads={heads},
             vocab_size={vocab}, mlp_ratio={mlp} / {hidden}, dtype="torch.{dtype}", no_bias=True, num_chunks={chunks},
             use_flash_attn=True, checkpoint=False, parallel_output=False, embed_split_hidden=True)
parallel = dict(zero1=-1, tensor=1, pipeline={pipe})
internlm_ds = dict({own})
"""


def ours(facts: Facts, rank: int) -> Step:
    """The engine, its loss and its metrics, as `internlm_ds.train.assemble` puts them together."""
    import torch

    from internlm_ds.engine.build import build
    from internlm_ds.layout.ranks import Layout
    from internlm_ds.parallel.environment import LaunchFacts
    from internlm_ds.parallel.launch import make_context, write_environment
    from internlm_ds.runspec import resolve
    from internlm_ds.train.assemble import layer_entries, set_global_state, split_vocabulary, stage_bounds
    from internlm_ds.train.metrics import StageLoss
    from internlm_ds.translate import translate

    backend, size = "nccl" if facts.device == "cuda" else "gloo", facts.world_size
    write_environment(LaunchFacts("torch", rank, size, local_rank=rank, local_size=size), backend=backend)
    spec = resolve(_config_file(facts, rank), world_size=size)
    layout = Layout(data=facts.data, pipe=facts.pipe, zero=facts.data, chunks=facts.chunks)
    device = torch.device("cuda", rank) if facts.device == "cuda" else torch.device("cpu")
    context = make_context(layout, rank=rank, local_rank=rank, device=device)
    set_global_state(spec.config, seed=7, device=device)
    entries = layer_entries(spec, context, seed=7)
    loss = StageLoss(
        label_smoothing=0.0, dataset_types=("en",), context=context, vocab_size=split_vocabulary(spec.config)
    )
    engine = build(
        entries,
        bounds=stage_bounds(spec, entries),
        config=spec.config,
        ds_config=translate(spec).ds_config,
        context=context,
        loss_fn=loss,
    )
    data = [_packed(facts.sizes, *rows, number=i) for i, rows in enumerate(rows_of_tokens(facts, context.data.rank))]

    def step() -> float:
        outcome = engine.train_step(data)
        loss.finish_step()
        return outcome.loss

    return step


def _config_file(facts: Facts, rank: int) -> str:
    sizes = facts.sizes
    values = {**asdict(sizes), "micro_num": sizes.micro_batches // facts.data, "pipe": facts.pipe}
    path = Path(facts.store).with_name(f"config{rank}.py")
    path.write_text(CONFIG.format(**values, chunks=facts.chunks, own=facts.own), encoding="utf-8")
    return str(path)


def _packed(sizes: Sizes, tokens: Any, targets: Any, *, number: int) -> Any:
    """A micro-batch as our loader gives it: all rows behind each other, with borders padded to one length."""
    import torch

    total, ends = tokens.numel(), borders(sizes, number)
    padded = torch.full((total + 1,), total, dtype=torch.int32)
    padded[: len(ends)] = torch.tensor(ends, dtype=torch.int32)
    return (tokens.flatten(), padded), (targets.flatten(), torch.zeros(total, dtype=torch.int64))
