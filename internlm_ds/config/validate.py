"""From plain values to a `Config`: one section at a time, then what the sections must be together.

Every mistake becomes a `Problem` and a stand-in, so that all of them are found in one go. Rules of single values stand
in `keys`; what depends on the model's shape or on the number of processes is checked by `arch` and `layout`.
"""

from __future__ import annotations

import math
import os
from typing import Any

from internlm_ds.config import schema
from internlm_ds.config.execute import Opaque
from internlm_ds.config.keys import (
    LOAD_INFO,
    MODEL,
    MODEL_FAMILIES,
    NEEDED_SECTIONS,
    PARALLEL,
    READ_BESIDE_BUILDER,
    SECTIONS,
    TOP,
    TOP_LEGACY,
    TOP_NAMES,
)
from internlm_ds.config.names import nearest
from internlm_ds.config.reader import MISSING, Reader
from internlm_ds.config.schema import Config

ASYNC_TMP_FOLDER = "/dev/shm/internlm_tmp_ckpt/"
"""Where asynchronous saving keeps files meanwhile (InternLM's default)."""

SEQUENCE_PARALLEL_MODES = ("msp", "fsp", "isp")


def validate(reader: Reader) -> Config:
    """The configuration that `reader` holds; its problems and warnings are added there."""
    sections = _top_level(reader)
    top = _top_values(reader)
    parallel = _parallel(reader, sections)
    model = _model(reader, sections, str(top["model_type"]))
    config = Config(
        **top,
        ckpt=_ckpt(reader, sections),
        data=_data(reader, sections, parallel=parallel, model=model),
        grad_scaler=_grad_scaler(reader, sections),
        hybrid_zero_optimizer=_optimizer(reader, sections),
        loss=_plain(reader, sections, "loss"),
        adam=_plain(reader, sections, "adam"),
        lr_scheduler=_lr_scheduler(reader, sections),
        beta2_scheduler=_plain(reader, sections, "beta2_scheduler"),
        model=model,
        moe=_moe(reader, sections),
        parallel=parallel,
        monitor=_plain(reader, sections, "monitor"),
        tensorboard=_plain(reader, sections, "tensorboard"),
        deepspeed=_deepspeed(reader),
        internlm_ds=_plain(reader, sections, "internlm_ds"),
    )
    _moe_rules(reader, config)
    _weight_rules(reader, config)
    return config


# the top level


def _top_level(reader: Reader) -> dict[str, str]:
    """Sort the top-level names. Returns, for each section, the name its dict has in the file."""
    known = (*SECTIONS, "deepspeed", *TOP_NAMES, *TOP_LEGACY)
    names = {name: name for name in SECTIONS if name in reader.values}
    for name, value in reader.values.items():
        if name in known:
            continue
        if isinstance(value, dict):
            absent = [section for section in SECTIONS if section not in reader.values and section not in names]
            meant = nearest(name, absent)
            if meant:
                names[meant] = name
            _unknown_dict(reader, name, known)
        else:
            _helper(reader, name, value, known)
    for name in NEEDED_SECTIONS:
        if name not in names:
            reader.problem((name,), f"is required: a dict, e.g. {name} = dict(...)")
    return names


def _unknown_dict(reader: Reader, name: str, known: tuple[str, ...]) -> None:
    close = nearest(name, known)
    hint = f"did you mean {close}?" if close else f"the nearest known one is {nearest(name, SECTIONS, cutoff=0.0)};"
    keep = "" if close else f" to keep it as a helper, name it __{name.strip('_')} or delete it at the end of the file"
    reader.problem((name,), f"unknown top-level dict; {hint}{keep}")


def _helper(reader: Reader, name: str, value: Any, known: tuple[str, ...]) -> None:
    """A constant that only the file itself uses: listed once, without an effect of its own."""
    if isinstance(value, Opaque):
        return
    reader.leaf((name,), value, note="helper constant", helper=True)
    meant = nearest(name, [key for key in known if key not in reader.values and key not in TOP_LEGACY], cutoff=0.8)
    if meant:
        leaf = reader.leaves[name]
        line = f" (line {leaf.line})" if leaf.line else ""
        reader.warnings.append(f"{name}{line} is no key of InternLM and has no effect by itself; did you mean {meant}?")


