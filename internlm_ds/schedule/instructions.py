"""The words a pipeline schedule is written in: what one stage does, one small value after the other, without tensors.

Which stage says which words in which order is `orders`' and `lists`'; carrying them out is `engine`'s.

A message is named by the place it comes to: `SendActivation` names the chunk and micro-batch that was computed,
`RecvActivation` those that it is for. Receiving means to be ready for a message; what needs it waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One thing a stage does."""


@dataclass(frozen=True)
class Work(Instruction):
    """Something done for one micro-batch in one chunk of the stage's layers.

    Attributes:
        micro_batch: From 0, in the order of the step's data.
        chunk: From 0, in the order of computation.
    """

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class Load(Work):
    """Fetch from the data what this chunk needs: inputs where the model starts, labels where it ends."""


@dataclass(frozen=True)
class Forward(Work):
    """Compute the chunk's output; the loss where the model ends."""


@dataclass(frozen=True)
class Backward(Work):
    """Compute the gradient of the chunk's input and of its parameters (linear weights only if nothing defers them)."""


@dataclass(frozen=True)
class WeightGrad(Work):
    """Compute the gradients of linear weights that `Backward` put off."""


@dataclass(frozen=True)
class SendActivation(Work):
    """Give the output to the next stage (from the last one to the first, which continues with its next chunk)."""


@dataclass(frozen=True)
class RecvActivation(Work):
    """Be ready for the input from the previous stage."""


@dataclass(frozen=True)
class SendGrad(Work):
    """Give the gradient of the input to the stage it came from."""


@dataclass(frozen=True)
class RecvGrad(Work):
    """Be ready for the gradient of the output."""


@dataclass(frozen=True)
class ReduceGrads(Instruction):
    """Average gradients over data-parallel ranks; all of the step's are there."""


@dataclass(frozen=True)
class OptimizerStep(Instruction):
    """Update the parameters."""


Instructions = tuple[Instruction, ...]
