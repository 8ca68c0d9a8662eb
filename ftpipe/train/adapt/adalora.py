"""AdaLoRA (Zhang et al. 2023): the change of a weight is P diag(e) Q, and ranks move during training from the matrices that need them least to the others.

Every triplet (a column of P, an entry of e, a row of Q) has an importance: smoothed |w dL/dw| times its smoothed uncertainty, of the entry and of the mean
over the vectors. From step `warmup` on, the number of triplets of all matrices together falls along a cubic from `init_r` to `target_r` a matrix, and stays
there for the last `settle` steps; entries of e outside the budget are set to zero. P and Q are pulled towards orthonormal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.train.adapt._peft import PeftAdapt
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

PREFIX = "base_model.model."
PLACEHOLDER = 2**31


class Adalora(PeftAdapt):
    """PEFT's AdaLoRA layers and its allocator of ranks. The allocator is given whole copies of values and gradients, so it works under every ZeRO stage.

    The penalty is PEFT's and the authors' code's: `orthogonality` times the mean over all P and Q of the Frobenius norm (not its square, as the paper
    writes) of P'P - I and QQ' - I; its gradient is added to that of the step. `orthogonality` in the metrics is that mean.
    """

    paper: ClassVar[str] = "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"

    target_r: int = Field(default=8, ge=1, description="Mean rank of a matrix at the end.")
    init_r: int = Field(default=12, ge=1, description="Rank of every matrix at the start.")
    alpha: float = Field(default=32, gt=0, description="Scale of the change: it is multiplied by alpha / init_r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of a layer's inputs that are dropped before Q, during training.")
    target_modules: list[str] | str = Field(default="all-linear", description="Names (or ends of names) of the layers to adapt, a regular expression, or "
                                            "`all-linear` for every linear layer but the output layer.")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps before the first rank is taken away.")
    settle: float = Field(default=0.3, ge=0, lt=1, description="Share of the steps at the end in which ranks stay as they are.")
    every: int = Field(default=1, ge=1, description="Steps between two allocations.")
    beta1: float = Field(default=0.85, gt=0, lt=1, description="Smoothing of the sensitivity.")
    beta2: float = Field(default=0.85, gt=0, lt=1, description="Smoothing of the uncertainty.")
    orthogonality: float = Field(default=0.5, ge=0, description="Weight of the penalty that keeps P and Q orthonormal.")
    bias: Literal["none"] = Field(default="none", description="Biases do not train.")

    def sized(self, size: int) -> Adapt:
        # The rank it starts with is what trains; the share of it that is left at the end stays about the same.
        left = max(1, min(size - 1, round(size * self.target_r / self.init_r)))
        return self.with_fields(init_r=size, target_r=left, alpha=self.alpha * size / self.init_r)

    def outline(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        wrapped = super().outline(model, run)
        for name, parameter in wrapped.named_parameters():
            if "ranknum" in name:  # on the meta device PEFT makes it new, as if it trained
                parameter.requires_grad_(False)
        return wrapped

    def config(self) -> PeftConfig:
        from peft import AdaLoraConfig

        # How many steps there are is known only when the rows are: `_times` sets it.
        return AdaLoraConfig(target_r=self.target_r, init_r=self.init_r, lora_alpha=self.alpha, lora_dropout=self.dropout, deltaT=self.every,
                             target_modules=self.target_modules, beta1=self.beta1, beta2=self.beta2, orth_reg_weight=self.orthogonality,
                             total_step=PLACEHOLDER, bias=self.bias, task_type="CAUSAL_LM")

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        if self.target_r >= self.init_r:
            raise ConfigError(f"adalora takes ranks away, so target_r {self.target_r} must be below init_r {self.init_r}", remedy="or use lora")
        if self.warmup + self.settle >= 1:
            raise ConfigError("adalora needs steps between warmup and settle", remedy="lower one of them; both are shares of the steps")
        return super().prepare(model, run)

    def on_gradients(self, run: Run) -> None:
        """Add the penalty's gradient, and keep the whole gradient for the importance."""
        import torch

        grads = {n: run.engine.gradient(n) for n in run.engine.names}
        vectors = [n for n in grads if "lora_A" in n or "lora_B" in n]
        total = 0.0
        for name in vectors:
            value = run.engine.value(name).requires_grad_(True)
            with torch.enable_grad():
                square = value @ value.T if "lora_A" in name else value.T @ value
                norm = torch.linalg.matrix_norm(square - torch.eye(square.shape[0], device=square.device))
            total += float(norm.detach())
            if self.orthogonality:
                grads[name] += torch.autograd.grad(norm, value)[0] * (self.orthogonality / len(vectors))
                run.engine.set_gradient(name, grads[name])
        run.metrics["orthogonality"] = total / len(vectors)
        run.cache["adalora/gradients"] = grads

    def after_step(self, run: Run) -> None:
        """Update the importance with the new values and the step's (clipped) gradients, and set what is outside the budget to zero."""
        import torch

        grads = run.cache.pop("adalora/gradients")
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        factor = min(1.0, run.engine.clip / (float(norm) + 1e-6)) if run.engine.clip else 1.0
        shown = _Shown()
        for name, grad in grads.items():
            parameter = torch.nn.Parameter(run.engine.value(name))
            parameter.grad = grad * factor
            shown.parameters[name.removeprefix(PREFIX)] = parameter
        before = {n: p.detach().clone() for n, p in shown.parameters.items() if "lora_E" in n}
        allocator = self._allocator(run)
        config, step = allocator.peft_config, run.step + 1
        pattern = run.memory.get("adalora/pattern")
        if step <= config.total_step - config.tfinal:
            last = step == config.total_step - config.tfinal
            _, found = allocator.update_and_allocate(shown, step, force_mask=last)
            pattern = found or pattern
        else:
            allocator.mask_using_rank_pattern(shown, pattern)
        for name, old in before.items():
            if not shown.parameters[name].equal(old):
                run.engine.set_value(PREFIX + name, shown.parameters[name].detach())
        run.memory["adalora/pattern"] = pattern
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            run.memory |= {f"adalora/{kind}/{n}": v for n, v in getattr(allocator, kind).items()}
        run.metrics["rank"] = float(sum(map(sum, pattern.values())) if pattern else sum(p.shape[0] for p in before.values()))
        run.model.peft_config["default"].rank_pattern = pattern

    def _allocator(self, run: Run) -> Any:
        """PEFT's allocator with this run's schedule and what it remembered."""
        allocator = run.model.base_model.rankallocator
        config = allocator.peft_config
        config.total_step = run.steps
        # PEFT counts steps from 1 here, and `tfinal` of them from the end; at least one step lies between.
        config.tinit, config.tfinal = int(self.warmup * run.steps), min(int(self.settle * run.steps), max(0, run.steps - int(self.warmup * run.steps) - 1))
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            past = f"adalora/{kind}/"
            kept = {k.removeprefix(past): v.to(run.device) for k, v in run.memory.items() if k.startswith(past)}
            setattr(allocator, kind, kept)
        allocator.ipt = dict.fromkeys(allocator.exp_avg_ipt)
        return allocator


class _Shown:
    """What PEFT's allocator reads of a model: its parameters by name."""

    def __init__(self) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = {}

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.parameters.items())