def _top_values(reader: Reader) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for name, field_name in TOP_NAMES.items():
        rule, default = TOP.rules[field_name], TOP.default(field_name)
        typed[field_name] = reader.value((name,), rule, default, reader.values.get(name, MISSING))
    for name in ("tensorboard_folder", "resume_tb_folder"):
        if name not in reader.values and os.environ.get(name):
            typed[name] = os.environ[name]
            reader.derive(name, typed[name], f"from the environment variable {name}, as in InternLM")
    for name, legacy in TOP_LEGACY.items():
        if name in reader.values:
            reader.flatten((name,), reader.values[name], note=legacy.note)
    return typed


def _plain(reader: Reader, sections: dict[str, str], name: str) -> Any:
    """A section that needs no look at others."""
    written = sections.get(name, name)
    return reader.nested((name,), SECTIONS[name], reader.values.get(written, MISSING), written=(written,))


def _read(reader: Reader, sections: dict[str, str], name: str) -> dict[str, Any]:
    written = sections.get(name, name)
    return reader.section((name,), SECTIONS[name], reader.values.get(written, MISSING), written=(written,))


def _deepspeed(reader: Reader) -> dict[str, Any]:
    """DeepSpeed's own keys: kept as they are, checked by `translate`."""
    tree = reader.values.get("deepspeed", {})
    if not isinstance(tree, dict):
        reader.problem(("deepspeed",), "must be a dict of DeepSpeed's own keys, e.g. deepspeed = dict(...)", tree)
        return {}
    if tree:
        reader.flatten(("deepspeed",), tree)
    return tree


# ckpt


def _ckpt(reader: Reader, sections: dict[str, str]) -> schema.CkptConfig:
    written = sections.get("ckpt", "ckpt")
    tree = reader.values.get(written, MISSING)
    legacy_info = None
    if isinstance(tree, dict) and isinstance(tree.get("load_ckpt_folder"), dict):
        # an old form: dict(path=…, content=…, ckpt_type=…) under the name of the folder
        tree = dict(tree)
        path = ("ckpt", "load_ckpt_folder")
        legacy_info = reader.nested(path, LOAD_INFO, tree.pop("load_ckpt_folder"), written=(written, path[1]))
    values = reader.section(("ckpt",), SECTIONS["ckpt"], tree, written=(written,))
    if legacy_info is not None:
        reader.leaves.pop("ckpt.load_ckpt_folder", None)
        values["load_ckpt_folder"] = None
    values["load_ckpt_info"] = _load_info(reader, values, legacy_info)
    given = values.pop("load_given_ckpt", None)
    if given is not None and not reader.given("ckpt.auto_resume"):
        values["auto_resume"] = not given
        reader.derive("ckpt.auto_resume", not given, "the opposite of ckpt.load_given_ckpt, its old name")
    _saving(reader, values)
    return schema.CkptConfig(**values)


def _load_info(reader: Reader, values: dict[str, Any], legacy: schema.LoadInfo | None) -> schema.LoadInfo | None:
    """Where to load from: `load_ckpt_info`, else what the old keys say."""
    info: schema.LoadInfo | None = values["load_ckpt_info"]
    model_only, folder = values["load_model_only_folder"], values["load_ckpt_folder"]
    if info is not None:
        _check_content(reader, info, "ckpt.load_ckpt_info")
        for key in ("ckpt.load_model_only_folder", "ckpt.load_ckpt_folder"):
            for name in [name for name in reader.leaves if name.startswith(key) and reader.given(name)]:
                reader.note(name, "old key, not used: ckpt.load_ckpt_info is given")
        return info
    if model_only is not None:
        info = schema.LoadInfo(model_only, ("model",))
        if folder is not None or legacy is not None:
            reader.warnings.append("ckpt.load_model_only_folder is used, ckpt.load_ckpt_folder is not: both are given")
        source = "ckpt.load_model_only_folder"
    elif legacy is not None:
        info, source = legacy, "ckpt.load_ckpt_folder"
        _check_content(reader, info, source)
    elif folder is not None:
        contents = ("model", "sampler", "optimizer") if values["load_optimizer"] else ("model", "sampler")
        info, source = schema.LoadInfo(folder, contents), "ckpt.load_ckpt_folder"
    else:
        return None
    reader.leaves.pop("ckpt.load_ckpt_info", None)
    for name in ("path", "content", "ckpt_type"):
        reader.derive(f"ckpt.load_ckpt_info.{name}", getattr(info, name), f"from {source}, its old name")
    for name in [name for name in reader.leaves if name.startswith(source)]:
        reader.note(name, "old key, read as ckpt.load_ckpt_info")
    return info


