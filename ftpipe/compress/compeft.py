"""ComPEFT (Yadav et al. 2023): of an adapter only the signs of its largest entries, and one magnitude for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.compress.base import Compressor
from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.evaluate.suites.heldout_loss import HeldoutLoss
from ftpipe.slots import choose
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._given import Given


class ComPeft(Compressor):
    """Over all parameters of the adapter as one vector tau (their values less those they start from: 1 for (IA)^3, the base's for whole weights, 0 for a
    LoRA's A and B) keeps the int(density n) largest as +c or -c, and nothing else. c is `alpha` standard deviations of tau.

    Without `alpha` c is the mean magnitude of what is kept, the least-squares choice; with `rows` it is the one of `alphas` that does best on their
    held-out rows, as in the paper. The places are Rice coded, a sign is one bit: about 0.9 bits a parameter at a density of 0.2. One threshold for
    A and B may keep mostly one of them: `kept` in compress.json gives the share of each.
    """

    paper: ClassVar[str] = "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.merge._deltas", "ftpipe.merge._given", "ftpipe.compress._packed", "ftpipe.compress._rice")

    density: float = Field(default=0.2, gt=0, le=1, description="Share of the parameters that is kept, the largest over the whole adapter.")
    alpha: float | None = Field(default=None, gt=0, description="Magnitude of what is kept, in standard deviations of all; not given: found, see above.")
    rows: Ref | None = Field(default=None, description="Stage whose held-out rows choose among `alphas`.")
    alphas: list[float] = Field(default=[0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0], min_length=1, description="Values that are tried, if rows are given.")
    suite: choose("evaluate/suites") = Field(default=HeldoutLoss(), description="What they are asked.")
    metric: str = Field(default="", description="The metric that decides, where the suite has several.")

    def compress(self, adapter: Path, out: Path, given: Given) -> dict[str, Any]:
        import numpy as np
        import torch

        from ftpipe.compress._packed import facts_to_pack, to_bits, write_packed
        from ftpipe.compress._rice import encode
        from ftpipe.merge._largest import largest

        facts = facts_to_pack(adapter)
        kept = largest(lambda: changes(adapter, given.base), self.density)
        if not kept.kept:
            raise ConfigError(f"a density of {self.density} keeps none of {kept.total} parameters", remedy="raise `density`")
        places, signs, tensors, shares, sums, offset = [], [], [], {}, np.zeros(4), 0
        for name, tau in changes(adapter, given.base):
            flat = tau.double().flatten()
            mask = kept.mask(name, tau).flatten() & (flat != 0)  # fewer changed than may be kept: what did not change has no sign
            places.append(mask.nonzero().flatten().numpy() + offset)
            signs.append((flat[mask] > 0).numpy())
            sums += [float(flat.sum()), float(flat.pow(2).sum()), float(flat[mask].abs().sum()), 0]
            share = shares.setdefault(_part(name), [0, 0])
            share[0], share[1] = share[0] + int(mask.sum()), share[1] + len(mask)
            tensors.append([name, list(tau.shape)])
            offset += len(mask)
        if shares.get("lora_B", [1])[0] == 0:
            raise ConfigError("nothing of any B is among the largest parameters, so the LoRA would change nothing", remedy="raise `density`")
        if not sum(map(len, places)):
            raise ConfigError("the adapter changes nothing, so there is nothing to keep", where=str(adapter), remedy="look at how it was trained")
        n, total, squares, held = kept.total, *sums[:3]
        sigma = float(((squares - total**2 / n) / max(n - 1, 1)) ** 0.5)
        code = encode(np.concatenate(places))
        packed = {"unary": code.unary, "low": code.low, "signs": to_bits(np.concatenate(signs))}
        extra = {"tensors": tensors, "count": code.count, "bits": code.bits, **_files(adapter)}

        def write(folder: Path, magnitude: float) -> None:
            write_packed(folder, packed | {"magnitude": torch.tensor([magnitude], dtype=torch.float32)}, facts, self, extra)

        tried: dict[float, float] = {}
        magnitude = self.alpha * sigma if self.alpha else held / code.count
        if self.rows and self.alpha is None:
            tried = self._scores(given, lambda folder, alpha: write(folder, alpha * sigma))
            magnitude = max(tried, key=lambda a: tried[a]) * sigma
        write(out, magnitude)
        error = max(squares - 2 * magnitude * held + code.count * magnitude**2, 0.0)
        return {"lost": (error / squares) ** 0.5 if squares else 0.0, "alpha": magnitude / sigma if sigma else 0.0, "sigma": sigma, "magnitude": magnitude,
                "kept": {part: k / m for part, (k, m) in sorted(shares.items())}, "bits_per_parameter": 8 * sum(t.numel() for t in packed.values()) / n,
                **({"tried": {str(a): v for a, v in tried.items()}} if tried else {})}

    def _scores(self, given: Given, write: Callable[[Path, float], None]) -> dict[float, float]:
        """For each alpha how well the packed adapter does, more being better."""
        import shutil

        from ftpipe.artifacts import hash_files
        from ftpipe.data.rows import RowSet
        from ftpipe.evaluate.suites.base import Given as Asked
        from ftpipe.evaluate.systems import System
        from ftpipe.merge._judge import means, one_metric
        from ftpipe.models.loading import default_device, identity
        from ftpipe.models.service import ModelService
        from ftpipe.registry.ledger import files_content

        asked = Asked(RowSet(given.inputs[self.rows or ""]), given.env, given.log)
        label, = self.suite.labels()[:1]
        items = {name: self.suite.items(asked) for name in self.suite.labels()}
        who = {"base": {k: v for k, v in identity(given.model, given.env).items() if k != "model"}, "dtype": given.dtype, "device": default_device()}
        found = {}
        for number, alpha in enumerate(sorted(set(self.alphas))):
            folder = given.work / "tried"
            shutil.rmtree(folder, ignore_errors=True)
            write(folder, alpha)
            system = System(f"alpha {alpha}", who | {"adapter": files_content(hash_files(folder), str(folder))},
                            lambda folder=folder: ModelService.open(given.model, given.env, adapter=folder, dtype=given.dtype))
            try:
                found[alpha] = one_metric(means(system, [self.suite], items, given)["selection"][label], self.metric, label).up
            finally:
                system.close()
            given.progress(number + 1, len(set(self.alphas)), "alphas")
        return found

    def expand(self, folder: Path, out: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        from ftpipe.compress._packed import FACTS, FILE, from_bits, read_packed
        from ftpipe.compress._rice import Coded, decode
        from ftpipe.merge._deltas import Delta
        from ftpipe.merge._weights import Writer

        facts, packed = read_packed(folder)
        tensors = load_file(folder / FILE)
        try:
            places = torch.from_numpy(decode(Coded(tensors["unary"], tensors["low"], packed["count"], packed["bits"])))
        except (ValueError, KeyError) as error:
            raise ArtifactError(f"the packed places cannot be read: {error}", where=str(folder), remedy="copy or make it again") from error
        signs = torch.from_numpy(from_bits(tensors["signs"], packed["count"])).float() * 2 - 1
        sizes = [int(torch.Size(shape).numel()) for _, shape in packed["tensors"]]
        if len(places) and int(places[-1]) >= sum(sizes):
            raise ArtifactError("the packed places do not fit the adapter's tensors", where=str(folder), remedy="copy or make it again")
        values, start, made = signs * tensors["magnitude"], 0, {}
        whole = Writer(out, facts, base, whole=True) if packed["whole"] else None
        for (name, shape), size in zip(packed["tensors"], sizes):
            first, last = torch.searchsorted(places, torch.tensor([start, start + size])).tolist()
            tau = torch.zeros(size)
            tau[places[first:last] - start] = values[first:last]
            if whole:
                whole.add(name, Delta(dense_=tau.view(shape)))
            else:
                made[name] = (tau + packed["start"]).view(shape).to(getattr(torch, packed["dtypes"]))
            start += size
        if whole:
            whole.close()
            return
        out.mkdir(parents=True)
        save_file(made, out / packed["file"], metadata={"format": "pt"})
        for file, content in packed["json"].items():
            (out / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (out / FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _part(name: str) -> str:
    return next((part for part in ("lora_A", "lora_B") if f".{part}." in name), "other")


def _start(adapter: Path) -> float:
    """The value that the parameters of a PEFT adapter start from."""
    config = adapter / "adapter_config.json"
    return 1.0 if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("peft_type") == "IA3" else 0.0


def _file(adapter: Path) -> Path:
    files = sorted(adapter.glob("*.safetensors"))
    if len(files) != 1:
        raise ConfigError(f"the adapter has {len(files)} tensor files, which is not a form that is known here", where=str(adapter), remedy="use half_precision")
    return files[0]


def changes(adapter: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter of the adapter by name, less what it starts from; float32 or wider."""
    from ftpipe.merge._deltas import read
    from ftpipe.models.weights import tensor
    from ftpipe.train.adapt._weights import tensor_files

    if tensor_files(adapter):
        for name, delta in read(adapter, base).items():
            yield name, delta.dense()
        return
    from safetensors import safe_open

    file, start = _file(adapter), _start(adapter)
    with safe_open(file, framework="pt") as f:
        names = sorted(f.keys())
    for name in names:
        yield name, tensor(file, name).float() - start


def _files(adapter: Path) -> dict[str, Any]:
    """What `expand` needs to write the adapter in the form it had."""
    from safetensors import safe_open

    from ftpipe.train.adapt._weights import tensor_files

    if tensor_files(adapter):
        return {"whole": True}
    file = _file(adapter)
    with safe_open(file, framework="pt") as f:
        types = {str(f.get_tensor(n).dtype).removeprefix("torch.") for n in f.keys()}  # noqa: SIM118 (not a dict)
    if len(types) != 1 or not types <= {"float32", "float16", "bfloat16", "float64"}:
        raise ConfigError(f"the adapter's tensors are of the types {', '.join(sorted(types))}", where=str(file), remedy="give it one type of real numbers")
    beside = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(adapter.glob("*.json")) if p.name != "ftpipe_adapter.json"}
    return {"whole": False, "file": file.name, "start": _start(adapter), "dtypes": types.pop(), "json": beside}
