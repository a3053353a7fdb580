"""The pipeline as the runtime sees it; every room is imported when it is first used."""

from __future__ import annotations

from functools import partial

from diptych.contract import Metric, Pipeline, Verb, lazy
from diptych_mclrec.config import COUNTING_BASELINES, MCLRecConfig
from diptych_mclrec.verbs import ItemsOptions

CUTOFFS = (1, 3, 5, 10, 20, 50, 100)
PARTS = {
    "": "",
    "_kept": ", history kept",
    "_masked": ", history masked",
    "_repeat": ", repeated targets",
    "_novel": ", new targets",
}


def _metrics() -> dict[str, Metric]:
    """Every metric by name, such as ``ndcg@10`` and ``hr@20_masked``.

    ``recall@10`` stands first: only steps that are baskets have it, and there it heads the report.
    """
    words = {"recall": "Recall", "ndcg": "NDCG", "hr": "HR"}
    heads = ("recall@10", "ndcg@10")
    names = [*heads, *(f"{word}@{k}" for word in ("hr", "ndcg", "recall") for k in CUTOFFS)]
    found = {}
    for part, said in PARTS.items():
        for name in dict.fromkeys(names):
            word, k = name.split("@")
            headline = name in heads and not part
            title = f"{words[word]}@{k}{said}"
            found[name + part] = Metric(title, "", "higher", headline, margin=0.01)
        found[f"recall_all@10{part}"] = Metric(f"Recall@10 of all{said}", "", "higher")
        found[f"mrr@10{part}"] = Metric(f"MRR@10{said}", "", "higher", margin=0.01)
        found[f"mrr{part}"] = Metric(f"MRR{said}", "", "higher", margin=0.01)
    found |= {f"mrr@{k}": Metric(f"MRR@{k}", "", "higher", margin=0.01) for k in CUTOFFS}
    found["coverage@10"] = Metric("Items in any list of 10", "%", "higher")
    found["popularity@10"] = Metric("Share of items rarer than those listed", "%", "lower")
    found["repeats@10"] = Metric("Repeats in lists of 10", "%", "lower")
    found["ece"] = Metric("Expected calibration error", "", "lower", margin=0.01)
    return found


METRICS = _metrics()

PIPELINE = Pipeline(
    name="mclrec",
    title="Next events of shop and clinical histories: MCLRec beside SASRec and honest counts",
    subject="subject",
    config=MCLRecConfig,
    metrics=METRICS,
    check=lazy("diptych_mclrec.check:check"),
    prepare=lazy("diptych_mclrec.prepare:prepare"),
    plan=lazy("diptych_mclrec.plan:plan"),
    modules=lazy("diptych_mclrec.task:modules"),
    build=lazy("diptych_mclrec.task:build"),
    evaluate=lazy("diptych_mclrec.evaluate:evaluate"),
    baselines={
        name: partial(lazy("diptych_mclrec.evaluate:evaluate_baseline"), name)
        for name in COUNTING_BASELINES
    },
    predict=lazy("diptych_mclrec.predict:predict"),
    weights=lazy("diptych_mclrec.parity:weights"),
    sample=lazy("diptych_mclrec.sample:write_sample"),
    pictures=lazy("diptych_mclrec.pictures:pictures"),
    export=lazy("diptych_mclrec.export:export"),
    verbs={
        "items": Verb(
            help="Write the item vectors for an index of nearest neighbours.",
            takes="run",
            run=lazy("diptych_mclrec.export:export_items"),
            options=ItemsOptions,
        ),
    },
)
