"""The report's pictures, drawn with matplotlib: SVG for a page, and SVG and PNG files.

Each panel is a picture of its own, narrow enough to be read on a phone; a page sets as many beside
each other as fit. Colours are those of Okabe and Ito (2008), which colour-blind readers tell
apart, and everything that a colour says a marker or a dash says too. In a page the colours are its
style's variables, so that one picture serves light and dark; files have a white ground. Equal
input gives equal bytes. Matplotlib takes half a second to import and is, where something is drawn.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from proglayer import files
from proglayer.report import stats
from proglayer.report.page import Picture
from proglayer.report.study import DEEP, STANDARD, Frame, model_name, variant_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

WIDTH_IN = 4.6
PNG_DPI = 144

# Name in the page's style -> colour on white.
COLOURS = {
    "--c-blue": "#0072b2",
    "--c-vermillion": "#d55e00",
    "--c-green": "#009e73",
    "--c-purple": "#cc79a7",
    "--c-orange": "#e69f00",
    "--c-sky": "#56b4e9",
    "--c-faint": "#d8dce2",
    "--fg": "#1b1e23",
    "--muted": "#5c636d",
    "--bg": "#fefefe",
}
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, FAINT, INK, MUTED, GROUND = COLOURS.values()
VARIABLES = {colour: f"var({name})" for name, colour in COLOURS.items()}

RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "proglayer",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    # A label from a configuration is text, whatever it holds.
    "text.parse_math": False,
    "text.usetex": False,
}


@dataclass(frozen=True)
class Style:
    """How a series is drawn."""

    colour: str
    marker: str
    dashes: str


MODEL_STYLES = {STANDARD: Style(BLUE, "o", "-"), DEEP: Style(VERMILLION, "D", "-")}
# Seven colours, then again with dashes and other markers.
STYLES = tuple(
    Style(colour, marker, dashes)
    for markers, dashes in (("oDs^vPX", "-"), ("s^vPXoD", "--"), ("vPXoDs^", ":"))
    for colour, marker in zip(
        (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK), markers, strict=True
    )
)


def _style_of_model(models: Sequence[str], model: str) -> Style:
    others = [name for name in models if name not in MODEL_STYLES]
    return MODEL_STYLES.get(model) or STYLES[2 + others.index(model) % (len(STYLES) - 2)]


class Gallery:
    """Draws pictures and keeps their files in `folder`, made when the first is drawn.

    Those that lie there are written over if `ours` knows them. With `png` each is drawn a second
    time.
    """

    def __init__(self, folder: Path, ours: files.Ours, png: bool = True) -> None:
        self.folder = folder
        self.ours = ours
        self.png = png
        self.names: list[str] = []

    def draw(
        self, name: str, title: str, alt: str, height_in: float, paint: Callable[[Axes], None]
    ) -> Picture:
        """Draw one panel with `paint`, write `<name>.svg` and `<name>.png`, give it for a page.

        A name that another picture has gets a number.
        """
        import matplotlib as mpl
        from matplotlib.figure import Figure

        numbered = (f"{name}-{number}" for number in itertools.count(2))
        name = next(n for n in itertools.chain([name], numbered) if n not in self.names)
        self.names.append(name)
        svg, png = io.StringIO(), io.BytesIO()
        with mpl.rc_context(RC), warnings.catch_warnings():
            # A glyph that the font lacks is a box in the PNG, and right in a browser.
            warnings.simplefilter("ignore")
            figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
            paint(figure.add_subplot())
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(svg, format="svg", metadata=nothing)
            if self.png:
                how = {"dpi": PNG_DPI, "facecolor": "white", "metadata": {"Software": None}}
                figure.savefig(png, format="png", **how)
        whole = svg.getvalue()
        self.folder.mkdir(parents=True, exist_ok=True)
        drawn = self.folder / f"{name}.png"
        files.write_over(drawn.with_suffix(".svg"), _on_white(whole).encode(), self.ours, "-o")
        if self.png:
            files.write_over(drawn, png.getvalue(), self.ours, "-o")
        else:
            # That of an earlier report would show something else.
            files.delete(drawn, self.ours)
        return Picture(name, title, alt, _for_page(whole, name))


def _on_white(svg: str) -> str:
    """An SVG file with a ground of its own, right on any."""
    ground = r'\1<rect width="100%" height="100%" fill="white"/>'
    return re.sub(r"(<svg [^>]*>)", ground, svg, count=1)


def _for_page(svg: str, name: str) -> str:
    """The `<svg>` alone, in the page's colours, font and its own space of names."""
    svg = svg[svg.index("<svg ") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#)', rf"\1{name}-", svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"((?:fill|stroke): ?)(#[0-9a-f]{6})\b", _in_variables, svg)
    svg = svg.replace("'DejaVu Sans'", "inherit").replace("<svg ", '<svg aria-hidden="true" ', 1)
    return re.sub(r"(font: [^;\"]*?) inherit\b", r"\1 system-ui, sans-serif", svg)


def _in_variables(found: re.Match[str]) -> str:
    return found[1] + VARIABLES.get(found[2], found[2])


# --- changes and differences ----------------------------------------------------------------------


def forest(
    gallery: Gallery,
    name: str,
    title: str,
    rows: Sequence[dict[str, Any]],
    margin: float,
    unit: str,
    better: str = "right",
) -> Picture:
    """Means with their intervals and seeds: a line for each label, a mark for each model in it.

    Args:
        rows: `label`, `model`, `seeds` (a value for each), and where it is not their own mean and
            95 % interval that is drawn, `mean`, `low` and `high`. Those without a value are left
            out.
        margin: differences within it are shaded, for they count as none.
    """
    rows = [vars(stats.summary(row["seeds"])) | row for row in rows]
    rows = [row for row in rows if row["n"]]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows if row["model"]))
    spread = 0.0 if len(models) < 2 else 0.36

    def paint(axes: Axes) -> None:
        axes.axvspan(-margin, margin, color=FAINT, alpha=0.6, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        named: set[str] = set()
        for row in rows:
            model = row["model"]
            style = _style_of_model(models, model) if model else Style(INK, "s", "-")
            place = models.index(model) / max(1, len(models) - 1) - 0.5 if model else 0
            height = labels.index(row["label"]) + spread * place
            dots = {"color": style.colour, "alpha": 0.55, "markersize": 3, "markeredgewidth": 0}
            axes.plot(row["seeds"], [height + 0.13] * len(row["seeds"]), "o", **dots)
            if np.isfinite(row["low"]):
                axes.hlines(height, row["low"], row["high"], color=style.colour, linewidth=2)
            label = model_name(model) if model and model not in named else None
            _plot(axes, [row["mean"]], [height], style, label, linestyle="none", markersize=5.5)
            named.add(model)
        axes.set_yticks(range(len(labels)), [_wrapped(label) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        _axis(axes.xaxis, f"{unit} ({better}: better)", 5)
        if models:
            _legend(axes, len(models))

    alt = "; ".join(
        f"{row['label']}{', ' + model_name(row['model']) if row['model'] else ''}: "
        f"{row['mean']:+.3g}"
        + (f" ({row['low']:+.3g} to {row['high']:+.3g})" if np.isfinite(row["low"]) else "")
        for row in rows
    )
    height = (
        0.75
        + len(labels) * (0.32 + 0.1 * max(1, len(models)))
        + 0.1 * sum(_wrapped(label).count("\n") for label in labels)
        + (0.25 if models else 0)
    )
    return gallery.draw(name, title, f"{title}, in {unit}: {alt}", height, paint)


def _wrapped(label: str, width: int = 22) -> str:
    """A label in lines that leave the figures their room."""
    lines = [""]
    for word in re.split(r"(?<=[_ ,=])", label):
        while len(word) > width:
            lines.append(word[:width])
            word = word[width:]
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _plot(axes: Axes, x: Any, y: Any, style: Style, label: str | None, **how: Any) -> None:
    """A line through the points of a series, in its style but for `how`."""
    how = {"linestyle": style.dashes, "marker": style.marker, "color": style.colour} | how
    axes.plot(np.asarray(x, float), np.asarray(y, float), label=label, **how)


def _legend(axes: Axes, columns: int) -> None:
    """Below the panel, where it covers nothing."""
    figure: Any = axes.get_figure()
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, columns))


# --- learning curves ------------------------------------------------------------------------------


def learning_curve(
    gallery: Gallery, name: str, title: str, curves: Frame, limits: tuple[float, float]
) -> Picture:
    """Validation loss through the phases of one variant, growth and unfreezing marked.

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
    ends = curves.sort_values("phase").drop_duplicates("phase")
    marks = {row.phase: (row.phase_name, row.layers) for row in ends.itertuples()}

    def paint(axes: Axes) -> None:
        for model in models:
            style = _style_of_model(models, model)
            own = curves[curves["model"] == model]
            for phase, part in own.groupby("phase"):
                at = part.groupby("at")["loss"].agg(["mean", "std", "size"])
                whole = at[at["size"] == part["seed"].nunique()]
                x, mean = whole.index.to_numpy(float), whole["mean"].to_numpy(float)
                sd = whole["std"].fillna(0).to_numpy(float)
                axes.fill_between(x, mean - sd, mean + sd, color=style.colour, alpha=0.2, lw=0)
                label = model_name(model) if phase == own["phase"].min() else None
                _plot(axes, x, mean, style, label, markersize=3.2 if len(whole) < 30 else 0)
        low, high = limits
        axes.set_ylim(low - 0.04 * (high - low), high + 0.2 * (high - low))
        for phase, (what, layers) in marks.items():
            at = float(starts[phase]) + (0 if phase in jumps else 0.5)
            if phase > 1:
                axes.axvline(at, color=INK, linewidth=1, linestyle=(0, (3, 2)))
            axes.annotate(
                _mark(str(what), int(layers)),
                (at, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -1),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=INK,
                rotation=90 if len(marks) > 3 else 0,
            )
        axes.set_xlim(0.5, float(lengths.sum()) + 0.5)
        _axis(axes.xaxis, "epochs, phase after phase", 6, whole=True)
        _axis(axes.yaxis, "validation loss (nats)", 5)
        _legend(axes, len(models))

    last = curves.sort_values(["phase", "epoch"]).groupby(["model", "phase"])["loss"].min()
    shown_in_words = "; ".join(
        f"{model_name(str(model))}, phase {phase}: lowest {value:.3f}"
        for (model, phase), value in last.items()  # type: ignore[misc]
    )
    return gallery.draw(name, title, f"Validation loss of {title}: {shown_in_words}", 3.1, paint)


def _mark(phase_name: str, layers: int) -> str:
    """What happened at the start of a phase."""
    return {
        "initial": f"{layers} layers",
        "grown": f"grown: {layers} layers",
        "unfreezing": "unfrozen",
        "continued": "continued",
    }.get(phase_name, phase_name)


def by_exit(gallery: Gallery, name: str, title: str, exits: Frame) -> Picture:
    """Accuracy at every exit, after the first phase (hollow, dashed) and after the last (filled).

    Args:
        exits: `model`, `seed`, `layer`, `accuracy_percent`, `when` (first or last).
    """
    models = list(dict.fromkeys(exits["model"]))
    several = exits["when"].nunique() > 1
    lines = {
        (model, when): own.groupby("layer")["accuracy_percent"].agg(["mean", "min", "max"])
        for model in models
        for when, own in exits[exits["model"] == model].groupby("when", sort=False)
    }

    def label(model: str, when: Any) -> str:
        return f"{model_name(model)}, {when} phase" if several else model_name(model)

    def paint(axes: Axes) -> None:
        for (model, when), at in lines.items():
            style = _style_of_model(models, model)
            x = at.index.to_numpy(float)
            axes.vlines(x, at["min"], at["max"], color=style.colour, linewidth=1, alpha=0.6)
            hollow = {"linestyle": "--", "markerfacecolor": "none"}
            how = hollow if several and when == "first" else {}
            _plot(axes, x, at["mean"], style, label(model, when), markersize=5, **how)
        _axis(axes.xaxis, "exit after layer", 10, whole=True)
        _axis(axes.yaxis, "validation accuracy (%)", 5)
        _legend(axes, min(2, len(lines)))

    shown_in_words = "; ".join(
        f"{label(*arm)}: {', '.join(f'{value:.2f}' for value in at['mean'])} %"
        for arm, at in lines.items()
    )
    alt = f"Accuracy by exit of {title}, bottom layer first: {shown_in_words}"
    return gallery.draw(name, title, alt, 3.1, paint)


def against_compute(
    gallery: Gallery,
    name: str,
    title: str,
    curves: Frame,
    column: str,
    unit: str,
    order: Sequence[str],
) -> Picture:
    """The validation loss of the model in hand against compute, a line for each variant.

    Lines are means over all seeds, epoch by epoch. A seed whose phase has ended counts with what it
    spent and with its selected epoch, from which the next phase starts; a large mark is where all
    have ended a phase. After it the line shows what growing did.

    Args:
        curves: of one model, with `variant`.
        column: of `ledger.MEASURES`.
        order: variants in the order that gives them their styles.
    """
    steps = _in_hand(curves.dropna(subset=[column]), column)
    shown = [variant for variant in order if variant in set(steps["variant"])]

    def paint(axes: Axes) -> None:
        for variant in shown:
            style = STYLES[list(order).index(variant) % len(STYLES)]
            own = steps[steps["variant"] == variant]
            ends = np.flatnonzero(own["ended"]).tolist()
            how = {"markersize": 7, "markevery": ends, "linewidth": 1.3}
            label = _wrapped(variant_name(variant), 26)
            _plot(axes, own["compute"], own["loss"], style, label, **how)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: engineering(value))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        _tick_few(axes)
        # Where the variants part matters, not where they all come from.
        ends = steps[steps["ended"]]["loss"]
        low, high = float(ends.min()), float(steps["loss"].max())
        after_growth = float(steps.loc[steps["phase"] > 1, "loss"].max())
        top = low + max(2 * float(ends.max() - low), 0.25 * (high - low))
        top = top if np.isnan(after_growth) else max(top, after_growth)
        if high > low:
            axes.set_ylim(low - 0.06 * (top - low), min(high, top) + 0.03 * (top - low))
        axes.set_xlabel(f"{unit}, all phases so far")
        _axis(axes.yaxis, "validation loss (nats)", 5)
        _legend(axes, 2)

    shown_in_words = "; ".join(
        f"{variant_name(variant)}: {own['loss'].iloc[-1]:.3f} after "
        f"{engineering(own['compute'].iloc[-1])}{' s' if column == 'seconds' else ''}"
        for variant, own in ((v, steps[steps["variant"] == v]) for v in shown)
    )
    height = 3.0 + 0.17 * (sum(1 + _wrapped(v, 26).count("\n") for v in shown) / 2)
    return gallery.draw(name, title, f"{title}: {shown_in_words}", height, paint)


def _in_hand(curves: Frame, column: str) -> Frame:
    """Mean compute and loss of each variant, epoch by epoch, and where a phase `ended`."""
    parts = []
    for (variant, phase), own in curves.groupby(["variant", "phase"], sort=False):
        wide = own.pivot(index="run", columns="epoch", values=[column, "loss"])
        lowest = own.groupby("run")["loss"].min()
        selected = own[own["best"]].set_index("run")["loss"].reindex(lowest.index).fillna(lowest)
        compute = wide[column].ffill(axis="columns")
        loss = wide["loss"].apply(lambda column: column.fillna(selected))  # noqa: B023
        end = len(compute.columns)
        part = pd.DataFrame({"compute": compute.mean(), "loss": loss.mean(), "ended": False})
        part.loc[end + 1] = [compute.iloc[:, -1].mean(), selected.mean(), True]
        parts.append(part.assign(variant=variant, phase=phase))
    columns = ["compute", "loss", "ended", "variant", "phase"]
    if not parts:
        return pd.DataFrame(columns=columns)
    steps = pd.concat(parts, ignore_index=True).sort_values("phase", kind="stable")
    return steps.astype({"ended": bool, "compute": float, "loss": float})


def _axis(axis: Axis, label: str, most: int, whole: bool = False) -> None:
    """What an axis shows, in at most so many steps of round numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_label_text(label)
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole))


