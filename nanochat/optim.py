"""Muon for matrices and AdamW for the rest, in one optimizer, on one process or sharded over many.

    optimizer = build_optimizer(groups, dist)   # groups: [{"name", "kind": "muon"|"adamw", "params", "lr", ...}]
    loss.backward()
    norm = optimizer.reduce_gradients()         # sums over ranks; the norm of the whole gradient
    optimizer.step(lr_factor=0.5, momentum=0.95, scale=min(1.0, clip / norm))
    optimizer.zero_grad()

Layout. Parameters that are updated alike (matrices of one shape, or all of an AdamW group) become views of one flat
buffer, a bucket, and so do their gradients. A step is then a handful of operations on a few large tensors, Muon finds
its matrices stacked without a copy, and sharding is slicing: a bucket is padded to a multiple of the world size, each
rank receives the sum of its slice (reduce-scatter), updates it, and the slices are gathered into everybody's weights.
State exists for the own slice only, as in ZeRO stage 1 (1910.02054). Therefore don't move the model to another device
or dtype once its optimizer exists.
"""

import torch
import torch.distributed as dist
import torch.nn as nn

from nanochat.common import Dist, UserError, cpu_has_fast_bf16

# torch 2.13 renamed these two
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ALIGN = 16  # floats: every parameter starts on a 64-byte line

# Polynomials a x + b x^3 + c x^5 that together push singular values in [0.001, 1] towards 1: "The Polar Express"
# (2505.16932), algorithm 1, first five. All but the last are used with x / 1.01 against bf16's rounding. On Gaussian
# 6 x 1024 x 256 the result's singular values lie in 0.88..1.13, with Muon's first coefficients in 0.68..1.14.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.01


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """(K, m, n) -> (K, m, n): each matrix U S Vᵀ with its singular values S replaced by about 1 (Newton-Schulz).

    In bf16 where matmuls in it are fast: the result's singular values differ from fp32's by 0.01.
    """
    device = matrices.device.type
    fast = device == "cuda" or (device == "cpu" and cpu_has_fast_bf16())
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    tall = x.size(-2) > x.size(-1)  # the Gram matrix of the shorter side is the cheaper one
    norm = matrices.norm(dim=(-2, -1), keepdim=True)  # in fp32, and at least the largest singular value
    x = x / (norm * SAFETY + 1e-20).to(x.dtype)
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        if i < len(POLAR_EXPRESS) - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        gram = x.mT @ x if tall else x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)  # a + b G + c G², times x below: a x + b x³ + c x⁵ on singular values
        x = x @ poly if tall else poly @ x
    return x


