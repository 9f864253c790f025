"""The chunked cross-entropy equals its dense twin, and holds no more than it says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from proglayer.training import blocks, loss
from proglayer.training.blocks import Workspace
from proglayer.training.loss import evaluate_exits, linear_cross_entropy

Problem = tuple[list[Tensor], Tensor, Tensor]
# Largest difference allowed, relative to the largest value: of the same sums in another order.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# Of each exit.
WEIGHTS = [0.2, 0.5, 0.3]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small are slower on several threads, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dense(
    hidden_end: Sequence[Tensor], head_vd: Tensor, target_n: Tensor, weight_e: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The obvious twin: all logits, PyTorch's cross-entropy, autograd."""
    logits_env = [hidden_nd @ head_vd.T for hidden_nd in hidden_end]
    nll_e = torch.stack([F.cross_entropy(x, target_n, reduction="sum") for x in logits_env])
    correct_e = torch.stack([(x.argmax(1) == target_n).sum() for x in logits_env])
    weights = torch.tensor(weight_e, dtype=nll_e.dtype)
    return (weights * nll_e).sum() / len(target_n), nll_e.detach(), correct_e


def problem(
    tokens: int = 37,
    dim: int = 8,
    vocab: int = 101,
    exits: int = 3,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Hidden states and head, both to be trained, and targets of which some are easily guessed."""
    rng = torch.Generator().manual_seed(seed)
    hidden_end = [
        (scale * torch.randn(tokens, dim, generator=rng, dtype=dtype)).requires_grad_()
        for _ in range(exits)
    ]
    head_vd = (torch.randn(vocab, dim, generator=rng, dtype=dtype) * dim**-0.5).requires_grad_()
    target_n = torch.randint(0, vocab, (tokens,), generator=rng)
    target_n[::3] = (hidden_end[-1][::3] @ head_vd.T).argmax(1)
    return hidden_end, head_vd, target_n


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.dtype == theirs.dtype or theirs.dtype == torch.float64 == ours.dtype
    assert ours.shape == theirs.shape
    bound = tolerance * max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= bound


def assert_equal_to_dense(
    given: Problem,
    weight_e: Sequence[float] = WEIGHTS,
    tolerance: float = 1e-10,
    workspace: Workspace | None = None,
) -> None:
    """Value, sums, counts and all gradients; also of the evaluation."""
    hidden_end, head_vd, _ = given
    trained = [t for t in {id(t): t for t in (head_vd, *hidden_end)}.values() if t.requires_grad]
    loss, nll_e, correct_e = dense(*given, weight_e)
    ours = linear_cross_entropy(*given, weight_e, workspace=workspace)
    assert_near(ours.loss.detach(), loss.detach(), tolerance)
    assert_near(ours.nll_e, nll_e.double(), tolerance)
    assert torch.equal(ours.correct_e, correct_e)
    assert not ours.nll_e.requires_grad
    if trained:
        found, expected = (torch.autograd.grad(3.7 * x, trained) for x in (ours.loss, loss))
        for mine, theirs in zip(found, expected, strict=True):
            assert_near(mine, theirs, 4 * tolerance)

    scores = evaluate_exits(*given, workspace=workspace)
    assert_near(scores.nll_e, nll_e.double(), tolerance)
    assert torch.equal(scores.correct_e, correct_e)


# Rows per chunk and entries per block: by rule, odd last ones, one row at a time, all at once.
CHUNKS = [(None, None), (8, 30), (1, 101), (1000, 7)]


@DTYPES
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e3, 1e5])
def test_equals_dense_for_any_size_of_logits(
    dtype: torch.dtype, chunks: tuple[int, int], scale: float
) -> None:
    # The logits themselves round to a part in 10^7 in float32, which the exponential magnifies.
    tolerance = TOLERANCE[dtype] * max(1.0, scale)
    assert_equal_to_dense(problem(dtype=dtype, scale=scale), WEIGHTS, tolerance, Workspace(*chunks))


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["", "shifted"])
@pytest.mark.parametrize("vocab", [100, 101])
@pytest.mark.parametrize("threads", [2, 4])
def test_equals_dense_when_blocks_are_cut_for_threads(
    threads: int, vocab: int, scale: float
) -> None:
    torch.set_num_threads(threads)
    # Blocks that can be cut, a last one that cannot, and none that can.
    for block in 28, 101, 33:
        assert_equal_to_dense(problem(vocab=vocab, scale=scale), workspace=Workspace(16, block))


@DTYPES
@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_logits_far_from_zero_need_one_more_product_at_most(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, offset: float
) -> None:
    """Released models have such logits. That of the target is subtracted, not the largest."""
    monkeypatch.delattr(loss._Loss, "largest")
    hidden_end, head_vd, _ = given = problem(dtype=dtype)
    with torch.no_grad():
        head_vd[:, 0] = 10
        for hidden_nd in hidden_end:
            hidden_nd[:, 0] = offset / 10
    for chunks in CHUNKS[:2]:
        assert_equal_to_dense(given, WEIGHTS, 10 * TOLERANCE[dtype], Workspace(*chunks))
    products = []
    logits = loss._Loss.form_logits
    monkeypatch.setattr(
        loss._Loss, "form_logits", lambda self, *rest: (products.append(1), logits(self, *rest))
    )
    linear_cross_entropy(*given, WEIGHTS, workspace=Workspace(37, 101))
    assert len(products) == (3 if offset > 0 else 4)  # one is beyond what the target's logit tells


@DTYPES
def test_confident_predictions_keep_the_precision_of_a_small_loss(dtype: torch.dtype) -> None:
    head_vd = 20 * torch.eye(8, dtype=dtype)
    hidden_nd = torch.eye(8, dtype=dtype)
    loss = linear_cross_entropy([hidden_nd], head_vd, torch.arange(8), [1.0]).loss
    assert loss.item() == pytest.approx(math.log1p(7 * math.exp(-20)), rel=1e-6, abs=2e-8)


@DTYPES
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_of_equally_likely_words_the_first_counts(
    dtype: torch.dtype, chunks: tuple[int, int], scale: float
) -> None:
    # Words 3, 50 and 100 have the same weights, and are the likeliest everywhere.
    # One factor of each product is not zero: no order of summation makes their logits differ.
    hidden_nd = torch.zeros(6, 8, dtype=dtype)
    hidden_nd[:, 2] = scale
    head_vd = torch.zeros(101, 8, dtype=dtype)
    # Where all logits are equal, the first of all is it.
    equal = [hidden_nd], head_vd.clone(), torch.tensor([0, 1, 0, 2, 100, 5])
    head_vd[[3, 50, 100], 2] = 1.0
    likely = [hidden_nd], head_vd.requires_grad_(), torch.tensor([3, 50, 100, 3, 7, 50])
    workspace = Workspace(*chunks)
    ours = linear_cross_entropy(*likely, [1.0], workspace=workspace)
    evaluated = [evaluate_exits(*given, workspace=workspace) for given in (likely, equal)]
    assert [found.correct_e.tolist() for found in (ours, *evaluated)] == [[2]] * 3


def test_exits_may_share_a_tensor_and_be_views_of_others() -> None:
    hidden_end, head_vd, target_n = problem(exits=1)
    assert_equal_to_dense((hidden_end * 2, head_vd, target_n), [0.3, 0.7])
    hidden_end, head_vd, target_n = problem(tokens=8)
    turned = [hidden_nd.detach().T.requires_grad_() for hidden_nd in hidden_end]
    assert_equal_to_dense((turned, head_vd, target_n))
    sliced = torch.randn(4, 9, 8, dtype=torch.float64)[:, 1:].flatten(0, 1)
    every_other = torch.randn(64, 8, dtype=torch.float64)[::2]
    assert_equal_to_dense(([sliced, every_other], head_vd, torch.arange(32)), [1, 1])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 40)),
    chunks=st.tuples(st.integers(1, 25), st.integers(1, 45)),
    exits=st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 1.0, 2.5]), st.booleans()), min_size=1, max_size=4
    ),
    head_trains=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_equals_dense_for_any_small_shape(
    sizes: tuple[int, int, int],
    chunks: tuple[int, int],
    exits: list[tuple[float, bool]],
    head_trains: bool,
    scale: float,
    seed: int,
) -> None:
    hidden_end, head_vd, _ = given = problem(*sizes, len(exits), scale=scale, seed=seed)
    head_vd.requires_grad_(head_trains)
    for hidden_nd, (_, trains) in zip(hidden_end, exits, strict=True):
        hidden_nd.requires_grad_(trains)
    weights = [weight for weight, _ in exits]
    assert_equal_to_dense(given, weights, 1e-10 * max(1.0, scale), Workspace(*chunks))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["hidden", "head"])
def test_a_number_that_is_none_shows_in_the_loss(bad: float, where: str) -> None:
    hidden_end, head_vd, _ = given = problem(dtype=torch.float32)
    with torch.no_grad():
        (hidden_end[1] if where == "hidden" else head_vd)[5, 2] = bad
    ours = linear_cross_entropy(*given, WEIGHTS, workspace=Workspace(8, 30))
    assert math.isnan(ours.loss.item())
    assert math.isnan(ours.nll_e[1].item())
    assert math.isnan(evaluate_exits(*given).nll_e[1].item())
    # Only that exit's.
    assert math.isfinite(ours.nll_e[0].item()) or where == "head"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_repeat_has_the_same_bits(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    # Many tokens share a target, so that a scatter in no fixed order would show.
    hidden_end, head_vd, target_n = problem(tokens=600, dim=16, vocab=999, dtype=dtype)
    target_n %= 5
    workspace = Workspace()

    def bits() -> list[Tensor]:
        ours = linear_cross_entropy(hidden_end, head_vd, target_n, WEIGHTS, workspace=workspace)
        return [ours.loss, ours.nll_e, *torch.autograd.grad(ours.loss, [head_vd, *hidden_end])]

    first = bits()
    # Other uses of the buffer in between leave no trace.
    workspace.rows = 77
    linear_cross_entropy(hidden_end[:1], head_vd, target_n, [9.0], workspace=workspace)
    workspace.rows = None
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, bits(), strict=True))


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation makes or writes, and the products formed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        if func.overloadpacket.__name__ in ("bmm", "baddbmm_"):
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.multiplications += left.numel() * right.shape[2]
        return out


def test_no_tensor_of_all_logits_is_made() -> None:
    tokens, vocab, dim, rows = 512, 2000, 4, 64
    hidden_end, head_vd, target_n = given = problem(tokens, dim, vocab, dtype=torch.float32)
    with Watch() as seen:
        linear_cross_entropy(*given, WEIGHTS, workspace=Workspace(rows)).loss.backward()
    assert seen.elements == rows * vocab
    # Where nothing is read twice, not even the logits of one chunk.
    for needs_hidden in (False, True):
        hidden = [h.detach().requires_grad_(needs_hidden) for h in hidden_end]
        with Watch() as seen:
            workspace = Workspace(rows, 200)
            linear_cross_entropy(hidden, head_vd.detach(), target_n, WEIGHTS, workspace=workspace)
        assert seen.elements <= max(rows * 200, 3 * tokens * dim, vocab * dim, 3 * tokens * 2)


@pytest.mark.parametrize(
    ("hidden_train", "head_trains", "products"),
    [
        ((1, 1, 1), True, 3 + 3 + 3),
        ((1, 1, 1), False, 2 + 2 + 2),
        ((0, 0, 1), True, 2 + 2 + 3),  # exits below a new layer train the head only
        ((0, 0, 0), True, 2 + 2 + 2),
        ((0, 0, 0), False, 1 + 1 + 1),
    ],
)
def test_only_the_products_that_are_needed_are_formed(
    hidden_train: tuple[int, ...], head_trains: bool, products: int
) -> None:
    hidden_end, head_vd, target_n = given = problem(dtype=torch.float32)
    head_vd.requires_grad_(head_trains)
    for hidden_nd, trains in zip(hidden_end, hidden_train, strict=True):
        hidden_nd.requires_grad_(bool(trains))
    with Watch() as seen:
        ours = linear_cross_entropy(*given, WEIGHTS, workspace=Workspace(16, 30))
        if ours.loss.requires_grad:
            ours.loss.backward()
    assert seen.multiplications == products * len(target_n) * head_vd.numel()
    with Watch() as seen:
        evaluate_exits(*given)
    assert seen.multiplications == 3 * len(target_n) * head_vd.numel()


def test_off_the_cpu_no_value_is_waited_for() -> None:
    # Tensors on this device have no values, so that looking at one fails.
    hidden_end, head_vd, target_n = problem(tokens=700, vocab=2000, dtype=torch.float32)
    hidden_end = [hidden_nd.detach().to("meta").requires_grad_() for hidden_nd in hidden_end]
    hidden_end[0].requires_grad_(False)
    given = hidden_end, head_vd.detach().to("meta").requires_grad_(), target_n.to("meta")
    ours = linear_cross_entropy(*given, [0.2, 0.0, 0.8])
    for tensor, shape in (ours.loss, ()), (ours.nll_e, (3,)), (ours.correct_e, (3,)):
        assert (tensor.device.type, tensor.shape) == ("meta", shape)
    (3.7 * ours.loss).backward()
    assert given[1].grad is not None
    assert given[1].grad.shape == head_vd.shape
    assert evaluate_exits(*given).nll_e.shape == (3,)


@pytest.mark.parametrize(
    ("device_type", "bound"), [("cpu", blocks.KEPT_BYTES), ("cuda", blocks.KEPT_BYTES_ON_DEVICE)]
)
def test_the_rule_for_chunks_bounds_memory_and_keeps_blocks_in_cache(
    device_type: str, bound: int
) -> None:
    for total in (1, 17, 500, 2048, 6144, 2049, 100_000):
        for vocab in (1, 10, 8192, 69_830, 250_000):
            for keep in (True, False):
                rows = blocks.chunk_rows(total, vocab, keep, torch.float32, device_type)
                assert 1 <= rows <= total
                assert rows * vocab * 4 <= bound or not keep
                entries = blocks.block_entries(rows, vocab, torch.float32, device_type)
                assert 1 <= entries <= vocab
                if device_type == "cpu" and entries > 256:
                    cache = 2 * blocks.cache_bytes() * torch.get_num_threads()
                    assert rows * entries * 4 <= cache


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_frozen_hidden_states_and_the_workspace_may_come_from_inference_mode(mode: type) -> None:
    hidden_end, head_vd, target_n = given = problem()
    workspace = Workspace()
    with mode():
        frozen = [(2 * hidden_nd).view(-1, 8) for hidden_nd in hidden_end[:2]]
        linear_cross_entropy(*given, WEIGHTS, workspace=workspace)
    found, expected = (
        torch.autograd.grad(loss, [head_vd, hidden_end[2]])
        for loss in (
            linear_cross_entropy(
                [*frozen, hidden_end[2]], head_vd, target_n, WEIGHTS, workspace=workspace
            ).loss,
            dense([*(h.clone() for h in frozen), hidden_end[2]], head_vd, target_n, WEIGHTS)[0],
        )
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert_near(mine, theirs, 1e-10)


@pytest.mark.parametrize("scale", [1.0, 30.0, 400.0])
@pytest.mark.parametrize("trained", ["all", "head frozen", "one exit only"])
def test_bfloat16_is_near_float64_for_small_and_large_logits(scale: float, trained: str) -> None:
    """Loss within 1e-3 nats, each gradient within 1 % in norm; odd last chunk and block."""
    hidden_end, head_vd, target_n = given = problem(333, 32, 1001, dtype=torch.float32)
    with torch.no_grad():
        head_vd *= scale / hidden_end[0].norm(dim=1).mean()
        # The targets are likely, as they are of a trained model.
        hidden_end[0] += 0.5 * head_vd[target_n] / head_vd.norm(dim=1).mean()
    head_vd.requires_grad_(trained != "head frozen")
    for hidden_nd in hidden_end[1:]:
        hidden_nd.requires_grad_(trained != "one exit only")
    inputs = [x for x in (head_vd, *hidden_end) if x.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(*given, WEIGHTS, workspace=Workspace(128, 256))
    gradients = torch.autograd.grad(ours.loss, inputs)
    exact = {x: x.detach().double().requires_grad_(x.requires_grad) for x in (head_vd, *hidden_end)}
    loss, *_ = dense([exact[h] for h in hidden_end], exact[head_vd], target_n, WEIGHTS)
    if scale == 1.0:
        assert abs(ours.loss.item() - loss.item()) < 1e-3
    assert ours.loss.item() == pytest.approx(loss.item(), rel=2e-3)
    # Where logits differ by hundreds, their 8 bits decide which of two likely tokens it is.
    bound = 0.01 if scale == 1.0 else 0.05
    theirs = torch.autograd.grad(loss, [exact[x] for x in inputs])
    for mine, wanted in zip(gradients, theirs, strict=True):
        assert (mine.double() - wanted).norm() < bound * wanted.norm()


def test_an_evaluation_under_autocast_has_float32_logits() -> None:
    given = problem(tokens=300, dim=32, vocab=500, dtype=torch.float32)
    expected = evaluate_exits(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = evaluate_exits(*given)
    assert torch.equal(scores.nll_e, expected.nll_e)
    assert torch.equal(scores.correct_e, expected.correct_e)
