"""The stored table of DeepSpeed's key names against the installed package: derived afresh, and compared.

Regenerate after a DeepSpeed upgrade: `pytest tests/unit/translate/test_ds_schema.py --update-snapshots`.
"""

from __future__ import annotations

import dataclasses
import pprint
import typing
from enum import Enum
from pathlib import Path

import pytest

from internlm_ds.translate import ds_schema

deepspeed = pytest.importorskip("deepspeed")

from deepspeed.autotuning import constants as autotuning  # noqa: E402
from deepspeed.comm.config import CommsLoggerConfig  # noqa: E402
from deepspeed.compile.config import CompileConfig  # noqa: E402
from deepspeed.datastates.config import DATASTATES_CHECKPOINTING  # noqa: E402
from deepspeed.inference.config import WeightQuantConfig  # noqa: E402
from deepspeed.module_inject.auto_ep_config import AutoEPConfig  # noqa: E402
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig  # noqa: E402
from deepspeed.profiling import constants as profiling  # noqa: E402
from deepspeed.runtime import config as ds_config  # noqa: E402
from deepspeed.runtime import constants  # noqa: E402
from deepspeed.runtime.activation_checkpointing import config as activation  # noqa: E402
from deepspeed.runtime.data_pipeline import constants as data_pipeline  # noqa: E402
from deepspeed.runtime.model_checkpointing import constants as checkpointing  # noqa: E402
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # noqa: E402
from deepspeed.runtime.swap_tensor import constants as swap  # noqa: E402
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig  # noqa: E402

FREE: dict[str, typing.Any] = {"*": "any"}


