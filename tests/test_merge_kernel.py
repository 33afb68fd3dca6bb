"""The kernel against the float64 oracle, by the tolerances it promises, and what must not change a bit of it."""

import errno
import itertools
import math
import os
import subprocess
import sys
import threading

import numba
import pytest
import torch

from fusechat_merge import compiled, kernel, selection
from fusechat_merge.kernel import NonFiniteError, sce_coefficients, sce_merge, varm_merge
from fusechat_merge.passes import Passes
from tests.helpers import reference_merge

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(params=["compiled", "torch"])
def choose_passes(request, monkeypatch):
    """A test that uses this runs twice: by the compiled passes, and by those that serve accelerators."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "supports", lambda tensors, dtype: False)


by_both_passes = pytest.mark.usefixtures("choose_passes")


@pytest.fixture
def set_threads():
    """PyTorch's number of threads for this test; the former one afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def family(shape, dtypes, scales=(1e-4, 3e-4, 1e-3), seed=0, magnitude=0.02):
    """A pivot (dtypes[0]) and targets (the other dtypes) whose task vectors have these standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    pivot = magnitude * torch.randn(shape, generator=generator, dtype=F64)
    targets = [
        (pivot + scale * torch.randn(shape, generator=generator, dtype=F64)).to(dtype)
        for scale, dtype in zip(itertools.cycle(scales), dtypes[1:])
    ]
    return pivot.to(dtypes[0]), targets


def ulp(values, dtype):
    """Distance of neighbouring numbers of `dtype` at |values| (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps


def undecided(pivot, targets, tau):
    """Elements the promise leaves out: variance within 1e-6 of the threshold, task vectors that sum to about 0."""
    _, deltas = reference_merge.task_vectors(pivot, targets)
    out = [any(c) and abs(math.fsum(c)) <= 1e-6 * math.fsum(abs(x) for x in c) for c in zip(*deltas)]
    if tau < 1:
        values = reference_merge.variances(deltas)
        kept = sum(reference_merge.selected(deltas, tau))
        if 0 < kept < len(values):
            threshold = sorted(values, reverse=True)[kept - 1]
            near = {i for i, v in enumerate(values) if 10**6 * abs(v - threshold) <= threshold}
            if len({values[i] for i in near}) > 1:  # exact ties are decided, by index
                out = [o or i in near for i, o in enumerate(out)]
    return torch.tensor(out, dtype=torch.bool).reshape(pivot.shape)


def assert_promised(merged, exact, pivot, targets, tau=1.0):
    """Within 1 ulp of a 16-bit storage dtype, 8 ulp of max(|pivot|, |merged|) in float32."""
    assert merged.dtype == pivot.dtype
    assert merged.shape == pivot.shape
    limit = (
        ulp(exact, merged.dtype)
        if merged.dtype.itemsize == 2
        else 8 * ulp(exact.abs().maximum(pivot.double().abs()), F32)
    )
    wrong = ((merged.double() - exact).abs() > limit) & ~undecided(pivot, targets, tau)
    assert not wrong.any(), (merged[wrong][:4], exact[wrong][:4])


@by_both_passes
def test_worked_by_hand():
    pivot = torch.tensor([1.0, 1.0, 1.0, 1.0])
    targets = [torch.tensor([2.0, 0.0, 1.0, 3.0]), torch.tensor([4.0, 2.0, 1.0, 0.0])]
    # d = [1, -1, 0, 2] and [3, 1, 0, -1]; squares 6 and 11
    assert sce_coefficients(pivot, targets).tolist() == pytest.approx([6 / 17, 11 / 17], rel=1e-12)
    # sums 4, 0, 0, 1: the second keeps +1 (a sum of zero counts as positive), the fourth keeps +2
    assert sce_merge(pivot, targets).tolist() == pytest.approx([1 + 39 / 17, 2.0, 1.0, 3.0], rel=1e-7)
    # variances 1, 1, 0, 2.25; three differ; floor(0.7 * 3) = 2: the fourth and, of the tie, the first
    assert sce_coefficients(pivot, targets, select_topk=0.7).tolist() == pytest.approx([5 / 15, 10 / 15], rel=1e-12)
    assert sce_merge(pivot, targets, select_topk=0.7).tolist() == pytest.approx([1 + 35 / 15, 1.0, 1.0, 3.0], rel=1e-7)
    varm = [1 + (6 * 1 + 11 * 3) / 17, 1 + (-6 + 11) / 17, 1.0, 1 + (6 * 2 - 11) / 17]
    assert varm_merge(pivot, targets).tolist() == pytest.approx(varm, rel=1e-7)
    element = [1 + (1 + 27) / 10, 1.0, 1.0, 1 + (8 - 1) / 5]
    assert varm_merge(pivot, targets, granularity="element").tolist() == pytest.approx(element, rel=1e-7)


MIXES = [(F32,) * 6, (F16,) * 4, (BF16,) * 6, (BF16, F32, F16, BF16), (F32, BF16, BF16), (F16, F32), (F64, F64, F32)]


def name_of(value):
    return "-".join(str(d).removeprefix("torch.") for d in value) if isinstance(value, tuple) else str(value)


@by_both_passes
@pytest.mark.parametrize(
    ("dtypes", "tau"),
    [(mix, tau) for mix in MIXES for tau in ((1.0, 0.999, 0.3, 0.02) if mix == MIXES[0] else (1.0, 0.3))],
    ids=name_of,
)
def test_sce_is_the_oracle(dtypes, tau):
    for shape, seed in (((17, 9), 1), ((1,), 2), ((3, 5, 7), 3), ((700,), 4)):
        pivot, targets = family(shape, dtypes, seed=seed)
        for scope in kernel.SELECT_SCOPES:
            exact, eta = reference_merge.sce(pivot, targets, tau, scope)
            assert sce_coefficients(pivot, targets, select_topk=tau).tolist() == pytest.approx(eta, rel=1e-6)
            merged = sce_merge(pivot, targets, select_topk=tau, select_scope=scope)
            assert_promised(merged, exact, pivot, targets, tau)


@by_both_passes
@pytest.mark.parametrize("options", [{"select_topk": 0.0}, {"select_topk": 0, "select_scope": "coefficients"}])
def test_nothing_selected_gives_the_pivot(options):
    pivot, targets = family((300,), (BF16,) * 4)
    assert torch.equal(sce_merge(pivot, targets, **options), pivot)
    assert sce_coefficients(pivot, targets, select_topk=0).tolist() == [0.0] * 3
    targets[1][5] = math.nan
    with pytest.raises(NonFiniteError):
        sce_merge(pivot, targets, **options)


@by_both_passes
@pytest.mark.parametrize(
    "merge", [sce_merge, varm_merge, lambda *args, **kw: varm_merge(*args, granularity="element", **kw)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_weights_of_zero_give_the_pivot(merge, count):
    pivot, targets = family((300,), (F32,) * (1 + count))
    assert torch.equal(merge(pivot, targets, weights=[0.0] * count), pivot)


@pytest.mark.parametrize("count", [compiled.MOST_TARGETS, compiled.MOST_TARGETS + 1])
def test_many_targets(count):
    pivot, targets = family((300,), (BF16,) * (1 + count), seed=26)
    exact, _ = reference_merge.sce(pivot, targets, 0.5)
    assert_promised(sce_merge(pivot, targets, select_topk=0.5), exact, pivot, targets, 0.5)


@by_both_passes
@pytest.mark.parametrize("granularity", kernel.GRANULARITIES)
@pytest.mark.parametrize("dtypes", MIXES, ids=name_of)
def test_varm_is_the_oracle(dtypes, granularity):
    pivot, targets = family((17, 29), dtypes, seed=5)
    weights = [1.0 + index for index in range(len(targets))]
    for given in (None, weights):
        exact, _ = reference_merge.varm(pivot, targets, granularity, given)
        assert_promised(varm_merge(pivot, targets, granularity=granularity, weights=given), exact, pivot, targets)


@by_both_passes
def test_coefficients_follow_task_vectors_however_small():
    for scale in (1e-7, 1e-5, 1e-3):
        pivot, targets = family((200, 50), (F32,) * 4, scales=(0.3 * scale, scale, 3 * scale), magnitude=0.0)
        eta = sce_coefficients(pivot, targets)
        assert eta.tolist() == pytest.approx([0.09 / 10.09, 1 / 10.09, 9 / 10.09], rel=0.05)


@by_both_passes
def test_weights_multiply_the_coefficients():
    pivot, targets = family((400,), (F32,) * 4, seed=6)
    weights = [2.0, 0.0, 0.5]
    exact, eta = reference_merge.sce(pivot, targets, 0.4, weights=weights)
    assert sce_coefficients(pivot, targets, select_topk=0.4, weights=weights).tolist() == pytest.approx(eta, rel=1e-6)
    assert_promised(sce_merge(pivot, targets, select_topk=0.4, weights=weights), exact, pivot, targets, 0.4)
    same = sce_merge(pivot, targets, weights=[3.0, 3.0, 3.0])
    assert torch.allclose(same, sce_merge(pivot, targets), rtol=0, atol=1e-9)


BY_HAND = (
    torch.zeros(4),
    [torch.tensor(t) for t in ([1.0, 1.0, -1.0, 2.0], [1.0, 2.0, -1.0, 1.0], [1.0, -4.0, 3.0, 1.0])],
)


@by_both_passes
@pytest.mark.parametrize("weight", [1e308, 1e-300, 5e-324, 0.1, 7])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-30])
def test_equal_weights_of_any_size_change_nothing(weight, scale):
    pivot, targets = BY_HAND[0], [target * scale for target in BY_HAND[1]]
    for merge in (sce_merge, varm_merge, lambda *a, **kw: varm_merge(*a, granularity="element", **kw)):
        torch.testing.assert_close(
            merge(pivot, targets, weights=[weight] * 3), merge(pivot, targets), rtol=1e-6, atol=0
        )
    eta = sce_coefficients(pivot, targets, weights=[weight] * 3).tolist()
    assert eta == pytest.approx(sce_coefficients(pivot, targets).tolist(), rel=1e-14)


@by_both_passes
@pytest.mark.parametrize("ratio", [1e-30, 1e-45, 1e-52, 1e-75, 1e-99])
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_weights_far_apart_keep_their_meaning(ratio, tau):
    for weights in ([1.0, 1.0, ratio], [ratio, 3 * ratio, 1.0], [ratio * 1e308, 2e210, 1e308]):
        exact, eta = reference_merge.sce(*BY_HAND, tau, weights=[w / max(weights) for w in weights])
        assert sce_coefficients(*BY_HAND, select_topk=tau, weights=weights).tolist() == pytest.approx(eta, rel=1e-12)
        merged = sce_merge(*BY_HAND, select_topk=tau, weights=weights)
        torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=0)
        for granularity in kernel.GRANULARITIES:
            exact, _ = reference_merge.varm(*BY_HAND, granularity, [w / max(weights) for w in weights])
            merged = varm_merge(*BY_HAND, granularity=granularity, weights=weights)
            torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-38)


