"""The GPU kernel gives what the torch backend gives, and what autograd gives in fp64.

Without a GPU it runs in triton's interpreter (see conftest), which shows neither races nor the use
of registers; with one, it is compiled for it.
"""

from functools import partial

import pytest
import torch

from bigmix.loss.fused import LossBackendOptions, mixed_loss
from bigmix.loss.requests import (
    LSE,
    NUM_COLUMNS,
    OBJECTIVE,
    REFERENCE_LSE,
    STATISTICS,
    ChunkTask,
    ReferenceTask,
    column_of,
)
from bigmix.loss.terms import (
    LogitRule,
    LossTerms,
    LossTokens,
    ReferenceStates,
    Statistic,
    dense_loss,
)
from bigmix.loss.torch_kernel import torch_backend

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bigmix.loss import triton_kernel as kernels  # noqa: E402
from bigmix.loss.triton_kernel import triton_backend  # noqa: E402

# The interpreter also computes values that are not used, behind the vocabulary's end and by the
# formula that is not chosen; these may overflow.
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN, CAPPED = LogitRule(), LogitRule(scale=0.5, softcap=4.0)
ALL_TERMS = LossTerms(label_smoothing=0.1, z_loss=1e-3, entropy=True)
# The interpreter truncates fp32 to bf16 where a GPU rounds: errors are up to a whole step, not half
# of one.
ROUNDING = {
    torch.float32: 1e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 8e-3 if DEVICE == "cpu" else 4e-3,
}

CASES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"rule": LogitRule(scale=0.25)},
    "softcap": {"rule": LogitRule(softcap=3.0)},
    "bias, scale and softcap": {"bias": True, "rule": CAPPED},
    "smoothing": {"terms": LossTerms(label_smoothing=0.2)},
    "z-loss": {"terms": LossTerms(z_loss=1e-2)},
    "entropy": {"terms": LossTerms(entropy=True)},
    "reference": {"reference": PLAIN},
    "reference with a rule": {"reference": CAPPED},
    "all": {"bias": True, "rule": CAPPED, "terms": ALL_TERMS, "reference": LogitRule(softcap=3.0)},
}
# Vocabulary and block: less than one block, exactly one, several whole ones, several and a
# fraction.
SHAPES = [
    (1, None),
    (2, None),
    (31, None),
    (1000, None),
    (1024, None),
    (1024, 256),
    (1000, 128),
    (4097, 1024),
]


