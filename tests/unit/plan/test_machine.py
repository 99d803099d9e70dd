"""What a machine cannot run, all of it at once, and what is suggested instead: which must then work."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from internlm_ds.errors import ConfigError, MachineError, Problem, TranslationError
from internlm_ds.plan.machine import MachineFacts, resolve_here, shipped_config, suggestion

MODEL_CONFIGS = Path(__file__).resolve().parents[3] / "model_configs"
LAPTOP = MachineFacts(gpu_count=0, gpu_memory_bytes=0, host_memory_bytes=24_000_000_000, world_size=1, fp16_ok=False)
SERVER = MachineFacts(
    gpu_count=8, gpu_memory_bytes=80_000_000_000, host_memory_bytes=10**12, world_size=8, fp16_ok=True
)


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    """The tutorial's model with its `zero1=8`, and a checkpoint to start from that is not there."""
    text = (MODEL_CONFIGS / "7b.py").read_text(encoding="utf-8")
    text = text.replace("zero1=-1, tensor=1", "zero1=8, tensor=1")
    path = tmp_path / "seed.py"
    path.write_text(text.replace("    # load_ckpt_info", "    load_ckpt_info"), encoding="utf-8")
    return path


def follow(words: str, facts: MachineFacts) -> None:
    """Resolve with the arguments that were suggested."""
    arguments = shlex.split(words)
    assert arguments[0] == "--config"
    overrides = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
    overlays = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--overlay"]
    resolve_here(arguments[1], facts=facts, overrides=overrides, overlays=overlays)


def test_all_obstacles_in_one_error_with_a_way_out(tutorial: Path) -> None:
    missing = Problem("ckpt.load_ckpt_info.path", "does not exist", "local:x", 31)
    with pytest.raises(MachineError) as error:
        resolve_here(tutorial, facts=LAPTOP, extra=[missing])
    text = str(error.value)
    assert error.value.exit_code == 2
    assert [p.key for p in error.value.problems] == ["model.dtype", "parallel.zero1", "memory", missing.key]
    assert "cannot run on this machine (no GPU, 24.00 GB of memory, 1 process): 4 obstacles" in text
    assert "(line " in text and "-1 for all of it" in text and "in host memory" in text
    works = text.splitlines()[-1]
    assert works.startswith("this works here: python launch/pretrain.py --config ")
    follow(works.partition("pretrain.py ")[2], LAPTOP)


def test_the_right_machine_has_no_obstacles(tutorial: Path) -> None:
    spec, translation = resolve_here(tutorial, facts=SERVER)
    assert spec.layout.zero == 8 and translation.ds_config["train_batch_size"] == 64


def test_overrides_are_suggested_where_they_are_enough(tutorial: Path) -> None:
    small = ["HIDDEN_SIZE=64", "NUM_LAYER=2", "VOCAB_SIZE=512", "NUM_ATTENTION_HEAD=4"]
    words = suggestion(tutorial, LAPTOP, overrides=small)
    assert words is not None
    assert "--set model.dtype=torch.float32" in words and "--set parallel.zero1=-1" in words
    assert "--set ckpt.load_ckpt_info=None" in words
    follow(words, LAPTOP)


def test_flash_kernels_need_a_gpu(tutorial: Path) -> None:
    small = ["HIDDEN_SIZE=64", "NUM_LAYER=2", "VOCAB_SIZE=512", "NUM_ATTENTION_HEAD=4", "model.dtype=torch.bfloat16"]
    asked = [*small, "parallel.zero1=-1", "internlm_ds.attention=flash"]
    with pytest.raises(MachineError) as error:
        resolve_here(tutorial, facts=LAPTOP, overrides=asked)
    (problem,) = error.value.problems
    assert str(problem) == (
        "internlm_ds.attention = 'flash': needs a GPU and this machine has none; "
        '"auto", "sdpa" and "reference" run here'
    )
    works = str(error.value).splitlines()[-1]
    assert "--set internlm_ds.attention=auto" in works
    follow(works.partition("pretrain.py ")[2], LAPTOP)


def test_a_large_model_gets_recomputation_on_a_small_card(tutorial: Path) -> None:
    card = replace(SERVER, gpu_memory_bytes=60_000_000_000)
    with pytest.raises(MachineError) as error:
        resolve_here(tutorial, facts=card)
    assert [problem.key for problem in error.value.problems] == ["memory"]
    works = str(error.value).splitlines()[-1]
    assert works.startswith("this works here: the same launcher with launch/pretrain.py ")
    assert "--set model.checkpoint=True" in works
    follow(works.partition("pretrain.py ")[2], card)


def test_pipeline_that_does_not_divide(tmp_path: Path) -> None:
    three = replace(LAPTOP, world_size=3)
    with pytest.raises(MachineError) as error:
        resolve_here(MODEL_CONFIGS / "debug_cpu.py", facts=three, overrides=["parallel.pipeline=2"])
    assert "must divide the number of processes = 3" in str(error.value)
    follow(str(error.value).splitlines()[-1].partition("pretrain.py ")[2], three)


def test_more_processes_than_devices() -> None:
    crowded = replace(SERVER, gpu_count=2)
    with pytest.raises(MachineError, match="8 processes on 2 GPUs; start one per GPU"):
        resolve_here(MODEL_CONFIGS / "debug_cpu.py", facts=crowded)
    two_nodes = replace(SERVER, gpu_count=4, processes_here=4)
    resolve_here(MODEL_CONFIGS / "debug_cpu.py", facts=two_nodes)


def test_ranks_of_one_machine_share_its_memory() -> None:
    tight = replace(LAPTOP, host_memory_bytes=1_500_000_000)
    resolve_here(MODEL_CONFIGS / "debug_cpu.py", facts=tight)
    with pytest.raises(MachineError, match=r"has 0\.38 GB in host memory"):
        resolve_here(MODEL_CONFIGS / "debug_cpu.py", facts=replace(tight, world_size=4))


def test_nothing_smaller() -> None:
    hopeless = replace(LAPTOP, host_memory_bytes=1_000_000)
    with pytest.raises(MachineError, match="nothing smaller was found"):
        resolve_here(MODEL_CONFIGS / "debug_cpu.py", facts=hopeless)


def test_a_wrong_file_is_not_the_machines_fault(tmp_path: Path) -> None:
    text = (MODEL_CONFIGS / "debug_cpu.py").read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace("micro_num=2", "micro_nun=2").replace("zero1=-1", "zero1=8"), encoding="utf-8")
    with pytest.raises(ConfigError, match="micro_nun"):
        resolve_here(wrong, facts=LAPTOP)


def test_what_no_machine_can_do_is_a_translation_error() -> None:
    with pytest.raises(TranslationError, match="reward models"):
        resolve_here(MODEL_CONFIGS / "debug_cpu.py", facts=LAPTOP, overrides=["model.is_reward=True"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_shipped_fallback_runs_with_any_number_of_processes(world_size: int) -> None:
    path = shipped_config()
    assert path is not None
    resolve_here(path, facts=replace(LAPTOP, world_size=world_size))
