"""A small fp32 model that learns real text on two CPU cores in a minute or two; `make demo` runs it.

    deepspeed --num_accelerators 2 launch/pretrain.py --config model_configs/demo.py --backend gloo \
        --set TRAIN_FOLDER=runs/demo/data --set VOCAB_SIZE=2000

Every constant below can be replaced by `--set NAME=VALUE`; what is computed from it follows.
"""

JOB_NAME = "demo"

# <folder>/<type>/*.bin as made by preprocessing/tokenizer.py or `internlm-ds preprocess text`
TRAIN_FOLDER = None
VALID_FOLDER = None
VOCAB_SIZE = 2000
SAVE_CKPT_FOLDER = "local:runs/demo/checkpoints"
CHECKPOINT_EVERY = 60

TOTAL_STEPS = 150
# length of the schedule; keep it when a run is stopped early on purpose
SCHEDULE_STEPS = TOTAL_STEPS
SEQ_LEN = 256
MICRO_NUM = 2
MICRO_BSZ = 2
HIDDEN_SIZE = 128
NUM_LAYER = 4
NUM_ATTENTION_HEAD = 4
LEARNING_RATE = 3e-3

ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder=SAVE_CKPT_FOLDER,
    checkpoint_every=CHECKPOINT_EVERY,
    auto_resume=True,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_num=MICRO_NUM,
    micro_bsz=MICRO_BSZ,
    valid_every=0,
    pack_sample_into_one=False,
    total_steps=TOTAL_STEPS,
    skip_batches="",
    rampup_batch_size="",
    min_length=8,
    train_folder=TRAIN_FOLDER,
    valid_folder=VALID_FOLDER,
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
    reduce_bucket_size=4 * 1024 * 1024,
    clip_grad_norm=1.0,
)

loss = dict(label_smoothing=0)

adam = dict(lr=LEARNING_RATE, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)

lr_scheduler = dict(total_steps=SCHEDULE_STEPS, init_steps=0, warmup_ratio=0.05, eta_min=3e-4, last_epoch=-1)

beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)

model = dict(
    checkpoint=False,
    num_attention_heads=NUM_ATTENTION_HEAD,
    embed_split_hidden=True,
    vocab_size=VOCAB_SIZE,
    embed_grad_scale=1,
    parallel_output=True,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
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
