"""`python -m proglayer.exits RUN... -o exits/`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from proglayer import files
from proglayer.console import tell
from proglayer.data import Corpus, open_corpus
from proglayer.errors import ConfigError, run_command
from proglayer.report import early_exit, pictures, words
from proglayer.report.arms import Frame, arms
from proglayer.report.early_exit import Measured
from proglayer.results.read import load, write_csv
from proglayer.run.record import RunRecord, read_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. What was measured until an error is kept."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.exits",
        description="Measure what the exits of finished runs are worth, and train nothing. Writes "
        "tables and pictures; keeps what was measured in each run's folder, for its report.",
    )
    parser.add_argument("folders", nargs="+", metavar="RUN", help="a run, a sweep, or a pile")
    parser.add_argument(
        "-o", "--out", metavar="DIR", default="exits", help="where the results go (%(default)s)"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _measure_all(options.folders, Path(options.out)))


def _measure_all(folders: Sequence[str], out: Path) -> None:
    runs = arms(load(*folders)).runs
    if runs.empty:
        raise ConfigError(f"no completed run in {', '.join(folders)}")
    out.mkdir(parents=True, exist_ok=True)
    _check_texts(runs)
    corpus: Corpus | None = None
    measured: dict[str, Measured] = {}
    for row in runs[["run", "folder"]].itertuples():
        folder = Path(str(row.folder))
        record = read_record(folder)
        kept = early_exit.kept(folder, record.weights_sha256)
        if kept is None:
            corpus = corpus or _corpus(folder, record)
            kept = _measured(folder, record, corpus)
            tell(f"measured {row.run}")
        measured[str(row.run)] = kept
    worth = early_exit.worth(runs, measured)
    tables = {name: table for name, table in vars(worth).items() if len(table)}
    for name, table in tables.items():
        write_csv(table, out / f"{name}.csv")
    drawn = pictures.exits(worth)
    for picture in drawn:
        files.write_atomically(out / f"{picture.name}.svg", picture.svg.encode())
    print("\n".join([*words.needed_texts(worth), *words.left_out_texts(worth)]))
    print(f"{out}: {len(tables)} tables and {len(drawn)} pictures")


def _check_texts(runs: Frame) -> None:
    """Raise ConfigError where these runs are of several texts: their figures do not compare."""
    texts = runs.drop_duplicates("corpus_fingerprint")
    if len(texts) > 1:
        named = ", ".join(f"{row.corpus} ({row.run})" for row in texts.itertuples())
        raise ConfigError(f"these runs are of {len(texts)} texts ({named}): give runs of one text")


def _corpus(folder: Path, record: RunRecord) -> Corpus:
    """Return the text that a run trained on. Raises ConfigError where it is another one now."""
    corpus = open_corpus(record.settings.data, tell)
    if record.corpus is None or corpus.fingerprint != record.corpus.fingerprint:
        raise ConfigError(f"the text of {folder} is not to be had: {corpus.name} is another here")
    return corpus


def _measured(folder: Path, record: RunRecord, corpus: Corpus) -> Measured:
    """Measure a run's model, and keep that in its folder."""
    from proglayer.exits.measure import measure
    from proglayer.run.machine import pick_device
    from proglayer.run.run import load_run
    from proglayer.training.frozen import Windows

    device = pick_device("auto", "float32")
    model = load_run(folder).to(device)
    trained = [weight > 0 for weight in record.phases[-1].exit_weights]
    measured = measure(model, Windows(corpus.validation, device), trained)
    early_exit.keep(folder, record.weights_sha256, measured)
    return measured


if __name__ == "__main__":
    sys.exit(main())
