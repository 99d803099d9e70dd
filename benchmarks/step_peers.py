#!/usr/bin/env python
"""What `step.py` measures: this trainer and its peers, each a process (or one a rank) that takes steps when told.

Started by `step.py` as `step_peers.py FACTS`; reads a number of steps from standard input, answers with one line of
JSON: their seconds, the last loss, the peak memory. All contestants train a Llama of the same sizes on the same tokens
with AdamW and clipping to 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Step = Callable[[], float]


@dataclass(frozen=True)
class Sizes:
    """A model and a step.

    Attributes:
        name: In the table.
        hidden, layers, heads, mlp, vocab: Of the model.
        seq, rows, micro_batches: Tokens of a row, rows of a micro-batch, micro-batches of a step on all ranks together.
        dtype: `float32` or `bfloat16`.
        packed: Rows hold samples of many lengths. Only this trainer keeps them apart; peers take each row as one.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    seq: int
    rows: int
    micro_batches: int
    dtype: str = "float32"
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seq * self.rows * self.micro_batches


@dataclass(frozen=True)
class Facts:
    """What a contestant's process must know.

    Attributes:
        kind: `plain`, `hf`, `ours` or `matmul`.
        sizes: What is trained.
        device: `cpu` or `cuda`.
        data, pipe, chunks: Ranks along the axes, chunks of a stage.
        own: Body of `internlm_ds = dict(...)`.
        compile: A peer's model is compiled, block by block.
        store: File over which the ranks meet.
    """

    kind: str
    sizes: Sizes
    device: str
    data: int = 1
    pipe: int = 1
    chunks: int = 1
    own: str = ""
    compile: bool = False
    store: str = ""

    @property
    def world_size(self) -> int:
        return self.data * self.pipe

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Facts:
        values = json.loads(text)
        return cls(**{**values, "sizes": Sizes(**values["sizes"])})


CONFIG = """
ckpt = dict(enable_save_ckpt=False, auto_resume=False)
model_type = "LLAMA2"
data = dict(seq_len={seq}, micro_num={micro_num}, micro_bsz={rows}, total_steps=1000, skip_batches="",
            rampup_batch_size="", train_folder=None, pack_sample_into_one=False)
grad_scaler = dict(fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000), growth_factor=2,
                   backoff_factor=0.5, max_scale=2**24, hysteresis=2)
hybrid_zero_optimizer = dict(reduce_bucket_size=512 * 1024 * 1024, clip_grad_norm=1.0)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=1000, warmup_ratio=0.01, eta_min=1e-5)
beta2_scheduler = dict(init_beta2=0.95, c=0)
model = dict(num_layers={layers}, hidden_size={hidden}, num_attention_heads={heads}, num_kv_attention_heads={heads},
             vocab_size={vocab}, mlp_ratio={mlp} / {hidden}, dtype="torch.{dtype}", no_bias=True, num_chunks={chunks},
             use_flash_attn=True, checkpoint=False, parallel_output=False, embed_split_hidden=True)
parallel = dict(zero1=-1, tensor=1, pipeline={pipe})
internlm_ds = dict({own})
"""


def main() -> None:
    facts, rank = Facts.loads(sys.argv[1]), int(os.environ["RANK"])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    if facts.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if facts.kind in ("hf", "ours"):
        backend = "nccl" if facts.device == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.FileStore(facts.store, facts.world_size), rank=rank, world_size=facts.world_size
        )
    step = {"plain": plain, "hf": hugging_face, "ours": ours, "matmul": matmul}[facts.kind](facts, rank)
    print("ready", file=answers)
    for line in sys.stdin:
        times, loss = [], 0.0
        for _ in range(int(line)):
            started = _now(facts)
            loss = step()
            times.append(_now(facts) - started)
        print(json.dumps({"seconds": times, "loss": loss, "peak_mb": _peak_mb(facts)}), file=answers)
    os._exit(0)  # the other ranks may be gone


