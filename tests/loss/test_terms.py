"""The terms of the objective: the dense formula is the literature's, the slopes are its derivative,
and what a run shows and logs follows from the settings.
"""

from dataclasses import fields

import pytest
import torch
from torch.nn import functional

from bigmix.loss.terms import (
    METRIC_KEYS,
    GroupSums,
    LogitRule,
    LossTerms,
    Statistic,
    dense_loss,
    logged_statistics,
    logit_slopes,
    shown_terms,
    terms_of,
)
from bigmix.recipe.sections import Loss

NUM_TOKENS, NUM_REFERENCE_TOKENS, VOCABULARY_SIZE = 9, 4, 31
DRAW = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


LOGITS, REFERENCE_LOGITS = (
    normal(NUM_TOKENS, VOCABULARY_SIZE) * 3,
    normal(NUM_REFERENCE_TOKENS, VOCABULARY_SIZE) * 3,
)
LABELS = torch.randint(VOCABULARY_SIZE, (NUM_TOKENS,), generator=DRAW)
COEFFICIENTS = torch.rand(NUM_TOKENS, generator=DRAW, dtype=torch.float64)
KL_COEFFICIENTS = torch.rand(NUM_REFERENCE_TOKENS, generator=DRAW, dtype=torch.float64)
REFERENCE = {
    "reference_logits_KV": REFERENCE_LOGITS,
    "reference_coefficients_K": KL_COEFFICIENTS,
}
SETTINGS = [
    LossTerms(),
    LossTerms(label_smoothing=0.1),
    LossTerms(z_loss=0.01),
    LossTerms(label_smoothing=0.3, z_loss=1e-3, entropy=True),
]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_dense_loss_with_smoothing_is_torchs_cross_entropy(smoothing):
    found = dense_loss(LOGITS, LABELS, COEFFICIENTS, LossTerms(label_smoothing=smoothing))
    expected = functional.cross_entropy(LOGITS, LABELS, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found.objective_N, COEFFICIENTS * expected)
    nll = functional.cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(found.statistics_NM[:, Statistic.NLL], nll)


def test_the_z_loss_is_the_squared_log_of_the_sum_of_exponentials():
    plain, with_z = (
        dense_loss(LOGITS, LABELS, COEFFICIENTS, LossTerms(z_loss=z)) for z in (0.0, 0.5)
    )
    z = LOGITS.exp().sum(1).log().square()
    torch.testing.assert_close(with_z.objective_N - plain.objective_N, COEFFICIENTS * 0.5 * z)
    torch.testing.assert_close(plain.statistics_NM[:, Statistic.Z], z)


def test_the_divergence_is_torchs_kl_of_the_first_tokens_and_zero_for_the_others():
    found = dense_loss(LOGITS, LABELS, torch.zeros_like(COEFFICIENTS), LossTerms(), **REFERENCE)
    kl = functional.kl_div(
        LOGITS[:NUM_REFERENCE_TOKENS].log_softmax(1),
        REFERENCE_LOGITS.log_softmax(1),
        log_target=True,
        reduction="none",
    ).sum(1)
    torch.testing.assert_close(found.objective_N[:NUM_REFERENCE_TOKENS], KL_COEFFICIENTS * kl)
    torch.testing.assert_close(found.statistics_NM[:NUM_REFERENCE_TOKENS, Statistic.KL], kl)
    assert not found.objective_N[NUM_REFERENCE_TOKENS:].any()
    assert not found.statistics_NM[NUM_REFERENCE_TOKENS:, Statistic.KL].any()


