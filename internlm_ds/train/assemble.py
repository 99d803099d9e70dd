"""Puts a training run together: machine, process groups, data, model, engine, checkpoint, loop. The only place that
knows all rooms.

`prepare` does what can fail for the user before any process group exists; `Training.run` does the rest, on every rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_ds.attention.select import Choice, select
from internlm_ds.checkpoint.manager import plan_start
from internlm_ds.config import load
from internlm_ds.config.schema import Config
from internlm_ds.data.loader import TrainLoader, ValidationLoader, build_train_loader, build_validation_loaders
from internlm_ds.engine.build import build, cpu_computes_fp16
from internlm_ds.engine.engine import Engine
from internlm_ds.errors import CheckpointError, MachineError, Problem
from internlm_ds.layout.stages import StageBounds, partition_uniform, stage_layers
from internlm_ds.model.compiled import require_compiler
from internlm_ds.model.layers import LayerEntry, build_layers
from internlm_ds.model.registry import build_registered, model_keywords
from internlm_ds.monitor import log
from internlm_ds.monitor.sinks import MetricsFile, open_tensorboard
from internlm_ds.monitor.throughput import ThroughputMeter
from internlm_ds.optim.schedules import Beta2Schedule, LrSchedule
from internlm_ds.parallel import rng
from internlm_ds.parallel.comm import ProcessComm
from internlm_ds.parallel.context import ParallelContext
from internlm_ds.parallel.environment import LaunchFacts
from internlm_ds.parallel.first_failure import FirstFailure
from internlm_ds.parallel.launch import initialize, launcher_is_gone, shut_down
from internlm_ds.parallel.replicas import ReplicaCheck
from internlm_ds.plan import Plan, describe
from internlm_ds.plan.compute import flops_per_step
from internlm_ds.plan.machine import MachineFacts, resolve_here
from internlm_ds.runspec import RunSpec
from internlm_ds.train import evaluate, failure, rundir
from internlm_ds.train.checkpoints import RunCheckpoints
from internlm_ds.train.housekeeping import Housekeeping, keep_freed_memory
from internlm_ds.train.loop import LoopSettings, StepRecord, TrainLoop
from internlm_ds.train.metrics import RecordBuilder, StageLoss, device_peak_flops
from internlm_ds.train.options import Options
from internlm_ds.train.profile import StepProfiler
from internlm_ds.train.signals import SignalWatch
from internlm_ds.train.state import TrainState
from internlm_ds.train.together import together
from internlm_ds.translate import Translation

logger = logging.getLogger(__name__)


def prepare(options: Options, facts: LaunchFacts) -> Training:
    """Everything that can fail for the user before a process group exists.

    Raises:
        ConfigError, TranslationError: The file is wrong, or asks for what cannot be honoured.
        MachineError: All obstacles of this machine, with what would work here.
        CheckpointError: The checkpoint to start from does not exist.
    """
    machine = machine_facts(facts, backend=options.backend)
    missing = _missing_checkpoint(options)
    try:
        spec, translation = resolve_here(options.config, facts=machine, overrides=options.set, overlays=options.overlay)
    except MachineError:
        if not missing:
            raise
        resolve_here(options.config, facts=machine, overrides=options.set, overlays=options.overlay, extra=missing)
        raise
    if missing:
        raise CheckpointError(str(missing[0]))
    if spec.config.internlm_ds.compile:
        require_compiler("cuda" if machine.gpu_count else "cpu")
    return Training(options, facts, spec, translation, describe(spec, translation))


def _missing_checkpoint(options: Options) -> list[Problem]:
    """The obstacle that the checkpoint a run is told to start from is not there."""
    loaded = load(options.config, options.set)
    if loaded.config is None:
        return []
    start = plan_start(loaded.config, dry_run=True)
    if start.path is None or start.kind is not None:
        return []
    key, _, message = start.warnings[0].partition(" ")
    lines = {leaf.key: leaf.line for leaf in loaded.leaves}
    line = next((lines[k] for k in (f"{key}.path", key) if lines.get(k)), None)
    return [
        Problem(key, f"{message}; give a folder that exists, or remove the key", line=line, has_value=False),
    ]


def machine_facts(facts: LaunchFacts, *, backend: str | None) -> MachineFacts:
    """What this machine has, for `plan.machine`."""
    gpus = 0 if backend == "gloo" else torch.cuda.device_count()
    return MachineFacts(
        gpu_count=gpus,
        gpu_memory_bytes=min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=0),
        host_memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        world_size=facts.world_size,
        fp16_ok=bool(gpus) or cpu_computes_fp16(),
        processes_here=facts.local_size,
    )


@dataclass
class Training:
    """A run whose paper work is done."""

    options: Options
    facts: LaunchFacts
    spec: RunSpec
    translation: Translation
    plan: Plan

    @property
    def config(self) -> Config:
        return self.spec.config

    def run(self) -> int:
        """Train; returns the exit code. Called by every rank.

        An error of one rank among several does not come out of here: it ends all their processes.
        """
        context = initialize(self.facts, self.spec.layout, backend=self.options.backend)
        comm = ProcessComm(context.device)
        signals = SignalWatch(comm, launcher_is_gone=launcher_is_gone())
        rank, first = context.rank, FirstFailure.of_job(rank=context.rank, world_size=context.layout.world_size)
        if context.layout.world_size > 1:
            failure.watch_peers(first, rank=rank)
        try:
            with signals.installed():
                return self._run(context, comm, signals)
        except Exception as error:
            if context.layout.world_size > 1 and not getattr(error, "on_all_ranks", False):
                failure.end_process(error, rank=rank, first=first)
            failure.log_failure(error, rank=rank)
            raise
        finally:
            first.stop()
            log.close()
            shut_down()

    def _run(self, context: ParallelContext, comm: ProcessComm, signals: SignalWatch) -> int:
        launched = rundir.launch_time(comm)
        folder = rundir.place(self.options.run_dir, job_name=self.config.job_name, launched=launched)
        rundir.create(folder, spec=self.spec, translation=self.translation, comm=comm)
        log.setup(folder, rank=context.rank, is_log_rank=context.is_log_rank)
        set_global_state(self.config, seed=self.options.seed, device=context.device)
        log_start(context, seed=self.options.seed, launched=launched)

        data = {"data_rank": context.data.rank, "data_size": context.data.size}
        loader = together(comm, lambda: build_train_loader(self.config, **data))
        validation = together(comm, lambda: build_validation_loaders(self.config, **data)) if self.evaluates else {}
        loss = StageLoss(
            label_smoothing=self.config.loss.label_smoothing,
            dataset_types=loader.dataset_types,
            context=context,
            vocab_size=split_vocabulary(self.config),
        )
        engine = self._engine(context, loss, comm)
        state = TrainState()
        with contextlib.ExitStack() as closing:
            closing.callback(loader.close)
            checkpoints = RunCheckpoints(engine, loader, spec=self.spec, context=context, comm=comm)
            closing.callback(checkpoints.close)
            checkpoints.restore(state)
            rundir.note_data(folder, loader, spec=self.spec, comm=comm, is_log_rank=context.is_log_rank)
            if context.is_log_rank:
                for text in LrSchedule.from_config(self.config).warnings:
                    logger.warning("%s", text)
                log_model(engine, self.spec)
            loop = self._loop(
                context, folder, engine, loader, validation, loss, state, checkpoints, signals, closing, comm
            )
            finished = loop.run()
        if context.is_log_rank:
            log_end(state, finished=finished, signals=signals)
        return 0 if finished or checkpoints.stop_requested else signals.exit_code

    @property
    def evaluates(self) -> bool:
        return self.config.data.valid_every > 0

    def _engine(self, context: ParallelContext, loss: StageLoss, comm: ProcessComm) -> Engine:
        entries = together(comm, lambda: layer_entries(self.spec, context, seed=self.options.seed))
        return build(
            entries,
            bounds=stage_bounds(self.spec, entries),
            config=self.config,
            ds_config=self.translation.ds_config,
            context=context,
            loss_fn=loss,
            seed=self.options.seed,
        )

    def _loop(
        self,
        context: ParallelContext,
        folder: Path,
        engine: Engine,
        loader: TrainLoader,
        validation: dict[str, ValidationLoader],
        loss: StageLoss,
        state: TrainState,
        checkpoints: RunCheckpoints,
        signals: SignalWatch,
        closing: contextlib.ExitStack,
        comm: ProcessComm,
    ) -> TrainLoop:
        config, guard = self.config, self.config.internlm_ds.guard
        recorder = None
        if context.is_log_rank:
            recorder = Recorder(self.spec, folder, context, engine, first_step=state.step_count)
            closing.callback(recorder.close)
        housekeeping = Housekeeping(every=config.data.empty_cache_and_diag_interval, device=context.device)
        closing.callback(housekeeping.close)
        profiler = None
        if self.options.profile:
            compiled = config.internlm_ds.compile
            profiler = StepProfiler(folder, context, engine=engine, loader=loader, compiled=compiled)
            closing.callback(profiler.close)

        def batch_done() -> None:
            housekeeping.batch_done()
            if profiler is not None:
                profiler.step()

        replicas = None
        if guard.drift_every > 0 and context.layout.world_size > 1:
            replicas = ReplicaCheck(engine.logical_parameters(), comm=comm, device=context.device)

        def evaluate_now(state: TrainState) -> None:
            results = evaluate.evaluate(engine, validation, validation_metrics=loss.validating)
            if recorder is not None:
                recorder.validation(results, state)

        return TrainLoop(
            engine,
            loader,
            settings=LoopSettings(
                total_steps=config.data.total_steps,
                beta1=config.adam.adam_beta1,
                data_size=context.data.size,
                valid_every=config.data.valid_every,
                max_bad_steps=guard.max_bad_steps,
                drift_every=guard.drift_every,
            ),
            lr=LrSchedule.from_config(config),
            beta2=Beta2Schedule.from_config(config),
            state=state,
            checkpoints=checkpoints,
            step_metrics=loss.finish_step,
            record=recorder.step if recorder is not None else lambda record: None,
            evaluate=evaluate_now,
            should_stop=signals.should_stop,
            batch_done=batch_done,
            check_replicas=replicas.check if replicas is not None else lambda: None,
        )


def layer_entries(spec: RunSpec, context: ParallelContext, *, seed: int) -> list[LayerEntry]:
    """The model's layers: of a known family from its blueprint, of a registered type from the user's builder.

    They are for the engine with `StageLoss`: a head of ours may leave its product to the loss.
    """
    model = spec.config.model
    dtype = getattr(torch, model.dtype)
    axis: dict[str, Any] = {
        "tensor": context.tensor,
        "sequence_parallel": spec.config.parallel.sequence_parallel and context.tensor.size > 1,
    }
    if spec.arch is None:
        keywords = model_keywords(spec.leaves, dtype=dtype)
        return build_registered(spec.config.model_type, keywords, **axis, pipe_size=context.pipe.size, seed=seed)
    norm_dtype = torch.float32 if spec.config.use_fp32_norm else None
    choice = choose_attention(spec, context.device)
    if context.is_log_rank:
        logger.info("%s", choice.line)
    return build_layers(
        spec.arch,
        model,
        **axis,
        seed=seed,
        dtype=dtype,
        attention=choice.attend,
        norm_dtype=norm_dtype,
        chunked_loss=spec.config.internlm_ds.chunked_loss,
    )


def choose_attention(spec: RunSpec, device: torch.device) -> Choice:
    """The attention backend of this run on this device.

    Raises:
        MachineError: `internlm_ds.attention` names one that cannot run here.
    """
    config, arch = spec.config, spec.arch
    assert arch is not None, "a registered model brings its own attention"
    return select(
        config.internlm_ds.attention,
        use_flash_attn=config.model.use_flash_attn,
        device=device,
        dtype=getattr(torch, config.model.dtype),
        head_dim=arch.head_dim,
        dropout=config.model.attn_drop_rate,
        deterministic=config.internlm_ds.deterministic,
    )


def split_vocabulary(config: Config) -> int | None:
    """Size of the vocabulary along which tensor ranks hold slices of the logits; None where each has all of them."""
    return config.model.vocab_size if config.model.parallel_output else None


def stage_bounds(spec: RunSpec, entries: Sequence[LayerEntry]) -> StageBounds:
    """`[stage][chunk] -> (start, stop)` into the layer list."""
    layout = spec.layout
    if spec.arch is not None:
        return stage_layers(spec.arch, layout, borders=spec.config.internlm_ds.pipeline_bounds)
    # a registered model without a blueprint: its entries are divided evenly
    return tuple(map(tuple, partition_uniform(len(entries), pipe=layout.pipe, chunks=layout.chunks)))


def set_global_state(config: Config, *, seed: int, device: torch.device) -> None:
    """Seeds, cuDNN flags, tf32, determinism and the C library's memory: what is kept for the whole process."""
    rng.seed_everything(seed)
    keep_freed_memory(device)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    torch.backends.cuda.matmul.allow_tf32 = config.model.tf32
    torch.backends.cudnn.allow_tf32 = config.model.tf32
    if config.internlm_ds.deterministic and device.type == "cuda":  # a CPU always adds in the same order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; torch asks for it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