def test_a_small_weight_by_hand():  # at elements 1 and 2 the third target alone has the majority's sign
    assert sce_merge(*BY_HAND, weights=[1.0, 1.0, 1e-52]).tolist()[1:3] == [-4.0, 3.0]


@by_both_passes
def test_large_squares_of_several_targets_do_not_overflow_their_sum():
    targets = [torch.full((3,), value, dtype=F64) for value in (7e153, -7e153, 6e153)]
    merged = sce_merge(torch.zeros(3, dtype=F64), targets)
    exact, _ = reference_merge.sce(torch.zeros(3, dtype=F64), [target / 1e100 for target in targets])
    torch.testing.assert_close(merged / 1e100, exact)


@by_both_passes
@pytest.mark.parametrize(("tau", "size"), [(0.7, 10), (0.1, 1000), (0.29, 100), (0.5, 3), (0.0005, 1000), (0.333, 999)])
def test_exactly_floor_tau_n_elements_and_ties_by_lowest_index(tau, size):
    pivot = torch.zeros(2 * size)
    step = torch.zeros(2 * size)
    step[::2] = 1.0  # every differing element has the same variance, every other element is equal in all targets
    targets = [step, -step, 5 * torch.ones(2 * size) - 5]
    plan = kernel.sce(pivot, targets, select_topk=tau)
    kept = math.floor(tau * size)
    assert plan.selected * 2 * size == pytest.approx(kept)
    keep, number = choose(pivot, targets, tau)
    expected = torch.zeros(2 * size, dtype=torch.uint8)
    expected[: 2 * kept : 2] = 1
    assert torch.equal(keep, expected)
    assert number == kept


