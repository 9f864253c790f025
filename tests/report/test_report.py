"""The report: its figures are those of the frames, its text is text, and no pile breaks it."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from proglayer.report import page as reporting
from proglayer.report import pictures, stats
from proglayer.report.__main__ import main
from proglayer.report.arms import DEEP, STANDARD
from proglayer.report.page import write_report
from proglayer.results import load

from .. import synthetic
from ..helpers import SHORT, Command
from .test_comparisons import known, wobble

# Text that would be an element, a formula, a cell, a heading or mathematics if it were let.
EVIL = '<script>alert("1")</script>'
FORMULA = "=1+1"
NASTY = f"{FORMULA} {EVIL} | `x` **b** $\\frac{{1}}$ [a](javascript:1)\n# head\x07 & é"


pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def report(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report."""
    out = tmp_path_factory.mktemp("report")
    return write_report([sweep], out).parent


class Page(HTMLParser):
    """What a browser would make of a page: its elements, tables and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in: list[str] = []
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._in:
            while self._in.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "script" in self._in:
            self.scripts.append(data)
        elif "style" not in self._in:
            self.text += data
            if "td" in self._in or "th" in self._in:
                self.tables[-1][-1][-1] += data

    def table(self, *heads: str) -> list[dict[str, str]]:
        """The rows of the first table whose heads begin with these."""
        for head, *rows in self.tables:
            if head[: len(heads)] == list(heads):
                return [dict(zip(head, row, strict=True)) for row in rows]
        raise AssertionError(f"no table {heads} among {[t[0] for t in self.tables]}")


def page_of(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def report_of(*folders: Path, out: Path, margin: float | None = None) -> Page:
    return page_of(write_report(folders, out, margin).parent)


# --- numbers --------------------------------------------------------------------------------------


def test_absolute_figures_stand_first_and_differences_are_what_the_statistics_say(
    sweep: Path, report: Path
) -> None:
    runs = load(sweep).runs
    original = runs[runs["experiment"] == "original"]
    by_model = {m: group.set_index("seed") for m, group in original.groupby("model")}
    first, *_ = page_of(report).tables
    assert first[0][:5] == [
        *("Variant", "Model", "Validation accuracy", "Validation loss, nats"),
        "Change in accuracy, points",
    ]
    arms = pd.read_csv(report / "tables" / "arms.csv").set_index(["variant", "model"])
    for place, (model, arm) in enumerate((m, by_model[m]) for m in (STANDARD, DEEP)):
        accuracy = arm["last_validation_accuracy_percent"].astype(float)
        change = arm["validation_accuracy_change_points"].astype(float)
        assert first[1 + place][2] == f"{accuracy.mean():.2f} ± {accuracy.std():.2f} %"
        row, expected = arms.loc[("original", model)], stats.summary(change)
        for part in ("mean", "low", "high"):
            found = row[f"validation_accuracy_change_points_{part}"]
            assert found == pytest.approx(getattr(expected, part))


# --- the first screen -----------------------------------------------------------------------------


def test_a_verdict_tells_which_seeds_it_lacks_and_why(tmp_path: Path) -> None:
    """Of deep supervision one seed was stopped, one is running, and one was not asked for."""
    synthetic.sweep(tmp_path / "s", ["original"], [STANDARD], range(1, 6))
    for seed in (3, 4):
        synthetic.run(tmp_path / f"deep{seed}", "original", DEEP, seed)
    for seed, status in ((1, "interrupted"), (2, "running")):
        synthetic.run(tmp_path / f"deep{seed}", "original", DEEP, seed, status=status)
    page = report_of(tmp_path, out=tmp_path / "out")
    why = "1 interrupted, 1 not in both arms, 1 running"
    assert f"2 of 5 seeds, left out: {why}" in page.text
    row = page.table("Comparison", "Model")[0]
    assert (row["Seeds"], row["Left out"]) == ("2", why)
    # the arm's own row says so, too; seed 5 is nobody's loss there
    rows = page.table("Variant", "Model", "Validation accuracy")
    shown = [(row["Seeds"], row["Left out"]) for row in rows]
    assert shown == [("5", ""), ("2", "1 interrupted, 1 running")]


@pytest.mark.parametrize("models", [[STANDARD], [STANDARD, DEEP]])
def test_a_study_of_one_s_own_has_its_own_comparisons_on_the_first_screen(
    tmp_path: Path, models: list[str]
) -> None:
    for init, loss in (("random", 5.6), ("stack", 5.5), ("zero", 5.6)):
        for model in models:
            for seed in range(4):
                given = ["experiment=more_layers", f"model={model}", f"seed={seed}"]
                given += [f"growth.init={init}"] if init != "random" else []
                by = wobble(seed) * {"random": 0.5, "stack": 1.0, "zero": 0.8}[init]
                synthetic.run(tmp_path / f"{init}-{model}-{seed}", "more_layers", model, seed,
                              f"growth.init={init}", overrides=given,
                              losses=[[6.0, 5.9, 6.0], [5.7, loss + by, 5.8]])  # fmt: skip
    text = report_of(tmp_path, out=tmp_path / "out").text
    first = text[text.index("What the data say") : text.index("The comparisons, in numbers")]
    measured = "− more layers validation accuracy of each at its own end"
    assert f"more layers growth.init=stack {measured} Better" in first
    assert "Better Standard: +0.50" in first
    assert f"growth.init=zero {measured} Equivalent" in first
    assert (tmp_path / "out" / "figures" / "others.svg").is_file()
    # with both models one of the claims is tested, too
    assert ("What it takes to test" in first) == (len(models) == 1)
    assert ("The study's own comparisons" in first) == (len(models) == 2)


def test_a_plan_has_a_range_and_warns_of_a_second_look(report: Path) -> None:
    text = page_of(report).text
    assert re.search(r"takes about [\d,]+ \([\d,]+ to [\d,]+\) seeds in all, with a power", text)
    assert "does not pay for a second look" in text
    assert "hydra/sweeper=settle hydra.sweeper.first_seed=4" in text
    range_of = r"difference of [\d.]+ points \([\d.]+ to [\d.]+, as the spread"
    assert re.search(f"With 3 seeds, a true {range_of}", text)


def test_a_seed_that_collapses_is_named_and_every_seed_is_drawn(tmp_path: Path) -> None:
    folder = known(tmp_path, {
        "original": lambda seed: [[6.0, 5.9, 6.0], [5.6, (7.0 if seed == 3 else 5.5), 7.1]],
        "control_from_scratch": lambda seed: [[6.0, 5.6 + wobble(seed), 5.9]],
    })  # fmt: skip
    text = report_of(folder, out=tmp_path / "out").text
    assert re.search("Outliers in original − from scratch, Standard, at equal .*: seed 3: ", text)
    drawn = ET.parse(tmp_path / "out" / "figures" / "claims.svg").getroot()
    dots = [e for e in drawn.iter() if e.tag.endswith("use")]
    assert len(dots) >= 8


def test_the_sampling_error_of_the_text_stands_beside_the_margin(
    sweep: Path, report: Path, tmp_path: Path
) -> None:
    found = load(sweep).runs.groupby("model")["last_validation_accuracy_percent"].mean()
    error = np.sqrt(2 * found.max() * (100 - found.max()) / 16_000)
    text = page_of(report).text
    assert f"gives a difference a standard error of about {error:.2g} points or less" in text
    assert "The margin of 0.1 points is below what this text can surely show" in text
    assert "which also chose the epochs of these runs" in text
    wide = report_of(sweep, out=tmp_path / "b", margin=2.0).text
    assert "below what this text" not in wide


def test_one_seed_concludes_nothing_and_tells_its_sampling_error(tmp_path: Path) -> None:
    synthetic.sweep(tmp_path / "s", ["original"], [STANDARD], (1, 2, 3))
    one = synthetic.run(tmp_path / "one", "split_lr", STANDARD, 1)
    accuracy = load(one).runs["last_validation_accuracy_percent"].iloc[0]
    error = stats.binomial_error(accuracy / 100, 16_000)
    said = f"of {error:.2g} points (Standard: {accuracy:.2f} % of 16,000 tokens)"
    alone = report_of(one, out=tmp_path / "a").text
    assert "One seed: nothing can be concluded." in alone
    assert said in alone
    text = report_of(tmp_path / "s", one, out=tmp_path / "b").text
    assert "One seed of split lr (Standard): nothing can be concluded." in text
    assert said in text


# --- piles of all sorts ---------------------------------------------------------------------------


def test_a_single_run_has_a_report(tmp_path: Path) -> None:
    run = synthetic.run(tmp_path / "run", "original", STANDARD, 42)
    page = report_of(run, out=run / "report")
    assert page.table("Variant", "Model", "Phase")[0]["Phase"] == "initial"
    assert "python train.py experiment=original model=standard seed=42" in page.text
    # and it is neither a run of its own nor something that could not be read
    again = load(run)
    assert len(again.runs) == 1
    assert again.left_out.empty


def test_folders_without_a_run_are_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sweep: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: there is no folder {tmp_path / 'none'}\n"
    assert main([str(sweep), "-o", str(tmp_path / "file")]) == 2
    assert "file (File exists)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as end:
        main([str(sweep), "--margin", "0"])
    assert end.value.code == 2


def test_a_mixed_pile_is_told_and_never_raises(tmp_path: Path) -> None:
    pile = tmp_path / "pile"
    sweep = synthetic.sweep(pile / "sweep", ["original", "control_unfrozen"], seeds=(1, 2))
    for number, status in ((0, "failed"), (3, "interrupted"), (5, "running")):
        shutil.rmtree(sweep / f"{number}_aaaaaa")
        synthetic.run(sweep / f"{number}_aaaaaa", "original", STANDARD, 9 + number, status=status)
    synthetic.run(pile / "other", "wider", DEEP, 3, "phase.batch_size=32")
    (pile / "photos").mkdir()
    synthetic.run(pile / "nothing", "original", STANDARD, 4, phases=[])
    page = report_of(pile, out=tmp_path / "out")
    status = {row["Run"]: row["Status"] for row in page.table("Run", "Status")}
    assert status["sweep/0_aaaaaa"] == "failed"
    reasons = {row["Run"]: row["Reason"] for row in page.table("Run", "Status", "Overrides")}
    assert reasons["sweep/0_aaaaaa"] == "the loss became NaN"


# --- text is text ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of runs whose names, settings and reasons mean harm."""
    pile = tmp_path_factory.mktemp("nasty")
    choices = {"model": f"m{EVIL}", "experiment": NASTY, "data": "pydocs"}
    for seed in (1, 2):
        synthetic.run(pile / f"{FORMULA}{seed}<b>", "original", STANDARD, seed, choices=choices,
                    overrides=[f"seed={seed}", f"data.files=[{NASTY}]"])  # fmt: skip
    synthetic.run(pile / "bad", "original", STANDARD, 3, status="failed", choices=choices,
                reason=NASTY, overrides=[FORMULA, EVIL])  # fmt: skip
    return write_report([pile], pile / "report").parent


