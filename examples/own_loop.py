"""A training loop of your own on InternLM's data order: DeepSpeed's engine and loader, our data set, sampler and model.

    python examples/own_loop.py CONFIG [--steps N]          one process
    deepspeed examples/own_loop.py CONFIG                   data parallel

For configurations without pipeline and tensor parallelism, in fp32. `launch/pretrain.py` does the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.utils import RepeatingLoader

from internlm_ds import runspec
from internlm_ds.data.loader import FlatSampler, build_dataset, build_sampler, first_item
from internlm_ds.engine.build import adopt_process_groups
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.parallel.context import Axis, ParallelContext
from internlm_ds.parallel.environment import detect
from internlm_ds.parallel.launch import initialize, shut_down


def train(spec: runspec.RunSpec, context: ParallelContext, *, steps: int) -> Iterator[float]:
    """Losses of `steps` updates: the mean of this rank's micro-batches."""
    config = spec.config
    layers = build_layers(spec.arch, config.model, tensor=Axis.single("tensor"), seed=1024, dtype=torch.float32)
    model = LanguageModel(layers)
    adam = config.adam
    betas = (adam.adam_beta1, adam.adam_beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=adam.lr, betas=betas, eps=adam.adam_eps, weight_decay=adam.weight_decay
    )
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,  # an item of the data set is a whole micro-batch already
        "gradient_accumulation_steps": config.data.micro_num,
        "gradient_clipping": config.hybrid_zero_optimizer.clip_grad_norm,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)

    dataset = build_dataset(config)
    sampler = build_sampler(config, dataset, data_rank=context.data.rank, data_size=context.data.size)
    batches = RepeatingLoader(
        engine.deepspeed_io(
            dataset,
            batch_size=1,
            data_sampler=FlatSampler(sampler),
            collate_fn=first_item,
            pin_memory=torch.cuda.is_available(),
            num_local_io_workers=0,
        )
    )
    for _ in range(steps):
        losses = [_micro_step(engine, next(batches)) for _ in range(config.data.micro_num)]
        yield sum(losses) / len(losses)


def _micro_step(engine: deepspeed.DeepSpeedEngine, micro_batch: tuple) -> float:
    (tokens, cu_seqlens), (labels, _) = ([tensor.to(engine.device) for tensor in half] for half in micro_batch)
    loss = cross_entropy(engine(tokens, cu_seqlens), labels)
    engine.backward(loss)
    engine.step()  # updates once every `gradient_accumulation_steps`
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    args = parser.parse_args()
    facts = detect()
    spec = runspec.resolve(args.config, world_size=facts.world_size)
    if spec.arch is None or spec.layout.pipe * spec.layout.tensor > 1:
        parser.error("this loop takes a built-in model without pipeline and tensor parallelism; see launch/pretrain.py")
    context = initialize(facts, spec.layout)
    adopt_process_groups()
    for step, loss in enumerate(train(spec, context, steps=args.steps)):
        if context.rank == 0:
            print(f"step={step} loss={loss:.4f}", flush=True)
    shut_down()


if __name__ == "__main__":
    main()
