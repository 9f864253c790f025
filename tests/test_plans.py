"""Every file of conf/experiment gives the phases that it gave: `golden/plans.json` has them.

Made again by `python -m tests.test_plans`, which is right only where a recipe is meant to change.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from proglayer.training.plan import Phase, plan

from .helpers import ROOT, config

GOLDEN = ROOT / "tests" / "golden" / "plans.json"
EXPERIMENTS = ROOT / "conf" / "experiment"
VOCABULARY = 5_000
RATES = ("new", "existing", "embedding", "head")
TRAIN = (
    "layers", "new_layers", "trained_layers", "exit_weights", "batch_size", "samples", "detached",
    "accumulate", "cache_frozen",
)  # fmt: skip
PARTS = {
    "schedule": ("shape", "warmup_steps", "final_factor", "total_epochs", "decay_share"),
    "curriculum": ("kind", "every", "steps"),
    "optimizer": ("weight_decay", "clip_norm", "carry", "decay_norms", "decay_embedding"),
    "rates": RATES,
    "growth": ("layers", "init", "position", "noise", "block", "gate_steps"),
}
STOP = ("max_epochs", "patience", "min_delta")


def plain(value: Any) -> Any:
    """Return a value as JSON holds it."""
    return list(value) if isinstance(value, tuple) else value


def facts(phase: Phase) -> dict[str, Any]:
    """Return what a phase trains and when it stops."""
    train = getattr(phase, "train", phase)
    found = {name: plain(getattr(train, name)) for name in TRAIN}
    for part, names in PARTS.items():
        value = getattr(train, part)
        found[part] = value and {name: plain(getattr(value, name)) for name in names}
    return found | {name: getattr(phase.stop, name) for name in STOP}


def names() -> list[str]:
    """Return every experiment as it is chosen on the command line."""
    files = (path for path in EXPERIMENTS.rglob("*.yaml") if path.stem != "llama_pro_checkpoint")
    return sorted(path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in files)


def planned(name: str) -> list[dict[str, Any]]:
    """Return the phases of an experiment, for both losses."""
    found = []
    for model in ("standard", "deep_supervision"):
        phases = plan(config(f"experiment={name}", f"model={model}"), VOCABULARY)
        found += [facts(phase) for phase in phases]
    return found


@pytest.mark.parametrize("name", names())
def test_an_experiment_gives_the_phases_that_it_gave(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert json.loads(json.dumps(planned(name))) == golden[name]


if __name__ == "__main__":
    rows = {name: ",\n".join(map(json.dumps, planned(name))) for name in names()}
    text = ",\n".join(f"{json.dumps(name)}: [\n{phases}\n]" for name, phases in rows.items())
    GOLDEN.write_text(f"{{\n{text}\n}}\n")
