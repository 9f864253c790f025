"""The pictures of a report, drawn with matplotlib as SVG.

Each panel is a picture of its own, narrow enough to be read on a phone; a page sets as many beside
each other as fit. Colours are those of Okabe and Ito (2008), which colour-blind readers tell
apart, and everything that a colour says a marker or a dash says too. In a page the colours are its
style's variables, so that one picture serves light and dark; files have a white ground. Equal
input gives equal bytes. Matplotlib takes half a second to import and is, where something is drawn.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from proglayer.report import stats
from proglayer.report.arms import DEEP, STANDARD, Frame
from proglayer.report.early_exit import Worth
from proglayer.report.measures import Timing
from proglayer.report.words import model_name, variant_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

WIDTH_IN = 4.6
# Colours on white; in a page they are the variables of its style.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, FAINT, INK, MUTED = "#e69f00", "#56b4e9", "#d8dce2", "#1b1e23", "#5c636d"
NAMES = ("blue", "vermillion", "green", "purple", "orange", "sky", "faint")
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, FAINT)
VARIABLES = dict(zip(COLOURS, (f"--c-{name}" for name in NAMES), strict=True))
VARIABLES |= {INK: "--fg", MUTED: "--muted"}
RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "proglayer",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "grid.color": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    # A label from a configuration is text, whatever it holds.
    "text.parse_math": False,
    "text.usetex": False,
}


@dataclass(frozen=True)
class Style:
    """How a series is drawn."""

    colour: str
    marker: str
    dashes: str = "-"


# Seven colours, then again with dashes and other markers.
_SEVEN = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
STYLES = tuple(
    Style(colour, "oDs^vPX"[(number + 2 * again) % 7], dashes)
    for again, dashes in enumerate(("-", "--", ":"))
    for number, colour in enumerate(_SEVEN)
)


def _style_of(models: Sequence[str], model: str) -> Style:
    order = list(dict.fromkeys((STANDARD, DEEP, *models)))
    return STYLES[order.index(model) % len(STYLES)]


@dataclass(frozen=True)
class Picture:
    """A panel: its file's name, its title, what it shows in words, and the SVG for a file."""

    name: str
    title: str
    alt: str
    svg: str

    @property
    def in_page(self) -> str:
        """Return the `<svg>` alone, in the page's colours, font and its own space of names."""
        svg = self.svg[self.svg.index("<svg ") :].replace(GROUND, "").rstrip()
        svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
        svg = re.sub(r'\b(id="|href="#)', rf"\1{self.name}-", svg)
        svg = svg.replace("url(#", f"url(#{self.name}-")
        svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
        for colour, name in VARIABLES.items():
            svg = re.sub(rf"((?:fill|stroke): ?){colour}\b", rf"\1var({name})", svg)
        svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
        return svg.replace("'DejaVu Sans'", "system-ui, sans-serif")


GROUND = '<rect width="100%" height="100%" fill="white"/>'