def choose(pivot, targets, tau):
    return selection.select(next(kernel.available_passes(pivot, targets, pivot.dtype)), tau)


@by_both_passes
@pytest.mark.parametrize("arrangement", ["shuffled", "sorted", "ties", "mostly equal", "adversarial", "dead"])
@pytest.mark.parametrize("tau", [0.9, 0.5, 0.1, 0.003])
def test_the_band_finds_what_sorting_finds(monkeypatch, arrangement, tau):
    size = 40_000
    generator = torch.Generator().manual_seed(20)
    values = torch.randn(size, generator=generator).to(BF16)
    if arrangement == "sorted":
        values = values.abs().sort().values
    elif arrangement == "ties":
        values = torch.where(torch.rand(size, generator=generator) < 0.7, 1.0, values.float()).to(BF16)
    elif arrangement == "mostly equal":
        values[torch.rand(size, generator=generator) < 0.97] = 0.0
    elif arrangement == "dead":
        values[::2] *= 1e-30
    places = torch.randint(size, (256,), generator=torch.Generator().manual_seed(0))
    if arrangement == "adversarial":  # the sample sees nothing but the largest
        values[places] = 1e3
    monkeypatch.setattr(selection, "SAMPLE", 256)
    monkeypatch.setattr(selection, "RANKED_AT_ONCE", 1000)
    targets = [values, torch.zeros(size), 3 * values.float()]
    monkeypatch.setattr(selection, "SEARCHED_AT_ONCE", 1024)
    keep, kept = choose(torch.zeros(size), targets, tau)
    exact = reference_merge.selected(reference_merge.task_vectors(torch.zeros(size), targets)[1], tau)
    assert keep.tolist() == exact
    assert kept == math.floor(tau * int(values.count_nonzero()))


