"""`launch/pretrain.py` from the command line to an exit code: everything on paper first, then the training itself.

Errors of configuration, layout, translation and machine show up here, before any process group exists. What needs torch
is in `assemble`, imported only when there is something to train, so that `--dry-run` answers at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence

from internlm_ds.checkpoint import address as addresses
from internlm_ds.config.schema import CkptConfig
from internlm_ds.errors import ConfigError, InternlmDsError, LayoutError, guarded
from internlm_ds.parallel.environment import LaunchFacts, detect
from internlm_ds.plan import describe, render
from internlm_ds.runspec import RunSpec, resolve
from internlm_ds.train.options import Options, parse
from internlm_ds.translate import Translation, translate

# the launchers end a job as soon as one rank has ended: the others wait this long for rank 0 to say why
SILENT_RANK_WAIT_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pretrain.py` and return the exit code of the process."""
    return guarded(lambda: _run(parse(argv)))


def _run(options: Options) -> int:
    facts = _facts(options)
    groups_exist = False
    try:
        world_size = _world_size(options, facts)
        if options.dry_run:
            return _dry_run(options, world_size, speaks=facts.rank == 0)
        with _garbage_kept():
            from internlm_ds.parallel.launch import choose_accelerator

            choose_accelerator(options.backend)  # before anything imports deepspeed, which looks for a device at once
            from internlm_ds.train.assemble import prepare

            training = prepare(options, facts)
        if facts.rank == 0:
            _print_warnings(training.spec, training.translation)
        groups_exist = True
        return training.run()
    except InternlmDsError as error:
        if facts.rank > 0 and (error.on_all_ranks or not groups_exist):
            # rank 0 most likely found the same and says it; if this rank still lives then, it alone knows
            time.sleep(SILENT_RANK_WAIT_S)
            if error.on_all_ranks:
                return error.exit_code
            print(f"rank {facts.rank}:", end=" ", file=sys.stderr)
        raise


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """No garbage collection while libraries load: an eighth of that time, and nothing of what they make is garbage.

    Afterwards all of it is left out of later collections, too.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def _facts(options: Options) -> LaunchFacts:
    try:
        return detect(options.launcher, host=options.host, port=options.port, local_rank=options.local_rank)
    except LayoutError:
        if options.dry_run and options.world_size is not None:
            return LaunchFacts("python")  # nothing is started: who started us does not matter
        raise


def _dry_run(options: Options, world_size: int, *, speaks: bool) -> int:
    """Load, resolve, translate, plan and print; torch is not imported."""
    spec = resolve(options.config, overrides=options.set, world_size=world_size)
    translation = translate(spec, overlays=options.overlay)
    if speaks:
        print(render(describe(spec, translation)))
        _print_warnings(spec, translation)
        for text in _missing_weights(spec.config.ckpt):
            print(f"warning: {text}", file=sys.stderr)
    return 0


def _missing_weights(ckpt: CkptConfig) -> Iterator[str]:
    """A folder that the run is told to start from and that is not there; without the search that needs torch."""
    address = addresses.parse(ckpt.load_ckpt_info.path) if ckpt.load_ckpt_info is not None else None
    if address is None or address.backend != "local" or address.local_path.is_dir():
        return
    own = addresses.parse(ckpt.save_ckpt_folder) if ckpt.auto_resume and ckpt.save_ckpt_folder else None
    unless = " unless it resumes from ckpt.save_ckpt_folder" if own is not None else ""
    yield (
        f"ckpt.load_ckpt_info names {address.text}, but {address.local_path} does not exist: "
        f"a run would stop here{unless}"
    )


def _world_size(options: Options, facts: LaunchFacts) -> int:
    if options.dry_run:
        if options.world_size is not None:
            return options.world_size
        if facts.launcher == "python":
            raise ConfigError("--dry-run plans for a number of ranks: give --world-size N, or start it with a launcher")
        return facts.world_size
    if options.world_size not in (None, facts.world_size):
        raise ConfigError(
            f"--world-size {options.world_size} belongs to --dry-run; {facts.world_size} "
            f"process{'es were' if facts.world_size > 1 else ' was'} started. Start others with "
            f"`deepspeed --num_accelerators {options.world_size} launch/pretrain.py …`"
        )
    return facts.world_size


def _print_warnings(spec: RunSpec, translation: Translation) -> None:
    for text in (*spec.warnings, *translation.warnings):
        print(f"warning: {text}", file=sys.stderr)
    if os.environ.get("INTERNLM_DS_DEBUG") == "1":
        print(f"resolved {len(spec.leaves)} values of {spec.path}", file=sys.stderr)
