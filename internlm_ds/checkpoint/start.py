"""What a run starts from: an earlier checkpoint of its own, a checkpoint it was told to load, or new weights.

Owns the order of these (auto_resume, load_ckpt_info, InternLM's older keys) and the meaning of `content`. Loading
itself is the engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint import address as addresses
from internlm_ds.checkpoint import manifest as manifests
from internlm_ds.checkpoint import place as places
from internlm_ds.checkpoint.agree import Comm, Solo, collect, on_first_rank
from internlm_ds.checkpoint.formats import hf, internlm, internlm_run, llama, native
from internlm_ds.checkpoint.search import Candidate, Format, detect, find_checkpoints
from internlm_ds.checkpoint.storage import base
from internlm_ds.config.schema import CkptConfig, Config
from internlm_ds.errors import CheckpointDamagedError, CheckpointError

log = logging.getLogger(__name__)

PARTS = ("model", "optimizer", "scheduler", "sampler")
CKPT_TYPES: dict[str, Format] = {
    "native": "native",
    "internlm": "internlm",
    "internevo": "internlm",
    "normal": "internlm",
    "llama": "llama",
    "hf": "hf",
    "hf_llama": "hf",
}


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        path: The checkpoint folder, None for new weights.
        kind: Its format.
        parts: Which of `PARTS` are loaded from it; the others start anew.
        step: Successful updates it had, where that is known.
        reason: One line for the log: where each part comes from, and why.
        warnings: What the user should know, a damaged checkpoint that was passed over for example.
    """

    path: Path | None
    kind: Format | None
    parts: frozenset[str]
    reason: str
    step: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_resume(self) -> bool:
        """All parts are loaded: the run goes on where it was."""
        return self.parts == frozenset(PARTS)

    @property
    def refresh_masters(self) -> bool:
        """fp32 masters must be made from the loaded weights, else the first update brings the old ones back."""
        return "model" in self.parts and "optimizer" not in self.parts

    def weights(self, arch: ModelArch, *, mlp_names: str | None = None) -> Mapping[str, torch.Tensor]:
        """The weights by logical name, whatever the format; each is read when it is asked for.

        Args:
            mlp_names: See `internlm.read_weights`.
        Raises:
            CheckpointError: They do not fit `arch`: all parameters that are missing, extra or misshapen are listed.
        """
        assert self.path is not None and "model" in self.parts, f"no weights are loaded: {self.reason}"
        if self.kind == "native":
            checkpoint = native.open(self.path, verify=False)
            checkpoint.check_fits(arch)
            return checkpoint.weights
        if self.kind == "llama":
            return llama.read_weights(self.path, arch=arch)
        if self.kind == "hf":
            return hf.read_weights(self.path, arch=arch)
        return internlm.read_weights(self.path, arch=arch, mlp_names=mlp_names)


def content_parts(content: Iterable[str] | str) -> frozenset[str]:
    """The parts that a `content` names, in any case of letters; "all" names all.

    Raises:
        CheckpointError: It names something else, or nothing.

    >>> sorted(content_parts(("Sampler", "MODEL")))
    ['model', 'sampler']
    """
    named = [content] if isinstance(content, str) else list(content)
    parts = {name.lower() for name in named}
    unknown = sorted(parts - {*PARTS, "all"})
    if unknown or not parts:
        raise CheckpointError(
            f"load_ckpt_info.content = {tuple(named)!r}: {', '.join(unknown) or 'nothing'} is not among "
            f"{', '.join(PARTS)}, all"
        )
    return frozenset(PARTS) if "all" in parts else frozenset(parts)


