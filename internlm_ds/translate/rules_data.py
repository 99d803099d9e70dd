"""Rules for what surrounds a step: data, batches, checkpoints, logs and alerts."""

from __future__ import annotations

from internlm_ds.config.schema import Leaf
from internlm_ds.translate.rules import (
    Facts,
    Rule,
    Verdict,
    always,
    approximate,
    exact,
    native,
    neutral,
    no_effect,
    refused,
)

NOT_ACTIVE = "not active in this version"
NO_SAVING = "ckpt.enable_save_ckpt is False: nothing is saved"
ALERTS_OFF = "monitor.alert.enable_feishu_alert is False"
REMOTE = dict.fromkeys(
    ("volc:", "oss2:", "vc:", "ali:"),
    "this backend is not supported; the S3 door of such a store is boto3:s3://BUCKET.ENDPOINT/PREFIX",
)


def remote_reason(address: object) -> str | None:
    """Why this version cannot read or write an address; None for folders."""
    if not isinstance(address, str):
        return None
    return next((reason for prefix, reason in REMOTE.items() if address.startswith(prefix)), None)


# ---- batches and data -----------------------------------------------------------------------------


def _rampup(leaf: Leaf, facts: Facts) -> Verdict:
    if not leaf.value:
        return no_effect("no ramp-up: every step has data.micro_num micro-batches")
    return native("the engine changes DeepSpeed's micro-batch count from step to step", "gradient_accumulation_steps")


