#!/usr/bin/env python
"""Text to bin and meta: our preprocessing beside sentencepiece that writes the same files, A B A B ….

`python benchmarks/tokenizing.py --model tokenizer_internlm.model --model tokenizer_internlm2.model` makes the mixed
corpus (`corpus.py`), and measures for each model

* inside: from a loaded model to finished files, one thread and two, ours (with its engine loaded, its cache empty)
  against sentencepiece with as many threads;
* whole: a process from its start to its end, `internlm-ds preprocess text` against a sentencepiece script with one
  thread;
* the peak memory of those processes, ours also with a corpus of `--large-megabytes`;
* whether bin and meta are byte for byte the same.

Every figure comes from a process of its own. `--quick` takes 1 MB and one round, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import corpus
import pairs

# the line of a job's process: what, threads, corpus, output, model, file for the seconds inside
JOB = "--job"
BATCH_LINES = 4096


def main(argv: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else list(argv)
    if args[:1] == [JOB]:
        return _job(*args[1:])
    parser = _parser()
    options = parser.parse_args(args)
    if not options.model and not options.quick:
        parser.error("--model FILE: which tokenizer? Only --quick makes one of its own")
    return _report(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="FILE", help="a sentencepiece model; repeats; needed")
    add("--megabytes", type=float, default=20.0, help="of the corpus (default %(default)s)")
    add("--large-megabytes", type=float, default=500.0, help="of the one for memory; 0: none (default %(default)s)")
    add("--text", metavar="FILE", help="a text to take instead of the mixed corpus")
    add("--root", action="append", default=[], metavar="DIR", help="a folder that corpus.py searches, too")
    add("--rounds", type=int, default=5, help="of A B A B (default %(default)s)")
    add("--quick", action="store_true", help="1 MB, one round, no large corpus; trains a tiny model if none is given")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


@dataclass(frozen=True)
class Bench:
    """Where a model's jobs run."""

    model: str
    text: Path
    folder: Path

    def output(self, name: str) -> Path:
        return self.folder / "en" / f"{name}.bin"

    def inside(self, what: str, threads: int) -> float:
        """MB/s of one run inside its process."""
        seconds = self.folder / "seconds"
        command = [sys.executable, __file__, JOB, what, str(threads), str(self.text)]
        pairs.process([*command, str(self.output(f"{what}{threads}")), self.model, str(seconds)], environ=_environ())
        return self.megabytes / float(seconds.read_text())

    def whole(self, what: str, *, threads: int = 1) -> pairs.Finished:
        """A process from start to end."""
        output = self.output(f"whole_{what}{threads}")
        if what == "sentencepiece":
            command = [__file__, JOB, what, str(threads), str(self.text), str(output), self.model, os.devnull]
        else:
            command = ["-m", "internlm_ds.cli.main", "preprocess", "text", str(self.text), "--output", str(output)]
            command += ["--tokenizer", self.model, "--workers", str(threads), "--overwrite"]
        return pairs.process([sys.executable, *command], environ=_environ())

    @property
    def megabytes(self) -> float:
        return self.text.stat().st_size / 1e6


def _environ() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}


def _tiny_model(text: Path, path: Path) -> str:
    """Trains a tokenizer in a second, of InternLM's kind: BPE, text as it is, bytes for what is unknown."""
    import sentencepiece

    with open(path, "wb") as file, open(text, encoding="utf-8") as lines:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line.strip() for line in lines][:2000]),
            model_writer=file,
            model_type="bpe",
            vocab_size=3000,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=0.98,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return str(path)


# ---- what is measured ------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace) -> int:
    if args.quick:
        args.megabytes, args.rounds, args.large_megabytes = 1.0, 1, 0.0
    report: dict[str, Any] = pairs.facts(args, packages=("numpy", "numba", "sentencepiece"))
    print(pairs.headline(report))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(args.text or Path(folder) / "mixed.txt")
        report["corpus"] = args.text or corpus.write(text, megabytes=args.megabytes, roots=args.root)
        print(report["corpus"].removeprefix(folder + os.sep))
        args.model = args.model or [_tiny_model(text, Path(folder) / "tiny.model")]
        for model in args.model:
            report[Path(model).name] = _measure(Bench(model, text, Path(folder)), args)
            _show(Path(model).name, report[Path(model).name])
    pairs.write_json(report, args.json)
    same = all(report[Path(model).name]["equal"] for model in args.model)
    return 0 if same else 1


