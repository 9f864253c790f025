"""What a run says of settings that nothing in it reads."""

import re

import pytest

from proglayer.training.plan import plan
from proglayer.training.unused import unused_settings

from ..helpers import config, experiments

UNTRAINED = "(no phase after the first trains it)"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ((), None),
        (("lr.factor.new=0.5",), None),
        (("lr.factor.existing=0.5",), f"lr.factor.existing=0.5 {UNTRAINED}"),
        (("lr.factor.existing=0.5", "freeze=none"), None),
        (("growth.block=2",), "growth.block=2"),
        (("growth=last", "growth.block=2"), None),
        (("growth=stack", "phase=keep_training"), "growth.init=stack"),
        (("growth=gate", "growth.gate_steps=5", "phase=from_scratch"),
         "growth.init=gate, growth.gate_steps=5"),
        (("data=pybytes",), None),
        (("data.tokenizer=bytes",), "data.max_vocab=8192"),
        (("loss.rotate_every=2",), "loss.rotate_every=2"),
        (("loss.curriculum=rotate",), "loss.curriculum=rotate"),
        (("loss.curriculum=rotate", "loss.rotate_every=2", "model=deep_supervision"), None),
        (("freeze=none", "phase=from_scratch"), "freeze.steps="),
        (("added_layers=3", "phase=keep_training"), "added_layers=3"),
        (("added_layers=3", "growth.layers=[0,1,2,2]"), "added_layers=3"),
        (("added_layers=3", "growths=[{growth:{layers:[0,1,2,2]}}]"), "added_layers=3"),
        (("growth.gate_steps=7", "growths=[{growth:{init:gate}}]"), None),
        (("added_layers=3", "growths=[{added_layers:2},{}]"), None),
        (("+data.files=[a]", "+data.text_column=body", "+model.untie=true"),
         "data.files=('a',), data.text_column=body, model.un"),
        (("optimizer.weight_decay=0", "optimizer.decay_norms=false"),
         "optimizer.decay_norms=false"),
        (("lr.decay_share=0.5",), "lr.decay_share=0.5"),
        (("lr.grown.final_factor=0.5", "lr.schedule=cosine", "lr.grown.schedule=constant"),
         "lr.gr"),
        (("lr.grown.final_factor=0.5", "lr.schedule=cosine"), None),
        (("lr.decay_share=0.5", "lr.grown.schedule=wsd"), None),
        (("lr.grown.warmup_steps=3", "phase=from_scratch"), "lr.grown.warmup_steps=3"),
        (("phase.grown.batch_size=2", "phase=from_scratch"), "phase.grown.batch_size=2"),
        (("optimizer.carry=existing", "phase=from_scratch"), "optimizer.carry=existing"),
        (("cache_frozen=true", "phase=from_scratch"), "cache_frozen=true"),
        (("cache_frozen=true", "freeze=existing"), None),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_named(overrides: tuple[str, ...], named: str | None) -> None:
    settings = config(*overrides)
    said = unused_settings(settings, plan(settings, 100))
    assert (said or "").startswith("" if named is None else f"without effect in this run: {named}")
    assert (said is None) == (named is None)


def test_of_the_study_only_the_split_rates_have_a_part_without_effect() -> None:
    for experiment in experiments():
        settings = config(f"experiment={experiment}")
        said = unused_settings(settings, plan(settings, 100))
        named = re.findall(r"lr\.factor\.\w+", said or "")
        factors = ["lr.factor.existing", "lr.factor.embedding"] * (experiment == "split_lr")
        assert sorted(named) == sorted(factors), said
        assert (said is None) == (not factors)
