"""`resolve`: problems of file, model and layout together, and the run on paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_ds.errors import ConfigError
from internlm_ds.layout.ranks import Layout
from internlm_ds.runspec import resolve

Write = Callable[..., Path]


def refusals(path: Path, world_size: int, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(path, overrides=overrides, world_size=world_size)
    return [str(problem) for problem in caught.value.problems]


def test_a_run_on_paper(write: Write) -> None:
    path = write()
    spec = resolve(path, world_size=4, overrides=["parallel.pipeline=2"])
    assert spec.layout == Layout(pipe=2, data=2, tensor=1, zero=2)
    assert (spec.batch.tokens_per_step, spec.batch.micro_num) == (64 * 2 * 4 * 2, 4)
    assert spec.arch is not None
    assert spec.arch.num_layers == 4
    assert (spec.path, spec.text) == (str(path), path.read_text())
    assert spec.warnings == ()


def test_families_without_a_blueprint_still_resolve(write: Write) -> None:
    path = write("model_type = 'INTERNLM_MoE'\n")
    assert resolve(path, world_size=2).arch is None


def test_tensor_must_divide_everything_at_once(write: Write, line_of: Callable[[Path, str], int]) -> None:
    path = write("", ("tensor=1", "tensor=3"))
    assert refusals(path, 8) == [
        f"parallel.tensor = 3 (line {line_of(path, 'tensor=3')}): must divide the world size = 8, "
        "model.num_attention_heads = 4 and the MLP width = 256; possible here: 1, 2, 4"
    ]
    (single,) = refusals(path, 12)
    assert single.endswith("must divide model.num_attention_heads = 4 and the MLP width = 256; possible here: 1, 2, 4")


def test_a_vocabulary_need_not_divide_by_tensor(write: Write) -> None:
    assert resolve(write(), overrides=["model.vocab_size=131", "parallel.tensor=4"], world_size=4).layout.tensor == 4


def test_sequence_parallelism_divides_the_tokens_of_a_micro_batch(write: Write) -> None:
    odd = ["parallel.tensor=4", "data.seq_len=33", "data.micro_bsz=2"]
    resolve(write(), overrides=odd, world_size=4)
    (found,) = refusals(write(), 4, *odd, "parallel.sequence_parallel=True")
    assert "must divide data.micro_bsz * data.seq_len = 66; possible here: 1, 2 (given with --set)" in found


def test_tensor_and_pipeline_that_only_together_do_not_divide_are_one_problem(write: Write) -> None:
    (found,) = refusals(write(), 8, "parallel.pipeline=4", "parallel.tensor=4")
    assert found.startswith("parallel.pipeline = 4: must divide world size / tensor = 8 / 4 = 2; possible here: 1, 2")


def test_possible_tensor_sizes_leave_room_for_the_pipeline(write: Write) -> None:
    (found,) = refusals(write(), 8, "parallel.pipeline=4", "parallel.tensor=3")
    assert found.endswith("possible here: 1, 2 (given with --set)")


@pytest.mark.parametrize(
    ("override", "world", "expected"),
    [
        (["parallel.zero1=3"], 8, "parallel.zero1 = 3: must divide data parallel = 8"),
        (["parallel.zero1=8"], 1, "parallel.zero1 = 8: must divide data parallel = 1"),
        (["parallel.pipeline=3"], 8, "parallel.pipeline = 3: must divide world size / tensor = 8 / 1 = 8"),
        (["parallel.pipeline=8"], 8, "parallel.pipeline = 8: must be at most model.num_layers = 4"),
        (["model.num_chunks=3", "parallel.pipeline=2"], 2, "model.num_chunks = 3: must divide model.num_layers = 4"),
        (["model.num_chunks=2", "parallel.pipeline=2", "data.micro_num=3"], 2,
         "data.micro_num = 3: must be divisible by the pipeline size = 2 when model.num_chunks > 1; nearest: 2 or 4"),
        (["data.rampup_batch_size=6 2 10"], 1, "data.rampup_batch_size = '6 2 10': the start must be at most"),
        (["model.num_attention_heads=5"], 1,
         "model.num_attention_heads = 5: must divide model.hidden_size = 64; nearest: 4 or 8 (given with --set)"),
        (["model.num_attention_heads=64"], 1, "model.num_attention_heads = 64: makes heads of 1 elements; rotary"),
        (["internlm_ds.pipeline_bounds=[0, 3]", "parallel.pipeline=2"], 2,
         "internlm_ds.pipeline_bounds = [0, 3]: needs 3 borders from 0 to model.num_layers = 4 for 2 stage(s), "
         "e.g. [0, 2, 4] (given with --set)"),
        (["internlm_ds.pipeline_bounds=[0, 2, 4]", "parallel.pipeline=2", "model.num_chunks=2"], 2,
         "internlm_ds.pipeline_bounds = [0, 2, 4]: needs 5 borders from 0 to model.num_layers = 4 for 4 stage(s)"),
        (["internlm_ds.pipeline_bounds=[0, 4]", "parallel.pipeline=8"], 8,
         "parallel.pipeline = 8: must be at most model.num_layers = 4"),
        (["parallel.tensor=1"], 0, "world size = 0: "),
    ],
)  # fmt: skip
def test_what_does_not_divide(write: Write, override: list[str], world: int, expected: str) -> None:
    (found,) = refusals(write(), world, *override)
    assert found.startswith(expected)


def test_borders_of_ones_own_need_not_be_even(write: Write) -> None:
    chunks = ("model.num_layers=5", "model.num_chunks=2", "parallel.pipeline=2", "data.micro_num=2")
    assert resolve(write(), overrides=[*chunks, "internlm_ds.pipeline_bounds=[0, 1, 2, 3, 5]"], world_size=2)
    assert refusals(write(), 2, *chunks)[0].startswith("model.num_chunks = 2: must divide model.num_layers = 5")


def test_problems_of_all_rooms_come_together(write: Write) -> None:
    path = write(
        "model['num_attention_heads'] = 5\n",
        ("micro_num=4", "micro_nun=4"),
        ("clip_grad_norm=1.0", "clip_grad_norn=1.0"),
        ('skip_batches=""', 'skip_batches="10-5"'),
        ("zero1=-1", "zero1=3"),
    )
    found = [message.split(" ")[0] for message in refusals(path, 8)]
    assert found == [
        "data.micro_nun",
        "data.skip_batches",
        "hybrid_zero_optimizer.clip_grad_norn",
        "model.num_attention_heads",
        "parallel.zero1",
    ]


@pytest.mark.parametrize(
    "mistakes",
    [
        ["data.micro_num=four", "data.rampup_batch_size=2 2 100"],
        ["model.hidden_size=wide", "model.num_attention_heads=48", "parallel.tensor=16"],
        ["parallel.pipeline=none", "parallel.zero1=3"],
        ["model.num_layers=few", "parallel.pipeline=8"],
    ],
)
def test_stand_ins_are_not_complained_of(write: Write, mistakes: list[str]) -> None:
    """Only the first override is wrong by itself; what is compared with its stand-in is left for the next run."""
    (found,) = refusals(write(), 16, *mistakes)
    assert found.startswith(mistakes[0].split("=")[0])


def test_a_copied_value_is_not_a_second_problem(write: Write) -> None:
    chunks = ("model.num_chunks=2", "parallel.pipeline=2", "data.micro_num=3")
    assert len(refusals(write(), 2, *chunks)) == 1
    assert len(refusals(write(), 2, *chunks, "data.valid_micro_num=5")) == 2


def test_the_file_of_a_base_problem_is_named(write: Write, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("\nparallel = dict(\n  zero1=3)\n")
    (found,) = refusals(write("from configs.base import parallel\n"), 8)
    assert found.startswith(f"parallel.zero1 = 3 ({tmp_path / 'configs' / 'base.py'}: line 3): must divide")


def test_the_error_names_the_file_and_counts(write: Write) -> None:
    path = write("", ("zero1=-1", "zero1=3"))
    with pytest.raises(ConfigError) as caught:
        resolve(path, world_size=8)
    assert str(caught.value).startswith(f"1 problem in {path}\n  parallel.zero1 = 3 (line ")
    assert caught.value.exit_code == 2