def _measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    bench.output("x").parent.mkdir(exist_ok=True)
    bench.whole("ours")  # tables and compiled code come to lie on disk
    jobs = [(what, threads) for threads in (1, 2) for what in ("sentencepiece", "ours")]
    inside = pairs.in_turn(
        {f"{what}{n}": lambda what=what, n=n: bench.inside(what, n) for what, n in jobs}, rounds=args.rounds
    )
    runs: dict[str, list[pairs.Finished]] = {"sentencepiece": [], "ours": [], "ours2": []}

    def whole(name: str) -> float:
        runs[name].append(bench.whole(name.rstrip("2"), threads=2 if name.endswith("2") else 1))
        return bench.megabytes / runs[name][-1].seconds

    whole_rates = pairs.in_turn({name: lambda name=name: whole(name) for name in runs}, rounds=args.rounds)
    result: dict[str, Any] = {
        "inside_mb_per_s": inside,
        "whole_mb_per_s": whole_rates,
        "ratios": {
            "inside, 1 thread": pairs.ratio(inside["ours1"], inside["sentencepiece1"]),
            "inside, 2 threads": pairs.ratio(inside["ours2"], inside["sentencepiece2"]),
            "whole, 1 thread": pairs.ratio(whole_rates["ours"], whole_rates["sentencepiece"]),
            "whole, 2 threads to 1": pairs.ratio(whole_rates["ours2"], whole_rates["sentencepiece"]),
        },
        "peak_mb": {name: max(run.peak_mb for run in found) for name, found in runs.items()},
        # what a busy machine moves least
        "whole_cpu_seconds": {name: min(run.cpu_seconds for run in found) for name, found in runs.items()},
        "equal": _equal(bench),
    }
    if args.large_megabytes:
        large = Bench(bench.model, bench.folder / "large.txt", bench.folder)
        repeats = max(1, round(args.large_megabytes / bench.megabytes))
        with large.text.open("wb") as file:
            for _ in range(repeats):
                file.write(bench.text.read_bytes())
        result["peak_mb"]["ours, large"] = large.whole("ours").peak_mb
        result["peak_mb"]["ours2, large"] = large.whole("ours", threads=2).peak_mb
        result["large_mb"] = large.megabytes
        for path in (large.text, large.output("whole_ours1"), large.output("whole_ours2")):
            path.unlink()
    return result


def _equal(bench: Bench) -> bool:
    """Whether every bin and meta is byte for byte that of one sentencepiece thread."""

    def content(name: str) -> tuple[bytes, bytes]:
        path = bench.output(name)
        return path.read_bytes(), Path(f"{path}.meta").read_bytes()

    truth = content("sentencepiece1")
    return all(content(name) == truth for name in ("sentencepiece2", "ours1", "ours2", "whole_ours1", "whole_ours2"))


def _show(name: str, result: dict[str, Any]) -> None:
    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    rows = [[f"inside, {key}", median(values)] for key, values in result["inside_mb_per_s"].items()]
    rows += [[f"whole, {key}", median(values)] for key, values in result["whole_mb_per_s"].items()]
    print("\n" + pairs.table([name, "MB/s"], rows))
    print("\n" + pairs.table(["ours over sentencepiece", "median (min-max)"], [*result["ratios"].items()]))
    print("\n" + pairs.table(["whole, one process", "seconds of processor"], [*result["whole_cpu_seconds"].items()]))
    print("\n" + pairs.table(["peak memory", "MB"], [*result["peak_mb"].items()]))
    print(f"\nbin and meta byte for byte sentencepiece's: {'yes' if result['equal'] else 'NO'}")


# ---- one run in its process ------------------------------------------------------------------------------------------


def _job(what: str, threads: str, text: str, output: str, model: str, seconds: str) -> int:
    run = {"sentencepiece": _sentencepiece, "ours": _ours}[what]
    taken = run(text, output, model, int(threads))
    Path(seconds).write_text(repr(taken))
    return 0


def _sentencepiece(text: str, output: str, model: str, threads: int) -> float:
    """What a script with sentencepiece does: the stripped lines of a file, encoded in batches."""
    import numpy as np
    import sentencepiece

    sentencepiece.set_min_log_level(2)
    processor = sentencepiece.SentencePieceProcessor(model_file=model)

    def work() -> None:
        offset, meta = 0, []
        with open(text, encoding="utf-8") as source, open(output, "wb") as target:
            lines = [line for line in (line.strip() for line in source) if line]
            for i in range(0, len(lines), BATCH_LINES):
                for ids in processor.encode(lines[i : i + BATCH_LINES], num_threads=threads):
                    row = json.dumps({"tokens": ids}).encode() + b"\n"
                    target.write(row)
                    meta.append((offset, len(ids)))
                    offset += len(row)
        with open(f"{output}.meta", "wb") as file:
            np.save(file, np.array(meta, dtype=np.int64))

    return pairs.seconds(work)


def _ours(text: str, output: str, model: str, threads: int) -> float:
    from internlm_ds.preprocess.engine.select import row_encoder
    from internlm_ds.preprocess.pretrain import Work, tokenize_texts
    from internlm_ds.preprocess.tokenizers import open_tokenizer

    tokenizer = open_tokenizer(model)
    row_encoder(tokenizer, engine="compiled")  # loads its code; its cache is not the one of the run

    def work() -> None:
        options = Work(workers=threads, engine="compiled")
        tokenize_texts([text], output, tokenizer=tokenizer, work=options, overwrite=True)

    return pairs.seconds(work)


if __name__ == "__main__":
    sys.exit(main())