@by_both_passes
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_same_bits_on_any_number_of_threads_and_any_chunk_size(monkeypatch, set_threads, dtype, tau):
    pivot, targets = family((150_001,), (dtype,) * 6, seed=8)
    functions = [
        lambda: sce_merge(pivot, targets, select_topk=tau),
        lambda: sce_merge(pivot, targets, select_topk=tau, select_scope="coefficients"),
        lambda: sce_coefficients(pivot, targets, select_topk=tau),
        lambda: varm_merge(pivot, targets),
        lambda: varm_merge(pivot, targets, granularity="element"),
    ]
    expected = [function() for function in functions]
    for count, size in ((1, 1 << 16), (2, 1 << 14), (3, 3 * 1024), (2, 1 << 20), (5, 1 << 15)):
        set_threads(count)
        monkeypatch.setattr(compiled.Compiled, "cpu_chunk", size)
        monkeypatch.setattr(Passes, "cpu_chunk", size)
        for function, first in zip(functions, expected):
            assert torch.equal(function(), first)
        assert torch.get_num_threads() == count


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.003])
def test_operations_for_accelerators_give_the_same(tau):
    pivot, targets = family((150_001,), (BF16, F32, F16, F32), seed=22)
    both = compiled.Compiled(pivot, targets), Passes(pivot, targets)
    keep = selection.select(both[0], tau)[0] if tau < 1 else None
    if tau < 1:
        assert torch.equal(selection.select(both[1], tau)[0], keep)
    eta = both[1].square_sums(keep)
    assert both[0].square_sums(keep).tolist() == pytest.approx(eta.tolist(), rel=1e-6)
    for run in (
        lambda passes, out: passes.erase_and_merge(eta / eta.sum(), keep, out),
        lambda passes, out: passes.varm_matrix(eta / eta.sum(), out),
        lambda passes, out: passes.varm_element([1.0, 2.0, 0.0], out),
    ):
        first, second = (passes.empty(F32) for passes in both)
        run(both[0], first), run(both[1], second)
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_16_bit_number_is_read_and_written_as_pytorch_does(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]

    def through(values, out):  # d = 0: what is written is the pivot as it was read
        passes = compiled.Compiled(values, [values, values])
        passes.varm_matrix(torch.tensor([0.5, 0.5], dtype=F64), written := passes.empty(out))
        return written

    assert torch.equal(through(every, F32), every.float())
    generator = torch.Generator().manual_seed(25)
    powers = torch.randint(-140, 120, (1 << 20,), generator=generator)
    values = torch.randn(1 << 20, generator=generator) * torch.exp2(powers)
    halfway = ((every.double() + torch.nextafter(every, every.new_tensor(0)).double()) / 2).float()
    edge = torch.tensor([65519.99, 65520.0, -65520.0, 0.0])
    values = torch.cat([halfway, torch.nextafter(halfway, torch.tensor(0.0)), edge, values])
    assert torch.equal(through(values, dtype), values.to(dtype))


