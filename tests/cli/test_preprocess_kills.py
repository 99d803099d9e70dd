"""`preprocess text` killed again and again, then `--resume`: the files are those of a run that nobody disturbed."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_ds.preprocess.train_tokenizer import train_tokenizer

SCRIPT = Path(__file__).with_name("preprocess_killed.py")
KINDS = {"one": ["--eos"], "shards": ["--shard-size", "6K"], "compat": ["--compat", "reference"]}
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "log", "猫", "坐在", "垫子上", "。", "3.5", *["\n"] * 3]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Inputs of all kinds, a model, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("kills")
    rng = random.Random(5)
    text = " ".join(rng.choices(WORDS, k=8000))
    (folder / "a.txt").write_text(text[:12000] + "\n" + text.replace("\n", " ")[:20000] + "\n" + text[12000:], "utf-8")
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": text[i : i + 700]}) + "\n" for i in range(0, 9000, 700)).encode())
    )
    (folder / "c.json").write_text(json.dumps(text.split("\n")[:300]), "utf-8")
    train_tokenizer([text] * 3, folder / "tiny.model", vocab_size=320)
    for kind in KINDS:
        done = command(folder, 0, kind, f"{kind}/en/x.bin")
        assert done.returncode == 0, done.stderr
        (folder / f"{kind}.steps").write_text(done.stdout.splitlines()[-1])
    return folder


def command(folder, kill_at, kind, output, *options, **more):
    arguments = ["preprocess", "text", "a.txt", "b.jsonl.gz", "c.json", "--output", output, "--tokenizer", "tiny.model"]
    full = [sys.executable, str(SCRIPT), str(kill_at), *arguments, *KINDS[kind], "--workers", "2", *options]
    return subprocess.run(full, cwd=folder, capture_output=True, text=True, check=False, **more)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_whole_or_absent(folder, expected):
    """What can be seen is as it shall be; a bin is never seen before its meta."""
    seen = {path.name: path.read_bytes() for path in folder.glob("x*")} if folder.exists() else {}
    assert seen.items() <= expected.items()
    assert all(f"{name}.meta" in seen for name in seen if name.endswith(".bin"))


def disturb(place, kind, seed):
    rng = random.Random(seed)
    expected = content(place / kind / "en")
    output = f"{kind}-{seed}/en/x.bin"
    steps = int((place / f"{kind}.steps").read_text())
    for _ in range(rng.randint(1, 3)):
        done = command(place, rng.randint(1, steps), kind, output, "--resume")
        assert done.returncode in (-9, 0), done.stderr
        check_whole_or_absent((place / output).parent, expected)
    done = command(place, 0, kind, output, "--resume")
    assert done.returncode == 0, done.stderr
    assert content((place / output).parent) == expected


@pytest.mark.parametrize(("kind", "seed"), [("one", 1), ("shards", 2), ("compat", 3)])
def test_killed_runs_are_resumed_to_the_same_bytes(place, kind, seed):
    disturb(place, kind, seed)


def test_kill_between_the_names_is_mended(place):
    """Killed while files get their names: some bins are there and some are not."""
    expected = content(place / "shards/en")
    done = command(place, f"names:{len(expected) - 2}", "shards", "names/en/x.bin")
    assert done.returncode == -9, done.stdout
    check_whole_or_absent(place / "names/en", expected)
    seen = len(list((place / "names/en").glob("x*")))
    assert 0 < seen < len(expected)
    done = command(place, 0, "shards", "names/en/x.bin", "--resume")
    assert done.returncode == 0 and content(place / "names/en") == expected


@pytest.mark.soak
@pytest.mark.skipif(os.environ.get("INTERNLM_DS_SOAK") != "1", reason="a long loop: make soak")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_kills_at_steps_and_thirty_at_any_moment(place, kind):
    for seed in range(100, 130):
        disturb(place, kind, seed)
    rng = random.Random(7)
    expected = content(place / kind / "en")
    for number in range(30):
        output = f"{kind}-moment-{number}/en/x.bin"
        moment, code = 1.5, -9
        while code:
            try:
                code = command(place, 0, kind, output, "--resume", timeout=rng.uniform(0.2, moment)).returncode
            except subprocess.TimeoutExpired:
                moment *= 1.2  # a busy machine is to finish some time
                check_whole_or_absent((place / output).parent, expected)
        assert content((place / output).parent) == expected
