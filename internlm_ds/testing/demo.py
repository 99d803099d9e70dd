"""`make demo`: the whole way once, on a CPU, in a few minutes, with commands that can be copied.

Text of this machine -> a tokenizer of its own -> bin/meta -> two processes under the `deepspeed` launcher -> a
checkpoint -> a second launch that resumes -> a Hugging Face folder -> generated text -> a report. Every step but the
corpus is one of the commands that users type; each is printed before it runs, its whole output lies in
`runs/demo/logs/`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from internlm_ds.preprocess.train_tokenizer import train_tokenizer
from internlm_ds.testing import corpus

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path("runs/demo")
CONFIG = "model_configs/demo.py"
SAVED = DEMO / "checkpoints"
TOKENIZER = DEMO / "tokenizer.model"

VOCAB_SIZE = 512
FIRST_STEPS, ALL_STEPS = 700, 900
VALIDATE_EVERY = 300
SHOW_EVERY = 50
RANKS = 2
CORPUS_CHARS = {"code": 3_000_000, "en": 1_000_000}
VALID_SHARE = 40  # one piece of text in so many is for validation
LARGEST_LOSS_RATIO = 0.6
PROMPT = "def main("

# small steps and a small rate: larger ones stay near the frequencies of single tokens for long
SETTINGS = {
    "TRAIN_FOLDER": DEMO / "data" / "train",
    "VALID_FOLDER": DEMO / "data" / "valid",
    "VOCAB_SIZE": VOCAB_SIZE,
    "NUM_LAYER": 2,
    "MICRO_BSZ": 1,
    "LEARNING_RATE": 1e-3,
    "SCHEDULE_STEPS": ALL_STEPS,
    "CHECKPOINT_EVERY": 350,
    "data.valid_every": VALIDATE_EVERY,
}

# the same on every machine: no GPU, one thread per process, two processes
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
LOG_LINE = re.compile(r"\t(?:INFO|WARNING) \S+ in \S+ -- (?P<message>.*)")


class DemoFailedError(Exception):
    """A step of the demo went wrong; the text says which and where to look."""


def main() -> int:
    """Run the demo below the current checkout; returns the exit code."""
    os.chdir(ROOT)
    started = time.monotonic()
    try:
        begin_afresh()
        make_corpus()
        for split in ("train", "valid"):
            for kind in CORPUS_CHARS:
                tokenize(split, kind)
        train("train", steps=FIRST_STEPS)
        train("resume", steps=ALL_STEPS)
        print_results(seconds=time.monotonic() - started)
    except DemoFailedError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


def begin_afresh() -> None:
    """An earlier demo is removed: its checkpoints would be resumed."""
    shutil.rmtree(DEMO, ignore_errors=True)
    (DEMO / "logs").mkdir(parents=True)


def make_corpus() -> None:
    """Write `runs/demo/text/{train,valid}/{code,en}.jsonl` and train a tokenizer on the training part."""
    heading("text of this machine: the standard library's sources, documentation of what is installed")
    texts = {"code": corpus.standard_library(), "en": corpus.documentation()}
    train_texts: list[str] = []
    for kind, max_chars in CORPUS_CHARS.items():
        found = corpus.pieces(texts[kind], max_chars=max_chars)
        if len(found) < 2 * VALID_SHARE:
            raise DemoFailedError(f"this machine has too little text of type {kind!r}: {len(found)} pieces")
        parts = {
            "train": [t for i, t in enumerate(found) if i % VALID_SHARE],
            "valid": found[::VALID_SHARE],
        }
        for split, chosen in parts.items():
            write_jsonl(DEMO / "text" / split / f"{kind}.jsonl", chosen)
        train_texts += parts["train"][:: 2 if kind == "code" else 1]
        print(f"  {kind}: {len(found)} pieces of text, {sum(map(len, found)) / 1e6:.1f} million characters")
    train_tokenizer(train_texts, TOKENIZER, vocab_size=VOCAB_SIZE, max_chars=1_500_000)
    print(f"  a sentencepiece model of {VOCAB_SIZE} pieces, trained on it: {TOKENIZER}")


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


def tokenize(split: str, kind: str) -> None:
    """One bin/meta pair with the tutorial's script."""
    heading(f"tokens of the {split} set, type {kind}")
    source, target = DEMO / "text" / split / f"{kind}.jsonl", DEMO / "data" / split / kind / "text.bin"
    options = ["--text_input_path", source, "--bin_output_path", target, "--tokenizer", TOKENIZER, "--eos"]
    run(f"tokenize-{split}-{kind}", [python(), "preprocessing/tokenizer.py", *options])