@by_both_passes
def test_threads_of_the_caller_keep_their_setting(set_threads):
    pivot, targets = family((200_000,), (F32,) * 3)
    set_threads(3)
    sce_merge(pivot, targets)
    assert torch.get_num_threads() == 3
    seen = []
    worker = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    assert seen == [3]


@by_both_passes
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_order_of_the_targets_changes_nothing_but_rounding(tau):
    pivot, targets = family((3000,), (F32,) * 5, seed=9)
    first = sce_merge(pivot, targets, select_topk=tau)
    limit = 8 * ulp(first.double().abs().maximum(pivot.double().abs()), F32)
    decided = ~undecided(pivot, targets, tau)
    for order in itertools.permutations(range(4)):
        again = sce_merge(pivot, [targets[i] for i in order], select_topk=tau)
        assert not (((again - first).abs().double() > limit) & decided).any()


@by_both_passes
def test_scaling_the_task_vectors_scales_the_update():
    _, deltas = family((1000,), (F32,) * 4, seed=10, magnitude=0.0)
    pivot = torch.zeros(1000)
    for tau in (1.0, 0.2):
        update = sce_merge(pivot, deltas, select_topk=tau)
        assert torch.equal(sce_merge(pivot, [d * 2.0**-20 for d in deltas], select_topk=tau), update * 2.0**-20)


@by_both_passes
@pytest.mark.parametrize("magnitude", [2.0**-110, 2.0**-80, 2.0**70, 2.0**110])
@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_magnitudes_whose_squares_leave_float32(magnitude, tau):
    pivot, targets = family((300,), (F32,) * 4, scales=(0.3, 1.0, 3.0), seed=12, magnitude=1.0)
    pivot, targets = pivot * magnitude, [target * magnitude for target in targets]
    exact, eta = reference_merge.sce(pivot, targets, tau)
    assert sce_coefficients(pivot, targets, select_topk=tau).tolist() == pytest.approx(eta, rel=1e-6)
    assert_promised(sce_merge(pivot, targets, select_topk=tau), exact, pivot, targets, tau)
    for granularity in kernel.GRANULARITIES:
        exact, _ = reference_merge.varm(pivot, targets, granularity)
        assert_promised(varm_merge(pivot, targets, granularity=granularity), exact, pivot, targets)


