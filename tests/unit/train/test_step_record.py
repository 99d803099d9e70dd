"""A step as one dictionary; evaluation's averages; the run directory; signals."""

from __future__ import annotations

import json
import logging
import math
import re
import signal
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from internlm_ds import runspec
from internlm_ds.data.collate import BatchStats
from internlm_ds.errors import ConfigError
from internlm_ds.model.loss import cross_entropy
from internlm_ds.monitor.log import LINE_KEYS, format_metrics
from internlm_ds.monitor.throughput import ThroughputMeter
from internlm_ds.parallel.context import ParallelContext
from internlm_ds.train import metrics, rundir, signals
from internlm_ds.train.evaluate import evaluate, log_results
from internlm_ds.train.loop import StepRecord
from internlm_ds.train.metrics import TUTORIAL_KEYS, RecordBuilder, StageLoss
from internlm_ds.train.state import TrainState
from internlm_ds.translate import translate

STATS = BatchStats(num_samples=9, largest_length=64, largest_batch=5, smallest_batch=4, num_packs=2, num_tokens=1000)


def builder(**changes) -> RecordBuilder:
    given = {
        "meter": ThroughputMeter(world_size=4, flops_per_step=8e12),
        "data_size": 2,
        "peak_flops": 1e12,
        "model_flops_per_step": 4e12,
        "hardware_flops_per_step": 6e12,
        "world_size": 4,
        "micro_num": 4,
        "fwd_bwd_seconds": lambda: 1.23456,
    }
    return RecordBuilder(**{**given, **changes})


def record(**changes) -> StepRecord:
    outcome = SimpleNamespace(loss=7.5, grad_norm=0.25, applied=True)
    state = TrainState(batch_count=4, step_count=3, num_consumed_tokens=6000, inf_nan_skip_batches=1)
    given = {
        "batch": SimpleNamespace(index=3, micro_batches=[0, 1], stats=STATS),
        "outcome": outcome,
        "state": state,
        "lr_used": 1e-4,
        "lr_next": 2e-4,
        "beta2_next": 0.95,
        "loss_scale": 65536.0,
        "started": 10.0,
        "train_started": 11.0,
        "ended": 12.5,
        "metrics": {"acc": 0.5, "perplexity": 9.0, "acc/cn": 0.5, "tokens/cn": 10, "loss/cn": 7.0},
    }
    return StepRecord(**{**given, **changes})


def test_values_of_a_record(monkeypatch):
    monkeypatch.setattr(metrics.time, "time", lambda: 1700000000.0)
    values = builder()(record())
    assert values["step"] == 3 and values["step_count"] == 3 and values["update_applied"] is True
    assert (values["loss"], values["grad_norm"], values["loss_scale"]) == (7.5, 0.25, 65536.0)
    assert (values["lr"], values["lr_used"], values["adam_beta2"]) == (2e-4, 1e-4, 0.95)
    assert (values["micro_num"], values["num_consumed_tokens"], values["inf_nan_skip_batches"]) == (2, 6000, 1)
    assert [values[k] for k in ("num_samples_in_batch", "largest_length", "largest_batch", "smallest_batch")] == [
        *(9, 64, 5, 4)
    ]
    assert values["fwd_bwd_time"] == 1.23 and values["step_time"] == 2.5 and values["time"] == 1700000000.0
    # 2 ranks of data parallel with 1000 tokens each, over 4 ranks and 2.5 s
    assert values["tgs"] == 200.0 and values["tgs/tgs_all"] == 200.0
    assert values["tflops"] == pytest.approx(8 / (2.5 * 4))
    # the step held 2 of 4 micro-batches: half of the full step's operations
    assert values["mfu"] == pytest.approx(4 * 0.5 / (2.5 * 4)) and values["hfu"] == pytest.approx(6 * 0.5 / (2.5 * 4))
    assert values["acc"] == 0.5 and values["tokens/cn"] == 10 and values["memory_allocated_peak"] > 0


def test_unknown_peak_and_failed_update():
    failed = SimpleNamespace(loss=math.inf, grad_norm=None, applied=False)
    values = builder(peak_flops=None)(record(outcome=failed, metrics={}))
    assert values["mfu"] is None and values["hfu"] is None
    assert values["grad_norm"] is None and values["update_applied"] is False


def test_the_tutorials_keys_come_first_in_its_order():
    values = builder()(record())
    assert list(values)[: len(TUTORIAL_KEYS)] == TUTORIAL_KEYS
    assert [name.partition(" ")[0] for name in LINE_KEYS] == TUTORIAL_KEYS
    line = format_metrics(values)
    assert line.startswith("tflops=0.8,step=3,loss=7.5,tgs (tokens/gpu/second)=200.0,lr=0.0002,loss_scale=65536.0,")
    names = {re.sub(r" \(.*\)", "", pair.partition("=")[0]) for pair in line.split(",")}
    contract = set(TUTORIAL_KEYS) | {"acc", "perplexity", "mfu", "hfu"}
    contract |= {"step_count", "lr_used", "update_applied", "time", "step_time", "memory_allocated_peak"}
    assert names >= contract | {"acc/cn", "loss/cn", "tokens/cn"}


