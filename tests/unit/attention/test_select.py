"""Which backend runs where, what the log says, and what broken packages do: nothing but a line."""

import importlib.machinery
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from internlm_ds.attention import flash, kernels, reference, sdpa, varlen
from internlm_ds.attention.kernels import Setting, Unfit
from internlm_ds.attention.segments import Segments
from internlm_ds.attention.select import attention_function, select
from internlm_ds.errors import ConfigError, MachineError

BF16 = torch.bfloat16
ARGUMENTS = "q, k, v, cu_seqlens_q, cu_seqlens_k, causal"


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    """No flash-attn, and a torch without varlen attention, whatever this machine has."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", varlen.MODULE):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(flash, "_version", lambda generation: f"{generation.number}.1.2")


@pytest.fixture
def gpu(monkeypatch):
    """Make believe that there is a CUDA device of a capability; its kernels work on CPU tensors."""

    def device(capability=8):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(kernels, "trial", lambda attend, setting: attend(*qkv(), SEGMENTS, dropout=0.0))

    device()
    return device


def qkv(kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)]


SEGMENTS = Segments(torch.tensor([0, 1, 6, 12], dtype=torch.int32))


def oracle(q, k, v, borders):
    assert borders.dtype == torch.int32
    return reference.attend(q, k, v, Segments(borders))


class Fakes:
    """Modules with the signatures of the real ones, which note how they are called and compute with the oracle."""

    def __init__(self, monkeypatch):
        self.called = []
        self._set = lambda name, module: monkeypatch.setitem(sys.modules, name, module)

    def add(self, name, **functions):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
        vars(module).update(functions)
        self._set(name, module)

    def flash_2(self):
        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, deterministic=False,
        ):  # fmt: skip
            self.called.append({"number": 2, "causal": causal, "dropout": dropout_p, "deterministic": deterministic})
            assert max_seqlen_q == max_seqlen_k == 6 and cu_seqlens_k is cu_seqlens_q and softmax_scale is None
            return oracle(q, k, v, cu_seqlens_q)

        self.add("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)

    def flash_3(self):
        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, deterministic=False
        ):
            self.called.append({"number": 3, "causal": causal, "deterministic": deterministic})
            assert max_seqlen_q == max_seqlen_k == 6
            return oracle(q, k, v, cu_seqlens_q), "sums"

        self.add("flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func)

    def flash_4(self):
        def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, causal=False, deterministic=False):
            self.called.append({"number": 4, "causal": causal, "deterministic": deterministic})
            return oracle(q, k, v, cu_seqlens_q), None

        self.add("flash_attn.cute", flash_attn_varlen_func=flash_attn_varlen_func)

    def varlen(self):
        def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
            self.called.append({"window": window_size, "groups": enable_gqa})
            assert enable_gqa == (q.shape[1] != k.shape[1]) and max_q == max_k == 6
            return oracle(q, k, v, cu_seq_q)

        self.add(varlen.MODULE, varlen_attn=varlen_attn)

    def varlen_of_2_10(self):
        def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
            self.called.append({"causal": is_causal})
            assert q.shape == k.shape == v.shape
            return oracle(q, k, v, cu_seq_q)

        self.add(varlen.MODULE, varlen_attn=varlen_attn)


@pytest.fixture
def fakes(monkeypatch):
    return Fakes(monkeypatch)


def on_gpu(wish="auto", **others):
    return select(wish, **{"device": "cuda", "dtype": BF16, "head_dim": 128, **others})


def check_result(choice):
    torch.testing.assert_close(choice.attend(*qkv(), SEGMENTS), reference.attend(*qkv(), SEGMENTS))


# ---- which one ------------------------------------------------------------------------------------


def test_flash_attn_2_gets_what_it_needs(gpu, fakes):
    fakes.flash_2()
    choice = on_gpu()
    assert (choice.name, choice.line) == ("flash", "attention: flash-attn 2 (2.1.2)")
    check_result(choice)
    choice.attend(*qkv(), SEGMENTS, dropout=0.25)
    assert fakes.called[-2:] == [
        {"number": 2, "causal": True, "dropout": 0.0, "deterministic": False},
        {"number": 2, "causal": True, "dropout": 0.25, "deterministic": False},
    ]


@pytest.mark.parametrize(
    ("capability", "others", "number"),
    [
        (8, {}, 2),
        (9, {}, 3),
        (9, {"dropout": 0.1}, 2),
        (9, {"head_dim": 100}, 2),
        (10, {}, 4),
        (10, {"head_dim": 256}, 2),
        (12, {}, 2),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_best_generation_for_a_device(gpu, fakes, capability, others, number, deterministic):
    gpu(capability)
    fakes.flash_2(), fakes.flash_3(), fakes.flash_4()
    choice = on_gpu(deterministic=deterministic, **others)
    assert choice.words == f"flash-attn {number} ({number}.1.2)" + ", deterministic" * deterministic
    check_result(choice)
    last = fakes.called[-1]
    assert (last["number"], last["causal"], last["deterministic"]) == (number, True, deterministic)


def test_no_deterministic_backward_no_choice(gpu, fakes):
    """flash-attn 4 has none on Hopper, an old flash-attn 2 none at all."""
    gpu(9)
    fakes.flash_4()
    fakes.add("flash_attn", flash_attn_varlen_func=lambda q, k, v, cu_seqlens_q, cu_seqlens_k, causal: q)
    fakes.varlen()
    assert on_gpu().words == "flash-attn 4 (4.1.2)"
    choice = on_gpu(deterministic=True)
    assert choice.name == "varlen"
    assert "flash-attn 4 has no deterministic backward here" in choice.reason
    assert "flash-attn 2 does not work: this version has no deterministic backward" in choice.reason


def test_torch_varlen_where_flash_attn_is_absent(gpu, fakes):
    fakes.varlen()
    choice = on_gpu()
    assert choice.line == (
        f"attention: torch {torch.__version__} varlen (flash kernels) "
        "(flash-attn is not installed; pip install 'internlm-ds[flash]')"
    )
    check_result(choice)
    assert fakes.called[-1] == {"window": (-1, 0), "groups": True}
    choice.attend(*qkv(kv_heads=4), SEGMENTS)
    assert fakes.called[-1] == {"window": (-1, 0), "groups": False}


def test_torch_varlen_of_older_torch(gpu, fakes):
    fakes.varlen_of_2_10()
    choice = on_gpu("varlen")
    check_result(choice)
    assert fakes.called[-1] == {"causal": True}
    with pytest.raises(ValueError, match="no dropout"):
        choice.attend(*qkv(), SEGMENTS, dropout=0.5)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"use_flash_attn": False}, "model.use_flash_attn=False"),
        ({"device": "cpu"}, "flash-attn needs a CUDA device, this is cpu"),
        ({"dtype": torch.float32}, "flash-attn has no float32"),
        ({"head_dim": 320}, "flash-attn takes heads of up to 256, these have 320"),
        ({}, r"flash-attn is not installed; pip install 'internlm-ds\[flash\]'; torch .* has no varlen attention"),
    ],
)
def test_auto_ends_with_sdpa(gpu, others, reason):
    choice = on_gpu(**others)
    assert (choice.name, choice.attend) == ("sdpa", sdpa.attend)
    assert re.fullmatch(rf"attention: PyTorch SDPA \({reason}.*\)", choice.line)


def test_old_devices_have_sdpa(gpu, fakes):
    gpu(7)
    fakes.flash_2(), fakes.varlen()
    assert "needs compute capability 8.0, this device has 7.x" in on_gpu().line


def test_varlen_drops_nothing(gpu, fakes):
    fakes.varlen()
    assert on_gpu(dropout=0.1).name == "sdpa"
    with pytest.raises(MachineError, match=r"has no dropout \(model.attn_drop_rate\); what runs here: auto, sdpa, ref"):
        on_gpu("varlen", dropout=0.1)


# ---- packages that are there and do not work --------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import flash_attn_2_cuda_is_missing", "No module named"),
        ("raise ImportError('flash_attn_2_cuda.so:\\n undefined symbol: _ZN3c105Error')", "cuda.so: undefined symbol"),
        ("raise OSError('libcudart.so.11.0: cannot open shared object file')", "libcudart"),
        ("raise RuntimeError('x' * 5000)", "xxx…"),
        ("", "no attribute 'flash_attn_varlen_func'"),
        (f"def flash_attn_varlen_func({ARGUMENTS}):\n raise RuntimeError('CUDA error: no kernel image')", "no kernel"),
    ],
)  # fmt: skip
def test_a_broken_flash_attn_is_one_line_with_the_remedy(gpu, fakes, tmp_path, monkeypatch, body, words):
    (tmp_path / "flash_attn").mkdir()
    Path(tmp_path / "flash_attn" / "__init__.py").write_text(body + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    fakes.varlen()
    try:
        choice = on_gpu()
        with pytest.raises(MachineError, match=r'internlm_ds.attention = "flash": flash-attn 2 does not work'):
            on_gpu("flash")
    finally:
        sys.modules.pop("flash_attn", None)
    assert choice.name == "varlen"
    assert "flash-attn 2 does not work: " in choice.line and words in choice.line
    assert f"reinstall it for torch {torch.__version__}" in choice.line
    assert "\n" not in choice.line and len(choice.line) < 700


def test_a_broken_newer_generation_leaves_the_older(gpu, fakes):
    gpu(9)
    fakes.flash_2()
    fakes.add("flash_attn_interface")
    choice = on_gpu()
    assert choice.words == "flash-attn 2 (2.1.2)"
    assert choice.reason.startswith("flash-attn 3 does not work: module 'flash_attn_interface' has no attribute")


def test_a_package_for_other_devices_only(gpu, fakes):
    fakes.flash_3()
    assert "flash-attn 3 is not for compute capability 8.x" in on_gpu().reason


def test_a_torch_without_flash_kernels(gpu, fakes):
    def varlen_attn(*tensors, **options):
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")

    fakes.add(varlen.MODULE, varlen_attn=varlen_attn)
    assert "varlen attention does not work: USE_FLASH_ATTENTION was not enabled" in on_gpu().line


def test_a_trial_goes_forward_and_backward():
    setting = Setting.of("cpu", torch.float32, 16, dropout=0.25)
    seen = []

    def attend(q, k, v, segments, *, dropout):
        seen.append((q.shape, q.dtype, segments.borders, dropout))
        q.register_hook(lambda gradient: seen.append("backward"))
        return sdpa.attend(q, k, v, segments)

    with torch.no_grad():
        kernels.trial(attend, setting)
    assert seen == [((24, 1, 16), torch.float32, (0, 8, 24), 0.25), "backward"]


# ---- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_a_name_is_that_backend(name):
    choice = select(name, use_flash_attn=False, device="cpu", dtype=torch.float32, head_dim=8)
    assert (choice.name, choice.reason) == (name, "")


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_a_name_that_cannot_be_says_what_can(name):
    with pytest.raises(
        MachineError, match=rf'"{name}": .* needs a CUDA device.*; what runs here: auto, sdpa, reference'
    ):
        select(name, device="cpu", dtype=BF16, head_dim=8)
    with pytest.raises(MachineError, match="needs a CUDA device"):
        attention_function(name, use_flash_attn=True)(*qkv(), SEGMENTS)


def test_unknown_backend_is_an_error():
    for find in (attention_function, lambda name, use_flash_attn: on_gpu(name)):
        with pytest.raises(
            ConfigError, match="'xformers' does not exist; there are auto, flash, varlen, sdpa, reference"
        ):
            find("xformers", use_flash_attn=True)


def test_auto_takes_what_the_tensors_allow():
    torch.testing.assert_close(
        attention_function("auto", use_flash_attn=True)(*qkv(), SEGMENTS), sdpa.attend(*qkv(), SEGMENTS)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device answers")
def test_find_without_a_device():
    for find in (flash.find, varlen.find):
        with pytest.raises(Unfit, match="needs a CUDA device"):
            find(Setting.of("cpu", BF16, 128))
