"""AdamW that keeps its moments, and what it updates, in bf16 where it is asked to; the update itself is fp32.

The same arithmetic as torch's fused AdamW, which does it: on fp32 copies, a block at a time, of what is stored, and
what is stored is rounded at random (`rounding`). To the nearest number would not do: bf16 has 8 bits, so half a step
between neighbours is 1/512 to 1/256 of a number. exp_avg_sq moves by at most 1 - beta2 of itself towards a smaller
square, 1/1000 at beta2 = 0.999, and would be rounded back to where it was for ever; and a weight would lose every
update below 1/512 of itself. Rounded at random, such steps are taken seldom, whole, and right on average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from internlm_ds.engine.rounding import Numbers, Part, Piece, parts, round_into
from internlm_ds.translate.optimizer_kind import block_numel

MOMENTS = ("exp_avg", "exp_avg_sq")


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) over flat tensors of which `pieces` says what they hold.

    Elements outside all pieces (what fills a partition up) stay as they are.

    Args:
        params, lr, betas, eps, weight_decay: As `torch.optim.AdamW`'s.
        moments_dtype: Of exp_avg and exp_avg_sq, `torch.float32` or `torch.bfloat16`. Parameters of either dtype are
            updated in their own.
        seed: Of the rounding.
        block: Elements updated at a time; None: what suits the device.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        moments_dtype: torch.dtype,
        seed: int,
        block: int | None = None,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments_dtype, self._seed, self._block = moments_dtype, seed, block
        # flat tensor -> what it holds; DeepSpeed makes the flat tensors after the optimizer
        self.pieces: Mapping[torch.Tensor, Sequence[Piece]] = {}

    def new_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state before the first update; the count lies on the host, where it seeds the rounding."""
        moments = {kind: torch.zeros_like(flat, dtype=self.moments_dtype, requires_grad=False) for kind in MOMENTS}
        return {"step": torch.zeros((), dtype=torch.float32), **moments}

    @torch.no_grad()
    def step(self, closure: None = None, *, gradients: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        """One update of every flat tensor that has a gradient.

        Args:
            closure: Not used.
            gradients: By flat tensor, of any dtype; None: each one's `grad`.
        """
        for group in self.param_groups:
            for flat in group["params"]:
                gradient = flat.grad if gradients is None else gradients[flat]
                if gradient is not None:
                    self._update(flat, gradient, group)

    def _update(self, flat: torch.Tensor, gradient: torch.Tensor, group: Mapping[str, Any]) -> None:
        assert flat in self.pieces, "the engine says what a flat tensor holds before the first update"
        state = self.state[flat]
        if not state:
            state.update(self.new_state(flat))
        update = int(state["step"])
        count = torch.full((), update, dtype=torch.float32, device=flat.device)
        generator, block = torch.Generator(device=flat.device), self._block or block_numel(flat.device.type)
        held = [state["exp_avg"], state["exp_avg_sq"], flat.detach()]
        for piece in self.pieces[flat]:
            for part in parts(piece, block_numel=block):
                numbers = Numbers(generator, seed=self._seed, name=piece.name, part=part, update=update)
                self._update_part(held, gradient, part, numbers, count, group)
        state["step"] += 1

    def _update_part(
        self,
        held: Sequence[torch.Tensor],
        gradient: torch.Tensor,
        part: Part,
        numbers: Numbers,
        count: torch.Tensor,
        group: Mapping[str, Any],
    ) -> None:
        stored = [tensor.narrow(0, part.place, part.count) for tensor in held]
        exact = [tensor.float() for tensor in stored]  # itself where it is fp32
        exp_avg, exp_avg_sq, weights = exact
        adamw(
            [weights],
            [gradient.narrow(0, part.place, part.count).float()],
            [exp_avg],
            [exp_avg_sq],
            [],
            [count.clone()],  # torch counts in place
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for target, value in zip(stored, exact, strict=True):
            if target.dtype != torch.float32:
                round_into(target, value, numbers.draw())
