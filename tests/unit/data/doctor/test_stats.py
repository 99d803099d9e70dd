"""`data stats`: numbers that the samples and the packers themselves confirm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import chats, sound_set, texts

from internlm_ds.cli.main import main
from internlm_ds.data.doctor.stats import histogram, packing_of
from internlm_ds.data.packing import FixedSegmentPacker, PaddedBatcher, SegmentPacker
from internlm_ds.data.samples import ListedSamples

CONFIG = Path(__file__).parents[4] / "model_configs" / "debug_cpu.py"

lengths = st.lists(st.integers(0, 20), max_size=15)


@given(lengths=lengths, seq_len=st.integers(1, 5), rows=st.integers(1, 3), kind=st.integers(0, 2))
def test_packing_is_what_the_packs_hold(lengths, seq_len, rows, kind):
    packer = (SegmentPacker, FixedSegmentPacker, PaddedBatcher)[kind](
        ListedSamples([[1] * length for length in lengths]), packed_length=seq_len * rows, seq_len=seq_len
    )
    found, packs = packing_of(packer), [packer[index] for index in range(len(packer))]
    assert (found.samples, found.tokens, found.micro_batches) == (len(lengths), sum(lengths), len(packs))
    assert found.places == sum(len(pack.tokens) for pack in packs)
    assert found.used == sum(int((pack.tokens == 1).sum()) for pack in packs)
    assert found.used + found.left_over == found.tokens
    if kind < 2:
        assert found.segments == sum(len(pack.cu_seqlens) - 1 for pack in packs)
    else:
        assert found.segments == sum(int((pack.tokens[pack.cu_seqlens[:-1]] == 1).sum()) for pack in packs)


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_every_sample_is_in_the_bucket_of_its_length(lengths):
    buckets = list(histogram(np.array(lengths, dtype=np.int64)))
    assert sum(one.samples for one in buckets) == len(lengths)
    for one in buckets:
        inside = [length for length in lengths if one.from_length <= length < one.to_length]
        assert (one.samples, one.tokens) == (len(inside), sum(inside))


def test_numbers_of_a_set_by_type(tmp_path, capsys):
    folder = sound_set(tmp_path / "set")
    assert main(["data", "stats", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["types"]) == ["cn", "code", "en"]
    english, chinese = record["types"]["en"], record["types"]["cn"]
    assert (english["samples"], english["tokens"]) == (60, sum(map(len, texts(60))))
    assert english["learned"] == sum(len(sample) - 1 for sample in texts(60))
    assert chinese["learned"] == sum(sum(i > 0 for i in sample[1:]) for sample in chats(30))
    assert record["total"]["tokens"] == sum(one["tokens"] for one in record["types"].values())
    assert record["total"]["longest"] == max(map(len, [*texts(60), *chats(30)]))
    assert main(["data", "stats", str(folder)]) == 0
    assert "\nall " in capsys.readouterr().out


def test_packing_of_a_configuration(tmp_path, capsys):
    folder = sound_set(tmp_path / "set")
    words = ["--config", str(CONFIG), "--set", f"data.train_folder={folder}", "--set", "model.vocab_size=10000"]
    words += ["--set", "data.seq_len=64", "--set", "data.min_length=10", "--world-size", "1"]
    assert main(["data", "stats", *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    english = record["packing"]["en"]
    kept = [sample for sample in texts(60) if len(sample) >= 10]
    assert (english["samples"], english["tokens"]) == (len(kept), sum(map(len, kept)))
    assert english["places"] == english["used"] == english["tokens"] - english["left_over"]
    assert record["packing"]["all"]["micro_batches"] >= record["steps_per_epoch"] > 0
    assert main(["data", "stats", *words]) == 0
    assert f"{record['steps_per_epoch']} steps an epoch" in capsys.readouterr().out


def test_shares_of_a_mixture(tmp_path, capsys):
    folder = sound_set(tmp_path / "set")
    types = sorted(path.name for path in folder.iterdir())
    weights = {name: 1 + place for place, name in enumerate(types)}
    words = ["--config", str(CONFIG), "--set", f"data.train_folder={folder}", "--set", "model.vocab_size=10000"]
    words += ["--set", "data.seq_len=16", "--set", f"internlm_ds.data_weights={weights}"]
    words += ["--set", "data.total_steps=200", "--set", "lr_scheduler.total_steps=200"]
    assert main(["data", "stats", *words, "--json"]) == 0
    mixture = json.loads(capsys.readouterr().out)["mixture"]
    total = sum(weights.values())
    assert {one["name"]: one["asked"] for one in mixture} == {name: w / total for name, w in weights.items()}
    assert all(abs(one["given"] - one["asked"]) < 0.02 and one["passes"] > 0 for one in mixture)
    assert main(["data", "stats", *words]) == 0
    assert "mixture over 200 steps with one data-parallel rank: " in capsys.readouterr().out
    words[-5] = f"internlm_ds.data_weights={{'{types[0]}': 1}}"
    assert main(["data", "stats", *words]) == 2
    assert "gives no weight to" in capsys.readouterr().err


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    folder = sound_set(tmp_path / "set")
    assert main(["data", "stats", str(folder), "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = sound_set(tmp_path / "set")
    assert main(["data", "stats", str(folder), "--plot", str(tmp_path / "a.png")]) == 2
    assert "internlm-ds[plot]" in capsys.readouterr().err


def test_a_type_folder_and_shares_are_named(tmp_path, capsys):
    sound_set(tmp_path / "out" / "train")
    assert main(["data", "stats", str(tmp_path / "out"), "--json"]) == 0
    assert "train/en" in json.loads(capsys.readouterr().out)["types"]
    assert main(["data", "stats", str(tmp_path / "out" / "train" / "en"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["types"]) == ["en"]
