"""Golden kind `config`: the tutorial's configuration, changed, as the reference resolves it; and parallel sizes.

The changes are written behind the tutorial's file, so that they reach us the way a user's would.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from cases import entries, golden_root
from deviations import config_deviation, zero1_deviation

from internlm_ds.config import load
from internlm_ds.config.execute import execute
from internlm_ds.config.schema import Config
from internlm_ds.errors import ConfigError, InternlmDsError
from internlm_ds.runspec import resolve
from internlm_ds.translate.deepspeed import translate

CRASHES = ("AttributeError", "KeyError", "TypeError")
UNUSED = ("batch_count", "alert_address", "only_load_lr")


def test_sanity_check(tmp_path: Path) -> None:
    base = _seed()
    for number, case in enumerate(entries("config", "sanity.json")):
        path = _changed(base, case["changes"], tmp_path / f"case{number}.py")
        deviation = config_deviation(execute(path).values)
        if deviation is not None and ("error" in case or load(path).problems):
            deviation(load(path))
        elif "error" not in case:
            _assert_resolved(path, case, deviation)
        elif not case["error"].startswith(CRASHES):
            assert _is_refused(path), f"the reference refuses {case['changes']}: {case['error']}"


def test_parallel_sizes(tmp_path: Path) -> None:
    base = _seed()
    for number, case in enumerate(entries("config", "parallel_sizes.json")):
        world, parallel, after = case["world"], case["parallel"], case["after"]
        if _mode(parallel) == "isp":
            continue  # weight parallelism does not exist yet
        path = _changed(base, _divisible(parallel), tmp_path / f"parallel{number}.py")
        deviation = config_deviation({"parallel": parallel})
        if "error" in after:
            if not after["error"].startswith(CRASHES):
                with pytest.raises(ConfigError, match="parallel"):
                    resolve(path, world_size=world)
            continue
        if deviation is not None:
            deviation(load(path))
            continue
        spec = resolve(path, world_size=world)
        found = {"dp": spec.layout.data, "pp": spec.layout.pipe, "tp": spec.layout.tensor, "zero1": spec.layout.zero}
        expected = {name: after[name] for name in found} | zero1_deviation(parallel, data=spec.layout.data)
        assert found == expected, parallel
        assert spec.config.parallel.sequence_parallel == after["parallel"]["sequence_parallel"], parallel
        assert spec.config.parallel.weight.size == after["wp"], parallel


def _seed() -> str:
    path = golden_root().parent / "seed" / "7B_sft.py"
    if not path.exists():
        pytest.skip(f"the golden cases change the tutorial's configuration, and {path} does not exist")
    return path.read_text(encoding="utf-8")


def _changed(base: str, changes: list[list[Any]], path: Path) -> Path:
    """The file with changes behind it: `["data.micro_num", 2]`, or `"__del__"` to take a key away."""
    lines = []
    for key, value in changes:
        name, *below = key.split(".")
        target = name + "".join(f"[{part!r}]" for part in below)
        lines.append(f"del {target}" if value == "__del__" else f"{target} = {value!r}")
    path.write_text("\n".join([base, *lines, ""]), encoding="utf-8")
    return path


def _assert_resolved(path: Path, case: dict[str, Any], deviation: Any) -> None:
    loaded = load(path)
    assert not loaded.problems, f"the reference accepts {case['changes']}: {loaded.problems}"
    written = {leaf.key: leaf.value for leaf in loaded.leaves if leaf.helper or leaf.note.startswith("old name")}
    assert loaded.config is not None
    excepted = deviation(loaded) if deviation is not None else ()
    for key, expected in _flat(case["result"]).items():
        if key in UNUSED or key in excepted:
            continue
        found = written[key] if key in written else _typed(loaded.config, key)
        expected = expected or None if key == "loss.label_smoothing" else expected
        assert _same(found, expected), f"{key} with {case['changes']}: {found!r}, the reference has {expected!r}"


def _typed(config: Config, key: str) -> Any:
    """The value of a dotted key, in the form that the reference keeps."""
    if key == "model.dtype":
        return f"torch.{config.model.dtype}"
    if key == "data.batch_size":
        return config.data.micro_num
    if key == "loss.label_smoothing":
        return config.loss.label_smoothing or None  # None and 0 are the same
    value: Any = config
    for part in key.lower().split(".") if key == "JOB_NAME" else key.split("."):
        value = getattr(value, part)
    if key.startswith("parallel.") and hasattr(value, "size"):
        return value.size
    return value


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return list(found) == expected
    if expected == "inf":
        return bool(found == math.inf)
    return bool(found == expected)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _is_refused(path: Path) -> bool:
    loaded = load(path)
    if loaded.problems:
        return True
    assert loaded.config is not None
    parallel = loaded.config.parallel
    world = parallel.tensor.size * parallel.pipeline.size
    try:
        translate(resolve(path, overrides=["parallel.zero1=-1"], world_size=world))
    except InternlmDsError:
        return True
    return False


def test_the_tutorial_itself_is_not_refused(tmp_path: Path) -> None:
    """The control of `_is_refused`: it does not refuse everything."""
    assert not _is_refused(_changed(_seed(), [], tmp_path / "seed.py"))


def _mode(parallel: dict[str, Any]) -> str:
    tensor = parallel.get("tensor")
    return str(tensor.get("mode", "mtp")) if isinstance(tensor, dict) else "mtp"


def _divisible(parallel: dict[str, Any]) -> list[list[Any]]:
    """The parallel dict, with a model that any of its sizes divides: the cases are about process groups alone."""
    tensor = parallel.get("tensor", 1)
    size = tensor.get("size", 1) if isinstance(tensor, dict) else tensor
    return [
        ["parallel", parallel],
        ["model.num_attention_heads", 2 * size],
        ["model.hidden_size", 256 * size],
        ["model.vocab_size", 512 * size],
        ["model.mlp_ratio", 1.0],
        ["model.num_layers", 128],
    ]


def test_four_mistakes_are_one_error_that_lists_all(tmp_path: Path) -> None:
    """Two misspelt keys, one of them required, a wrong range and a size that divides nothing."""
    text = _seed()
    for old, new in (
        ("    micro_num=4", "    micro_nun=4"),
        ("clip_grad_norm=", "clip_grad_norn="),
        ("    zero1=8,", "    zero1=8, tensor=3,"),
        ('skip_batches=""', 'skip_batches="10-5"'),
    ):
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "four.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        resolve(path, world_size=8)
    lines = text.splitlines()
    found = {problem.key: (str(problem), problem.line) for problem in caught.value.problems}
    assert sorted(found) == [
        "data.micro_nun",
        "data.skip_batches",
        "hybrid_zero_optimizer.clip_grad_norn",
        "parallel.tensor",
    ]
    for word, (message, line) in zip(("micro_nun", "10-5", "clip_grad_norn", "tensor=3"), found.values()):
        assert line is not None
        assert word in lines[line - 1]
        assert "did you mean" in message or "write" in message or "possible here: 1, 2, 4, 8" in message
