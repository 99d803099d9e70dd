"""Floating-point operations of a training step by InternLM's formula. Memory is `memory`'s; times are measured."""

from __future__ import annotations


def flops_per_step(
    *,
    checkpoint: bool | float,
    seq_len: int,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
    global_batch_size: int,
    mlp_ratio: float,
    use_swiglu: bool = True,
) -> float:
    """Operations of one step on all ranks together, as InternLM counts them.

    With r = `mlp_ratio` (times 3/2 for a gated MLP) and a = 3 passes, 4 when anything is recomputed::

        a * ((8 + 4r) * B * s * h^2 + 4 * B * s^2 * h) * L + 6 * B * s * h * V

    Args:
        checkpoint: `model.checkpoint`; any fraction above 0 counts as recomputing everything.
        global_batch_size: Sequences per step on all ranks, `micro_bsz * micro_num * data parallel`, with the
            configured `micro_num` even while it is still ramping up.
    Source: InternEvo `get_megatron_flops`; Narayanan et al. 2021 (arXiv 2104.04473), appendix.
    """
    passes = 4 if checkpoint else 3
    ratio = mlp_ratio * 3 / 2 if use_swiglu else mlp_ratio
    block = (8 + ratio * 4) * global_batch_size * seq_len * hidden_size**2
    attention = 4 * global_batch_size * seq_len**2 * hidden_size
    head = 6 * global_batch_size * seq_len * hidden_size * vocab_size
    return passes * (block + attention) * num_layers + head


def megatron_flops(
    *,
    elapsed_time_per_iter: float,
    checkpoint: bool | float = False,
    seq_len: int = 2048,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
    global_batch_size: int,
    global_world_size: int = 1,
    mlp_ratio: float = 4,
    use_swiglu: bool = True,
) -> float:
    """Teraflops per second and rank of a step that took `elapsed_time_per_iter` seconds; see `flops_per_step`.

    >>> round(megatron_flops(elapsed_time_per_iter=3.8330077553837336, hidden_size=4096, num_layers=32,
    ...     vocab_size=103168, global_batch_size=64, global_world_size=8, mlp_ratio=8 / 3), 2)
    189.83
    """
    flops = flops_per_step(
        checkpoint=checkpoint,
        seq_len=seq_len,
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=vocab_size,
        global_batch_size=global_batch_size,
        mlp_ratio=mlp_ratio,
        use_swiglu=use_swiglu,
    )
    return flops / (elapsed_time_per_iter * global_world_size * 10**12)
