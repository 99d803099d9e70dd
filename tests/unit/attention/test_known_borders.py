"""Borders that the host knows are not read from the device again."""

from __future__ import annotations

import torch

from internlm_ds.attention.segments import Segments


def test_known_borders_are_those_of_the_host_until_the_tensor_changes(monkeypatch):
    host = torch.tensor([0, 3, 8, 8], dtype=torch.int32)
    there = host.clone()
    Segments.know(there, host)
    with monkeypatch.context() as patched:
        patched.setattr(Segments, "__init__", lambda *_: (_ for _ in ()).throw(AssertionError("read again")))
        assert Segments.of(there).borders == (0, 3, 8)
        assert Segments.of(there).cu_seqlens.tolist() == [0, 3, 8]
    there[1] = 5
    assert Segments.of(there).borders == (0, 5, 8)