def draw(
    name: str, title: str, alt: str, height_in: float, paint: Callable[[Axes], None]
) -> Picture:
    """Draw one panel with `paint`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    svg = io.StringIO()
    with mpl.rc_context(RC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is right in a browser
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        paint(figure.add_subplot())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
    whole = re.sub(r"(<svg [^>]*>)", rf"\1{GROUND}", svg.getvalue(), count=1)
    return Picture(name, title, alt, whole)


# --- changes and differences ----------------------------------------------------------------------


def forest(
    name: str, title: str, rows: Sequence[dict[str, Any]], margin: float, unit: str
) -> Picture:
    """Draw means with intervals and seeds: a line for each label, a mark for each model in it.

    An interval that reaches far beyond all seeds runs out of the panel, so that the others can be
    read beside it.

    Args:
        rows: `label`, `model`, `seeds` (a value for each), and where it is not their own mean and
            95 % interval that is drawn, `mean`, `low` and `high`. Those without a value are left
            out.
        margin: differences within it are shaded, for they count as none.
        unit: what a value is, with what it means to be on the right.
    """
    rows = [vars(stats.summary(row["seeds"])) | row for row in rows]
    rows = [row for row in rows if row["n"]]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows if row["model"]))
    spread = 0.0 if len(models) < 2 else 0.36
    values = [-margin, margin, *(value for row in rows for value in row["seeds"])]
    reach = 1.5 * (max(values) - min(values))

    def paint(axes: Axes) -> None:
        axes.axvspan(-margin, margin, color=FAINT, alpha=0.6, linewidth=0)
        for edge in (-margin, margin):  # a narrow span would not be seen
            axes.axvline(edge, color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
        axes.axvline(0, color=MUTED, linewidth=1)
        named: set[str] = set()
        for row in rows:
            model = row["model"]
            style = _style_of(models, model) if model else Style(INK, "s")
            place = models.index(model) / max(1, len(models) - 1) - 0.5 if model else 0
            at = labels.index(row["label"]) + spread * place
            seen = {"color": style.colour, "alpha": 0.55, "markersize": 3, "markeredgewidth": 0}
            axes.plot(row["seeds"], [at + 0.13] * len(row["seeds"]), "o", **seen)
            if np.isfinite(row["low"]):
                axes.hlines(at, row["low"], row["high"], color=style.colour, linewidth=2)
            label = model_name(model) if model and model not in named else None
            named.add(model)
            _plot(axes, [row["mean"]], [at], style, label, linestyle="none", markersize=5.5)
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, min(values) - reach), min(right, max(values) + reach))
        axes.set_yticks(range(len(labels)), [_wrapped(label) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        _axis(axes.xaxis, unit, 5)
        if models:
            _legend(axes, len(models))

    alt = f"{title} in {unit}, with intervals and a dot for each seed: {', '.join(labels)}"
    lines = sum(_wrapped(label).count("\n") for label in labels)
    height = 0.75 + len(labels) * (0.32 + 0.1 * max(1, len(models))) + 0.1 * lines
    return draw(name, title, alt, height + 0.25 * bool(models), paint)


def _wrapped(label: str, width: int = 22) -> str:
    """Break a label into lines that leave the figures their room."""
    return textwrap.fill(label, width)


def _plot(axes: Axes, x: Any, y: Any, style: Style, label: str | None, **how: Any) -> None:
    """Draw a line through the points of a series, in its style but for `how`."""
    how = {"linestyle": style.dashes, "marker": style.marker, "color": style.colour} | how
    axes.plot(np.asarray(x, float), np.asarray(y, float), label=label, **how)


def _legend(axes: Axes, columns: int) -> None:
    """Set the legend below the panel, where it covers nothing."""
    figure: Any = axes.get_figure()
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, columns))


def _axis(axis: Axis, label: str, most: int, whole: bool = False) -> None:
    """Label an axis and tick it in at most so many steps of round numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_label_text(label)
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole))


# --- curves ---------------------------------------------------------------------------------------


def learning_curve(name: str, title: str, curves: Frame, limits: tuple[float, float]) -> Picture:
    """Draw the validation loss through the phases of one variant, with growth and unfreezing.

    A phase begins, for every seed, where the longest of the phase before ended, so that growth
    stands at one place. A line is the mean of the seeds, and its band a standard deviation to each
    side, as far as all of them train: those that go on are not those that stopped, and a mean over
    fewer would jump to them.

    Args:
        curves: of `ledger.curves`, with `model`, `seed` and `phase_name` (as recorded).
        limits: of the loss, the same for all pictures that are compared.
    """
    models = list(dict.fromkeys(curves["model"]))
    lengths = curves.groupby("phase")["epoch"].max()
    starts = lengths.cumsum().shift(fill_value=0)
    # Epoch 0 is the model right after the growth, which stands where the phase before ends.
    jumps = set(curves.loc[curves["epoch"] == 0, "phase"])
    curves = curves.assign(at=curves["epoch"] + curves["phase"].map(starts))
    marks = curves.sort_values("phase").drop_duplicates("phase")

    def paint(axes: Axes) -> None:
        for model in models:
            style = _style_of(models, model)
            of_model = curves[curves["model"] == model]
            for phase, part in of_model.groupby("phase"):
                at = part.groupby("at")["validation_loss"].agg(["mean", "std", "size"])
                whole = at[at["size"] == part["seed"].nunique()]
                x, mean = whole.index.to_numpy(float), whole["mean"].to_numpy(float)
                sd = whole["std"].fillna(0).to_numpy(float)
                axes.fill_between(x, mean - sd, mean + sd, color=style.colour, alpha=0.2, lw=0)
                label = model_name(model) if phase == of_model["phase"].min() else None
                _plot(axes, x, mean, style, label, markersize=3.2 if len(whole) < 30 else 0)
        low, high = limits
        axes.set_ylim(low - 0.04 * (high - low), high + 0.2 * (high - low))
        for row in marks.itertuples():
            at = float(starts[row.phase]) + (0 if row.phase in jumps else 0.5)
            if row.phase > 1:
                axes.axvline(at, color=INK, linewidth=1, linestyle=(0, (3, 2)))
            text = MARKS.get(str(row.phase_name), str(row.phase_name)).format(int(row.layers))
            place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            place |= {"xytext": (2, -1), "va": "top", "rotation": 90 if len(marks) > 3 else 0}
            axes.annotate(text, (at, 1), fontsize=8, **place)
        axes.set_xlim(0.5, float(lengths.sum()) + 0.5)
        _axis(axes.xaxis, "epochs, phase after phase", 6, whole=True)
        _axis(axes.yaxis, "validation loss (nats)", 5)
        _legend(axes, len(models))

    alt = f"Validation loss of {title} through its phases: {', '.join(map(model_name, models))}"
    return draw(name, title, alt, 3.1, paint)


