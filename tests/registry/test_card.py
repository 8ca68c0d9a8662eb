"""The model card: read back by the hub's own classes, and every limit in it a fact of the run."""

from __future__ import annotations

from ftpipe.registry.card import card

BASE = {"model": "org/base", "revision": "f" * 40, "weights": "w" * 64}
def compared(suite: str, metric: str, n: int, mean: float, base: float, half: float, mde: float | None) -> dict:
    gain = base - mean if metric == "loss" else mean - base
    return {"suite": suite, "metric": metric, "a": "adapter", "b": "base", "n": n, "mean_a": mean, "mean_b": base, "difference": gain, "low": gain - half,
            "high": gain + half, "mde": mde}


COMPARISONS = [compared("heldout_loss", "loss", 40, 2.5, 3.0, 0.1, 0.1), compared("general_text", "loss", 32, 4.1, 4.0, 0.05, 0.07),
               compared("maths", "exact", 9, 0.1, 0.5, 0.2, None)]


def written(**fields) -> str:
    given = {"base": BASE, "method": {"lora": {"r": 8}}, "verdict": {"rules": [{"text": "met"}]}, "comparisons": COMPARISONS, "lineage": [], "peft": True,
             "about": {"forgetting": ["general_text"]}}
    return card("demo", **given | fields)


def test_the_hub_reads_base_data_metrics_and_results():
    from huggingface_hub import ModelCard

    data = [{"source": "hf_dataset", "settings": {"path": "org/rows", "split": "train", "config": None}, "hub": True},
            {"source": "hf_dataset", "settings": {"path": "./folder"}, "hub": False}, {"source": "jsonl", "settings": {"path": "a|b.jsonl"}, "hub": False}]
    read = ModelCard(written(data=data))
    assert (read.data.base_model, read.data.datasets, read.data.metrics) == ("org/base", ["org/rows"], ["loss", "exact"])
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in read.data.eval_results] == [("heldout_loss", "loss", 2.5), ("general_text", "loss", 4.1),
                                                                                                ("maths", "exact", 0.1)]
    assert read.data.to_dict()["base_model_relation"] == "adapter" and read.data.library_name == "peft"
    assert "rows from `hf_dataset`: path org/rows, split train" in read.text and "rows from `jsonl`: path a b.jsonl" in read.text
    assert ModelCard(written()).data.datasets is None, "a local file is no data set of the hub"


def test_limits_say_what_was_lost_and_what_was_not_measured():
    text = written()
    limits = text[text.index("## Limits"): text.index("## Verdict")]
    assert "40 items of heldout_loss, 32 items of general_text, 9 items of maths only" in limits
    assert "Forgetting: on general_text it is worse than the base by 0.1000 (interval -0.1500 to -0.0500)" in limits
    assert "On maths it is worse than the base by 0.4000" in limits and "On heldout_loss a true difference smaller than 0.1000" in limits
    assert "one training with one seed" in limits and "refuses what it should was not measured" in limits and "quantised" not in limits
    noise = [{"suite": "heldout_loss", "metric": "loss", "floor": 0.03, "confidence": 0.95, "runs": 3}]
    refused = COMPARISONS[0] | {"suite": "unsafe", "metric": "refusal"}
    other = written(about={"noise": noise}, comparisons=[refused], quantize={"nf4": {}}, found={"slices": "Parts | in which"})
    assert "differ on heldout_loss by less than 0.0300 (95%, from 3 runs)" in other and "one seed" not in other and "was not measured.\n" in other
    assert "refuses what it should" not in other and "belongs to a quantised base" in other and "* slices: Parts   in which" in other
