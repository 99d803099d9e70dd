"""Llama 2 7B: 32 layers, hidden 4096, vocabulary 32000, sequences of 4096, for 8 GPUs of 80 GB.

    deepspeed launch/pretrain.py --config model_configs/7b_llama2.py

To go on from Hugging Face's files, point MODEL_ONLY_FOLDER at them and uncomment `load_ckpt_info`. Rows of queries and
keys keep the order that they have there (`adapt_hf=True`); without it they are those of Meta's files.
"""

JOB_NAME = "7b_llama2"

model_type = "LLAMA2"

SEQ_LEN = 4096
HIDDEN_SIZE = 4096
NUM_ATTENTION_HEAD = 32
MLP_RATIO = 8 / 3
NUM_LAYER = 32
VOCAB_SIZE = 32000

MODEL_ONLY_FOLDER = "local:llm_ckpts/llama2_7b"
SAVE_CKPT_FOLDER = "local:llm_ckpts_llama2"
CHECKPOINT_EVERY = 50
TOTAL_STEPS = 50000

# <folder>/<type>/*.bin with types such as cn, en, code; None trains on random tokens
TRAIN_FOLDER = None
VALID_FOLDER = None

ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder=SAVE_CKPT_FOLDER,
    # load_ckpt_info=dict(path=MODEL_ONLY_FOLDER, content=("model",), ckpt_type="hf"),
    checkpoint_every=CHECKPOINT_EVERY,
    oss_snapshot_freq=int(CHECKPOINT_EVERY / 2),
)

data = dict(
    seq_len=SEQ_LEN,
    # 4 micro-batches of 1 sequence on each of 8 ranks: 131072 tokens a step
    micro_num=4,
    micro_bsz=1,
    valid_micro_num=4,
    valid_every=50,
    pack_sample_into_one=False,
    total_steps=TOTAL_STEPS,
    skip_batches="",
    rampup_batch_size="",
    # samples with fewer tokens are left out
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
    # share of the layers whose activations are recomputed: True, False or 0 to 1
    checkpoint=False,
    num_attention_heads=NUM_ATTENTION_HEAD,
    no_bias=True,
    adapt_hf=True,
    max_position_embeddings=SEQ_LEN,
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

# zero1=-1: optimizer states are shared by all data-parallel ranks, however many there are
parallel = dict(zero1=-1, tensor=1, pipeline=dict(size=1, interleaved_overlap=True), sequence_parallel=False)

cudnn_deterministic = False
cudnn_benchmark = False