def derive() -> dict[str, typing.Any]:
    """Every key that DeepSpeed reads from its JSON: from its pydantic classes, and from its constants elsewhere."""
    c, top = constants, {}
    for name in (
        c.TRAIN_BATCH_SIZE,
        c.TRAIN_MICRO_BATCH_SIZE_PER_GPU,
        c.GRADIENT_ACCUMULATION_STEPS,
        c.STEPS_PER_PRINT,
        c.VOCABULARY_SIZE,
    ):
        top[name] = "int"
    for name in (c.GRADIENT_CLIPPING, c.GRADIENT_PREDIVIDE_FACTOR):
        top[name] = "number"
    for name in (
        c.MANAGED_GRADIENT_ACCUMULATION,
        c.DUMP_STATE,
        c.DISABLE_PYTHON_GC,
        c.DISABLE_ALLGATHER,
        c.PRESCALE_GRADIENTS,
        c.ZERO_ALLOW_UNTESTED_OPTIMIZER,
        c.ZERO_FORCE_DS_CPU_OPTIMIZER,
        c.WALL_CLOCK_BREAKDOWN,
        c.MEMORY_BREAKDOWN,
        c.USE_DATA_BEFORE_EXPERT_PARALLEL,
        c.DATALOADER_DROP_LAST,
    ):
        top[name] = "bool"
    for name in (
        c.COMMUNICATION_DATA_TYPE,
        c.SEQ_PARALLEL_COMMUNICATION_DATA_TYPE,
        c.GRADIENT_ALLREDUCE_OP,
        c.LOG_LEVEL,
    ):
        top[name] = "str"
    for name in ("sequence_parallel_size", "data_parallel_size"):  # read by deepspeed.initialize for its device mesh
        top[name] = "int"
    top[c.OPTIMIZER] = {c.TYPE: "str", c.OPTIMIZER_PARAMS: FREE, c.LEGACY_FUSION: "bool"}
    top[c.SCHEDULER] = {c.TYPE: "str", c.SCHEDULER_PARAMS: FREE}
    top["zero_optimization"] = of_model(DeepSpeedZeroConfig)
    top[c.FP16] = of_model(DeepSpeedFP16Config)
    top[c.BFLOAT16] = top[c.BFLOAT16_OLD] = of_model(DeepSpeedBF16Config)
    top[c.TORCH_AUTOCAST] = {
        c.TORCH_AUTOCAST_ENABLED: "bool",
        c.TORCH_AUTOCAST_DTYPE: "str",
        c.TORCH_AUTOCAST_LOWER_PRECISION_SAFE_MODULES: "list",
    }
    top[c.DATA_TYPES] = {
        c.GRAD_ACCUM_DTYPE: "str",
        c.PARAM_DTYPE: "str",
        c.BUFFER_DTYPE: "str",
        c.KEEP_IN_FP32_MODULES: "any",
    }
    top[c.CHECKPOINT] = {
        c.CHECKPOINT_TAG_VALIDATION: "str",
        c.LOAD_UNIVERSAL_CHECKPOINT: "bool",
        c.USE_NODE_LOCAL_STORAGE_CHECKPOINT: "bool",
        c.CHECKPOINT_PARALLEL_WRITE: {c.CHECKPOINT_PARALLEL_WRITE_PIPELINE_STAGE: "bool"},
        checkpointing.CHECKPOINT_SERIALIZATION: "bool",
        checkpointing.CHECKPOINT_WRITER: of_constants(
            checkpointing, "CHECKPOINT_WRITER_TYPE CHECKPOINT_WRITER_DECOUPLED CHECKPOINT_IO_ CHECKPOINT_DATA_PARALLEL"
        ),
    }
    default_pipeline = ds_config.get_pipeline_config({})
    top["pipeline"] = {
        **{name: tag_of_value(value) for name, value in default_pipeline.items()},
        "use_reentrant": "bool",
    }
    top[activation.ACT_CHKPT] = {name: tag_of_value(value) for name, value in activation.ACT_CHKPT_DEFAULT.items()}
    top["comms_logger"] = of_model(CommsLoggerConfig)
    for name, model in (
        ("tensorboard", TensorBoardConfig),
        ("wandb", WandbConfig),
        ("csv_monitor", CSVConfig),
        ("comet", CometConfig),
    ):
        top[name] = of_model(model)
    top[profiling.FLOPS_PROFILER] = of_constants(profiling, "FLOPS_PROFILER_")
    top[autotuning.AUTOTUNING] = {
        **of_constants(autotuning, "AUTOTUNING_"),
        autotuning.MODEL_INFO: of_constants(autotuning, "MODEL_INFO_"),
    }
    top[autotuning.AUTOTUNING][autotuning.AUTOTUNING_ARG_MAPPINGS] = FREE
    top["hybrid_engine"] = of_model(ds_config.HybridEngineConfig)
    top[data_pipeline.DATA_EFFICIENCY] = data_efficiency()
    top[swap.AIO] = of_constants(swap, "AIO_")
    top[DATASTATES_CHECKPOINTING] = FREE
    top["weight_quantization"] = of_model(WeightQuantConfig)
    top["compile"] = of_model(CompileConfig)
    top["timers"] = {"throughput": of_model(DeepSpeedThroughputTimerConfig)}
    top["tensor_parallel"] = of_model(TPTrainingConfig)
    top[ds_config.EXPERT_PARALLEL] = {
        f.name: "any" for f in dataclasses.fields(AutoEPConfig) if not f.name.startswith("_")
    }
    return top


def data_efficiency() -> dict[str, typing.Any]:
    d = data_pipeline
    curriculum = {d.CURRICULUM_LEARNING_ENABLED: "bool", "*": "any"}  # metric names are the user's
    sampling = {
        d.DATA_SAMPLING_ENABLED: "bool",
        d.DATA_SAMPLING_NUM_EPOCHS: "int",
        d.DATA_SAMPLING_NUM_WORKERS: "int",
        d.DATA_SAMPLING_PIN_MEMORY: "bool",
        d.CURRICULUM_LEARNING: curriculum,
        d.DYNAMIC_BATCHING: {
            **of_constants(d, "DYNAMIC_BATCHING_"),
            d.DYNAMIC_BATCHING_METRICS_PATH: "any",
            d.DYNAMIC_BATCHING_MAX_TOKENS: "int",
            d.DYNAMIC_BATCHING_VERBOSE: "bool",
        },
    }
    routing = {d.DATA_ROUTING_ENABLED: "bool", d.RANDOM_LTD: {d.RANDOM_LTD_ENABLED: "bool", "*": "any"}}
    return {
        d.DATA_EFFICIENCY_ENABLED: "bool",
        d.DATA_EFFICIENCY_SEED: "int",
        d.DATA_SAMPLING: sampling,
        d.DATA_ROUTING: routing,
    }


