"""When and where the reference saves, what it finds again, how it reads addresses and `content`."""

from __future__ import annotations

import cases
import deviations

from internlm_ds.checkpoint import address
from internlm_ds.checkpoint.manager import PARTS, content_parts, find_checkpoints
from internlm_ds.checkpoint.policy import SavePolicy, decide

KINDS = {None: None, "NORMAL_CHECKPOINT": "normal", "SNAPSHOT_CHECKPOINT": "snapshot"}


def test_ckpt_policy_when():
    for case in cases.entries("ckpt_policy", "when.json"):
        policy = SavePolicy(float(case["checkpoint_every"]), float(case["oss_snapshot_freq"]), case["total_steps"])
        for step, save, kind, stop in case["table"]:
            found = decide(step, policy, stop_signal=case["stop_file"] or 0)
            assert (found.kind is not None, found.kind, found.stop) == (save, KINDS[kind], stop), (case, step)


def test_ckpt_policy_latest(tmp_path):
    for number, case in enumerate(cases.entries("ckpt_policy", "latest_local.json")):
        root = tmp_path / str(number)
        root.mkdir()
        for name in case["files"]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        found = find_checkpoints(root)
        latest = str(found[0].path.relative_to(root)) if found else None
        assert (latest, found[0].step if found else 0) == (case["latest"], case["step"]), case["files"]


def test_ckpt_policy_urls():
    for case in cases.entries("ckpt_policy", "urls.json"):
        parsed = address.parse(case["url"])
        found = {"backend": parsed.backend, "path": parsed.path, "bucket": parsed.bucket}
        found |= {"endpoint": parsed.endpoint, "file_path": parsed.key}
        assert {key: found[key] for key in case if key != "url"} == {k: v for k, v in case.items() if k != "url"}


def test_ckpt_policy_content():
    for case in cases.entries("ckpt_policy", "load_mask.json"):
        parts = content_parts(case["content"])
        assert {part: part in parts for part in PARTS} == case["need"], case
        if deviations.content_without_model(case["content"]):
            assert parts, "what is named is loaded, with the model or without it"
            continue
        assert (parts == {"model"}) == case["only_model"], case
        assert bool(parts - {"model"}) == case["not_only_model"], case
