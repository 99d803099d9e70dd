"""What a run must resume, as files without pickle: plain values in strict JSON, tensors beside them in safetensors.

Owns the way from Python values to JSON and back, so that each value returns as it was: floats bit by bit (Python
writes the shortest text that reads back equal), tuples as tuples, infinities and NaN (which strict JSON has not),
numpy arrays and torch tensors. What is in a train state is the engine's and the loader's business.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import torch

_TAGS = ("$tuple", "$float", "$array", "$tensor", "$bytes", "$items")


def dumps(value: Any, tensors: dict[str, torch.Tensor] | None = None) -> str:
    """`value` as strict JSON; torch tensors go to `tensors` under a name that the text refers to.

    Raises:
        TypeError: A value of a kind that is not covered (nothing is ever pickled), or a tensor where `tensors` is None.
    """
    return json.dumps(_encode(value, "", tensors), allow_nan=False, indent=1)


def loads(text: str, tensors: dict[str, torch.Tensor] | None = None) -> Any:
    """The value that `dumps` was given."""
    return _decode(json.loads(text), tensors or {})


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor] | None) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return _encode_dict(value, path, tensors)
    return _encode_array(value, path, tensors)


def _encode_dict(value: dict[Any, Any], path: str, tensors: dict[str, torch.Tensor] | None) -> Any:
    if all(isinstance(key, str) for key in value) and not any(key in _TAGS for key in value):
        return {key: _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
    pairs = [[_encode(k, path, None), _encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]
    return {"$items": pairs}


def _encode_array(value: Any, path: str, tensors: dict[str, torch.Tensor] | None) -> Any:
    if isinstance(value, torch.Tensor):
        if tensors is None:
            raise TypeError(f"a tensor at {path or '/'} has no place in this file")
        tensors[path or "/"] = value
        return {"$tensor": path or "/"}
    dtype = getattr(value, "dtype", None)
    if dtype is not None and dtype.kind in "biuf":
        if value.ndim == 0:
            return _encode(value.item(), path, tensors)
        return {"$array": [_encode(item, path, tensors) for item in value.reshape(-1).tolist()], **_array_type(value)}
    raise TypeError(f"{type(value).__name__} at {path or '/'} cannot be written without pickle")


def _array_type(value: Any) -> dict[str, Any]:
    return {"dtype": value.dtype.str, "shape": list(value.shape)}


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    if "$float" in value:
        return float(value["$float"])
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$array" in value:
        import numpy as np

        items = [_decode(item, tensors) for item in value["$array"]]
        return np.array(items, dtype=np.dtype(value["dtype"])).reshape(value["shape"])
    if "$items" in value:
        return {_decode(k, tensors): _decode(v, tensors) for k, v in value["$items"]}
    return {key: _decode(item, tensors) for key, item in value.items()}
