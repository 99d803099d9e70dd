"""`data show --run` names exactly the documents that the loader handed to the training, also of runs that went on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import train, write_run

from internlm_ds.cli.data_show_run import run_show_run
from internlm_ds.cli.main import main
from internlm_ds.data.binmeta import decode_line
from internlm_ds.errors import DataFormatError

pytestmark = pytest.mark.timeout(300)

CAPTURING = Path(__file__).with_name("pretrain_capturing.py")


def shown(run: Path, capsys: pytest.CaptureFixture[str], **asked: Any) -> dict[str, Any]:
    assert run_show_run(str(run), as_json=True, **{"step": None, **asked}) == 0
    return json.loads(capsys.readouterr().out)


def delivered(run: Path, rank: int) -> dict[int, list[list[int]]]:
    """Tokens of each micro-batch by batch index, as the training of one rank got them from its loader."""
    lines = (run / f"delivered{rank}.jsonl").read_text().splitlines()
    return {batch["index"]: batch["tokens"] for batch in map(json.loads, lines)}


def tokens_of(pack: dict[str, Any], total: int) -> list[int]:
    """The micro-batch that the named lines of the named files make."""
    tokens = np.zeros(total, dtype=np.int64)
    for piece in pack["documents"]:
        with open(piece["path"], "rb") as file:
            text = file.readlines()[piece["line"] - 1]
        document = decode_line(text, path=piece["path"], line=piece["line"], offset_bytes=0)
        assert len(document) == piece["length"]
        tokens[piece["place"] : piece["place"] + piece["to"] - piece["from"]] = document[piece["from"] : piece["to"]]
    return tokens.tolist()


def check(run: Path, ranks: int, indices: range, capsys: pytest.CaptureFixture[str]) -> None:
    by_rank = [delivered(run, rank) for rank in range(ranks)]
    for index in indices:
        (batch,) = shown(run, capsys, step=index)["batches"]
        assert len(batch["ranks"]) == ranks
        assert batch["trained"] != batch["skipped"], index
        for rank, packs in enumerate(batch["ranks"]):
            if not batch["skipped"]:
                assert [tokens_of(pack, 64) for pack in packs] == by_rank[rank][index]
            assert batch["skipped"] == (index not in by_rank[rank])


def test_a_run_and_the_one_that_resumed_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("INTERNLM_DS_TOKENIZER", raising=False)
    ramp = "data.rampup_batch_size=1 1 3"
    config, first, second = write_run(tmp_path, stop_at=8), tmp_path / "run1", tmp_path / "run2"
    train(config, first, ramp, "data.micro_num=4", ranks=2, script=CAPTURING)
    (tmp_path / "stop").write_text("0")
    # another number of ranks takes over, and comes into the second pass over the data
    steps = train(config, second, ramp, "data.micro_num=4", "data.skip_batches=4,12-13,15", script=CAPTURING)

    check(first, 2, range(9), capsys)
    check(second, 1, range(9, 20), capsys)
    assert shown(second, capsys, step=19)["batches"][0]["epoch"] == 1
    with pytest.raises(DataFormatError, match="no batch 8 in this run directory: it begins with batch 9"):
        run_show_run(str(second), step=8)

    worst = sorted(steps, key=lambda step: -step["loss"])[:3]
    found = shown(second, capsys, top_loss=3)
    assert [(b["step"], b["loss"]) for b in found["batches"]] == [(step["step"], step["loss"]) for step in worst]
    left_out = {4, 12, 13, 15, *(step["step"] for step in worst)}
    parts = [part.split("-") for part in found["skip_batches"].split(",")]
    assert {index for part in parts for index in range(int(part[0]), int(part[-1]) + 1)} == left_out

    assert main(["data", "show", "--run", str(second), "--step", "12"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("batch 12: left out by skip_batches; epoch 0, 1 data-parallel rank x 4 micro-batches, ")
    assert out.endswith('to leave this batch out: data.skip_batches = "4,12-13,15"\n')
    assert err == "no text is shown without --tokenizer MODEL\n"
