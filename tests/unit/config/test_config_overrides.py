"""`--set`: constants while the file runs, dotted paths afterwards, and what is wrong with an override."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.config import Loaded, load
from internlm_ds.config.overrides import apply, parse, read_value
from internlm_ds.config.schema import Config

Write = Callable[..., Path]


def good(path: Path, *overrides: str) -> Config:
    loaded = load(path, overrides)
    assert not loaded.problems, loaded.problems
    assert loaded.config is not None
    return loaded.config


def problems(loaded: Loaded) -> list[str]:
    return [str(problem) for problem in loaded.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("1e-4", 1e-4), ("'4'", "4"), ("True", True), ("None", None), ("local:x", "local:x"), ("a=b", "a=b"),
     ("{'size': 2}", {"size": 2}), ("inf", math.inf), ("float('inf')", math.inf), ('float("-inf")', -math.inf),
     (" 3 ", 3), ("", ""), ("[1, 2]", [1, 2]), ("2**16", "2**16")],
)  # fmt: skip
def test_values_are_literals_else_strings(text: str, value: Any) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.tuples(v), max_leaves=5
    )
)
def test_any_literal_comes_back(value: Any) -> None:
    assert read_value(repr(value)) == value


def test_a_constant_is_followed_by_what_is_computed_from_it(write: Write) -> None:
    loaded = load(write(), ["SEQ_LEN=128"])
    assert loaded.config is not None
    assert (loaded.config.data.seq_len, loaded.config.data.packed_length) == (128, 256)
    leaves = {leaf.key: leaf for leaf in loaded.leaves}
    assert (leaves["SEQ_LEN"].value, leaves["SEQ_LEN"].origin, leaves["SEQ_LEN"].line) == (128, "override", None)
    assert leaves["data.seq_len"].origin == "file"


def test_dotted_paths_apply_afterwards_and_the_last_one_wins(write: Write) -> None:
    loaded = load(write(), ["data.micro_num=2", "data.micro_num=8", "model.num_layers=2"])
    assert loaded.config is not None
    assert (loaded.config.data.micro_num, loaded.config.model.num_layers) == (8, 2)
    leaf = next(leaf for leaf in loaded.leaves if leaf.key == "data.micro_num")
    assert (leaf.value, leaf.origin, leaf.line) == (8, "override", None)


def test_known_keys_that_the_file_lacks(write: Write) -> None:
    config = good(write(), "data.min_length=7", "cudnn_benchmark=True", "monitor.alert.alert_file_path=x", "JOB_NAME=j")
    assert (config.data.min_length, config.cudnn_benchmark, config.job_name) == (7, True, "j")
    assert config.monitor.alert.alert_file_path == "x"
    assert good(write(), "internlm_ds.compat.mlp_names='2023'").internlm_ds.compat.mlp_names == "2023"
    assert good(write(), "deepspeed.zero_optimization.x=1").deepspeed == {"zero_optimization": {"x": 1}}


def test_a_leaf_may_become_a_dict_and_back(write: Write) -> None:
    path = write()
    tensor = good(path, "parallel.tensor={'size': 2, 'mode': 'msp'}").parallel.tensor
    assert (tensor.size, tensor.mode) == (2, "msp")
    assert good(path, "parallel.pipeline=2").parallel.pipeline.size == 2
    tensor = good(path, "parallel.tensor=2", "parallel.tensor.mode=msp").parallel.tensor
    assert (tensor.size, tensor.mode) == (2, "msp")
    assert good(path, "parallel.zero1.size=1").parallel.zero1.size == 1


def test_a_whole_section_can_be_given(write: Write) -> None:
    assert good(write(), "parallel={'tensor': 2}").parallel.tensor.size == 2


@pytest.mark.parametrize("argument", ["data.micro_num", "=3", "data..x=3", ".x=3", "a b=3"])
def test_arguments_that_are_no_assignment(write: Write, argument: str) -> None:
    expected = f"--set {argument}: write KEY=VALUE, e.g. --set data.micro_num=2 or --set SEQ_LEN=4096"
    assert problems(load(write(), [argument])) == [expected]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("SEQ_LENN=3", "SEQ_LENN = 3: unknown key; did you mean SEQ_LEN? (given with --set)"),
        ("dta.micro_num=3", "dta.micro_num = 3: unknown key; did you mean data? (given with --set)"),
        ("data.micro_nun=3", "data.micro_nun = 3: unknown key; did you mean micro_num? (given with --set)"),
        ("data.micro_num=0", "data.micro_num = 0: must be an integer of at least 1 (given with --set)"),
        ("data.micro_num.x=0",
         "data.micro_num.x = 0: data.micro_num = 4 is no dict, so nothing below it can be set"),
        ("data=3", "data = 3: must be a dict, e.g. data = dict(...) (given with --set)"),
        ("deepspeed=3",
         "deepspeed = 3: must be a dict of DeepSpeed's own keys, e.g. deepspeed = dict(...) (given with --set)"),
    ],
)  # fmt: skip
def test_wrong_overrides_are_problems_that_say_so(write: Write, argument: str, expected: str) -> None:
    assert problems(load(write(), [argument])) == [expected]


def test_a_parted_schedule_is_warned_of(write: Write, line_of: Callable[[Path, str], int]) -> None:
    path = write()
    line = line_of(path, "lr_scheduler")
    assert load(path, ["data.total_steps=20"]).warnings == [
        f"lr_scheduler.total_steps = 100 (line {line}) no longer equals data.total_steps = 20: the schedule is made "
        "for another length; to keep them equal add --set lr_scheduler.total_steps=20"
    ]
    assert load(path, ["data.total_steps=20", "lr_scheduler.total_steps=20"]).warnings == []
    other = write("lr_scheduler['total_steps'] = 90\n")
    assert load(other, ["data.total_steps=20"]).warnings == []


def test_a_parted_beta2_is_warned_of(write: Write) -> None:
    (warning,) = load(write(), ["adam.adam_beta2=0.9"]).warnings
    assert "beta2_scheduler.init_beta2 = 0.95 (line " in warning
    assert warning.endswith("add --set beta2_scheduler.init_beta2=0.9")


def test_applying_changes_nothing_in_place() -> None:
    values = {"data": {"micro_num": 4}}
    changed, found = apply(values, parse(["data.micro_num=2", "data.new.deep=1"]).dotted)
    assert (values, found) == ({"data": {"micro_num": 4}}, [])
    assert changed == {"data": {"micro_num": 2, "new": {"deep": 1}}}
