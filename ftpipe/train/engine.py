"""The DeepSpeed engine as the loop and the methods see it: loss, backward, update, and every parameter, gradient and optimizer state by name.

What trains is float32 and DeepSpeed is told nothing of bf16: parameters are their own master weights, and gradients are accumulated and reduced
in float32 under every ZeRO stage. Forward passes run under torch's autocast, so that computing is done in the type of the frozen weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ftpipe.errors import TrainingError
from ftpipe.train import optimizer_state
from ftpipe.train.forward import check_loss
from ftpipe.train.lanes import Gradients, gradients
from ftpipe.train.optimizer_state import OptimizerState
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch

def settings(stage: int, clip: float, numel: int, offload: bool = False, pin: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration. Buffers are sized for `numel` trained elements; the defaults would take gigabytes for a small adapter.

    offload: keep master weights, gradients and optimizer state on the CPU (stages 1 and 2). pin: in page-locked memory, which a GPU copies from faster.
    """
    bucket = min(max(numel, 1024), 50_000_000)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"contiguous_gradients": True, "overlap_comm": False, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 1_000_000_000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    return {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": clip, "zero_optimization": zero,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**31, "wall_clock_breakdown": False}


class Engine:
    """Access to a DeepSpeed engine. Every method that reads or writes whole tensors is called by all ranks at the same time.

    Attributes:
        names: names of the parameters that train now. touched: of those that train now or did before.
        share: what a batch's loss is multiplied by, set for each step (ranks / count of the whole step).
    """

    def __init__(self, run: Run, clip: float, alive: Callable[[str], None] = lambda doing: None, touched: Iterable[str] = ()):
        self.run, self.clip, self.alive = run, clip, alive
        self.touched = dict.fromkeys(touched)
        self.share = 1.0
        self.norm: float = math.nan
        self.deepspeed: Any = None
        self.build()

    def build(self) -> None:
        """Build the optimizer and the DeepSpeed engine for what trains now."""
        import deepspeed

        run = self.run
        parameters = run.trainable()
        if not parameters:
            raise TrainingError(f"{run.adapt.name()} left nothing to train", remedy="check its settings")
        wrong = [n for n, p in parameters.items() if str(p.dtype) != "torch.float32"]
        if wrong:
            raise TrainingError(f"{run.adapt.name()} left {wrong[0]} in {parameters[wrong[0]].dtype}; what trains must be float32",
                                remedy="this is a fault of the method: its `prepare` makes it float32")
        self.names = list(parameters)
        self.touched |= dict.fromkeys(self.names)
        self.groups = run.adapt.groups(run.model)
        called = {id(p): n for n, p in parameters.items()}
        named = [g | {"params": [(called[id(p)], p) for p in g["params"]]} for g in self.groups]
        optimizer = run.optimizer.build([{k: v for k, v in g.items() if k != "lr_scale"} for g in named])
        self.scales = [float(g.get("lr_scale", 1.0)) for g in self.groups]
        root = _root()(run, self)
        config = settings(run.zero, self.clip, sum(p.numel() for p in parameters.values()), run.offload, str(run.device).startswith("cuda"))
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(model=root, optimizer=optimizer, config=config, dist_init_required=False)
        self.torch_optimizer = optimizer
        self.parameters = {n: p for n, p in run.model.named_parameters() if n in set(self.names)}

    def rebuild(self, trainable: Iterable[str], forget: Iterable[str] = ()) -> None:
        """Train another set of parameters from now on; optimizer state of those that stay, but for `forget`, is kept."""
        state = self.optimizer_state()
        wanted, forgotten = set(trainable), set(forget)
        everything = dict(self.run.model.named_parameters())
        with gathered(everything.values(), self.run.zero):
            # Under ZeRO 3 every parameter has to be whole before it can be spread anew: its type or its place may change.
            values = {n: p.detach().clone() for n, p in everything.items()} if self.run.zero == 3 else {n: self.value(n) for n in self.names}
        self.destroy()
        for name, parameter in everything.items():
            for attribute in [a for a in vars(parameter) if a.startswith("ds_")]:
                delattr(parameter, attribute)
            if name in values:
                parameter.data = values[name]
            if name in wanted and not parameter.requires_grad:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
        self.build()
        self.restore({n: s for n, s in state.items() if n in wanted and n not in forgotten})

    def destroy(self) -> None:
        """Let DeepSpeed's engine go; another may be built over the same parameters."""
        self.deepspeed.destroy()
        self.deepspeed.optimizer = None  # else it takes the parameters from the next engine too, when it is collected

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of every group, times the group's own scale."""
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = rate * scale

    def loss(self, batch: Batch) -> torch.Tensor:
        """The batch's part of the step's loss, through the engine (a forward pass)."""
        import torch

        self.alive(f"step {self.run.step + 1}, a micro-batch of {batch.tokens} tokens")
        torch.manual_seed(batch.seed)
        return self.deepspeed(batch)

    def look(self, batch: Batch, function: Callable[[Run, Batch], torch.Tensor]) -> torch.Tensor:
        """What `function` finds in forward passes without a gradient, under the random state and the disturbances that `loss` has."""
        import torch

        self.alive(f"step {self.run.step + 1}, a look at {batch.tokens} tokens")
        torch.manual_seed(batch.seed)
        with torch.no_grad():
            return self.deepspeed(batch, function)

    def probe(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the last place of each row of token ids [n, T], in evaluation mode: float32 [n, vocabulary]."""
        import torch

        self.run.model.eval()
        with torch.no_grad():
            found = self.deepspeed(ids.to(self.run.device))
        self.run.model.train()
        return found.float().cpu()

    def gradients(self, batches: Sequence[Batch]) -> float:
        """Forward and backward passes of all of this rank's micro-batches; returns the sum of their losses."""
        if self.run.lanes:
            given = gradients(self.run, [b for b in batches if b.weight], self.share, list(self.parameters.values()))
            self.backward(self.deepspeed(given), last=True)
            return given.loss
        total = 0.0
        for i, batch in enumerate(batches):
            loss = self.loss(batch)
            self.backward(loss, last=i == len(batches) - 1)
            total += float(loss.detach())
        return total

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Backward pass of a micro-batch; gradients are reduced over the ranks by the end of the last one."""
        check_loss(float(loss.detach()))
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def on_gradients(self) -> None:
        """Let the parts see the gradients."""
        self.run.adapt.on_gradients(self.run)
        for regularizer in self.run.regularizers:
            regularizer.on_gradients(self.run)
        if self.run.zero == 0:
            import torch

            grads = [p.grad for p in self.parameters.values() if p.grad is not None]
            self.norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
            self._check_norm()

    def update(self) -> None:
        """Clip and take the optimizer's step."""
        self.deepspeed.step()
        if self.run.zero:
            norm = self.deepspeed.get_global_grad_norm()
            self.norm = float(norm) if norm is not None else math.nan
            self._check_norm()

    def _check_norm(self) -> None:
        if not math.isfinite(self.norm) or self.norm < 0:
            raise TrainingError(f"the norm of the gradient is {self.norm}", remedy="lower the learning rate, or look at these rows")

    def value(self, name: str) -> torch.Tensor:
        """The parameter, whole, float32 (a copy)."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self.parameters[name]
        return safe_get_full_fp32_param(parameter).clone() if self.run.zero == 3 else parameter.detach().clone()

    def set_value(self, name: str, value: torch.Tensor) -> None:
        """Set the parameter, masters included."""
        import torch
        from deepspeed.utils import safe_set_full_fp32_param

        parameter = self.parameters[name]
        value = value.to(parameter.device, torch.float32)
        if self.run.zero:
            safe_set_full_fp32_param(parameter, value)
        with torch.no_grad():
            if self.run.zero == 3:
                part = parameter.ds_tensor
                start = part.numel() * self.run.rank
                flat = value.flatten()[start:start + part.numel()]
                part.data[: flat.numel()].copy_(flat)
            else:
                parameter.copy_(value)

    def gradient(self, name: str) -> torch.Tensor:
        """The gradient of the whole step over all ranks, whole, float32 (a copy), between backward and update."""
        import torch
        from deepspeed.utils import safe_get_full_grad

        grad = safe_get_full_grad(self.parameters[name])
        return torch.zeros_like(self.value(name)) if grad is None else grad.detach().float().clone()

    def set_gradient(self, name: str, value: torch.Tensor) -> None:
        """Replace the gradient of the whole step."""
        from deepspeed.utils import safe_set_full_grad

        parameter = self.parameters[name]
        if self.run.zero == 0 and parameter.grad is None:
            parameter.grad = value.to(parameter.dtype)
        else:
            safe_set_full_grad(parameter, value)
            if self.run.offload and parameter._hp_mapping is not None:
                # With offload DeepSpeed takes each norm when the gradient arrives, and would clip by what it was.
                inner, held = self.optimizer, parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
                inner.norm_for_param_grads[inner.get_param_id(parameter)] = held.double().norm()

    def state(self) -> dict[str, torch.Tensor]:
        """What `Adapt.save` is given: trained parameters and those the method keeps, whole, on the CPU."""
        found = self.trained()
        return found | self._frozen(set(self.run.adapt.keeps(self.run.model)) - set(found))

    def trained(self) -> dict[str, torch.Tensor]:
        """Every parameter that trains now or did before, whole, on the CPU."""
        found = {n: self.value(n).cpu() for n in self.names}
        found |= self._frozen(set(self.touched) - set(found))
        return {n: found[n] for n in self.touched}

    def _frozen(self, names: set[str]) -> dict[str, torch.Tensor]:
        chosen = {n: p for n, p in self.run.model.named_parameters() if n in names}
        with gathered(chosen.values(), self.run.zero):
            return {n: p.detach().cpu().clone() for n, p in chosen.items()}

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state by parameter, put together from all ranks. Empty before the first step."""
        return optimizer_state.collected(self)

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put optimizer state back; parameters that it does not name start from nothing."""
        optimizer_state.put_back(self, state)

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's, whole."""
        parameter = self.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: Iterable[torch.nn.Parameter], zero: int) -> Any:
    """A context in which parameters are whole on every rank under ZeRO 3; nothing to do elsewhere."""
    if zero != 3:
        return ExitStack()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def _root() -> type:
    """The module that DeepSpeed wraps: its forward pass is the whole loss of a micro-batch, so that hooks of ZeRO 3 see all of it."""
    import torch

    class Root(torch.nn.Module):
        def __init__(self, run: Run, engine: Engine):
            super().__init__()
            self.model = run.model
            self._run, self._engine = (run,), (engine,)

        def forward(self, batch: Batch | Gradients | torch.Tensor, look: Callable[[Run, Batch], torch.Tensor] | None = None) -> torch.Tensor:
            run, engine = self._run[0], self._engine[0]
            if isinstance(batch, Gradients):
                return batch.as_loss()
            with ExitStack() as stack:
                stack.enter_context(run.autocast())
                if torch.is_tensor(batch):
                    return run.model(input_ids=batch, use_cache=False, logits_to_keep=1).logits[:, -1]
                for regularizer in run.regularizers:
                    stack.enter_context(regularizer.forward(run, batch))
                if look is not None:
                    return look(run, batch)
                total = run.objective.loss(run, batch)
                for regularizer in run.regularizers:
                    total = total * regularizer.objective_weight(run)
                for regularizer in run.regularizers:
                    penalty = regularizer.penalty(run, batch)
                    if penalty is not None:
                        total = total + penalty * batch.count
            return total.float() * (batch.weight * engine.share)

    return Root
