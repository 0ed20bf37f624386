"""The optimizer does what its two names say."""

import pytest
import torch
import torch.nn as nn

import nanochat.optim as optim
from nanochat.common import UserError
from nanochat.optim import build_optimizer, orthogonalize


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adamw(params, **options):
    return {
        "name": "a",
        "kind": "adamw",
        "params": params,
        "lr": 0.01,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
    } | options


def muon(params, **options):
    return {"name": "m", "kind": "muon", "params": params, "lr": 0.02} | options


@pytest.mark.parametrize("fast_bf16", [True, False])
@pytest.mark.parametrize("shape", [(3, 64, 256), (2, 256, 64)])
def test_muon_brings_singular_values_close_to_one(shape, fast_bf16, monkeypatch):
    monkeypatch.setattr(optim, "cpu_has_fast_bf16", lambda: fast_bf16)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    assert values.min() > 0.8 and values.max() < 1.2  # five steps leave 0.88 to 1.13


def test_orthogonalising_keeps_the_singular_vectors_and_ignores_the_scale():
    g = torch.randn(1, 32, 96)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    for scale in (1e-12, 1.0, 1e6):
        out = orthogonalize(g * scale).float()
        assert (out - u @ v).norm() < 0.2 * (u @ v).norm()
    assert orthogonalize(torch.zeros(1, 8, 8)).abs().max() == 0


def test_adamw_equals_torchs_over_several_parameters_and_steps():
    ours = [nn.Parameter(torch.randn(s)) for s in [(7, 5), (3,), (2, 3, 4)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = build_optimizer([adamw(ours)])
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        for params in (ours, theirs):
            sum(((p - 1) ** 2 * (step + 1)).sum() for p in params).backward()
        factor = 1 - step / 5
        reference.param_groups[0]["lr"] = 0.01 * factor
        optimizer.reduce_gradients()
        optimizer.step(factor)
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # fused and single-tensor AdamW round differently


def test_muon_equals_its_definition_matrix_by_matrix(monkeypatch):
    monkeypatch.setattr(optim, "cpu_has_fast_bf16", lambda: False)
    params = [nn.Parameter(torch.randn(s)) for s in [(8, 4), (4, 8), (8, 4)]]
    expected = [p.detach().clone() for p in params]
    averages = [torch.zeros_like(p) for p in expected]
    optimizer = build_optimizer([muon(params, weight_decay=0.1)])
    for _ in range(3):
        grads = [torch.randn_like(p) for p in expected]
        for p, g in zip(params, grads):
            (p * g).sum().backward()
        optimizer.reduce_gradients()
        optimizer.step(0.5, momentum=0.9)
        optimizer.zero_grad()
        for w, g, avg in zip(expected, grads, averages):
            avg.mul_(0.9).add_(0.1 * g)
            update = orthogonalize((0.1 * g + 0.9 * avg)[None])[0]
            w.mul_(1 - 0.5 * 0.02 * 0.1).sub_(0.5 * 0.02 * max(1, w.size(0) / w.size(1)) ** 0.5 * update)
    for a, b in zip(params, expected):
        torch.testing.assert_close(a.data, b, rtol=1e-4, atol=1e-5)  # batched and single matmuls round differently


def test_the_reported_norm_is_that_of_the_whole_gradient_and_scale_shrinks_it():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer([adamw([p], weight_decay=0.0), muon([q])])
    p.grad.fill_(2.0)
    q.grad.fill_(1.0)
    assert optimizer.reduce_gradients() == pytest.approx(4.0)
    optimizer.step(scale=0.25)
    assert optimizer.state_dict()["states"][0]["exp_avg"][:3].tolist() == pytest.approx([0.05] * 3)


def test_gradients_set_to_none_by_others_are_taken_back_in():
    p = nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer([adamw([p])])
    p.grad = None
    (p * 3).sum().backward()
    assert optimizer.reduce_gradients() == pytest.approx(27**0.5)
    p.grad = None
    assert optimizer.reduce_gradients() == 0


def test_state_survives_a_round_trip_through_a_file(tmp_path):
    def make():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
        groups = [muon([m.weight for m in net]), adamw([m.bias for m in net])]
        return net, build_optimizer(groups)

    def steps(net, optimizer, n):
        for _ in range(n):
            net(torch.ones(2, 6)).square().mean().backward()
            optimizer.reduce_gradients()
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer = make()
    steps(net, optimizer, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s.pt")
    steps(net, optimizer, 3)
    other, resumed = make()
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    steps(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    with pytest.raises(UserError, match="other parameters"):
        build_optimizer([adamw([nn.Parameter(torch.zeros(2))])]).load_state_dict(state["optimizer"])


def test_it_learns_a_linear_map_with_both_kinds_of_parameters():
    net = nn.Linear(8, 8)
    target = torch.randn(8, 8)
    optimizer = build_optimizer([muon([net.weight], lr=0.1), adamw([net.bias])])
    for step in range(150):
        x = torch.randn(32, 8)
        loss = (net(x) - x @ target).square().mean()
        loss.backward()
        optimizer.reduce_gradients()
        optimizer.step(1 - step / 150)
        optimizer.zero_grad()
    assert loss < 0.5  # about 8 x 8 / 8 at the start