def chunk(
    *,
    num_tokens=5,
    vocabulary_size=1000,
    dtype=torch.float32,
    gradient="in place",
    bias=False,
    rule=PLAIN,
    terms=None,
    reference=None,
    spread=3.0,
    seed=0,
):
    """The same task for the same arguments; made for each call, as a backend overwrites it."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(DEVICE)

    outputs = (normal(num_tokens, vocabulary_size) * spread).to(dtype)
    gradients = {
        "in place": outputs,
        "elsewhere": torch.full_like(outputs, 7),
        "narrow": outputs.view(torch.bfloat16)[:, :vocabulary_size]
        if dtype == torch.float32
        else None,
        "none": None,
    }
    return ChunkTask(
        outputs_CV=outputs,
        gradient_CV=gradients[gradient],
        bias_V=normal(vocabulary_size) if bias else None,
        labels_C=torch.randint(vocabulary_size, (num_tokens,), generator=draw).to(DEVICE),
        coefficients_C=torch.rand(num_tokens, generator=draw).to(DEVICE),
        rule=rule,
        terms=terms or LossTerms(),
        reference=reference
        and ReferenceTask(
            outputs_CV=(normal(num_tokens, vocabulary_size) * spread).to(dtype),
            bias_V=normal(vocabulary_size).to(dtype) if bias else None,
            rule=reference,
            coefficients_C=torch.rand(num_tokens, generator=draw).to(DEVICE),
        ),
    )


def logits_of(outputs, task):
    return task.rule.logits(outputs if task.bias_V is None else outputs + task.bias_V.double())


def dense(task):
    """The slow obvious way, in fp64: the columns of each token, and d objective / d outputs by
    autograd.
    """
    outputs = task.outputs_CV.double().requires_grad_()
    logits = logits_of(outputs, task)
    columns = torch.zeros(len(logits), NUM_COLUMNS, dtype=torch.float64, device=logits.device)
    reference = {}
    if task.reference is not None:
        reference_logits = logits_of(task.reference.outputs_CV.double(), task.reference)
        reference = {
            "reference_logits_KV": reference_logits,
            "reference_coefficients_K": task.reference.coefficients_C,
        }
        columns[:, REFERENCE_LSE] = reference_logits.logsumexp(1)
    found = dense_loss(logits, task.labels_C, task.coefficients_C, task.terms, **reference)
    found.objective_N.sum().backward()
    columns[:, OBJECTIVE] = found.objective_N.detach()
    columns[:, STATISTICS] = found.statistics_NM
    columns[:, LSE] = logits.logsumexp(1).detach()
    return columns, outputs.grad


def error(found, expected, size=None):
    """Root mean square, relative to that of the expected values or of `size`."""
    size = expected if size is None else size
    return float((found.double() - expected.double()).norm() / size.double().norm())


def check(block, **case):
    """Compare the kernel's columns and gradient with the dense ones and with those by torch.

    Nothing else may be overwritten.
    """
    expected, gradient = dense(chunk(**case))
    by_torch, task = chunk(**case), chunk(**case)
    columns_by_torch, columns = torch_backend(by_torch), triton_backend(task, block=block)
    assert columns.shape == expected.shape and columns.dtype == torch.float32
    torch.testing.assert_close(columns.double(), expected, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(columns, columns_by_torch, rtol=4e-6, atol=2e-5)
    if task.gradient_CV is None:
        assert torch.equal(task.outputs_CV, chunk(**case).outputs_CV)
        return
    rounding = ROUNDING[task.gradient_CV.dtype]
    # Where V = 1 all but the z-loss cancels out, and what is left of the coefficients is their
    # rounding.
    size = gradient if task.gradient_CV.shape[1] > 1 else task.coefficients_C
    assert error(task.gradient_CV, gradient, size) < rounding
    assert error(task.gradient_CV, by_torch.gradient_CV, size) < 2 * rounding
    torch.testing.assert_close(
        task.gradient_CV.double(), gradient, rtol=2 * rounding, atol=max(1e-6, 1e-2 * rounding)
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [None, 256])
def test_each_part_of_the_objective_equals_autograd_in_fp64(name, block):
    check(block, **CASES[name])


@pytest.mark.parametrize(("vocabulary", "block"), SHAPES)
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "all"])
def test_vocabularies_of_any_size_in_any_number_of_blocks(name, vocabulary, block):
    check(block, vocabulary_size=vocabulary, **CASES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [None, 256])
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "all"])
def test_narrow_logits_lose_no_more_than_the_rounding_of_their_gradient(name, block, dtype):
    check(block, dtype=dtype, **CASES[name])


@pytest.mark.parametrize(("vocabulary", "block"), SHAPES)
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "all"])
def test_a_narrow_gradient_may_lie_in_the_storage_of_wide_logits(name, vocabulary, block):
    check(block, vocabulary_size=vocabulary, gradient="narrow", **CASES[name])


@pytest.mark.parametrize("gradient", ["none", "elsewhere"])
@pytest.mark.parametrize("block", [None, 256])
@pytest.mark.parametrize("name", ["plain", "reference", "all"])
def test_the_gradient_may_lie_elsewhere_or_not_be_wanted(name, block, gradient):
    check(block, gradient=gradient, **CASES[name])


@pytest.mark.parametrize("block", [None, 256])
def test_one_token_is_a_chunk_and_none_is_one(block):
    check(block, num_tokens=1, **CASES["all"])
    assert triton_backend(chunk(num_tokens=0)).shape == (0, NUM_COLUMNS)


@pytest.mark.parametrize("block", [None, 256])
def test_the_logits_of_tokens_may_lie_apart(block):
    wide = torch.full((5, 1100), 7.0, device=DEVICE)
    task, expected = chunk(), chunk()
    wide[:, :1000] = task.outputs_CV
    part = wide[:, :1000]
    strided = ChunkTask(
        outputs_CV=part,
        gradient_CV=part,
        bias_V=None,
        labels_C=task.labels_C,
        coefficients_C=task.coefficients_C,
        rule=PLAIN,
        terms=LossTerms(),
        reference=None,
    )
    triton_backend(strided, block=block)
    triton_backend(expected, block=block)
    assert torch.equal(part, expected.gradient_CV) and (wide[:, 1000:] == 7).all()


@pytest.mark.parametrize("block", [None, 256])
def test_extreme_logits_are_as_right_as_others(block):
    case = {"terms": ALL_TERMS, "reference": PLAIN}
    tasks = chunk(**case), chunk(**case)
    for task in tasks:
        for outputs in (task.outputs_CV, task.reference.outputs_CV):
            outputs.copy_(outputs.sign() * 1e4)
        task.outputs_CV[0, :500] = 0
    expected, gradient = dense(tasks[0])
    columns = triton_backend(tasks[1], block=block)
    torch.testing.assert_close(columns.double(), expected, rtol=2e-6, atol=2e-6)
    assert error(tasks[1].gradient_CV, gradient) < 1e-6


@pytest.mark.parametrize("block", [None, 128])
def test_of_equal_logits_the_first_is_the_likeliest(block):
    for indices in ([5, 133, 700], [700, 900], [130, 129, 3 * 128 + 1], range(0, 1000, 90)):
        task = chunk(num_tokens=len(indices), gradient="none", terms=LossTerms())
        task.outputs_CV[:, list(indices)] = 100.0
        task.labels_C.copy_(torch.tensor(list(indices)))
        hits = triton_backend(task, block=block)[:, column_of(Statistic.HITS)]
        assert hits.tolist() == [float(index == min(indices)) for index in indices]


@pytest.mark.parametrize("block", [None, 256])
@pytest.mark.parametrize("gradient", ["in place", "narrow"])
def test_a_coefficient_of_zero_gives_a_gradient_of_exactly_zero(gradient, block):
    task = chunk(gradient=gradient, **CASES["all"])
    task.coefficients_C[1:3] = 0
    task.reference.coefficients_C[1:4] = 0
    columns = triton_backend(task, block=block)
    assert not task.gradient_CV[1:3].any() and not columns[1:3, OBJECTIVE].any()
    assert task.gradient_CV[[0, 3, 4]].any(1).all()


@pytest.mark.parametrize("block", [None, 256])
def test_two_runs_give_the_same_bits(block):
    one, two = (chunk(gradient="narrow", **CASES["all"]) for _ in range(2))
    assert torch.equal(triton_backend(one, block=block), triton_backend(two, block=block))
    assert torch.equal(one.gradient_CV, two.gradient_CV)


@pytest.mark.parametrize("block", [None, 256])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_logit_that_is_no_number_is_seen_in_the_objective_of_its_token_alone(bad, block):
    task = chunk(gradient="none")
    task.outputs_CV[2, 700] = bad
    finite = triton_backend(task, block=block)[:, OBJECTIVE].isfinite()
    assert finite.tolist() == [True, True, False, True, True]


@triton.jit
def tanh_of(inputs, outputs, COUNT: tl.constexpr):
    indices = tl.arange(0, COUNT)
    tl.store(outputs + indices, kernels._tanh(tl.load(inputs + indices)))


def test_tanh_is_right_relative_to_its_value():
    sizes = torch.logspace(-12, 5, 1024)
    for inputs in (sizes.to(DEVICE), -sizes.to(DEVICE), torch.linspace(-2, 2, 1024).to(DEVICE)):
        outputs = torch.empty_like(inputs)
        tanh_of[(1,)](inputs, outputs, 1024)
        torch.testing.assert_close(outputs.double(), inputs.double().tanh(), rtol=4e-7, atol=0)


def test_the_loss_is_the_same_by_both_backends():
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(DEVICE)

    hidden, head, bias = normal(30, 24), normal(101, 24), normal(101)
    tokens = LossTokens(
        positions_N=torch.randperm(30, generator=draw)[:24].to(DEVICE),
        labels_N=torch.randint(101, (24,), generator=draw).to(DEVICE),
        groups_N=torch.randint(3, (24,), generator=draw).to(DEVICE),
        coefficients_N=torch.rand(24, generator=draw).to(DEVICE),
        num_groups=3,
    )
    reference = ReferenceStates(
        hidden_KD=normal(10, 16),
        head_VD=normal(101, 16),
        bias_V=None,
        rule=PLAIN,
        coefficients_K=torch.rand(10, generator=draw).to(DEVICE),
    )
    results = []
    for backend in (torch_backend, triton_backend, partial(triton_backend, block=32)):
        leaves = [t.clone().requires_grad_() for t in (hidden, head, bias)]
        value, sums = mixed_loss(
            *leaves,
            tokens,
            rule=CAPPED,
            terms=ALL_TERMS,
            reference=reference,
            options=LossBackendOptions(backend=backend, chunk_bytes=16 * 4 * 101),
        )
        value.backward()
        results.append([value.detach(), sums, *(leaf.grad for leaf in leaves)])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-5)
            assert error(one, other) < 1e-6