def _now(facts: Facts) -> float:
    """Seconds, when every rank has come so far."""
    import torch
    import torch.distributed as dist

    if facts.device == "cuda":
        torch.cuda.synchronize()
    if facts.world_size > 1:
        dist.barrier()
    return time.perf_counter()


def _peak_mb(facts: Facts) -> float:
    import resource

    import torch

    if facts.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def rows_of_tokens(facts: Facts, rank: int) -> list[Any]:
    """`(tokens, targets)` of this rank's micro-batches, int64 `(rows, seq)` each, on the host."""
    import torch

    sizes, generator = facts.sizes, torch.Generator().manual_seed(1)
    shape = (sizes.micro_batches, sizes.rows, sizes.seq + 1)
    tokens = torch.randint(1, sizes.vocab, shape, generator=generator)
    place = rank % facts.data
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens[place :: facts.data]]


# ---- the peers -------------------------------------------------------------------------------------------------------


def plain(facts: Facts, rank: int) -> Step:
    """A loop as anyone would write it: torch's operators, SDPA, its fused AdamW; autocast for bfloat16."""
    import torch
    from torch.nn.functional import cross_entropy

    model = plain_llama(facts.sizes).to(facts.device)
    if facts.compile:
        for block in model.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, fused=True
    )
    half = torch.autocast(facts.device, torch.bfloat16, enabled=facts.sizes.dtype == "bfloat16")
    data = rows_of_tokens(facts, rank)

    def step() -> float:
        total = 0.0
        for tokens, targets in data:
            with half:
                logits = model(tokens.to(facts.device))
                loss = cross_entropy(logits.float().flatten(0, 1), targets.to(facts.device).flatten())
            (loss / len(data)).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total) / len(data)

    return step


def plain_llama(sizes: Sizes) -> Any:
    """Llama in the fewest lines: `(rows, seq)` tokens to `(rows, seq, vocab)` logits."""
    import torch
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention, silu

    head_dim = sizes.hidden // sizes.heads

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(sizes.hidden, eps=1e-5), nn.RMSNorm(sizes.hidden, eps=1e-5)
            self.q, self.k, self.v, self.o = (linear(sizes.hidden, sizes.hidden) for _ in range(4))
            self.gate, self.up = linear(sizes.hidden, sizes.mlp), linear(sizes.hidden, sizes.mlp)
            self.down = linear(sizes.mlp, sizes.hidden)

        def forward(self, x, cos, sin):
            h = self.norm1(x)
            q, k, v = (m(h).unflatten(-1, (sizes.heads, head_dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(mixed.transpose(1, 2).flatten(2))
            h = self.norm2(x)
            return x + self.down(silu(self.gate(h)) * self.up(h))

    def rotated(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(sizes.vocab, sizes.hidden)
            self.blocks = nn.ModuleList(Block() for _ in range(sizes.layers))
            self.norm, self.head = nn.RMSNorm(sizes.hidden, eps=1e-5), linear(sizes.hidden, sizes.vocab)
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.02)
            angles = torch.outer(torch.arange(sizes.seq), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, tokens):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return self.head(self.norm(x))

    return Llama()


def hugging_face(facts: Facts, rank: int) -> Step:
    """`LlamaForCausalLM` with its best attention under DeepSpeed ZeRO-1."""
    import deepspeed
    import deepspeed.ops
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import is_flash_attn_2_available

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else minutes of compiling at the first start
    sizes, half = facts.sizes, facts.sizes.dtype == "bfloat16"
    best = "flash_attention_2" if facts.device == "cuda" and half and is_flash_attn_2_available() else "sdpa"
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.seq,
        rms_norm_eps=1e-5,
        use_cache=False,
        attn_implementation=best,
    )
    model = LlamaForCausalLM(config)
    data = rows_of_tokens(facts, rank)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, fused=True),
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": sizes.rows,
            "gradient_accumulation_steps": len(data),
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": half},
        },
    )

    def step() -> float:
        total = 0.0
        for tokens, _ in data:
            tokens = tokens.to(engine.device)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        return float(total) / len(data)

    return step


