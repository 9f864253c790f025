"""Causal language models of `transformers`, met through the interface of `model`.

The layers are the library's own, called one by one. What it draws, computes and names stays its
business; here are the names of the parts of each family, and which of a layer's matrices write to
the hidden state.

Shapes in names: n windows, t positions, d model dimension.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from proglayer.config import ModelConfig
from proglayer.data.pretrained import Pretrained
from proglayer.errors import ConfigError, raised_as
from proglayer.training.architecture import CausalLM, Sizes
from proglayer.training.model import Model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, by names in its base model and in a layer.

    positions: the learned position embedding; None where positions are rotary.
    outputs: a layer's projections that write to the hidden state.
    norm_eps, hidden: settings that have names of their own.
    """

    tokens: str
    layers: str
    norm: str
    outputs: tuple[str, ...]
    positions: str | None = None
    norm_eps: str = "rms_norm_eps"
    hidden: str = "intermediate_size"


LLAMA = Family("embed_tokens", "layers", "norm", ("self_attn.o_proj", "mlp.down_proj"))
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3")
FAMILIES = dict.fromkeys(LIKE_LLAMA, LLAMA) | {
    "gpt2": Family(
        "wte", "h", "ln_f", ("attn.c_proj", "mlp.c_proj"), "wpe", "layer_norm_epsilon", "n_inner"
    ),
    "gpt_neox": Family(
        *("embed_in", "layers", "final_layer_norm", ("attention.dense", "mlp.dense_4h_to_h")),
        norm_eps="layer_norm_eps",
    ),
}
# Settings that say nothing of what is computed at a given depth, or that a growth changes.
ASIDE = (
    "architectures", "auto_map", "dtype", "torch_dtype", "max_window_layers",
    "model_type", "n_layer", "num_hidden_layers", "num_labels", "id2label", "label2id",
    "transformers_version", "use_cache", "_name_or_path", "chunk_size_feed_forward",
    "output_attentions", "output_hidden_states", "return_dict", "problem_type",
)  # fmt: skip
# Settings with a value for each layer. A family's own rule for them goes by a layer's number.
KINDS = ("layer_types", "no_rope_layers")
# A depth at which such a rule shows.
DEEP = 64
# A run can only be repeated and resumed bit for bit if no layer draws random numbers.
DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
LEAST_POSITIONS = 1_024


class CausalModel(Model):
    """A model of `transformers` as the trainer sees it. Its tensors are the library's own.

    Where embedding and head are one tensor, it is the embedding's, and there is no `head`.
    """

    embedding: nn.ModuleDict
    rotary: nn.Module

    def __init__(self, inner: PreTrainedModel, tied: bool) -> None:
        super().__init__()
        family = FAMILIES[inner.config.model_type]
        base = inner.base_model
        names = {"tokens": family.tokens, "positions": family.positions}
        self.outputs = family.outputs
        self.embedding = nn.ModuleDict(
            {part: base.get_submodule(name) for part, name in names.items() if name}
        )
        self.layers = cast("nn.ModuleList", base.get_submodule(family.layers))
        self.norm = base.get_submodule(family.norm)
        self.tied = tied
        if not tied:
            self.head = _head(inner)
        # It has buffers that are stored nowhere.
        self.rotary = nn.Identity()
        if family.positions is None:
            self.rotary = base.get_submodule("rotary_emb")
        # Not a part of this module: its parts are those above.
        self._inner = [inner]

    @property
    def head_weight(self) -> Tensor:
        weight = (self.embedding["tokens"] if self.tied else self.head).weight
        assert isinstance(weight, Tensor)
        return weight

    def embed(self, tokens_nt: Tensor) -> Tensor:
        x_ntd = self.embedding["tokens"](tokens_nt)
        if "positions" in self.embedding:
            x_ntd = x_ntd + self.embedding["positions"](_positions(x_ntd))
        return x_ntd

    def beside(self, x_ntd: Tensor) -> dict[str, Any]:
        # Without a mask, attention is causal over the whole window.
        beside: dict[str, Any] = {"attention_mask": None}
        if "positions" not in self.embedding:
            beside["position_ids"] = positions = _positions(x_ntd)
            beside["position_embeddings"] = self.rotary(x_ntd, position_ids=positions)
        return beside

    def initialize(self, part: nn.Module, generator: torch.Generator) -> None:
        """By the library's own rule, which draws from PyTorch's global generator: it is put back
        to where it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            part.apply(self._inner[0]._init_weights)

    @torch.no_grad()
    def silence(self, layer: nn.Module) -> None:
        for name in self.outputs:
            for parameter in layer.get_submodule(name).parameters():
                parameter.zero_()

    def pretrained(self) -> PreTrainedModel:
        """The library's model with these tensors, to generate with and to save."""
        inner = self._inner[0]
        if self.tied:
            _head(inner).weight = self.head_weight
        return inner.eval()

    def settle(self) -> Self:
        self.rotary.to_empty(device="cpu").apply(self._inner[0]._init_weights)
        return self


