"""`internlm-ds generate`: a continuation on stdout, and every way in which it can fail."""

import os
import subprocess
import sys

import pytest
import sentencepiece
import torch

from internlm_ds.arch import blueprint
from internlm_ds.checkpoint.formats import native
from internlm_ds.cli.main import main
from internlm_ds.config.schema import ModelConfig
from internlm_ds.convert.run import Request, convert
from internlm_ds.generate.chat import Chat, question
from internlm_ds.generate.run import load_model
from internlm_ds.layout.ranks import Layout
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.parallel.context import Axis
from internlm_ds.preprocess.tokenizers import open_tokenizer

VOCAB = 300
MODEL = dict(num_layers=2, hidden_size=16, vocab_size=VOCAB, num_attention_heads=2, mlp_ratio=2.0, dtype="bfloat16")
CONFIG = f"""
JOB_NAME = "tiny"
ckpt = dict(enable_save_ckpt=False)
data = dict(seq_len=8, total_steps=2, train_folder=None)
hybrid_zero_optimizer = dict(reduce_bucket_size=1000, clip_grad_norm=1.0)
adam = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=2)
beta2_scheduler = dict(init_beta2=0.95)
parallel = dict(zero1=-1)
model = dict({", ".join(f"{k}={v!r}" for k, v in MODEL.items() if k != "dtype")}, dtype="torch.bfloat16")
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    text = [f"the quick brown fox number {i} jumps over the lazy dog {i * i}" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(prefix),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return f"{prefix}.model"


def save(folder, *, config_text=CONFIG, settings=True, model_type="INTERNLM", **switches):
    config = ModelConfig(**MODEL | switches)
    arch = blueprint(model_type, config) or blueprint("INTERNLM", config)
    model = LanguageModel(build_layers(arch, config, tensor=Axis.single("tensor"), seed=1, dtype=torch.bfloat16))
    weights = [(name, parameter.detach()) for name, parameter in model.named_logical_parameters()]
    state = {"step_count": 7}
    native.save(
        folder,
        weights=weights,
        train_state=state,
        config_text=config_text,
        layout=Layout(),
        arch=arch,
        dtype="bfloat16",
        model=config if settings else None,
        model_type=model_type,
        step=7,
    )
    return model, folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "7")


def run(*args, env=None):
    return subprocess.run(
        [sys.executable, "-m", "internlm_ds.cli.main", "generate", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def test_continuation(saved, tokenizer):
    _, folder = saved
    options = ("--prompt", "the quick", "--max-new-tokens", 8, "--seed", 3)
    first = run(folder, "--tokenizer", tokenizer, *options)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the quick") and len(first.stdout) > len("the quick\n")
    second = run(f"local:{folder}", *options, env={"INTERNLM_DS_TOKENIZER": tokenizer})
    assert second.stdout == first.stdout


def test_weights_are_the_saved_ones(saved):
    model, folder = saved
    loaded, arch = load_model(str(folder), device="cpu")
    assert arch.vocab_size == VOCAB and not loaded.training
    for (name, found), (_, expected) in zip(loaded.named_logical_parameters(), model.named_logical_parameters()):
        assert found.dtype == torch.float32 and torch.equal(found, expected.float()), name


@pytest.fixture
def fails(capsys):
    """Runs the command within this process (torch is loaded already) and looks for words in its error."""

    def check(args, *words):
        assert main(["generate", *map(str, args)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        for word in words:
            assert word in printed.err

    return check


def test_no_checkpoint(tmp_path, tokenizer):
    result = run(tmp_path, "--tokenizer", tokenizer, "--prompt", "a")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("CheckpointError: ") and "manifest.json" in result.stderr


def test_no_tokenizer(saved, fails, monkeypatch):
    monkeypatch.delenv("INTERNLM_DS_TOKENIZER", raising=False)
    fails([saved[1], "--prompt", "a"], "no tokenizer model", "--tokenizer")


def test_object_store(tokenizer, fails):
    args = ["volc:vc://bucket.host/7", "--tokenizer", tokenizer, "--prompt", "a"]
    fails(args, "write boto3:s3://bucket/7")


def test_empty_prompt(saved, tokenizer, fails):
    fails([saved[1], "--tokenizer", tokenizer, "--prompt", ""], "the prompt has no tokens; give --prompt a text")


def test_larger_tokenizer(tmp_path, tokenizer, fails):
    _, folder = save(tmp_path / "7", vocab_size=280, config_text=CONFIG.replace(str(VOCAB), "280"))
    fails(
        [folder, "--tokenizer", tokenizer, "--prompt", "a"],
        "pieces, the model's vocabulary 280: give the tokenizer that its data was made with",
    )


def test_config_of_another_model(tmp_path, tokenizer, fails):
    _, folder = save(tmp_path / "7", mlp_ratio=17.0)
    (tmp_path / "config.py").write_text(CONFIG)
    fails(
        [folder, "--config", tmp_path / "config.py", "--tokenizer", tokenizer, "--prompt", "a"],
        "does not fit the model (6 parameters)",
        "blocks.0.mlp.w1.weight",
    )


GROUPED = {"num_attention_heads": 4, "num_kv_attention_heads": 2, "no_bias": True}


@pytest.mark.parametrize("kind", ["native", "internlm", "hf"])
@pytest.mark.parametrize("family", ["INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"])
def test_any_family_and_format(tmp_path, tokenizer, family, kind):
    model, folder = save(tmp_path / "7", settings=True, model_type=family, **(GROUPED if family != "INTERNLM" else {}))
    if kind != "native":
        convert(Request(str(folder), str(tmp_path / "out"), "native", kind, verify=False))
        folder = tmp_path / "out"
    loaded, _ = load_model(str(folder), device="cpu")
    ids, borders = torch.arange(5), torch.tensor([0, 5], dtype=torch.int32)
    torch.testing.assert_close(loaded(ids, borders), model(ids, borders).float(), atol=0.02, rtol=0.02)
    plain, _ = load_model(str(tmp_path / "7"), device="cpu")
    torch.testing.assert_close(loaded(ids, borders), plain(ids, borders), atol=1e-5, rtol=1e-5)


def test_settings_in_the_manifest_come_first(tmp_path):
    """A run with overrides: its config.py says something else."""
    _, folder = save(tmp_path / "7", settings=True, num_layers=3, config_text="# nothing")
    assert load_model(str(folder), device="cpu")[1].num_layers == 3


def test_registered_model_types(tmp_path, tokenizer, fails):
    _, folder = save(tmp_path / "7", settings=True, model_type="MINE")
    fails([folder, "--tokenizer", tokenizer, "--prompt", "a"], "holds a model of type 'MINE'; known are INTERNLM, ")


PIECES = ("--eoh", "<0x01>", "--eoa", "<0x02>"), ("--im-start", "<0x01>", "--im-end", "<0x02>")


@pytest.mark.parametrize(("template", "pieces"), [("internlm", PIECES[0]), ("internlm2", PIECES[1])])
def test_chat_prints_the_answer_alone(saved, tokenizer, template, pieces, capsys):
    options = ("--prompt", "the quick", "--max-new-tokens", "4", "--template", template, "--system", "be brief")
    assert main(["generate", str(saved[1]), "--tokenizer", tokenizer, *options, *pieces]) == 0
    assert not capsys.readouterr().out.startswith("the quick")


def test_a_question_ends_where_the_answer_begins(tokenizer):
    model = open_tokenizer(tokenizer)
    start, end = (model.piece_id(f"<0x0{n}>") for n in (1, 2))
    chat = Chat("internlm2", pieces={"im_start": "<0x01>", "im_end": "<0x02>"})
    ids, ends = question("the fox", chat, model)
    user, opening = (model.encode([text])[0] for text in ("user\nthe fox", "assistant\n"))
    assert ids[: len(user) + 3] == [model.bos_id, start, *user, end] and ids[-len(opening) - 1 :] == [start, *opening]
    assert set(ends) == {start, end}


def test_chat_options_need_a_template(saved, tokenizer, fails):
    fails([saved[1], "--tokenizer", tokenizer, "--prompt", "a", "--system", "b"], "need --template")


def test_broken_config(tmp_path, tokenizer, fails):
    _, folder = save(tmp_path / "7")
    (tmp_path / "config.py").write_text(CONFIG.replace("num_layers", "num_layer"))
    options = ("--config", tmp_path / "config.py", "--tokenizer", tokenizer, "--prompt", "a")
    fails([folder, *options], "ConfigError", "num_layer")


def test_a_configuration_inside_a_checkpoint_is_never_executed(tmp_path, tokenizer, fails):
    trap = tmp_path / "executed"
    _, folder = save(tmp_path / "7", settings=False, config_text=f"open({str(trap)!r}, 'w')\n{CONFIG}")
    fails([folder, "--tokenizer", tokenizer, "--prompt", "a"], "does not say which model it holds; give --config")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "is no temperature; give a number, 0 or more"),
        ("--top-p", "0", "is no probability; give a number above 0, up to 1"),
        ("--max-new-tokens", "-3", "is negative; give a number of tokens, 0 or more"),
        ("--seed", "x", "invalid int value"),
    ],
)
def test_options_are_checked(option, value, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "anywhere", "--prompt", "a", option, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
