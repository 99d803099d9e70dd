"""The resolved configuration: frozen, typed, complete.

The path of a field is InternLM's dotted key with the top-level name in lower case: `data.micro_num` is
`config.data.micro_num`, `JOB_NAME` is `config.job_name`. Defaults live here and nowhere else; nobody writes one back
later. Which values were written by whom is kept beside it, in `Leaf`s. Reading a file is `loader`, checking it
`validate`.

A field without a default is a required key. The sizes inside `parallel` are the integers after both forms (int or dict)
have been read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Origin = Literal["file", "override", "default", "derived"]


@dataclass(frozen=True)
class Leaf:
    """One value of the resolved configuration and where it came from.

    Attributes:
        key: Dotted key as InternLM spells it (`JOB_NAME`, `data.micro_num`, `parallel.zero1.size`).
        value: Plain data: None, bool, int, float, str, list, tuple or (leaf dicts such as `min_length_dict`) dict.
        origin: `file`, `override` (`--set`), `default` or `derived` (computed from other values).
        line: 1-based line in `file` that wrote it; None for the other origins.
        file: The file of `line` when it is not the main one (a base file).
        note: A word on a legacy key, a helper constant or a derivation; usually empty.
        helper: True for a top-level helper constant such as `TRAIN_FOLDER`: listed once, without an effect of its own.
        written: The key as the file spells it where that differs (`parallel.zero1` for `parallel.zero1.size`).
    """

    key: str
    value: Any
    origin: Origin
    line: int | None = None
    file: str | None = None
    note: str = ""
    helper: bool = False
    written: str = ""

    @property
    def source(self) -> str:
        """The key to name to a user: as the file spells it."""
        return self.written or self.key


@dataclass(frozen=True)
class LoadInfo:
    """`ckpt.load_ckpt_info`: which checkpoint to start from and which of its parts."""

    path: str
    content: tuple[str, ...] = ("all",)
    ckpt_type: str = "internlm"


@dataclass(frozen=True)
class CkptConfig:
    enable_save_ckpt: bool = True
    save_ckpt_folder: str | None = None
    checkpoint_every: float = float("inf")
    async_upload: bool = False
    async_upload_tmp_folder: str | None = None
    oss_snapshot_freq: float = float("inf")
    snapshot_ckpt_folder: str | None = None
    load_ckpt_folder: str | None = None
    load_ckpt_info: LoadInfo | None = None
    load_model_only_folder: str | None = None
    load_optimizer: bool = True
    auto_resume: bool = True
    stop_file_path: str | None = None


@dataclass(frozen=True)
class DataConfig:
    type: str = "tokenized"
    seq_len: int = 2048
    micro_num: int = 1
    micro_bsz: int = 1
    packed_length: int = 2048
    gradient_accumulation: int = 1
    total_steps: int = 50000
    skip_batches: str = ""
    rampup_batch_size: str = ""
    pack_sample_into_one: bool = False
    min_length: int = 0
    min_length_dict: Mapping[str, int] | None = None
    train_folder: str | None = None
    valid_folder: str | None = None
    valid_micro_num: int = 1
    valid_every: int = 0
    empty_cache_and_diag_interval: int = 50
    diag_outlier_ratio: float = 1.1
    use_packed_dataset: bool = True
    fixed_random_dataset_seqlen: bool = False
    seed: int = 1024
    num_worker: int = 4


@dataclass(frozen=True)
class Fp16Config:
    initial_scale: float = 2.0**16
    min_scale: float | None = None
    growth_interval: int = 1000


@dataclass(frozen=True)
class GradScalerConfig:
    fp16: Fp16Config = Fp16Config()
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    max_scale: float | None = None
    hysteresis: int = 2


@dataclass(frozen=True)
class HybridZeroOptimizerConfig:
    reduce_bucket_size: int
    clip_grad_norm: float
    overlap_sync_grad: bool = False
    overlap_sync_param: bool = False


@dataclass(frozen=True)
class LossConfig:
    label_smoothing: float = 0.0
    moe_loss_coeff: float = 1.0


@dataclass(frozen=True)
class AdamConfig:
    lr: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    weight_decay: float
    adam_beta2_c: float = 0.0


@dataclass(frozen=True)
class LrSchedulerConfig:
    total_steps: int
    init_steps: int = 0
    warmup_ratio: float = 0.0
    eta_min: float = 0.0
    last_epoch: int = -1


@dataclass(frozen=True)
class Beta2SchedulerConfig:
    init_beta2: float
    c: float = 0.8
    cur_iter: int = -1


@dataclass(frozen=True)
class ModelConfig:
    """`model`: keyword arguments of the builder named by `model_type`.

    `dtype` is one of `float16`, `bfloat16`, `float32` (`torch.half` and `torch.tf32` are spelt out; tf32 sets `tf32`).
    `checkpoint` is the recomputed fraction of layers, 0.0 to 1.0. `given` is the dict as the file has it, which the
    builder of a registered model type gets as keywords; `extra` the keys among them that are not listed here.
    """

    num_layers: int = 48
    hidden_size: int = 2048
    vocab_size: int = 50304
    num_attention_heads: int = 32
    num_kv_attention_heads: int | None = None
    mlp_ratio: float = 4.0
    checkpoint: float = 0.0
    dtype: str = "float16"
    tf32: bool = False
    embed_split_hidden: bool = False
    embed_grad_scale: float = 1.0
    parallel_output: bool = True
    apply_post_layer_norm: bool = False
    norm_type: str = "rmsnorm"
    layer_norm_epsilon: float = 1e-5
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    residual_in_fp32: bool = False
    use_scaled_init: bool = True
    use_swiglu: bool = True
    use_flash_attn: bool = True
    dropout_selective_checkpoint: bool = True
    rope_base: float = 10000.0
    max_position_embeddings: int = 2048
    use_dynamic_ntk_rope: bool = False
    num_chunks: int = 1
    is_reward: bool = False
    no_bias: bool = False
    adapt_hf: bool | None = None
    norm_head: bool = False
    deepnorm: bool = False
    init_type: str = "normal"
    embedding_init_std: float = 0.02
    attn_wqkv_init_std: float = 0.02
    attn_other_init_std: float = 0.02
    ffn_uplayer_init_std: float = 0.02
    ffn_other_init_std: float = 0.02
    out_head_init_std: float = 0.02
    num_experts: int = 1
    moe_use_residual: bool = False
    moe_type: str = "GShard"
    given: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MoeConfig:
    """`moe`: keyword arguments of the mixture-of-experts layer."""

    top_k: int = 1
    capacity_factor: float = 1.0
    eval_capacity_factor: float = 1.0
    min_capacity: int = 4
    noisy_gate_policy: str | None = None
    drop_tokens: bool = True
    use_rts: bool = True


@dataclass(frozen=True)
class Zero1Config:
    size: int = -1
    fsdp: bool = False


@dataclass(frozen=True)
class TensorConfig:
    size: int = 1
    mode: str = "mtp"


@dataclass(frozen=True)
class PipelineConfig:
    size: int = 1
    interleaved_overlap: bool = False


@dataclass(frozen=True)
class WeightConfig:
    size: int = 1
    overlap: bool = False
    memory_pool: bool = False


@dataclass(frozen=True)
class ParallelConfig:
    zero1: Zero1Config = Zero1Config()
    tensor: TensorConfig = TensorConfig()
    pipeline: PipelineConfig = PipelineConfig()
    weight: WeightConfig = WeightConfig()
    sequence_parallel: bool = False
    gqa: bool = False


@dataclass(frozen=True)
class AlertConfig:
    enable_feishu_alert: bool = False
    feishu_alert_address: str | None = None
    light_monitor_address: str | None = None
    alert_file_path: str | None = None


@dataclass(frozen=True)
class MonitorConfig:
    alert: AlertConfig = AlertConfig()


@dataclass(frozen=True)
class TensorboardConfig:
    queue_max_length: int = 1


@dataclass(frozen=True)
class CompatConfig:
    """`internlm_ds.compat`: switches back to the reference's ways, or to older file conventions.

    `no_clip_in_fp32`: fp32 runs never clip. `mlp_names`: `2023` or `2024`, the meaning of w1, w2, w3 in InternLM
    weights whose shapes do not tell.
    """

    no_clip_in_fp32: bool = False
    mlp_names: str | None = None


@dataclass(frozen=True)
class GuardConfig:
    """`internlm_ds.guard`: when a run gives up, with exit code 3.

    `max_bad_steps`: so many failed updates in a row end it (0 = never).
    `drift_every`: after so many updates it compares the ranks' copies of each parameter, and ends if they differ
    (0 = never).
    """

    max_bad_steps: int = 0
    drift_every: int = 100


@dataclass(frozen=True)
class OwnConfig:
    """`internlm_ds = dict(...)`: what a user may ask of this software and InternLM has no word for.

    `keep_checkpoints`: so many of the newest normal checkpoints stay in the save folder (0 = all).
    `attention`: `auto`, or the backend that it must be. `deterministic`: the same bits on a device each time.
    `moments_dtype`, `masters_dtype`: what Adam's moments and the master weights are kept in between updates.
    """

    compat: CompatConfig = CompatConfig()
    guard: GuardConfig = GuardConfig()
    keep_checkpoints: int = 0
    attention: str = "auto"
    deterministic: bool = False
    compile: bool = False
    chunked_loss: bool | Literal["auto"] = "auto"
    moments_dtype: str = "float32"
    masters_dtype: str = "float32"
    pipeline_schedule: str = "1f1b"
    pipeline_bounds: tuple[int, ...] | None = None
    data_weights: Mapping[str, float] | None = None
    side_file: bool = False


@dataclass(frozen=True)
class Config:
    ckpt: CkptConfig
    data: DataConfig
    grad_scaler: GradScalerConfig
    hybrid_zero_optimizer: HybridZeroOptimizerConfig
    loss: LossConfig
    adam: AdamConfig
    lr_scheduler: LrSchedulerConfig
    beta2_scheduler: Beta2SchedulerConfig
    model: ModelConfig
    moe: MoeConfig = MoeConfig()
    parallel: ParallelConfig = ParallelConfig()
    monitor: MonitorConfig = MonitorConfig()
    tensorboard: TensorboardConfig = TensorboardConfig()
    job_name: str = "AnonymousJob"
    model_type: str = "INTERNLM"
    cudnn_benchmark: bool = False
    cudnn_deterministic: bool = False
    use_fp32_norm: bool = False
    output_tf32: bool = False
    metric_dtype: str | None = None
    enable_tb: bool = True
    tensorboard_folder: str | None = None
    resume_tb_folder: str | None = None
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    internlm_ds: OwnConfig = OwnConfig()
