"""Files of `torch.save` are read like torch reads them, and never run."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from internlm_ds.checkpoint import unpickle
from internlm_ds.errors import CheckpointDamagedError, CheckpointError


def archive(path, program, **records):
    """A zip like torch.save's around a hand-made pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/byteorder", "little")
        for name, data in records.items():
            file.writestr(f"x/data/{name}", data)
    return path


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def test_tensors_are_read_as_torch_reads_them(tmp_path):
    base = torch.arange(24, dtype=torch.float32)
    state = collections.OrderedDict(
        whole=base,
        slice=base[3:9],
        transposed=base.reshape(4, 6).t(),
        half=base.to(torch.bfloat16),
        ints=torch.tensor([[1, 2]]),
        scalar=torch.tensor(2.5, dtype=torch.float64),
        empty=torch.empty(0, 3),
        expanded=torch.tensor([1.0]).expand(3),
        parameter=torch.nn.Parameter(torch.ones(2)),
    )
    state._metadata = {"version": 1}
    torch.save(state, tmp_path / "x.pt")
    assert_same(unpickle.load(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True))


def test_lazy_tensors_know_their_shape(tmp_path):
    torch.save({"a": torch.zeros(2, 3, dtype=torch.float16)}, tmp_path / "x.pt")
    lazy = unpickle.load(tmp_path / "x.pt", lazy=True)["a"]
    assert (lazy.shape, lazy.dtype) == ((2, 3), torch.float16)
    assert torch.equal(lazy.load(), torch.zeros(2, 3, dtype=torch.float16))


def test_plain_values_and_numpy_come_back(tmp_path):
    value = {
        "numbers": [1, -2, 2**70, 0.1, float("inf")],
        "tuple": (None, True, "é"),
        3: {"nested": np.random.RandomState(3).get_state()},
        "array": np.arange(6.0).reshape(2, 3).T,
        "scalar": np.float64(0.5),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
    }
    torch.save(value, tmp_path / "x.pt")
    back = unpickle.load(tmp_path / "x.pt")
    assert back["numbers"] == value["numbers"] and back["tuple"] == value["tuple"]
    assert (back[3]["nested"][1] == value[3]["nested"][1]).all() and back[3]["nested"][1].dtype == np.uint32
    assert (back["array"] == value["array"]).all()
    assert (back["scalar"], back["dtype"], back["size"]) == (0.5, torch.bfloat16, (2, 3))


def test_classes_of_the_reference_become_plain_data(tmp_path):
    config = b"cinternlm.core.context.parallel_context\nConfig\n)\x81(X\x01\x00\x00\x00aK\x01u."
    mode = b"cinternlm.core.context.process_group_initializer\nParallelMode\nX\x04\x00\x00\x00zero\x85R."
    assert unpickle.load(archive(tmp_path / "a.pt", b"\x80\x02" + config)) == {"a": 1}
    assert unpickle.load(archive(tmp_path / "b.pt", b"\x80\x02" + mode)) == "zero"


class Touch:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.mkdir, ("{}",), "mkdir"),
        (eval, ("__import__('os').mkdir('{}')",), "eval"),
        (getattr, ("", "join"), "getattr"),
    ],
)
def test_crafted_pickles_do_not_run(tmp_path, protocol, function, arguments, name):
    target = tmp_path / "was-run"
    bait = Touch(function, *(a.format(target) for a in arguments))
    program = pickle.dumps({"weight": bait}, protocol=protocol)
    with pytest.raises(CheckpointError, match=rf"is refused: its pickle asks for .*{name}, which no checkpoint"):
        unpickle.load(archive(tmp_path / "x.pt", program))
    assert not target.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02(S'touch x'\nios\nsystem\n.",  # INST
        b"\x80\x02cos\nsystem\n(S'x'\no.",  # GLOBAL, OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",  # STACK_GLOBAL
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02cnumpy\nload\n.",
        b"\x80\x02cinternlm.core\nsystem\n.",
        b"\x80\x02cinternlmevil\nConfig\n.",
    ],
)
def test_unknown_opcodes_and_globals_are_refused(tmp_path, program):
    with pytest.raises(CheckpointError, match="is refused: its pickle"):
        unpickle.load(archive(tmp_path / "x.pt", program))


def test_a_pickle_cannot_alter_what_the_next_one_gets(tmp_path):
    # BUILD on a class: sets attributes of it where the unpickler hands out a shared one
    poison = b"\x80\x02ccollections\nOrderedDict\n}X\x06\x00\x00\x00poisonK\x01sb."
    with pytest.raises(CheckpointError):
        unpickle.load(archive(tmp_path / "x.pt", poison))
    assert not hasattr(collections.OrderedDict, "poison")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02ccollections\nOrderedDict\n.", "a bare type where data was expected"),
        (b"\x80\x02cnumpy\ndtype\n.", "a bare function where data was expected"),
        (b"\x80\x02K\x01", "its pickle is damaged"),
        (b"\x80\x02r\xff\xff\xff\xff.", "memo index 4294967295 in a pickle of"),
        (b"\x80\x02K\x01K\x02R.", "cannot be unpickled: TypeError"),
        (b"\x80\x02K\x01Q.", "cannot be unpickled"),
        (b"\x80\x02]q\x00h\x00a.", "cannot be unpickled: RecursionError"),
    ],
)
def test_broken_pickles_are_damage(tmp_path, program, message):
    with pytest.raises(CheckpointDamagedError, match=message):
        unpickle.load(archive(tmp_path / "x.pt", program))


