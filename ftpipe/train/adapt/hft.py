"""Half Fine-Tuning (Hui et al. 2024): in each stage of training a random half of the weight matrices of every category rests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.train.adapt._blocks import blocks
from ftpipe.train.adapt._weights import WeightsAdapt
from ftpipe.train.run import Run, derive_seed

if TYPE_CHECKING:
    import torch

CATEGORIES = ("attention", "feed_forward", "norm")


class Hft(WeightsAdapt):
    """Half of each layer's attention matrices, of its feed-forward matrices and of its norms train; embedding, last norm and head always do.

    Whole matrices (with their bias) are drawn, by chance and not by importance. Where a category holds an odd number n in a layer, (n + 1) / 2 of them
    rest in floor(L / 2) of the L layers, drawn too, and (n - 1) / 2 in the others: of the three feed-forward matrices of a Llama two in half of the layers.

    The draw is for the whole stage, because drawing again within it would end with every weight moved. Its seed is the stage's, so stages in a row
    that share a seed name different rounds. "Half" counts matrices: with grouped queries they differ in size. Each step records `hft_trained_share`, the
    share of the layers' parameters that trains. What rests is not in the optimizer and not in the adapter.
    """

    paper: ClassVar[str] = "HFT: Half Fine-Tuning for Large Language Models"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._weights", "ftpipe.models.sparse", "ftpipe.train.adapt._blocks")

    round: int = Field(default=0, ge=0, description="Number of this stage among stages that follow each other; another one draws another half.")

    def categories(self, model: torch.nn.Module) -> list[dict[str, list[list[str]]]]:
        """For each layer and category its units, each the names of the parameters of one matrix or norm. What is neither always trains."""
        modules = dict(model.named_modules())
        found = []
        for block in blocks(model):
            layer: dict[str, list[list[str]]] = {c: [] for c in CATEGORIES}
            for path, module in modules[block].named_modules(prefix=block):
                own = [(f"{path}.{n}", p.dim()) for n, p in module.named_parameters(recurse=False)]
                if own and "norm" in type(module).__name__.lower():
                    layer["norm"].append([n for n, _ in own])
                    continue
                matrices = [n for n, size in own if size >= 2]
                inside = path.removeprefix(block).lower()
                for name in matrices:  # a bias belongs to the one matrix beside it
                    unit = [n for n, _ in own] if len(matrices) == 1 else [name]
                    layer["attention" if "attn" in inside or "attention" in inside else "feed_forward"].append(unit)
            found.append(layer)
        return found

    def resting(self, layers: Sequence[dict[str, list[list[str]]]], seed: int) -> set[str]:
        """Names of the parameters that rest in a stage of this seed."""
        import torch

        generator = torch.Generator().manual_seed(derive_seed(seed, "hft", self.round))
        rest: set[str] = set()
        for category in CATEGORIES:
            more = set(torch.randperm(len(layers), generator=generator)[:len(layers) // 2].tolist())
            for number, layer in enumerate(layers):
                units = layer[category]
                n = (len(units) + (number in more)) // 2 if len(units) % 2 else len(units) // 2
                for i in torch.randperm(len(units), generator=generator)[:n].tolist():
                    rest.update(units[i])
        return rest

    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        rest = self.resting(self.categories(model), run.seed)
        sizes = {n: p.numel() for n, p in model.named_parameters() if any(n.startswith(block + ".") for block in blocks(model))}
        share = 1 - sum(sizes[n] for n in rest) / sum(sizes.values())
        run.cache["hft_trained_share"] = share
        run.log.info("%d of %d tensors of the layers train, %.1f%% of their parameters", len(sizes) - len(rest), len(sizes), 100 * share)
        return [n for n, _ in model.named_parameters() if n not in rest]

    def before_step(self, run: Run) -> None:
        run.metrics["hft_trained_share"] = run.cache["hft_trained_share"]
