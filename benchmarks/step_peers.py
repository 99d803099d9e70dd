"""Peers of `step.py`: a plain PyTorch loop, and Hugging Face's Llama under DeepSpeed ZeRO-1."""

from __future__ import annotations

from typing import Any

from step_facts import ADAMW, Facts, Sizes, Step, rows_of_tokens


def plain(facts: Facts, rank: int) -> Step:
    """A loop as anyone would write it: torch's operators, SDPA, its fused AdamW; autocast for bfloat16."""
    import torch
    from torch.nn.functional import cross_entropy

    model = plain_llama(facts.sizes).to(facts.device)
    if facts.compile:
        for block in model.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
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
        optimizer=lambda p: torch.optim.AdamW(p, **ADAMW),
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