class Bucket:
    """Parameters updated alike, as views of `weights`; their gradients as views of `grads`; both (n,) fp32."""

    def __init__(self, group: dict, params: list[nn.Parameter], rank: int, world: int):
        self.group, self.params = group, params
        self.name = f"{group['name']} {tuple(params[0].shape)}" if group["kind"] == "muon" else group["name"]
        if group["kind"] == "muon":  # K matrices, padded with zero matrices to a multiple of the world size
            unit = params[0].numel()
            starts = [i * unit for i in range(len(params))]
            size = -(-len(params) // world) * world * unit
        else:
            starts, size = [], 0
            for p in params:
                starts.append(size)
                size += -(-p.numel() // ALIGN) * ALIGN
            size = -(-size // (world * ALIGN)) * world * ALIGN
        self.weights = torch.zeros(size, device=params[0].device)
        self.grads = torch.zeros_like(self.weights)
        self.grad_views = []
        for p, start in zip(params, starts):
            view = self.weights[start : start + p.numel()].view(p.shape)
            view.copy_(p.data)
            p.data = view
            self.grad_views.append(self.grads[start : start + p.numel()].view(p.shape))
        share = size // world
        self.own = slice(rank * share, (rank + 1) * share)
        self.weight = self.weights[self.own]  # this rank's slice
        self.grad = self.grads[self.own] if world == 1 else torch.zeros_like(self.weight)
        self.state: dict[str, torch.Tensor] = {}

    def attach_grads(self) -> None:
        """Make .grad of every parameter our view, also after someone's `zero_grad(set_to_none=True)`."""
        for p, view in zip(self.params, self.grad_views):
            if p.grad is not view:
                if p.grad is None:
                    view.zero_()
                else:
                    view.copy_(p.grad)
                p.grad = view


class MuonAdamW:
    """See the module's docstring. Use `build_optimizer`."""

    @torch.no_grad()
    def __init__(self, groups: list[dict], rank: int = 0, world_size: int = 1):
        self.rank, self.world_size = rank, world_size
        self.buckets: list[Bucket] = []
        seen: set[int] = set()
        for group in groups:
            alike: dict[tuple, list[nn.Parameter]] = {}
            for p in group["params"]:
                assert id(p) not in seen, f"a parameter of group {group['name']} is in two groups"
                assert p.requires_grad and p.dtype == torch.float32, "only trainable fp32 parameters are optimized"
                seen.add(id(p))
                assert group["kind"] == "adamw" or p.ndim == 2, "Muon is for matrices"
                alike.setdefault(tuple(p.shape) if group["kind"] == "muon" else (), []).append(p)
            self.buckets += [Bucket(group, params, rank, world_size) for params in alike.values()]
        self.adamw = [b for b in self.buckets if b.group["kind"] == "adamw"]
        self.muon = [b for b in self.buckets if b.group["kind"] == "muon"]
        for b in self.muon:
            b.state = {"momentum": torch.zeros_like(b.weight)}
        for b in self.adamw:
            first, second = torch.zeros_like(b.weight), torch.zeros_like(b.weight)
            b.state = {"exp_avg": first, "exp_avg_sq": second, "step": torch.zeros((), device=b.weight.device)}
        for b in self.buckets:
            b.attach_grads()
            if world_size > 1:  # whatever the ranks drew at init, they start from rank 0's weights
                dist.broadcast(b.weights, src=0)

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        for b in self.buckets:
            b.attach_grads()
            b.grads.zero_()

    @torch.no_grad()
    def reduce_gradients(self) -> float:
        """Sum the gradients over ranks, each rank keeping its slice, and return the norm of the whole."""
        for b in self.buckets:
            b.attach_grads()
            if self.world_size > 1:
                _reduce_scatter(b.grad, b.grads)
        square = torch.stack([torch.dot(b.grad, b.grad) for b in self.buckets]).sum()
        if self.world_size > 1:
            dist.all_reduce(square)
        return square.sqrt().item()

    @torch.no_grad()
    def step(self, lr_factor: float = 1.0, momentum: float = 0.95, scale: float = 1.0) -> None:
        """Update the weights with gradients times `scale` and learning rates times `lr_factor`.

        `momentum` is Muon's. Call `reduce_gradients` first; gradients are used up (call `zero_grad` before the next).
        """
        if scale != 1.0:
            for b in self.buckets:
                b.grad.mul_(scale)
        for b in self.muon:
            self._muon(b, b.group["lr"] * lr_factor, momentum, b.group.get("weight_decay", 0.0))
        for b in self.adamw:
            self._adamw(b, b.group["lr"] * lr_factor, b.group.get("weight_decay", 0.0))
        if self.world_size > 1:
            for b in self.buckets:
                _all_gather(b.weights, b.weight)

    @staticmethod
    def _muon(b: Bucket, lr: float, momentum: float, weight_decay: float) -> None:
        """One step of Muon (Keller Jordan, 2024) on a stack of matrices: momentum, Nesterov, orthogonalise."""
        grad, average = b.grad, b.state["momentum"]
        average.lerp_(grad, 1 - momentum)
        grad.lerp_(average, momentum)
        m, n = b.params[0].shape
        update = orthogonalize(grad.view(-1, m, n))  # (K, m, n)
        if weight_decay:
            b.weight.mul_(1 - lr * weight_decay)
        # a tall matrix of orthonormal columns moves each output less, so its step is larger (Jordan's sqrt(m / n))
        b.weight.view(-1, m, n).add_(update, alpha=-lr * max(1.0, m / n) ** 0.5)

    @staticmethod
    def _adamw(b: Bucket, lr: float, weight_decay: float) -> None:
        """One step of AdamW on a flat bucket, with the kernel under torch.optim.AdamW(fused=True).

        The class itself would import torch's compiler: two CPU-seconds at the start of every stage.
        """
        beta1, beta2 = b.group.get("betas", (0.9, 0.999))
        b.state["step"] += 1
        first, second, step = ([b.state[k]] for k in ("exp_avg", "exp_avg_sq", "step"))
        torch._fused_adamw_(
            [b.weight], [b.grad], first, second, [], step, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
            eps=b.group.get("eps", 1e-8), amsgrad=False, maximize=False,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------------------
    # Resume

    def state_dict(self) -> dict:
        """This rank's slices, by bucket."""
        states = [b.state for b in self.buckets]
        return {"world_size": self.world_size, "names": [b.name for b in self.buckets], "states": states}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`. Raises UserError if it belongs to other parameters or another world size."""
        if state["world_size"] != self.world_size:
            raise UserError(
                f"the checkpoint was written by {state['world_size']} processes; "
                f"resume with as many, not {self.world_size}"
            )
        if state["names"] != [b.name for b in self.buckets]:
            raise UserError("the checkpoint's optimizer state belongs to other parameters; start without --resume")
        for b, values in zip(self.buckets, state["states"]):
            if any(values[k].shape != own.shape for k, own in b.state.items()):
                raise UserError(f"the checkpoint's optimizer state for {b.name} has another size")
            for k, own in b.state.items():
                own.copy_(values[k])


def build_optimizer(groups: list[dict], dist_info: Dist | None = None) -> MuonAdamW:
    """An optimizer for `groups`, sharded over the ranks of `dist_info` if there are several.

    A group has "name", "kind" ("muon" or "adamw"), "params", "lr" and optionally "weight_decay", and for AdamW
    "betas" and "eps". Parameters become views of flat buffers: build the optimizer last.
    """
    rank, world = (dist_info.rank, dist_info.world_size) if dist_info else (0, 1)
    return MuonAdamW(groups, rank, world)