def test_peak_of_a_device_by_its_name(monkeypatch):
    assert metrics.device_peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "GTX": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.device_peak_flops(torch.device("cuda", 0)) == peak


# ---- evaluation


class FakeEvaluating:
    def __init__(self):
        self.batches = []

    def evaluate_batch(self, micro_batches):
        self.batches.append(micro_batches)
        return float(sum(micro_batches))


def test_evaluation_averages_batches_as_the_reference():
    counted = []

    @contextmanager
    def validation_metrics():
        counted.append("open")
        yield lambda: {"acc": 0.5, "perplexity": 3.0}
        counted.append("closed")

    engine = FakeEvaluating()
    results = evaluate(engine, {"en": [[1, 2], [3]], "cn": [[5]], "none": []}, validation_metrics=validation_metrics)
    assert engine.batches == [[1, 2], [3], [5]]
    assert results["en"] == {"loss": 6.0 / (2 + 1e-6), "acc": 0.5, "perplexity": 3.0}
    assert results["cn"]["loss"] == 5.0 / (1 + 1e-6) and results["none"]["loss"] == 0.0
    assert counted == ["open", "closed"] * 3


def test_evaluation_line(caplog):
    results = {"en": {"loss": 2.5, "acc": None, "perplexity": 12.0}}
    with caplog.at_level(logging.INFO):
        log_results(logging.getLogger("x"), results, TrainState(step_count=4))
    assert caplog.messages == ["Validation on en: step=4,val/en_loss=2.5,val/en_acc=None,val/en_plex=12.0"]


def test_tokens_of_an_evaluation_are_counted_apart():
    loss = StageLoss(label_smoothing=0.0, dataset_types=("cn", "en"), context=ParallelContext.single())
    logits, labels = torch.eye(4) * 9, torch.tensor([0, 1, 2, -100])
    types = torch.tensor([0, 0, 1, 1])
    loss(logits, (labels, types))
    with loss.validating() as finish:
        loss(logits, (torch.tensor([1, 1, 1, 1]), types))
        assert finish()["acc"] == 0.25
    step = loss.finish_step()
    assert (step["acc"], step["tokens/cn"], step["tokens/en"]) == (1.0, 2, 1)
    assert loss.finish_step()["tokens/cn"] == 0, "counted since the last call"


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_micro_batch_without_targets_counts_nothing(label_smoothing):
    loss = StageLoss(label_smoothing=label_smoothing, dataset_types=("en",), context=ParallelContext.single())
    types = torch.zeros(4, dtype=torch.int64)
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    nothing = loss(logits, (torch.full((4,), -100), types))
    nothing.backward()
    assert nothing.item() == 0.0 and torch.equal(logits.grad, torch.zeros(4, 5))
    logits.grad = None
    labels = torch.tensor([-100, 2, -100, 4])
    plain = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    (expected,) = torch.autograd.grad(plain, logits)
    counted = loss(logits, (labels, types))
    counted.backward()
    assert torch.equal(counted, plain) and torch.equal(logits.grad, expected)
    with loss.validating():
        assert math.isnan(loss(logits, (torch.full((4,), -100), types)).item())


# ---- what the log rank writes


class FakeTensorboard:
    def __init__(self):
        self.written, self.closed = [], False

    def write(self, values, *, step_count):
        self.written.append((step_count, values))

    def close(self):
        self.closed = True


def test_recorder_writes_to_all_places(asked, tmp_path, monkeypatch, caplog):
    from internlm_ds.engine.optimizer import Verdict
    from internlm_ds.train import assemble

    spec, _ = asked
    config = replace(spec.config, enable_tb=True, tensorboard_folder=str(tmp_path / "tb"))
    fake, opened = FakeTensorboard(), []
    monkeypatch.setattr(
        assemble, "open_tensorboard", lambda folder, **options: opened.append((folder, options)) or fake
    )
    engine = SimpleNamespace(fwd_bwd_seconds=0.5)
    recorder = assemble.Recorder(
        replace(spec, config=config), tmp_path / "run", ParallelContext.single(), engine, first_step=7
    )
    assert opened == [(tmp_path / "tb", {"queue_length": config.tensorboard.queue_max_length, "purge_step": 7})]
    failed = SimpleNamespace(loss=math.nan, grad_norm=None, applied=False, verdict=Verdict.OVERFLOW)
    with caplog.at_level(logging.INFO):
        recorder.step(record())
        recorder.step(record(outcome=failed))
        recorder.validation({"en": {"loss": 2.5, "acc": 0.5, "perplexity": 12.0}}, record().state)
        recorder.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("update_applied") for line in lines] == [True, False, None] and lines[1]["loss"] is None
    assert lines[2] == {"validation": "en", "step": 3, "step_count": 3, "loss": 2.5, "acc": 0.5, "perplexity": 12.0}
    assert [count for count, _ in fake.written] == [3, 3, 3] and fake.closed
    assert fake.written[2][1] == {"val/en_loss": 2.5, "val/en_acc": 0.5, "val/en_plex": 12.0}
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == ["batch 3: gradients are not finite (overflow), the update is skipped; 1 skipped so far"]
    assert sum(text.startswith("tflops=") for text in caplog.messages) == 2


