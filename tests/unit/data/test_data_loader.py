"""Steps of tensors: shapes, statistics, positions, the same batches however they are read, other people's loaders."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import logging
import os
import pickle
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from internlm_ds.config.schema import (
    AdamConfig,
    Beta2SchedulerConfig,
    CkptConfig,
    Config,
    DataConfig,
    GradScalerConfig,
    HybridZeroOptimizerConfig,
    LossConfig,
    LrSchedulerConfig,
    ModelConfig,
)
from internlm_ds.data import binmeta
from internlm_ds.data.loader import (
    FlatSampler,
    TrainLoader,
    build_dataset,
    build_sampler,
    build_train_loader,
    build_validation_loaders,
    first_item,
)
from internlm_ds.errors import DataFormatError


def make_config(*, vocab_size: int = 100, **data: Any) -> Config:
    given = {"seq_len": 8, "micro_bsz": 2, "micro_num": 2, "num_worker": 0, **data}
    return Config(
        ckpt=CkptConfig(),
        data=DataConfig(**given),
        grad_scaler=GradScalerConfig(),
        hybrid_zero_optimizer=HybridZeroOptimizerConfig(reduce_bucket_size=1, clip_grad_norm=1.0),
        loss=LossConfig(),
        adam=AdamConfig(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01),
        lr_scheduler=LrSchedulerConfig(total_steps=10),
        beta2_scheduler=Beta2SchedulerConfig(init_beta2=0.95),
        model=ModelConfig(vocab_size=vocab_size),
    )


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, start in (("cn", 1), ("en", 51)):
        with binmeta.Writer(tmp_path / name / "x.bin") as writer:
            for number in range(20):
                writer.write([start + (number + place) % 40 for place in range(3 + number)])
    return str(tmp_path)


def _same(left: Any, right: Any) -> None:
    assert dataclasses.replace(left, micro_batches=[]) == dataclasses.replace(right, micro_batches=[])
    assert len(left.micro_batches) == len(right.micro_batches)
    for one, other in zip(left.micro_batches, right.micro_batches):
        tensors = [tensor for half in (*one, *other) for tensor in half]
        assert all(torch.equal(a, b) for a, b in zip(tensors[:4], tensors[4:]))


@pytest.mark.parametrize("mode", [{}, {"pack_sample_into_one": True}, {"use_packed_dataset": False}])
def test_shapes_do_not_depend_on_the_data(folder: str, mode: dict[str, bool]) -> None:
    loader = build_train_loader(make_config(train_folder=folder, **mode), data_rank=0, data_size=1)
    assert loader.dataset_types == ("cn", "en")
    for index in range(12):
        step = loader.next_step()
        assert (step.index, step.skipped, step.num_packs, step.stats.num_tokens) == (index, False, 2, 32)
        for (tokens, borders), (labels, types) in step.micro_batches:
            assert [tensor.dtype for tensor in (tokens, borders, labels, types)] == [
                torch.int64,
                torch.int32,
                torch.int64,
                torch.int64,
            ]
            assert [len(tensor) for tensor in (tokens, borders, labels, types)] == [16, 17, 16, 16]
            assert borders[0] == 0 and borders[-1] == 16 and int(borders.diff().max()) <= 8
            assert ((labels == -100) | (labels > 0)).all() and (tokens >= 0).all()


def test_a_step_says_what_it_holds(folder: str) -> None:
    step = build_train_loader(make_config(train_folder=folder), data_rank=0, data_size=1).next_step()
    segments = [[int(n) for n in borders.diff() if n] for (_, borders), _ in step.micro_batches]
    stats = step.stats
    assert (stats.num_samples, stats.num_packs) == (sum(map(len, segments)), 2)
    assert (stats.largest_batch, stats.smallest_batch) == (max(map(len, segments)), min(map(len, segments)))
    assert stats.largest_length == max(itertools.chain(*segments))


def test_batches_are_the_same_whatever_the_workers(folder: str) -> None:
    configs = [make_config(train_folder=folder, num_worker=workers, skip_batches="3-4") for workers in (0, 1, 4)]
    loaders = [build_train_loader(config, data_rank=0, data_size=1) for config in configs]
    for _ in range(30):
        steps = [loader.next_step() for loader in loaders]
        for other, loader in zip(steps[1:], loaders[1:]):
            _same(steps[0], other)
            assert loaders[0].state_dict() == loader.state_dict()
        assert steps[0].skipped == (steps[0].index in (3, 4))


@pytest.mark.parametrize("workers", [0, 4])
def test_resumed_loaders_go_on_like_the_straight_run(folder: str, workers: int) -> None:
    config = make_config(train_folder=folder, num_worker=workers, rampup_batch_size="1 1 2", skip_batches="5")
    straight = build_train_loader(config, data_rank=1, data_size=2)
    states = [json.dumps(straight.state_dict())]
    steps = []
    for _ in range(25):
        steps.append(straight.next_step())
        states.append(json.dumps(straight.state_dict()))
    for cut in (0, 1, 6, 13, 20):
        resumed = build_train_loader(config, data_rank=1, data_size=2)
        resumed.next_step()  # a loader in use goes elsewhere too
        resumed.load_state_dict(json.loads(states[cut]))
        for step in steps[cut:]:
            _same(resumed.next_step(), step)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_dropped_lets_go_of_its_files_and_threads(folder: str, workers: int) -> None:
    before = set(threading.enumerate())
    loader = build_train_loader(make_config(train_folder=folder, num_worker=workers), data_rank=0, data_size=1)
    loader.next_step()
    data_set, threads = weakref.ref(loader.dataset), set(threading.enumerate()) - before
    assert bool(threads) == bool(workers)
    del loader  # without `close`
    gc.collect()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()
    assert data_set() is None


def test_a_changed_data_set_is_told(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    loader = build_train_loader(make_config(train_folder=folder), data_rank=0, data_size=1)
    state = loader.state_dict() | {"num_packs": 7}
    with caplog.at_level(logging.WARNING):
        loader.load_state_dict(state)
    assert "the training data has changed: 7 packs at the checkpoint" in caplog.text


@pytest.mark.parametrize("workers", [0, 4])
def test_errors_come_with_their_batch_and_can_be_tried_again(folder: str, workers: int) -> None:
    loader = build_train_loader(make_config(train_folder=folder, num_worker=workers), data_rank=0, data_size=1)
    path = Path(folder, "en/x.bin")
    whole, time_ns = path.read_bytes(), path.stat().st_mtime_ns
    wanted = build_train_loader(make_config(train_folder=folder), data_rank=0, data_size=1)
    path.write_bytes(whole.replace(b"5", b"}"))
    with pytest.raises(DataFormatError, match=r"en/x\.bin: the file has changed under this run"):
        for _ in range(20):
            _same(loader.next_step(), wanted.next_step())
    path.write_bytes(whole)
    os.utime(path, ns=(time_ns, time_ns))
    wanted.load_state_dict(loader.state_dict())
    _same(loader.next_step(), wanted.next_step())


def test_ids_beyond_the_vocabulary_end_the_build(folder: str) -> None:
    with pytest.raises(DataFormatError, match=r"en/x\.bin, line \d+, .*model\.vocab_size = 60"):
        build_train_loader(make_config(train_folder=folder, vocab_size=60), data_rank=0, data_size=1)


def test_files_that_fill_no_pack_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with binmeta.Writer(tmp_path / "en/x.bin") as writer:
        writer.write([1, 2, 3])
    with pytest.raises(DataFormatError, match="holds 0 packs"):
        build_train_loader(make_config(train_folder=str(tmp_path)), data_rank=0, data_size=1)
    assert "en/x.bin is left out: it does not fill one micro-batch of 16 tokens" in caplog.text


def test_unpacked_batches_without_a_sample_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with binmeta.Writer(tmp_path / "en/x.bin") as writer:
        writer.write([1] * 64)
    config = make_config(train_folder=str(tmp_path), use_packed_dataset=False)
    assert len(build_dataset(config)) == 4
    assert "en/x.bin: 3 of 4 unpacked micro-batches hold no sample" in caplog.text


def test_synthetic_data_starts_at_once() -> None:
    start = time.perf_counter()
    loader = build_train_loader(make_config(seq_len=2048), data_rank=0, data_size=1)
    took = time.perf_counter() - start
    assert loader.dataset_types == ("en", "cn", "code")
    assert loader.next_step().stats.num_tokens == 2 * 2 * 2048
    assert took < 2, f"{took:.2f} s; 0.2 on a quiet machine"


def test_validation_loaders_give_tensors() -> None:
    loaders = build_validation_loaders(make_config(valid_micro_num=3), data_rank=1, data_size=2)
    loader = loaders["val"]
    assert (loader.name, loader.batch_size, loader.num_samples, len(loader)) == ("val", 6, 1000, 83)
    batch = next(iter(loader))
    assert len(batch) == 3
    (tokens, borders), (labels, _) = batch[0]
    assert (tokens.dtype, borders.tolist()[:4], labels.shape) == (torch.int64, [0, 8, 16, 16], (16,))


def _order(config: Config, count: int) -> list[int]:
    sampler = build_sampler(config, build_dataset(config), data_rank=0, data_size=1)
    return list(itertools.chain(*(sampler.next_batch() for _ in range(count))))


@pytest.mark.parametrize("workers", [0, 2])
def test_flat_sampler_feeds_other_loaders(folder: str, workers: int) -> None:
    config = make_config(train_folder=folder)
    dataset = build_dataset(config)
    flat = FlatSampler(build_sampler(config, dataset, data_rank=0, data_size=1))
    loader = DataLoader(dataset, batch_size=1, sampler=flat, collate_fn=first_item, num_workers=workers)
    iter(loader)  # a pass that is begun and given up loses nothing
    items = [item for _ in range(3) for item in loader]
    straight = TrainLoader(dataset, sampler=build_sampler(config, dataset, data_rank=0, data_size=1))
    wanted = [item for _ in range(len(items) // 2) for item in straight.next_step().micro_batches]
    assert len(items) == len(wanted) == 3 * len(flat)
    assert all(torch.equal(item[0][0], want[0][0]) for item, want in zip(items, wanted))
    straight.close()


def test_flat_sampler_seeks_over_epochs(folder: str) -> None:
    config = make_config(train_folder=folder, rampup_batch_size="1 1 2")
    dataset = build_dataset(config)
    order = _order(config, 60)
    flat = FlatSampler(build_sampler(config, dataset, data_rank=0, data_size=1))
    for items in (0, 4, 40, 2):
        flat.seek(items)
        rest = list(flat) + list(flat)
        assert rest == order[items : items + len(rest)]
    flat.seek(4)
    with pytest.raises(ValueError, match="a step ends 1 items later"):
        flat.seek(5)


def test_data_sets_travel_to_other_processes(folder: str) -> None:
    dataset = build_dataset(make_config(train_folder=folder))
    dataset[0]
    copied = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copied[3][0][0], dataset[3][0][0])
