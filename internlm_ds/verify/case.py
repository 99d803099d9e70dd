"""What the ladder trains: a tiny packed model (InternLM v1), as a configuration file that a case is written into.

Everything but the layout, `mode` and the way of computing decides the numbers; a case stripped of those is what one
process trains for comparison. Training it is `training`'s; which cases there are, `ladder`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from internlm_ds.layout.ranks import Layout

# keys of the `model` dict that change how something is computed and not what
CHANGES_NOTHING = {"checkpoint", "num_chunks", "parallel_output"}
NO_CKPT = "enable_save_ckpt=False, auto_resume=False"
CONFIG = """
ckpt = dict({ckpt})
model_type = "{model_type}"
data = dict(seq_len=16, micro_num={micro_num}, micro_bsz=2, total_steps=10, skip_batches="", rampup_batch_size="",
            pack_sample_into_one=False, use_packed_dataset={packed})
grad_scaler = dict(fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000), growth_factor=2,
                   backoff_factor=0.5, max_scale=2**24, hysteresis=2)
hybrid_zero_optimizer = dict(reduce_bucket_size=2**20, clip_grad_norm={clip})
loss = dict(label_smoothing=0.1)
adam = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=10, warmup_ratio=0.2, eta_min=1e-4)
beta2_scheduler = dict(init_beta2=0.95, c=0)
model = dict(num_layers={layers}, hidden_size={hidden}, num_attention_heads={heads}, vocab_size={vocab}, mlp_ratio=2,
             dtype="torch.{dtype}", **{model})
parallel = dict(zero1={zero}, tensor=dict(size={tensor}, mode="{mode}"), pipeline={pipe})
internlm_ds = dict({own})
"""


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        layout: Ranks along each axis.
        mode: `mtp`, or `msp` for sequence parallelism.
        dtype: `float32` or `bfloat16`.
        steps: Optimizer steps, at most 10.
        layers, hidden, heads, vocab: Size of the model.
        micro_batches: Of a step, over all data-parallel ranks, which divide them.
        packed: Three samples in a row of a micro-batch, or one in each of its two rows.
        clip: `clip_grad_norm`; the model's norms are above it.
        model_type: The family.
        model, own: More keys of the `model` and `internlm_ds` dicts.
    """

    layout: Layout = field(default_factory=Layout)
    mode: str = "mtp"
    dtype: str = "float32"
    steps: int = 10
    layers: int = 4
    hidden: int = 32
    heads: int = 4
    vocab: int = 64
    micro_batches: int = 4
    packed: bool = True
    clip: float = 0.3
    model: tuple[tuple[str, Any], ...] = (("embed_split_hidden", True),)
    own: str = ""
    model_type: str = "INTERNLM"

    @property
    def ckpt(self) -> str:
        """Body of the `ckpt` dict."""
        return NO_CKPT

    def write(self, folder: Path) -> str:
        """The configuration file; returns its path."""
        layout = self.layout
        path = folder / f"{layout.pipe}-{layout.data}-{layout.tensor}-{self.mode}.py"
        text = CONFIG.format(
            ckpt=self.ckpt,
            model_type=self.model_type,
            micro_num=self.micro_batches // layout.data,
            packed=self.packed,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            vocab=self.vocab,
            clip=self.clip,
            dtype=self.dtype,
            model=dict(self.model),
            zero=layout.zero,
            tensor=layout.tensor,
            mode=self.mode,
            pipe=layout.pipe,
            own=self.own,
        )
        path.write_text(text, encoding="utf-8")
        return str(path)

    def alone(self) -> Case:
        """The same numbers from one process."""
        model = tuple(item for item in self.model if item[0] not in CHANGES_NOTHING)
        return replace(self, layout=Layout(), mode="mtp", model=model, own="")