@by_both_passes
@pytest.mark.parametrize("tau", [0.05, 0.5, 0.95])
def test_dead_weights_beside_living_ones_count_as_elements(tau):
    pivot, targets = family((400,), (F32,) * 4, seed=13)
    for index, tensor in enumerate((pivot, *targets)):
        tensor[100:300] = (index % 3) * 1e-30 * torch.arange(1, 201)  # differ, but float32 squares of that vanish
        tensor[300:] = 0.5  # do not differ
    exact, eta = reference_merge.sce(pivot, targets, tau)
    assert kernel.sce(pivot, targets, select_topk=tau).selected == math.floor(tau * 300) / 400
    assert sce_coefficients(pivot, targets, select_topk=tau).tolist() == pytest.approx(eta, rel=1e-6)
    assert_promised(sce_merge(pivot, targets, select_topk=tau), exact, pivot, targets, tau)


@by_both_passes
def test_coefficients_of_very_different_size():
    pivot, targets = family((500,), (F32,) * 3, scales=(1e-12, 1.0), seed=14, magnitude=0.0)
    targets[1][::2] = 0.0
    exact, eta = reference_merge.sce(pivot, targets)
    assert sce_coefficients(pivot, targets).tolist() == pytest.approx(eta, rel=1e-6)
    assert_promised(sce_merge(pivot, targets), exact, pivot, targets)


@by_both_passes
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_target(dtype):
    pivot, targets = family((2000,), (dtype,) * 2, seed=15)
    assert torch.equal(sce_merge(pivot, targets), targets[0])
    assert torch.equal(
        sce_merge(pivot, targets, select_topk=0.9), pivot
    )  # one target: no element differs between targets
    assert torch.equal(sce_merge(pivot, targets, weights=[7.0]), targets[0])
    assert torch.equal(varm_merge(pivot, targets), targets[0])


@by_both_passes
def test_targets_equal_to_the_pivot_give_the_pivot():
    pivot, _ = family((3, 4), (BF16,))
    for targets in ([pivot], [pivot, pivot.clone(), pivot.float()]):
        assert torch.equal(sce_merge(pivot, targets), pivot)
        assert torch.equal(sce_merge(pivot, targets, select_topk=0.5), pivot)
        assert sce_coefficients(pivot, targets).tolist() == [0.0] * len(targets)
        for granularity in kernel.GRANULARITIES:
            assert torch.equal(varm_merge(pivot, targets, granularity=granularity), pivot)


@by_both_passes
def test_a_target_left_at_the_pivot_changes_the_majority_not_the_mean():
    pivot, targets = family((500,), (F32,) * 3, seed=16)
    targets.append(pivot.clone())
    exact, eta = reference_merge.sce(pivot, targets)
    assert eta[2] == 0.0
    assert_promised(sce_merge(pivot, targets), exact, pivot, targets)


@by_both_passes
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0, 2)])
def test_scalars_and_empty_tensors(shape):
    pivot, targets = family(shape, (F32,) * 3, seed=17)
    for tau in (1.0, 0.5):
        merged = sce_merge(pivot, targets, select_topk=tau)
        exact, _ = reference_merge.sce(pivot, targets, tau) if pivot.numel() else (pivot.double(), None)
        assert_promised(merged, exact, pivot, targets, tau)
        assert sce_coefficients(pivot, targets, select_topk=tau).shape == (2,)
    for granularity in kernel.GRANULARITIES:
        assert varm_merge(pivot, targets, granularity=granularity).shape == shape


