"""Bytes that a rank needs while training, component by component, each with its formula; nothing is measured.

The counts follow what is really allocated: by the optimizer (`optimizer_memory`), and by our layers, which keep tensors
for the backward pass. A test compares the latter with what autograd saves.

Legend: T tokens of a micro-batch, H hidden, F mlp width, V vocabulary, N heads, D head width, K width of all keys; P
parameters of the stage on this rank, z ranks that share optimizer states; b bytes of the model's dtype, g of the dtype
gradients are summed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from internlm_ds.arch.spec import LayerSpec, ModelArch
from internlm_ds.config.schema import ModelConfig, OwnConfig
from internlm_ds.layout.loss_chunks import Setting, is_chunked, rows_of_chunk
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import local_numel
from internlm_ds.layout.stages import stage_layers
from internlm_ds.plan.component import BYTES, PHASES, Component, Phase
from internlm_ds.plan.optimizer_memory import copy_of_saved, states
from internlm_ds.schedule.lists import Pipeline

# CUDA context, cuBLAS and NCCL work areas: not ours to compute, about this much on current cards
DEVICE_OVERHEAD_BYTES = 1_500_000_000
# pipeline messages that exist at a time: an activation and a gradient that come, and one each that go
MESSAGES_AT_A_TIME = 4


@dataclass(frozen=True)
class StageMemory:
    """The memory of one rank of a pipeline stage (all ranks of a stage are alike)."""

    stage: int
    layers: tuple[int, int]
    numel: int
    components: tuple[Component, ...]
    host: tuple[Component, ...] = ()

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(c.nbytes for c in self.host)

    def phase_bytes(self, phase: Phase) -> int:
        """Bytes in a phase, with what always exists."""
        return sum(c.nbytes for c in self.components if c.phase in ("always", phase))

    @property
    def peak_phase(self) -> Phase:
        return max(PHASES, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.phase_bytes(self.peak_phase)


@dataclass(frozen=True)
class Step:
    """What a step puts through a rank.

    Attributes:
        tokens: T.
        micro_num: Micro-batches of the step.
        chunked_loss: `internlm_ds.chunked_loss`.
    """

    tokens: int
    micro_num: int
    chunked_loss: Setting = "auto"


def stages(
    arch: ModelArch,
    model: ModelConfig,
    layout: Layout,
    *,
    step: Step,
    ds_config: Mapping[str, Any],
    borders: Sequence[int] | None = None,
    own: OwnConfig,
    saves_in_background: bool = False,
) -> tuple[StageMemory, ...]:
    """Memory of every pipeline stage.

    Args:
        borders: Where a user cuts the stages; evenly without.
        own: The kind of the pipeline's schedule, and what optimizer states are kept in.
        saves_in_background: Of a copy on the host.
    """
    found = []
    kind = own.pipeline_schedule if layout.pipe > 1 else "1f1b"
    schedule = Pipeline(layout.pipe, layout.chunks if layout.pipe > 1 else 1, kind)
    for stage, runs in enumerate(stage_layers(arch, layout, borders=borders)):
        start, stop = runs[0][0], runs[-1][1]
        layers = [layer for a, b in runs for layer in arch.layers[a:b]]
        # tensor rank 0 has the most: the slices that are longer, and the biases that are added once
        numel = sum(local_numel(param, size=layout.tensor) for layer in layers for param in layer.params)
        kept, host = states(layers, numel, model, layout, ds_config=ds_config, own=own)
        if saves_in_background:
            host.append(copy_of_saved(numel, model, layout, own))
        components = (*kept, *_activations(runs, arch, model, layout.tensor, schedule, stage, step))
        found.append(StageMemory(stage, (start, stop), numel, components, tuple(host)))
    return tuple(found)


# ---- activations ----------------------------------------------------------------------------------


def _activations(
    runs: Sequence[tuple[int, int]],
    arch: ModelArch,
    model: ModelConfig,
    tensor: int,
    schedule: Pipeline,
    stage: int,
    step: Step,
) -> list[Component]:
    b, T, H = BYTES[model.dtype], step.tokens, arch.hidden_size
    # several chunks: a micro-batch under way in one of them keeps that share of the stage's activations
    in_flight = Fraction(schedule.peak_in_flight(stage, micro_batches=step.micro_num), schedule.chunks)
    layers = [layer for start, stop in runs for layer in arch.layers[start:stop]]
    blocks_of = [sum(layer.kind == "block" for layer in arch.layers[start:stop]) for start, stop in runs]
    blocks, recomputed = sum(blocks_of), sum(int(count * model.checkpoint) for count in blocks_of)
    kept, whole = b * T * H, block_bytes(arch, model, tokens=T)
    # every number of micro-batches under way at once multiplies what is kept, not the work area of the one that runs
    many = f"{in_flight}·" if in_flight != 1 else ""
    found = []
    if blocks - recomputed:
        nbytes = math.ceil(in_flight * (blocks - recomputed) * whole)
        formula = f"{many}{blocks - recomputed}·{block_formula(arch, model)}"
        found.append(Component("activations of blocks", nbytes, formula, "forward_backward"))
    if recomputed:
        nbytes, formula = math.ceil(in_flight * recomputed * kept), f"{many}{recomputed}·b·T·H"
        found.append(Component("inputs of recomputed blocks", nbytes, formula, "forward_backward"))
    found.append(_work(arch, model, layers, step=step, tensor=tensor, recomputes=recomputed > 0))
    if schedule.kind == "zb-h1" and stage:
        found.append(_put_off(arch, model, tokens=T, blocks=blocks, waiting=min(stage, step.micro_num)))
    if schedule.stages > 1:
        nbytes, formula = MESSAGES_AT_A_TIME * kept, f"{MESSAGES_AT_A_TIME}·b·T·H"
        found.append(Component("pipeline messages", nbytes, formula, "forward_backward"))
    return [*found, Component("CUDA, cuBLAS, NCCL", DEVICE_OVERHEAD_BYTES, "assumed")]


def _put_off(arch: ModelArch, model: ModelConfig, *, tokens: int, blocks: int, waiting: int) -> Component:
    """What waits for a weight pass: inputs of the blocks' linear layers, and gradients of their outputs.

    Inputs: H each of attention, its output and the MLP, F of the MLP's end. Gradients: H + 2K of q k v, H of each end,
    F of each of the MLP's wide products.
    """
    wide = 3 if model.use_swiglu else 2
    hidden, formula = _widths(arch, of_hidden=6, of_keys=2)
    nbytes = waiting * blocks * BYTES[model.dtype] * tokens * (hidden + wide * arch.mlp_hidden_size)
    return Component(
        "put-off weight gradients", nbytes, f"{waiting}·{blocks}·b·T·({formula} + {wide}F)", "forward_backward"
    )


def _widths(arch: ModelArch, *, of_hidden: int, of_keys: int) -> tuple[int, str]:
    """A sum of H's and K's, as a number and in letters; K is H where every head has keys of its own."""
    keys = arch.num_kv_attention_heads * arch.head_dim
    if keys == arch.hidden_size:
        return (of_hidden + of_keys) * keys, f"{of_hidden + of_keys}H"
    return of_hidden * arch.hidden_size + of_keys * keys, f"{of_hidden}H + {of_keys}K"


def _work(
    arch: ModelArch, model: ModelConfig, layers: list[LayerSpec], *, step: Step, tensor: int, recomputes: bool
) -> Component:
    """The larger of two work areas that never exist together: the loss, and the backward pass of one block."""
    b, T, H = BYTES[model.dtype], step.tokens, arch.hidden_size
    backward = b * T * (4 * arch.mlp_hidden_size + 2 * H) + (block_bytes(arch, model, tokens=T) if recomputes else 0)
    loss, formula = _loss(arch, model, step=step, tensor=tensor)
    if any(layer.kind == "norm" for layer in layers):
        # the final norm keeps its fp32 input and its two results
        loss, formula = loss + T * H * (4 + 2 * b), f"{formula} + T·H·(4 + 2b)"
    if layers[-1].kind == "head" and loss > backward:
        return Component("logits and loss", loss, formula, "forward_backward")
    formula = "b·T·(4F + 2H)" + (" + one block" if recomputes else "")
    return Component("backward of one block", backward, formula, "forward_backward")


def _loss(arch: ModelArch, model: ModelConfig, *, step: Step, tensor: int) -> tuple[int, str]:
    """Bytes of logits and loss, and their formula; v words of a rank.

    Whole logits: they, and in fp32 log-probabilities, their gradient, and the gradient of the logits. In chunks of R
    rows: a chunk's logits, in fp32 too where they are not, the fp32 gradients of hidden and of the head's matrix, and
    the latter in the model's dtype.
    """
    b, T, H = BYTES[model.dtype], step.tokens, arch.hidden_size
    v = math.ceil(arch.vocab_size / tensor)
    letter = "V" if tensor == 1 else "v"
    if not is_chunked(step.chunked_loss, tokens=T, width=arch.vocab_size // tensor):
        if not model.parallel_output:
            v, letter = arch.vocab_size, "V"
        return T * v * (12 + b), f"T·{letter}·(12 + b)"
    rows, copy = min(T, rows_of_chunk(v, device="cuda")), b if b != 4 else 0
    nbytes = rows * v * (4 + copy) + 4 * T * H + v * H * (4 + copy)
    inner = "4 + b" if copy else "4"
    return nbytes, f"{rows}·{letter}·({inner}) + 4·T·H + {letter}·H·({inner})"


def block_bytes(arch: ModelArch, model: ModelConfig, *, tokens: int) -> int:
    """What a block that is not recomputed keeps for its backward pass.

    Attention keeps its normed input, q k v as projected (v alone where they are separate matrices) and q k as rotated,
    the output twice (as computed and as laid out for the next product), the fp32 softmax statistics, and for each
    rotation (of q and k together in v1) two fp32 tables of a head's width; the MLP its
    input and three intermediate results (two without SwiGLU). RMSNorms keep their input, as any norm does that is
    recomputed (`dropout_selective_checkpoint`); LayerNorms keep fp32 copies. A post-norm block keeps as much.
    """
    b, T, H = BYTES[model.dtype], tokens, arch.hidden_size
    hidden, _ = _widths(arch, **_kept_by_linear(arch))
    wide = 3 if model.use_swiglu else 2
    statistics = 4 * T * (arch.num_attention_heads + _rotary_tables(arch) * arch.head_dim)
    norms = 2 * b * T * H if _norms_keep_their_input(model) else 2 * (4 + 4) * T * H
    if model.drop_rate:
        # the residual behind dropout is another tensor than the block's input; else one byte of mask an element
        norms += b * T * H if model.dropout_selective_checkpoint else 2 * T * H
    return b * T * (hidden + wide * arch.mlp_hidden_size) + statistics + norms


def _kept_by_linear(arch: ModelArch) -> dict[str, int]:
    """H's and K's that attention and the entry of the MLP keep: inputs, projections, rotated q k, outputs."""
    if arch.family == "llama":
        return {"of_hidden": 5, "of_keys": 2}
    return {"of_hidden": 6, "of_keys": 3}


def block_formula(arch: ModelArch, model: ModelConfig) -> str:
    """`block_bytes` in letters."""
    kept = _kept_by_linear(arch)
    _, hidden = _widths(arch, of_hidden=kept["of_hidden"] + 2, of_keys=kept["of_keys"])
    copies = "" if _norms_keep_their_input(model) else "8·T·H + "
    return f"(b·T·({hidden} + {3 if model.use_swiglu else 2}F) + {copies}4·T·(N + {_rotary_tables(arch)}D))"


def _rotary_tables(arch: ModelArch) -> int:
    return 2 if arch.family == "internlm" else 4


def _norms_keep_their_input(model: ModelConfig) -> bool:
    return model.dropout_selective_checkpoint or model.norm_type == "rmsnorm"
