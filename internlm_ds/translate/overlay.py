"""A user's own DeepSpeed keys: read from files, checked against DeepSpeed's names, merged over the translation.

Unknown names are errors at any depth, with the nearest one. What comes from an InternLM key keeps that one source; what
the engine must have cannot be changed; what the pipeline engine would silently ignore is refused rather than ignored.
`GUARDS` is the list of all three.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_ds.config.names import nearest
from internlm_ds.errors import Problem, TranslationError
from internlm_ds.translate import ds_schema

if TYPE_CHECKING:
    from internlm_ds.runspec import RunSpec

_STAGE3 = "only ZeRO stage 3 reads it, which excludes pipelines; remove it"
_CHECKPOINTS = "checkpoints are this software's own (ckpt.*), DeepSpeed's are not written; remove it"
_LOADER = "data comes from this software's own loader (data.*); remove it"
_LAYOUT = "the layout comes from parallel.*; remove it"
_PIPE_MESSAGES = "must be false: pipeline messages of packed data cannot be partitioned"


@dataclass(frozen=True)
class Guard:
    """A key, or a section, that cannot be set freely.

    Attributes:
        reason: Why, and what to do instead.
        accepted: Values that are harmless all the same (DeepSpeed's own neutral ones).
    """

    reason: str
    accepted: tuple[Any, ...] = ()


def _from(key: str) -> Guard:
    return Guard(f"comes from {key}; set that instead")


GUARDS: dict[str, Guard] = {
    "train_batch_size": _from("data.micro_bsz, data.micro_num and the number of ranks"),
    "train_micro_batch_size_per_gpu": _from("data.micro_bsz"),
    "gradient_accumulation_steps": _from("data.micro_num"),
    "gradient_clipping": _from("hybrid_zero_optimizer.clip_grad_norm"),
    "zero_optimization.reduce_bucket_size": _from("hybrid_zero_optimizer.reduce_bucket_size"),
    "zero_optimization.stage": Guard("must be 1: stages 2 and 3 exclude pipelines, stage 0 computes no norm in fp32"),
    "fp16": _from("model.dtype and grad_scaler.*"),
    "bf16.enabled": _from("model.dtype"),
    "bf16.check_grad_overflow": Guard("must be true: bad steps are skipped and counted in every precision"),
    "bf16.bf16_master_weights_and_grads": Guard(
        "must be false: it loses every update below 1/512 of a weight; write internlm_ds.masters_dtype instead",
        (False,),
    ),
    "bf16.bf16_optimizer_states": Guard(
        "must be false: it keeps the second moment from shrinking; write internlm_ds.moments_dtype instead", (False,)
    ),
    "bfloat16": Guard("DeepSpeed's old name; write bf16"),
    "torch_autocast": Guard("the precision comes from model.dtype; remove it"),
    "data_types.param_dtype": _from("model.dtype"),
    "data_types.buffer_dtype": Guard("the models have no buffers; remove it"),
    "data_types.keep_in_fp32_modules": Guard("the precision comes from model.dtype; remove it", ("auto",)),
    "optimizer": Guard("the engine passes AdamW with adam.* and the schedules, DeepSpeed would ignore it; set adam.*"),
    "scheduler": Guard("lr_scheduler.* and beta2_scheduler.* set the rates of every update; remove it"),
    "managed_gradient_accumulation": Guard("must be true: the pipeline engine needs it", (True,)),
    "gradient_allreduce_op": Guard("must be mean: gradients are averaged over data-parallel ranks", ("mean",)),
    "zero_optimization.overlap_comm": Guard("must be false: the pipeline engine reduces once and forces overlap off"),
    "zero_optimization.compute_grad_norm": Guard(
        "must be true: clipping, bad steps and the log need the norm", (True,)
    ),
    "zero_optimization.cpu_offload": Guard("old name; write offload_optimizer=dict(device='cpu')", (None, False)),
    "zero_optimization.cpu_offload_param": Guard(_STAGE3, (None, False)),
    "zero_optimization.cpu_offload_use_pin_memory": Guard("old name; write offload_optimizer.pin_memory", (None,)),
    "zero_optimization.offload_optimizer.device": Guard("cpu or none work with stage 1", ("cpu", "none")),
    "zero_optimization.offload_optimizer.super_offload": Guard(_STAGE3, (False,)),
    "zero_optimization.offload_optimizer.ratio": Guard(_STAGE3, (1, 1.0)),
    "zero_optimization.offload_param": Guard(_STAGE3, (None,)),
    "zero_optimization.zenflow": Guard("ZenFlow needs stages 2 or 3, which exclude pipelines; remove it", (None,)),
    "zero_optimization.elastic_checkpoint": Guard(_CHECKPOINTS, (False,)),
    "zero_optimization.load_from_fp32_weights": Guard(_CHECKPOINTS, (True,)),
    "zero_optimization.leaf_module": Guard(_STAGE3),
    "zero_optimization.zero_hpz_partition_size": Guard(_STAGE3, (1,)),
    "zero_optimization.zero_quantized_weights": Guard(_STAGE3, (False,)),
    "zero_optimization.zero_quantized_nontrainable_weights": Guard(_STAGE3, (False,)),
    "zero_optimization.zero_quantized_gradients": Guard(_STAGE3, (False,)),
    "pipeline.pipe_partitioned": Guard(_PIPE_MESSAGES),
    "pipeline.grad_partitioned": Guard(_PIPE_MESSAGES),
    "pipeline.use_reentrant": Guard(
        "must be false: the first stage starts with integers, which reentrant replay rejects"
    ),
    "pipeline.activation_checkpoint_interval": Guard(
        "must be 0: blocks recompute by model.checkpoint; set that instead"
    ),
    "pipeline.stages": Guard(_LAYOUT, ("auto",)),
    "pipeline.partition": Guard("stages are cut as InternLM cuts them; remove it", ("best",)),
    "pipeline.seed_layers": Guard("initial values depend on the seed and the parameter's name alone", (False,)),
    "activation_checkpointing": Guard("blocks recompute by model.checkpoint, DeepSpeed's functions are not called"),
    "flops_profiler": Guard(
        "it profiles nothing under the pipeline engine; the log line holds tflops", ({"enabled": False},)
    ),
    "checkpoint": Guard(_CHECKPOINTS),
    "datastates_ckpt": Guard(_CHECKPOINTS),
    "data_efficiency": Guard(_LOADER, ({"enabled": False},)),
    "dataloader_drop_last": Guard(_LOADER, (False,)),
    "autotuning": Guard("DeepSpeed's tuner starts scripts by its own JSON files; remove it", ({"enabled": False},)),
    "hybrid_engine": Guard("it is for reinforcement learning on another engine; remove it", ({"enabled": False},)),
    "compile": Guard(
        "DeepCompile needs the whole model in one forward pass, a pipeline has none", ({"deepcompile": False},)
    ),
    "weight_quantization": Guard("it is for inference; remove it", ({"enabled": False},)),
    "tensor_parallel": Guard(_LAYOUT, ({"autotp_size": 0},)),
    "expert_parallel": Guard(_LAYOUT, ({"enabled": False},)),
    "use_data_before_expert_parallelism": Guard(_LAYOUT, (False,)),
    "sequence_parallel_size": Guard(_LAYOUT, (1,)),
    "data_parallel_size": Guard(_LAYOUT),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "data_types.grad_accum_dtype": ("fp32", "fp16", "bf16"),
    "communication_data_type": ("fp32", "fp16", "bf16"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "seq_parallel_communication_data_type": ("fp32", "fp16", "bf16"),
}
KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("an integer", (int,)),
    "number": ("a number", (int, float)),
    "str": ("a string", (str,)),
    "list": ("a list", (list, tuple)),
}


def apply(base: dict[str, Any], *, spec: RunSpec, files: Sequence[str | Path]) -> tuple[dict[str, Any], list[Problem]]:
    """Merge the configuration's `deepspeed` dict, then the files, over `base`, and say what cannot be merged.

    A problem's key is `deepspeed.KEY` for the dict, `FILE: KEY` for a file. With a problem, `base` comes back as it is.
    Raises `TranslationError` for a file that cannot be read.
    """
    merged, problems = base, []
    lines = {leaf.key: (leaf.line, leaf.file) for leaf in spec.leaves if leaf.key.startswith("deepspeed")}
    for found in check(spec.config.deepspeed, base=base, prefix="deepspeed."):
        line, file = next((lines[key] for key in lines if _covers(found.key, key)), (None, None))
        problems.append(Problem(found.key, found.message, found.value, line, file))
    merged = merge(merged, spec.config.deepspeed)
    for overlay in files:
        fragment = read(overlay)
        problems.extend(check(fragment, base=base, prefix=f"{overlay}: "))
        merged = merge(merged, fragment)
    problems = problems or list(_together(merged, spec))
    return base if problems else merged, problems


def covering(problems: Sequence[Problem], key: str) -> Problem | None:
    """The problem that is about a leaf, or about a section it lies in."""
    return next((problem for problem in problems if _covers(problem.key, key)), None)


def read(path: str | Path) -> dict[str, Any]:
    """An overlay file, JSON or YAML by its name.

    Raises:
        TranslationError: It is missing, cannot be parsed, or is no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TranslationError(f"overlay {path}: cannot be read: {error}") from None
    if path.suffix in (".yaml", ".yml"):
        data = _parse_yaml(path, text)
    else:
        data = _parse_json(path, text)
    if not isinstance(data, dict):
        raise TranslationError(f"overlay {path}: holds {type(data).__name__}, a mapping of DeepSpeed keys is needed")
    return data


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TranslationError(f"overlay {path}, line {error.lineno}: not JSON: {error.msg}") from None


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml  # a third of a second that JSON overlays need not wait for

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise TranslationError(f"overlay {path}{where}: not YAML: {getattr(error, 'problem', error)}") from None


def merge(base: Mapping[str, Any], fragment: Mapping[str, Any]) -> dict[str, Any]:
    """A new dict: sections are merged, everything else is replaced.

    >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4})
    {'a': {'x': 1, 'y': 3}, 'b': 4}
    """
    merged = {key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in fragment.items():
        inner = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = merge(inner if isinstance(inner, Mapping) else {}, value)
        else:
            merged[key] = list(value) if isinstance(value, tuple) else value
    return merged


def check(fragment: Mapping[str, Any], *, base: Mapping[str, Any], prefix: str) -> list[Problem]:
    """What is wrong with a fragment of DeepSpeed keys that shall be merged over `base`."""
    return list(_check_section(fragment, ds_schema.KEYS, base, path="", prefix=prefix))


def _check_section(
    fragment: Mapping[str, Any], known: Mapping[str, Any], base: Mapping[str, Any], *, path: str, prefix: str
) -> Iterator[Problem]:
    for name, value in fragment.items():
        key = f"{path}.{name}" if path else str(name)
        if name not in known and "*" not in known:
            yield _unknown(name, known, section=path, key=prefix + key, value=value)
            continue
        ours = base.get(name)
        guard = GUARDS.get(key)
        if guard is not None:
            if not _same(value, ours) and not any(_same(value, good) for good in guard.accepted):
                yield Problem(prefix + key, guard.reason, value)
            continue
        kind = known.get(name, "any")
        if isinstance(kind, dict) and isinstance(value, Mapping):
            inner = ours if isinstance(ours, Mapping) else {}
            yield from _check_section(value, kind, inner, path=key, prefix=prefix)
        elif isinstance(kind, dict):
            if value is not None:
                yield Problem(prefix + key, "is a section: a mapping is needed", value)
        else:
            wrong = _wrong_kind(kind, value) or _wrong_choice(key, value)
            if wrong:
                yield Problem(prefix + key, wrong, value)


def _unknown(name: Any, known: Mapping[str, Any], *, section: str, key: str, value: Any) -> Problem:
    release = f"DeepSpeed {ds_schema.DEEPSPEED_VERSION}"
    if name in ds_schema.REMOVED.get(section, ()):
        return Problem(key, f"was removed from DeepSpeed; {release} raises on it; remove it", value)
    near = nearest(str(name), known)
    hint = f"; did you mean {near}?" if near else ""
    where = f" in {section}" if section else ""
    return Problem(key, f"{release} knows no such key{where}{hint}", value)


def _wrong_kind(kind: str, value: Any) -> str | None:
    if kind == "any" or value is None:
        return None
    words, types = KINDS[kind]
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be {words}: JSON has no infinity and no NaN"
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return None
    if not isinstance(value, types) or (kind != "bool" and isinstance(value, bool)):
        return f"must be {words}"
    return None


def _wrong_choice(key: str, value: Any) -> str | None:
    choices = CHOICES.get(key)
    if choices is None or value in choices:
        return None
    return f"must be one of {', '.join(map(repr, choices))}"


def _together(merged: Mapping[str, Any], spec: RunSpec) -> Iterator[Problem]:
    """What several keys, each good by itself, cannot be together."""
    dtype = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[spec.config.model.dtype]
    sums = merged["data_types"].get("grad_accum_dtype")
    if sums in ("fp16", "bf16", "fp32") and sums not in (dtype, "fp32"):
        message = f"{dtype} gradients are summed in {dtype}" + (" or fp32" if dtype != "fp32" else "")
        yield Problem("deepspeed.data_types.grad_accum_dtype", message, sums)
    if "bf16" in merged and dtype != "bf16":
        yield Problem("deepspeed.bf16", "model.dtype decides the precision, and is not torch.bfloat16", merged["bf16"])


def _same(value: Any, ours: Any) -> bool:
    """Equal, True and 1 told apart; a section is the same when all it says is."""
    if isinstance(value, Mapping) and isinstance(ours, Mapping):
        return all(name in ours and _same(inner, ours[name]) for name, inner in value.items())
    return bool(value == ours) and isinstance(value, bool) == isinstance(ours, bool)


def _covers(problem_key: str, leaf_key: str) -> bool:
    return leaf_key == problem_key or leaf_key.startswith(f"{problem_key}.")