@by_both_passes
def test_strided_inputs_are_read_and_left_alone():
    pivot, targets = family((40, 30), (F32,) * 4, seed=18)
    expected = sce_merge(pivot.T.contiguous(), [t.T.contiguous() for t in targets], select_topk=0.5)
    before = [t.clone() for t in (pivot, *targets)]
    merged = sce_merge(pivot.T, [t.T for t in targets], select_topk=0.5)
    assert torch.equal(merged, expected)
    assert merged.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, (pivot, *targets)))
    with torch.inference_mode():
        assert torch.equal(sce_merge(pivot.T, [t.T for t in targets], select_topk=0.5), expected)
    pivot.requires_grad_()
    assert not sce_merge(pivot, targets).requires_grad


NOT_FINITE = itertools.product((F32, F16, BF16), (math.nan, math.inf, -math.inf))
PLACES = itertools.cycle([(None, 0.1), (0, 1.0), (2, 0.1), (2, 1.0)])  # among the targets, with a select_topk


@by_both_passes
@pytest.mark.parametrize(("dtype", "value", "place", "tau"), [(*case, *at) for case, at in zip(NOT_FINITE, PLACES)])
def test_nan_and_infinity_are_named(dtype, value, place, tau):
    pivot, targets = family((70_000,), (dtype,) * 4, seed=19)
    (pivot if place is None else targets[place])[69_999] = value
    for function in (lambda: sce_merge(pivot, targets, select_topk=tau), lambda: varm_merge(pivot, targets)):
        with pytest.raises(NonFiniteError, match=r"the pivot|target [02]") as caught:
            function()
        assert caught.value.index == place


@by_both_passes
def test_numbers_whose_sum_leaves_the_storage_dtype_are_finite():
    pivot, targets = family((70_000,), (F16,) * 4, seed=23)  # 70,000 times 2 is beyond float16
    pivot, targets = pivot + 2, [target + 2 for target in targets]
    exact, eta = reference_merge.sce(pivot, targets, 0.3)
    assert sce_coefficients(pivot, targets, select_topk=0.3).tolist() == pytest.approx(eta, rel=1e-6)
    assert_promised(sce_merge(pivot, targets, select_topk=0.3), exact, pivot, targets, 0.3)


def test_squares_beyond_float64_are_an_error_not_the_pivot():
    targets = [torch.full((3,), value, dtype=F64) for value in (1e200, -1e200)]
    for tau in (1.0, 0.5):
        with pytest.raises(ValueError, match="expected squares within float64"):
            sce_merge(torch.zeros(3, dtype=F64), targets, select_topk=tau)


@by_both_passes
def test_the_precision_of_matrix_products_is_not_ours():
    pivot, targets = family((5000,), (F32,) * 4, seed=24)
    functions = [lambda: sce_merge(pivot, targets), lambda: varm_merge(pivot, targets)]
    expected, before = [function() for function in functions], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert all(torch.equal(function(), first) for function, first in zip(functions, expected))
    finally:
        torch.set_float32_matmul_precision(before)


def double(x):
    return 2 * x


def test_compiles_where_nothing_can_be_kept_on_disk(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(directory))
        assert compiled.Loop(double)(3.0) == 6.0


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("left", [0, 30, 200])
def test_a_damaged_cache_is_one_warning(monkeypatch, tmp_path, caplog, suffix, left):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert compiled.Loop(double)(3.0) == 6.0
    for path in tmp_path.rglob(f"*double*.{suffix}"):
        path.write_bytes(path.read_bytes()[:left])
    assert not caplog.text
    for loop in (compiled.Loop(double), compiled.Loop(double)):
        assert [loop(3.0), loop(4), loop(3.0)] == [6.0, 8, 6.0]
    assert caplog.text.count("cannot be used") == 1
    assert str(tmp_path) in caplog.text