def test_the_other_statistics_are_counts_hits_and_the_entropy_where_it_is_wanted():
    found = dense_loss(LOGITS, LABELS, COEFFICIENTS, LossTerms(entropy=True)).statistics_NM
    distribution = torch.distributions.Categorical(logits=LOGITS)
    torch.testing.assert_close(found[:, Statistic.ENTROPY], distribution.entropy())
    assert found[:, Statistic.TOKENS].tolist() == [1.0] * NUM_TOKENS
    assert found[:, Statistic.HITS].tolist() == (LOGITS.argmax(1) == LABELS).double().tolist()
    without = dense_loss(LOGITS, LABELS, COEFFICIENTS, LossTerms()).statistics_NM
    assert not without[:, Statistic.ENTROPY].any()


@pytest.mark.parametrize("terms", SETTINGS)
@pytest.mark.parametrize("reference", [{}, REFERENCE])
def test_the_slopes_are_the_derivative_of_the_dense_loss(terms, reference):
    logits = LOGITS.clone().requires_grad_()
    dense_loss(logits, LABELS, COEFFICIENTS, terms, **reference).objective_N.sum().backward()
    slopes = logit_slopes(
        COEFFICIENTS,
        LOGITS.logsumexp(1),
        terms,
        vocabulary_size=VOCABULARY_SIZE,
        reference_coefficients_K=reference.get("reference_coefficients_K"),
    )
    one_hot = functional.one_hot(LABELS, VOCABULARY_SIZE)
    found = slopes.of_p_N[:, None] * LOGITS.softmax(1) - slopes.of_label_N[:, None] * one_hot
    if slopes.of_all_N is not None:
        found -= slopes.of_all_N[:, None]
    if reference:
        found[:NUM_REFERENCE_TOKENS] -= KL_COEFFICIENTS[:, None] * REFERENCE_LOGITS.softmax(1)
    torch.testing.assert_close(found, logits.grad)


def test_a_rule_scales_outputs_and_bends_them_towards_its_cap():
    outputs = torch.tensor([[0.0, 1.0, -2.0, 1e6]], dtype=torch.float64)
    assert torch.equal(LogitRule().logits(outputs), outputs)
    capped = LogitRule(scale=0.5, softcap=4.0).logits(outputs)
    torch.testing.assert_close(capped, 4 * torch.tanh(outputs / 8))


def test_every_term_has_a_setting_of_its_name_with_the_same_default():
    settings = Loss()
    assert terms_of(settings.model_dump()) == LossTerms()
    assert {term.name for term in fields(LossTerms)} <= set(Loss.model_fields)
    given = Loss(label_smoothing=0.1, z_loss=1e-4, entropy=True, chunk_mib=64)
    expected = LossTerms(label_smoothing=0.1, z_loss=1e-4, entropy=True)
    assert terms_of(given.model_dump()) == expected


def test_a_header_shows_the_terms_of_the_objective_that_are_not_at_their_default():
    assert shown_terms(LossTerms(entropy=True)) == {}
    shown = shown_terms(LossTerms(label_smoothing=0.1, z_loss=1e-4, entropy=True))
    assert list(shown.items()) == [("label smoothing", 0.1), ("z-loss", 1e-4)]


def test_what_is_logged_follows_from_the_terms_and_the_reference():
    always = {"loss": Statistic.NLL, "accuracy": Statistic.HITS}
    smoothed = LossTerms(label_smoothing=0.1)
    assert logged_statistics(smoothed, has_reference=False) == always
    every = LossTerms(z_loss=1e-4, entropy=True)
    found = logged_statistics(every, has_reference=True)
    assert list(found) == ["loss", "accuracy", "z", "entropy", "kl"]
    assert found == {METRIC_KEYS[statistic]: statistic for statistic in found.values()}


def test_the_sums_of_a_group_have_a_name_for_each_statistic():
    sums = GroupSums.of(torch.arange(2.0 * len(Statistic)).view(2, -1))
    assert [field.name for field in fields(GroupSums)] == [
        f"{statistic.name.lower()}_G" for statistic in Statistic
    ]
    assert sums.tokens_G.tolist() == [0.0, 6.0] and sums.kl_G.tolist() == [5.0, 11.0]