class Recorder:
    """The log rank's output: log line, metrics.jsonl, tensorboard."""

    def __init__(self, spec: RunSpec, folder: Path, context: ParallelContext, engine: Engine, *, first_step: int):
        config = spec.config
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        self._tensorboard = None
        if config.enable_tb:
            target = Path(config.tensorboard_folder) if config.tensorboard_folder else folder / "tensorboard"
            self._tensorboard = open_tensorboard(
                target, queue_length=config.tensorboard.queue_max_length, purge_step=first_step
            )
        counted = _counted_flops(spec)
        self._record = RecordBuilder(
            meter=ThroughputMeter(world_size=context.layout.world_size, flops_per_step=counted["internlm"]),
            data_size=context.data.size,
            peak_flops=device_peak_flops(context.device),
            model_flops_per_step=counted["model"],
            hardware_flops_per_step=counted["hardware"],
            world_size=context.layout.world_size,
            micro_num=config.data.micro_num,
            fwd_bwd_seconds=lambda: engine.fwd_bwd_seconds,
        )

    def step(self, record: StepRecord) -> None:
        values = self._record(record)
        if not record.outcome.applied:
            logger.warning(
                "batch %d: gradients are not finite (%s), the update is skipped; %d skipped so far",
                *(record.batch.index, record.outcome.verdict.value, record.state.inf_nan_skip_batches),
            )
        logger.info("%s", log.format_metrics(values))
        self._metrics.write(values)
        if self._tensorboard is not None:
            self._tensorboard.write(values, step_count=record.state.step_count)

    def close(self) -> None:
        """Write what is held back."""
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def validation(self, results: dict[str, dict[str, Any]], state: TrainState) -> None:
        evaluate.log_results(logger, results, state)
        for name, values in results.items():
            head = {"validation": name, "step": state.batch_count - 1, "step_count": state.step_count}
            self._metrics.write({**head, **values})
            if self._tensorboard is not None:
                named = {
                    f"val/{name}_loss": values["loss"],
                    f"val/{name}_acc": values["acc"],
                    f"val/{name}_plex": values["perplexity"],
                }
                self._tensorboard.write(named, step_count=state.step_count)