# What happened at the start of a phase, by its name.
MARKS = {"initial": "{} layers", "grown": "grown: {} layers", "unfreezing": "unfrozen"}


def lines(name: str, title: str, values: Frame, x_label: str, y_label: str) -> Picture:
    """Draw lines of means over seeds; with one line a dot for each seed, and 95 % intervals.

    A point is drawn as far as every seed of its line has it.

    Args:
        values: `x`, `y`, a row a seed; with `arm`, a line each; with `at`, what a point of a line
            stands for where seeds differ in `x`, too.
    """
    values = values.assign(arm=values.get("arm", "mean, 95 % interval, seeds"))
    at = "at" if "at" in values else "x"
    means: dict[str, Frame] = {}
    for arm, rows in values.groupby("arm", sort=False):
        sizes = rows.groupby(at)["y"].transform("size")
        points = rows[sizes == sizes.max()].groupby(at)
        summaries = points["y"].apply(lambda y: pd.Series(vars(stats.summary(y)))).unstack()
        means[str(arm)] = summaries.assign(x=points["x"].mean())
    step = 0.015 * (values["x"].max() - values["x"].min())
    # Points of several lines at one place stand beside each other.
    apart = 0.0 if values.groupby(at)["x"].nunique().max() > 1 else step

    def paint(axes: Axes) -> None:
        for number, (arm, mean) in enumerate(means.items()):
            style = STYLES[number % len(STYLES)]
            x = mean["x"].to_numpy(float) + apart * (number - (len(means) - 1) / 2)
            if len(means) == 1:
                seen = {"color": style.colour, "alpha": 0.55, "markersize": 3}
                axes.plot(values["x"] + step, values["y"], "o", markeredgewidth=0, **seen)
            axes.vlines(x, mean["low"], mean["high"], color=style.colour, alpha=0.7, lw=2)
            _plot(axes, x, mean["mean"], style, _wrapped(arm, 30), markersize=4.5, linewidth=1.2)
        _axis(axes.xaxis, x_label, 8, whole=True)
        _axis(axes.yaxis, y_label, 5)
        _legend(axes, 2 if len(means) > 1 else 1)

    rows = sum(1 + _wrapped(arm, 30).count("\n") for arm in means) / 2
    alt = f"{title}: {y_label} against {x_label}, of {', '.join(means)}"
    return draw(name, title, alt, 2.9 + 0.17 * rows, paint)


def timing(name: str, of: Timing) -> Picture:
    """Draw the loss at an equal budget against the moment of growth."""
    title = f"{model_name(of.model)}: the loss against the moment of growth"
    values = of.losses.melt(var_name="x", value_name="y")
    return lines(name, title, values, "epochs before the growth", "validation loss (nats)")


def exits(worth: Worth, slug: str = "") -> list[Picture]:
    """Draw what exits are worth: early exit, and the loss without each layer; an arm a line."""
    changed = worth.changed_layers
    left_out = changed[changed["change"] == "left out"] if len(changed) else changed
    percent, rise = "validation accuracy (%)", "rise of the validation loss (nats)"
    used = "layers used, mean over tokens"
    shown = (
        (worth.early_exit, "layers", "accuracy_percent", "Early exit", used, percent),
        (left_out, "layer", "loss_rise", "A layer left out", "layer", rise),
    )
    drawn = []
    for frame, x, y, title, *labels in shown:
        if len(frame):
            values = frame.rename(columns={x: "x", y: "y", "threshold": "at"})
            names = zip(values["variant"], values["model"], strict=True)
            values["arm"] = [f"{variant_name(v)}, {model_name(m)}" for v, m in names]
            name = title.lower().replace(" ", "-") + slug
            drawn.append(lines(name, title, values, *labels))
    return drawn
