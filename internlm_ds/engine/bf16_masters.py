"""DeepSpeed's optimizer for bf16 weights and fp32 sums of gradients, without fp32 master weights.

DeepSpeed's own `bf16_master_weights_and_grads` belongs to its other optimizer, which would sum gradients in bf16, keeps
a second copy of the weights, and rounds updates to the nearest number. Here this rank's share of the weights is what
`RoundedAdamW` updates; gradients stay fp32 until they are used.
"""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import clip_tensors_by_global_norm, get_global_norm_of_tensors, is_invalid_grad_norm


class WeightsAsMasters(BF16_Optimizer):
    """`BF16_Optimizer` whose masters are the bf16 weights themselves."""

    def _setup_for_real_optimizer(self) -> None:
        super()._setup_for_real_optimizer()
        for i, group in enumerate(self.optimizer.param_groups):
            rank = dist.get_rank(group=self.real_dp_process_group[i])
            own = self.bf16_partitioned_groups[i][rank].detach()
            self.fp32_groups_flat_partition[i] = own
            group["params"] = [own]
        self._link_all_hp_params()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """As DeepSpeed's, but the optimizer gets the fp32 gradients: as `grad` of a bf16 tensor they would be bf16."""
        norm = get_global_norm_of_tensors(self.get_grads_for_norm()[0], mpu=self.mpu, norm_type=self.norm_type)
        self._global_grad_norm, self.overflow = norm, is_invalid_grad_norm(norm)
        if self.overflow:
            self._global_grad_norm = float("inf")
            self.clear_hp_grads()
            self.clear_lp_grads()
            return
        if self.clip_grad > 0:
            held = self.get_grads_for_norm(for_clipping=True)
            clip_tensors_by_global_norm(held, max_norm=self.clip_grad, global_norm=norm, mpu=self.mpu)
        flats, gradients = self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition
        self.optimizer.step(gradients=dict(zip(flats, gradients, strict=True)))
        self.update_lp_params()
        self.clear_hp_grads()
