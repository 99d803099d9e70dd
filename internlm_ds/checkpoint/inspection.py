"""What a checkpoint is, for people: format, family, layout, step, sizes, dtype, health.

Reads manifests, names and headers, and contents only where they are to be compared with their checksums. Native and
Hugging Face folders are told without torch; InternLM's files need it. Nothing of a checkpoint is executed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internlm_ds.checkpoint import header
from internlm_ds.checkpoint import manifest as manifests
from internlm_ds.checkpoint.names import MODEL_FILE
from internlm_ds.checkpoint.search import Format, detect, find_checkpoints
from internlm_ds.errors import CheckpointError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# a name that only parameters of this family have
_MARKS = (
    ("mixer.Wqkv", "INTERNLM"),
    ("attention.wqkv", "INTERNLM2"),
    ("attention.wq.", "LLAMA2"),
    ("self_attn.q_proj.bias", "INTERNLM (as LlamaForCausalLM)"),
    ("self_attn.q_proj", "LLAMA2 (as LlamaForCausalLM)"),
)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint; what is not known is None, empty or 0.

    Attributes:
        format_version: Of the native format.
        family: `model_type` of a configuration that fits it.
        layout: Ranks along the axes of the run that wrote it.
        dtype: Of the weights, several joined by commas.
        num_parameters, num_elements: Of the weights; in InternLM's files what each file holds, added up.
        bytes: Of `weights`, `optimizer` and `total`.
        optimizer: Kinds of optimizer state, or InternLM's files of it.
        is_verified: Contents were compared, not sizes alone.
        problems: What is wrong, a line each.
    """

    path: str
    format: Format
    format_version: int | None
    family: str | None
    step: int | None
    created: float | None
    versions: dict[str, str]
    layout: dict[str, int]
    dtype: str
    num_parameters: int
    num_elements: int
    num_files: int
    bytes: dict[str, int]
    optimizer: tuple[str, ...]
    is_verified: bool
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_good": not self.problems}


def inspect(folder: Path, *, verify: bool = False) -> list[Inspection]:
    """A checkpoint, or all those of a save folder, the newest first.

    Args:
        verify: Read all files and compare them with their checksums, where the format has any.
    Raises:
        CheckpointError: There is none.
    """
    kind = detect(folder)
    if kind is not None:
        return [_one(folder, kind, verify=verify)]
    found = [(c.path, c.kind) for c in find_checkpoints(folder)] if folder.is_dir() else []
    if not found:
        what = "holds no checkpoint of any known format" if folder.is_dir() else "is no folder"
        raise CheckpointError(f"{folder} {what if folder.exists() else 'does not exist'}")
    return [_one(path, each, verify=verify) for path, each in found]


def _one(folder: Path, kind: Format, *, verify: bool) -> Inspection:
    return {"native": _native, "internlm": _internlm, "llama": _llama, "hf": _hf}[kind](folder, verify)


# ---- native ---------------------------------------------------------------------------------------


def _native(folder: Path, verify: bool) -> Inspection:
    try:
        manifest = manifests.read(folder)
    except CheckpointError as error:
        return _described(folder, "native", verify, problems=[str(error)])
    problems = list(manifests.differences(folder, manifest, contents=verify))
    elements = {p.name: math.prod(p.shape) for p in manifest.parameters}
    sizes = {name: record.size for name, record in manifest.files.items()}
    return _described(
        folder,
        "native",
        verify,
        format_version=json.loads((folder / manifests.NAME).read_text(encoding="utf-8"))["format_version"],
        family=manifest.model.get("model_type"),
        step=manifest.step,
        created=manifest.created,
        versions=manifest.versions,
        layout=manifest.layout,
        dtypes={p.dtype for p in manifest.parameters},
        num_parameters=len(elements),
        num_elements=sum(elements.values()),
        weights=sum(size for name, size in sizes.items() if name.startswith("weights-")),
        optimizer_bytes=sum(size for name, size in sizes.items() if name.startswith("optimizer-")),
        optimizer=sorted({f.kind for f in manifest.fragments}, reverse=True),
        problems=problems,
    )


# ---- InternLM -------------------------------------------------------------------------------------


def _internlm(folder: Path, verify: bool) -> Inspection:
    from internlm_ds.checkpoint import unpickle
    from internlm_ds.checkpoint.formats import internlm, internlm_run

    problems: list[str] = []
    tensors: list[tuple[str, Any]] = []
    ranks = [tuple(map(int, m.groups())) for path in folder.iterdir() if (m := MODEL_FILE.fullmatch(path.name))]
    try:
        for state in internlm.read_states(folder).values():
            tensors += state.items()
    except CheckpointError as error:
        problems.append(str(error))
    for path in sorted(folder.glob("*.pt")) if verify else ():
        try:
            unpickle.check(path)
        except CheckpointError as error:
            problems.append(str(error))
    zero = [int(m[3]) for path in folder.iterdir() if (m := internlm_run.OPTIMIZER_FILE.fullmatch(path.name))]
    layout = {"tensor": 1 + max((t for t, _ in ranks), default=0), "pipe": 1 + max((p for _, p in ranks), default=0)}
    heads = {name.partition(".")[0] for name, _ in tensors}
    return _described(
        folder,
        "internlm",
        verify,
        family=_family(name for name, _ in tensors),
        step=internlm_run.step_of(folder),
        layout={
            **layout,
            **({"zero": 1 + max(zero)} if zero else {}),
            "chunks": 1 + max((int(head) for head in heads if head.isdigit()), default=0),
        },
        dtypes={str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors},
        num_parameters=len(tensors),
        num_elements=sum(math.prod(tensor.shape) for _, tensor in tensors),
        weights=_size(folder.glob("model_tp*.pt")),
        optimizer_bytes=_size(folder.glob("optimizer_tp*.pt")),
        optimizer=sorted(path.name for path in folder.glob("optimizer_tp*.pt")),
        problems=list(dict.fromkeys(problems)),
    )