def _check_content(reader: Reader, info: schema.LoadInfo, key: str) -> None:
    if info.ckpt_type in ("llama", "hf") and info.content != ("model",):
        message = f'a checkpoint of type {info.ckpt_type!r} holds the model only; write content=("model",)'
        reader.problem((*key.split("."), "content"), message, info.content)


def _saving(reader: Reader, values: dict[str, Any]) -> None:
    """What follows from saving being on or off."""
    never = float("inf")
    if not values["enable_save_ckpt"]:
        off = "no effect: ckpt.enable_save_ckpt is False"
        values.update(
            save_ckpt_folder=None, checkpoint_every=never, oss_snapshot_freq=never, async_upload=False,
            async_upload_tmp_folder=None, snapshot_ckpt_folder=None,
        )  # fmt: skip
        for key in ("save_ckpt_folder", "checkpoint_every", "oss_snapshot_freq", "async_upload",
                    "async_upload_tmp_folder", "snapshot_ckpt_folder"):  # fmt: skip
            if reader.given(f"ckpt.{key}"):
                reader.note(f"ckpt.{key}", off)
        return
    folder = values["save_ckpt_folder"]
    if folder is None:
        message = (
            'is required while ckpt.enable_save_ckpt is True, its default; write save_ckpt_folder="local:llm_ckpts" '
            "or enable_save_ckpt=False"
        )
        if not any(problem.key == "ckpt.save_ckpt_folder" for problem in reader.problems):
            reader.problem(("ckpt", "save_ckpt_folder"), message)
        return
    if values["snapshot_ckpt_folder"] is None:
        values["snapshot_ckpt_folder"] = folder.rstrip("/") + "/snapshot"
        reader.derive("ckpt.snapshot_ckpt_folder", values["snapshot_ckpt_folder"], "ckpt.save_ckpt_folder + /snapshot")
    if values["async_upload"] and values["async_upload_tmp_folder"] is None:
        values["async_upload_tmp_folder"] = ASYNC_TMP_FOLDER
        reader.derive("ckpt.async_upload_tmp_folder", ASYNC_TMP_FOLDER, "ckpt.async_upload is True")
    elif not values["async_upload"]:
        values["async_upload_tmp_folder"] = None


# data


def _data(
    reader: Reader, sections: dict[str, str], *, parallel: schema.ParallelConfig, model: schema.ModelConfig
) -> schema.DataConfig:
    values = _read(reader, sections, "data")
    values.pop("batch_size", None)
    packed, micro_num = values["seq_len"] * values["micro_bsz"], values["micro_num"]
    if reader.given("data.packed_length") and values["packed_length"] != packed:
        reader.warnings.append(
            f"data.packed_length = {values['packed_length']} is ignored: it is always seq_len * micro_bsz = {packed}"
        )
    values["packed_length"] = packed
    reader.derive("data.packed_length", packed, "always data.seq_len * data.micro_bsz")
    if not reader.given("data.gradient_accumulation"):
        values["gradient_accumulation"] = micro_num
        reader.derive("data.gradient_accumulation", micro_num, "data.micro_num")
    elif values["gradient_accumulation"] != micro_num and parallel.pipeline.size == 1:
        message = f"must equal data.micro_num = {micro_num} without a pipeline; leave it out"
        reader.problem(("data", "gradient_accumulation"), message, values["gradient_accumulation"])
    if not reader.given("data.valid_micro_num"):
        values["valid_micro_num"] = micro_num
        reader.derive("data.valid_micro_num", micro_num, "data.micro_num")
    if not reader.given("data.use_packed_dataset") and not model.use_flash_attn:
        values["use_packed_dataset"] = False
        reader.derive("data.use_packed_dataset", False, "model.use_flash_attn is False")
    if values["empty_cache_and_diag_interval"] <= 0:
        values["empty_cache_and_diag_interval"] = 50
        reader.note("data.empty_cache_and_diag_interval", "0 or less means 50")
    if values["diag_outlier_ratio"] < 1:
        values["diag_outlier_ratio"] = 1.0
        reader.note("data.diag_outlier_ratio", "below 1 means 1")
    values["valid_every"] = max(0, values["valid_every"])
    return schema.DataConfig(**values)


# optimizer and schedules