def test_text_from_settings_and_logs_is_text_in_the_page(nasty: Path) -> None:
    text = (nasty / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("<script") == 1
    assert len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any("javascript" in (a.get("href") or "") for _, a in page.elements)
    # nothing was lost on the way either
    assert " ".join(NASTY.replace("\x07", " ").split()) in page.text
    assert "\x07" not in text


# --- pictures -------------------------------------------------------------------------------------


def test_a_mean_curve_ends_where_the_first_seed_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of one phase: one stops after two epochs, a worse one goes on for four."""
    uneven = pd.DataFrame(
        {
            "seed": [1, 1, 2, 2, 2, 2], "model": STANDARD, "phase": 1, "phase_name": "initial",
            "layers": 3, "epoch": [1, 2, 1, 2, 3, 4],
            "validation_loss": [7.0, 6.0, 9.0, 8.5, 8.0, 8.2],
        }
    )  # fmt: skip
    axes = Figure().add_subplot()
    monkeypatch.setattr(pictures, "draw", lambda *given: given[-1](axes))
    pictures.learning_curve("c", "original", uneven, (6.0, 9.0))
    [mean] = axes.lines
    assert mean.get_xydata().tolist() == [[1, 8.0], [2, 7.25]]
    [band] = axes.collections
    sd = np.std([7.0, 9.0], ddof=1)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(8.0 + sd)


# --- the page itself ------------------------------------------------------------------------------


def test_the_page_asks_for_nothing(report: Path) -> None:
    page = page_of(report)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    text = (report / "index.html").read_text()
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


# --- by itself ------------------------------------------------------------------------------------


def test_a_run_leaves_its_report_unless_told_not_to_and_never_fails_for_it(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = train(*SHORT, "report=true", "hydra.run.dir=a")
    assert (done.status, "a/report/index.html" in done.out) == (0, True)
    assert train(*SHORT, "report=false", "hydra.run.dir=b").status == 0
    assert not (tmp_path / "b" / "report").exists()

    def broken(*_: object, **__: object) -> Path:
        raise RuntimeError("no ink")

    monkeypatch.setattr(reporting, "report_of", broken)
    done = train(*SHORT, "report=true", "hydra.run.dir=c")
    assert (done.status, "report:" in done.out) == (0, False)
