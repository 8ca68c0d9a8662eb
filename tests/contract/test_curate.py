"""What every curation method must hold. A new method is tested without being named here, unless it has fields without a default."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from ftpipe import slots
from ftpipe.data.rows import RowSet, content_id, kept_schema
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step, text
from tests.models.data import trained_adapter

SLOTS = sorted(s for s in slots.slots() if s.startswith("curate/"))
METHODS = [(slot, name) for slot in SLOTS for name in slots.slots()[slot].names()]


def short_run(changed: str, factor: float) -> dict:
    """What a run with 100 tokens of each file, but `factor` times as many of one, may come to."""
    tokens = {d: 100 * (factor if d == changed else 1) for d in FILES}
    return {"tokens": tokens, "loss": {d: 1 + (i + 1) * n**-0.2 for i, (d, n) in enumerate(tokens.items())}}


FILES = ("s0.jsonl", "s1.jsonl", "s2.jsonl", "test.jsonl")
SETTINGS = {
    "length": {"by": "tokens", "least": 20},
    "decontaminate": {},
    "lobass": {"reference": "reference", "budget": {"share": 0.5}},
    "length_matched_random": {"budget": {"like": "like"}, "bins": 3},
    "by_annotation": {"column": "tokens", "descending": True},
    "instruction_variants": {"templates": ["Please answer: {prompt}", "{prompt}\nBe brief."]},
    "sensitivity_sampling": {"clusters": 4, "budget": {"share": 0.5}},
    "less": {"reference": "reference", "dimensions": 64, "budget": {"share": 0.5}},
    "instruct_mining": {"coefficients": {"output_length": -0.01, "mtld": 0.02, "perplexity": 0.001, "knn_2": -0.3}, "budget": {"share": 0.5}},
    "deft_ucs": {"clusters": 3, "easy": 0.5, "budget": {"share": 0.5}},
    "perplexity_correlations": {"table": "models.csv", "budget": {"share": 0.5}},
    "grape": {},
    "source": {"keep": ["s0.jsonl", "s[12]*"]},
    "bsdetector": {"samples": 1, "max_new_tokens": 2},
    "high_resource_first": {"low": ["test.jsonl"]},
    "capped": {"cap": 5},
    "tulu": {"parts": {"s0.jsonl": 4, "s1.jsonl": None}},
    "dmo": {"runs": [short_run(changed, factor) for changed in FILES for factor in (0.5, 2, 3)]},
    "skill_it": {"graph": {d: {d: 1.0} for d in FILES}, "losses": [{d: float(i) for i, d in enumerate(FILES)}]},
    "rejection_sampling": {"samples": 2, "max_new_tokens": 4},
    "ssr": {"max_new_tokens": 4},
    "s3ft": {"max_new_tokens": 4, "checker": "exact"},
    "semantic": {"threshold": 0.5},
    "sentences": {"most": 2, "least_words": 1},
}
"""Settings of the methods that need some; a selector without an entry gets half of the tokens."""
PERMUTED = {"perplexity", "loss", "lobass", "sensitivity_sampling", "grape", "ifd", "got_d", "bsdetector", "less", "instruct_mining", "deft_ucs",
            "semantic"}
"""Methods whose numbers come from a model: batches of another make-up change the last digits of a score, so only the rows are compared."""

WORDS = ["it", "takes", "the", "name", "of", "a", "file", "and", "gives", "back", "what", "is", "in", "it", "as", "text"]


def data() -> list[dict]:
    rows = []
    for i in range(24):
        answer = " ".join(f"{w}{i}" if k % 3 else w for k, w in enumerate(WORDS[: 6 + i % 8]))
        rows.append(chat(f"What does function number {i} do?", answer, source=f"s{i % 3}.jsonl", group=f"g{i % 5}"))
    rows += [chat("What does function number 3 do?", rows[3]["messages"][1]["content"] + extra, source="s0.jsonl") for extra in (" ", "  again")]
    held = "this is the answer to a question that was held out of training and must not be seen by anybody at all"
    rows += [chat("held out?", held, split="heldout"), chat("also held?", "the second held-out answer", split="heldout")]
    rows.append(chat("leaked?", held))
    return complete(rows)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curate")
    models = [f"m{i},{i / 10},{1 + i},{2 + i % 2},{3 - i / 9}\n" for i in range(5)]
    (folder / "models.csv").write_text("model,error,s0.jsonl,s1.jsonl,s2.jsonl\n" + "".join(models))
    return folder


@pytest.fixture(scope="module")
def extra(workspace, tiny_model):
    """Stages that methods refer to."""
    rows = data()
    made = {"like": rows_artifact(workspace, rows[4:14], name="like", annotations={"tokens": [tokens(r) for r in rows[4:14]]})}
    return made | {"reference": trained_adapter(workspace, tiny_model, rows[:4], steps=2)}


def tokens(row: dict) -> int:
    return sum(len(t["content"]) for t in row["messages"]) // 3


def settings(slot: str, name: str) -> dict:
    if name in SETTINGS:
        return SETTINGS[name]
    return {"budget": {"share": 0.5}} if slot == "curate/select" else {}


def apply(workspace, slot, name, rows, extra, tiny_model, *, seed=3):
    source = rows_artifact(workspace, rows, annotations={"tokens": [tokens(r) for r in rows], "confidence": [tokens(r) % 10 / 10 for r in rows]})
    method = slots.slots()[slot].get(name)(**settings(slot, name))
    wanted = {ref: extra[ref] for ref in _refs(method)}
    return run_step(workspace, source, method, seed=seed, model=str(tiny_model), **wanted)


def _refs(method):
    from ftpipe.stages.curate_step import CurateStepStage

    return [r for r in CurateStepStage(rows="rows", step=method).refs() if r != "rows"]


@pytest.mark.parametrize(("slot", "name"), METHODS)
def test_every_row_is_accounted_for(workspace, extra, tiny_model, slot, name):
    rows = data()
    made = apply(workspace, slot, name, rows, extra, tiny_model)
    train = [r["row_id"] for r in rows if r["split"] == "train"]
    verdicts = decisions(made)
    kept = pq.read_table(made.file("kept.parquet"))
    assert kept.schema.equals(kept_schema())
    assert sorted(verdicts) == sorted(train), "each train row is decided on once, and nothing else is"
    by_split = {s: [r for r in kept.to_pylist() if r["split"] == s] for s in ("train", "heldout")}
    assert [r["row_id"] for r in by_split["heldout"]] == [r["row_id"] for r in rows if r["split"] == "heldout"]
    assert all(r["times"] == 1 for r in by_split["heldout"])
    new = [] if not made.has("rows.parquet") else pq.read_table(made.file("rows.parquet")).to_pylist()
    assert {r["row_id"] for r in by_split["train"]} == {r for r, v in verdicts.items() if v["kept"]} | {r["row_id"] for r in new}
    assert all(v["reason"] for v in verdicts.values() if not v["kept"])
    assert all(r["times"] >= 1 for r in by_split["train"])
    assert sorted(kept["position"].to_pylist()) == list(range(kept.num_rows)) and len(set(kept["row_id"].to_pylist())) == kept.num_rows
    counts = made.counts
    assert counts["rows_in"] == len(train) == counts["rows_kept"] + sum(n for k, n in counts.items() if k.startswith("dropped: "))
    for row in new:
        assert content_id(row) == row["content_id"] and row["split"] == "train" and json.loads(row["meta"])["parents"]
    # the rows can be read through the artifact, with their text, in their order
    table = RowSet(made).table()
    assert table["row_id"].to_pylist() == [r["row_id"] for r in sorted(by_split["train"], key=lambda r: r["position"])]
    assert table["messages"].null_count == 0


@pytest.mark.parametrize(("slot", "name"), METHODS)
def test_the_same_twice_is_the_same_bytes(workspace, extra, tiny_model, slot, name):
    one, two = (apply(workspace, slot, name, data(), extra, tiny_model) for _ in range(2))
    hashes = [{f: e["sha256"] for f, e in a.manifest["files"].items() if f not in ("decisions.parquet", "rows.parquet")} for a in (one, two)]
    assert hashes[0] == hashes[1]
    assert decided(one) == decided(two)


def decided(artifact) -> dict:
    return {r: {k: v for k, v in d.items() if k != "step"} for r, d in decisions(artifact).items()}


@pytest.mark.parametrize(("slot", "name"), METHODS)
def test_the_order_of_the_rows_does_not_matter(workspace, extra, tiny_model, slot, name):
    rows = data()
    one = apply(workspace, slot, name, rows, extra, tiny_model)
    two = apply(workspace, slot, name, [rows[(i * 7) % len(rows)] for i in range(len(rows))], extra, tiny_model)
    if name in PERMUTED:
        assert set(kept_ids(one)) == set(kept_ids(two))
    else:
        assert decided(one) == decided(two)
    times = [{r["row_id"]: r["times"] for r in pq.read_table(a.file("kept.parquet")).to_pylist()} for a in (one, two)]
    assert times[0] == times[1]


@pytest.mark.parametrize(("slot", "name"), METHODS)
def test_settings_survive_yaml(slot, name):
    method = slots.slots()[slot].get(name)(**settings(slot, name))
    assert slots.parse("curate", method.dump()) == method
    assert method.slot == slot and method.__doc__
    assert all(f.description for f in type(method).model_fields.values())


def test_importing_the_methods_loads_nothing_heavy():
    code = ("import sys\nfrom ftpipe import slots\n"
            "[s.get(n) for name, s in slots.slots().items() if name.startswith('curate/') for n in s.names()]\n"
            "import ftpipe.stages.curate, ftpipe.stages.curate_step\n"
            "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'pandas', 'numpy', 'duckdb', 'pyarrow', 'datasets', 'prefect', 'mlflow'}\n"
            "print(sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_has_a_method(slot):
    assert slots.slots()[slot].names()


def test_a_step_that_breaks_its_contract_is_found(workspace):
    """The base, not the method, sees to it that nothing is lost."""
    import pyarrow as pa

    from ftpipe.curate.dedup.base import Dedup
    from ftpipe.curate.filter.base import Filter
    from ftpipe.curate.select.base import Selector
    from ftpipe.curate.synthesize.base import Synthesizer
    from ftpipe.errors import FtpipeError

    source = rows_artifact(workspace, [text(f"row {i}") for i in range(3)] + [text("held", split="heldout")])
    a, b, _ = kept_ids(source)
    held, = kept_ids(source, "heldout")

    def attempt(base, method, answer, **fields):
        given = answer if isinstance(answer, list) else pa.table(answer)
        cls = type("Broken", (base,), {method: lambda self, rows, ctx: given, "method_name": "broken", "__module__": __name__})
        with pytest.raises(FtpipeError, match="fault in the method") as error:
            run_step(workspace, source, cls(**fields))
        return str(error.value)

    yes = {"reason": ["r"] * 3, "score": [0.0] * 3}
    assert "judged 2 of 3" in attempt(Filter, "judge", {"row_id": [a, b], "kept": [True, True]})
    assert "decided twice" in attempt(Filter, "judge", {"row_id": [a, a, b], "kept": [False] * 3} | yes)
    assert "not a train row" in attempt(Filter, "judge", {"row_id": [a, b, held], "kept": [False] * 3} | yes)
    assert "without a reason" in attempt(Filter, "judge", {"row_id": kept_ids(source), "kept": [False] * 3, "reason": pa.nulls(3, pa.string())})
    assert "the keeper of" in attempt(Dedup, "duplicates", {"row_id": [a, b], "keeper": [b, a], "score": [1.0, 1.0]})
    other = {"format": "text", "parents": [a], "replaces": a}
    assert f"replaced {a}, which" in attempt(Synthesizer, "make", [other | {"text": "x"}, other | {"text": "y"}])
    assert f"replaced {held}, which" in attempt(Synthesizer, "make", [other | {"text": "x", "replaces": held}])
    assert "chose 3 rows for a budget of 2" in attempt(Selector, "choose", {"row_id": [a, b], "times": [2, 1]}, budget={"rows": 2})