def _valid(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.config.data.valid_every <= 0:
        return no_effect("data.valid_every is 0: no evaluation")
    return native("evaluation runs through the same engine, unpacked")


def _fixed_random(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.config.data.train_folder is not None:
        return no_effect("only random data reads it, and data.train_folder is given")
    return native("shape of the random data that stands in for a missing data.train_folder")


def _diagnosis(leaf: Leaf, facts: Facts) -> Verdict:
    return approximate(
        f"periodic diagnosis of slow ranks is {NOT_ACTIVE}; training is the same",
        warn=leaf.origin in ("file", "override"),
    )


# ---- checkpoints ----------------------------------------------------------------------------------


def _saving(reason: str) -> Rule:
    """Rule of a key that matters only while checkpoints are saved."""
    return lambda leaf, facts: native(reason) if facts.saves else no_effect(NO_SAVING)


def _save_folder(leaf: Leaf, facts: Facts) -> Verdict:
    if not facts.saves:
        return no_effect(f"{NO_SAVING}, and nothing is resumed from there")
    remote = remote_reason(leaf.value)
    return refused(remote) if remote else native("checkpoints in the native format, independent of the layout")


def _async_upload(leaf: Leaf, facts: Facts) -> Verdict:
    if not leaf.value:
        return no_effect("checkpoints are written before training goes on")
    if not facts.saves:
        return no_effect(NO_SAVING)
    return native("the ranks' state is copied on the host and written by a thread while training goes on")


def _staging(leaf: Leaf, facts: Facts) -> Verdict:
    if facts.saves and str(facts.config.ckpt.save_ckpt_folder).startswith(("boto3:", "s3:")):
        return native("where files are put together before they are sent to the store")
    return no_effect("a save is written in a hidden folder beside its final place")


def _snapshot_folder(leaf: Leaf, facts: Facts) -> Verdict:
    if not facts.saves:
        return no_effect(NO_SAVING)
    remote = remote_reason(leaf.value)
    return refused(remote) if remote else native("snapshots alternate between its folders 0 and 1")


def _load_path(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.value is None:
        return no_effect("no checkpoint to start from")
    remote = remote_reason(leaf.value)
    if remote:
        return refused(remote)
    return native("where weights come from, unless auto_resume finds a newer checkpoint of this run")


def _load_type(leaf: Leaf, facts: Facts) -> Verdict:
    return native("read without executing any pickle")


def _legacy_load(leaf: Leaf, facts: Facts) -> Verdict:
    if leaf.value is None:
        return no_effect("old form of load_ckpt_info, not given")
    ckpt = facts.config.ckpt
    if ckpt.load_ckpt_info is not None:
        return no_effect("ckpt.load_ckpt_info is given and decides")
    if leaf.key == "ckpt.load_ckpt_folder" and ckpt.load_model_only_folder is not None:
        return no_effect("ckpt.load_model_only_folder is given and decides")
    return _load_path(leaf, facts)


def _load_optimizer(leaf: Leaf, facts: Facts) -> Verdict:
    ckpt = facts.config.ckpt
    if ckpt.load_ckpt_info is not None or ckpt.load_model_only_folder is not None or ckpt.load_ckpt_folder is None:
        return no_effect("only ckpt.load_ckpt_folder reads it, which does not decide here")
    return native("whether the optimizer's state is loaded along with the weights")


# ---- logs and alerts ------------------------------------------------------------------------------


def _alert(what: str) -> Rule:
    def rule(leaf: Leaf, facts: Facts) -> Verdict:
        if leaf.value is None or leaf.value is False:
            return no_effect("switched off")
        if not facts.alerts:
            return no_effect(ALERTS_OFF)
        return approximate(f"{what} {NOT_ACTIVE}; training is the same", warn=True)

    return rule


def _tensorboard_folder(leaf: Leaf, facts: Facts) -> Verdict:
    if not facts.config.enable_tb:
        return no_effect("enable_tb is False")
    return native("where event files go; None for the run directory")


RULES: dict[str, Rule] = {
    "data.micro_bsz": always(exact("train_micro_batch_size_per_gpu")),
    "data.micro_num": always(exact("gradient_accumulation_steps")),
    "data.gradient_accumulation": always(exact("gradient_accumulation_steps", "equal to data.micro_num")),
    "data.batch_size": always(no_effect("always data.micro_num")),
    "data.rampup_batch_size": _rampup,
    "data.packed_length": always(no_effect("always data.micro_bsz * data.seq_len; a given value is not used")),
    "data.type": always(native("tokenized bin/meta files")),
    "data.valid_every": neutral(0, off="no evaluation", on=native("successful updates between evaluations")),
    "data.valid_folder": _valid,
    "data.valid_micro_num": _valid,
    "data.fixed_random_dataset_seqlen": _fixed_random,
    "data.num_worker": always(
        native("0 reads when asked, more let one thread read ahead; order and content do not depend on it")
    ),
    "data.empty_cache_and_diag_interval": always(
        native("batches between collections of garbage, each with a line about memory; freed memory is given back")
    ),
    "data.diag_outlier_ratio": _diagnosis,
    "data.total_steps": always(native("batches of the run")),
    "data.train_folder": always(native("read by our loader; None trains on random tokens")),
    "data.seq_len": always(native("longest sequence that attention sees; packs are cut by it")),
    "data.min_length": always(native("shorter samples are dropped, counted per file")),
    "data.min_length_dict": always(native("smallest length by data type")),
    "data.pack_sample_into_one": always(native("how samples are put into packs")),
    "data.use_packed_dataset": always(native("packs, or one sample a row")),
    "data.skip_batches": always(native("these batches are read and not trained")),
    "data.seed": always(native("order of the packs")),
    "data.*": always(native("our data loader")),
    "ckpt.enable_save_ckpt": always(native("whether the checkpoint manager saves")),
    "ckpt.checkpoint_every": _saving("successful updates between checkpoints"),
    "ckpt.save_ckpt_folder": _save_folder,
    "ckpt.async_upload": _async_upload,
    "ckpt.async_upload_tmp_folder": _staging,
    "ckpt.oss_snapshot_freq": _saving("successful updates between snapshots"),
    "ckpt.snapshot_ckpt_folder": _snapshot_folder,
    "ckpt.stop_file_path": neutral(
        None, off="no stop file", on=native("the run saves and stops at the step the file names")
    ),
    "ckpt.auto_resume": always(native("looks for this run's newest good checkpoint in ckpt.save_ckpt_folder")),
    "ckpt.load_ckpt_info": _load_path,
    "ckpt.load_ckpt_info.path": _load_path,
    "ckpt.load_ckpt_info.content": always(native("which parts are loaded")),
    "ckpt.load_ckpt_info.ckpt_type": _load_type,
    "ckpt.load_ckpt_folder": _legacy_load,
    "ckpt.load_model_only_folder": _legacy_load,
    "ckpt.load_optimizer": _load_optimizer,
    "ckpt.load_given_ckpt": always(no_effect("old inverse of ckpt.auto_resume")),
    "JOB_NAME": always(native("names the run directory")),
    "enable_tb": always(native("event files for tensorboard, if the extra is installed")),
    "tensorboard_folder": _tensorboard_folder,
    "resume_tb_folder": neutral(
        None,
        off="no earlier event files to go on from",
        on=approximate("earlier event files are not copied; a new folder is begun", warn=True),
    ),
    "tensorboard.queue_max_length": always(native("steps that are written to event files together")),
    "monitor.tensorboard.*": always(no_effect("InternLM itself reads it at top level only")),
    "monitor.alert.enable_feishu_alert": _alert("alerts are"),
    "monitor.alert.feishu_alert_address": _alert("alerts are"),
    "monitor.alert.light_monitor_address": _alert("the heartbeat is"),
    "monitor.alert.alert_file_path": _alert("alerts on exceptions are"),
    "alert_address": always(no_effect("InternLM itself does not read it")),
    "batch_count": always(no_effect("InternLM itself does not read it; where a run stands comes from its checkpoint")),
    "only_load_lr": always(no_effect("internal to InternLM")),
}
