"""Measuring a model at all of its exits, and without some of its layers, on a text.

Shapes in names: e exits, n windows, t positions, m tokens (all positions of all windows), r rows of
a chunk, d model dimension, v vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from proglayer.report.early_exit import ChangedLayers, EarlyExit, ExitWorth, Measured
from proglayer.training.frozen import Windows
from proglayer.training.model import Model

BATCH_WINDOWS = 64
# Logits of so many bytes are held at once.
CHUNK_BYTES = 2**26
# A prediction counts as sure from these shares of probability on.
THRESHOLDS = (
    *(0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3),
    *(0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)


@dataclass(frozen=True)
class TokenScores:
    """What each exit says of each token, on the CPU.

    nll_em: cross-entropy in nats. confidence_em: probability of the guess, from 0 to 1. guess_em:
    the most likely token (int64), of equally likely ones the first. target_m: the right one.
    """

    nll_em: Tensor
    confidence_em: Tensor
    guess_em: Tensor
    target_m: Tensor


@torch.inference_mode()
def score(model: Model, windows: Windows, exits: Sequence[int] | None = None) -> TokenScores:
    """Read `exits` (0 is the lowest; None: all) of the model at each token, in float32."""
    model.eval()
    head_vd = model.head_weight.float()
    rows = max(1, CHUNK_BYTES // (4 * len(head_vd)))
    read = range(max(1, len(model.layers))) if exits is None else exits
    parts: list[list[Tensor]] = [[] for _ in read]
    targets: list[Tensor] = []
    for batch in torch.arange(len(windows)).split(BATCH_WINDOWS):
        input_nt, target_nt = windows.batch(batch)
        hidden_entd = model(input_nt)
        target_m = target_nt.reshape(-1)
        targets.append(target_m)
        for part, exit in zip(parts, read, strict=True):
            hidden_md = model.read(hidden_entd[exit]).flatten(0, 1)
            chunks = zip(hidden_md.split(rows), target_m.split(rows), strict=True)
            part += [
                _scores(hidden_rd.float() @ head_vd.T, target_r) for hidden_rd, target_r in chunks
            ]
    scores_e3m = torch.stack([torch.cat(part, dim=1) for part in parts])
    nll_em, confidence_em, guess_em = scores_e3m.unbind(dim=1)
    return TokenScores(nll_em, confidence_em, guess_em.long(), torch.cat(targets).cpu())


def _scores(logits_rv: Tensor, target_r: Tensor) -> Tensor:
    """Cross-entropy, confidence and guess of each row: (3, rows), on the CPU in float64, which
    holds any id.
    """
    log_z_r = logits_rv.logsumexp(dim=1)
    top_r, guess_r = logits_rv.max(dim=1)
    nll_r = log_z_r - logits_rv.gather(1, target_r[:, None])[:, 0]
    scores = nll_r, (top_r - log_z_r).exp(), guess_r
    return torch.stack([each.cpu().double() for each in scores])


def measure(model: Model, windows: Windows, trained: Sequence[bool]) -> Measured:
    """All that the command says of one model.

    trained: whether each exit, the lowest first, had a weight in the loss of the last phase.
    """
    scores = score(model, windows)
    layers = len(model.layers)
    # A model without layers has one exit, of the embedding.
    depths_e = torch.arange(1, layers + 1) if layers else torch.zeros(1, dtype=torch.long)
    right_em = scores.guess_em == scores.target_m
    exits = [
        ExitWorth(
            layer=int(depths_e[e]),
            trained=trained[e],
            loss=float(scores.nll_em[e].mean()),
            accuracy_percent=_percent(right_em[e]),
            accepted_percent=_percent(scores.guess_em[e] == scores.guess_em[-1]),
        )
        for e in range(len(depths_e))
    ]
    changed = [
        _changed(model, windows, "left out", number, [*range(number), *range(number + 1, layers)])
        for number in range(layers)
    ]
    for number in range(layers - 1):
        order = [*range(number), number + 1, number, *range(number + 2, layers)]
        changed.append(_changed(model, windows, "swapped with the next", number, order))
    return Measured(
        exits=exits,
        early_exit=[early_exit(scores, depths_e, threshold) for threshold in THRESHOLDS],
        changed_layers=changed,
    )


def early_exit(scores: TokenScores, depths_e: Tensor, threshold: float) -> EarlyExit:
    """Each token predicted at the lowest exit that is sure of its guess, else at the last.

    Every layer has still seen every earlier token, as in self-speculative decoding (Elhoushi et al.
    2024, "LayerSkip"): a model that skips layers would have to fill in their keys and values.
    """
    sure_em = scores.confidence_em >= threshold
    sure_em[-1] = True
    first_m = sure_em.int().argmax(dim=0)  # the first of equal values
    token_m = torch.arange(len(first_m))
    return EarlyExit(
        threshold=threshold,
        layers=float(depths_e[first_m].double().mean()),
        loss=float(scores.nll_em[first_m, token_m].mean()),
        accuracy_percent=_percent(scores.guess_em[first_m, token_m] == scores.target_m),
    )


def _changed(
    model: Model, windows: Windows, change: str, number: int, order: Sequence[int]
) -> ChangedLayers:
    with layers_in_order(model, order):
        scores = score(model, windows, exits=[-1])
    accuracy = _percent(scores.guess_em[0] == scores.target_m)
    loss = float(scores.nll_em[0].mean())
    return ChangedLayers(change=change, layer=number + 1, loss=loss, accuracy_percent=accuracy)


@contextlib.contextmanager
def layers_in_order(model: Model, order: Sequence[int]) -> Iterator[None]:
    """The model with these of its layers in this order, until the end of the block."""
    layers = model.layers
    model.layers = nn.ModuleList(layers[number] for number in order)
    try:
        yield
    finally:
        model.layers = layers


def _percent(true_m: Tensor) -> float:
    return 100 * float(true_m.double().mean())
