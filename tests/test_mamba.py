"""The Mamba-2 mixer against independent implementations: Hugging Face's, and the recurrence itself in fp64."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.blocks import fused, mamba
from nanochat.blocks.mamba import Mamba2, MambaBlock
from nanochat.blocks.ssd import causal_conv, ssd_scan, ssd_step

PATHS = ["torch", "fused"]


@pytest.fixture
def path(request, monkeypatch):
    """Run a test through ssd.py or through fused.py."""
    if request.param == "torch":
        monkeypatch.setattr(fused, "available", lambda *a: False)
    elif fused.library() is None:
        pytest.skip("no C++ compiler here")
    return request.param


both_paths = pytest.mark.parametrize("path", PATHS, indirect=True)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error of a whole tensor; NaN or infinity anywhere is an error of infinity."""
    got, want = got.double(), want.double()
    if not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    return ((got - want).norm() / want.norm()).item()


def make_mixer(seed=0, **kwargs) -> Mamba2:
    """A small mixer whose D and norm weights aren't the trivial ones they start with."""
    torch.manual_seed(seed)
    mixer = Mamba2(**({"d_model": 64, "d_state": 16, "headdim": 16, "chunk_size": 16} | kwargs))
    torch.nn.init.normal_(mixer.D, 1, 0.2)
    torch.nn.init.normal_(mixer.norm.weight, 1, 0.2)
    return mixer


def recurrence(x, dt, A, B, C, D, S):
    """y and S by the definition, one token after the other, in fp64."""
    x, dt, A, B, C, D, S = (t.double() for t in (x, dt, A, B, C, D, S))
    R = x.size(2) // B.size(2)
    B, C = B.repeat_interleave(R, 2), C.repeat_interleave(R, 2)
    ys = []
    for t in range(x.size(1)):
        S = S * (dt[:, t] * A).exp()[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        ys.append((S @ C[:, t, :, :, None]).squeeze(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), S


def scan_inputs(b=2, T=50, H=4, P=8, G=2, N=8, dtype=torch.float32):
    torch.manual_seed(1)
    x, B, C = torch.randn(b, T, H, P), torch.randn(b, T, G, N), torch.randn(b, T, G, N)
    dt, A, D = F.softplus(torch.randn(b, T, H)), -torch.rand(H) * 4, torch.randn(H)
    return x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D, torch.randn(b, H, P, N)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@both_paths
def test_mixer_equals_hugging_face_in_outputs_and_all_gradients(path, dtype, tolerance, groups):
    hf = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = hf.Mamba2Config(
        hidden_size=64,
        state_size=16,
        head_dim=16,
        num_heads=8,
        n_groups=groups,
        expand=2,
        chunk_size=16,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-5,
        use_bias=False,
    )
    ours, theirs = make_mixer(ngroups=groups), hf.Mamba2Mixer(config, 0)
    theirs.load_state_dict(ours.state_dict())  # strict: same names, same shapes
    their_parameters, found = dict(theirs.named_parameters()), {}
    for seed in range(4):  # pooled: dt_bias has 8 gradients, each a sum that may nearly cancel in one draw
        torch.manual_seed(seed)
        u, grad = torch.randn(4, 77, 64).to(dtype), torch.randn(4, 77, 64).to(dtype)
        u1, u2 = u.clone().requires_grad_(), u.float().clone().requires_grad_()  # theirs in fp32 is bf16's truth, too
        ours.zero_grad()
        theirs.zero_grad()
        y1, y2 = ours(u1), theirs(u2)
        y1.backward(grad)
        y2.backward(grad.float())
        pairs = {name: (p.grad, their_parameters[name].grad) for name, p in ours.named_parameters()}
        for name, pair in ({"y": (y1, y2), "u": (u1.grad, u2.grad)} | pairs).items():
            found.setdefault(name, []).append([t.detach().flatten().clone() for t in pair])
    errors = {name: error(*(torch.cat(ts) for ts in zip(*pairs))) for name, pairs in found.items()}
    assert len(errors) == 2 + 8
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("T", [1, 7, 16, 50])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_chunked_scan_equals_the_recurrence(T, dtype, tolerance):
    *inputs, S = scan_inputs(T=T, dtype=dtype)
    want, want_S = recurrence(*inputs, S)
    y, final = ssd_scan(*inputs, chunk_size=16, initial_state=S, return_final_state=True)
    assert y.dtype == dtype and final.dtype == torch.float32
    assert error(y, want) < tolerance and error(final, want_S) < tolerance


def test_scan_gradients_equal_those_of_the_recurrence_also_for_the_initial_state():
    inputs = [t.requires_grad_() for t in scan_inputs(T=21)]
    *most, S = inputs
    y, final = ssd_scan(*most, chunk_size=8, initial_state=S, return_final_state=True)
    want, want_S = recurrence(*most, S)
    g, gS = torch.randn_like(y), torch.randn_like(final)
    got = torch.autograd.grad((y * g).sum() + (final * gS).sum(), inputs)
    want = torch.autograd.grad((want * g).sum() + (want_S * gS).sum(), inputs)
    assert max(map(error, got, want)) < 1e-5


def test_steps_equal_the_chunked_scan():
    *inputs, S = scan_inputs(T=20)
    x, dt, A, B, C, D = inputs
    want, want_S = ssd_scan(*inputs, chunk_size=8, initial_state=S, return_final_state=True)
    ys = []
    with torch.no_grad():
        for t in range(20):
            y, S = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, S)
            ys.append(y)
    assert error(torch.stack(ys, 1), want) < 2e-6 and error(S, want_S) < 2e-6


def test_causal_conv_equals_torchs():
    torch.manual_seed(0)
    x, w, bias, past = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5), torch.randn(2, 3, 5)
    want = F.silu(F.conv1d(torch.cat([past, x], 1).transpose(1, 2), w[:, None], bias, groups=5)).transpose(1, 2)
    assert error(causal_conv(x, w, bias, past), want) < 1e-6
    assert error(causal_conv(x, w, bias), causal_conv(x, w, bias, torch.zeros(2, 3, 5))) == 0