def matmul(facts: Facts, rank: int) -> Step:
    """The product that a block does most of, over and over: what the device can do at all. Returns flops per second."""
    import torch

    sizes, dtype = facts.sizes, getattr(torch, facts.sizes.dtype)
    a = torch.randn(sizes.rows * sizes.seq, sizes.hidden, device=facts.device, dtype=dtype)
    b = torch.randn(sizes.hidden, 2 * sizes.mlp, device=facts.device, dtype=dtype)
    flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    count = max(10, int((2e13 if facts.device == "cuda" else 5e10) / flops))

    def step() -> float:
        started = _now(facts)
        for _ in range(count):
            a @ b
        return count * flops / (_now(facts) - started)

    return step


# ---- this trainer ----------------------------------------------------------------------------------------------------


def ours(facts: Facts, rank: int) -> Step:
    """The engine, its loss and its metrics, as `internlm_ds.train.assemble` puts them together."""
    import torch

    from internlm_ds.engine.build import build
    from internlm_ds.layout.ranks import Layout
    from internlm_ds.parallel.environment import LaunchFacts
    from internlm_ds.parallel.launch import make_context, write_environment
    from internlm_ds.runspec import resolve
    from internlm_ds.train.assemble import layer_entries, set_global_state, split_vocabulary, stage_bounds
    from internlm_ds.train.metrics import StageLoss
    from internlm_ds.translate import translate

    backend, size = "nccl" if facts.device == "cuda" else "gloo", facts.world_size
    write_environment(LaunchFacts("torch", rank, size, local_rank=rank, local_size=size), backend=backend)
    spec = resolve(_config_file(facts, rank), world_size=size)
    layout = Layout(data=facts.data, pipe=facts.pipe, zero=facts.data, chunks=facts.chunks)
    device = torch.device("cuda", rank) if facts.device == "cuda" else torch.device("cpu")
    context = make_context(layout, rank=rank, local_rank=rank, device=device)
    set_global_state(spec.config, seed=7, device=device)
    entries = layer_entries(spec, context, seed=7)
    loss = StageLoss(
        label_smoothing=0.0, dataset_types=("en",), context=context, vocab_size=split_vocabulary(spec.config)
    )
    engine = build(
        entries,
        bounds=stage_bounds(spec, entries),
        config=spec.config,
        ds_config=translate(spec).ds_config,
        context=context,
        loss_fn=loss,
    )
    data = [_packed(facts.sizes, *rows, number=i) for i, rows in enumerate(rows_of_tokens(facts, context.data.rank))]

    def step() -> float:
        outcome = engine.train_step(data)
        loss.finish_step()
        return outcome.loss

    return step


def _config_file(facts: Facts, rank: int) -> str:
    sizes = facts.sizes
    values = {**asdict(sizes), "micro_num": sizes.micro_batches // facts.data, "pipe": facts.pipe}
    path = Path(facts.store).with_name(f"config{rank}.py")
    path.write_text(CONFIG.format(**values, chunks=facts.chunks, own=facts.own), encoding="utf-8")
    return str(path)


def _packed(sizes: Sizes, tokens: Any, targets: Any, *, number: int) -> Any:
    """A micro-batch as our loader gives it: all rows behind each other, with borders padded to one length."""
    import random

    import torch

    total = tokens.numel()
    borders = list(range(0, total + 1, sizes.seq))
    if sizes.packed:
        draw = random.Random(number)
        inside = draw.sample(range(1, total), k=max(1, total // 400))
        borders = sorted({*borders, *inside})
    padded = torch.full((total + 1,), total, dtype=torch.int32)
    padded[: len(borders)] = torch.tensor(borders, dtype=torch.int32)
    return (tokens.flatten(), padded), (targets.flatten(), torch.zeros(total, dtype=torch.int64))


if __name__ == "__main__":
    main()
