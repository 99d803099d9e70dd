"""A start without torch's compiler, which DeepSpeed and torch load on the way to a step that compiles nothing.

Loading `torch._dynamo`, its back end and sympy takes longer than torch and DeepSpeed themselves. Functions of torch
load it only to tell it to keep out of them; DeepSpeed compiles the kernels of Muon to ask whether an AdamW is one. Its
search for operators that it could build runs a C compiler besides. Everything here leaves results as they are; where
torch or DeepSpeed look different from what is expected, it does nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.ops
import deepspeed.runtime.compiler
import torch
import torch.utils.checkpoint

# torch's mark on a function: what to call in its place, once the compiler was asked to keep out of it
_MARK = "__dynamo_disable"


def spare_the_compiler() -> None:
    """For a run that compiles nothing, before its engine is built."""
    if "torch._dynamo" in sys.modules:
        return  # somebody compiles after all
    optimizer = torch.optim.Optimizer
    functions = [optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict]
    for function in (*functions, torch.utils.checkpoint.checkpoint):
        _nothing_to_disable(function)
    with _compiling_nothing(), contextlib.suppress(ImportError):
        # once in sys.modules it is found there by DeepSpeed, whose Muon is not ours to use: the optimizer is `adamw`
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def spare_the_search_for_operators() -> dict[str, bool]:
    """DeepSpeed's table of the operators that it could build, empty where it was not made yet.

    Only the shared-memory operator of the CPU is ever looked up in it.
    """
    return vars(deepspeed.ops).setdefault("__compatible_ops__", {})


def _nothing_to_disable(function: Callable[..., Any]) -> None:
    """Let a function marked by `torch._disable_dynamo` run as it is, without loading the compiler to be kept out."""
    inner = getattr(function, "__wrapped__", None)
    if inner is not None and getattr(inner, _MARK, None) is None:
        setattr(inner, _MARK, inner)


@contextlib.contextmanager
def _compiling_nothing() -> Iterator[None]:
    """DeepSpeed's `@compiler.compile()` leaves functions as they are."""
    module: Any = deepspeed.runtime.compiler
    before = getattr(module, "compile", None)
    module.compile = lambda: lambda function: function
    try:
        yield
    finally:
        module.compile = before
