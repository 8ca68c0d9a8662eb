"""S2FT (Yang et al. 2024): whole attention heads and feed-forward channels are chosen, and only their rows or columns train."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ftpipe.errors import ConfigError
from ftpipe.train.adapt._blocks import blocks
from ftpipe.train.adapt._weights import WeightsAdapt, write
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Run, derive_seed

if TYPE_CHECKING:
    import torch


class S2ft(WeightsAdapt):
    """Trains chosen columns of the down projections (channels) and of the output projections (heads), and, if asked for, rows of up and value projections.

    Channels and heads are drawn uniformly over all layers together, floor(ratio x units x layers) of each kind, so that their number varies from layer to
    layer. `permute` brings the chosen ones to the front by reordering the coupled weights (gate, up and down by channel; query, key, value and output by
    head), which leaves the function as it is and makes the trained part one stretch of memory. With grouped queries key-value groups move whole, and
    query heads inside their group only. The slices start at zero and add to frozen weights, so weight decay pulls a slice towards the base model and moves
    nothing else.

    The adapter holds the numbers of the rows or columns in the base model's own order, and what is added to them: adapters of one base add up.
    """

    paper: ClassVar[str] = "S^{2}FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._weights", "ftpipe.models.sparse", "ftpipe.train.adapt._blocks", "ftpipe.train.adapt._slices")

    down: float = Field(default=0.03, ge=0, le=1, description="Share of all feed-forward channels whose columns of the down projection train.")
    output: float = Field(default=0.0, ge=0, le=1, description="Share of all attention heads whose columns of the output projection train.")
    up: float = Field(default=0.0, ge=0, le=1, description="Share of all feed-forward channels whose rows of the up projection train; drawn apart from `down`.")
    value: float = Field(default=0.0, ge=0, le=1, description="Share of all key-value heads whose rows of the value projection train.")
    permute: bool = Field(default=True, description="Reorder the frozen weights during training so that the chosen heads and channels come first.")

    @model_validator(mode="after")
    def _something(self) -> S2ft:
        if not (self.down or self.output or self.up or self.value):
            raise ValueError("down, output, up and value are all 0, so nothing would train")
        return self

    def sized(self, size: int) -> Adapt:
        """All shares that are set, in the same proportion; the largest is `size` ten-thousandths."""
        kinds = ("down", "output", "up", "value")
        largest = max(getattr(self, kind) for kind in kinds)
        return self.with_fields(**{kind: getattr(self, kind) / largest * size / 10_000 for kind in kinds})

    def outline(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        return self.with_fields(permute=False).prepare(model, run)  # the order of frozen weights is no matter of shapes

    def drawn(self, kind: str, units: int, layers: int, seed: int) -> list[list[int]]:
        """For each layer the chosen channels or heads of a kind (`down`, `output`, `up`, `value`), ascending."""
        import torch

        generator = torch.Generator().manual_seed(derive_seed(seed, "s2ft", kind))
        found: list[list[int]] = [[] for _ in range(layers)]
        # rounding of the product must not lose a whole unit: 0.29 * 100 is 28.999...
        for unit in sorted(torch.randperm(units * layers, generator=generator)[:int(getattr(self, kind) * units * layers + 1e-9)].tolist()):
            found[unit // units].append(unit % units)
        return found

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        names = blocks(model)
        if self.down or self.up:
            self._channels(model, names, run.seed)
        if self.output or self.value:
            self._heads(model, names, run.seed)
        return super().prepare(model, run)

    def _channels(self, model: torch.nn.Module, names: list[str], seed: int) -> None:
        from ftpipe.train.adapt import _slices as s

        layers = [s.parts_of(model, block, "mlp") for block in names]
        channels = layers[0]["down"].in_features
        down, up = (self.drawn(kind, channels, len(names), seed) for kind in ("down", "up"))
        for number, (block, layer) in enumerate(zip(names, layers, strict=True)):
            first = list(dict.fromkeys([*down[number], *up[number]]))
            order = s.permute_channels(model, block, first) if self.permute and first else list(range(channels))
            place = {old: new for new, old in enumerate(order)}
            for linear, kind, chosen in ((layer["down"], s.COLUMNS, down[number]), (layer["up"], s.ROWS, up[number])):
                if chosen:
                    s.attach(linear, kind, chosen, [place[c] for c in chosen])

    def _heads(self, model: torch.nn.Module, names: list[str], seed: int) -> None:
        from ftpipe.train.adapt import _slices as s

        heads, groups, width = s.head_sizes(model, names[0])
        output, value = self.drawn("output", heads, len(names), seed), self.drawn("value", groups, len(names), seed)
        for number, block in enumerate(names):
            own, own_groups = set(output[number]), set(value[number])
            moved = s.permute_heads(model, block, own, own_groups) if self.permute and (own or own_groups) else (range(heads), range(groups))
            layer = s.parts_of(model, block, "self_attn")
            for linear, kind, chosen, order in ((layer["o"], s.COLUMNS, output[number], moved[0]), (layer["v"], s.ROWS, value[number], moved[1])):
                if chosen:
                    place = {old: new for new, old in enumerate(order)}
                    s.attach(linear, kind, s.spread(chosen, width), s.spread([place[h] for h in chosen], width))

    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        from ftpipe.train.adapt._slices import COLUMNS, ROWS

        names = [n for n, _ in model.named_parameters() if n.endswith((ROWS, COLUMNS))]
        if not names:
            raise ConfigError("the shares of channels and heads are so small that not one is chosen", remedy="set larger shares")
        return names

    def without(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        from ftpipe.train.adapt._slices import detached

        return detached(model)

    def save(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        import torch

        from ftpipe.models.sparse import Part
        from ftpipe.train.adapt._slices import ROWS

        tensors: dict[str, torch.Tensor] = {}
        for name, value in state.items():
            path, _, kind = name.rpartition(".")
            numbers = torch.tensor(model.get_submodule(path).slice_numbers)
            tensors |= Part("rows" if kind == ROWS else "columns", value, numbers).tensors(f"{path}.weight")
        write(tensors, folder)