def on_meta(architecture: Mapping[str, Any], layers: int) -> CausalModel:
    """A model of `CausalLM` as plain data, without room for its tensors."""
    from transformers import AutoModelForCausalLM

    settings = json.loads(architecture["settings"]) | json.loads(architecture.get("kinds", "{}"))
    config = configuration(architecture["family"], settings, layers)
    with quiet(), torch.device("meta"):
        dtype = getattr(torch, architecture.get("dtype", "float32"))
        inner = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return CausalModel(_with_exact_norms(inner), architecture["tied"])


def loaded(architecture: CausalLM, layers: int, folder: Path) -> CausalModel:
    """The first so many layers of the model in `folder`, with its embedding, norm and head.

    Raises ConfigError where its weights are damaged or not those of the model.
    """
    from transformers import AutoModelForCausalLM

    settings = json.loads(architecture.settings) | json.loads(architecture.kinds)
    # The files may hold one tensor where the model is to have two.
    stored = settings | {"tie_word_embeddings": library_settings(folder).tie_word_embeddings}
    with reading(folder, "weights"):
        inner, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
            folder,
            config=configuration(architecture.family, stored, layers),
            dtype=getattr(torch, architecture.dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise ConfigError(f"model.path={folder}: its weights lack {missing[0]}: is it whole?")
    if stored["tie_word_embeddings"] and not architecture.tied:
        head = _head(inner)
        head.weight = nn.Parameter(head.weight.detach().clone())
        inner.config.tie_word_embeddings = False
    return CausalModel(_with_exact_norms(inner), architecture.tied)


def _with_exact_norms(inner: PreTrainedModel) -> PreTrainedModel:
    """Keep the norms of a model of smaller weights in float32, and compute them so.

    A gain is about 1: in bfloat16 the update of an optimizer's step is rounded away.
    """
    dtype = inner.dtype
    for module in inner.modules() if dtype is not torch.float32 else ():
        own = [parameter.ndim for parameter in module.parameters(recurse=False)]
        if own and max(own) == 1:
            module.float()
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            module.register_forward_hook(lambda _, inputs, output: output.to(dtype))
    return inner


def _positions(x_ntd: Tensor) -> Tensor:
    return torch.arange(x_ntd.shape[1], device=x_ntd.device)[None]


def _head(inner: PreTrainedModel) -> nn.Linear:
    head = inner.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def library_settings(folder: Path) -> PretrainedConfig:
    """The library's configuration of the model in `folder`. Raises ConfigError."""
    from transformers import AutoConfig

    with reading(folder, "settings"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def configuration(family: str, settings: Mapping[str, Any], layers: int) -> PretrainedConfig:
    """The library's configuration of a model of so many layers."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **settings, num_hidden_layers=layers)


def architecture_of(
    model: ModelConfig, found: Pretrained | None, vocab_size: int, seq_len: int, layers: int
) -> tuple[CausalLM, int | None]:
    """What the settings describe, and how many layers the checkpoint has.

    found: the checkpoint; None for an untrained model, of `layers` layers.
    vocab_size: entries that the text needs.

    Raises ConfigError where settings, checkpoint and text do not fit together.
    """
    if found is None:
        assert model.family is not None
        family, depth = model.family, None
        config = _untrained(model, vocab_size, seq_len, layers)
    else:
        family = known_family(found, str(model.path))
        config = library_settings(found.folder)
        depth = int(config.num_hidden_layers)
    settings = config.to_dict()
    kinds = {name: settings.pop(name) for name in KINDS if settings.get(name)}
    settings |= {name: 0.0 for name in DROPOUTS if name in settings}
    if model.untie:
        settings["tie_word_embeddings"] = False
    settings = {name: value for name, value in settings.items() if name not in ASIDE}
    what = f"model.path={model.path}" if found else f"model.family={family}"
    deep, config = (configuration(family, settings, depth) for depth in (DEEP, 1))
    # A list that says what the family's own rule would at any depth is left out.
    kinds = {name: of for name, of in kinds.items() if {*of, *getattr(deep, name)} != {of[0]}}
    _check(what, config, vocab_size, seq_len)
    tied = bool(config.tie_word_embeddings)
    settings["tie_word_embeddings"] = tied
    architecture = CausalLM(
        family=family,
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        settings=json.dumps(settings, sort_keys=True),
        tied=tied,
        sizes=_sizes(family, settings, tied),
        dtype=model.weights,
        kinds=json.dumps(kinds, sort_keys=True),
    )
    return architecture, depth


def known_family(found: Pretrained, path: str) -> str:
    """The family of a checkpoint. Raises ConfigError for one that is not known here."""
    family, known = found.config.get("model_type"), ", ".join(FAMILIES)
    if found.config.get("auto_map"):
        wrong = "asks for code of its own, which is never run"
    elif family in FAMILIES:
        return family
    else:
        wrong = f"is of the family {family}, which is no causal language model known here"
    raise ConfigError(f"model.path={path} {wrong}: take a model of one of the families {known}")


def _untrained(model: ModelConfig, vocab_size: int, seq_len: int, layers: int) -> PretrainedConfig:
    """The library's configuration of an untrained model."""
    assert model.family is not None
    assert model.dim is not None
    assert model.num_heads is not None
    family = FAMILIES[model.family]
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": model.dim,
        "num_attention_heads": model.num_heads,
        "max_position_embeddings": model.max_positions or max(LEAST_POSITIONS, seq_len),
        family.hidden: (model.ffn_multiple or 4) * model.dim,
        family.norm_eps: 1e-6 if model.norm_eps is None else model.norm_eps,
        # The library's own would be those of a tokenizer that is not this one.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if family is LLAMA:
        settings["num_key_value_heads"] = model.num_kv_heads or model.num_heads
        settings["head_dim"] = model.dim // model.num_heads
    if family.positions is None and model.rotary_base is not None:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": model.rotary_base}
    return configuration(model.family, settings, layers)


def _check(what: str, config: PretrainedConfig, vocab_size: int, seq_len: int) -> None:
    """Raise ConfigError where a model does not fit the text, or cannot be grown."""
    if config.vocab_size < vocab_size:
        counts = f"{config.vocab_size:,} tokens, and the text has {vocab_size:,}"
        raise ConfigError(f"{what} knows {counts}: take its own, data.tokenizer=model")
    # A window that attention slides over ends what can be seen as the positions do.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    if seq_len > (most := min(window, config.max_position_embeddings)):
        raise ConfigError(
            f"data.seq_len={seq_len} is more than the {most:,} positions that {what} attends to"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ConfigError(f"{what} scales attention by a layer's number, which a growth changes")


def _sizes(family: str, settings: Mapping[str, Any], tied: bool) -> Sizes:
    """Counted in a model of one layer that has no room for its tensors."""
    model = on_meta({"family": family, "settings": json.dumps(settings), "tied": tied}, 1)
    config = model.pretrained().config
    heads = config.num_attention_heads
    weights = list(model.layers[0].parameters())
    embedding, layer, norm = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model.embedding, model.layers[0], model.norm)
    )
    return Sizes(
        *(embedding, layer, norm),
        head=0 if tied else model.head_weight.numel(),
        matrices=sum(weight.numel() for weight in weights if weight.ndim > 1),
        reading=0,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=getattr(config, FAMILIES[family].hidden) or 4 * config.hidden_size,
    )


@contextlib.contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Let the library read in quiet; its errors, of many kinds, become ConfigError."""
    said = f"model.path={folder}: its {what} cannot be read"
    with raised_as(ConfigError, said, Exception), quiet():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars and warnings: what matters is in its results."""
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