def of_model(model: type) -> dict[str, typing.Any]:
    """Names and aliases of a pydantic class; a field that is such a class itself becomes a section."""
    found: dict[str, typing.Any] = {}
    for name, field in model.model_fields.items():
        tag = tag_of_type(field.annotation)
        found[name] = tag
        if field.alias:
            found[field.alias] = tag
    return found


def tag_of_type(annotation: typing.Any) -> typing.Any:
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    origin = typing.get_origin(annotation)
    if origin is typing.Union and len(parts) == 1:
        return tag_of_type(parts[0])
    if origin in (list, tuple) or annotation in (list, tuple):
        return "list"
    if origin is dict or annotation in (dict, typing.Dict):  # noqa: UP006
        return FREE
    if origin is typing.Literal:
        return "str"
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return of_model(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "int" if issubclass(annotation, int) else "str"
    return {bool: "bool", int: "int", float: "number", str: "str", Path: "str"}.get(annotation, "any")


def of_constants(module: typing.Any, prefixes: str) -> dict[str, str]:
    """Names held by constants `PREFIX…` of a module; its `…_DEFAULT` beside each gives the type."""
    found = {}
    for constant, value in vars(module).items():
        if not isinstance(value, str) or not constant.startswith(tuple(prefixes.split())):
            continue
        if f"{constant}_DEFAULT" in vars(module):
            found[value] = tag_of_value(vars(module)[f"{constant}_DEFAULT"])
    return found


def tag_of_value(value: typing.Any) -> str:
    for kind, tag in ((bool, "bool"), (int, "int"), (float, "number")):
        if isinstance(value, kind):
            return tag
    return "any"


def render(table: dict[str, typing.Any]) -> str:
    return pprint.pformat(table, width=116, sort_dicts=True)


def test_stored_table_is_that_of_the_installed_deepspeed(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-snapshots", default=False):
        path = Path(ds_schema.__file__)
        head = path.read_text(encoding="utf-8").split("KEYS: Section = ")[0]
        path.write_text(f"{head}KEYS: Section = {render(derive())}\n", encoding="utf-8")
        pytest.skip("table rewritten; run `ruff format` on it")
    assert render(ds_schema.KEYS) == render(derive())


def test_version_is_the_one_it_was_derived_from() -> None:
    assert deepspeed.__version__.split("+")[0] == ds_schema.DEEPSPEED_VERSION


def test_removed_keys_are_those_of_the_installed_deepspeed() -> None:
    assert set(ds_schema.REMOVED[""]) == set(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(ds_schema.REMOVED["zero_optimization"]) == set(ds_config._REMOVED_ZERO_CONFIG_KEYS)


class Recorder(dict):
    """A dict that remembers which keys were asked of it."""

    def __init__(self, *args: typing.Any):
        super().__init__(*args)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: typing.Any = None) -> typing.Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):  # type: ignore[no-untyped-def]
        outer = self

        class View:
            def __contains__(self, key: object) -> bool:
                return key in outer

            def __iter__(self):  # type: ignore[no-untyped-def]
                return iter(list(dict.keys(outer)))

        return View()

    def __copy__(self) -> Recorder:
        twin = Recorder(self)
        twin.asked = self.asked
        return twin


def test_every_top_level_key_deepspeed_asks_for_is_in_the_table() -> None:
    asked = Recorder({"train_micro_batch_size_per_gpu": 1})
    ds_config.DeepSpeedConfig(asked)
    unknown = asked.asked - set(ds_schema.KEYS) - set(ds_schema.REMOVED[""])
    assert not unknown
    assert len(asked.asked) > 40
