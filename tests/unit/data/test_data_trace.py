"""What a trace tells is what the loader delivered: token for token, on every rank, wherever the run began."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm_ds.config.schema import DataConfig
from internlm_ds.data import binmeta, record
from internlm_ds.data.loader import PackedDataset, StepBatch, TrainLoader
from internlm_ds.data.trace import Trace, TracedBatch, skip_text, trace_of
from internlm_ds.data.trainset import TrainSet, open_sampler, open_train_set
from internlm_ds.errors import DataFormatError
from internlm_ds.runspec import resolve

ROOT = Path(__file__).parents[3]
VOCAB_SIZE = 5000
MODES = [{}, {"pack_sample_into_one": True}, {"use_packed_dataset": False}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files whose tokens are all different; some samples are empty, some too short, some longer than a pack."""
    number, rng = 1, np.random.default_rng(5)
    for name in ("cn/x", "en/a", "en/deep/b"):
        with binmeta.Writer(tmp_path / f"{name}.bin") as writer:
            for length in [*rng.integers(0, 25, size=40).tolist(), 50]:
                writer.write(list(range(number, number + length)))
                number += length
    assert number < VOCAB_SIZE
    return tmp_path


def settings(folder: Path, **given: Any) -> DataConfig:
    return DataConfig(**{"train_folder": str(folder), "seq_len": 8, "micro_bsz": 2, "micro_num": 3, **given})


def opened(data: DataConfig) -> TrainSet:
    return open_train_set(data, vocab_size=VOCAB_SIZE, log=False)


def loader_of(data: DataConfig, rank: int, size: int) -> TrainLoader:
    found = opened(data)
    dataset = PackedDataset(
        found.packs, dataset_types=found.dataset_types, seq_len=found.seq_len, rows=found.rows, files=found.files
    )
    sampler = open_sampler(data, found.packs, found.files, data_rank=rank, data_size=size)
    return TrainLoader(dataset, sampler=sampler, skip_batches=data.skip_batches, read_ahead=0)


def traced(data: DataConfig, size: int) -> Trace:
    found = opened(data)
    sampler = open_sampler(data, found.packs, found.files, data_rank=0, data_size=size)
    return Trace(found, sampler, skip_batches=data.skip_batches)


def check(traced: TracedBatch, steps: list[StepBatch]) -> None:
    """Every token of the loader's tensors is where the trace says, and padding alone is where it says nothing."""
    assert [traced.index] * len(steps) == [step.index for step in steps]
    assert all(traced.skipped == step.skipped for step in steps)
    assert [len(rank) for rank in traced.ranks] == [step.num_packs for step in steps]
    for packs, step in zip(traced.ranks, steps):
        for pack, ((tokens, _), _) in zip(packs, step.micro_batches):
            wanted = np.zeros(len(tokens), dtype=np.int64)
            for piece in pack.pieces:
                with open(piece.path, "rb") as file:
                    text = file.readlines()[piece.line - 1]
                document = binmeta.decode_line(text, path=piece.path, line=piece.line, offset_bytes=0)
                assert len(document) == piece.length and piece.path.endswith(piece.name)
                assert piece.name.startswith(piece.type_name + "/")
                wanted[piece.place : piece.place + piece.stop - piece.start] = document[piece.start : piece.stop]
            assert tokens.tolist() == wanted.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2])
def test_every_batch_is_told_as_it_was_delivered(folder: Path, mode: dict[str, bool], size: int) -> None:
    data = settings(folder, rampup_batch_size="1 1 2", skip_batches="3,9-10", min_length=2, **mode)
    loaders = [loader_of(data, rank, size) for rank in range(size)]
    trace = traced(data, size)
    batches = [[loader.next_step() for loader in loaders] for _ in range(40)]
    for index, steps in enumerate(batches):
        check(trace.batch(index), steps)
    assert trace.batch(39).epoch > 0
    check(trace.batch(7), batches[7])  # back again


def test_a_run_on_paper_is_told() -> None:
    spec = resolve(ROOT / "model_configs/debug_cpu.py", overrides=["data.train_folder=None"], world_size=2)
    trace = trace_of(spec)
    sampler = open_sampler(spec.config.data, trace.data.packs, (), data_rank=1, data_size=spec.layout.data)
    wanted = [sampler.next_batch() for _ in range(3)][2]
    assert [pack.number for pack in trace.batch(2).ranks[1]] == wanted


