"""From a run's facts to an engine: groups, module, optimizer, DeepSpeed's configuration, InternLM's loss scale.

The engine class is ours, so `deepspeed.initialize` is not used: it would make DeepSpeed's own class.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import logger as deepspeed_logger

from internlm_ds.config.schema import Config
from internlm_ds.engine.channels import Channels
from internlm_ds.engine.engine import Engine, ZeroGroups
from internlm_ds.engine.module import StageModule
from internlm_ds.engine.quickstart import spare_the_compiler, spare_the_search_for_operators
from internlm_ds.engine.rounded_adam import RoundedAdamW
from internlm_ds.engine.state import pieces
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.stages import StageBounds
from internlm_ds.model.compiled import compile_blocks
from internlm_ds.model.layers import LayerEntry
from internlm_ds.optim.loss_scale import DynamicLossScale
from internlm_ds.parallel.context import ParallelContext
from internlm_ds.schedule.lists import Pipeline


def build(
    entries: Sequence[LayerEntry],
    *,
    bounds: StageBounds,
    config: Config,
    ds_config: dict[str, Any],
    context: ParallelContext,
    loss_fn: Callable,
    seed: int = 0,
) -> Engine:
    """The engine of this rank; every rank calls it.

    Args:
        entries: All layers of the model.
        bounds: `[stage][chunk] -> (start, stop)` into `entries`.
        config: Resolved configuration.
        ds_config: Its translation; DeepSpeed accepts it as it is.
        context: Where this process stands; its groups exist.
        loss_fn: `(outputs, labels) -> scalar` on the last stage.
        seed: Of rounding, where optimizer states are kept in bf16.
    """
    adopt_process_groups()
    if not config.internlm_ds.compile:
        spare_the_compiler()
    pipeline = Pipeline.from_config(config, context.layout)
    with quiet():
        module = StageModule(
            entries,
            bounds=bounds,
            recompute_fraction=config.model.checkpoint,
            layout=context.layout,
            loss_fn=loss_fn,
        )
        engine = Engine(
            args=None,
            model=module,
            optimizer=lambda params: adamw(params, config=config, seed=seed),
            model_parameters=list(module.parameters()),
            mpu=module.mpu(),
            config=ds_config,
            config_class=DeepSpeedConfig(ds_config, module.mpu()),
            zero_groups=zero_groups(context.layout, rank=context.rank),
            pipeline=pipeline,
            channels=Channels(context, ring=pipeline.chunks > 1) if pipeline.stages > 1 else None,
            weights_are_masters=config.internlm_ds.masters_dtype == "bfloat16",
        )
    if isinstance(engine.basic_optimizer, RoundedAdamW):
        engine.basic_optimizer.pieces = pieces(engine)
    if config.internlm_ds.compile:
        # behind the engine, whose schedule may have put weight gradients off
        engine.compiled = compile_blocks(module.forward_funcs)
    if config.model.dtype == "float16":
        engine.install_loss_scale(DynamicLossScale.from_config(config.grad_scaler))
    return engine


def cpu_computes_fp16() -> bool:
    """DeepSpeed's own condition for fp16 without a GPU: does torch's CPU library have fp16 matrix products?"""
    return bool(get_accelerator().is_fp16_supported())


def adopt_process_groups() -> None:
    """Let DeepSpeed use the process group that `parallel.launch` made.

    On CPU it would otherwise compile a shared-memory operator at start, which only its inference needs: told here that
    it is not available, it builds nothing and needs no compiler.
    """
    spare_the_search_for_operators()["deepspeed_shm_comm"] = False
    with quiet():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def adamw(params: Sequence[torch.nn.Parameter], *, config: Config, seed: int = 0) -> torch.optim.Optimizer:
    """InternLM's optimizer: AdamW with weight decay on everything; torch's fused kernel, which needs no build.

    Args:
        seed: Of rounding, where `internlm_ds` asks for moments or masters in bf16.
    """
    adam, own = config.adam, config.internlm_ds
    settings = {
        "lr": adam.lr,
        "betas": (adam.adam_beta1, adam.adam_beta2),
        "eps": adam.adam_eps,
        "weight_decay": adam.weight_decay,
    }
    if own.moments_dtype == own.masters_dtype == "float32":
        return torch.optim.AdamW(params, **settings, fused=True)
    if RoundedAdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        # elementwise, as ZeRO's partitions need it; DeepSpeed knows optimizers by their class
        ZERO_SUPPORTED_OPTIMIZERS.append(RoundedAdamW)
    return RoundedAdamW(params, **settings, moments_dtype=getattr(torch, own.moments_dtype), seed=seed)


def zero_groups(layout: Layout, *, rank: int) -> ZeroGroups:
    """Groups of the ZeRO partition when it is a part of data parallel. Collective: every rank makes every group."""
    if layout.zero == layout.data:
        return ZeroGroups(shard_size=layout.zero)
    shard = replica = None
    replica_rank = 0
    for ranks in layout.zero_groups:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            shard = group
    for ranks in layout.replica_groups:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            replica, replica_rank = group, ranks.index(rank)
    return ZeroGroups(shard, layout.zero, replica, layout.data // layout.zero, replica_rank)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed narrates its start on stdout; warnings and errors still come through its logger."""
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        deepspeed_logger.setLevel(level)