def test_a_full_disk_is_one_warning(monkeypatch, tmp_path, caplog):
    def refuse(self, *data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_save_data", refuse)
    assert compiled.Loop(double)(3.0) == 6.0
    assert "No space left on device" in caplog.text


def test_an_error_of_the_call_itself_is_raised():
    with pytest.raises(numba.core.errors.TypingError):
        compiled.Loop(double)({})


def test_without_numba_s_compiler_the_passes_of_torch_serve():
    code = (
        "from tests.test_merge_kernel import *\n"
        "pivot, targets = family((300,), (F32,) * 4)\n"
        "[passes] = kernel.available_passes(pivot, targets, F32); assert type(passes) is Passes\n"
        "exact, _ = reference_merge.sce(pivot, targets, 0.5)\n"
        "assert_promised(sce_merge(pivot, targets, select_topk=0.5), exact, pivot, targets, 0.5)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, check=False)
    assert result.returncode == 0


@by_both_passes
def test_one_target_with_nan_is_named():
    with pytest.raises(NonFiniteError):
        sce_merge(torch.zeros(3), [torch.tensor([0.0, float("nan"), 1.0])])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2), []), {}, "expected at least one tensor, got none"),
        ((torch.zeros(2), [torch.zeros(3)]), {}, r"target 0: expected shape \(2,\) on cpu as the pivot, got \(3,\)"),
        (
            (torch.zeros(2), [torch.zeros(2).to(torch.float8_e4m3fn)]),
            {},
            "target 0: expected float32.*got float8_e4m3fn",
        ),
        ((torch.zeros(2, dtype=torch.int32), [torch.zeros(2)]), {}, "the pivot: expected float32.*got int32"),
        ((torch.zeros(2), [torch.zeros(2)]), {"select_topk": -0.1}, r"expected a number in \[0, 1\], got -0.1"),
        ((torch.zeros(2), [torch.zeros(2)]), {"select_topk": 1.5}, r"expected a number in \[0, 1\], got 1.5"),
        ((torch.zeros(2), [torch.zeros(2)]), {"select_topk": float("nan")}, r"in \[0, 1\], got nan"),
        ((torch.zeros(2), [torch.zeros(2)]), {"select_scope": "some"}, "expected all or coefficients, got 'some'"),
        ((torch.zeros(2), [torch.zeros(2)]), {"weights": [1.0, 2.0]}, "expected 1, got 2"),
        ((torch.zeros(2), [torch.zeros(2)]), {"weights": [-1.0]}, r"expected numbers >= 0, got \[-1.0\]"),
        (
            (torch.zeros(2), [torch.zeros(2)] * 2),
            {"weights": [1.0, math.nan]},
            r"expected numbers >= 0, got \[1.0, nan",
        ),
        (
            (torch.zeros(2), [torch.zeros(2)] * 2),
            {"weights": [1.0, 1e-101]},
            r"expected ratios up to 1e\+100, got \[1.0",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sce_merge(*arguments, **options)


def test_unknown_granularity():
    with pytest.raises(ValueError, match="expected matrix or element, got 'layer'"):
        varm_merge(torch.zeros(2), [torch.zeros(2)], granularity="layer")


def test_a_threshold_at_the_edge_of_the_band_is_not_trusted():
    pivot, targets = family((2000,), (F32,) * 4, seed=21)
    passes = Passes(pivot, targets)
    variances = torch.stack(targets).double().var(0, unbiased=False).sort(descending=True).values * len(targets)
    last, near, far = float(variances[99]), 1 + 1e-13, 1.5
    keep = torch.full((2000,), 2, dtype=torch.uint8)
    for low, high in (
        (last / near, last * far),
        (last / far, last * near),
        (last * near, last * far),
        (0.0, last / far),
    ):
        assert not selection.keep_largest_of_band(passes, keep, 100, low, high)
    assert (keep == 2).all()
    assert selection.keep_largest_of_band(passes, keep, 100, last / far, last * far)
    assert int(keep.sum()) == 100
