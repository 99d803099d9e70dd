#!/usr/bin/env python
"""The peer of `startup.py`: a Llama of the debug configuration's size on DeepSpeed's `PipelineModule`, one step.

What somebody would write without this package: two data-parallel ranks with ZeRO-1, fp32, random tokens, two
micro-batches of 2 x 128 tokens. Started by `deepspeed --num_accelerators 2 benchmarks/first_step_peer.py`; it is no
benchmark by itself.
"""

import argparse

import deepspeed
import deepspeed.ops
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

VOCAB, HIDDEN, LAYERS, HEADS, MLP, SEQ, MICRO_BSZ, MICRO_NUM = 512, 64, 2, 4, 256, 128, 2, 2

CONFIG = {
    "train_micro_batch_size_per_gpu": MICRO_BSZ,
    "gradient_accumulation_steps": MICRO_NUM,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1024 * 1024},
    "steps_per_print": 2**31,
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.gate, self.up = nn.Linear(HIDDEN, MLP, bias=False), nn.Linear(HIDDEN, MLP, bias=False)
        self.down = nn.Linear(MLP, HIDDEN, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def loss_fn(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.parse_args()
    # a shared-memory operator that is compiled for a minute and that no pipeline uses
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(1024)
    layers = [LayerSpec(nn.Embedding, VOCAB, HIDDEN), *(LayerSpec(Block) for _ in range(LAYERS))]
    layers += [LayerSpec(nn.RMSNorm, HIDDEN), LayerSpec(nn.Linear, HIDDEN, VOCAB, bias=False)]
    module = PipelineModule(layers, num_stages=1, loss_fn=loss_fn)
    parameters = list(module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(parameters, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
        model_parameters=parameters,
        config=CONFIG,
    )
    tokens = torch.randint(0, VOCAB, (MICRO_NUM, MICRO_BSZ, SEQ + 1))
    loss = engine.train_batch(iter([(row[:, :-1], row[:, 1:]) for row in tokens]))
    if engine.global_rank == 0:
        print(f"first step: loss {loss.item():.4f}", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