@pytest.mark.parametrize("change", [(1, 3, 2, 3), (2, 3, 1, 3), (2, 3, 2, 2), (2, 2, 1, 5)])
def test_a_run_that_went_on_otherwise_is_told_from_its_notes(folder: Path, change: tuple[int, ...], tmp_path) -> None:
    size, micro_num, next_size, next_micro_num = change
    first, second = settings(folder, micro_num=micro_num), settings(folder, micro_num=next_micro_num, skip_batches="9")
    loaders = [loader_of(first, rank, size) for rank in range(size)]
    _note(tmp_path, first, loaders[0], size)
    before = [[loader.next_step() for loader in loaders] for _ in range(8)]
    resumed = [loader_of(second, rank, next_size) for rank in range(next_size)]
    for loader in resumed:
        loader.load_state_dict(loaders[0].state_dict())
    _note(tmp_path, second, resumed[0], next_size)
    after = [[loader.next_step() for loader in resumed] for _ in range(30)]

    launches = record.read_launches(tmp_path)
    assert [launch.first_batch for launch in launches] == [0, 8]
    traces = [launch.trace() for launch in launches]
    for index, steps in enumerate([*before, *after]):
        launch = record.launch_of(launches, index)
        assert launch.data_size == len(steps)
        check(traces[launches.index(launch)].batch(index), steps)
    with pytest.raises(DataFormatError, match="no batch 7: this run begins with batch 8"):
        traces[1].batch(7)
    with pytest.raises(DataFormatError, match="no batch 7 in this run directory: it begins with batch 8"):
        record.launch_of(launches[1:], 7)


def test_changed_files_are_noticed(folder: Path, tmp_path: Path) -> None:
    data = settings(folder)
    _note(tmp_path, data, loader_of(data, 0, 1), 1)
    (launch,) = record.read_launches(tmp_path)
    assert launch.changes() == {}
    wanted = launch.trace().batch(5)

    with binmeta.Writer(folder / "en/new.bin") as writer:
        writer.write([1] * 500)
    assert launch.changes() == {} and launch.trace().batch(5) == wanted  # what is added counts for later runs only

    path = folder / "en/a.bin"
    _rewrite(path, lambda samples: [[*samples[0], 7], *samples[1:]])
    assert launch.changes() == {str(path): f"has {path.stat().st_size} bytes, it had {launch.files[1].size}"}
    assert launch.trace().batch(5).ranks[0][0].number == wanted.ranks[0][0].number

    _rewrite(path, lambda samples: samples[:3])
    with pytest.raises(DataFormatError, match=r"which documents stand in which batch:\n  .*en/a\.bin has \d+ bytes"):
        launch.trace()
    path.unlink()
    with pytest.raises(DataFormatError, match=r"en/a\.bin is gone\nput the old files back"):
        launch.trace()


def test_notes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"no such run directory"):
        record.read_launches(tmp_path / "none")
    with pytest.raises(DataFormatError, match=r"holds no data\.json"):
        record.read_launches(tmp_path)
    (tmp_path / "data.json").write_text('{"format": 1, "launches": [{}]}')
    with pytest.raises(DataFormatError, match=r"data\.json: damaged"):
        record.read_launches(tmp_path)


def test_synthetic_data_has_no_files(tmp_path: Path) -> None:
    data = DataConfig(seq_len=64, micro_bsz=1)
    _note(tmp_path, data, loader_of(data, 0, 1), 1)
    (launch,) = record.read_launches(tmp_path)
    trace = launch.trace()
    step = loader_of(data, 0, 1).next_step()
    pieces = trace.batch(0).ranks[0][0].pieces
    assert {(piece.path, piece.line) for piece in pieces} == {(None, None)}
    assert step.micro_batches[0][0][0].tolist() == np.concatenate([trace.tokens(piece) for piece in pieces]).tolist()


@pytest.mark.parametrize(
    ("text", "indices", "wanted"),
    [("", [5], "5"), ("1,2", [3], "1-3"), ("8-10", [9], "8-10"), ("0,20-22", [19, 1, 7], "0-1,7,19-22")],
)
def test_skip_texts_are_merged(text: str, indices: list[int], wanted: str) -> None:
    assert skip_text(text, indices) == wanted


def _note(run_dir: Path, data: DataConfig, loader: TrainLoader, size: int) -> None:
    record.note_launch(
        run_dir,
        data=data,
        vocab_size=VOCAB_SIZE,
        dataset_types=loader.dataset_types,
        data_size=size,
        position=loader.state_dict(),
        packs=loader.dataset.packs,
        files=loader.dataset.files,
    )


def _rewrite(path: Path, change: Any) -> None:
    samples = [sample.tolist() for sample in binmeta.Reader(path)]
    with binmeta.Writer(path, overwrite=True) as writer:
        for sample in change(samples):
            writer.write(sample)


def test_settings_survive_the_note(folder: Path, tmp_path: Path) -> None:
    data = settings(folder, min_length_dict={"/en/": 3}, rampup_batch_size="1 1 2", skip_batches="4")
    _note(tmp_path, data, loader_of(data, 0, 1), 1)
    assert record.read_launches(tmp_path)[0].data == dataclasses.replace(data)
