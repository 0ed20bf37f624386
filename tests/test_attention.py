"""Training kernels of the transformer block: against plain fp32 mathematics, and the model with them and without."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.blocks import attention
from nanochat.blocks.transformer import norm, rope_table, rotate
from nanochat.gpt import GPT, GPTConfig, head_loss

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels():
    if attention.library() is None:
        pytest.skip("no C++ compiler: PyTorch does it")


@pytest.fixture
def without_kernels(monkeypatch):
    """A function after which the block runs in PyTorch, as with NANOCHAT_FUSED=0."""
    return lambda: monkeypatch.setattr(attention, "usable", lambda x: False)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| relative to |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def attend_plainly(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, H: int, sdpa: bool = False) -> torch.Tensor:
    """What `attention.attend` computes, an operation at a time."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // H
    q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    q, k = (F.rms_norm(rotate(x, cos, sin), (D,), eps=attention.EPS) for x in (q, k))
    if sdpa:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    else:
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = (q @ k.mT / D**0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return y.transpose(1, 2).reshape(B, T, -1)


def gradients(function, qkv, angles, H, g):
    """The output and the gradients of q, k and v's parts of qkv."""
    x = qkv.clone().requires_grad_()
    y = function(x, *angles, H)
    y.backward(g)
    return y.detach(), *x.grad.chunk(3, -1)


@pytest.mark.parametrize("own", [True, False], ids=["matrix units", "library products"])
@pytest.mark.parametrize("B, T, H, D", [(1, 1, 2, 64), (2, 7, 3, 64), (1, 64, 1, 64), (3, 100, 2, 32), (1, 513, 2, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_and_its_gradients_are_those_of_a_softmax(B, T, H, D, dtype, own, monkeypatch):
    if not own:
        monkeypatch.setattr(attention, "_amx", lambda: False)
        monkeypatch.setattr(attention, "CACHE", 64 * T * H)  # several blocks
    torch.manual_seed(0)
    qkv, g = torch.randn(B, T, 3 * H * D).to(dtype), torch.randn(B, T, H * D).to(dtype)
    angles = [x.to(dtype) for x in rope_table(T, D, 10000.0, qkv.device)]
    got = gradients(attention.attend, qkv, angles, H, g)
    want = gradients(attend_plainly, qkv.double(), [x.double() for x in angles], H, g.double())
    torchs = gradients(lambda *args: attend_plainly(*args, sdpa=True), qkv, angles, H, g)
    names = ("output", "dq", "dk", "dv")
    for name, a, b, c in zip(names, got, want, torchs):
        assert a.dtype == dtype and a.shape == b.shape
        if T == 1 and name in ("dq", "dk"):  # one key: its weight is 1 whatever the query
            assert a.abs().max() < 1e-4
        elif dtype == torch.float32:
            assert difference(a, b) < 1e-5, name  # sums of T fp32 products
        else:  # a few bf16 roundings of 2^-9; never worse than PyTorch's own
            assert difference(a, b) < 0.01, name
            assert difference(a, b) <= 1.1 * difference(c, b), name


def test_attention_passes_no_information_back_in_time():
    torch.manual_seed(0)
    for dtype in DTYPES:
        qkv = torch.randn(1, 90, 3 * 128).to(dtype)
        angles = [x.to(dtype) for x in rope_table(90, 64, 10000.0, qkv.device)]
        other = qkv.clone()
        other[:, 70:] = torch.randn(1, 20, 3 * 128).to(dtype)
        a, b = attention.attend(qkv, *angles, 2), attention.attend(other, *angles, 2)
        assert torch.equal(a[:, :70], b[:, :70]) and not torch.equal(a[:, 70:], b[:, 70:])


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("n", [1, 33, 128])
def test_the_mlp_has_its_gradients(n, dtype, tol):
    torch.manual_seed(0)
    x = torch.randn(2, n, 48).to(dtype).requires_grad_()
    up, down = torch.randn(192, 48).div(7).requires_grad_(), torch.randn(48, 192).div(7).requires_grad_()
    g = torch.randn(2, n, 48).to(dtype)
    y = attention.mlp(x, up, down)
    got = (y, *torch.autograd.grad(y, (x, up, down), g))
    x, up, down = (t.detach().to(dtype).double().requires_grad_() for t in (x, up, down))
    z = F.relu(x @ up.t()).square() @ down.t()
    want = (z, *torch.autograd.grad(z, (x, up, down), g.double()))
    assert all(difference(a, b) < tol for a, b in zip(got, want))
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_visible(dtype):  # training stops at a loss that isn't finite: no kernel may hide it
    bad = torch.randn(4, 64).to(dtype)
    bad[1, 5] = float("nan")
    losses = attention.cross_entropy_(bad.clone(), torch.arange(4))
    assert losses.isnan().tolist() == [False, True, False, False]
    out = attention.mlp(bad, torch.randn(64, 64), torch.randn(64, 64))
    assert out.isnan().all(-1).tolist() == [False, True, False, False]
    angles = [x.to(dtype) for x in rope_table(4, 64, 10000.0, bad.device)]
    for part in range(3):
        qkv = torch.randn(1, 4, 3 * 64).to(dtype)
        qkv[0, 1, part * 64 : part * 64 + 64] = bad[1]
        assert attention.attend(qkv, *angles, 1)[0, 1].isnan().any()


def test_frozen_weights_get_no_gradient_but_pass_one_on():
    torch.manual_seed(0)
    x, w, v = torch.randn(3, 8, requires_grad=True), torch.randn(16, 8), torch.randn(8, 16)
    attention.mlp(x, w, v).sum().backward()
    assert x.grad.abs().sum() > 0 and w.grad is None


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_the_losses_kernel_is_cross_entropy(dtype, tol):
    torch.manual_seed(0)
    logits = (torch.randn(50, 1000) * 5).to(dtype)
    logits[0, 3], logits[1, 3] = 60, -60  # a sure hit and a sure miss
    targets = torch.randint(0, 1000, (50,))
    targets[:2] = 3
    precise = logits.double().requires_grad_()
    want = F.cross_entropy(precise, targets, reduction="none")
    want.sum().backward()
    losses = attention.cross_entropy_(logits, targets)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-5, atol=1e-12)
    assert difference(logits, precise.grad) < tol
    others = precise[0].detach().softmax(-1)
    others[3] = 0
    assert difference(logits[0, 3], -others.sum()) < tol  # about e^-40, where softmax - 1 cancels even in fp64


# A_log's gradient nearly cancels: 8e-6 apart with one CPU's matmuls, 1.3e-5 with another's
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 3e-5), (torch.bfloat16, 0.03)])
def test_a_model_has_the_same_gradients_with_and_without_the_kernels(dtype, tol, without_kernels):
    ids = torch.randint(0, 97, (2, 71), generator=torch.Generator().manual_seed(0))

    def run(dtype):
        torch.manual_seed(0)
        model = GPT(GPTConfig(64, 97, 3, 2, 2, 128, "TMT", d_state=16, headdim=32))
        model.init_weights()
        for p in model.parameters():
            if p.ndim == 2 and not p.any():
                torch.nn.init.normal_(p, 0, 0.1)
        torch.nn.init.normal_(model.lm_head.weight, 0, 0.3)
        loss = model.set_compute_dtype(dtype)(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    fast_loss, fast = run(dtype)
    without_kernels()
    loss, plain = run(dtype)
    _, precise = run(torch.float32)
    torch.testing.assert_close(fast_loss, loss, rtol=tol, atol=0)
    for name, grad in precise.items():  # bf16: as close to fp32 as the plain path, give or take
        assert difference(fast[name], grad) < max(tol, 1.1 * difference(plain[name], grad)), name


def test_other_inputs_take_the_plain_path():
    assert not attention.usable(torch.zeros(2, 2, dtype=torch.float64))
    assert not attention.usable(torch.zeros(2, 2, device="meta"))
    x = torch.randn(5, 8, requires_grad=True, dtype=torch.float64)
    assert norm(x).dtype == torch.float64
    wide = torch.randn(1, 3, 3 * 512)  # one head of 512: more than the kernel's buffers hold
    assert attention.attends(wide, 2, 2) and not attention.attends(wide, 1, 1) and not attention.attends(wide, 2, 1)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 6))
    head_loss(hidden, weight, torch.tensor([0, 1, 5])).backward()
    assert hidden.grad is not None
