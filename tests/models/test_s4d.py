"""One parameter set, three computations, and the authors' numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from s4mil_monai.models.s4d import BLOCK, S4D, SCAN_GROUP, convolve_blocks, powers

LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 500, BLOCK * SCAN_GROUP, BLOCK * SCAN_GROUP + 1, 5000]


def layer(width: int = 6, state_dim: int = 8, **options) -> S4D:
    torch.manual_seed(0)
    return S4D(width, state_dim=state_dim, **options)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("length", LENGTHS)
def test_convolution_recurrence_and_blocks_agree(length, discretization):
    s4d, u = layer(discretization=discretization), torch.randn(2, length, 6)
    recurrence = s4d.convolve(u, computation="recurrence")
    assert relative(s4d.convolve(u, computation="blocks"), recurrence) < 1e-5
    assert relative(s4d.convolve(u, computation="fft"), recurrence) < 1e-5


@pytest.mark.parametrize("length", [1, 65, 2500])
def test_gradients_of_convolution_recurrence_and_blocks_agree(length):
    u = torch.randn(1, length, 6)
    weights = torch.randn(1, length, 6)
    found = {}
    for computation in ("recurrence", "blocks", "fft"):
        s4d = layer()
        (s4d.convolve(u, computation=computation) * weights).sum().backward()
        found[computation] = {name: p.grad for name, p in s4d.named_parameters() if p.grad is not None}
    assert set(found["blocks"]) == {"log_dt", "log_A_real", "A_imag", "C", "D"}
    for name, wanted in found["recurrence"].items():
        for computation in ("blocks", "fft"):
            assert relative(found[computation][name], wanted) < 1e-5, (name, computation)


def test_kernel_is_its_definition():
    """K_l = 2 Re Σ_n C_n (dA_n - 1) / A_n dA_n^l, written out in float64."""
    s4d = layer()
    A = torch.complex(-s4d.log_A_real.double().exp(), s4d.A_imag.double())
    dA = (A * s4d.log_dt.double().exp()[:, None]).exp()
    C = torch.view_as_complex(s4d.C.double().contiguous())
    wanted = torch.stack([2 * (C * (dA - 1) / A * dA**step).sum(1).real for step in range(300)], 1)
    assert relative(s4d.kernel(300).double(), wanted) < 1e-6


def test_kernel_agrees_with_the_authors_code(shared):
    with safe_open(shared / "reference/s4d_kernel.safetensors", "pt") as file:
        width, modes = file.get_tensor("log_A_real").shape
        s4d = S4D(width, state_dim=2 * modes)
        parameters = {name: file.get_tensor(name) for name in ("log_dt", "log_A_real", "A_imag", "C")}
        s4d.load_state_dict(parameters, strict=False)
        assert relative(s4d.kernel(200), file.get_tensor("expected.kernel")) < 1e-6


def test_a_patch_never_changes_what_came_before_it():
    s4d = layer()
    u = torch.randn(1, 200, 6)
    changed = u.clone()
    changed[:, 130] += 1
    before, after = s4d(u), s4d(changed)
    assert torch.equal(before[:, :128], after[:, :128])  # the block of the change starts at 128
    torch.testing.assert_close(before[:, :130], after[:, :130], atol=1e-6, rtol=0)
    assert (before[:, 130:] - after[:, 130:]).abs().max() > 0.1


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 700), st.sampled_from([2, 4, 16, 32]), st.integers(1, 3))
def test_blocks_agree_with_convolution_for_any_length_state_and_batch(length, state_dim, batch):
    s4d, u = layer(3, state_dim), torch.randn(batch, length, 3)
    assert relative(s4d.convolve(u, computation="blocks"), s4d.convolve(u, computation="fft")) < 1e-5


def test_kernel_of_a_long_bag_never_holds_every_mode_at_every_length():
    """(H, N/2, L) complex128 would be 64 x 16 x 40,000 x 16 bytes = 655 MB here."""
    s4d = S4D(64, state_dim=32)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        s4d.kernel(40_000)
    assert max(event.cpu_memory_usage for event in profile.events()) < 66e6


def test_longest_sequence_agrees_in_all_three_computations():
    s4d, u = layer(2, 4), torch.randn(1, 100_000, 2)
    with torch.inference_mode():
        recurrence = s4d.convolve(u, computation="recurrence")
        assert relative(s4d.convolve(u, computation="blocks"), recurrence) < 1e-5
        assert relative(s4d.convolve(u, computation="fft"), recurrence) < 1e-5


def test_pieces_with_the_state_between_them_are_the_whole():
    s4d, u = layer(), torch.randn(2, 4 * BLOCK + 11, 6)
    constants = s4d.block_constants()
    state, pieces = None, []
    for start, stop in ((0, BLOCK), (BLOCK, 3 * BLOCK), (3 * BLOCK, 4 * BLOCK + 11)):
        piece, state = convolve_blocks(u[:, start:stop], constants, state)
        pieces.append(piece)
    assert relative(torch.cat(pieces, 1), s4d.convolve(u, computation="recurrence")) < 1e-5


def test_powers_by_doubling_are_powers():
    base = torch.polar(torch.tensor([0.999, 0.7]).double(), torch.tensor([0.3, 2.0]).double())
    wanted = torch.stack([base**step for step in range(77)], -1)
    assert (powers(base, 77) - wanted).abs().max() < 1e-13


@pytest.mark.parametrize("state_dim", [0, 1, 7, -2])
def test_odd_state_is_refused(state_dim):
    with pytest.raises(ValueError, match="even and positive"):
        S4D(4, state_dim=state_dim)