def _tick_few(axes: Axes) -> None:
    """Round ticks on a logarithmic axis that may span less than a decade."""
    low, high = axes.get_xlim()
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    axes.set_xticks(ticks[:: -(-len(ticks) // 6)])
    axes.set_xticks([], minor=True)


def engineering(value: float) -> str:
    """A large number for people: 1.5 T, 320 M."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g}"


# --- growth ---------------------------------------------------------------------------------------


def over_seeds(
    gallery: Gallery, name: str, title: str, values: Frame, x_label: str, y_label: str
) -> Picture:
    """Lines of means with their 95 % intervals; a dot for each seed where there is one line.

    Args:
        values: `x`, `y`, a row a seed; with `arm`, a line each; with `at`, what a point of a line
            stands for where seeds differ in `x`, too.
    """
    named, at = "arm" in values, "at" if "at" in values else "x"
    arms = values.groupby(
        values["arm"] if named else lambda _: "mean, 95 % interval, and seeds", sort=False
    )
    means = {
        str(arm): pd.DataFrame(
            {
                k: {"x": own["x"].mean()} | vars(stats.summary(own["y"]))
                for k, own in of_arm.groupby(at)
            }
        ).T
        for arm, of_arm in arms
    }
    step = 0.015 * (values["x"].max() - values["x"].min())
    # Points of several lines at one place stand beside each other.
    apart = step if values.groupby(at)["x"].nunique().max() == 1 else 0.0

    def paint(axes: Axes) -> None:
        for number, (arm, mean) in enumerate(means.items()):
            style = STYLES[number % len(STYLES)]
            x = mean["x"].to_numpy(float) + apart * (number - (len(means) - 1) / 2)
            if not named:
                beside = values["x"] + step
                axes.plot(beside, values["y"], "o", color=style.colour, alpha=0.55, ms=3, mew=0)
            axes.vlines(x, mean["low"], mean["high"], color=style.colour, linewidth=2, alpha=0.7)
            label = _wrapped(arm, 30)
            _plot(axes, x, mean["mean"], style, label, markersize=4.5, linewidth=1)
        _axis(axes.xaxis, x_label, 8, whole=True)
        _axis(axes.yaxis, y_label, 5)
        _legend(axes, 2 if len(means) > 1 else 1)

    shown_in_words = "; ".join(
        (f"{arm}: " if named else "")
        + ", ".join(f"{x:.3g}: {y:.4g}" for x, y in zip(mean["x"], mean["mean"], strict=True))
        for arm, mean in means.items()
    )
    lines = sum(1 + _wrapped(arm, 30).count("\n") for arm in means) / 2
    alt = f"{title}; {y_label} by {x_label}: {shown_in_words}"
    return gallery.draw(name, title, alt, 2.9 + 0.17 * lines, paint)