# ---- run directory


class OneRank:
    rank = 0

    def gather(self, obj):
        return [obj]

    def broadcast(self, obj):
        return obj


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "config.py"
    from tiny_runs import CONFIG

    path.write_text(CONFIG.format(folder=tmp_path).replace("checkpoint_every=1000,", 'checkpoint_every=float("inf"),'))
    spec = runspec.resolve(path, overrides=["adam.lr=1e-3"], world_size=1)
    return spec, translate(spec)


def test_four_files_say_what_was_asked(asked, tmp_path):
    spec, translation = asked
    rundir.create(tmp_path / "new" / "run", spec=spec, translation=translation, comm=OneRank())
    folder = tmp_path / "new" / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("config.py", "ds_config.json", "resolved.json", "translation.json")
    ]
    assert (folder / "config.py").read_text() == spec.text
    listed = json.loads((folder / "resolved.json").read_text(), parse_constant=pytest.fail)
    resolved = {leaf["key"]: leaf for leaf in listed}
    assert resolved["adam.lr"]["value"] == 1e-3 and resolved["adam.lr"]["origin"] == "override"
    assert resolved["data.micro_num"]["origin"] == "file" and resolved["data.micro_num"]["line"] > 1
    assert resolved["data.micro_num"]["file"].endswith("config.py")
    assert resolved["data.valid_every"]["origin"] == "default" and resolved["data.valid_every"]["line"] is None
    assert resolved["ckpt.checkpoint_every"]["value"] == "inf"
    assert [leaf.source for leaf in spec.leaves] == [leaf["key"] for leaf in listed]
    notes = json.loads((folder / "translation.json").read_text(), parse_constant=pytest.fail)
    assert len(notes) == len(translation.notes) and set(notes[0]) >= {"source", "value", "target", "fidelity", "reason"}
    assert json.loads((folder / "ds_config.json").read_text()) == translation.ds_config


def test_run_directory_that_cannot_be_written(asked, tmp_path):
    spec, translation = asked
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"^run directory .*/file/run cannot be written: .*name another one with --run"
    ):
        rundir.create(tmp_path / "file" / "run", spec=spec, translation=translation, comm=OneRank())


def test_place_of_the_run_directory():
    assert str(rundir.place(None, job_name="7b", launched="11-24-03.39.44")) == "RUN/7b/11-24-03.39.44"
    assert str(rundir.place("x/y", job_name="7b", launched="")) == "x/y"
    assert re.fullmatch(r"\d\d-\d\d-\d\d\.\d\d\.\d\d", rundir.launch_time(OneRank()))


# ---- signals


class SignalComm:
    def __init__(self, others=0):
        self.others = others

    def largest(self, value):
        return max(value, self.others)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_remembered(number, code):
    before = signal.getsignal(number)
    watch = signals.SignalWatch(SignalComm())
    with watch.installed():
        assert not watch.should_stop() and watch.exit_code == 0
        for _ in range(3):  # a launcher and a batch system both send one, a terminal and a launcher likewise
            signal.raise_signal(number)
    assert watch.received == number and watch.should_stop() and watch.exit_code == code
    assert signal.getsignal(number) == before, "a rank whose run failed ends when it is told to"


def test_a_later_second_interrupt_ends_at_once(monkeypatch):
    now = [0.0]
    watch = signals.SignalWatch(SignalComm(), clock=lambda: now[0])
    with watch.installed():
        signal.raise_signal(signal.SIGINT)
        now[0] = 5.0
        ended = []
        monkeypatch.setattr(signals.signal, "raise_signal", ended.append)
        watch._remember(signal.SIGTERM, None)
        assert not ended, "SIGTERM never ends a run that is saving"
        watch._remember(signal.SIGINT, None)
        assert ended == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_signal_on_any_rank_stops_all_with_one_code():
    watch = signals.SignalWatch(SignalComm(others=int(signal.SIGINT)))
    assert watch.should_stop() and watch.exit_code == 130 and watch.received is None


def test_a_launcher_that_died_counts_as_sigterm():
    watch = signals.SignalWatch(SignalComm(), launcher_is_gone=lambda: True)
    assert watch.should_stop() and watch.exit_code == 143