def test_tensor_beyond_its_record_is_damage(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(100)}, path)
    with zipfile.ZipFile(path) as file:
        program = next(file.read(n) for n in file.namelist() if n.endswith("data.pkl"))
    small = {"0": bytes(8)}
    with pytest.raises(CheckpointDamagedError, match=r"a tensor \[100\] does not fit its record of 8 bytes"):
        unpickle.load(archive(path, program, **small))
    with pytest.raises(CheckpointDamagedError, match="its record 'data/0' is missing"):
        unpickle.load(archive(path, program))


def test_flipped_bits_of_a_tensor_are_noticed(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.full((100,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((4,), 1.5).numpy().tobytes()) + 5] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match="its record 'data/0' is damaged: Bad CRC-32"):
        unpickle.load(path)


def test_other_files_say_what_they_are(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        unpickle.load(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        unpickle.load(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format of torch before 1\.6.*save it anew"):
        unpickle.load(tmp_path / "old.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointDamagedError, match=r"text\.pt is damaged, or no file of torch\.save"):
        unpickle.load(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(CheckpointError, match=r"a zip file, but not one that torch\.save wrote"):
        unpickle.load(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02}.")
        file.writestr("x/byteorder", "big")
    with pytest.raises(CheckpointError, match="written on a big-endian machine"):
        unpickle.load(tmp_path / "big.pt")


def storage(key=b"0", numel=4):
    """Pickle of a reference to a storage, up to the memo."""
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + len(key).to_bytes(4, "little") + key
        + b"X\x03\x00\x00\x00cpuJ" + numel.to_bytes(4, "little") + b"tQ"
    )  # fmt: skip


NESTED = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"h\x3c"
"""A list of the list before it, twice, sixty times: a few hundred bytes whose text would have 2**60 pieces."""


@pytest.mark.parametrize(
    "program",
    [
        b"cinternlm.core\nParallelMode\n(" + NESTED + b"tR.",
        b"cnumpy\ndtype\n(" + NESTED + b"tR.",
        b"ctorch\ndevice\n(" + NESTED + b"tR.",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + NESTED + b"X\x03\x00\x00\x00cpuK\x04tQ.",
        NESTED + b"Q.",
    ],
)
def test_lists_that_double_and_double_are_not_spelt_out(tmp_path, program):
    with pytest.raises(CheckpointDamagedError, match="cannot be unpickled"):
        unpickle.load(archive(tmp_path / "x.pt", b"\x80\x02" + program))


@pytest.mark.parametrize(
    "sizes", ["(J\xff\xff\xff\x7f(J\xff\xff\xff\x7f", "(K\x04J\x00\x00\x00\x40", "(J\xff\xff\xff\xff"]
)
def test_a_small_record_does_not_become_a_huge_tensor(tmp_path, sizes):
    sizes = sizes.replace("(J\xff\xff\xff\x7f(J", "(J\xff\xff\xff\x7fJ").encode("latin1")
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\x00" + sizes + b"t(K\x00K\x00t\x89NtR."
    with pytest.raises(CheckpointDamagedError, match=r"a tensor of . dimensions that its record of 4 cannot hold"):
        unpickle.load(archive(tmp_path / "x.pt", program, **{"0": bytes(16)}))


def test_records_that_lie_upon_each_other_are_refused(tmp_path):
    """A zip bomb without compression: many names for the same bytes."""
    path = archive(tmp_path / "x.pt", b"\x80\x02}.", **{"0": bytes(5000)})
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("x/data/0")
        for number in range(1, 40):
            twin = zipfile.ZipInfo(f"x/data/{number}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, field, getattr(first, field))
            file.filelist.append(twin)
            file.NameToInfo[twin.filename] = twin
        file._didModify = True
    with pytest.raises(CheckpointError, match=r"its records claim .* bytes, the whole file has"):
        unpickle.load(path)


def test_compressed_records_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\x80\x02}.")
        file.writestr("x/data/0", bytes(10**6))
    with pytest.raises(CheckpointError, match=r"a zip file, but not one that torch\.save wrote"):
        unpickle.load(tmp_path / "x.pt")


@pytest.mark.parametrize("key", [b"../../etc/passwd", b"0/../1", b"-1", b""])
def test_storages_have_plain_numbers(tmp_path, key):
    program = b"\x80\x02" + storage(key) + b"."
    with pytest.raises(CheckpointDamagedError, match="a reference to something that is no storage"):
        unpickle.load(archive(tmp_path / "x.pt", program))
