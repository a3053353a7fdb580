"""The report: one file that shows what results.json says, and nothing that it must not."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

from diptych.contract import Picture
from diptych.errors import DataError
from diptych.report import render, save_pictures
from diptych.report.curves import draw, read_curves
from diptych.report.page import said_apart, without_paths
from diptych.report.views import forests, score_table, split_notes


class Reader(HTMLParser):
    """Text, tags and addresses of a page; checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.addresses += [v or "" for k, v in attributes if k in {"src", "href", "xlink:href"}]
        if tag not in {"meta", "br", "img", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attributes if k in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def read(file: Path) -> tuple[str, Reader]:
    html = file.read_text()
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return html, reader


def test_report_needs_no_network_and_no_script(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    file = render(make_run(), pipeline)
    html, reader = read(file)
    assert "script" not in reader.seen
    assert reader.addresses
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    assert file.stat().st_size < 5_000_000


def test_report_has_its_parts_in_order(make_run: Callable[..., Path], pipeline: Any) -> None:
    html, reader = read(render(make_run(), pipeline))
    assert reader.headings == [
        "Results",
        "Pictures",
        "Errors worth looking at",
        "Training curves",
        "Data and findings",
        "Split",
        "How this came about",
        "Limits and intended use",
    ]
    assert html.index('class="verdict"') < html.index('class="notes"') < html.index("Results</h2>")
    assert "diptych mvcnet train DATA --out RUN" in html
    assert "loss_cvc" in html
    assert "channel.flat" in html
    assert "\N{MULTIPLICATION SIGN} 5" in html


def test_report_holds_no_path_and_no_name(
    make_run: Callable[..., Path], pipeline: Any, tmp_path: Path
) -> None:
    html, _ = read(render(make_run(), pipeline))
    for word in (str(tmp_path), "/home", "jane"):
        assert word not in html
    assert "manifest: PATH" in html


def test_numbers_in_the_report_are_those_of_results_json(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    run = make_run()
    file = run / "evaluation" / "results.json"
    results = json.loads(file.read_text())
    results["methods"]["mvcnet"]["accuracy"]["value"] = 0.1234
    results["differences"][0]["value"] = -0.0567
    file.write_text(json.dumps(results))
    html, _ = read(render(run, pipeline))
    assert "mvcnet 12.3 %" in html
    assert "\u22125.7" in html


def test_the_same_run_gives_the_same_bytes_also_when_moved(
    make_run: Callable[..., Path], pipeline: Any, tmp_path: Path
) -> None:
    run = make_run("a")
    first = render(run, pipeline).read_bytes()
    shutil.move(run, tmp_path / "moved")
    assert render(tmp_path / "moved", pipeline).read_bytes() == first
    again = make_run("b", 0)  # written anew
    assert render(again, pipeline).read_bytes() == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("allow_leakage: false", "allow_leakage: true"), "too good"),
        (("transductive: false", "transductive: true"), "Transductive:"),
    ],
)
def test_leakage_and_transduction_stand_in_red_before_every_number(
    make_run: Callable[..., Path], pipeline: Any, change: tuple[str, str], said: str
) -> None:
    run = make_run()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(*change))
    overlap = {"severity": "warning", "code": "split.overlap", "where": "fit final"}
    overlap |= {"found": "2 subject(s) in both train and test", "fix": ""}
    found = {"findings": [overlap], "errors": 0, "warnings": 1}
    (run / "findings.json").write_text(json.dumps(found))
    html, _ = read(render(run, pipeline))
    alarm = html.index('<section class="alarm"')
    assert said in html[alarm : html.index("</section>", alarm)]
    assert alarm < html.index("<table")


@pytest.mark.parametrize("level", ["session", "recording", "item", "time"])
def test_a_split_below_subjects_is_said_first(
    make_run: Callable[..., Path], pipeline: Any, level: str
) -> None:
    run = make_run()
    split = run / "split.json"
    split.write_text(
        split.read_text().replace('"disjoint_by": "subject"', f'"disjoint_by": "{level}"')
    )
    html, _ = read(render(run, pipeline))
    assert html.index('<section class="alarm"') < html.index('class="notes"')
    assert "new participant" in html


def test_a_sound_run_raises_no_alarm(make_run: Callable[..., Path], pipeline: Any) -> None:
    run = make_run()
    split = json.loads((run / "split.json").read_text())
    inner = {"disjoint_by": "item", "train": [0, 1], "validation": [2], "test": []}
    split["splits"]["a" * 16] = inner
    (run / "split.json").write_text(json.dumps(split))
    assert '<section class="alarm"' not in read(render(run, pipeline))[0]


def test_curves_are_drawn_over_all_fits_and_constant_ones_are_not_shown(
    make_run: Callable[..., Path],
) -> None:
    run = make_run()
    for file in (run / "fits").rglob("metrics.csv"):
        head, *lines = file.read_text().splitlines()
        lines = [f"{line},0.001" for line in lines]
        file.write_text("\n".join([f"{head},learning_rate", *lines]) + "\n")
    (run / "fits" / "seed-1" / "fold-0" / "metrics.csv").write_text("")
    curves = read_curves(run, "mvcnet")
    assert [(c.label, c.values.shape) for c in curves["loss"]] == [
        ("mvcnet", (19, 12)),
        ("ifnet", (20, 12)),
    ]
    assert [c.label for c in curves["loss_cvc"]] == ["mvcnet"]
    svg = draw(curves)
    assert "loss_cvc" in svg
    assert "learning_rate" not in svg
    assert "var(--series-1)" in svg
    assert "#0a0b" not in svg