@both_paths
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.integers(1, 20), min_size=1, max_size=6), groups=st.sampled_from([1, 2]))
def test_any_split_of_a_sequence_gives_what_the_whole_gives(path, pieces, groups):
    block = MambaBlock(64, d_state=16, headdim=16, ngroups=groups, chunk_size=8)
    x = torch.randn(2, sum(pieces), 64)
    with torch.no_grad():
        whole = block(x)
        state = block.mixer.allocate_state(2)
        parts = [block(part, state) for part in x.split(pieces, 1)]
    assert error(torch.cat(parts, 1), whole) < 1e-5
    assert state.ssm.dtype == torch.float32 and state.conv.shape == (2, block.mixer.conv_dim, 3)


@both_paths
def test_a_cloned_state_is_a_reusable_prefix(path):
    mixer, u = make_mixer(), torch.randn(1, 30, 64)
    with torch.no_grad():
        state = mixer.allocate_state(1)
        mixer(u[:, :10], state)
        prefix = state.clone()
        first = mixer(u[:, 10:], state)
        for t in range(10, 15):
            mixer(u[:, t : t + 1], prefix.clone())
        again = mixer(u[:, 10:], prefix)
    assert torch.equal(first, again)


def test_gradients_flow_through_a_state():
    mixer, u = make_mixer(), torch.randn(1, 24, 64)
    whole = u.clone().requires_grad_()
    mixer(whole)[:, 10:].sum().backward()
    split = u.clone().requires_grad_()
    state = mixer.allocate_state(1)
    mixer(split[:, :10], state)
    outs = [mixer(split[:, 10:11], state), mixer(split[:, 11:], state)]
    torch.cat(outs, 1).sum().backward()
    assert error(split.grad, whole.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-100.0, -20.0, 20.0, 200.0])
@both_paths
def test_gradients_stay_finite_for_extreme_dt(path, shift, dtype):
    mixer = make_mixer()
    with torch.no_grad():
        mixer.dt_bias.fill_(shift)
    u = torch.randn(2, 40, 64).to(dtype).requires_grad_()
    y = mixer(u)
    y.float().square().sum().backward()
    assert y.isfinite().all() and u.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@both_paths
def test_a_nan_is_not_hidden_and_does_not_reach_earlier_chunks(path):
    mixer, u = make_mixer(), torch.randn(1, 40, 64)
    u[0, 20] = float("nan")
    with torch.no_grad():
        y = mixer(u)
    assert y[0, 20:].isnan().any(-1).all() and y[0, :16].isfinite().all()


@both_paths
def test_the_future_does_not_leak(path):
    mixer, u = make_mixer(), torch.randn(1, 40, 64)
    changed = u.clone()
    changed[:, 25:] += 1
    with torch.no_grad():
        assert torch.equal(mixer(u)[:, :25], mixer(changed)[:, :25])


def test_fused_gradients_do_not_depend_on_threads_or_block_size(monkeypatch):
    if fused.library() is None:
        pytest.skip("no C++ compiler here")
    mixer, u = make_mixer(), torch.randn(3, 70, 64)

    def gradients():
        mixer.zero_grad()
        mixer(u).square().sum().backward()
        return [p.grad.clone() for p in (mixer.A_log, mixer.norm.weight, mixer.conv1d.weight)]

    threads, want = torch.get_num_threads(), gradients()
    monkeypatch.setattr(fused, "BLOCK", 1)
    torch.set_num_threads(1)
    try:
        assert max(map(error, gradients(), want)) < 1e-6
    finally:
        torch.set_num_threads(threads)