def _grad_scaler(reader: Reader, sections: dict[str, str]) -> schema.GradScalerConfig:
    config: schema.GradScalerConfig = _plain(reader, sections, "grad_scaler")
    low, high = config.fp16.min_scale or 0.0, config.max_scale or math.inf
    if low > high:
        message = f"must be at most grad_scaler.max_scale = {high:g}"
        reader.problem(("grad_scaler", "fp16", "min_scale"), message, config.fp16.min_scale)
    return config


def _optimizer(reader: Reader, sections: dict[str, str]) -> schema.HybridZeroOptimizerConfig:
    values = _read(reader, sections, "hybrid_zero_optimizer")
    old = values.pop("zero_overlap_communication", None)
    if old is not None:
        name, old_name = "hybrid_zero_optimizer.overlap_sync_grad", "hybrid_zero_optimizer.zero_overlap_communication"
        if reader.given(name) and values["overlap_sync_grad"] != old:
            reader.warnings.append(f"{old_name} = {old} wins over {name}, its new name: write one of them")
        # as InternLM reads it: the old name overwrites the new one
        values["overlap_sync_grad"] = old
        reader.derive(name, old, f"{old} from {old_name}, its old name")
    return schema.HybridZeroOptimizerConfig(**values)


def _lr_scheduler(reader: Reader, sections: dict[str, str]) -> schema.LrSchedulerConfig:
    config: schema.LrSchedulerConfig = _plain(reader, sections, "lr_scheduler")
    warmup = int(config.total_steps * config.warmup_ratio)
    sound = not any(problem.key.startswith("lr_scheduler") for problem in reader.problems)
    if sound and config.init_steps + warmup > config.total_steps:
        message = (
            f"init_steps and the {warmup} steps of warm-up (warmup_ratio = {config.warmup_ratio:g}) must fit into "
            f"lr_scheduler.total_steps = {config.total_steps}: at most {config.total_steps - warmup}"
        )
        reader.problem(("lr_scheduler", "init_steps"), message, config.init_steps)
    return config


# model


def _model(reader: Reader, sections: dict[str, str], model_type: str) -> schema.ModelConfig:
    registered = _is_registered(model_type)
    family = MODEL_FAMILIES.get(model_type)
    if family is None and not registered:
        longer = [name for name in MODEL_FAMILIES if name.lower().startswith(model_type.lower())]
        close = longer[0] if longer else nearest(model_type, MODEL_FAMILIES)
        hint = f"did you mean {close!r}?" if close else f"known: {', '.join(MODEL_FAMILIES)};"
        message = f'unknown model type; {hint} new ones are added by MODEL_INITIALIZER.register_module("{model_type}")'
        reader.problem(("model_type",), message, model_type)
    written = sections.get("model", "model")
    tree = reader.values.get(written, MISSING)
    given = dict(tree) if isinstance(tree, dict) else {}
    if registered:
        only = [key for key in MODEL.rules if key in given or key in READ_BESIDE_BUILDER]
    else:
        only = list(family or tuple(MODEL.rules))
        _other_families(reader, given, model_type, only, written)
    values = reader.section(
        ("model",), MODEL, tree, only=[*only, *(k for k in given if k in MODEL.rules)], accept_more=registered,
        written=(written,),
    )  # fmt: skip
    dtype = values["dtype"]
    values["dtype"], values["tf32"] = dtype if isinstance(dtype, tuple) else (dtype, False)
    extra = {key: value for key, value in given.items() if registered and key not in MODEL.rules}
    for key, value in extra.items():
        close = nearest(key, [known for known in MODEL.rules if known not in given], cutoff=0.85)
        if close:
            reader.warnings.append(f"model.{key} goes to the builder of {model_type} as it is; did you mean {close}?")
        reader.flatten(("model", key), value, note=f"keyword of the builder of {model_type}")
    return schema.ModelConfig(**values, extra=extra, given=given)


def _other_families(reader: Reader, given: dict[str, Any], model_type: str, only: list[str], written: str) -> None:
    """Keys that exist, but not for this model type."""
    for key in [key for key in given if key in MODEL.rules and key not in only]:
        owners = " and ".join(name for name, keys in MODEL_FAMILIES.items() if key in keys)
        reader.problem((written, key), f"is a key of {owners}; model_type is {model_type}", given[key])


def _is_registered(model_type: str) -> bool:
    from internlm_ds.registry import MODEL_INITIALIZER

    return model_type in MODEL_INITIALIZER


def _moe(reader: Reader, sections: dict[str, str]) -> schema.MoeConfig:
    """`moe`: only what the file gives is listed, since most models have no use for it."""
    config: schema.MoeConfig = _plain(reader, sections, "moe")
    for key in [key for key, leaf in reader.leaves.items() if key.startswith("moe.") and leaf.origin == "default"]:
        del reader.leaves[key]
    return config


