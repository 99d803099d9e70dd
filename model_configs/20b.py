"""InternLM 20B: 60 layers, hidden 5120, sequences of 4096, for 32 GPUs of 80 GB: 4 pipeline stages x 8 data-parallel.

    deepspeed --hostfile HOSTS launch/pretrain.py --config model_configs/20b.py

`internlm-ds plan model_configs/20b.py --world-size 32` shows what each stage needs.
"""

JOB_NAME = "20b_train"

SEQ_LEN = 4096
HIDDEN_SIZE = 5120
NUM_ATTENTION_HEAD = 40
MLP_RATIO = 8 / 3
NUM_LAYER = 60
VOCAB_SIZE = 103168

SAVE_CKPT_FOLDER = "local:llm_ckpts_20b"
CHECKPOINT_EVERY = 100
TOTAL_STEPS = 50000

# <folder>/<type>/*.bin with types such as cn, en, code; None trains on random tokens
TRAIN_FOLDER = None
VALID_FOLDER = None

ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder=SAVE_CKPT_FOLDER,
    checkpoint_every=CHECKPOINT_EVERY,
    oss_snapshot_freq=int(CHECKPOINT_EVERY / 2),
)

data = dict(
    seq_len=SEQ_LEN,
    # a pipeline of 4 is idle for 3 of (micro_num + 3) turns: many small micro-batches keep it busy
    micro_num=16,
    micro_bsz=1,
    valid_micro_num=4,
    valid_every=100,
    pack_sample_into_one=False,
    total_steps=TOTAL_STEPS,
    skip_batches="",
    # the first steps are smaller: 4 micro-batches, 4 more every 500 steps
    rampup_batch_size="4 4 500",
    min_length=50,
    train_folder=TRAIN_FOLDER,
    valid_folder=VALID_FOLDER,
)

# bf16 needs no loss scale; the values are here for those who switch to fp16
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True,
    overlap_sync_param=True,
    reduce_bucket_size=512 * 1024 * 1024,
    clip_grad_norm=1.0,
)

loss = dict(label_smoothing=0)

adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)

lr_scheduler = dict(total_steps=data["total_steps"], init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1)

beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)

model = dict(
    # three quarters of each stage's layers recompute their activations
    checkpoint=0.75,
    num_attention_heads=NUM_ATTENTION_HEAD,
    embed_split_hidden=True,
    vocab_size=VOCAB_SIZE,
    embed_grad_scale=1,
    parallel_output=True,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
    mlp_ratio=MLP_RATIO,
    apply_post_layer_norm=False,
    dtype="torch.bfloat16",
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    use_flash_attn=True,
    num_chunks=1,
)

parallel = dict(zero1=-1, tensor=1, pipeline=dict(size=4, interleaved_overlap=False), sequence_parallel=False)

cudnn_deterministic = False
cudnn_benchmark = False
