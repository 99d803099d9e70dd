"""Between the loop, the manager (when, where) and the formats (how): collects what this rank owns and saves it.

Also the other direction: puts a checkpoint's weights, optimizer state, counters, sampler and random states back, each
part as `content` names it.
"""

from __future__ import annotations

import copy
import logging
import time
from functools import partial
from typing import Any, Protocol

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.background import BackgroundSaver
from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.formats.internlm_run import InternlmRun
from internlm_ds.checkpoint.manager import CheckpointManager, SaveTask, Start, plan_start
from internlm_ds.checkpoint.retention import remove_older
from internlm_ds.engine import state as engine_state
from internlm_ds.engine.engine import Engine
from internlm_ds.errors import CheckpointError
from internlm_ds.optim.schedules import recorded_settings
from internlm_ds.parallel import rng
from internlm_ds.parallel.comm import ProcessComm
from internlm_ds.parallel.context import ParallelContext
from internlm_ds.parallel.shards import whole_shape
from internlm_ds.runspec import RunSpec
from internlm_ds.train.state import TrainState
from internlm_ds.train.together import together

logger = logging.getLogger(__name__)


class Positioned(Protocol):
    """What is asked of the loader: its place in the data."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class RunCheckpoints:
    """The checkpoints of one run; every rank has one, and calls its methods together with the others.

    Raises:
        CheckpointError: The save folder is in use by another run, or what is to be loaded does not exist.
    """

    def __init__(
        self, engine: Engine, loader: Positioned, *, spec: RunSpec, context: ParallelContext, comm: ProcessComm
    ):
        self.engine, self.loader, self.spec = engine, loader, spec
        self.context, self.comm = context, comm
        self.stop_requested = False
        self._idle_scale: dict[str, Any] | None = None
        ckpt, data = spec.config.ckpt, spec.config.data
        self.start = plan_start(spec.config, comm=comm)
        last_saved = self.start.step if self.start.is_resume else None
        self.manager = CheckpointManager(ckpt, total_steps=data.total_steps, comm=comm, last_saved=last_saved)
        self._background: BackgroundSaver | None = None
        if ckpt.enable_save_ckpt and ckpt.async_upload:
            self._background = BackgroundSaver(comm=comm, thread_comm=ProcessComm.for_a_thread())
            size = engine_state.saved_bytes(engine, weights=self._owns_weights, fragments=self._owns_fragments)
            self._background.buffer.warm(size, pinned=context.device.type == "cuda")

    # ---- saving ---------------------------------------------------------------------------------------------------

    def after_step(self, state: TrainState, *, applied: bool) -> bool:
        """Save if a checkpoint is due; True when the stop file asks the run to end here."""
        if self._background is not None:
            self._background.poll()
        task = self.manager.after_step(state.step_count)
        self._save(task, state, background=self._background)
        self.stop_requested = self.stop_requested or task.stop
        return task.stop

    def final(self, state: TrainState) -> None:
        """The last checkpoint of the run, unless this step was saved already; nothing is under way afterwards."""
        if self._background is not None:
            self._background.wait()
        self._save(self.manager.at_end(state.step_count), state, background=None)

    def close(self) -> None:
        """Let a save that is under way end, and give the folder free."""
        if self._background is not None:
            self._background.close()
        self.manager.close()

    def _save(self, task: SaveTask, state: TrainState, *, background: BackgroundSaver | None) -> None:
        if task.folder is None:
            return
        started, step = time.perf_counter(), state.step_count
        storage = self.manager.storage(task.folder)
        write = partial(native.save, task.folder, storage=storage, **self._description(state))

        def saved() -> None:
            if self.context.is_log_rank:
                seconds = time.perf_counter() - started
                logger.info("checkpoint of step %d saved to %s in %.2f s", step, task.folder, seconds)
            if self.comm.rank == 0 and task.folder.name == str(step):
                keep = self.spec.config.internlm_ds.keep_checkpoints
                for path in remove_older(task.folder.parent, newest=step, keep=keep, storage=storage):
                    logger.info("%s removed: the last %d are kept", path, keep)

        owned = {
            "weights": engine_state.weights(self.engine) if self._owns_weights else (),
            "fragments": engine_state.fragments(self.engine) if self._owns_fragments else (),
        }
        if background is None:
            write(comm=self.comm, **owned)
            saved()
        else:
            background.start(write, **owned, done=saved)
            if self.context.is_log_rank:
                logger.info("checkpoint of step %d: training waited %.2f s", step, time.perf_counter() - started)
        self.manager.saved(task, step)

    @property
    def _owns_weights(self) -> bool:
        """Each stage's weights are written by its first data-parallel rank, each tensor rank its shards."""
        return self.context.data.rank == 0

    @property
    def _owns_fragments(self) -> bool:
        return self.engine.zero_groups.replica_rank == 0

    def _description(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds beside weights and optimizer state; values that training does not change."""
        return {
            "rng_state": rng.get_state(),
            "train_state": self._train_state(state),
            "config_text": self.spec.text,
            "layout": self.spec.layout,
            "arch": self.spec.arch,
            "dtype": self.spec.config.model.dtype,
            "step": state.step_count,
            "model": self.spec.config.model,
            "model_type": self.spec.config.model_type,
        }

    def _train_state(self, state: TrainState) -> dict[str, Any]:
        scaler = self.engine.loss_scaler
        position = self.loader.state_dict()
        values = {
            **state.to_json(),
            "num_consumed_samples_in_epoch": position.get("num_consumed_samples_in_epoch"),
            "optimizer_updates": engine_state.num_updates(self.engine),
            "loss_scale": self._idle_scale if scaler is None else scaler.state.state_dict(),
            "sampler": position,
            **recorded_settings(self.spec.config, num_updates=state.step_count),
        }
        return copy.deepcopy(values)

    # ---- loading --------------------------------------------------------------------------------------------------

    def restore(self, state: TrainState) -> None:
        """Load what the run starts from into engine, loader, random generators and `state`.

        Raises:
            CheckpointError: It does not fit this run.
        """
        start = self.start
        if self.context.is_log_rank:
            for text in start.warnings:
                logger.warning("%s", text)
            logger.info("start: %s", start.reason)
        if start.path is None:
            return
        if start.kind == "native":
            together(self.comm, lambda: self._restore_native(start, state))
        elif start.kind == "internlm" and start.parts != {"model"}:
            together(self.comm, lambda: self._restore_internlm(start, state))
        else:
            together(self.comm, lambda: self._restore_weights_only(start))

    def _restore_native(self, start: Start, state: TrainState) -> None:
        saved = native.open(start.path, verify=False)  # plan_start has compared it with its checksums
        self._check_fits(saved)
        if "optimizer" in start.parts and not saved.kinds:
            raise CheckpointError(
                f"{start.path} holds weights but no optimizer state; load it with "
                'load_ckpt_info = dict(…, content=("model",))'
            )
        self._restore(start, saved, state)
        if start.is_resume and saved.layout == self.spec.layout:
            states = saved.rng_state(self.context.rank)
            if states is not None:
                rng.set_state(states)

    def _restore_internlm(self, start: Start, state: TrainState) -> None:
        """A run that InternLM began, or that was converted for it."""
        mlp_names = self.spec.config.internlm_ds.compat.mlp_names
        self._restore(start, InternlmRun(start.path, arch=self._arch(start), mlp_names=mlp_names), state)

    def _restore(self, start: Start, saved: native.NativeCheckpoint | InternlmRun, state: TrainState) -> None:
        """Each part that `start` names, into where it belongs."""
        values = saved.train_state
        weights = saved if isinstance(saved, native.NativeCheckpoint) else saved.weights.__getitem__
        if "model" in start.parts:
            engine_state.load_weights(self.engine, weights)
        if "optimizer" in start.parts:
            self._restore_optimizer(start, saved, values)
        elif start.refresh_masters:
            engine_state.refresh_masters(self.engine, weights)
        if "scheduler" in start.parts:
            state.step_count = int(values["step_count"])
            state.inf_nan_skip_batches = int(values["inf_nan_skip_batches"])
            state.bad_steps_in_a_row = int(values.get("bad_steps_in_a_row", 0))
        if "sampler" in start.parts:
            self.loader.load_state_dict(values["sampler"])
            state.batch_count = int(values["batch_count"])
            state.num_consumed_tokens = int(values["num_consumed_tokens"])

    def _check_fits(self, saved: native.NativeCheckpoint) -> None:
        if self.spec.arch is not None:
            saved.check_fits(self.spec.arch)
            return
        # a registered model type has no table of parameters: what this stage has must be there
        problems = []
        for name, param in self.engine.logical_parameters():
            stored, wanted = saved.shapes.get(name), whole_shape(param)
            if stored != wanted:
                found = "missing" if stored is None else f"shape {list(stored)} in the files"
                problems.append(f"{name} {list(wanted)}: {found}")
        if problems:
            raise CheckpointError(
                f"{saved.folder} does not fit the model ({len(problems)} parameters):\n  " + "\n  ".join(problems)
            )

    def _restore_optimizer(
        self, start: Start, saved: native.NativeCheckpoint | InternlmRun, values: dict[str, Any]
    ) -> None:
        updates = int(values["optimizer_updates"])
        engine_state.load_fragments(self.engine, saved.fragment, num_updates=updates)
        if "model" not in start.parts:
            # the weights of this run stay: its masters must not be those of the other one
            engine_state.refresh_masters(self.engine)
        scaler, held = self.engine.loss_scaler, values.get("loss_scale")
        if scaler is not None and held is not None:
            scaler.state.load_state_dict(held)
            scaler.refresh()
        # InternLM keeps a scale in bf16 too; it must be there again when the run goes back
        self._idle_scale = held if scaler is None else None

    def _restore_weights_only(self, start: Start) -> None:
        """Another system's files: merged over their ranks, at whatever layout this run has."""
        weights = start.weights(self._arch(start), mlp_names=self.spec.config.internlm_ds.compat.mlp_names)
        engine_state.load_weights(self.engine, weights.__getitem__)
        engine_state.refresh_masters(self.engine, weights.__getitem__)

    def _arch(self, start: Start) -> ModelArch:
        if self.spec.arch is None:
            raise CheckpointError(
                f"model_type = {self.spec.config.model_type!r} has no table of parameters that the checkpoint "
                f"{start.path} ({start.kind}) could be matched with; load a native checkpoint instead"
            )
        return self.spec.arch