# ---- Meta's Llama ---------------------------------------------------------------------------------


def _llama(folder: Path, verify: bool) -> Inspection:
    from internlm_ds.checkpoint import unpickle
    from internlm_ds.checkpoint.formats import llama

    problems: list[str] = []
    tensors: list[tuple[str, Any]] = []
    files: dict[int, Path] = {}
    try:
        files = llama.find_files(folder)
        for path in files.values():
            tensors += llama.read_state(path).items()
            if verify:
                unpickle.check(path)
    except CheckpointError as error:
        problems.append(str(error))
    return _described(
        folder,
        "llama",
        verify,
        family=_family(name for name, _ in tensors),
        layout={"tensor": len(files)},
        dtypes={str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors},
        num_parameters=len(tensors),
        num_elements=sum(math.prod(tensor.shape) for _, tensor in tensors),
        weights=_size(files.values()),
        problems=problems,
    )


# ---- Hugging Face ---------------------------------------------------------------------------------


def _hf(folder: Path, verify: bool) -> Inspection:
    problems: list[str] = []
    entries: dict[str, header.Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            entries |= header.read(path)
        except CheckpointError as error:
            problems.append(str(error))
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if verify and pickles:
        from internlm_ds.checkpoint import unpickle
    for path in pickles if verify else ():
        try:
            unpickle.check(path)
        except CheckpointError as error:
            problems.append(str(error))
    problems += _missing(folder, entries)
    return _described(
        folder,
        "hf",
        verify,
        family=_family(entries),
        dtypes={DTYPES.get(entry.dtype, entry.dtype) for entry in entries.values()},
        num_parameters=len(entries),
        num_elements=sum(math.prod(entry.shape) for entry in entries.values()),
        weights=_size([*folder.glob("*.safetensors"), *pickles]),
        problems=problems,
    )


def _missing(folder: Path, entries: Iterable[str]) -> Iterator[str]:
    """Tensors of the index that no file has."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            yield f"{index.name}: cannot be read: {error}"
            return
        files = sorted({file for name, file in named.items() if name not in set(entries)})
        yield from (f"{file}: missing, damaged or without tensors that the index names" for file in files)


# ---- all ------------------------------------------------------------------------------------------


def _described(
    folder: Path,
    kind: Format,
    verify: bool,
    *,
    problems: list[str],
    weights: int = 0,
    optimizer_bytes: int = 0,
    optimizer: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    **known: Any,
) -> Inspection:
    files = [path for path in folder.iterdir() if path.is_file()]
    unknown = {"format_version": None, "family": None, "step": None, "created": None, "versions": {}, "layout": {}}
    return Inspection(
        **{
            **unknown,
            "num_parameters": 0,
            "num_elements": 0,
            **known,
            "path": str(folder),
            "format": kind,
            "dtype": ", ".join(sorted(dtypes)),
            "num_files": len(files),
            "bytes": {"weights": weights, "optimizer": optimizer_bytes, "total": _size(files)},
            "optimizer": tuple(optimizer),
            "is_verified": verify,
            "problems": tuple(problems),
        }
    )


def _family(names: Iterable[str]) -> str | None:
    names = list(names)
    return next((family for mark, family in _MARKS if any(mark in name for name in names)), None)


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def render(found: Inspection) -> str:
    """A few lines for a terminal."""
    version = f", version {found.format_version}" if found.format_version else ""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.created)) if found.created else ""
    layout = ", ".join(f"{axis} {size}" for axis, size in found.layout.items())
    elements = f"{found.num_parameters} tensors, {found.num_elements:,} elements, {_shown(found.bytes['weights'])}"
    kinds = f"{', '.join(found.optimizer)}, {_shown(found.bytes['optimizer'])}" if found.optimizer else "none"
    lines = [
        ("family", found.family or "unknown"),
        ("step", "unknown" if found.step is None else found.step),
        ("written", ", ".join(text for text in (when, *(f"{k} {v}" for k, v in found.versions.items())) if text)),
        ("layout", layout),
        ("dtype", found.dtype),
        ("weights", elements),
        ("optimizer", kinds),
        ("files", f"{found.num_files}, {_shown(found.bytes['total'])}"),
        ("health", _health(found)),
    ]
    head = f"{found.path}: {found.format} checkpoint{version}"
    return "\n".join([head, *(f"  {name:<10} {value}" for name, value in lines if value != "")])


def _health(found: Inspection) -> str:
    if found.problems:
        return f"{len(found.problems)} wrong:\n" + "\n".join(f"    {problem}" for problem in found.problems)
    if not found.is_verified:
        return "good as far as names and sizes tell; --verify compares contents"
    if found.format == "hf":
        return "good; the format has no checksums: headers and sizes were compared"
    return "good; all contents compared with their checksums"


def _shown(size: int) -> str:
    """
    >>> _shown(1_234_567)
    '1.2 MB'
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
