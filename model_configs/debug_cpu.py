"""A model of 2 layers on random tokens: 20 steps in seconds, on any machine, with any number of processes.

    python launch/pretrain.py --config model_configs/debug_cpu.py --backend gloo
    deepspeed --num_accelerators 2 launch/pretrain.py --config model_configs/debug_cpu.py --backend gloo

Nothing is saved. Two pipeline stages: `--set parallel.pipeline=2`.
"""

JOB_NAME = "debug_cpu"

SEQ_LEN = 128
VOCAB_SIZE = 512
TOTAL_STEPS = 20

ckpt = dict(enable_save_ckpt=False, auto_resume=False)

data = dict(
    seq_len=SEQ_LEN,
    micro_num=2,
    micro_bsz=2,
    valid_every=0,
    pack_sample_into_one=False,
    total_steps=TOTAL_STEPS,
    skip_batches="",
    rampup_batch_size="",
    min_length=0,
    train_folder=None,  # random tokens
    valid_folder=None,
    num_worker=0,
)

grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=False,
    overlap_sync_param=False,
    reduce_bucket_size=1024 * 1024,
    clip_grad_norm=1.0,
)

loss = dict(label_smoothing=0)

adam = dict(lr=5e-3, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)

lr_scheduler = dict(total_steps=TOTAL_STEPS, init_steps=0, warmup_ratio=0.1, eta_min=5e-4, last_epoch=-1)

beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)

model = dict(
    checkpoint=False,
    num_attention_heads=4,
    embed_split_hidden=True,
    vocab_size=VOCAB_SIZE,
    embed_grad_scale=1,
    parallel_output=True,
    hidden_size=64,
    num_layers=2,
    mlp_ratio=8 / 3,
    apply_post_layer_norm=False,
    dtype="torch.float32",
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    use_flash_attn=True,
    num_chunks=1,
)

parallel = dict(zero1=-1, tensor=1, pipeline=1, sequence_parallel=False)

cudnn_deterministic = False
cudnn_benchmark = False
