"""What layers read on the first rows of training, for methods that start from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ftpipe.errors import DataError
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch


def observe(model: torch.nn.Module, layers: Mapping[str, Any], run: Run, rows: int, take: Callable[[str, torch.Tensor], None], *,
            trained: bool = False, enough: Callable[[Mapping[str, str]], bool] = lambda seen: False) -> dict[str, str]:
    """Forward passes of the base model over the first `rows` rows, without gradients.

    Layers that read the same tensor (the three projections of attention) are observed once, under the name of the first.

    Args:
        model: a model wrapped by PEFT. layers: its LoRA layers by name.
        take: called with a layer's name and what it read in a row, float32 [tokens, inputs].
        trained: only places whose next token is trained on, instead of all.
        enough: asked after each row, with what is returned in the end; true ends it.

    Returns the name under which each layer was observed. Every rank observes the same rows. Raises DataError if a layer read nothing.
    """
    import torch

    seen: dict[str, str] = {}
    last: list[Any] = [None, ""]
    places: list[torch.Tensor] = []

    def watch(name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, given: tuple[torch.Tensor, ...]) -> None:
            if given[0] is last[0]:
                seen[name] = last[1]
                return
            last[:] = given[0], name
            seen[name] = name
            x = given[0].detach().flatten(0, -2)
            take(name, (x[places[0]] if trained else x).float())
        return hook

    handles = [layer.get_base_layer().register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    training, name = model.training, run.adapt.name() if run.adapt else "the adapter"
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            batches = run.calibration(rows)
            for i, batch in enumerate(batches):
                run.alive(f"{name} looks at row {i + 1} of {len(batches)}")
                places[:] = [batch.sources]
                model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False, logits_to_keep=1)
                last[:] = None, ""
                if len(seen) == len(layers) and enough(seen):
                    break
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if missing := sorted(set(layers) - set(seen)):
        raise DataError(f"{len(missing)} layers read nothing in the rows looked at before training, the first is {missing[0]}",
                        remedy="look at more rows, or leave these layers out of target_modules")
    return seen
