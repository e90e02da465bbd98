"""What packing makes of weights, against their definitions written down here once more."""

from __future__ import annotations

import pytest
import torch

from mambakit.generation.engine.weights import FORMS, pack, packed_size, rounded, rounded_activations

SIZES = [(1, 1), (32, 64), (33, 65), (31, 63), (97, 200), (5, 1)]


def matrix(rows: int, columns: int) -> torch.Tensor:
    """Rows of different sizes, one of them zero, with an outlier."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-3, 3, rows)[:, None]
    weight[rows // 2, columns // 2] *= 20
    weight[rows - 1] *= rows == 1
    return weight


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float32_and_bfloat16_are_those_numbers(size):
    weight = matrix(*size)
    assert torch.equal(rounded(weight, "float32"), weight)
    assert torch.equal(rounded(weight, "bfloat16"), weight.bfloat16().float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weights_in_bfloat16_are_packed_like_the_same_numbers_in_float32(form, size):
    weight = matrix(*size).bfloat16()
    assert torch.equal(rounded(weight, form), rounded(weight.float(), form))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_is_the_nearest_multiple_of_a_127th_of_the_rows_largest(size):
    weight = matrix(*size)
    scale = weight.abs().amax(1, keepdim=True) / 127
    wanted = torch.where(scale > 0, (weight / scale).round() * scale, 0)
    found = rounded(weight, "int8")
    off = (found - wanted).abs()
    # A number half way between two multiples may go to either.
    assert (off <= 1.0001 * scale).all()
    assert (off > 1e-5 * scale).float().mean() < 1e-3
    torch.testing.assert_close(found.abs().amax(1), weight.abs().amax(1))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int4_is_multiples_of_a_bfloat16_from_minus_8_to_7(size):
    weight, found = matrix(*size), rounded(matrix(*size), "int4")
    for row, approximation in zip(weight, found, strict=True):
        for group, numbers in zip(row.split(64), approximation.split(64), strict=True):
            extreme = group[group.abs().argmax()]
            # Some scale no further from a group's own than the shrinking goes.
            scales = [(extreme * (s / -8)).bfloat16().float() for s in (1, 0.95, 0.9, 0.85, 0.8, 0.75)]
            candidates = [(group / s).round().clamp(-8, 7) * s if s else group * 0 for s in scales]
            errors = torch.stack([(c - group).square().sum() for c in candidates])
            assert min((c - numbers).abs().max() for c in candidates) <= 1e-5 * extreme.abs()
            assert (numbers - group).square().sum() <= errors.min() * (1 + 1e-5)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_weight_that_is_not_a_number_spoils_what_shares_its_scale(form):
    weight = torch.randn(4, 128)
    weight[2, 70] = torch.nan
    broken = rounded(weight, form).isnan()
    assert broken[2, 64:].all()
    assert not broken[[0, 1, 3]].any()
    assert broken[2, :64].all() == (form == "int8")


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_makes_no_difference(form):
    weight, packed, before = matrix(97, 200), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            into = torch.full((packed_size(97, 200, form),), 99, dtype=torch.uint8)
            pack(weight, form, into)
            packed.append(into)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*packed)


def test_rounded_activations_are_within_half_a_254th_of_their_groups_largest():
    x = torch.randn(5, 150) * torch.logspace(-2, 2, 150)
    x[2] = 0
    off = (rounded_activations(x) - x).abs()
    for columns in (slice(64), slice(64, 128), slice(128, 150)):
        most = x[:, columns].abs().amax(1, keepdim=True)
        assert (off[:, columns] <= most / 254 * 1.0001).all()
