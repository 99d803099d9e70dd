"""Leaves: every value once, with its origin and line; defaults, derived values, old names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from internlm_ds.config import Loaded, load
from internlm_ds.config.keys import MODEL_FAMILIES, SECTIONS, TOP_NAMES, Section, all_keys
from internlm_ds.config.schema import Config, Leaf, LoadInfo

Write = Callable[..., Path]


def good(path: Path) -> Loaded:
    loaded = load(path)
    assert not loaded.problems, loaded.problems
    return loaded


def leaves(path: Path) -> dict[str, Leaf]:
    return {leaf.key: leaf for leaf in good(path).leaves}


def config_of(path: Path) -> Config:
    config = good(path).config
    assert config is not None
    return config


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and key not in ("min_length_dict", "data_weights"):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def test_each_value_of_the_file_is_listed_once_with_its_line(write: Write) -> None:
    path = write("deepspeed = dict(a=dict(b=[1, 2]), c={})\nHELPER = (1, 2)\n")
    namespace: dict[str, Any] = {}
    exec(path.read_text(), namespace)
    written = flat({name: value for name, value in namespace.items() if not name.startswith("__")})
    found = good(path).leaves
    assert max(Counter(leaf.key for leaf in found).values()) == 1
    assert max(Counter(leaf.source for leaf in found).values()) == 1
    assert {leaf.source: leaf.value for leaf in found if leaf.origin == "file"} == written
    text = path.read_text().splitlines()
    for leaf in found:
        if leaf.origin == "file":
            assert leaf.line is not None
            assert leaf.source.rpartition(".")[2] in text[leaf.line - 1], leaf
        else:
            assert (leaf.line, leaf.file) == (None, None)


@pytest.mark.parametrize("model_type", MODEL_FAMILIES)
def test_each_known_key_is_listed_once_for_a_bare_file(write: Write, model_type: str) -> None:
    """Legacy keys, and `moe`, are listed when the file gives them only."""
    found = [leaf.key for leaf in good(write(f"model_type = {model_type!r}\n")).leaves if not leaf.helper]
    legacy = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.legacy}
    other = {f"model.{key}" for keys in MODEL_FAMILIES.values() for key in keys}
    other -= {f"model.{key}" for key in MODEL_FAMILIES[model_type]}
    expected = {key for key in all_keys() if "." in key and not key.startswith("moe.")} - legacy - other
    expected = {key for key in expected if not key.startswith("ckpt.load_ckpt_info.")} | {"ckpt.load_ckpt_info"}
    assert sorted(found) == sorted(expected | set(TOP_NAMES))


def test_the_table_of_keys_covers_the_schema() -> None:
    """Each field of each dataclass has a rule, or is filled by hand."""
    by_hand = {"tf32", "extra", "given"}

    def check(section: Section) -> None:
        names = {field.name for field in fields(section.schema)}
        assert names - by_hand == {*section.rules, *section.nested}, section.schema
        for inner in section.nested.values():
            check(inner)

    for section in SECTIONS.values():
        check(section)
    assert {field.name for field in fields(Config)} == {*TOP_NAMES.values(), *SECTIONS, "deepspeed"}


def test_a_default_is_itself_a_good_value() -> None:
    def check(section: Section, values: Any) -> None:
        for name, rule in section.rules.items():
            default = section.default(name)
            if repr(default) != "REQUIRED" and name not in ("dtype", "adapt_hf"):
                assert rule.read(default) == default, (section.schema, name)
        for name, inner in section.nested.items():
            if is_dataclass(section.default(name)):
                check(inner, section.default(name))

    for section in SECTIONS.values():
        check(section, None)


def test_defaults_of_the_tutorial(write: Write) -> None:
    path = write(
        "del data['micro_num'], data['micro_bsz'], data['seq_len'], data['total_steps'], data['skip_batches']\n"
        "del data['rampup_batch_size'], grad_scaler, JOB_NAME\n"
        "ckpt = dict(save_ckpt_folder='local:x')\nparallel = {}\n"
    )
    config = config_of(path)
    data, scaler, parallel = config.data, config.grad_scaler, config.parallel
    assert (data.seq_len, data.micro_num, data.micro_bsz, data.total_steps) == (2048, 1, 1, 50000)
    assert (data.skip_batches, data.rampup_batch_size, data.valid_every, data.valid_micro_num) == ("", "", 0, 1)
    assert (config.ckpt.checkpoint_every, config.ckpt.auto_resume) == (math.inf, True)
    assert (scaler.fp16.initial_scale, scaler.fp16.min_scale, scaler.max_scale) == (2**16, None, None)
    assert (scaler.growth_factor, scaler.backoff_factor, scaler.hysteresis) == (2, 0.5, 2)
    assert (parallel.zero1.size, parallel.tensor.size, parallel.pipeline.size) == (-1, 1, 1)
    assert (parallel.sequence_parallel, config.job_name, config.model_type) == (False, "AnonymousJob", "INTERNLM")


def test_derived_values(write: Write) -> None:
    found = leaves(write())
    for key, value in (("packed_length", 128), ("gradient_accumulation", 4), ("valid_micro_num", 4)):
        leaf = found[f"data.{key}"]
        assert (leaf.value, leaf.origin, leaf.line) == (value, "derived", None)
        assert leaf.note


def test_a_given_packed_length_is_ignored_with_a_warning(write: Write) -> None:
    loaded = good(write("data['packed_length'] = 7\n"))
    assert loaded.config is not None
    assert loaded.config.data.packed_length == 128
    assert loaded.warnings == ["data.packed_length = 7 is ignored: it is always seq_len * micro_bsz = 128"]
    assert {leaf.key: leaf.value for leaf in loaded.leaves}["data.packed_length"] == 7


def test_helpers_are_marked(write: Write) -> None:
    found = leaves(write("import os\n"))
    assert [key for key, leaf in found.items() if leaf.helper] == ["SEQ_LEN", "SAVE"]
    assert found["SEQ_LEN"].note == "helper constant"


def test_integer_and_dict_forms(write: Write) -> None:
    found = leaves(write())
    assert (found["parallel.zero1.size"].source, found["parallel.zero1.size"].value) == ("parallel.zero1", -1)
    assert found["parallel.pipeline.size"].source == "parallel.pipeline.size"
    assert found["parallel.weight.size"].source == "parallel.weight.size"
    config = config_of(write("parallel = dict(zero1=dict(size=4, fsdp=False), tensor=2, pipeline=3, weight=1)\n"))
    assert (config.parallel.zero1.size, config.parallel.tensor.size, config.parallel.pipeline.size) == (4, 2, 3)


@pytest.mark.parametrize(
    ("line", "mode", "sequence_parallel"),
    [
        ("parallel['tensor'] = 2", "mtp", False),
        ("parallel['tensor'] = 2; parallel['sequence_parallel'] = True", "msp", True),
        ("parallel['tensor'] = dict(size=2)", "mtp", False),
        ("parallel['tensor'] = dict(size=2); parallel['sequence_parallel'] = True", "msp", True),
        ("parallel['tensor'] = dict(size=2, mode='msp')", "msp", True),
        ("parallel['tensor'] = dict(size=2, mode='fsp'); parallel['sequence_parallel'] = False", "fsp", True),
        ("parallel['tensor'] = dict(size=2, mode='isp'); parallel['weight'] = dict(size=2)", "isp", True),
        ("del parallel['tensor']; parallel['sequence_parallel'] = True", "msp", True),
    ],
)
def test_tensor_modes(write: Write, line: str, mode: str, sequence_parallel: bool) -> None:
    parallel = config_of(write(line + "\n")).parallel
    assert (parallel.tensor.mode, parallel.sequence_parallel) == (mode, sequence_parallel)


@pytest.mark.parametrize(
    ("name", "dtype", "tf32"),
    [("float16", "float16", False), ("half", "float16", False), ("bfloat16", "bfloat16", False),
     ("float32", "float32", False), ("tf32", "float32", True)],
)  # fmt: skip
def test_dtypes(write: Write, name: str, dtype: str, tf32: bool) -> None:
    path = write(f"model['dtype'] = 'torch.{name}'\n")
    model = config_of(path).model
    assert (model.dtype, model.tf32) == (dtype, tf32)
    assert leaves(path)["model.dtype"].value == f"torch.{name}"
    assert leaves(write("del model['dtype']\n"))["model.dtype"].value == "torch.float16"


@pytest.mark.parametrize(("value", "fraction"), [("True", 1.0), ("False", 0.0), ("0.4", 0.4), ("1", 1.0)])
def test_recomputed_fraction(write: Write, value: str, fraction: float) -> None:
    assert config_of(write(f"model['checkpoint'] = {value}\n")).model.checkpoint == fraction


def test_plain_attention_means_unpacked_data_unless_asked(write: Write) -> None:
    path = write("model['use_flash_attn'] = False\n")
    assert config_of(path).data.use_packed_dataset is False
    assert leaves(path)["data.use_packed_dataset"].origin == "derived"
    packed = write("model['use_flash_attn'] = False\ndata['use_packed_dataset'] = True\n")
    assert config_of(packed).data.use_packed_dataset is True


def test_what_saving_off_means(write: Write) -> None:
    path = write("ckpt.update(checkpoint_every=5, async_upload=True, oss_snapshot_freq=2)\n")
    ckpt = config_of(path).ckpt
    assert (ckpt.save_ckpt_folder, ckpt.checkpoint_every, ckpt.oss_snapshot_freq) == (None, math.inf, math.inf)
    assert (ckpt.async_upload, ckpt.async_upload_tmp_folder, ckpt.snapshot_ckpt_folder) == (False, None, None)
    leaf = leaves(path)["ckpt.checkpoint_every"]
    assert (leaf.value, leaf.note) == (5, "no effect: ckpt.enable_save_ckpt is False")


def test_what_saving_on_means(write: Write) -> None:
    path = write("ckpt.update(enable_save_ckpt=True, async_upload=True, save_ckpt_folder='local:x/')\n")
    ckpt = config_of(path).ckpt
    assert (ckpt.save_ckpt_folder, ckpt.snapshot_ckpt_folder) == ("local:x/", "local:x/snapshot")
    assert (ckpt.async_upload, ckpt.async_upload_tmp_folder) == (True, "/dev/shm/internlm_tmp_ckpt/")
    assert leaves(path)["ckpt.snapshot_ckpt_folder"].origin == "derived"


INFO = LoadInfo("local:x", ("model",), "internlm")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ckpt['load_ckpt_info'] = dict(path='local:x', content=('model',), ckpt_type='internevo')", INFO),
        ("ckpt['load_ckpt_info'] = dict(path='local:x', content=['Model'], ckpt_type='normal')", INFO),
        ("ckpt['load_ckpt_info'] = dict(path='local:x', content='model')", INFO),
        ("ckpt['load_ckpt_info'] = dict(path='x', content=('model',), ckpt_type='hf_llama')",
         LoadInfo("x", ("model",), "hf")),
        ("ckpt['load_model_only_folder'] = 'local:x'", INFO),
        ("ckpt['load_ckpt_folder'] = dict(path='local:x', content=['model'], ckpt_type='normal')", INFO),
        ("ckpt['load_ckpt_folder'] = 'local:x'", LoadInfo("local:x", ("model", "sampler", "optimizer"))),
        ("ckpt['load_ckpt_folder'] = 'local:x'; ckpt['load_optimizer'] = False",
         LoadInfo("local:x", ("model", "sampler"))),
        ("ckpt.update(load_ckpt_folder='local:y', load_ckpt_info=dict(path='local:x', content=('model',)))", INFO),
        ("pass", None),
    ],
)  # fmt: skip
def test_where_to_load_from(write: Write, line: str, expected: LoadInfo | None) -> None:
    assert config_of(write(line + "\n")).ckpt.load_ckpt_info == expected


def test_old_load_keys_have_a_note(write: Write) -> None:
    found = leaves(write("ckpt['load_ckpt_folder'] = 'local:x'\n"))
    assert found["ckpt.load_ckpt_folder"].note == "old key, read as ckpt.load_ckpt_info"
    assert (found["ckpt.load_ckpt_info.path"].value, found["ckpt.load_ckpt_info.path"].origin) == ("local:x", "derived")
    assert "ckpt.load_ckpt_info" not in found
    both = write("ckpt['load_ckpt_folder'] = 'local:y'\nckpt['load_ckpt_info'] = dict(path='local:x')\n")
    assert leaves(both)["ckpt.load_ckpt_folder"].note == "old key, not used: ckpt.load_ckpt_info is given"
    dict_form = leaves(write("ckpt['load_ckpt_folder'] = dict(path='local:x')\n"))
    assert "ckpt.load_ckpt_folder" not in dict_form
    assert dict_form["ckpt.load_ckpt_folder.path"].origin == "file"


def test_two_old_load_keys_are_warned_of(write: Write) -> None:
    loaded = good(write("ckpt.update(load_ckpt_folder='local:y', load_model_only_folder='local:x')\n"))
    assert loaded.warnings == ["ckpt.load_model_only_folder is used, ckpt.load_ckpt_folder is not: both are given"]
    assert loaded.config is not None
    assert loaded.config.ckpt.load_ckpt_info == INFO


def test_load_given_ckpt_is_the_opposite_of_auto_resume(write: Write) -> None:
    path = write("ckpt['load_given_ckpt'] = True\n")
    assert config_of(path).ckpt.auto_resume is False
    found = leaves(path)
    assert (found["ckpt.auto_resume"].origin, found["ckpt.auto_resume"].value) == ("derived", False)
    assert found["ckpt.load_given_ckpt"].note.startswith("old name")
    assert config_of(write("ckpt.update(load_given_ckpt=True, auto_resume=True)\n")).ckpt.auto_resume is True


def test_zero_overlap_communication_is_overlap_sync_grad(write: Write) -> None:
    path = write("hybrid_zero_optimizer['zero_overlap_communication'] = True\n")
    assert config_of(path).hybrid_zero_optimizer.overlap_sync_grad is True
    assert leaves(path)["hybrid_zero_optimizer.overlap_sync_grad"].origin == "derived"
    both = write("hybrid_zero_optimizer.update(zero_overlap_communication=False, overlap_sync_grad=True)\n")
    assert config_of(both).hybrid_zero_optimizer.overlap_sync_grad is False
    (warning,) = good(both).warnings
    assert "wins over hybrid_zero_optimizer.overlap_sync_grad" in warning


def test_keys_without_effect_are_listed_with_a_note(write: Write) -> None:
    found = leaves(
        write(
            "batch_count = 0\nalert_address = None\ndata['batch_size'] = 4\n"
            "monitor = dict(tensorboard=dict(queue_max_length=10))\nTENSOR_SHAPE = (1, 2)\n"
        )
    )
    keys = ("batch_count", "alert_address", "data.batch_size", "monitor.tensorboard.queue_max_length", "TENSOR_SHAPE")
    for key in keys:
        assert found[key].origin == "file"
        assert found[key].note, key
    assert found["tensorboard.queue_max_length"].origin == "default"


def test_moe_is_listed_only_when_given(write: Write) -> None:
    assert not [key for key in leaves(write()) if key.startswith("moe.")]
    path = write("model_type = 'INTERNLM_MoE'\nmoe = dict(top_k=2)\nmodel['num_experts'] = 4\n")
    found = leaves(path)
    assert [key for key in found if key.startswith("moe.")] == ["moe.top_k"]
    assert (config_of(path).moe.top_k, config_of(path).model.num_experts) == (2, 4)


def test_bounds_of_diagnosis(write: Write) -> None:
    data = config_of(write("data.update(diag_outlier_ratio=0.5, empty_cache_and_diag_interval=0)\n")).data
    assert (data.diag_outlier_ratio, data.empty_cache_and_diag_interval) == (1.0, 50)


def test_tensorboard_folders_come_from_the_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("tensorboard_folder", "/tb")
    path = write()
    assert config_of(path).tensorboard_folder == "/tb"
    assert leaves(path)["tensorboard_folder"].origin == "derived"
    assert config_of(write("tensorboard_folder = '/own'\n")).tensorboard_folder == "/own"


def test_own_dict(write: Write) -> None:
    own = config_of(
        write(
            "internlm_ds = dict(compat=dict(no_clip_in_fp32=True, mlp_names='2023'), "
            "guard=dict(max_bad_steps=3, drift_every=0), pipeline_bounds=[0, 2, 4], data_weights=dict(en=2), "
            "keep_checkpoints=2)\n"
            "data['train_folder'] = 'data'\n"
        )
    ).internlm_ds
    assert (own.compat.no_clip_in_fp32, own.compat.mlp_names, own.guard.max_bad_steps) == (True, "2023", 3)
    assert (own.guard.drift_every, own.keep_checkpoints) == (0, 2)
    assert (own.pipeline_bounds, own.data_weights) == ((0, 2, 4), {"en": 2.0})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("internlm_ds = dict(data_weights=dict(en=2))\ndata['train_folder'] = None\n", "needs data.train_folder"),
        ("internlm_ds = dict(data_weights=dict(en=0))\ndata['train_folder'] = 'x'\n", "one weight must be above 0"),
        ("internlm_ds = dict(data_weights=dict(en=-1))\n", "the value of 'en' must be"),
    ],
)
def test_weights_that_weigh_nothing(write: Write, lines: str, message: str) -> None:
    (problem,) = load(write(lines)).problems
    assert problem.key == "internlm_ds.data_weights" and message in problem.message


def test_loading_imports_no_numpy_and_no_torch(write: Write) -> None:
    import subprocess
    import sys

    code = (
        "import sys, time; start = time.perf_counter(); from internlm_ds.runspec import resolve; "
        f"resolve({str(write())!r}, world_size=2); "
        "print(sorted({'numpy', 'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