def _moe_rules(reader: Reader, config: Config) -> None:
    if "MoE" not in config.model_type or config.model.num_experts == 1:
        return
    overlaps = config.hybrid_zero_optimizer
    if overlaps.overlap_sync_grad and overlaps.overlap_sync_param:
        message = "a MoE model allows only one of overlap_sync_grad and overlap_sync_param; write False"
        reader.problem(("hybrid_zero_optimizer", "overlap_sync_param"), message, True)


def _weight_rules(reader: Reader, config: Config) -> None:
    """What can be said of `data_weights` without looking at files."""
    weights, key = config.internlm_ds.data_weights, ("internlm_ds", "data_weights")
    if weights is None:
        return
    if not any(weights.values()):
        reader.problem(key, 'one weight must be above 0, e.g. {"en": 1.0, "code": 0.5}', dict(weights))
    elif not config.data.train_folder:
        reader.problem(key, "needs data.train_folder: synthetic data has no types to weigh", dict(weights))


# parallel


def _parallel(reader: Reader, sections: dict[str, str]) -> schema.ParallelConfig:
    written = sections.get("parallel", "parallel")
    tree = reader.values.get(written, MISSING)
    forms = dict(tree) if isinstance(tree, dict) else tree
    integers = {}
    if isinstance(forms, dict):
        for key in PARALLEL.nested:
            if key in forms and not isinstance(forms[key], dict):
                integers[key] = forms.pop(key)
    values = reader.section(("parallel",), PARALLEL, forms, written=(written,))
    for key, value in integers.items():
        values[key] = _integer_form(reader, key, value, written=(written, key))
    _tensor_mode(reader, values, "mode" in _dict_at(forms, "tensor"))
    config = schema.ParallelConfig(**values)
    _parallel_rules(reader, config)
    return config


def _dict_at(tree: Any, key: str) -> dict[str, Any]:
    below = tree.get(key) if isinstance(tree, dict) else None
    return below if isinstance(below, dict) else {}


def _integer_form(reader: Reader, key: str, value: Any, *, written: tuple[str, ...]) -> Any:
    """`zero1=8` means `zero1=dict(size=8)`."""
    section = PARALLEL.nested[key]
    typed = {name: section.default(name) for name in section.rules}
    typed["size"] = reader.value(
        ("parallel", key, "size"), section.rules["size"], typed["size"], value, written=written
    )
    return section.schema(**typed)


def _tensor_mode(reader: Reader, values: dict[str, Any], mode_is_written: bool) -> None:
    """Settle how tensor parallelism splits activations: `sequence_parallel` is an old word for mode `msp`."""
    tensor: schema.TensorConfig = values["tensor"]
    asked = values["sequence_parallel"]
    if not mode_is_written:
        mode = "msp" if asked else "mtp"
        if asked:
            reader.derive("parallel.tensor.mode", mode, "parallel.sequence_parallel is True")
        values["tensor"] = schema.TensorConfig(tensor.size, mode)
        return
    if tensor.mode == "mtp" and asked:
        message = (
            'contradicts parallel.tensor.mode = "mtp"; write mode="msp" for sequence parallelism, or leave one out'
        )
        reader.problem(("parallel", "sequence_parallel"), message, True)
        return
    on = tensor.mode in SEQUENCE_PARALLEL_MODES
    if on != asked:
        reader.derive("parallel.sequence_parallel", on, f"parallel.tensor.mode is {tensor.mode!r}")
    values["sequence_parallel"] = on


def _parallel_rules(reader: Reader, config: schema.ParallelConfig) -> None:
    if config.weight.size > 1 and config.tensor.mode != "isp":
        message = f'needs parallel.tensor.mode = "isp" (it is {config.tensor.mode!r}); write weight=dict(size=1)'
        reader.problem(("parallel", "weight", "size"), message, config.weight.size)
    if config.zero1.fsdp and config.pipeline.size > 1:
        message = f"needs parallel.pipeline = 1 (it is {config.pipeline.size}); write fsdp=False"
        reader.problem(("parallel", "zero1", "fsdp"), message, True)
    if config.zero1.fsdp and config.tensor.mode == "isp":
        reader.problem(("parallel", "zero1", "fsdp"), 'cannot go with tensor mode "isp"; write fsdp=False', True)
