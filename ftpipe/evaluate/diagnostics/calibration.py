"""Whether the probabilities that a model gives are as often right as they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.data.rows import HELDOUT
from ftpipe.errors import DataError
from ftpipe.evaluate.diagnostics._shared import each, table
from ftpipe.evaluate.diagnostics.base import Chart, Diagnostic, Evidence, Finding, Measure, Number, Series

if TYPE_CHECKING:
    import numpy as np

    from ftpipe.data.render import Rendered
    from ftpipe.models.service import ModelService

CHUNK = 256
"""Positions whose logits are in memory as float32 at once."""


class Calibration(Diagnostic):
    """Expected calibration error of the next token in the answers of held-out rows, for the base and every adapter, and the reliability plot.

    At each position that predicts a trained token, the confidence is the largest probability of the next token, and it is right if that token is the
    one that stands there. Positions go into `bins` equal parts of [0, 1] by confidence (a value on an edge belongs to the bin below it); the error is
    sum over bins of (positions / all) * |share right - mean confidence|. The table has every bin that is not empty. An error below about 1/sqrt(positions)
    is no more than chance. Accuracy is among the numbers, because a model that always says how often tokens are right is calibrated and knows nothing.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    support: ClassVar[tuple[str, ...]] = ("ftpipe.models.service", "ftpipe.models.loading")
    question: ClassVar[str] = "Are its probabilities as often right as they say?"
    measures: ClassVar[dict[str, Measure]] = {
        "expected calibration error": Measure("share", "mean distance between how sure it is of a token and how often it is right; less is better"),
        "mean confidence": Measure("share", "mean probability of the token that it holds for the likeliest; above the share right it is too sure of itself"),
        "share right": Measure("share", "tokens of the answers that were its likeliest guess"),
        "positions": Measure("count", "tokens looked at; an error below about one over their square root is no more than chance"),
    }

    bins: int = Field(default=15, ge=2, le=1000, description="Equal parts of the range of confidence.")
    limit: int = Field(default=200, ge=0, description="Use only so many held-out rows, the first; 0 uses all.")

    def diagnose(self, evidence: Evidence) -> Finding:
        from ftpipe.models.service import ModelService

        held = evidence.rows.table(HELDOUT, ["format", "messages", "chosen", "rejected", "text"]).to_pylist() if evidence.rows else []
        held = held[: self.limit or None]
        rows: list[tuple] = []
        numbers: list[Number] = []
        told: dict[str, str] = {}
        systems = {"base": None, **evidence.adapters}
        for done, (system, tuned) in enumerate(systems.items(), 1):
            service = ModelService.open(evidence.model, evidence.env, adapter=tuned.folder if tuned else None, dtype="float32")
            shown = [r for r in service.renderer.rows(held) if not isinstance(r, Exception) and len(r.input_ids) > 1]
            confidence, right = certainties(service, shown)
            if not len(right):
                raise DataError("no held-out row has a trained token", where="calibration", remedy="hold rows with answers out, or leave this diagnostic out")
            error, parts = expected_calibration_error(confidence, right, self.bins)
            rows += [(system, *part) for part in parts]
            told[system] = f"{error:.1%}"
            numbers += [Number(measure, value, system) for measure, value in zip(self.measures, (error, float(confidence.mean()), float(right.mean()),
                                                                                                 float(len(right))))]
            evidence.progress(done, len(systems))
        columns = {"system": "string", "low": "double", "high": "double", "n": "int64", "confidence": "double", "right": "double"}
        words = f"Probabilities of the next token are off by, on average: {each(told)}; on {len(right)} tokens about {len(right) ** -0.5:.1%} would be chance."
        even = Series("as often as said", [0, 1], [0, 1], guide=True)
        lines = [Series(system, [r[4] for r in rows if r[0] == system], [r[5] for r in rows if r[0] == system]) for system in systems]
        return Finding(words, numbers, table(columns, rows), [Chart("Share right by confidence", "confidence", "share right", [even, *lines], (0, 1))])


def certainties(service: ModelService, rendered: list[Rendered]) -> tuple[np.ndarray, np.ndarray]:
    """For each trained token that something predicts: the largest probability of the next token, and whether that token is the right one; shape (n,)."""
    import numpy as np
    import torch

    confidence, right = [np.zeros(0)], [np.zeros(0, bool)]
    with torch.inference_mode():
        for row in rendered:
            ids = row.input_ids[: service.max_length]
            at = [t - 1 for t in range(1, len(ids)) if row.trained[t]]
            tokens = torch.tensor([ids], device=service.device)
            logits = service.model(input_ids=tokens, use_cache=False).logits[0]
            for start in range(0, len(at), CHUNK):
                where = torch.tensor(at[start:start + CHUNK], device=service.device)
                most, which = torch.softmax(logits[where].float(), -1).max(-1)
                confidence.append(most.double().cpu().numpy())
                right.append((which == tokens[0, where + 1]).cpu().numpy())
    return np.concatenate(confidence), np.concatenate(right)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int) -> tuple[float, list[tuple[float, float, int, float, float]]]:
    """The error, and (low, high, n, mean confidence, share right) of each bin that is not empty."""
    import numpy as np

    which = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1).astype(int)
    parts = []
    for b in range(bins):
        mine = which == b
        if mine.any():
            parts.append((b / bins, (b + 1) / bins, int(mine.sum()), float(confidence[mine].mean()), float(right[mine].mean())))
    return sum(n * abs(share - mean) for _, _, n, mean, share in parts) / len(confidence), parts
