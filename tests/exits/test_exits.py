"""What exits are worth: figures against the plain way to have them, files, pictures, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from proglayer.exits import measure
from proglayer.exits.__main__ import main
from proglayer.report import early_exit
from proglayer.report.page import write_report
from proglayer.run.run import run
from proglayer.training.build import build
from proglayer.training.model import Model
from proglayer.training.plan import plan
from proglayer.training.trainer import Windows, evaluate

from ..helpers import TINY, config, tiny_corpus

CPU = torch.device("cpu")
CORPUS = tiny_corpus()
SETTINGS = config(*TINY, "phase=from_scratch", "added_layers=1")
SPEC = plan(SETTINGS, CORPUS.vocab_size)[0].train
WORDS = " ".join(f"{a} {b} {(a + b) % 40}" for a in range(40) for b in range(17))
SMALL = (
    "data=text", "data.samples=40", "data.validation_samples=16", "data.seq_len=8",
    "data.held_out=0.3", "model.dim=16", "phase.max_epochs=2", "phase.batch_size=16",
    "threads=1", "report=false", "device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    """Four layers whose exits do not agree: random, with a head that tells words apart."""
    drawn = build(SPEC)
    with torch.no_grad():
        drawn.head_weight.mul_(4)
    return drawn.eval()


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows(CORPUS.validation, CPU)


@pytest.fixture(scope="module")
def logits(model: Model) -> torch.Tensor:
    """All logits at once: (exits, tokens, vocabulary)."""
    tokens = torch.from_numpy(CORPUS.validation[:, :-1]).long()
    with torch.no_grad():
        return torch.stack(
            [model.read(h).flatten(0, 1) @ model.head_weight.T for h in model(tokens)]
        )


# --- the figures ----------------------------------------------------------------------------------


def test_scores_are_those_of_all_logits_and_of_the_trainers_evaluation(
    model: Model, windows: Windows, logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CHUNK_BYTES", 4 * 30 * 7)  # chunks of seven tokens
    scores = measure.score(model, windows)
    probabilities = logits.softmax(dim=2)
    assert torch.equal(scores.guess_em, logits.argmax(dim=2))
    torch.testing.assert_close(scores.confidence_em.float(), probabilities.amax(dim=2))
    expected = evaluate(model, SPEC, CORPUS, CPU, range(4))
    assert scores.nll_em.mean(dim=1).tolist() == pytest.approx([e.loss for e in expected], rel=1e-5)
    right = (scores.guess_em == scores.target_m).double().mean(dim=1).tolist()
    assert right == pytest.approx([e.accuracy for e in expected])


def test_each_token_leaves_at_the_first_exit_that_is_sure(
    model: Model, windows: Windows, logits: torch.Tensor
) -> None:
    scores = measure.score(model, windows)
    depths = torch.arange(1, 5)
    probabilities = logits.softmax(dim=2)
    target = scores.target_m.tolist()
    used = []
    for threshold in (0.3, 0.5):
        layers, right, nll = [], [], []
        for token in range(len(target)):
            for exit in range(4):
                p = probabilities[exit, token]
                if exit == 3 or float(p.max()) >= threshold:
                    layers.append(exit + 1)
                    right.append(int(p.argmax()) == target[token])
                    nll.append(-float(p[target[token]].log()))
                    break
        found = measure.early_exit(scores, depths, threshold)
        assert found.layers == pytest.approx(sum(layers) / len(layers))
        assert found.accuracy_percent == pytest.approx(100 * sum(right) / len(right))
        assert found.loss == pytest.approx(sum(nll) / len(nll), rel=1e-4)
        used.append(found.layers)
    assert 1 < used[0] < used[1] < 4


def test_the_ends_of_the_thresholds_are_the_first_and_the_last_exit(
    model: Model, windows: Windows
) -> None:
    found = measure.measure(model, windows, [False, False, False, True])
    first, last = found.early_exit[0], found.early_exit[-1]
    assert (first.layers, last.layers) == (1, 4)
    assert first.loss == pytest.approx(found.exits[0].loss)
    assert last.loss == pytest.approx(found.exits[-1].loss)
    assert [each.trained for each in found.exits] == [False, False, False, True]
    assert found.exits[-1].accepted_percent == 100
    scores = measure.score(model, windows)
    same = (scores.guess_em[0] == scores.guess_em[-1]).double().mean()
    assert found.exits[0].accepted_percent == pytest.approx(100 * float(same))


def test_a_layer_left_out_and_neighbours_swapped_are_models_of_these_layers(
    model: Model, windows: Windows
) -> None:
    before = list(model.layers)
    found = measure.measure(model, windows, [True] * 4).changed_layers
    assert list(model.layers) == before, "the model is as it was"
    kinds = [(each.change, each.layer) for each in found]
    assert kinds == [
        *(("left out", layer) for layer in (1, 2, 3, 4)),
        *(("swapped with the next", layer) for layer in (1, 2, 3)),
    ]
    tokens = torch.from_numpy(CORPUS.validation).long()
    orders = ("123", "023", "013", "012", "1023", "0213", "0132")
    for each, order in zip(found, orders, strict=True):
        with torch.no_grad():
            hidden = model.embed(tokens[:, :-1])
            for number in map(int, order):
                (hidden,) = model.layers_from(number, hidden, number + 1)
            logits = model.read(hidden).flatten(0, 1) @ model.head_weight.T
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))
        assert each.loss == pytest.approx(float(loss), rel=1e-5)


def test_a_model_without_layers_has_one_exit_and_nothing_to_leave_out(windows: Windows) -> None:
    bigram = config(*TINY, "phase=from_scratch", "initial_layers=0", "added_layers=0")
    (phase,) = plan(bigram, CORPUS.vocab_size)
    found = measure.measure(build(phase.train), windows, [True])
    assert [each.layer for each in found.exits] == [0]
    assert found.changed_layers == []
    assert {each.layers for each in found.early_exit} == {0}


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Standard and deep supervision, two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(WORDS)
    for name in ("standard", "deep_supervision"):
        for seed in (1, 2):
            own = (f"model={name}", f"seed={seed}", f"data.files=[{folder / 'text.txt'}]")
            settings = config(*SMALL, *own, f"store.dir={folder / 'stages'}")
            path = folder / "pile" / f"{name}{seed}"
            path.mkdir(parents=True)
            run(settings, path, {"overrides": own[:2], "choices": {"model": name}})
    return folder / "pile"


@pytest.fixture(scope="module")
def done(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "exits"
    assert main([str(runs), "-o", str(out)]) == 0
    return out


def test_the_command_leaves_tables_and_pictures(runs: Path, done: Path) -> None:
    exits = pd.read_csv(done / "exits.csv")
    assert len(exits) == 4 * 4  # runs and exits: three layers and the grown one
    record = json.loads((runs / "standard1" / "run.json").read_text())
    own = exits[exits["run"] == "standard1"]
    recorded = [each["loss"] for each in record["phases"][-1]["exits"].values()]
    assert own["loss"].tolist() == pytest.approx(recorded, rel=1e-5)
    assert own["trained"].tolist() == [False, False, False, True]
    assert exits.loc[exits["run"] == "deep_supervision1", "trained"].all()
    early = pd.read_csv(done / "early_exit.csv")
    assert len(early) == 4 * len(measure.THRESHOLDS)
    changed = pd.read_csv(done / "changed_layers.csv")
    assert len(changed) == 4 * (4 + 3)
    assert (changed["loss_rise"] != 0).all()
    assert {path.name for path in done.glob("*.svg")} == {"early-exit.svg", "a-layer-left-out.svg"}


def test_what_was_measured_is_not_measured_again_and_a_report_shows_it(
    runs: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it was measured")

    before = {path.name: path.read_bytes() for path in done.iterdir()}
    monkeypatch.setattr(measure, "score", fail)
    assert main([str(runs), "-o", str(done)]) == 0
    assert {path.name: path.read_bytes() for path in done.iterdir()} == before
    page = write_report([runs], tmp_path / "report")
    first, _, _ = page.read_text().partition("The comparisons, in numbers")
    assert "that lose at most 0.1 points against all 4 are" in first
    rise = pd.read_csv(done / "changed_layers.csv").query("layer > 2 and change == 'left out'")
    mean = rise.groupby("model")["loss_rise"].mean()["standard"]
    assert f"upper half of its layers changes the validation loss by {mean:+.4f}" in first
    assert (page.parent / "figures" / "early-exit.svg").is_file()
    # Of other weights nothing was measured.
    assert early_exit.kept(runs / "standard1", None) is None


# --- bad input ------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_told(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out")]

    def refused(*folders: Path) -> str:
        assert main([*map(str, folders), *out]) == 1
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "no completed run" in refused(tmp_path / "empty")
    one = shutil.copytree(runs / "standard1", tmp_path / "one")
    (one / "exits.json").unlink(missing_ok=True)
    record = json.loads((one / "run.json").read_text())
    other = record | {"corpus": record["corpus"] | {"fingerprint": "0" * 64}}
    (one / "run.json").write_text(json.dumps(other))
    assert refused(one, runs / "standard2").startswith("error: these runs are of 2 texts")
    assert "is another here" in refused(one)
    (one / "run.json").write_text(json.dumps(record))
    (one / "weights.safetensors").unlink()
    assert "there is no" in refused(one)
