"""BitFit (Ben Zaken et al. 2022): only biases train."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.train.adapt._blocks import blocks
from ftpipe.train.adapt._weights import MaskedAdapt, tensor_files
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch

Term = Literal["query", "key", "value", "attention_output", "intermediate", "output", "attention_norm", "output_norm"]
FUSED = r"(c_attn|qkv_proj|query_key_value|Wqkv)$"
NAMES: dict[str, str] = {
    "query": r"(q_proj|query|q_lin|wq)$", "key": r"(k_proj|key|k_lin|wk)$", "value": r"(v_proj|value|v_lin|wv)$",
    "attention_output": r"((attn|attention)\.(o_proj|out_proj|c_proj|dense|wo)|attention\.output\.dense)$",
    "intermediate": r"(gate_proj|up_proj|gate_up_proj|c_fc|fc1|fc_in|dense_h_to_4h|intermediate\.dense)$",
    "output": r"(down_proj|mlp\.c_proj|fc2|fc_out|dense_4h_to_h|(?<!attention\.)output\.dense)$",
    "attention_norm": r"(input_layernorm|ln_1|ln1|self_attn_layer_norm|attention\.output\.LayerNorm)$",
    "output_norm": r"(post_attention_layernorm|ln_2|ln2|final_layer_norm|(?<!attention\.)output\.LayerNorm)$",
}
"""How the modules are called whose biases a term names, relative to their layer. The norms count as the paper's do: the attention's, the feed-forward's."""
PARTS = ("query", "key", "value")
FLAGS = {"attention_bias": ("query", "key", "value", "attention_output"), "mlp_bias": ("intermediate", "output")}
"""Settings by which an architecture says that its projections have biases."""


class Bitfit(MaskedAdapt):
    """Trains the biases of linear layers and of norms (not the norms' scales), or those that `terms` names; every weight rests.

    The paper's half-size choice is `terms: [query, intermediate]`. It trains at about 100 times the rate of full fine-tuning (1e-3). Where
    query, key and value share one bias (GPT-2), a term trains its part of it.

    A key's bias adds the same to all scores of a query, which the softmax does not see, unless positions are rotated into keys or keys are normalised.
    Its gradient is then zero but for rounding, which Adam would turn into full steps, so such biases rest unless `key` is named in `terms`.

    Models of the Llama family have no biases. With `missing: add` their linear layers are given biases of zero, which changes nothing at the start;
    `merge` then states them in the model's config (`attention_bias`, `mlp_bias`), so that the merged model can be saved and loaded by transformers.
    """

    paper: ClassVar[str] = "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._weights", "ftpipe.models.sparse", "ftpipe.train.adapt._blocks")

    terms: list[Term] = Field(default=[], description="Which biases train; all of them if empty.")
    missing: Literal["error", "add"] = Field(default="error", description="What to do if linear layers that are asked for have no bias: `error` trains those "
                                             "that exist and refuses a model without any; `add` gives biases of zero to all that have none.")

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        if self.missing == "add":
            terms = self.terms or [t for t in NAMES if not t.endswith("_norm")]
            add_biases(model, [p for p, m in linear_layers(model).items() if m.bias is None and any(re.search(NAMES[t], p) for t in terms)])
        prepared = super().prepare(model, run)
        run.cache["bitfit_masks"] = self.parts(model)
        return prepared

    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        found = [n for n, _ in model.named_parameters() if n.endswith(".bias")]
        if self.terms:
            wanted = [NAMES[t] for t in self.terms] + ([FUSED] if set(self.terms) & set(PARTS) else [])
            inside = tuple(b + "." for b in blocks(model))
            found = [n for n in found if n.startswith(inside) and any(re.search(w, n.removesuffix(".bias")) for w in wanted)]
        elif idle_keys(model):
            found = [n for n in found if not re.search(NAMES["key"], n.removesuffix(".bias"))]
        if not found:
            raise ConfigError(f"the model has no bias{' of ' + ', '.join(self.terms) if self.terms else ''} to train",
                              remedy="set missing: add to give its linear layers biases of zero, or choose another method of train/adapt")
        return found

    def parts(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """For each bias that query, key and value share and of which not all trains: the entries that do. Raises ConfigError if its layout is not known."""
        import torch

        terms = set(self.terms) & set(PARTS) if self.terms else {"query", "value"} if idle_keys(model) else set(PARTS)
        found = {}
        for name, parameter in model.named_parameters():
            path = name.removesuffix(".bias")
            if not (name.endswith(".bias") and parameter.requires_grad and re.search(FUSED, path)) or terms == set(PARTS):
                continue
            if not path.endswith("c_attn") or parameter.numel() != 3 * model.config.hidden_size:
                if not self.terms:
                    continue
                raise ConfigError(f"which part of {name} belongs to {', '.join(sorted(terms))} is not known for this architecture",
                                  remedy="name query, key and value together, or none of them")
            mask = torch.zeros(3, model.config.hidden_size, dtype=torch.bool)
            for row, term in enumerate(PARTS):
                mask[row] = term in terms
            found[name] = mask.flatten()
        return found

    def masks(self, run: Run) -> Mapping[str, torch.Tensor]:
        return run.cache["bitfit_masks"]

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        names = [n.removesuffix(".bias") for n in tensor_files(folder) if n.endswith(".bias")]
        layers = linear_layers(model)
        model.added_biases = [n for n in names if n in layers and layers[n].bias is None]
        add_biases(model, model.added_biases)
        return super().load(model, folder)

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        layers, homeless = linear_layers(model), set(model.added_biases)
        for flag, terms in FLAGS.items():
            group = [p for p in layers if any(re.search(NAMES[t], p) for t in terms)]
            if homeless & set(group) and hasattr(model.config, flag):
                add_biases(model, [p for p in group if layers[p].bias is None])
                setattr(model.config, flag, True)
                homeless -= set(group)
        if homeless:
            raise ConfigError(f"the architecture {model.config.model_type} has no place for a bias of {min(homeless)}",
                              remedy="keep the adapter beside the base")
        return model


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers inside the model's transformer layers, by name."""
    import torch

    inside = tuple(b + "." for b in blocks(model))
    return {n: m for n, m in model.named_modules() if n.startswith(inside) and isinstance(m, torch.nn.Linear)}


def add_biases(model: torch.nn.Module, paths: list[str]) -> None:
    """Give these linear layers a bias of zero, frozen, in the type of their weight."""
    import torch

    for path in paths:
        layer = model.get_submodule(path)
        layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features, dtype=layer.weight.dtype, device=layer.weight.device), requires_grad=False)


def idle_keys(model: torch.nn.Module) -> bool:
    """Whether a bias of the keys has no effect: positions are not rotated into them, they are not normalised and scores go into a plain softmax."""
    config = model.config
    names = " ".join(f"{n.rpartition('.')[2]} {type(m).__name__}".lower() for n, m in model.named_modules())
    rotated = "rotary" in names or any(getattr(config, a, None) for a in ("rope_parameters", "rope_theta", "rotary_dim"))
    return not rotated and not any(w in names for w in ("k_norm", "k_layernorm", "key_norm")) and not getattr(config, "attn_logit_softcapping", None)