def plan_start(config: Config, *, comm: Comm | None = None, verify: bool = True, dry_run: bool = False) -> Start:
    """Decide what a run starts from; the ranks of `comm` call it together and get the same answer. Changes nothing.

    Args:
        verify: Compare checkpoints with their checksums, each rank of `comm` a share; an own one that is damaged is
            passed over for the next older one. False looks at manifests only.
        dry_run: As `verify=False`, and a path that does not exist is a warning instead of an error.
    Raises:
        CheckpointError: What is to be loaded does not exist, is no checkpoint or cannot be loaded by this version.
        CheckpointDamagedError: There are own checkpoints, and all of them are damaged.
    """
    comm, ckpt, verify = comm or Solo(), config.ckpt, verify and not dry_run
    nothing = "nothing to resume: auto_resume is off"
    if ckpt.auto_resume:
        if dry_run and ckpt.enable_save_ckpt and addresses.parse(ckpt.save_ckpt_folder or ".").backend == "boto3":
            nothing = f"what {ckpt.save_ckpt_folder} holds is looked at when the run starts"
        elif ckpt.enable_save_ckpt and ckpt.save_ckpt_folder:
            start = _resume(ckpt, comm=comm, verify=verify)
            if start is not None:
                return start
            nothing = f"nothing to resume in {ckpt.save_ckpt_folder}"
        else:
            nothing = "nothing to resume: saving is off"
    asked = _asked(ckpt)
    if asked is None:
        return Start(None, None, frozenset(), f"model, optimizer, scheduler, sampler start anew ({nothing})")
    if dry_run and addresses.parse(asked[0]).backend == "boto3":
        message = f"ckpt.{asked[3]} names {asked[0]}, which is looked at when the run starts"
        return Start(None, None, asked[1], message, warnings=(message,))
    staging = ckpt.async_upload_tmp_folder
    start = on_first_rank(
        comm, lambda: _load(*asked, nothing=nothing, dry_run=dry_run, staging=staging), doing="looking for weights"
    )
    if start.path is not None:
        start = replace(start, path=_brought(asked[0], start.path, ckpt, comm=comm, verify=verify))
    if start.kind == "native" and verify:
        native.open(start.path, verify=True, comm=comm)
    if start.kind == "internlm" and verify:
        collect(
            comm,
            lambda: internlm_run.check(start.path, share=(comm.rank, comm.world_size)),
            doing=f"checking {start.path}",
        )
    return start


def _resume(ckpt: CkptConfig, *, comm: Comm, verify: bool) -> Start | None:
    """The newest good checkpoint of this run, None if there is none at all."""
    found = on_first_rank(comm, lambda: _own_checkpoints(ckpt), doing="looking for checkpoints")
    damaged: list[str] = []
    for text, candidate in found:
        try:
            if not candidate.damage:
                candidate = replace(candidate, path=_brought(text, candidate.path, ckpt, comm=comm, verify=verify))
            _check(candidate, comm=comm, verify=verify)
        except CheckpointDamagedError as error:
            damaged.append(str(error))
            continue
        parts, note = _readable(candidate.path, candidate.kind, frozenset(PARTS), explicit=False)
        passed = tuple(f"passed over: {text}\n  falling back to an older checkpoint" for text in damaged)
        reason = _reason(candidate.path, candidate.kind, parts, f"auto_resume, step {candidate.step}{note}")
        if damaged:
            reason += f"; {len(damaged)} newer but damaged passed over"
        return Start(candidate.path, candidate.kind, parts, reason, step=candidate.step, warnings=passed)
    if damaged:
        raise CheckpointDamagedError(
            f"no good checkpoint is left in {ckpt.save_ckpt_folder}:\n"
            + "\n".join(damaged)
            + "\nTo start anew all the same, "
            "set ckpt.auto_resume=False or another ckpt.save_ckpt_folder"
        )
    return None


def _own_checkpoints(ckpt: CkptConfig) -> list[tuple[str, Candidate]]:
    """The address that holds it, and the checkpoint, the newest first."""
    folders = [folder for folder in (ckpt.save_ckpt_folder, ckpt.snapshot_ckpt_folder) if folder]
    found: dict[Path, tuple[str, Candidate]] = {}
    for text in folders:
        place = places.of(text, staging=ckpt.async_upload_tmp_folder)
        found |= {c.path.resolve(): (text, c) for c in place.candidates()}
    return sorted(found.values(), key=lambda item: (-item[1].step, item[1].is_snapshot, str(item[1].path)))


def _brought(text: str, path: Path, ckpt: CkptConfig, *, comm: Comm, verify: bool) -> Path:
    """A checkpoint's folder on this host; without `verify` nothing is fetched and the names have to do."""
    place = places.of(text, staging=ckpt.async_upload_tmp_folder)
    if not verify:
        return path
    brought: list[Path] = []  # each rank's own: hosts need not agree where
    collect(comm, lambda: brought.append(place.bring(path)), doing=f"fetching {path.name} from {text}")
    return brought[0]


def _check(candidate: Candidate, *, comm: Comm, verify: bool) -> None:
    if candidate.damage:
        raise CheckpointDamagedError(candidate.damage)
    if candidate.kind == "native" and verify:
        native.open(candidate.path, verify=True, comm=comm)
    if candidate.kind == "internlm" and verify:
        try:
            share = (comm.rank, comm.world_size)
            collect(comm, lambda: internlm_run.check(candidate.path, share=share), doing=f"checking {candidate.path}")
        except CheckpointError as error:
            raise CheckpointDamagedError(str(error)) from error


