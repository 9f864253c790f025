"""The project's own transformer: decoder-only; it returns the hidden state of every exit.

Shapes in names: n windows, t positions, d model dimension, h heads, k dimension of a head,
v vocabulary. `x_ntd` is a tensor of (windows, positions, dim).

What the head reads at an exit (`Model.read`): in a post-norm model the hidden state itself,
which the layer's last norm left normalised; in a pre-norm model the hidden state through the final
norm, whose gain all exits share as they share the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proglayer.training.architecture import Architecture
from proglayer.training.model import Model, Tied


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding over the whole head dimension."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)

    def forward(self, x_ntd: Tensor, cos_tk: Tensor, sin_tk: Tensor) -> Tensor:
        n, t, d = x_ntd.shape

        def heads(x_ntd: Tensor) -> Tensor:
            return x_ntd.view(n, t, self.num_heads, d // self.num_heads).transpose(1, 2)

        q_nhtk = rotate(heads(self.q(x_ntd)), cos_tk, sin_tk)
        k_nhtk = rotate(heads(self.k(x_ntd)), cos_tk, sin_tk)
        v_nhtk = heads(self.v(x_ntd))
        out_nhtk = F.scaled_dot_product_attention(q_nhtk, k_nhtk, v_nhtk, is_causal=True)
        return self.o(out_nhtk.transpose(1, 2).reshape(n, t, d))


class FeedForward(nn.Module):
    """Gated feed-forward, `w2(silu(w1 x) * w3 x)` (Shazeer 2020, "GLU variants")."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x_ntd: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_ntd)) * self.w3(x_ntd))


class Layer(nn.Module):
    """One layer: attention and feed-forward, each with a residual sum and a norm.

    The norm follows the sum (`post`, Vaswani et al. 2017) or precedes the branch (`pre`, Xiong et
    al. 2020). `residual_scale` multiplies the branches of a pre-norm layer by 1 / sqrt(2 L), or by
    gains of their own (Touvron et al. 2021, "LayerScale"), or the norms before them by 1 / sqrt(l)
    (Sun et al. 2025, "The curse of depth").

    number: which of `layers` layers it is, from 0.
    """

    def __init__(self, shape: Architecture, number: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.pre_norm = shape.norm == "pre"
        scales = {"depth": (1, (2 * layers) ** -0.5), "layernorm": ((number + 1) ** -0.5, 1)}
        self.inner, self.outer = scales.get(shape.residual_scale, (1, 1))
        self.gains = None
        if shape.residual_scale == "layerscale":
            self.gains = nn.ParameterList(torch.empty(shape.dim) for _ in range(2))
        self.attention = Attention(shape.dim, shape.num_heads)
        self.norm1 = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn = FeedForward(shape.dim, shape.ffn_multiple * shape.dim)
        self.norm2 = nn.RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, x_ntd: Tensor, cos_tk: Tensor, sin_tk: Tensor) -> Tensor:
        if self.pre_norm:
            if self.gains is not None or (self.inner, self.outer) != (1, 1):
                attention, ffn = (self.outer, self.outer) if self.gains is None else self.gains
                branch = self.attention(self.inner * self.norm1(x_ntd), cos_tk, sin_tk)
                x_ntd = x_ntd + attention * branch
                return x_ntd + ffn * self.ffn(self.inner * self.norm2(x_ntd))
            x_ntd = x_ntd + self.attention(self.norm1(x_ntd), cos_tk, sin_tk)
            return x_ntd + self.ffn(self.norm2(x_ntd))
        x_ntd = self.norm1(x_ntd + self.attention(x_ntd, cos_tk, sin_tk))
        return self.norm2(x_ntd + self.ffn(x_ntd))


class Transformer(Model):
    """The project's own model. Its head is not tied to the embedding.

    Made without weights that mean anything: `initialize` draws them.
    """

    def __init__(self, layers: int, shape: Architecture) -> None:
        super().__init__()
        self.dim, self.rotary_base = shape.dim, shape.rotary_base
        self.head_dim = shape.dim // shape.num_heads
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Layer(shape, number, layers) for number in range(layers))
        for number, own in enumerate(shape.ties):
            if own != number:
                self.layers[number] = Tied(self.layers[own])
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps) if shape.final_norm else nn.Identity()
        self.head = nn.Linear(shape.dim, shape.vocab_size, bias=False)

    def beside(self, x_ntd: Tensor) -> dict[str, Tensor]:
        cos_tk, sin_tk = rotary_tables(
            x_ntd.shape[1], self.head_dim, self.rotary_base, x_ntd.device
        )
        return {"cos_tk": cos_tk, "sin_tk": sin_tk}

    @torch.no_grad()
    def initialize(self, part: nn.Module, generator: torch.Generator) -> None:
        """In the order of its parameters. Embedding: truncated normal, std 0.02. Linear layers:
        truncated normal, std dim^-0.5, PyTorch's default bounds. Gains: one; of a branch 0.1.
        """
        for module in part.modules():
            if isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.dim**-0.5, generator=generator)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Layer) and module.gains is not None:
                for gain in module.gains:
                    nn.init.constant_(gain, 0.1)

    @torch.no_grad()
    def silence(self, layer: nn.Module) -> None:
        """A post-norm layer's gains become 1 as well: it is x / rms(x) then."""
        assert isinstance(layer, Layer)
        layer.attention.o.weight.zero_()
        layer.ffn.w2.weight.zero_()
        if not layer.pre_norm:
            layer.norm1.weight.fill_(1)
            layer.norm2.weight.fill_(1)


def rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, head_dim) of the rotary embedding, the halves alike (RoFormer)."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = base ** (-pairs / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles_tk = torch.cat([angles, angles], dim=-1)
    return angles_tk.cos(), angles_tk.sin()


def rotate(x_nhtk: Tensor, cos_tk: Tensor, sin_tk: Tensor) -> Tensor:
    """Turn queries or keys by their position: halves (a, b) to (a cos - b sin, b cos + a sin)."""
    a, b = x_nhtk.chunk(2, dim=-1)
    turned = x_nhtk * cos_tk + torch.cat([-b, a], dim=-1) * sin_tk
    return turned.to(x_nhtk.dtype)
