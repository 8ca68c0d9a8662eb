"""NoiseFiT: noise on the hidden states of a few blocks, and a penalty on what it changes in the prediction.

The adaptive noise, the choice of blocks and the loss are those of the paper and of the authors' first program for it (`NoiseFiT_v1_manual_snr.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftpipe.train.draws import draws
from ftpipe.train.regularizer._hooks import at_rows, blocks, on_output, put_back
from ftpipe.train.regularizer.base import Regularizer
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch

TINY, LARGEST = 1e-6, 5.0


class Noisefit(Regularizer):
    """alpha * objective + (1 - alpha) / 2 * [KL(clean || noisy 1) + KL(clean || noisy 2)] + consistency * KL(noisy 2 || noisy 1), by label position.

    Blocks are chosen once, on the rows of the first step: those with the largest (or lowest) ratio of mean |h| to the mean |change of h| that the noise makes.
    Each step runs the model twice more with noise on the outputs of those blocks, and once more without a gradient for the clean distribution, which is held
    fixed. Dropout of the adapter draws alike in all of them, so that only noise tells them apart. With noise_std 0 what is left is alpha * objective.

    The noise of an element h of a token is noise_std * S * N(0, 1), S = noise_std * std(h) * MAD * exp(-decay |h - median| / (MAD + 1e-6)) * f, with median
    and MAD (median absolute deviation) over the token's hidden dimension, f = exp(var of the token / mean var) of at most 5. noise_std enters twice, as it
    does there. Here std(h) and the mean of var are taken over the row's own sequence, there over a padded batch: so a row's noise does not depend on what it
    is packed with.
    """

    paper: ClassVar[str] = "Noise Augmented Fine Tuning for Mitigating Hallucinations in Large Language Models"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.forward",)

    noise_std: float = Field(default=0.1, ge=0, description="Size of the noise; it enters squared.")
    decay: float = Field(default=0.1, ge=0, description="How fast the noise falls for elements far from their token's median (the paper's beta).")
    alpha: float = Field(default=0.5, gt=0, le=1, description="Share of the objective; the rest goes to staying with the clean prediction.")
    consistency: float = Field(default=0.1, ge=0, description="Weight of the divergence between two noisy passes.")
    layers: int = Field(default=3, ge=1, description="How many blocks get noise; all where there are fewer.")
    snr: Literal["largest", "lowest"] = Field(default="largest", description="Which blocks: those the noise disturbs least or most, relative to their signal.")
    passes: int = Field(default=10, ge=1, description="Draws of noise in the choice of blocks.")

    def objective_weight(self, run: Run) -> float:
        return self.alpha

    def before_step(self, run: Run, batches: Sequence[Batch]) -> None:
        if "noisefit/blocks" in run.memory:
            return
        training = run.model.training
        run.model.eval()
        found = sum(run.engine.look(batch, self._measure) * batch.weight for batch in batches)
        run.model.train(training)
        signal, noise = ([run.sum(float(v)) for v in part] for part in found)
        ratio = [s / (n + TINY) for s, n in zip(signal, noise, strict=True)]
        order = sorted(range(len(ratio)), key=lambda i: (-ratio[i] if self.snr == "largest" else ratio[i], i))
        run.memory["noisefit/blocks"] = sorted(order[:self.layers])
        run.log.info("noisefit: noise on the blocks %s", run.memory["noisefit/blocks"])

    def _measure(self, run: Run, batch: Batch) -> torch.Tensor:
        """Sums over the batch of |h| and of the mean |noise| for each block: [2, blocks]. The mean needs no count: the ratio of sums is the ratio of means."""
        import torch

        from ftpipe.train.forward import logits

        chain = blocks(run.model)
        found = torch.zeros(2, len(chain), dtype=torch.float64, device=run.device)
        with ExitStack() as stack:
            for i, block in enumerate(chain):
                def measure(hidden: torch.Tensor, i: int = i) -> torch.Tensor:
                    rows = at_rows(hidden, batch).float()
                    found[0, i] = rows.abs().sum()
                    for n in range(self.passes):
                        found[1, i] += self._noise(run, batch, rows, f"snr/{n}/{i}").abs().sum() / self.passes
                    return hidden

                stack.enter_context(on_output(block, measure))
            logits(run.model, batch, batch.sources[:1])
        return found

    def _noise(self, run: Run, batch: Batch, rows: torch.Tensor, purpose: str) -> torch.Tensor:
        """Noise of size S for hidden states [T, H], float32."""
        import torch

        return torch.cat([torch.randn(rows[a:b].shape, generator=g, device=rows.device) * self.scale(rows[a:b])
                          for a, b, g in draws(run, batch, f"noisefit/{purpose}")])

    def scale(self, hidden: torch.Tensor) -> torch.Tensor:
        """S of one sequence: float32, of the shape of `hidden`, [tokens, H]."""
        h = hidden.float()
        away = (h - h.median(-1, keepdim=True).values).abs()
        spread = away.median(-1, keepdim=True).values.maximum(TINY * h.norm(dim=-1, keepdim=True))
        variance = h.var(-1, keepdim=True)
        factor = (variance / (variance.mean() + TINY)).exp().clamp_max(LARGEST)
        return self.noise_std * h.std() * spread * (-self.decay * away / (spread + TINY)).exp() * factor

    @contextmanager
    def noisy(self, run: Run, batch: Batch, number: int) -> Iterator[None]:
        """While the block lasts, the chosen blocks' outputs carry noise; `number` tells one draw of a step from another."""
        import torch

        chain = blocks(run.model)
        with ExitStack() as stack:
            for i in run.memory["noisefit/blocks"]:
                def disturb(hidden: torch.Tensor, i: int = i) -> torch.Tensor:
                    rows = at_rows(hidden, batch)
                    with torch.no_grad():
                        noise = self.noise_std * self._noise(run, batch, rows.detach(), f"{number}/{i}")
                    return put_back(hidden, batch, rows + noise.to(rows.dtype))

                stack.enter_context(on_output(chain[i], disturb))
            yield

    def penalty(self, run: Run, batch: Batch) -> torch.Tensor:
        clean, first, second = (self._logprobs(run, batch, number) for number in (0, 1, 2))

        def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
            return (p.exp() * (p - q)).sum() / max(1, len(p))

        apart = (divergence(clean, first) + divergence(clean, second)) / 2
        between = divergence(second, first)
        for name, value in (("noise_divergence", apart), ("noise_consistency", between)):
            run.sums[name] = run.sums.get(name, 0.0) + float(value.detach()) * batch.count * batch.weight
        return (1 - self.alpha) * apart + self.consistency * between

    def _logprobs(self, run: Run, batch: Batch, number: int) -> torch.Tensor:
        """Log probabilities at the label positions, [K, vocabulary], float32: clean and without a gradient (0), or with noise (1, 2)."""
        import torch

        from ftpipe.train.forward import logits

        device = torch.device(run.device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch.seed)
            if number == 0:
                with torch.no_grad():
                    return logits(run.model, batch).float().log_softmax(-1)
            with self.noisy(run, batch, number):
                return logits(run.model, batch).float().log_softmax(-1)