def train(name: str, *, steps: int) -> None:
    """One launch of `launch/pretrain.py` on two processes; the second one finds the first one's checkpoint."""
    heading(f"training to step {steps} on {RANKS} processes" + ("" if name == "train" else ", resumed"))
    launcher = beside_python("deepspeed")
    command = [launcher, "--num_accelerators", RANKS, "--master_port", free_port(), "launch/pretrain.py"]
    command += ["--config", CONFIG, "--backend", "gloo", "--run-dir", DEMO / name]
    settings = {**SETTINGS, "TOTAL_STEPS": steps}
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    run(name, command, progress=training_progress)


def print_results(*, seconds: float) -> None:
    """Export, continue a prompt, draw the curves; then the summary. Raises if the loss did not fall far enough."""
    checkpoint, exported, report = SAVED / str(ALL_STEPS), DEMO / "hf", DEMO / "report.html"
    heading("the checkpoint as a Hugging Face folder")
    ours = beside_python("internlm-ds")
    formats = ["--from", "native", "--to", "hf", "--tokenizer", TOKENIZER]
    run("export", [ours, "convert-checkpoint", checkpoint, exported, *formats])
    heading("a prompt, continued by the trained model")
    sampling = ["--prompt", PROMPT, "--max-new-tokens", "80", "--temperature", "0.6", "--top-p", "0.9"]
    text = run("generate", [ours, "generate", checkpoint, "--tokenizer", TOKENIZER, *sampling])
    heading("the curves of both launches on one page")
    run("report", [ours, "report", DEMO / "train", DEMO / "resume", "-o", report])

    first_launch, second_launch = steps_of(DEMO / "train"), steps_of(DEMO / "resume")
    first, last = first_launch[0]["loss"], second_launch[-1]["loss"]
    heading(f"done in {seconds:.0f} s")
    print(f"  first loss        {first:.4f}")
    print(f"  last loss         {last:.4f}   ({last / first:.0%} of the first)")
    print(f"  second launch     resumed at step {second_launch[0]['step']}")
    print(f"  exported model    {exported}")
    print(f"  report            {report}")
    print("  continuation     ", text.strip().replace("\n", "\n" + " " * 20))
    if second_launch[0]["step"] != FIRST_STEPS:
        raise DemoFailedError(f"the second launch began at step {second_launch[0]['step']}, not at {FIRST_STEPS}")
    if not last <= LARGEST_LOSS_RATIO * first:
        raise DemoFailedError(f"the last loss is {last / first:.0%} of the first, above {LARGEST_LOSS_RATIO:.0%}")


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """Steps of a run, validation left out."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "validation" not in record]
    if not steps:
        raise DemoFailedError(f"{run_dir / 'metrics.jsonl'} holds no step")
    return steps


def run(name: str, command: Sequence[Any], *, progress: Any = None) -> str:
    """Print a command, run it, keep its output in `runs/demo/logs/NAME.log`, return it.

    Args:
        progress: Makes from the lines of the output what is shown; by default everything is.
    Raises:
        DemoFailedError: The command failed.
    """
    words = [str(word) for word in command]
    settings = [f"{key}={value}" for key, value in ENVIRONMENT.items() if progress and key != "PYTHONUNBUFFERED"]
    print("  $ " + shlex.join([*settings, *words]), flush=True)
    log = DEMO / "logs" / f"{name}.log"
    environment = {**os.environ, **ENVIRONMENT}
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        lines = kept(process.stdout, file)
        output = list(lines) if progress is None else []
        for shown in output if progress is None else progress(lines):
            print("  " + shown.rstrip("\n"), flush=True)
    if process.returncode != 0:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-30:])
        raise DemoFailedError(f"the command above ended with exit code {process.returncode}; {log} ends with\n{tail}")
    return "".join(output)


def kept(lines: Iterator[str], file: Any) -> Iterator[str]:
    for line in lines:
        file.write(line)
        yield line


def training_progress(lines: Iterator[str]) -> Iterator[str]:
    """Start-up lines, validation, and some steps, shortened."""
    for line in lines:
        match = LOG_LINE.search(line)
        if match is None:
            continue
        message = match["message"]
        values = dict(pair.split("=", 1) for pair in message.split(",") if "=" in pair)
        if "num_consumed_tokens" not in values:
            yield message[:160]
        elif int(values["step"]) % SHOW_EVERY == 0:
            speed = values["tgs (tokens/gpu/second)"]
            yield f"step {values['step']:>4}   loss {float(values['loss']):.4f}   {speed} tokens/s per process"


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def python() -> str:
    return shown_path(Path(sys.executable))


def beside_python(name: str) -> str:
    """A command of this environment: it need not be on the PATH."""
    return shown_path(Path(sys.executable).parent / name)


def shown_path(path: Path) -> str:
    """Relative to the checkout where it lies inside: shorter to read and to copy."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
