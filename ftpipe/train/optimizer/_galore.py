"""Adam on gradients projected to a low rank, as a torch optimizer: what `q_galore` builds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adam import adam

from ftpipe.train.optimizer._lowbit import Packed, pack, unpack
from ftpipe.train.run import derive_seed

if TYPE_CHECKING:
    from ftpipe.train.optimizer.q_galore import QGalore

BITS = {"int4": 4, "int8": 8}


class ProjectedAdam(torch.optim.Optimizer):
    """See `q_galore.QGalore` for what it computes.

    State of a projected matrix: step (times it was updated), exp_avg and exp_avg_sq (of the projected gradient), the projection in its stored form,
    `first` (its first singular vector in float32), `history` (the last cosines), `gap` and `refreshes` (SVDs so far). Others have Adam's own three.

    Attributes:
        seed: of the rounding, set before each step. refreshed: SVDs of the last step.
    """

    def __init__(self, groups: list[dict[str, Any]], method: QGalore):
        super().__init__(groups, {"lr": 0.0})
        self.method, self.pattern = method, re.compile(method.matrices)
        self.seed, self.refreshed = 0, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.refreshed = 0
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                if parameter.dim() == 2 and self.pattern.search(name):
                    self._matrix(name, parameter, group["lr"])
                else:
                    self._adam(parameter, parameter.grad, self.state[parameter], group["lr"])
                    self._decay(parameter, group["lr"])

    def _matrix(self, name: str, parameter: torch.nn.Parameter, rate: float) -> None:
        method, state, gradient = self.method, self.state[parameter], parameter.grad.float()
        if "gap" not in state:
            if not gradient.any():
                return  # no direction to be found yet (LoRA's A while B is zero)
            state |= {"step": torch.tensor(0.0), "gap": torch.tensor(method.update_gap), "refreshes": torch.tensor(0), "history": torch.zeros(0)}
        right = parameter.shape[0] >= parameter.shape[1]
        if int(state["step"]) % int(state["gap"]) == 0:
            self._refresh(state, gradient, right)
        basis = self._basis(state, parameter, right)
        low = gradient @ basis if right else basis.T @ gradient
        update = torch.zeros_like(low)
        self._adam(update, low, state, rate)
        before = parameter.clone() if method.weights == "int8" else None
        parameter.add_(update @ basis.T if right else basis @ update, alpha=method.scale)
        self._decay(parameter, rate)
        if before is not None and not parameter.equal(before):
            # The scales are fresh at each rounding, so a matrix that did not move would jitter.
            generator = torch.Generator(device=parameter.device).manual_seed(derive_seed(self.seed, name))
            parameter.copy_(unpack(pack(parameter, 8, method.group, generator), tuple(parameter.shape), 8, method.group))

    def _refresh(self, state: dict[str, Any], gradient: torch.Tensor, right: bool) -> None:
        """The leading singular vectors of this gradient become the projection; the gap grows if the first of them has long stayed the same."""
        method = self.method
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        basis = (v[: method.rank].T if right else u[:, : method.rank]).contiguous()
        first = basis[:, 0].clone()
        if "first" in state:
            # The sign of a singular vector is arbitrary.
            cosine = torch.nn.functional.cosine_similarity(first, state["first"], dim=0).abs().cpu()
            state["history"] = torch.cat([state["history"].cpu(), cosine[None]])[-method.queue:]
            if method.cosine is not None and len(state["history"]) == method.queue and float(state["history"].mean()) >= method.cosine:
                state["gap"] = (state["gap"] * method.gap_factor).long()
        state["first"] = first
        state["refreshes"] = state["refreshes"] + 1
        if method.projection == "float32":
            state["basis"] = basis
        else:
            packed = pack(basis, BITS[method.projection], method.group)
            state |= {"basis": packed.codes, "basis_scale": packed.scale, "basis_zero": packed.zero}
        self.refreshed += 1

    def _basis(self, state: dict[str, Any], parameter: torch.Tensor, right: bool) -> torch.Tensor:
        """The projection: [shorter side, rank], float32."""
        method = self.method
        if method.projection == "float32":
            return state["basis"]
        shape = (min(parameter.shape), min(method.rank, *parameter.shape))
        return unpack(Packed(state["basis"], state["basis_scale"], state["basis_zero"]), shape, BITS[method.projection], method.group)

    def _adam(self, value: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], rate: float) -> None:
        """One step of torch's Adam on `value`, in place."""
        if "exp_avg" not in state:
            state.setdefault("step", torch.tensor(0.0))
            state |= {"exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
        adam([value], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], foreach=False, amsgrad=False,
             beta1=self.method.beta1, beta2=self.method.beta2, lr=rate, weight_decay=0.0, eps=self.method.eps, maximize=False)

    def _decay(self, parameter: torch.Tensor, rate: float) -> None:
        if self.method.weight_decay and rate:
            parameter.mul_(1 - rate * self.method.weight_decay)