def _counted_flops(spec: RunSpec) -> dict[str, float]:
    """Operations of a step: as InternLM counts them, of the model alone, and with what is really recomputed."""
    model, batch = spec.config.model, spec.batch

    def count(checkpoint: float) -> float:
        return flops_per_step(
            checkpoint=checkpoint,
            seq_len=batch.seq_len,
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            vocab_size=model.vocab_size,
            global_batch_size=batch.sequences_per_step,
            mlp_ratio=model.mlp_ratio,
            use_swiglu=model.use_swiglu,
        )

    plain, recomputed = count(0), count(1)
    hardware = plain + (recomputed - plain) * model.checkpoint
    return {"internlm": count(model.checkpoint), "model": plain, "hardware": hardware}


def log_start(context: ParallelContext, *, seed: int, launched: str) -> None:
    """The first three of the start-up lines that the tutorial shows, with our facts."""
    layout, coord = context.layout, context.coord
    if context.is_log_rank:
        logger.info(
            "Distributed environment is initialized, data parallel size: %d, pipeline parallel size: %d, "
            "tensor parallel size: %d",
            *(layout.data, layout.pipe, layout.tensor),
        )
        logger.info(
            "initialized seed on rank %d, numpy: %d, python random: %d, ParallelMode.DATA: %d, ParallelMode.TENSOR: %d,"
            "the default parallel seed is ParallelMode.DATA.",
            *(context.rank, seed, seed, seed, seed + coord.tensor + 1024 * coord.pipe),
        )
    stamp = time.strftime("%b%d_%H-%M-%S")
    logger.info(
        "===========New Run %s on host:%s,tp:%d,pp=%d,dp=%d===========",
        *(stamp, socket.gethostname(), coord.tensor, coord.pipe, coord.data),
    )


def log_end(state: TrainState, *, finished: bool, signals: SignalWatch) -> None:
    """Why the run ends, and how far it came."""
    if finished:
        why = "finished"
    elif signals.agreed is not None:
        why = f"stopped by {signals.agreed.name}"
    else:
        why = "stopped by the stop file"
    logger.info("%s after batch %d, %d updates", why, state.batch_count - 1, state.step_count)


def log_model(engine: Engine, spec: RunSpec) -> None:
    """The tutorial's fourth line, and what this run chose."""
    arch = spec.arch
    owned = sum(group["params"][0].numel() for group in engine.optimizer.param_groups)
    sizes = [owned] * engine.zero_groups.shard_size
    logger.info("Number of elements on ranks: %s, rank:%d", sizes, engine.global_rank)
    if arch is not None:
        logger.info("parameters of the whole model: %d", arch.num_params)
    if engine.compiled:
        logger.info("%s", engine.compiled)
    logger.info(
        "optimizer %s, parameters of this stage: %d",
        *(type(engine.optimizer).__name__, sum(p.numel() for p in engine.module.parameters())),
    )
