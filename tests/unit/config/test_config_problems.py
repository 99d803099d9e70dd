"""Everything that can be wrong with a configuration, each with its message; and all of it together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm_ds.config import load
from internlm_ds.config.keys import NEEDED_SECTIONS

Write = Callable[..., Path]


def problems(path: Path) -> list[str]:
    """Problems without their line, which other tests look at."""
    import re

    return [re.sub(r" \(line \d+\)", "", str(problem)) for problem in load(path).problems]


def test_the_tiny_configuration_is_good(write: Write) -> None:
    loaded = load(write())
    assert (loaded.problems, loaded.warnings) == ([], [])


SINGLE = [
    # types and ranges
    ("data['micro_num'] = 0", "data.micro_num = 0: must be an integer of at least 1"),
    ("data['micro_num'] = 4.0", "data.micro_num = 4.0: must be an integer of at least 1; write 4"),
    ("data['micro_num'] = '4'", "data.micro_num = '4': must be an integer of at least 1; write 4"),
    ("data['micro_num'] = True", "data.micro_num = True: must be an integer of at least 1"),
    ("data['micro_num'] = None", "data.micro_num = None: must be an integer of at least 1"),
    ("data['seed'] = -1", "data.seed = -1: must be an integer of at least 0"),
    ("data['pack_sample_into_one'] = 'true'",
     "data.pack_sample_into_one = 'true': must be True or False; write True without quotes"),
    ("data['type'] = 'text'", "data.type = 'text': must be one of 'tokenized'"),
    ("data['train_folder'] = 3", "data.train_folder = 3: must be None or a string"),
    ("data['min_length_dict'] = 3",
     'data.min_length_dict = 3: must be None or a dict such as {"en": 50, "cn": 20}'),
    ("data['min_length_dict'] = dict(en='x')",
     "data.min_length_dict = {'en': 'x'}: the value of 'en' must be an integer of at least 0"),
    ("adam['lr'] = '1e-4'", "adam.lr = '1e-4': must be a number of at least 0; write 0.0001"),
    ("adam['lr'] = float('nan')", "adam.lr = nan: must be a number of at least 0, and finite"),
    ("adam['adam_beta1'] = 1", "adam.adam_beta1 = 1: must be a number of at least 0 and below 1"),
    ("hybrid_zero_optimizer['clip_grad_norm'] = -1",
     "hybrid_zero_optimizer.clip_grad_norm = -1: must be a number of at least 0"),
    ("hybrid_zero_optimizer['reduce_bucket_size'] = 1.5",
     "hybrid_zero_optimizer.reduce_bucket_size = 1.5: must be an integer of at least 1"),
    ("grad_scaler['growth_factor'] = 1", "grad_scaler.growth_factor = 1: must be a number above 1"),
    ("grad_scaler['backoff_factor'] = 1", "grad_scaler.backoff_factor = 1: must be a number above 0 and below 1"),
    ("grad_scaler['fp16'] = 3", "grad_scaler.fp16 = 3: must be a dict, e.g. fp16 = dict(...)"),
    ("grad_scaler['fp16']['min_scale'] = 2**25",
     "grad_scaler.fp16.min_scale = 33554432.0: must be at most grad_scaler.max_scale = 1.67772e+07"),
    ("lr_scheduler['warmup_ratio'] = 2", "lr_scheduler.warmup_ratio = 2: must be a number from 0 to 1"),
    ("lr_scheduler['init_steps'] = 95",
     "lr_scheduler.init_steps = 95: init_steps and the 10 steps of warm-up (warmup_ratio = 0.1) must fit into "
     "lr_scheduler.total_steps = 100: at most 90"),
    ("loss['label_smoothing'] = 1", "loss.label_smoothing = 1: must be None or a number of at least 0 and below 1"),
    ("model['dtype'] = 'torch.int8'",
     "model.dtype = 'torch.int8': must be one of 'torch.float16', 'torch.half', 'torch.bfloat16', 'torch.float32', "
     "'torch.tf32'"),
    ("model['dtype'] = 'bfloat16'",
     "model.dtype = 'bfloat16': must be one of 'torch.float16', 'torch.half', 'torch.bfloat16', 'torch.float32', "
     "'torch.tf32'; did you mean 'torch.bfloat16'?"),
    ("model['checkpoint'] = 2",
     "model.checkpoint = 2: must be True, False or a number from 0 to 1: the share of layers whose activations are "
     "recomputed"),
    ("model['norm_type'] = 'rms_norm'",
     "model.norm_type = 'rms_norm': must be one of 'rmsnorm', 'layernorm'; did you mean 'rmsnorm'?"),
    ("model['num_layers'] = {'a': 1}", "model.num_layers = {'a': 1}: must be an integer of at least 1"),
    ("model['num_layers'] = print", "model.num_layers = <print>: is a print; a configuration holds numbers, strings, "
     "lists and dicts only"),
    ("JOB_NAME = ''", "JOB_NAME = '': must be a string that is not empty"),
    ("cudnn_benchmark = 2", "cudnn_benchmark = 2: must be True or False"),
    # skip_batches and rampup_batch_size
    ("data['skip_batches'] = '10-5'", "data.skip_batches = '10-5': a range runs from low to high; write \"5-10\""),
    ("data['skip_batches'] = '5,3'", "data.skip_batches = '5,3': indices rise: 3 must come after 5"),
    ("data['skip_batches'] = '1-4,4'", "data.skip_batches = '1-4,4': indices rise: 4 must come after 4"),
    ("data['skip_batches'] = 'x'",
     "data.skip_batches = 'x': 'x' is neither an index nor a range; write a string of batch indices and ranges in "
     'rising order, e.g. "3,10-20", or "" for none'),
    ("data['skip_batches'] = 3",
     "data.skip_batches = 3: must be a string of batch indices and ranges in rising order, "
     'e.g. "3,10-20", or "" for none'),
    ("data['rampup_batch_size'] = '2 2'",
     'data.rampup_batch_size = \'2 2\': must be three integers "start increment every", each at least 1, '
     'e.g. "2 2 100", or "" for none'),
    ("data['rampup_batch_size'] = '0 2 100'",
     'data.rampup_batch_size = \'0 2 100\': must be three integers "start increment every", each at least 1, '
     'e.g. "2 2 100", or "" for none'),
    ("data['gradient_accumulation'] = 8",
     "data.gradient_accumulation = 8: must equal data.micro_num = 4 without a pipeline; leave it out"),
    # ckpt
    ("ckpt = dict()",
     "ckpt.save_ckpt_folder: is required while ckpt.enable_save_ckpt is True, its default; write "
     'save_ckpt_folder="local:llm_ckpts" or enable_save_ckpt=False'),
    ("ckpt['checkpoint_every'] = 0", 'ckpt.checkpoint_every = 0: must be an integer of at least 1, or float("inf") for '
     "never"),
    ("ckpt['load_ckpt_info'] = 'local:x'",
     "ckpt.load_ckpt_info = 'local:x': must be a dict, e.g. load_ckpt_info = dict(...)"),
    ("ckpt['load_ckpt_info'] = dict(content='all')",
     "ckpt.load_ckpt_info.path: is required: a string that is not empty"),
    ("ckpt['load_ckpt_info'] = dict(path='x', content=('modle',))",
     "ckpt.load_ckpt_info.content = ('modle',): must be a tuple of 'model', 'sampler', 'optimizer', 'scheduler', 'all'"
     "; 'modle' is none of them; did you mean 'model'?"),
    ("ckpt['load_ckpt_info'] = dict(path='x', content=())",
     "ckpt.load_ckpt_info.content = (): must be a tuple of 'model', 'sampler', 'optimizer', 'scheduler', 'all', "
     'e.g. ("model",)'),
    ("ckpt['load_ckpt_info'] = dict(path='x', ckpt_type='intern')",
     "ckpt.load_ckpt_info.ckpt_type = 'intern': must be one of 'native', 'internlm', 'internevo', 'normal', 'llama', "
     "'hf', 'hf_llama'; did you mean 'internlm'?"),
    ("ckpt['load_ckpt_info'] = dict(path='x', content=('all',), ckpt_type='hf')",
     "ckpt.load_ckpt_info.content = ('all',): a checkpoint of type 'hf' holds the model only; write "
     'content=("model",)'),
    # spelling
    ("data['micro_nun'] = 4", "data.micro_nun = 4: unknown key; did you mean micro_num?"),
    ("data['clip_grad_norm'] = 4",
     "data.clip_grad_norm = 4: unknown key here; it belongs to hybrid_zero_optimizer: "
     "hybrid_zero_optimizer.clip_grad_norm"),
    ("data['zzz'] = 4", "data.zzz = 4: unknown key; the nearest known key of data is "),
    ("data['micro_nun'] = dict(a=1)", "data.micro_nun: unknown key; did you mean micro_num?"),
    ("grad_scaler['fp16']['growth'] = 1", "grad_scaler.fp16.growth = 1: unknown key; "),
    ("internlm_ds = dict(compat=dict(no_clip_fp32=True))",
     "internlm_ds.compat.no_clip_fp32 = True: unknown key; did you mean no_clip_in_fp32?"),
    ("modell = dict(a=1)", "modell: unknown top-level dict; did you mean model?"),
    ("my_things = dict(a=1)", "my_things: unknown top-level dict; the nearest known one is "),
    # model types and families
    ("model_type = 'INTERNLM2'",
     "model_type = 'INTERNLM2': unknown model type; did you mean 'INTERNLM2_PUBLIC'? new ones "
     'are added by MODEL_INITIALIZER.register_module("INTERNLM2")'),
    ("model_type = 'GPT'", "model_type = 'GPT': unknown model type; known: INTERNLM, INTERNLM2_PUBLIC, LLAMA2, "
     'INTERNLM_MoE; new ones are added by MODEL_INITIALIZER.register_module("GPT")'),
    ("model['no_bias'] = True",
     "model.no_bias = True: is a key of INTERNLM2_PUBLIC and LLAMA2; model_type is INTERNLM"),
    ("model_type = 'INTERNLM_MoE'; model['num_experts'] = 4; "
     "hybrid_zero_optimizer.update(overlap_sync_grad=True, overlap_sync_param=True)",
     "hybrid_zero_optimizer.overlap_sync_param = True: a MoE model allows only one of overlap_sync_grad and "
     "overlap_sync_param; write False"),
    # parallel
    ("parallel['tensor'] = 'x'", "parallel.tensor = 'x': must be an integer of at least 1"),
    ("parallel['tensor'] = dict(size=0)", "parallel.tensor.size = 0: must be an integer of at least 1"),
    ("parallel['tensor'] = dict(size=2, mode='mpt')",
     "parallel.tensor.mode = 'mpt': must be one of 'mtp', 'msp', 'fsp', 'isp'"),
    ("parallel['sequence_parallel'] = True; parallel['tensor'] = dict(size=2, mode='mtp')",
     'parallel.sequence_parallel = True: contradicts parallel.tensor.mode = "mtp"; write mode="msp" for sequence '
     "parallelism, or leave one out"),
    ("parallel['weight'] = dict(size=2)",
     'parallel.weight.size = 2: needs parallel.tensor.mode = "isp" (it is \'mtp\'); write weight=dict(size=1)'),
    ("parallel.update(zero1=dict(size=-1, fsdp=True), pipeline=2)",
     "parallel.zero1.fsdp = True: needs parallel.pipeline = 1 (it is 2); write fsdp=False"),
    ("parallel.update(zero1=dict(size=-1, fsdp=True), tensor=dict(size=1, mode='isp'))",
     'parallel.zero1.fsdp = True: cannot go with tensor mode "isp"; write fsdp=False'),
    # our own dicts
    ("deepspeed = 3", "deepspeed = 3: must be a dict of DeepSpeed's own keys, e.g. deepspeed = dict(...)"),
    ("deepspeed = dict(a=dict(b=print))", "deepspeed.a.b = <print>: is a print; a configuration holds numbers, "
     "strings, lists and dicts only"),
    ("internlm_ds = dict(chunked_loss='never')",
     "internlm_ds.chunked_loss = 'never': must be 'auto', True or False"),
    ("internlm_ds = dict(attention='xformers')",
     "internlm_ds.attention = 'xformers': must be one of 'auto', 'flash', 'varlen', 'sdpa', 'reference'"),
    ("internlm_ds = dict(moments_dtype='float16')",
     "internlm_ds.moments_dtype = 'float16': must be one of 'float32', 'bfloat16'; did you mean 'bfloat16'?"),
    ("internlm_ds = dict(masters_dtype=2)", "internlm_ds.masters_dtype = 2: must be one of 'float32', 'bfloat16'"),
    ("internlm_ds = dict(pipeline_schedule='gpipe')",
     "internlm_ds.pipeline_schedule = 'gpipe': must be one of '1f1b', 'zb-h1'"),
    ("internlm_ds = dict(pipeline_bounds=[0, 3, 2])",
     "internlm_ds.pipeline_bounds = [0, 3, 2]: must be None or a list of rising integers that starts with 0, e.g. "
     "[0, 16, 32]"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), SINGLE)
def test_one_mistake_is_one_problem(write: Write, line: str, expected: str) -> None:
    (found,) = problems(write(line + "\n"))
    assert found.startswith(expected) if expected.endswith(" ") else found == expected


def test_problems_name_the_line_that_wrote_the_value(write: Write, line_of: Callable[[Path, str], int]) -> None:
    path = write("", ("micro_num=4", "micro_num=0"), ("num_layers=4", "num_layer=4"))
    found = {problem.key: problem.line for problem in load(path).problems}
    assert found == {
        "data.micro_num": line_of(path, "micro_num=0"),
        "model.num_layer": line_of(path, "num_layer=4"),
    }


def test_all_problems_come_together(write: Write) -> None:
    path = write(
        "data['skip_batches'] = '10-5'\nmodel['checkpoint'] = 7\nunknown = dict()\n",
        ("clip_grad_norm", "clip_grad_norn"),
        ("micro_num", "micro_nun"),
    )
    assert sorted(problem.key for problem in load(path).problems) == [
        "data.micro_nun",
        "data.skip_batches",
        "hybrid_zero_optimizer.clip_grad_norn",
        "model.checkpoint",
        "unknown",
    ]


@pytest.mark.parametrize("name", NEEDED_SECTIONS)
def test_a_missing_section_is_one_problem(write: Write, name: str) -> None:
    path = write(f"del {name}\n")
    assert problems(path) == [f"{name}: is required: a dict, e.g. {name} = dict(...)"]


@pytest.mark.parametrize("name", ["grad_scaler", "loss"])
def test_sections_with_defaults_may_be_missing(write: Write, name: str) -> None:
    assert problems(write(f"del {name}\n")) == []


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("adam.lr", "a number of at least 0"),
        ("adam.weight_decay", "a number of at least 0"),
        ("hybrid_zero_optimizer.clip_grad_norm", "a number of at least 0"),
        ("hybrid_zero_optimizer.reduce_bucket_size", "an integer of at least 1"),
        ("lr_scheduler.total_steps", "an integer of at least 1"),
        ("beta2_scheduler.init_beta2", "a number of at least 0 and below 1"),
    ],
)
def test_a_missing_required_key(write: Write, key: str, expected: str) -> None:
    section, name = key.split(".")
    assert problems(write(f"del {section}[{name!r}]\n")) == [f"{key}: is required: {expected}"]


def test_a_required_key_that_is_misspelt_is_one_problem(write: Write) -> None:
    path = write("", ("adam_beta1", "adam_bta1"), ("adam_eps", "adm_eps"))
    assert problems(path) == [
        "adam.adam_bta1 = 0.9: unknown key; did you mean adam_beta1?",
        "adam.adm_eps = 1e-08: unknown key; did you mean adam_eps?",
    ]


def test_a_misspelt_section_is_one_problem_and_still_checked(write: Write) -> None:
    path = write("adm['lr'] = -1\n", ("\nadam =", "\nadm ="), ('adam["adam_beta2"]', "0.95"))
    assert problems(path) == [
        "adm: unknown top-level dict; did you mean adam?",
        "adm.lr = -1: must be a number of at least 0",
    ]


def test_a_misspelt_key_stands_in_for_the_right_one(write: Write) -> None:
    """Otherwise a default of 1 would make a good ramp-up look wrong."""
    loaded = load(write("", ("micro_num=4", "micro_nun=4")))
    assert loaded.config is not None
    assert loaded.config.data.micro_num == 4


def test_helpers_are_warned_of_only_when_close_to_a_key(write: Write, line_of: Callable[[Path, str], int]) -> None:
    path = write("TRAIN_FOLDER = 'x'\nMODEL_TYP = 'INTERNLM'\nmy_lr = 3\n")
    assert load(path).warnings == [
        f"MODEL_TYP (line {line_of(path, 'MODEL_TYP')}) is no key of InternLM and has no effect by itself; "
        "did you mean model_type?"
    ]
    assert load(write("MODEL_TYPE = 'INTERNLM'\nmodel_type = MODEL_TYPE\n")).warnings == []


def test_problems_in_base_files_name_the_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("\ndata = dict(micro_nun=3)\n")
    (problem,) = load(write("from configs.base import data\n")).problems
    assert (problem.line, problem.path) == (2, str(tmp_path / "configs" / "base.py"))


@pytest.mark.parametrize(
    "line",
    ["data['train_folder'] = ''", "enable_tb = 1", "ckpt['load_ckpt_info'] = None", "loss['label_smoothing'] = None",
     "data['rampup_batch_size'] = None", "ckpt['oss_snapshot_freq'] = 12.0", "data['skip_batches'] = ' 3 , 5-9,20 '",
     "hybrid_zero_optimizer['reduce_bucket_size'] = 5e8", "model['checkpoint'] = 0.4", "model['dtype'] = 'torch.tf32'",
     "grad_scaler['max_scale'] = None", "import math; ckpt['checkpoint_every'] = math.inf", "parallel['zero1'] = -7"],
)  # fmt: skip
def test_values_that_are_good(write: Write, line: str) -> None:
    assert problems(write(line + "\n")) == []


def test_values_of_other_libraries_are_read(write: Write) -> None:
    pytest.importorskip("numpy")
    path = write("import numpy\ndata['micro_num'] = numpy.int64(3)\nadam['lr'] = numpy.float32(0.5)\n")
    loaded: Any = load(path)
    assert loaded.problems == []
    assert (loaded.config.data.micro_num, loaded.config.adam.lr) == (3, 0.5)
