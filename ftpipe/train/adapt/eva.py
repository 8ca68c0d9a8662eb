"""EVA (Paischer et al. 2024): start A at the directions in which a layer's inputs vary most, and give rank to the layers that gain most by it.

The right singular vectors of each layer's inputs are found row by row (incremental SVD, Ross et al. 2008); A is the first of them and B zero. All
directions of all layers are sorted by the share of their layer's variance that they explain, and the first r x layers of them are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.errors import DataError
from ftpipe.train.adapt._activations import observe
from ftpipe.train.adapt._lora import LoraFamily, lora_layers
from ftpipe.train.run import Run, derive_seed

if TYPE_CHECKING:
    import torch

CHUNK = 256
"""Tokens that one step of the incremental SVD takes in, or eight for each direction if those are more."""


class Eva(LoraFamily):
    """Starts A from the inputs' principal directions and B from zero, so that training starts at the base model exactly, and spreads the rank over layers.

    The mean of the inputs is taken off, as the authors' incremental PCA (in PEFT, which is called here) does. Where PEFT's loop over the data goes round
    until every direction has settled, which two of nearly equal variance never do, this looks at `rows` rows at most, each once. A layer that is
    given no rank is not adapted. The adapter says each layer's rank and scale in its configuration, so that plain PEFT loads it.
    """

    paper: ClassVar[str] = "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
    support: ClassVar[tuple[str, ...]] = (*LoraFamily.support, "ftpipe.train.adapt._activations")

    rho: float = Field(default=2.0, ge=1, description="Most rank of one layer, as a multiple of r; 1 gives every layer r.")
    rows: int = Field(default=128, ge=1, description="Most rows that are looked at before training.")
    tau: float = Field(default=0.99, gt=0, le=1, description="Looking ends early when a step turns no direction that is used by more than this cosine; 1 "
                                                            "looks at all rows.")
    tokens: Literal["all", "trained"] = Field(default="all", description="`all` tokens of a row count, or those only whose next token is `trained` on.")
    scale_by_rank: bool = Field(default=True, description="Keep alpha / r of a layer the same whatever rank it is given.")

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        import torch
        from peft import EvaConfig, initialize_lora_eva_weights

        wrapped = super().prepare(model, run)
        layers = lora_layers(wrapped, self.name())
        keys = {name: f"{self.name()}/{name}" for name in layers}
        if not any(key in run.memory for key in keys.values()):
            for name, directions in self.chosen(wrapped, layers, run).items():
                run.memory[keys[name]] = directions
        # PEFT puts the directions in, removes layers without rank, and writes ranks and scales into its configuration.
        config = wrapped.peft_config["default"]
        config.eva_config = EvaConfig(rho=self.rho, tau=self.tau, use_label_mask=self.tokens == "trained", adjust_scaling_factors=self.scale_by_rank)
        config.init_lora_weights = "eva"
        initialize_lora_eva_weights(wrapped, eva_state_dict={name: run.memory[key].clone() for name, key in keys.items()})
        with torch.no_grad():
            for name, layer in lora_layers(wrapped, self.name()).items():
                # PEFT gives a layer whose rank changes the type of its base; what trains is float32, and so are its first values.
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                a.data, b.data = run.memory[keys[name]].to(a.device, copy=True), torch.zeros(b.shape, device=b.device)
        return wrapped

    def chosen(self, model: torch.nn.Module, layers: Mapping[str, Any], run: Run) -> dict[str, torch.Tensor]:
        """The starting A [rank, inputs] of each layer, float32 on the CPU; a rank may be 0."""
        import torch

        most = {name: min(round(self.r * self.rho), layer.in_features, layer.out_features) for name, layer in layers.items()}
        streams: dict[str, Stream] = {}

        def take(name: str, x: torch.Tensor) -> None:
            if name not in streams:
                k = min(round(self.r * self.rho), layers[name].in_features)
                streams[name] = Stream(k, derive_seed(run.seed, self.name(), name))
            streams[name].take(x)

        def settled(seen: Mapping[str, str]) -> bool:
            if self.tau == 1 or any(s.turned is None for s in streams.values()):
                return False
            ranks = self.spread({name: streams[seen[name]].shares()[:most[name]] for name in layers}, self.r * len(layers))
            return all(bool((streams[seen[name]].turned[:rank] >= self.tau).all()) for name, rank in ranks.items())

        shared = observe(model, layers, run, self.rows, take, trained=self.tokens == "trained", enough=settled)
        for name, stream in streams.items():
            stream.finish()
            if not stream.steps:
                raise DataError(f"{stream.waiting} tokens are too few to find {stream.k} directions of the inputs of {name}",
                                remedy=f"raise `rows` of {self.name()}, or lower r or rho")
        found = {name: (run.agreed(s.directions()).cpu(), run.agreed(s.shares()).cpu())
                 for name, s in streams.items()}
        ranks = self.spread({name: found[shared[name]][1][:most[name]] for name in layers}, self.r * len(layers))
        run.log.info("ranks of %d layers: %d to %d, %d in all", len(ranks), min(ranks.values()), max(ranks.values()), sum(ranks.values()))
        return {name: found[shared[name]][0][:rank].clone(memory_format=torch.contiguous_format) for name, rank in ranks.items()}

    def spread(self, shares: Mapping[str, torch.Tensor], budget: int) -> dict[str, int]:
        """Ranks that sum to `budget` (less, if there are fewer directions): those directions that explain the largest share of their layer's variance.

        Args:
            shares: for each layer its directions' shares, largest first. Of equal ones the first layer's goes first.
        """
        ordered = sorted(((-float(share), place, i) for place, values in enumerate(shares.values()) for i, share in enumerate(values)))
        names = list(shares)
        ranks = dict.fromkeys(names, 0)
        for _, place, _ in ordered[:budget]:
            ranks[names[place]] += 1
        return ranks


class Stream:
    """The k principal directions of what one layer reads, from a stream of pieces of any size.

    Twice as many are carried from step to step, so that the last of the k do not suffer from what each step cuts off.

    Attributes:
        pca: PEFT's incremental PCA, fitted if `steps` > 0. waiting: tokens that are not in it yet.
        turned: cosine of each direction with what it was a step before, None before the second step.
    """

    def __init__(self, k: int, seed: int):
        self.k, self.seed, self.size = k, seed % 2**31, max(CHUNK, 8 * k)
        self.pieces: list[torch.Tensor] = []
        self.waiting = self.steps = 0
        self.pca: Any = None
        self.turned: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> None:
        """Take in [tokens, inputs]."""
        self.pieces.append(x)
        self.waiting += len(x)
        if self.waiting >= self.size:
            self._step()

    def finish(self) -> None:
        """Take in what waits, if it is enough."""
        if self.waiting > (self.pca.n_components if self.steps else self.k):
            self._step()

    def directions(self) -> torch.Tensor:
        """Orthonormal rows, float32 [k, inputs]."""
        return self.pca.components_[:self.k].float()

    def shares(self) -> torch.Tensor:
        """What share of the variance each direction explains, float64 [k], largest first; zeros if nothing varies."""
        return self.pca.explained_variance_ratio_[:self.k].double().nan_to_num(0.0)

    def _step(self) -> None:
        import torch
        from peft.utils.incremental_pca import IncrementalPCA

        x = torch.cat(self.pieces)
        if self.pca is None:
            carried = min(2 * self.k, *x.shape)
            # The randomised decomposition looks for twice as many, which must be fewer than there are.
            self.pca = IncrementalPCA(n_components=carried, lowrank=2 * carried < min(x.shape), lowrank_seed=self.seed)
        before = self.directions() if self.steps else None
        self.pca.partial_fit(x)
        self.turned = None if before is None else torch.nn.functional.cosine_similarity(before, self.directions())
        self.pieces, self.waiting, self.steps = [], 0, self.steps + 1