def test_without_a_compiler_the_torch_path_serves(tmp_path):
    code = (
        "import torch; from nanochat.blocks import fused; from nanochat.blocks.mamba import Mamba2\n"
        "assert fused.library() is None; print(Mamba2(64, headdim=16)(torch.randn(1, 5, 64)).shape)"
    )
    env = os.environ | {"CXX": str(tmp_path / "no-such-compiler"), "NANOCHAT_BASE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "[1, 5, 64]" in run.stdout, run.stderr


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_fused_norm_equals_torchs(dtype, tolerance):
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 40) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)).to(dtype)
    x1, x2, g = x.clone().requires_grad_(), x.double().requires_grad_(), torch.randn(3, 5, 40).to(dtype)
    y1, y2 = fused.rms_norm(x1), F.rms_norm(x2, (40,), eps=torch.finfo(torch.float32).eps)
    y1.backward(g)
    y2.backward(g.double())
    assert error(y1, y2) < tolerance and error(x1.grad, x2.grad) < tolerance


def test_initialisation_follows_the_paper():
    mixer = Mamba2(256)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert (A >= 1).all() and (A <= 16).all() and (dt >= 0.99e-3).all() and (dt <= 0.101).all()
    with pytest.raises(ValueError, match="headdim"):
        Mamba2(100)


# CUDA kernels, replaced by stand-ins with the signatures of mamba_ssm 2.3 and causal_conv1d 1.6


def kernel_stand_ins(calls: list) -> SimpleNamespace:
    def causal_conv1d_fn(
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        calls.append("conv")
        b, dim, _ = x.shape
        assert weight.shape == (dim, 4) and bias.dtype == weight.dtype and activation == "silu"
        assert x.stride(1) == 1 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0 and dim % 8 == 0
        if initial_states is not None:
            assert initial_states.shape == (b, dim, 3) and initial_states.stride(1) == 1
            assert initial_states.dtype == x.dtype
            initial_states = initial_states.transpose(1, 2)
        return causal_conv(x.transpose(1, 2), weight, bias, initial_states).transpose(1, 2)

    def causal_conv1d_update(
        x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
    ):
        calls.append("conv_update")
        assert x.dim() == 2 and conv_state.shape == (*x.shape, 3) and conv_state.dtype == x.dtype
        out = causal_conv(x[:, None], weight, bias, conv_state.transpose(1, 2))[:, 0]
        conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None]], -1))
        return out

    def mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        z=None,
        dt_bias=None,
        initial_states=None,
        seq_idx=None,
        cu_seqlens=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        return_varlen_states=False,
    ):
        calls.append("scan")
        (b, T, H, P), (G, N) = x.shape, B.shape[2:]
        assert dt.shape == (b, T, H) and A.shape == (H,) and B.shape == C.shape == (b, T, G, N) and D.shape == (H,)
        assert A.dtype == torch.float32 and (A < 0).all() and dt_softplus and dt_bias.shape == (H,) and z is None
        assert initial_states is None or initial_states.shape == (b, H, P, N)
        dt = F.softplus(dt.float() + dt_bias)
        return ssd_scan(x, dt, A, B, C, D, 16, initial_states, return_final_states)

    def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
        calls.append("step")
        (b, H, P, N), G = state.shape, B.shape[1]
        assert x.shape == dt.shape == (b, H, P) and A.shape == (H, P, N) and B.shape == C.shape == (b, G, N)
        assert D.shape == dt_bias.shape == (H, P) and state.dtype == A.dtype == torch.float32 and dt_softplus
        assert dt.stride(-1) == 0 and A.stride()[1:] == (0, 0) and dt_bias.stride(-1) == 0  # its one-scalar-a-head path
        dt = F.softplus(dt[..., 0].float() + dt_bias[:, 0])
        y, new = ssd_step(x, dt, A[:, 0, 0], B, C, D[:, 0], state.clone())
        state.copy_(new)
        return y

    return SimpleNamespace(**{k: v for k, v in locals().items() if callable(v)})


@pytest.mark.parametrize("headdim", [16, 64])  # 8 heads: in_proj's rows are multiples of 8; 2 heads: they aren't
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_cuda_kernels_are_called_as_their_signatures_demand(monkeypatch, dtype, tolerance, headdim):
    mixer, u, calls = make_mixer(headdim=headdim), torch.randn(2, 40, 64).to(dtype), []
    want = mixer(u)
    monkeypatch.setattr(fused, "available", lambda *a: False)
    monkeypatch.setattr(mamba, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(mamba, "_kernels", lambda: kernel_stand_ins(calls))
    assert error(mixer(u), want) < tolerance and calls == ["conv", "scan"]
    state = mixer.allocate_state(2, dtype=dtype)
    with torch.no_grad():
        parts = [mixer(part, state) for part in u.split([2, 1, 20, 1, 1, 15], 1)]
    assert error(torch.cat(parts, 1), want) < tolerance
    assert calls[2:] == ["conv", "scan", "conv_update", "step", "conv", "scan"] + ["conv_update", "step"] * 2 + [
        "conv",
        "scan",
    ]
