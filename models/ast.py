"""Audio Spectrogram Transformer with one modulation hook per block.

Gong et al., "AST: Audio Spectrogram Transformer", Interspeech 2021, arXiv 2104.01778: the distilled
DeiT-base on overlapping patches of a log-mel spectrogram. Names of parameters are timm's.

B batch, F mel bands, T frames, f x t patch grid (frequency-major), N = 2 + f t tokens
[CLS, DIST, patches], D width, H heads, G token groups of a modulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.conditioner import Modulation
from models.config import BackboneConfig
from models.precision import full_precision

N_SPECIAL = 2  # CLS and DIST


class Cut(NamedTuple):
    """Where a forward pass is divided: `block` blocks are done, and the attention (with its
    residual) of block `block` too when `attended`."""

    block: int = 0
    attended: bool = False


def modulate(tokens: Tensor, modulation: Modulation) -> Tensor:
    """u <- (1 + scale) * u + shift (FiLM; Perez et al., AAAI 2018, arXiv 1709.07871).

    Args:
        tokens: [B, N, D], or [B, 2, D] when only CLS and DIST are there.
        modulation: scale and shift [B, G, D]; G = 1: the same for all tokens; G = 2: group
            0 for CLS and DIST, group 1 for the patches.
    """
    scale, shift = modulation
    if scale.shape[1] == 1:
        return (1 + scale) * tokens + shift
    special = (1 + scale[:, :1]) * tokens[:, :N_SPECIAL] + shift[:, :1]
    if tokens.shape[1] == N_SPECIAL:
        return special
    patches = (1 + scale[:, 1:]) * tokens[:, N_SPECIAL:] + shift[:, 1:]
    return torch.cat([special, patches], dim=1)


def grid_size(size: int, patch_size: int, stride: int) -> int:
    """Patches along one side of the spectrogram."""
    return (size - patch_size) // stride + 1


class LoRA(nn.Module):
    """Low-rank change of some of the rows q, k, v of an attention's projection: scale * U D (Hu et
    al., ICLR 2022, arXiv 2106.09685).

    As LoRA-RSC's authors start: D zero, U uniform, the reverse of the usual.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        rank, dim, count = config.lora_rank, config.embed_dim, len(config.lora_targets)
        self.rows, self.scale = [name in config.lora_targets for name in "qkv"], config.lora_scale
        self.down = nn.Parameter(torch.zeros(count, rank, dim))
        self.up = nn.Parameter(torch.empty(count, dim, rank))
        for up in self.up:
            nn.init.kaiming_uniform_(up, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Projection [3 D, D] -> the changed one, in float32."""
        with full_precision(weight):
            change = iter(self.scale * (self.up @ self.down))
            parts = zip(weight.chunk(3), self.rows, strict=True)
            return torch.cat([part + next(change) if own else part for part, own in parts])


class FusedAttention(Attention):
    """timm's attention parameters, always through the fused kernel.

    Softmax(Q K^T / sqrt(D / H)) V; queries of the first `n_queries` tokens only, on request: keys
    and values are needed of all tokens, queries and projection only of those that are read later.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_module("adapter", None)

    def merge(self) -> None:
        """Put the adapter's change into the projection and forget the adapter."""
        if self.adapter is not None:
            with torch.no_grad():
                self.qkv.weight.copy_(self.adapter(self.qkv.weight))
            self.adapter = None

    def forward(self, x: Tensor, n_queries: int | None = None) -> Tensor:
        """x [B, N, D] -> [B, n_queries or N, D]."""
        b, n, d = x.shape
        heads, weight, bias = (self.num_heads, self.head_dim), self.qkv.weight, self.qkv.bias
        if self.adapter is not None:
            weight = self.adapter(weight)
        if n_queries is None:
            q, k, v = (
                F.linear(x, weight, bias).view(b, n, 3, *heads).permute(2, 0, 3, 1, 4).unbind(0)
            )
        else:
            q = F.linear(x[:, :n_queries], weight[:d], bias[:d])
            q = q.view(b, n_queries, *heads).transpose(1, 2)
            kv = F.linear(x, weight[d:], bias[d:])
            k, v = kv.view(b, n, 2, *heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, H, n_queries or N, D / H]
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x += Attn(LN1 x); u = LN2 x, modulated if conditioned; x += MLP(u)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = FusedAttention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))  # exact GELU

    def attend(self, x: Tensor, keep: int | None = None) -> Tensor:
        """The attention half: [B, N, D] -> [B, keep or N, D]."""
        residual = x if keep is None else x[:, :keep]
        return residual + self.attn(self.norm1(x), keep)

    def transform(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        """The MLP half; the modulation stays inside the residual branch."""
        u = self.norm2(x)
        if modulation is not None:
            u = modulate(u, modulation)
        return x + self.mlp(u)

    def forward(
        self, x: Tensor, modulation: Modulation | None = None, keep: int | None = None
    ) -> Tensor:
        return self.transform(self.attend(x, keep), modulation)


class PatchEmbed(nn.Module):
    """Patches of a one-channel spectrogram, which may overlap -> tokens, frequency-major.

    patch, stride: bands and frames.
    """

    def __init__(self, dim: int, patch: tuple[int, int], stride: tuple[int, int]):
        super().__init__()
        self.proj = nn.Conv2d(1, dim, patch, stride=stride)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> [B, f t, D]."""
        return self.proj(spectrogram).flatten(2).transpose(1, 2)


class AST(nn.Module):
    """The backbone all variants share.

    Args:
        config: sizes (DeiT-base: 768 wide, 12 blocks, 12 heads), patches and their strides.
        n_mels, n_frames: size F x T of the spectrogram; of shorter clips T is smaller.
        layer_norm_eps: follows the source of the weights.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        n_mels: int = 128,
        n_frames: int = 1024,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.embed_dim, self.depth = embed_dim, depth = config.embed_dim, config.depth
        self.input_size = (n_mels, n_frames)
        self.bands = slice(0, n_mels)  # those that become patches
        patch, stride = config.patch, (config.freq_stride, config.time_stride)
        self.config, self.grid = config, tuple(map(grid_size, self.input_size, patch, stride))
        self.gradient_checkpointing = config.gradient_checkpointing
        self.n_patches = self.grid[0] * self.grid[1]
        self.frozen_blocks: int | None = None  # None: nothing is frozen; else also the embedding
        self.patch_embed = PatchEmbed(embed_dim, patch, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        n_tokens = N_SPECIAL + self.n_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens, embed_dim))
        self.blocks = nn.ModuleList(
            [
                Block(embed_dim, config.num_heads, config.mlp_ratio, layer_norm_eps)
                for _ in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self._initialise()

    def _initialise(self) -> None:
        """Truncated normal (sd 0.02) and zero biases, as DeiT starts (arXiv 2012.12877)."""
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def keep_bands(self, first: int, stop: int) -> None:
        """Make patches of the bands first..stop - 1 alone; each keeps the position that it has in
        the whole spectrogram. `first` is a multiple of the patches' stride along the bands."""
        proj = self.patch_embed.proj
        rows = grid_size(stop - first, proj.kernel_size[0], proj.stride[0])
        start = first // proj.stride[0]
        special, patches = self.pos_embed.detach().split([N_SPECIAL, self.n_patches], dim=1)
        patches = patches.unflatten(1, self.grid)[:, start : start + rows].flatten(1, 2)
        self.pos_embed = nn.Parameter(torch.cat([special, patches], dim=1))
        self.bands, self.grid = slice(first, stop), (rows, self.grid[1])
        self.n_patches = rows * self.grid[1]

    # ------------------------------------------------------------------ freezing

    def freeze(self, trainable_blocks: int) -> None:
        """Train the last n blocks and the final LN only; n >= depth freezes nothing.

        The other blocks, patch embedding, positions and special tokens get no gradient and stay
        in evaluation mode. Of blocks with adapters only these train, and the embedding never does.
        """
        adapted = any(block.attn.adapter is not None for block in self.blocks)
        if trainable_blocks >= self.depth and not adapted:
            return
        self.frozen_blocks = max(self.depth - trainable_blocks, 0)
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            parameter.requires_grad_(False)
        for module in self._frozen_modules():
            module.requires_grad_(False).eval()
        for block in self.blocks[self.frozen_blocks :] if adapted else ():
            block.requires_grad_(False)
            block.attn.adapter.requires_grad_(True)

    def adapt(self, config: BackboneConfig) -> None:
        """Give the last `trainable_blocks` blocks their adapters; before `freeze`."""
        for block in self.blocks[max(self.depth - config.trainable_blocks, 0) :]:
            block.attn.adapter = LoRA(config)

    def merge(self) -> None:
        """Put all adapters into the weights, for prediction: the same function without them."""
        for block in self.blocks:
            block.attn.merge()

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_blocks is None:
            return []
        return [self.patch_embed, *self.blocks[: self.frozen_blocks]]

    def train(self, mode: bool = True) -> AST:
        """Training mode for what trains; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    # ------------------------------------------------------------------ forward

    def embed(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> tokens with positions [B, N, D]."""
        return self.position(self.patches(spectrogram))

    def patches(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> patch tokens of the kept bands, without positions [B, f t, D]."""
        _, channels, bands, frames = spectrogram.shape
        fits = self.config.patch[1] <= frames <= self.input_size[1]
        if (channels, bands) != (1, self.input_size[0]) or not fits:
            raise ValueError(
                f"spectrogram {tuple(spectrogram.shape)}, expected [B, 1, F, T] with "
                f"F, T = {self.input_size}, or a smaller T"
            )
        return self.patch_embed(spectrogram[:, :, self.bands])

    def position(self, patches: Tensor) -> Tensor:
        """Patch tokens [B, f t, D] -> tokens with CLS, DIST and positions [B, N, D]."""
        b = patches.shape[0]
        special = (self.cls_token.expand(b, -1, -1), self.dist_token.expand(b, -1, -1))
        return torch.cat([*special, patches], dim=1) + self.positions(patches.shape[1])

    def count_patches(self, frames: int) -> int:
        """f t, the patches of so many frames."""
        return self.grid[0] * grid_size(frames, self.config.patch[1], self.config.time_stride)

    def positions(self, patches: int) -> Tensor:
        """[1, N, D] of f t patches: of a shorter clip those of the first, or the middle, t columns
        of patches (`bucket_positions`)."""
        if patches == self.n_patches:
            return self.pos_embed
        length = patches // self.grid[0]
        start = self.config.bucket_positions == "start"
        first = 0 if start else self.grid[1] // 2 - length // 2  # as `pretrained` cuts
        special, own = self.pos_embed.split([N_SPECIAL, self.n_patches], dim=1)
        own = own.unflatten(1, self.grid).narrow(2, first, length)  # [1, f, t, D]
        return torch.cat([special, own.flatten(1, 2)], dim=1)

    def _keep(self, index: int, all_tokens: bool = False) -> int | None:
        """Tokens that block `index` must give: of the last one only CLS and DIST are read."""
        return N_SPECIAL if index == self.depth - 1 and not all_tokens else None

    def prefix(self, spectrogram: Tensor, cut: Cut = Cut()) -> Tensor:  # noqa: B008 (immutable)
        """Everything before `cut`, unmodulated: [B, N, D], or [B, 2, D] after the last attention.

        `resume(prefix(x, cut), modulation, cut)` equals `forward(x, modulation)` bit for bit when
        no block before the cut is modulated.
        """
        x = self.embed(spectrogram)
        for index in range(cut.block):
            x = self._run(self.blocks[index], x, None, self._keep(index))
        if cut.attended:
            x = self.blocks[cut.block].attend(x, self._keep(cut.block))
        return x

    def resume(
        self,
        x: Tensor,
        modulation: Sequence[Modulation | None] = (),
        cut: Cut = Cut(),  # noqa: B008 (immutable)
        all_tokens: bool = False,
        pool: bool = True,
    ) -> Tensor:
        """Everything after `cut`: tokens [B, N, D] -> pooled [B, D], mean of CLS and DIST after
        the final LN; without `pool` both, [B, 2, D]; with `all_tokens` all tokens, [B, N, D]."""
        if modulation and len(modulation) != self.depth:
            raise ValueError(f"{len(modulation)} modulations for {self.depth} blocks")
        if any(m is not None for m in modulation[: cut.block]):
            raise ValueError(f"a block before block {cut.block} is modulated but already computed")
        for index in range(cut.block, self.depth):
            m = modulation[index] if modulation else None
            if cut.attended and index == cut.block:
                x = self._run(self.blocks[index].transform, x, m)
            else:
                x = self._run(self.blocks[index], x, m, self._keep(index, all_tokens))
        if all_tokens:
            return self.norm(x)
        special = self.norm(x[:, :N_SPECIAL])
        return special.mean(dim=1) if pool else special

    def _run(self, function, *args):
        """Call, recomputing activations in the backward pass where that is asked for."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def forward(self, spectrogram: Tensor, modulation: Sequence[Modulation | None] = ()) -> Tensor:
        """spectrogram [B, 1, F, T] -> pooled [B, D]; `modulation` as in `ConditionState`."""
        return self.resume(self.prefix(spectrogram), modulation)

    def tokens(self, spectrogram: Tensor, modulation: Sequence[Modulation | None] = ()) -> Tensor:
        """All tokens after the final LN, [B, N, D], for analysis."""
        return self.resume(self.prefix(spectrogram), modulation, all_tokens=True)
