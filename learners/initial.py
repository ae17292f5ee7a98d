"""How a fresh adapter begins: factors A (rank, inputs) and B (outputs, rank) whose product changes nothing yet. Torch alone.

`gaussian`    A ~ N(0, 1/rank²), B = 0; the default is peft's own, A uniform by Kaiming and B = 0.
`orthogonal`  A = XQ₁, B = YQ₂ with Q₁ and Q₂ halves of an orthogonal matrix, so that BA = 0 while neither is (even ranks).
`pissa`       the principal part of the weight, W ≈ s B₀A₀ by its largest singular values (Meng et al. 2024).
`olora`       s B₀A₀ = QR of the weight, cut to the rank (Büyükakyüz 2024).

The last two are published as a change of the base: W - s B₀A₀ is frozen, and what is trained serves on no other base. Here the
base stays as it is. Half of the rank holds (A₀, B₀) and is trained, the other half holds (A₀, -B₀) and is frozen:
s(BA - B₀A₀) is the same function with the same gradients, and a plain LoRA at any time. After training `balanced` gives it
factors of its own size, since those of the principal part would drown it when they are served in 16 bits.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch

Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora"]
INITS: tuple[Init, ...] = get_args(Init)
MIRRORED: frozenset[str] = frozenset({"pissa", "olora"})
"""Those that train half of the rank against a frozen other half."""

Factors = tuple[torch.Tensor, torch.Tensor]


def begin(init: str, weight: torch.Tensor, rank: int, scale: float) -> Factors:
    """A and B in fp32 for a weight (outputs, inputs); every random number is torch's own. Raises `ValueError` on a bad rank."""
    outputs, inputs = weight.shape
    if init == "gaussian":
        return torch.randn(rank, inputs) / rank, torch.zeros(outputs, rank)
    if rank % 2:
        raise ValueError(f"init {init!r} needs an even rank, not {rank}")
    half = rank // 2
    if half > min(outputs, inputs):
        raise ValueError(f"init {init!r} finds no {half} directions in a weight of {outputs} x {inputs}: take a smaller rank")
    if init == "orthogonal":
        turned = torch.linalg.qr(torch.randn(rank, rank))[0]
        return turned[0::2].T @ torch.randn(half, inputs) / 10, torch.randn(outputs, half) @ turned[1::2] / 10
    a, b = _principal(weight.float(), half, scale) if init == "pissa" else _triangular(weight.float(), half, scale)
    return torch.cat([a, a]), torch.cat([b, -b], 1)


def freeze_half(a: torch.Tensor, b: torch.Tensor) -> None:
    """Keep the second half of the rank where it is: its gradients are zero, and so are AdamW's steps without weight decay."""
    half = a.shape[0] // 2
    for factor, along in ((a, 0), (b, 1)):
        factor.register_hook(partial(_first_half, half=half, along=along))  # type: ignore[no-untyped-call]


def balanced(a: torch.Tensor, b: torch.Tensor) -> Factors:
    """Other factors with the same product, of equal Gram matrices: √Σ Vᵀ and U √Σ of its singular values."""
    turned_b, left = torch.linalg.qr(b.double())
    turned_a, right = torch.linalg.qr(a.double().T)
    u, sizes, v = torch.linalg.svd(left @ right.T)
    root = sizes.sqrt()
    return ((root[:, None] * v) @ turned_a.T).to(a.dtype), (turned_b @ (u * root)).to(b.dtype)


def _first_half(gradient: torch.Tensor, half: int, along: int) -> torch.Tensor:
    moved = gradient.narrow(along, 0, half)
    return torch.cat([moved, torch.zeros_like(moved)], along)


def _principal(weight: torch.Tensor, half: int, scale: float) -> Factors:
    u, sizes, v = torch.svd_lowrank(weight, min(2 * half + 8, *weight.shape), niter=4)
    root = (sizes[:half] / scale).sqrt()
    return root[:, None] * v[:, :half].T, u[:, :half] * root


def _triangular(weight: torch.Tensor, half: int, scale: float) -> Factors:
    q, r = torch.linalg.qr(weight)
    return r[:half] / scale**0.5, q[:, :half] / scale**0.5
