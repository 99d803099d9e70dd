"""`internlm-ds preprocess` and the two scripts: exit codes, messages, where the model is looked for."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from internlm_ds.cli.main import main
from internlm_ds.cli.preprocess_text import size_in_bytes
from internlm_ds.data.binmeta import Reader
from internlm_ds.preprocess.train_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "preprocessing" / "tokenizer.py"
ALPACA_SCRIPT = ROOT / "preprocessing" / "alpaca_tokenizer.py"
RECORDS = [{"instruction": f"cat {i}", "input": "", "output": "the mat"} for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    texts = ["the cat sat on the mat, the dog sat on the log. " * 20]
    return str(train_tokenizer(texts, path, vocab_size=300, control_pieces=["<eoh>", "<eoa>"]))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of one's own to stand in, and no model from the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INTERNLM_DS_TOKENIZER", raising=False)
    (tmp_path / "a.txt").write_text("the cat\nthe dog\n")
    (tmp_path / "alpaca.json").write_text(json.dumps(RECORDS))
    return tmp_path


def script(path, *arguments, **environ):
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ}, check=False)


def failure(capsys, *arguments):
    """Exit code and stderr of a command that must fail, in this process."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def test_text_command_writes_three_files_and_a_summary(model, capsys):
    assert main(["preprocess", "text", "a.txt", "--output", "cn/a.bin", "--tokenizer", model]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("cn/a.bin: 2 samples, ") and printed.err == ""
    assert sorted(path.name for path in Path("cn").iterdir()) == ["a.bin", "a.bin.json", "a.bin.meta"]


def test_text_command_takes_globs_compression_and_all_options(model, capsys):
    Path("b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "the log"}\n'))
    options = ["--bos", "--eos", "--text-key", "body", "--tokenizer_path", model]
    assert main(["preprocess", "text", "*.txt", "b.jsonl.gz", "--output", "en/a.bin", *options]) == 0
    samples = [tokens.tolist() for tokens in Reader("en/a.bin")]
    assert len(samples) == 3 and all(sample[0] == 1 and sample[-1] == 2 for sample in samples)
    assert main(["preprocess", "text", "a.txt", "--output", "en/a.bin", "--append", *options]) == 0
    assert len(Reader("en/a.bin")) == 5
    assert main(["preprocess", "text", "a.txt", "--output", "en/a.bin", "--overwrite", *options]) == 0
    assert len(Reader("en/a.bin")) == 2


def test_text_command_shards_resumes_and_verifies(model, capsys):
    command = ["preprocess", "text", "*.txt", "--output", "en/a.bin", "--tokenizer", model, "--resume"]
    command += ["--shard-size", "0.01K", "--workers", "2", "--verify"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("en/a-00000.bin and 1 more: 2 samples, ")
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("en/a-00000.bin and 1 more: complete already, 2 samples, ") and printed.err == ""
    assert [len(Reader(f"en/a-0000{i}.bin")) for i in range(2)] == [1, 1]
    code, err = failure(capsys, *command, "--bos")
    assert code == 2 and "bos was False, now True. --overwrite replaces it" in err


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("10", 10), ("500K", 512_000), ("1.5k", 1536), ("2G", 1 << 31), ("64M", 1 << 26)]
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


def test_bos_and_eos_are_off_by_default_and_on_with_compat(model):
    for output, options, ends in (
        ("en/a.bin", [], (False, False)),
        ("en/b.bin", ["--compat", "reference"], (True, True)),
        ("en/c.bin", ["--compat", "reference", "--no-bos", "--no-eos"], (False, False)),
    ):
        assert main(["preprocess", "text", "a.txt", "--output", output, "--tokenizer", model, *options]) == 0
        first = Reader(output).tokens(0)
        assert (first[0] == 1, first[-1] == 2) == ends
    assert np.load("en/a.bin.meta").dtype == np.int64 and np.load("en/b.bin.meta").dtype == np.int32


def test_warnings_go_to_stderr_and_do_not_fail(model, capsys):
    options = ["--tokenizer", model, "--compat", "reference", "--text-key", "x"]
    assert main(["preprocess", "text", "a.txt", "--output", "french/a.tokens", *options]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("warning: ") for line in lines)
    assert "--text-key has no effect with --compat reference" in lines[0]


def test_alpaca_command_prints_the_reference_tools_lines(model, capsys):
    command = ["preprocess", "alpaca", "alpaca.json", "out", "--tokenizer", model, "--split-ratio", "0.25"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and [line.split(",")[0] for line in printed.out.splitlines()] == [
        "number of train dataset: 6",
        "number of validation dataset: 2",
    ]
    assert main([*command, "--overwrite", "--seed", "3", "--eoh", "17", "--eoa", "<eoh>"]) == 0
    assert 17 in -Reader("out/train/en/dataset.bin").tokens(0)


def test_alpaca_command_reports_truncation_and_an_empty_share(model, capsys):
    Path("alpaca.json").write_text(json.dumps([{**RECORDS[0], "output": "dog " * 3000}]))
    assert main(["preprocess", "alpaca", "alpaca.json", "out", "--tokenizer", model]) == 0
    err = capsys.readouterr().err
    assert "warning: 1 of 1 train samples were cut at 2048 tokens, " in err
    assert "warning: no validation samples: out/valid/en/dataset.bin is empty" in err


CHATS = [
    {"messages": [{"role": "user", "content": f"the {i}"}, {"role": "assistant", "content": "cat " * 20}]}
    for i in range(8)
]


def test_chat_command_takes_all_options_and_reports(model, capsys):
    Path("chat.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in [*CHATS, {"messages": CHATS[0]["messages"][:1]}])
    )
    command = ["preprocess", "chat", "chat.jsonl", "out", "--tokenizer", model, "--template", "internlm"]
    assert (
        main([*command, "--split-ratio", "0", "--seed", "1", "--type", "cn", "--no-bos", "--eos", "--eoh", "17"]) == 0
    )
    printed = capsys.readouterr()
    assert printed.out.startswith("number of train dataset: 8, ")
    assert "warning: 1 train samples with nothing to learn were left out, " in printed.err
    samples = [sample.tolist() for sample in Reader("out/train/cn/dataset.bin")]
    assert all(sample[0] < 0 and sample[-1] == 2 and -17 in sample for sample in samples)
    for way, said in (
        ("cut", "were cut at 30 tokens, "),
        ("drop", "beyond 30 tokens were left out, "),
        ("split", "were made into"),
    ):
        assert main([*command, "--type", "cn", "--overwrite", "--max-tokens", "30", "--too-long", way]) == 0
        assert said in capsys.readouterr().err


def test_second_chat_template_with_ids_for_its_pieces(model):
    Path("chat.json").write_text(json.dumps(CHATS))
    pieces = ["--im-start", "17", "--im-end", "<eoa>"]
    command = ["preprocess", "chat", "chat.json", "out", "--tokenizer", model, "--template", "internlm2"]
    assert main([*command, *pieces]) == 0
    assert Reader("out/train/en/dataset.bin").tokens(0)[:2].tolist() == [1, -17]


def test_custom_command_uses_the_function(model, capsys):
    Path("mine.py").write_text(
        "def make(record):\n    return [('the', False), (record['output'], True)] if record['input'] == '' else None\n"
    )
    Path("own.json").write_text(json.dumps([*RECORDS, {"input": "x"}]))
    command = [
        "preprocess",
        "custom",
        "own.json",
        "out",
        "--tokenizer",
        model,
        "--function",
        "mine.py:make",
        "--no-eos",
    ]
    assert main([*command, "--split-ratio", "0.25"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("number of train dataset: 6, ")
    assert printed.err == "warning: 1 records were left out by mine.py:make\n"
    assert Reader("out/train/en/dataset.bin").tokens(0)[-1] != 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "no.txt", "--output", "en/a.bin"], "DataFormatError: no.txt: no such input file"),
        (["text", "*.jsonl", "--output", "en/a.bin"], "DataFormatError: *.jsonl: no file matches this pattern"),
        (["text", "a.txt", "--output", "a.txt"], "DataFormatError: a.txt: the output exists; --append"),
        (["text", "a.txt", "--output", "a.txt/x/a.bin"], "DataFormatError: a.txt/x: Not a directory"),
        (["text", "alpaca.json", "--output", "en/a.bin"], 'alpaca.json, line 1: this record has no field "text"'),
        (["text", "a.txt"], "the following arguments are required: --output"),
        (["text", "a.txt", "--output", "a.bin", "--append", "--overwrite"], "not allowed with argument --append"),
        (["text", "a.txt", "--output", "a.bin", "--compat", "other"], "invalid choice: 'other'"),
        (
            ["text", "a.txt", "--output", "a.bin", "--shard-size", "2X"],
            "'2X' is no size; write bytes, or 500K, 64M, 2G",
        ),
        (["text", "a.txt", "--output", "en/a.bin", "--workers", "0"], "--workers 0: at least 1"),
        (["text", "a.txt", "--output", "en/a.bin", "--engine", "fast"], "invalid choice: 'fast'"),
        (["text", "a.txt", "--output", "en/a.bin", "--append", "--resume"], "--append and --resume exclude each other"),
        (["alpaca", "a.txt", "out"], "DataFormatError: a.txt, line 1: a .json input is one list"),
        (["alpaca", "alpaca.json", "out", "--split-ratio", "2"], "--split-ratio 2.0: a share between 0 and 1"),
        (["alpaca", "alpaca.json", "out", "--split-ratio", "x"], "invalid float value: 'x'"),
        (["alpaca", "alpaca.json", "out", "--eoh", "<nope>"], "TokenizerError: tiny.model has no piece '<nope>'"),
        (["alpaca", "alpaca.json", "out", "--eoa", "300"], "--eoa 300: the ids of tiny.model run from 0 to 299"),
        (["alpaca", "alpaca.json", "out", "--max-tokens", "2"], "--max-tokens 2: a sample needs 3 tokens at least"),
        (["chat", "alpaca.json", "out"], "the following arguments are required: --template"),
        (["chat", "alpaca.json", "out", "--template", "internlm"], "alpaca.json, line 1: record 1: it has neither"),
        (["chat", "alpaca.json", "out", "--template", "internlm2"], "no piece '<|im_start|>' nor '[UNUSED_TOKEN_146]'"),
        (["custom", "alpaca.json", "out", "--function", "no.py:x"], "no.py: --function no.py:x: no such file"),
        ([], "the following arguments are required: TASK"),
    ],
)
def test_wrong_use_exits_with_2_and_says_why(model, capsys, place, arguments, message):
    task, rest = arguments[:1], arguments[1:]
    code, err = failure(capsys, "preprocess", *task, *rest, *(["--tokenizer", model] if task else []))
    assert code == 2 and message in err and "Traceback" not in err
    assert not list(place.rglob("*.bin")) and not list(place.rglob("*.tmp"))


def test_no_tokenizer_exits_with_2_and_says_how_to_supply_one(capsys):
    code, err = failure(capsys, "preprocess", "text", "a.txt", "--output", "en/a.bin")
    assert code == 2 and "give --tokenizer MODEL" in err and "$INTERNLM_DS_TOKENIZER" in err
    code, err = failure(capsys, "preprocess", "text", "a.txt", "--output", "en/a.bin", "--tokenizer", "a.txt")
    assert code == 2 and "a.txt is no sentencepiece model" in err


def test_unwritable_folder_is_a_line_not_a_traceback(model, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "en")

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, err = failure(capsys, "preprocess", "text", "a.txt", "--output", "en/a.bin", "--tokenizer", model)
    assert code == 2 and err == "DataFormatError: en: Permission denied\n"


def test_script_takes_the_tutorials_flags_from_any_folder(model):
    arguments = ["--text_input_path", "a.txt", "--bin_output_path", "cn/output.bin"]
    done = script(SCRIPT, *arguments, INTERNLM_DS_TOKENIZER=model)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("cn/output.bin: 2 samples")
    done = script(SCRIPT, *arguments, INTERNLM_DS_TOKENIZER=model)
    assert done.returncode == 2 and done.stderr.startswith("DataFormatError: cn/output.bin: the output exists")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def checkout(place):
    """A checkout of its own whose script may be edited; the package lies beside it, as it does in ours."""
    (place / "checkout" / "preprocessing").mkdir(parents=True)
    (place / "checkout" / "internlm_ds").symlink_to(ROOT / "internlm_ds")
    copy = place / "checkout" / "preprocessing" / "tokenizer.py"
    copy.write_text(SCRIPT.read_text())
    return copy


def test_script_finds_the_model_named_in_it_or_beside_it(model, checkout):
    arguments = ["--text_input_path", "a.txt", "--overwrite", "--bin_output_path", "cn/a.bin"]
    done = script(checkout, *arguments)
    assert done.returncode == 2 and f"set TOKENIZER at the top of {checkout}" in done.stderr
    checkout.with_name("V7_sft.model").write_bytes(Path(model).read_bytes())
    assert script(checkout, *arguments).returncode == 0
    assert json.loads(Path("cn/a.bin.json").read_text())["tokenizer"]["name"] == "V7_sft.model"
    checkout.write_text(checkout.read_text().replace('TOKENIZER = ""', f"TOKENIZER = {model!r}"))
    assert script(checkout, *arguments).returncode == 0
    assert json.loads(Path("cn/a.bin.json").read_text())["tokenizer"]["name"] == "tiny.model"


def test_alpaca_script_takes_the_tutorials_arguments(model):
    done = script(ALPACA_SCRIPT, "alpaca.json", "out", model, "--split_ratio", "0.25")
    assert (done.returncode, done.stderr) == (0, "") and "number of train dataset: 6" in done.stdout
    done = script(ALPACA_SCRIPT, "alpaca.json", "out", model, "--compat", "reference", "--seed", "1")
    assert done.returncode == 2 and "the output exists" in done.stderr


def test_help_of_the_command_is_quick_to_import():
    code = "import sys; from internlm_ds.cli.main import main\ntry: main(['preprocess', 'text', '--help'])\n"
    code += "except SystemExit: pass\nprint([m for m in ('numpy', 'torch', 'sentencepiece') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ids_beside_every_shard(tmp_path, model):
    from internlm_ds.data import side_file

    (tmp_path / "a.txt").write_text("the cat sat\n" * 200)
    output = tmp_path / "en" / "x.bin"
    words = ("--output", str(output), "--tokenizer", str(model), "--shard-size", "2K", "--side-file")
    assert main(["preprocess", "text", str(tmp_path / "a.txt"), *words]) == 0
    bins = sorted((tmp_path / "en").glob("x-*.bin"))
    assert len(bins) > 1 and all(side_file.find(str(path)) is not None for path in bins)