def _asked(ckpt: CkptConfig) -> tuple[str, frozenset[str], str, str] | None:
    """Address, parts, type and the key that named them."""
    if ckpt.load_ckpt_info is not None:
        info = ckpt.load_ckpt_info
        return info.path, content_parts(info.content), info.ckpt_type, "load_ckpt_info"
    if ckpt.load_model_only_folder and ckpt.load_ckpt_folder:
        raise CheckpointError(
            f"ckpt.load_model_only_folder = {ckpt.load_model_only_folder!r} and ckpt.load_ckpt_folder = "
            f"{ckpt.load_ckpt_folder!r} are both set; keep one, or write load_ckpt_info = dict(path=…, content=(…))"
        )
    if ckpt.load_model_only_folder:
        return ckpt.load_model_only_folder, frozenset({"model"}), "internlm", "load_model_only_folder"
    if ckpt.load_ckpt_folder:
        parts = {"model", "sampler", *(("optimizer",) if ckpt.load_optimizer else ())}
        return ckpt.load_ckpt_folder, frozenset(parts), "internlm", "load_ckpt_folder"
    return None


def _load(
    text: str,
    parts: frozenset[str],
    ckpt_type: str,
    key: str,
    *,
    nothing: str,
    dry_run: bool,
    staging: str | None = None,
) -> Start:
    folder = places.of(text, staging=staging).folder()
    if folder is None:
        folder = base.local_counterpart(addresses.parse(text))
        message = f"ckpt.{key} names {text}, but {folder} {'is no folder' if folder.exists() else 'does not exist'}"
        if dry_run:
            return Start(folder, None, parts, f"{message}: a run would stop here", warnings=(message,))
        raise CheckpointError(
            f"{message}; give the folder that holds the weights, or remove the key to train from new ones"
        )
    kind = _kind(folder, ckpt_type=ckpt_type, key=key)
    parts, note = _readable(folder, kind, parts, explicit=parts != frozenset(PARTS))
    step = {
        "native": lambda: native.open(folder, verify=False).step,
        "internlm": lambda: internlm_run.step_of(folder),
    }.get(kind, lambda: None)()
    return Start(folder, kind, parts, _reason(folder, kind, parts, f"{key}; {nothing}{note}"), step=step)


def _kind(folder: Path, *, ckpt_type: str, key: str) -> Format:
    """The format to read a folder in: what it is, if that is what was asked for."""
    asked, found = CKPT_TYPES.get(ckpt_type.lower()), detect(folder)
    if asked is None:
        raise CheckpointError(
            f"ckpt.{key}.ckpt_type = {ckpt_type!r} cannot be loaded by this version; it loads {', '.join(CKPT_TYPES)}"
        )
    if found is None:
        inside = [str(c.path.relative_to(folder)) for c in find_checkpoints(folder)]
        hint = f"; it holds checkpoints, name one of them: {', '.join(inside[:6])}" if inside else ""
        raise CheckpointError(f"ckpt.{key} names {folder}, which is no checkpoint of any known format{hint}")
    # "internlm" is what a config that names no type gets
    if found != asked and asked != "internlm":
        raise CheckpointError(f"ckpt.{key}.ckpt_type = {ckpt_type!r}, but {folder} is a checkpoint of type {found!r}")
    if found != asked:
        log.info("%s is a checkpoint of type %r: read as such", folder, found)
    return found


def _readable(path: Path, kind: Format, parts: frozenset[str], *, explicit: bool) -> tuple[frozenset[str], str]:
    """The parts that a checkpoint gives, and a word on what it does not; an error if those were asked for by name."""
    if kind == "native":
        held = frozenset(PARTS) if manifests.read(path).fragments else frozenset({"model"})
        why = "it holds the weights only"
    elif kind == "internlm":
        held, why = internlm_run.held_parts(path), "files of its other parts are not there"
    else:
        held, why = frozenset({"model"}), f"this version reads only the weights of a checkpoint of type {kind!r}"
    lost = [name for name in PARTS if name in parts - held]
    if lost and (explicit or not parts & held):
        raise CheckpointError(
            f'{", ".join(lost)} cannot be loaded from {path}: {why}; write load_ckpt_info = dict(…, content=("model",))'
        )
    return parts & held, f"; {why}" if lost else ""


def _reason(path: Path, kind: Format, parts: frozenset[str], why: str) -> str:
    loaded: Sequence[str] = [part for part in PARTS if part in parts]
    fresh = [part for part in PARTS if part not in parts]
    rest = f"; {', '.join(fresh)} start anew" if fresh else ""
    return f"{', '.join(loaded)} from {path} ({kind}, {why}){rest}"
