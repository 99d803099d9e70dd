"""Converting a checkpoint to another format: read, write aside, read back and compare, publish.

One parameter at a time is in memory, whatever the formats. The output appears complete or not at all, and by default
only after `verify` found every parameter in it, and the logits that it should give. What each format looks like is
`checkpoint.formats`'.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from internlm_ds.arch.spec import ParamSpec
from internlm_ds.checkpoint import address as addresses
from internlm_ds.checkpoint import place as places
from internlm_ds.checkpoint.formats import hf, internlm, native
from internlm_ds.checkpoint.formats.internlm_run_write import write_run
from internlm_ds.checkpoint.search import Format, detect
from internlm_ds.checkpoint.storage import base
from internlm_ds.checkpoint.storage.local import CONVERTING, LocalStorage
from internlm_ds.checkpoint.storage.s3 import S3Store
from internlm_ds.checkpoint.tensorfile import Deferred
from internlm_ds.convert import verify, whole_run
from internlm_ds.convert.sources import Source, dict_of_model, open_source
from internlm_ds.convert.whole_run import WholeRun
from internlm_ds.errors import CheckpointError, ConversionError
from internlm_ds.layout.ranks import Layout

_LAST_FILE: dict[Format, str] = {"native": "manifest.json", "internlm": "model_tp0_pp0.pt", "hf": "config.json"}
"""What goes to a store last: without it a folder is no checkpoint of the format, or an incomplete one."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """A conversion as it was asked for.

    Attributes:
        source, target: Addresses.
        source_format: None: told by what lies there.
        tensor, pipe, chunks: Split of the target; InternLM's format only.
        zero: Its optimizer files for each tensor rank and stage (`parallel.zero1` of the run that will load it).
        config: Configuration of the model, where the source does not say.
        dtype: Name of the target's dtype; None keeps the source's.
        content: `model` or `all`.
        tokenizer: sentencepiece model to put beside the weights; Hugging Face only.
        mlp_names: Meaning of w2 and w3 in InternLM files whose shapes do not tell.
    """

    source: str
    target: str
    source_format: Format | None
    target_format: Format
    tensor: int = 1
    pipe: int = 1
    chunks: int = 1
    zero: int = 1
    config: Path | None = None
    dtype: str | None = None
    content: str = "model"
    tokenizer: Path | None = None
    max_shard_bytes: int = hf.MAX_SHARD_BYTES
    mlp_names: str | None = None
    verify: bool = True


@dataclass(frozen=True)
class Summary:
    """What was done.

    Attributes:
        logits_difference: The largest one between source and target on random tokens; None if not compared.
        notes: What was left out of the source.
    """

    target: Path | str
    num_parameters: int
    num_elements: int
    source_format: Format
    target_format: Format
    dtype: torch.dtype
    verified: bool
    logits_difference: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        checked = "not verified"
        if self.verified:
            logits = f"largest difference of logits {self.logits_difference:.3g}"
            checked = f"every parameter read back once, bit for bit equal; {logits}"
        return (
            f"{self.target}: {self.num_parameters} parameters, {self.num_elements:,} elements, "
            f"{self.source_format} -> {self.target_format}, {str(self.dtype).removeprefix('torch.')}; {checked}"
        )


def convert(request: Request, *, progress: Callable[[str], None] = lambda line: None) -> Summary:
    """Convert a checkpoint.

    Raises:
        ConversionError: The pair of formats or an option is not possible, the target exists, or reading back found a
            difference.
        CheckpointError: The source is missing, damaged or does not fit its model, or a store fails.
    """
    address = addresses.parse(request.target)
    base.check(address)
    if address.backend == "local":
        return _convert(request, address.local_path, progress=progress)
    store = S3Store(address)
    if store.files():
        raise ConversionError(f"{request.target} exists; remove it or name another place")
    with tempfile.TemporaryDirectory(prefix="internlm_ds-") as scratch:
        summary = _convert(request, Path(scratch) / "converted", progress=progress)
        progress(f"sending it to {request.target}")
        store.upload(summary.target, "", last=_LAST_FILE[request.target_format])
    return replace(summary, target=request.target)


def _convert(request: Request, target: Path, *, progress: Callable[[str], None]) -> Summary:
    source_folder = places.localized(request.source)
    request = replace(request, source_format=request.source_format or _detected(source_folder))
    _check(request, target)
    source = open_source(source_folder, request.source_format, config=request.config, mlp_names=request.mlp_names)
    dtype = DTYPES[request.dtype] if request.dtype else source.dtype
    run = whole_run.open_run(source, request.config, mlp_names=request.mlp_names) if request.content == "all" else None
    notes = source.notes + (run.notes if run else ())
    storage = LocalStorage()
    temporary = storage.make_temporary(target, prefix=CONVERTING)
    try:
        for note in notes:
            progress(f"note: {note}")
        _WRITERS[request.target_format](_Job(temporary, source, run, request, dtype, progress))
        difference = None
        if request.verify:
            progress("reading back")
            written = verify.reread(temporary, request.target_format, source)
            verify.compare_weights(written, source, target_format=request.target_format, dtype=dtype)
            if run is not None:
                whole_run.compare(temporary, run, source, target_format=request.target_format)
            progress("comparing logits")
            difference = verify.compare_logits(temporary, request.target_format, source, dtype=dtype)
        if target.exists():
            raise ConversionError(f"{target} has appeared meanwhile; nothing was written")
        storage.publish(temporary, target)
    except OSError as error:
        raise ConversionError(f"writing {target} failed: {error}") from error
    finally:
        storage.remove(temporary)
    return Summary(
        target,
        len(source.arch.params),
        source.arch.num_params,
        request.source_format,
        request.target_format,
        dtype,
        verified=request.verify,
        logits_difference=difference,
        notes=notes,
    )


def _detected(folder: Path) -> Format:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}")
    found = detect(folder)
    if found is None:
        raise CheckpointError(f"{folder} is no checkpoint of any known format; say --from native, internlm or hf")
    return found


def _check(request: Request, target: Path) -> None:
    pair = (request.source_format, request.target_format)
    problems = []
    if request.content == "all" and "hf" in pair:
        problems.append("--content all: a Hugging Face folder holds weights only; write --content model")
    for option, value in (
        ("--tensor", request.tensor),
        ("--pipeline", request.pipe),
        ("--chunks", request.chunks),
        ("--zero1", request.zero),
    ):
        if value < 1:
            problems.append(f"{option} {value}: must be at least 1")
        elif value > 1 and request.target_format != "internlm":
            problems.append(f"{option} {value}: only InternLM's format is split; leave it away for --to {pair[1]}")
    if request.tokenizer and request.target_format != "hf":
        problems.append(f"--tokenizer {request.tokenizer}: only a Hugging Face folder holds a tokenizer")
    if request.tokenizer and not request.tokenizer.is_file():
        problems.append(f"--tokenizer {request.tokenizer}: no such file")
    if target.exists():
        problems.append(f"{target} exists; remove it or name another place")
    if problems:
        raise ConversionError("\n  ".join(problems))


@dataclass(frozen=True)
class _Job:
    """What a writer of a format is told.

    Attributes:
        folder: Where to write, not published yet.
        run: What goes along beside the weights, None for nothing.
        dtype: Of the weights that are written.
    """

    folder: Path
    source: Source
    run: WholeRun | None
    request: Request
    dtype: torch.dtype
    progress: Callable[[str], None]


def _write_hf(job: _Job) -> None:
    assert job.run is None, "a Hugging Face folder holds weights only"
    hf.write(
        job.folder,
        job.source.weights,
        model=job.source.model,
        arch=job.source.arch,
        dtype=job.dtype,
        tokenizer=job.request.tokenizer,
        max_shard_bytes=job.request.max_shard_bytes,
        progress=job.progress,
    )


def _write_internlm(job: _Job) -> None:
    source, request = job.source, job.request
    model = replace(source.model, num_chunks=request.chunks)
    split: dict[str, Any] = {
        "arch": source.arch,
        "tensor_size": request.tensor,
        "pipe": request.pipe,
        "chunks": request.chunks,
        "dtype": job.dtype,
    }
    settings = dict_of_model(model, dtype=job.dtype, model_type=source.model_type)
    internlm.write_weights(job.folder, source.weights, model_config=settings, **split)
    if job.run is not None:
        job.progress("writing the optimizer's state")
        write_run(job.folder, job.run.states, job.run.run_state, **split, zero_size=request.zero)


def _write_native(job: _Job) -> None:
    source, run = job.source, job.run

    def deferred(spec: ParamSpec) -> Deferred:
        return Deferred(job.dtype, tuple(spec.shape), lambda: source.weights[spec.name].to(job.dtype))

    native.save(
        job.folder,
        weights=((spec.name, deferred(spec)) for spec in source.arch.iter_params()),
        fragments=run.fragments() if run else (),
        train_state=dict(run.values) if run else {},
        config_text=run.config_text if run else source.config_text,
        layout=Layout(),
        arch=source.arch,
        dtype=job.dtype,
        step=int(run.values["step_count"]) if run else source.step,
        model=source.model,
        model_type=source.model_type,
    )


_WRITERS: dict[Format, Callable[[_Job], None]] = {"hf": _write_hf, "internlm": _write_internlm, "native": _write_native}
