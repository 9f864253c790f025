"""Causal language models of transformers, grown and trained as our own model is."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proglayer.config import ConfigError
from proglayer.store.checkpoint import load_model as load_stored
from proglayer.store.checkpoint import load_training, pack_training, pack_weights
from proglayer.store.entries import Machine
from proglayer.store.trajectory import describe
from proglayer.training.build import build, grow, restored
from proglayer.training.cost import parameter_counts, training_flops
from proglayer.training.growth import layer_sources
from proglayer.training.model import Model
from proglayer.training.optim import set_trainable
from proglayer.training.plan import TrainSpec, open_checkpoint, plan
from proglayer.training.trainer import Training, evaluate

from ..helpers import config
from .tiny import CORPUS, CPU, begun, pattern

transformers = pytest.importorskip("transformers")

# The three shapes that a family has: rotary with gains, learned positions with biases and a tied
# head, and both branches side by side.
FAMILIES = ("llama", "gpt2", "gpt_neox")
LIKE_LLAMA = ("mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3")
TIED = ("gpt2", "smollm3")
SIZES = ("model.dim=16", "model.num_heads=2", "model.ffn_multiple=2", "initial_layers=3")
SHORT = ("phase.batch_size=16", "phase.max_epochs=2", "lr.base=0.01")
# What projects from a layer's two branches onto the hidden state.
OUTPUTS = {
    "llama": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "gpt2": {"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"},
    "gpt_neox": {
        f"{projection}.{part}"
        for projection in ("attention.dense", "mlp.dense_4h_to_h")
        for part in ("weight", "bias")
    },
}


def planned(*overrides: str, vocab_size: int = CORPUS.vocab_size) -> tuple[TrainSpec, ...]:
    settings = config("model=causal_lm", *SHORT, *overrides)
    phases = plan(settings, vocab_size, open_checkpoint(settings))
    return tuple(phase.train for phase in phases)


def of_family(family: str, *overrides: str) -> tuple[TrainSpec, ...]:
    untie = () if "model.untie=true" in overrides or family not in TIED else ("freeze=none",)
    return planned(f"model.family={family}", *SIZES, *untie, *overrides)


def tokens() -> Tensor:
    return torch.randint(0, CORPUS.vocab_size, (4, 8), generator=torch.Generator().manual_seed(1))


def perturbed(model: Model) -> Model:
    """The model with weights that are no initial ones, biases and gains among them."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def start(family: str, *overrides: str) -> tuple[Model, Model, TrainSpec]:
    """An old model, the same grown, and the phase that grows it."""
    first, second = of_family(family, "phase=grow_once", *overrides)[:2]
    old = perturbed(build(first))
    return old, grow(old, second), second


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of 4 layers as transformers itself makes and saves it."""
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def saved(family: str, folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    names = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    names |= {"n_inner": 32} if family == "gpt2" else {"intermediate_size": 32}
    names |= {"vocab_size": 32, "max_position_embeddings": 64, "bos_token_id": 0}
    names |= {"eos_token_id": 0, "pad_token_id": None, "initializer_range": 0.3}
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **names | settings)
    )
    made.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------
# What the adapter computes is what the library computes


@pytest.mark.parametrize("family", [*FAMILIES, *LIKE_LLAMA])
def test_logits_are_those_of_the_library(family: str) -> None:
    model = perturbed(build(of_family(family)[0])).eval()
    with torch.no_grad():
        assert torch.equal(model.logits(tokens()), model.pretrained()(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_is_final_norm_and_head_on_a_layers_output(family: str) -> None:
    phase = of_family(family)[0]
    model = perturbed(build(phase))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("layers.2.")}
    shorter = restored(2, asdict(phase.architecture), state)
    with torch.no_grad():
        read = torch.nn.functional.linear(model.read(model(tokens())[1]), model.head_weight)
        assert torch.equal(shorter.logits(tokens()), read)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_weights_repeat_and_leave_the_global_generator_alone(family: str) -> None:
    phase = of_family(family)[0]
    before = torch.get_rng_state()
    one = build(phase)
    torch.rand(3)
    again, other = build(phase), build(replace(phase, seed=phase.seed + 1))
    torch.set_rng_state(before)
    torch.rand(3)
    for p, q, r in zip(one.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.ndim < 2 or not torch.equal(p, r)


# ---------------------------------------------------------------------------------------------
# Growth


@pytest.mark.parametrize("position", ["top", "bottom", "interleave"])
@pytest.mark.parametrize("family", [*FAMILIES, *LIKE_LLAMA])
def test_zero_keeps_the_function_bit_for_bit(family: str, position: str) -> None:
    old, new, phase = start(family, "growth=zero", f"growth.position={position}", "added_layers=2")
    with torch.no_grad():
        assert torch.equal(old.logits(tokens()), new.logits(tokens()))
    if family in OUTPUTS:
        layer = new.layers[phase.new_layers[0]]
        zero = {name for name, p in layer.named_parameters() if not p.any()}
        assert zero == OUTPUTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_keeps_the_function_bit_for_bit(family: str) -> None:
    old, new, phase = start(
        family, "growth=gate", "growth.gate_steps=2", "growth.position=interleave"
    )
    new.gate, new.gated_layers = torch.tensor(0.0), phase.new_layers
    with torch.no_grad():
        assert torch.equal(old.logits(tokens()), new.logits(tokens()))
        new.gate, new.gated_layers = None, ()
        assert not torch.equal(old.logits(tokens()), new.logits(tokens()))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("growth=random", "added_layers=2"), "012rr"),
        (("growth=copy", "added_layers=3", "growth.position=interleave"), "001122"),
        (("growth=stack", "added_layers=3"), "012012"),
        (("growth=middle", "added_layers=2"), "01112"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_where_new_layers_come_from(family: str, overrides: tuple[str, ...], expected: str) -> None:
    old, new, _ = start(family, *overrides)
    assert pattern(old, new) == expected
    places = [p.data_ptr() for model in (old, new) for p in model.parameters()]
    assert len(set(places)) == len(places)
    kept = old.state_dict()
    for name, tensor in new.state_dict().items():
        assert name.startswith("layers.") or torch.equal(tensor, kept[name])
    assert torch.equal(old.head_weight, new.head_weight)


# ---------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("family", FAMILIES)
def test_only_new_layers_train_and_the_loss_falls(family: str) -> None:
    _, new, phase = start(
        family, "growth=zero", "growth.position=interleave", "freeze=new_layers", "lr.factor.new=1"
    )
    last = [phase.exits - 1]
    training = begun(phase, new)
    (before,) = evaluate(training.model, phase, CORPUS, CPU, last)
    weights = {name: p.clone() for name, p in training.model.named_parameters()}
    new_layers = tuple(f"layers.{layer}." for layer in phase.new_layers)
    for _ in range(2):
        training.train_epoch()
        training.finish_epoch()
    (after,) = evaluate(training.model, phase, CORPUS, CPU, last)
    assert after.loss < before.loss
    for name, p in training.model.named_parameters():
        assert p.requires_grad is name.startswith(new_layers), name
        assert p.requires_grad or (torch.equal(p, weights[name]) and p.grad is None), name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_resumes_bit_for_bit_and_is_stored_whole(family: str) -> None:
    _, new, phase = start(family, "growth=copy", "freeze=none", "model=causal_lm")
    state, architecture = new.state_dict(), asdict(phase.architecture)

    def fresh() -> Training:
        copies = {name: value.clone() for name, value in state.items()}
        return begun(phase, restored(phase.layers, architecture, copies))

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    whole, cut = fresh(), fresh()
    whole.train_epoch()
    with pytest.raises(KeyboardInterrupt):
        cut.train_epoch(stop)
    resumed = fresh()
    load_training(resumed, pack_training(cut))
    resumed.epoch, resumed.step = cut.epoch, cut.step
    resumed.train_epoch()
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    stored = load_stored(pack_weights(phase, whole.model.state_dict()))
    with torch.no_grad():
        assert torch.equal(stored.logits(tokens()), whole.model.logits(tokens()))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bfloat16_train_with_their_norms_and_are_half_as_large(family: str) -> None:
    phase = of_family(family, "model.weights=bfloat16")[0]
    training = begun(phase)
    weights = dict(training.model.named_parameters())
    gains = {n: w.detach().clone() for n, w in weights.items() if w.ndim == 1 and "bias" not in n}
    assert all((gain == 1).all() for gain in gains.values())
    (before,) = evaluate(training.model, phase, CORPUS, CPU, [2])
    training.train_epoch()
    (after,) = evaluate(training.model, phase, CORPUS, CPU, [2])
    assert after.loss < before.loss
    assert {w.dtype for w in weights.values() if w.ndim > 1} == {torch.bfloat16}
    # An update of a rate of 1e-3 is lost in a bfloat16 of 1.
    assert gains
    assert not [name for name, gain in gains.items() if torch.equal(weights[name], gain)]
    wide = len(pack_weights(of_family(family)[0], build(of_family(family)[0]).state_dict()))
    assert len(pack_weights(phase, training.model.state_dict())) < 0.75 * wide


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_products_are_counted_as_they_are(family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for phase in of_family(family, "growth=copy", "freeze=none"):
        model = build(replace(phase, growth=None))
        assert parameter_counts(phase).total == sum(p.numel() for p in model.parameters())
        training = begun(phase, model)
        counted = training_flops(phase, CORPUS.train.shape[1] - 1, len(CORPUS.train))
        inputs = torch.zeros(len(CORPUS.train), 8, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            training.model(inputs)[-1].sum().backward()
        found = counter.get_flop_counts()["Global"]
        products = found.get(torch.ops.aten.mm, 0) + found.get(torch.ops.aten.addmm, 0)
        # Attention's scores, forward and the gradients of both their factors.
        scores = 3 * phase.layers * 4 * inputs.numel() * 8 * phase.architecture.sizes.attention
        assert products == counted.body - scores


@pytest.mark.parametrize("family", [*FAMILIES, *LIKE_LLAMA])
@pytest.mark.parametrize("kind", ["attention", "mlp", "norms"])
def test_a_kind_is_frozen_and_counted_in_every_family(family: str, kind: str) -> None:
    step = f"{{existing: all, embedding: true, head: true, frozen_kinds: [{kind}]}}"
    phase = of_family(family, f"freeze.steps=[{step}]")[1]
    model = build(replace(phase, growth=None))
    trainable = set_trainable(model, phase)
    assert parameter_counts(phase).trainable == sum(p.numel() for p in trainable.values())
    words = {"norms": ("norm", "ln_"), "mlp": ("mlp.",), "attention": ("attn.", "attention.")}
    for name, _ in model.layers[0].named_parameters():
        norm = any(word in name for word in words["norms"])
        of = norm if kind == "norms" else not norm and any(word in name for word in words[kind])
        assert (f"layers.0.{name}" in trainable) is not of, name


# ---------------------------------------------------------------------------------------------
# Embedding and head as one tensor


@pytest.mark.parametrize(
    "apart", ["freeze=existing", "freeze.initial.head=false", "lr.factor.head=1"]
)
def test_settings_that_would_part_a_tied_head_are_refused(apart: str) -> None:
    with pytest.raises(ConfigError, match=r"embedding and head apart.*model\.untie=true"):
        of_family("gpt2", "freeze=none", apart)


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    phase = of_family("gpt2", "model.untie=true", "freeze=existing")[0]
    assert {"head.weight", "embedding.tokens.weight"} <= set(build(phase).state_dict())
    path = saved("gpt2", tmp_path / "gpt2")
    own = (f"model.path={path}",)
    tied, untied = (
        build(planned(*own, *more)[0], path) for more in (("freeze=none",), ("model.untie=true",))
    )
    with torch.no_grad():
        assert torch.equal(tied.logits(tokens()), untied.logits(tokens()))
        untied.head_weight.zero_()
        assert untied.embedding.tokens.weight.any()
        assert not untied.pretrained()(tokens()).logits.any()


# ---------------------------------------------------------------------------------------------
# Checkpoints


def from_path(path: Path, *overrides: str) -> tuple[TrainSpec, ...]:
    untie = ("freeze=none",) if "gpt2" in path.name else ()
    return planned(f"model.path={path}", *untie, *overrides)


def test_a_checkpoint_is_read_as_the_library_reads_it(checkpoint: Path) -> None:
    phases = from_path(checkpoint, "growth=zero")
    assert [phase.layers for phase in phases] == [4, 5]
    settings = config("model=causal_lm", f"model.path={checkpoint}")
    assert settings.data.tokenizer == str(checkpoint)
    assert planned("model.family=llama", "model.dim=16", "model.num_heads=2")[0].layers == 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model = build(phases[0], checkpoint)
    with torch.no_grad():
        assert torch.equal(model.logits(tokens()), theirs(tokens()).logits)
    (shallow, _) = from_path(checkpoint, "growth=zero", "initial_layers=2")
    lower = build(shallow, checkpoint)
    assert len(lower.layers) == 2
    for ours, read in zip(lower.layers, model.layers, strict=False):
        for p, q in zip(ours.parameters(), read.parameters(), strict=True):
            assert torch.equal(p, q)


WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("family", "settings", "name", "kinds"),
    [
        ("qwen2", WINDOWED | {"max_window_layers": 2}, "layer_types", "ffss"),
        ("qwen2", WINDOWED | {"max_window_layers": 0}, "layer_types", "ssss"),
        ("qwen3", WINDOWED | {"layer_types": ["sliding_attention", "full_attention"] * 2},
         "layer_types", "sfsf"),
        ("smollm3", {"no_rope_layer_interval": 2, "num_key_value_heads": 2},
         "no_rope_layers", "1010"),
    ],
)  # fmt: skip
def test_a_copy_is_of_the_kind_of_its_source(
    family: str, settings: dict[str, object], name: str, kinds: str, tmp_path: Path
) -> None:
    path = saved(family, tmp_path / family, **settings)
    first, second = from_path(
        path, "growth=zero", "growth.position=interleave", "added_layers=2", "initial_layers=3",
        "freeze=none", "data.seq_len=8",
    )  # fmt: skip
    old = build(first, path)
    new = grow(old, second)
    tokens = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(1))
    inner = new.pretrained()
    found = "".join(str(kind)[0] for kind in getattr(inner.config, name))
    sources = [source.layer for source in layer_sources(3, second.growth)]
    assert found == "".join(kinds[source] for source in sources)
    whole = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    whole.base_model.layers = whole.base_model.layers[:3]
    whole.config.num_hidden_layers = 3
    with torch.no_grad():
        # Longer than the window, so that the kinds show.
        assert torch.equal(old.pretrained()(tokens).logits, whole(tokens).logits)
        assert torch.equal(inner(tokens).logits, whole(tokens).logits)
        again = load_stored(pack_weights(second, new.state_dict())).pretrained()
        assert torch.equal(again(tokens).logits, whole(tokens).logits)
        full = transformers.AutoConfig.for_model(family, **json.loads(first.architecture.settings))
        full.num_hidden_layers = 3
        full.layer_types, full.no_rope_layers = ["full_attention"] * 3, [1] * 3
        other = transformers.AutoModelForCausalLM.from_config(full)
        other.load_state_dict(old.pretrained().state_dict())
        assert not torch.equal(other.eval()(tokens).logits, whole(tokens).logits)


def test_what_a_checkpoint_holds_is_in_the_key_and_where_it_lies_is_not(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Also what the index of its weights says, which tells in which file each of them is."""

    def key(path: Path) -> str:
        machine = Machine("cpu", "a processor", 2, "2.13.0")
        return json.dumps(describe(None, from_path(path)[0], "a text", machine), sort_keys=True)

    moved = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    assert key(moved) == key(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(moved)
    keys = [key(checkpoint), key(moved)]
    (moved / "model.safetensors.index.json").write_text("{}")
    assert len({*keys, key(moved)}) == 3


def edited(**settings: object):
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return edit


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2_000])