def test_words_from_the_data_are_escaped(make_run: Callable[..., Path], pipeline: Any) -> None:
    run = make_run()
    findings = run / "findings.json"
    findings.write_text(findings.read_text().replace("Oz", "<script>alert(1)</script>"))
    html, reader = read(render(run, pipeline))
    assert "script" not in reader.seen
    assert "&lt;script&gt;" in html


def test_a_large_picture_is_left_out_and_named(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    run = make_run()
    picture = run / "evaluation" / "pictures" / "confusion.png"
    picture.write_bytes(np.random.default_rng(0).bytes(6_000_000))
    file = render(run, pipeline)
    html, _ = read(file)
    assert file.stat().st_size < 5_000_000
    assert "confusion.png" in html
    assert "Accuracy of each participant</h3>" in html


def test_evaluation_alone_can_be_reported(
    make_run: Callable[..., Path], pipeline: Any, tmp_path: Path
) -> None:
    run = make_run()
    shutil.copytree(run / "evaluation", tmp_path / "other" / "evaluation")
    _, reader = read(render(tmp_path / "other", pipeline))
    assert "Results" in reader.headings
    assert "Split" not in reader.headings


def test_a_run_without_evaluation_is_refused_and_nothing_is_written(
    tmp_path: Path, pipeline: Any
) -> None:
    with pytest.raises(DataError, match="evaluate"):
        render(tmp_path, pipeline)
    assert list(tmp_path.iterdir()) == []


def figure(*, image: bool) -> Any:
    drawn, axes = pyplot.subplots()
    axes.imshow([[0, 1]]) if image else axes.plot([0, 1])
    return drawn


def test_pictures_are_svg_for_lines_and_png_for_images_and_figures_are_closed(
    tmp_path: Path,
) -> None:
    given = [
        Picture("curve", "Curve", "A line.", figure(image=False)),
        Picture("map", "Map", "An image.", figure(image=True)),
    ]
    files = save_pictures(given, tmp_path / "pictures")
    assert [file.name for file in files] == ["curve.svg", "map.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert not any(pyplot.fignum_exists(picture.figure.number) for picture in given)
    before = [file.read_bytes() for file in files]
    save_pictures(
        [Picture("curve", "Curve", "A line.", figure(image=False))], tmp_path / "pictures"
    )
    assert files[0].read_bytes() == before[0]
    assert not files[1].exists()


@pytest.mark.parametrize("name", ["../up", "a b", ""])
def test_a_picture_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name of its own"):
        save_pictures([Picture(name, "", "", figure(image=False))], tmp_path / "pictures")
    pyplot.close("all")


def test_the_best_of_each_column_is_bold_in_its_direction(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    results = json.loads((make_run() / "evaluation" / "results.json").read_text())
    table = score_table(results, results, pipeline.metrics)
    for place, name in enumerate(results["methods"]["mvcnet"]):
        values = {
            method: scores[name]["value"]
            for method, scores in results["methods"].items()
            if scores[name]["value"] is not None
        }
        choose = min if name == "nll" else max
        best = [row["method"] for row in table["rows"] if row["cells"][place]["best"]]
        assert best == [choose(values, key=lambda method: values[method])]


def test_positions_of_the_forest_plot_keep_the_order_of_the_values(
    make_run: Callable[..., Path], pipeline: Any
) -> None:
    results = json.loads((make_run() / "evaluation" / "results.json").read_text())
    plot = forests(results, results, pipeline.metrics)[0]
    rows = {row["method"]: row["at"] for row in plot["rows"]}
    for difference in results["differences"]:
        if difference["metric"] != "accuracy":
            continue
        at = rows[difference["b"]]
        assert 0 <= at["low"] <= at["value"] <= at["high"] <= 100
        for key in ("low", "value", "high"):
            assert (difference[key] > 0) == (at[key] > plot["zero"])


def test_words_of_notes_verdict_and_paths() -> None:
    assert split_notes(["a=b", "x is y = z", "k="]) == (["x is y = z"], [("a", "b"), ("k", "")])
    assert said_apart("A: m 1; best baseline b 2; difference +1 [0, 2]: better") == (
        "A: m 1; best baseline b 2; difference +1 [0, 2]",
        "better",
    )
    assert said_apart("A: m 1; unanchored: none")[1] == "unanchored: none"
    assert said_apart("A: m has no value") == ("A: m has no value", "")
    assert without_paths("a: /home/jane/x.csv, b: 3/4") == "a: PATH, b: 3/4"
    assert without_paths(r"a: C:\Users\jane\x.csv") == "a: PATH"
    assert without_paths("f: ~/eeg/x.csv") == "f: PATH"
    assert without_paths("f: '/home/jane doe/x.csv', g: /data") == "f: 'PATH', g: PATH"
    assert without_paths("in bit/min, see https://a.org/b") == "in bit/min, see https://a.org/b"
