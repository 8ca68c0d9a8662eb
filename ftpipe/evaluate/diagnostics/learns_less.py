"""What each way of training learnt, what it forgot, and the rank of what it changed."""

from __future__ import annotations

from statistics import mean, median
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.evaluate.diagnostics._shared import called, changed_matrices, table
from ftpipe.evaluate.diagnostics.base import Chart, Diagnostic, Evidence, Finding, Measure, Number, Series, Tuned
from ftpipe.models.adapters import read_manifest

if TYPE_CHECKING:
    import torch

COLUMNS = {"system": "string", "arm": "string", "rank": "int64", "steps": "int64", "learning_rate": "double", "chosen": "bool", "learning": "double",
           "forgetting": "double", "k90_change": "double", "k90_base": "double", "k90_noise": "double", "numerical_rank": "int64"}


class LearnsLess(Diagnostic):
    """Learning against forgetting for the candidate and the controls, by way of training (the arm), rank and number of steps, as the paper plots them.

    Learning is the mean gain over the base on the suites `learning`, forgetting the mean loss against the base on the suites `forgetting`, each in its metric's
    unit. A row of the table is one training; of those that differ in their learning rate alone the one that learnt most is `chosen` and plotted, because
    a learning rate shared by LoRA and full tuning decides the comparison (the best for LoRA is about ten times the other). An arm needs three durations
    or more, each a training of its own that ran to its end, to show a curve: their number is among the numbers.

    Of each changed matrix, k90 is the least number of singular values of W' - W whose squares make up 90 % of the sum. The table has the median over matrices,
    and two controls: k90 of W, and of random numbers of the same shape. A k90 like that of the random numbers is no sign of learning of high rank: rounding of
    weights kept in bfloat16 looks just the same. `numerical_rank` is the largest number, over matrices, of singular values above 1e-5 of
    the first and above what the rounding of W' to float32 alone could make.
    """

    paper: ClassVar[str] = "LoRA Learns Less and Forgets Less"
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    support: ClassVar[tuple[str, ...]] = ("ftpipe.models.loading",)
    question: ClassVar[str] = "What was learnt, and what did it cost in forgetting?"
    measures: ClassVar[dict[str, Measure]] = {
        "learning": Measure("the metric's unit", "mean gain over the base on what was to be learnt"),
        "forgetting": Measure("the metric's unit", "mean loss against the base on what it could do before; less is better"),
        "k90 change": Measure("directions", "how many directions hold 90 % of the change of a weight; median over weights"),
        "k90 base": Measure("directions", "the same of the base's weights themselves"),
        "k90 noise": Measure("directions", "the same of random numbers; a change like this is no sign of learning of high rank"),
        "numerical rank": Measure("directions", "largest rank of the change of any weight"),
        "durations": Measure("count", "trainings of different length of one kind; a curve needs three"),
    }

    learning: list[str] = Field(default=["heldout_loss"], min_length=1, description="Suites that say what was learnt.")
    forgetting: list[str] = Field(default=["general_text"], min_length=1, description="Suites that say what was forgotten; chosen before training.")
    matrices: int = Field(default=0, ge=0, description="Look at the rank of only so many changed matrices, evenly spread; 0 takes all.")
    seed: int = Field(default=0, ge=0, description="Seed of the random control.")

    def diagnose(self, evidence: Evidence) -> Finding:
        gain = {(c["a"], c["suite"]): [] for c in evidence.comparisons if c["b"] == "base"}
        for c in evidence.comparisons:
            if c["b"] == "base":
                gain[c["a"], c["suite"]].append(c["difference"])

        def over(system: str, suites: list[str]) -> float | None:
            found = [mean(gain[system, s]) for s in suites if (system, s) in gain]
            return mean(found) if len(found) == len(suites) else None

        rows: list[dict[str, Any]] = []
        for done, (system, changed) in enumerate(changed_matrices(evidence), 1):
            lost = over(system, self.forgetting)
            rows.append({"system": system, **_training(evidence.adapters[system]), "chosen": True, "learning": over(system, self.learning),
                         "forgetting": None if lost is None else -lost, **self._ranks(changed)})
            evidence.progress(done, len(evidence.adapters))
        for row in rows:
            rivals = [r for r in rows if all(r[k] == row[k] for k in ("arm", "rank", "steps")) and r["learning"] is not None]
            row["chosen"] = row["learning"] is not None and row is max(rivals, key=lambda r: r["learning"])
        numbers = [Number(name.replace("_", " "), float(r[name]), r["system"]) for r in rows
                   for name in ("learning", "forgetting", "k90_change", "k90_base", "k90_noise", "numerical_rank") if r[name] is not None]
        for arm in dict.fromkeys(_curve(r) for r in rows):
            steps = {r["steps"] for r in rows if _curve(r) == arm and r["steps"] is not None}
            numbers.append(Number("durations", float(len(steps)), of=arm))
        said = [f"{called(r['system'])} ({_curve(r)}) learnt {r['learning']:+.3f} and forgot {r['forgetting']:+.3f}" for r in rows
                if r["learning"] is not None and r["forgetting"] is not None]
        words = "; ".join(said)[:1].upper() + "; ".join(said)[1:] + "." if said else "What was learnt or forgotten was not measured."
        return Finding(words, numbers, table(COLUMNS, [tuple(r[c] for c in COLUMNS) for r in rows]), _plots(rows))

    def _ranks(self, changed: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
        import torch

        names = list(changed)
        if self.matrices and len(names) > self.matrices:
            names = [names[i * len(names) // self.matrices] for i in range(self.matrices)]
        if not names:
            return dict.fromkeys(("k90_change", "k90_base", "k90_noise", "numerical_rank"))
        generator = torch.Generator().manual_seed(self.seed)
        change, base, noise, ranks = [], [], [], []
        for before, after in (changed[n] for n in names):
            values = torch.linalg.svdvals(after.double() - before.double())
            change.append(k90(values))
            base.append(k90(torch.linalg.svdvals(before.double())))
            noise.append(k90(torch.linalg.svdvals(torch.randn(before.shape, generator=generator, dtype=torch.float64))))
            rounding = torch.finfo(torch.float32).eps / 2 * after.double().norm()  # no singular value of the rounding of W' is larger
            ranks.append(int((values > torch.maximum(1e-5 * values[0], rounding)).sum()))
        return {"k90_change": median(change), "k90_base": median(base), "k90_noise": median(noise), "numerical_rank": max(ranks)}


def k90(values: torch.Tensor, share: float = 0.9) -> int:
    """The least k for which the k largest of the singular values (descending) hold `share` of the sum of squares; 0 where all are zero."""
    import torch

    squares = values.double() ** 2
    total = squares.sum()
    # a little below the share itself, for 9 of 10 equal values must do
    return int(torch.searchsorted(squares.cumsum(0) / total, share * (1 - 1e-9)).item()) + 1 if total > 0 else 0


def _training(tuned: Tuned) -> dict[str, Any]:
    """arm, rank, steps and learning rate, as the adapter and its training tell; None where they do not."""
    (arm, fields), = read_manifest(tuned.folder)["method"].items()
    told = tuned.training
    return {"arm": arm, "rank": (fields or {}).get("r"), "steps": told.get("steps"), "learning_rate": told.get("settings", {}).get("learning_rate")}


def _curve(row: dict[str, Any]) -> str:
    return row["arm"] if row["rank"] is None else f"{row['arm']} r={row['rank']}"


def _plots(rows: list[dict[str, Any]]) -> list[Chart]:
    shown = sorted((r for r in rows if r["chosen"] and r["forgetting"] is not None), key=lambda r: (r["steps"] or 0, r["system"]))
    lines = [Series(curve, [r["forgetting"] for r in shown if _curve(r) == curve], [r["learning"] for r in shown if _curve(r) == curve])
             for curve in dict.fromkeys(map(_curve, shown))]
    return [Chart("Learning against forgetting", "forgotten: loss against the base", "learnt: gain over the base", lines)] if lines else []