DAMAGE = {
    "no settings": (
        lambda folder: (folder / "config.json").unlink(),
        "its config.json cannot be read",
    ),
    "an encoder": (edited(model_type="bert"), "family bert, which is no causal language model"),
    "remote code of a known family": (
        edited(auto_map={"AutoModelForCausalLM": "mine.Mine"}),
        "asks for code of its own, which is never run",
    ),
    "weights that can run code": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"holds no \*\.safetensors",
    ),
    "cut short": (cut_short, "its weights cannot be read"),
    "a layer missing": (edited(num_hidden_layers=5), r"its weights lack .*layers\.4"),
    "another shape": (edited(intermediate_size=48), "its weights"),
    "too few tokens": (edited(vocab_size=8), "knows 8 tokens, and the text has 30"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_checkpoint_is_told_in_one_line(damage: str, tmp_path: Path) -> None:
    change, line = DAMAGE[damage]
    path = saved("llama", tmp_path / "llama")
    change(path)
    with pytest.raises(ConfigError, match=rf"^model\.path=\S+.*{line}") as error:
        build(from_path(path)[0], path)
    assert "\n" not in str(error.value)


REFUSED = {
    ("model.path=/no/such/folder", "data.tokenizer=model"): "is no folder",
    (): "takes either model.path or model.family",
    ("model.family=llama",): "model.dim has no value",
    ("model.family=gpt2", *SIZES, "model.num_kv_heads=1"): "model.num_kv_heads does not go with",
    ("model.family=llama", *SIZES, "model.revision=main"): "model.revision is of a model.path",
    ("model.family=llama", *SIZES, "data.seq_len=128", "model.max_positions=64"): "64 positions",
    ("model.path=docs", "data.tokenizer=bytes"): "data.tokenizer=bytes does not go with model.path",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_settings_that_do_not_go_together_are_told(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        planned(*overrides)
    assert REFUSED[overrides] in str(error.value)


def test_depths_are_checked_against_the_checkpoint(checkpoint: Path) -> None:
    steps = "[{existing: 4, embedding: true, head: true}]"
    with pytest.raises(ConfigError, match="leaves none of 4 existing"):
        from_path(checkpoint, f"freeze.steps={steps}")
    with pytest.raises(ConfigError, match="has 4 layers, and the first phase asks for 5"):
        from_path(checkpoint, "initial_layers=5")


def test_a_name_of_the_hub_is_pinned_to_the_commit_it_was_fetched_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from proglayer.data.pretrained import open_pretrained

    commit = "0123456789abcdef0123456789abcdef01234567"
    path = saved("llama", tmp_path / commit)
    asked: list[tuple[object, ...]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = open_pretrained("owner/name", "main")
    assert (found.folder, found.revision) == (path, commit)
    open_pretrained("owner/name", None, weights=False)
    assert asked == [("owner/name", "main", True), ("owner/name", None, False)]


# ---------------------------------------------------------------------------------------------
# What is not paid for


def test_a_plan_of_a_billion_parameters_takes_no_room() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, second = planned(
        "model.family=llama", "model.dim=2048", "model.num_heads=32", "model.num_kv_heads=8",
        "initial_layers=16", "added_layers=2", "growth=zero", "freeze=none", "plan=true",
        vocab_size=128_256,
    )  # fmt: skip
    layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
    total = 2 * 128_256 * 2048 + 2048 + 16 * layer
    assert parameter_counts(first).total == total > 1e9
    assert parameter_counts(second).total == total + 2 * layer
    assert training_flops(first, 128, 8).body > 6 * 8 * 128 * 16 * (layer - 2 * 2048)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
