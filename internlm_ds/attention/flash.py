"""Packed attention by Tri Dao's packages: CUDA, half precision, all segments in one kernel.

Three generations go by one word: flash-attn 2 (`flash_attn`), 3 (`flash_attn_interface`, Hopper) and 4
(`flash_attn.cute`, Hopper and Blackwell). `find` takes the best one that is installed, loads, fits and passes a trial.
Their functions agree on tensors and borders and differ in what else they can be told, which is asked of them. Sources:
the signatures in flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py, flash_attn/cute/interface.py.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm_ds.attention import kernels
from internlm_ds.attention.kernels import Setting, Unfit
from internlm_ds.attention.segments import Segments

ABSENT = "flash-attn is not installed; pip install 'internlm-ds[flash]'"


@dataclass(frozen=True)
class Generation:
    """One of the packages.

    Attributes:
        number: 2, 3 or 4.
        module: Where `flash_attn_varlen_func` is.
        package: As pip calls it.
        capabilities: Major compute capabilities that it is chosen on.
        deterministic_on: Those of them where its backward can be asked for the same bits each time.
        largest_head, multiple: Heads are at most so wide, and a multiple of that.
        dropout: Whether it drops attention weights.
    """

    number: int
    module: str
    package: str
    capabilities: tuple[int, ...]
    deterministic_on: tuple[int, ...]
    largest_head: int = 256
    multiple: int = 8
    dropout: bool = False

    @property
    def name(self) -> str:
        return f"flash-attn {self.number}"

    @property
    def installed(self) -> bool:
        """Whether the module's file is there; it may still fail to load."""
        try:
            found = importlib.util.find_spec(self.module)
        except ValueError:
            return True  # loaded without a spec
        except Exception:  # of the package around it: absent, or broken itself, which its own generation reports
            return False
        return found is not None and found.origin is not None

    def unfit(self, setting: Setting) -> str | None:
        """Why it is not for this setting, though it may be installed; None when it fits."""
        if setting.capability not in self.capabilities:
            return f"not for compute capability {setting.capability}.x"
        if setting.head_dim > self.largest_head or setting.head_dim % self.multiple:
            return f"not for heads of {setting.head_dim}"
        if setting.dropout and not self.dropout:
            return "has no dropout (model.attn_drop_rate)"
        if setting.deterministic and setting.capability not in self.deterministic_on:
            return "has no deterministic backward here"
        return None


GENERATIONS = (
    Generation(3, "flash_attn_interface", "flash-attn-3", (9,), (9,)),
    Generation(4, "flash_attn.cute", "flash-attn-4", (9, 10, 11), (10, 11), largest_head=128),
    Generation(2, "flash_attn", "flash-attn", (8, 9, 10, 11, 12), (8, 9, 10, 11, 12), multiple=1, dropout=True),
)
"""The best first."""


@dataclass(frozen=True)
class Kernel:
    """A generation that was loaded.

    Attributes:
        generation: Which.
        version: Of the package, `2.8.3`.
        function: Its `flash_attn_varlen_func`.
        deterministic: Whether its backward is asked for the same bits each time.
        names: Names of what `function` takes.
    """

    generation: Generation
    version: str
    function: Callable[..., Any]
    deterministic: bool
    names: frozenset[str]

    @property
    def words(self) -> str:
        return f"{self.generation.name} ({self.version})" + (", deterministic" if self.deterministic else "")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
        """As `attention.reference.attend`, in half precision on a CUDA device."""
        options: dict[str, Any] = {"causal": True}
        if "max_seqlen_q" in self.names:
            options |= {"max_seqlen_q": segments.max_seqlen, "max_seqlen_k": segments.max_seqlen}
        if dropout:
            options["dropout_p"] = dropout
        if self.deterministic:
            options["deterministic"] = True
        borders = segments.cu_seqlens
        found = self.function(q, k, v, cu_seqlens_q=borders, cu_seqlens_k=borders, **options)
        return found[0] if isinstance(found, tuple) else found  # some versions add the logarithms of the sums


def find(setting: Setting, generations: Sequence[Generation] = GENERATIONS) -> tuple[Kernel, str]:
    """The first of these that can run here, and in words what kept a better one away (usually nothing).

    Raises:
        Unfit: None can run; with the reason and a remedy.
    """
    kernels.check_flash("flash-attn", setting)
    reasons = []
    for generation in (g for g in generations if g.installed):
        why = generation.unfit(setting)
        if why is None:
            try:
                kernel = load(generation, deterministic=setting.deterministic)
                kernels.trial(kernel.attend, setting)
                return kernel, "; ".join(reasons)
            except Exception as error:  # a broken package may raise anything
                why = f"does not work: {kernels.on_one_line(error)}; {_remedy(generation)}"
        elif setting.capability not in generation.capabilities:
            continue  # made for another device: not worth a word while there are others
        reasons.append(f"{generation.name} {why}")
    raise Unfit("; ".join(reasons) or _nothing(setting, generations))


def load(generation: Generation, *, deterministic: bool = False) -> Kernel:
    """Import a generation.

    Raises:
        Exception: Whatever its import raises; AttributeError where it lacks the function; Unfit where it is too old
            for a deterministic backward.
    """
    function = importlib.import_module(generation.module).flash_attn_varlen_func
    names = frozenset(inspect.signature(function).parameters)
    if deterministic and "deterministic" not in names:
        raise Unfit("this version has no deterministic backward")
    return Kernel(generation, _version(generation), function, deterministic, names)


def _nothing(setting: Setting, generations: Sequence[Generation]) -> str:
    others = [f"{g.name} is not for compute capability {setting.capability}.x" for g in generations if g.installed]
    return "; ".join(others) or ABSENT


def _version(generation: Generation) -> str:
    try:
        return importlib.metadata.version(generation.package)
    except importlib.metadata.PackageNotFoundError:
        module = importlib.import_module(generation.module)
        return str(getattr(module, "__version__", "version unknown"))


def _remedy(generation: Generation) -> str:
    cuda = f" and CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return (
        f"reinstall it for torch {torch.__version__}{cuda} (pip install --no-build-isolation --force-reinstall "
        f"--no-deps {generation.package}) or uninstall it"
    )
