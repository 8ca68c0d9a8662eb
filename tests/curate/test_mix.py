"""Mixing by source: shares, caps, stated parts, rows and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from ftpipe import slots
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from tests.artifacts import decisions, kept_ids, rows_artifact, run_step, text

SIZES = {"big": 80, "mid": 16, "tiny": 4}
TOKENS = {"big": 2, "mid": 10, "tiny": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mix")


@pytest.fixture(scope="module")
def sources(folder):
    """Three sources: the fewer rows, the longer. 160, 160 and 400 tokens."""
    rows = [text(f"{s}{i}", source=s, group=f"{s}-{i % 2}") for s, n in SIZES.items() for i in range(n)]
    return rows_artifact(folder, rows, annotations={"tokens": [TOKENS[r["source"]] for r in rows]})


def shown(made, weight: dict[str, int] | None = None) -> dict[str, int]:
    totals: dict[str, int] = {}
    for row in RowSet(made).table(columns=["source", "times"]).to_pylist():
        totals[row["source"]] = totals.get(row["source"], 0) + row["times"] * (weight or {}).get(row["source"], 1)
    return totals


@pytest.mark.parametrize(("step", "expected"), [
    ({"proportional": {"amount": 50}}, {"big": 40, "mid": 8, "tiny": 2}),
    ({"proportional": {"total": 2.5}}, {"big": 200, "mid": 40, "tiny": 10}),
    ({"proportional": {"weights": {"tiny": 4}, "total": 1}}, {"big": 72, "mid": 14, "tiny": 14}),  # 80, 16, 16 of 112: 71.43, 14.29, 14.29
    ({"capped": {"cap": 16}}, {"big": 16, "mid": 16, "tiny": 4}),
    ({"capped": {"cap": 16, "total": 1}}, {"big": 45, "mid": 44, "tiny": 11}),
    ({"tulu": {}}, SIZES),
    ({"tulu": {"parts": {"big": 20, "tiny": None}}}, {"big": 20, "tiny": 4}),
])
def test_rows_of_each_source(folder, sources, step, expected):
    assert shown(run_step(folder, sources, step)) == expected


@pytest.mark.parametrize(("step", "expected"), [
    ({"proportional": {"unit": "tokens", "amount": 360}}, {"big": 80, "mid": 80, "tiny": 200}),
    ({"capped": {"unit": "tokens", "cap": 160}}, {"big": 160, "mid": 160, "tiny": 100}),  # 160 of tiny: one row of 100, a second does not fit
    ({"capped": {"unit": "tokens", "cap": 200, "amount": 1040}}, {"big": 320, "mid": 320, "tiny": 400}),
    ({"temperature": {"unit": "tokens", "temperature": 1e9, "amount": 300}}, {"big": 100, "mid": 100, "tiny": 100}),
    ({"tulu": {"unit": "tokens", "parts": {"mid": 50, "big": None}}}, {"big": 160, "mid": 50}),
])
def test_tokens_of_each_source(folder, sources, step, expected):
    assert shown(run_step(folder, sources, step), TOKENS) == expected


def test_no_row_is_shown_twice_more_than_another_of_its_source_and_less_is_part_of_more(folder, sources):
    few, more = (run_step(folder, sources, {"proportional": {"total": t}}) for t in (0.3, 0.6))
    assert set(kept_ids(few)) < set(kept_ids(more))
    made = run_step(folder, sources, {"temperature": {"temperature": 3.0}})
    table = RowSet(made).table(columns=["source", "times"]).to_pylist()
    for source in SIZES:
        times = [r["times"] for r in table if r["source"] == source]
        assert max(times) - min(times) <= 1


def test_what_was_repeated_counts_as_often(folder):
    rows = [text(f"{s}{i}", source=s, times=t) | {"times": t} for s, t in (("once", 1), ("thrice", 3)) for i in range(10)]
    source = rows_artifact(folder, rows)
    assert shown(run_step(folder, source, {"proportional": {"amount": 20}})) == {"once": 5, "thrice": 15}
    assert shown(run_step(folder, source, {"capped": {"cap": 10}})) == {"once": 10, "thrice": 9}


def test_a_source_may_be_a_group_or_what_a_step_found_out(folder, sources):
    made = run_step(folder, sources, {"tulu": {"by": "group", "parts": {"big-1": 7, "tiny-0": None}}})
    groups = RowSet(made).table(columns=["group"])["group"].to_pylist()
    assert {g: groups.count(g) for g in groups} == {"big-1": 7, "tiny-0": 2}
    assert shown(run_step(folder, sources, {"tulu": {"by": "tokens", "parts": {"100": None}}})) == {"tiny": 4}
    with pytest.raises(DataError, match="annotates 'beauty'"):
        run_step(folder, sources, {"proportional": {"by": "beauty"}})


def test_the_share_of_tokens_is_told_beside_that_of_rows(folder, sources):
    told = run_step(folder, sources, {"tulu": {"parts": {"big": 76, "tiny": None}}}).json("tulu.json")["sources"]
    by = {s["source"]: s for s in told}
    assert by["tiny"]["row_share"] == 4 / 80 and by["tiny"]["token_share"] == 400 / 552, "long rows: 5 % of the rows, 72 % of the tokens"
    assert (by["big"]["rows"], by["big"]["tokens"], by["mid"]["rows"], by["mid"]["tokens"]) == (76, 152, 0, 0)


def test_what_is_no_part_says_why(folder, sources):
    made = run_step(folder, sources, {"tulu": {"parts": {"tiny": 3}}})
    assert made.counts == {"rows_in": 100, "rows_kept": 3, "dropped: not in the mixture": 97}
    scores = {v["score"] for r, v in decisions(made).items()}
    assert scores == {0.0, 0.75}


def test_what_cannot_be_mixed(folder, sources):
    with pytest.raises(DataError, match=r"holds 4 rows, 5 are stated"):
        run_step(folder, sources, {"tulu": {"parts": {"tiny": 5}}})
    with pytest.raises(DataError, match="no source 'bog'"):
        run_step(folder, sources, {"tulu": {"parts": {"bog": 5}}})
    with pytest.raises(DataError, match="weight 0"):
        run_step(folder, sources, {"capped": {"cap": 5, "weights": dict.fromkeys(SIZES, 0)}})
    with pytest.raises(DataError, match="are not known"):
        run_step(folder, rows_artifact(folder, [text("a")]), {"proportional": {"unit": "tokens"}})
    for wrong in ({"proportional": {"total": 1, "amount": 5}}, {"capped": {}}, {"capped": {"cap": 0}}, {"tulu": {"parts": {"big": 0}}}, {"tulu": {"total": 2}}):
        with pytest.raises((ValidationError, slots.InvalidMethod)):
            slots.parse("curate", wrong)


def test_the_draw_follows_the_seed(folder, sources):
    one, same, other = (kept_ids(run_step(folder, sources, {"proportional": {"total": 0.5}}, seed=s)) for s in (1, 1, 2))
    assert one == same and set(one) != set(other)


def test_shares_come_out_whole_by_largest_remainder():
    from ftpipe.curate.mix._sources import largest_remainder

    rng = np.random.default_rng(0)
    for _ in range(200):
        k, total = int(rng.integers(1, 30)), int(rng.integers(1, 10_000))
        amounts = rng.dirichlet(np.ones(k)) * total
        whole = largest_remainder(amounts, [f"{i:02d}" for i in range(k)])
        assert whole.sum() == total and np.abs(whole - amounts).max() < 1


def test_a_mixture_keeps_the_held_out_rows(folder):
    source = rows_artifact(folder, [text(f"t{i}") for i in range(4)] + [text("held", split="heldout")])
    made = run_step(folder, source, {"capped": {"cap": 2}})
    assert kept_ids(made, "heldout") == kept_ids(source, "heldout") and len(kept_ids(made)) == 2
    assert pq.read_table(made.file("kept.parquet")).num_rows == 3


TULU = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content.strip() + eos_token + '\n' }}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content.strip() + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


def test_in_tulus_format_the_answers_and_their_ends_are_trained_and_a_cut_dialogue_is_dropped(tiny_model):
    from transformers import AutoTokenizer

    from ftpipe.data.labels import LabelChecks
    from ftpipe.data.render import Renderer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TULU
    renderer = Renderer(tokenizer)
    turns = [{"role": r, "content": c} for r, c in (("user", " q1 "), ("assistant", "a1"), ("user", "q2"), ("assistant", " a2"))]
    row = {"format": "messages", "messages": turns}
    rendered = renderer.row(row)
    assert tokenizer.decode(rendered.input_ids) == "<|user|>\nq1\n<|assistant|>\na1</s>\n<|user|>\nq2\n<|assistant|>\na2</s>\n".replace("</s>", "<|im_end|>")
    assert tokenizer.decode([i for i, t in zip(rendered.input_ids, rendered.trained) if t]) == "a1<|im_end|>a2<|im_end|>"
    n = len(rendered.input_ids)
    reasons = {limit: next(LabelChecks(renderer, limit, require_bos=False).rows([row])).reason for limit in (n, n - 3, rendered.prompt_length)}
    assert reasons == {n: None, n - 3: "answer is truncated", rendered.prompt_length: "prompt exceeds max_tokens"}
    cut = next(LabelChecks(renderer, n - 3, truncate=True, require_bos=False).rows([row]))
    assert cut.reason is None and cut.trained_tokens == sum(rendered.trained[: n - 3])


def test_the_recipe_compares_every_source_with_both_mixtures(tmp_path):
    """The file in configs/recipes, on sources of a few rows and with amounts to match, up to the rows that are trained on."""
    import yaml

    from ftpipe.pipeline.runner import run
    from ftpipe.pipeline.spec import build

    data = yaml.safe_load((Path(__file__).parents[2] / "configs" / "recipes" / "tulu.yaml").read_text().replace("100000", "3"))
    names = [Path(s["jsonl"]["path"]).stem for s in data["stages"]["ingest"]["sources"]]
    (tmp_path / "data").mkdir()
    for i, name in enumerate(names):
        lines = [json.dumps({"prompt": f"{name} {k}?", "completion": f"answer {k}"}) for k in range(4 + i)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    evaluate = data["stages"]["evaluate"]
    trained = {s: v["rows"] for s, v in data["stages"].items() if v.get("kind") == "train"}
    assert set(evaluate["controls"].values()) | {evaluate["candidate"]} == set(trained) and len(trained) == len(names) + 2
    build(data, base=tmp_path)
    data["stages"] = {s: v for s, v in data["stages"].items() if s == "ingest" or v.get("kind") == "curate"}
    data["stages"]["ingest"]["heldout"] = {"share": 0}
    for stage in data["stages"].values():
        stage |= {"rows": "ingest"} if stage.get("kind") == "curate" else {}
    made = run(build(data | {"workspace": str(tmp_path / "ws")}, base=tmp_path)).artifacts
    sizes = {n: {n: 3 if n in ("flan_v2", "cot") else 4 + i} for i, n in enumerate(names)}
    both = {n: c for part in sizes.values() for n, c in part.items()}
    human = {n: both[n] for n in ("flan_v2", "cot", "dolly", "oasst1")}
    got = sorted(({Path(s).stem: c for s, c in shown(a).items()} for n, a in made.items() if n != "ingest"), key=str)
    assert got == sorted([*sizes.values(), both, human], key=str)
