"""Backbone, conditioner and head as one model.

B batch, F mel bands, T frames, D width, K logits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from data.batch import Batch, Metadata
from models.ast import AST, Cut
from models.conditioner import (
    Conditioner,
    ConditionState,
    Features,
    ModelOutput,
    Modulation,
    ParameterGroup,
)
from models.config import ModelConfig
from models.encoders import activation
from models.method import Methods, Step
from models.precision import full_precision


class Head(nn.Sequential):
    """LN, Dropout, Linear D -> hidden, act, Dropout, Linear hidden -> K (PyTorch's default start).

    With `head_hidden_dim: 0` LN, Dropout, Linear D -> K. Width 64 and dropout 0.4 are the
    authors' in FiLM, TAFiLM and SoftFiLM.
    """

    def __init__(self, config: ModelConfig, dim: int, n_outputs: int):
        layers, width = [nn.LayerNorm(dim), nn.Dropout(config.dropout)], dim
        if config.head_hidden_dim:
            width = config.head_hidden_dim
            layers += [nn.Linear(dim, width), activation(config.activation)]
            layers += [nn.Dropout(config.dropout)]
        super().__init__(*layers, nn.Linear(width, n_outputs))


def _repeated(
    modulation: tuple[Modulation | None, ...], rows: int
) -> tuple[Modulation | None, ...]:
    """Modulations [B, G, D] for `rows` rows per clip, one row of all clips after the other."""
    if rows == 1:
        return modulation
    return tuple(m and Modulation(*(part.repeat(rows, 1, 1) for part in m)) for m in modulation)


class ConditionedAST(nn.Module):
    """logits = head(fuse(AST(spectrogram, modulation(metadata)), metadata)).

    With a frozen backbone (`trainable_blocks` n < depth) everything before `cut` is frozen and does
    not depend on the metadata: the embedding and the blocks below the first that trains or is
    conditioned; and, when that block is frozen too, its attention. `frozen_prefix` gives it,
    and `forward` continues from it as it would have from the spectrogram.
    """

    def __init__(
        self,
        backbone: AST,
        conditioner: Conditioner,
        head: nn.Module,
        trainable_blocks: int,
        methods: Methods | None = None,
    ):
        super().__init__()
        self.backbone, self.conditioner, self.head = backbone, conditioner, head
        self.methods = methods if methods is not None else Methods()
        backbone.freeze(trainable_blocks)
        self.cut: Cut | None = None
        if backbone.frozen_blocks is not None:
            first = min((*conditioner.conditioned_layers, backbone.depth))
            block = min(backbone.frozen_blocks, first)
            self.cut = Cut(block, attended=block < backbone.frozen_blocks)

    # ------------------------------------------------------------------ forward

    def forward(
        self, features: Features | Tensor, metadata: Metadata, step: Step | None = None
    ) -> ModelOutput:
        """Spectrograms [B, 1, F, T] or `Features` -> logits [B, K] float32 and the regularisation
        term.

        step: of the training methods (`Methods.draw`); the spectrograms are then [V B, 1, F, T],
            one view after the other, and the methods' losses are part of the regularisation.
        """
        if step is not None:
            return self._forward_with_methods(features, metadata, step)
        _, fused = self.embed(features, metadata)
        with full_precision(fused):
            return ModelOutput(self.head(fused), self.conditioner.regularisation())

    def draw(self, batch: Batch, seed: int, features: Features | None = None) -> Step | None:
        """The methods' randomness of one micro-batch; None without methods.

        features: of the batch; None: spectrograms of the full width.
        """
        whole = features is None or features.from_prefix  # no method mixes or drops stored tokens
        frames = self.backbone.input_size[1] if whole else features.values.shape[-1]
        return self.methods.draw(batch, self.backbone.count_patches(frames), seed)

    def _forward_with_methods(
        self, features: Features | Tensor, metadata: Metadata, step: Step
    ) -> ModelOutput:
        """All views and mixes go through the backbone as one batch of R B rows."""
        values, from_prefix, waveform = (
            features if isinstance(features, Features) else Features(features)
        )
        methods, clips = self.methods, len(metadata)
        with full_precision(values):
            state = self.conditioner.encode(metadata)
        values, evidence = methods.filter(values)
        if methods.whole_input:
            patches = methods.mix(self.backbone.patches(values), clips, step)
            tokens = methods.keep(self.backbone.position(patches), step)
            rows = len(tokens) // clips
            modulation = _repeated(state.modulation, rows)
            pooled = self.backbone.resume(tokens, modulation, pool=not methods.hears)
            pooled = self._listened(pooled, waveform)
        else:
            pooled = self._pool(values, from_prefix, state, waveform)
        pooled = pooled.float().unflatten(0, (-1, clips))  # [R, B, D]
        with full_precision(pooled):
            logits = self.head(self.conditioner.fuse(pooled[0], state))
            added = methods.loss(pooled, step, evidence)
            return ModelOutput(logits, self.conditioner.regularisation() + added)

    def embed(self, features: Features | Tensor, metadata: Metadata) -> tuple[Tensor, Tensor]:
        """Representations [B, D] float32 before and after `Conditioner.fuse`."""
        values, from_prefix, waveform = (
            features if isinstance(features, Features) else Features(features)
        )
        with full_precision(values):
            state = self.conditioner.encode(metadata)
        values, _ = self.methods.filter(values)
        pooled = self._pool(values, from_prefix, state, waveform).float()
        with full_precision(pooled):
            return pooled, self.conditioner.fuse(pooled, state)

    def _pool(
        self, values: Tensor, from_prefix: bool, state: ConditionState, waveform: Tensor | None
    ) -> Tensor:
        if self.cut is None:
            x = self.backbone.prefix(values)
        elif from_prefix:  # stored in half precision perhaps; the residual stream is not
            x = values.to(self.backbone.norm.weight.dtype)
        else:
            x = self.frozen_prefix(values)
        hears = self.methods.hears
        pooled = self.backbone.resume(x, state.modulation, self.cut or Cut(), pool=not hears)
        return self._listened(pooled, waveform)

    def _listened(self, pooled: Tensor, waveform: Tensor | None) -> Tensor:
        """[R, D] as it is; or of a method that hears, CLS and DIST [R, 2, D] -> [R, D]."""
        if not self.methods.hears:
            return pooled
        return self.methods.listen(pooled, waveform).mean(dim=1)

    def merge(self) -> None:
        """Put adapters into the weights, for prediction."""
        self.backbone.merge()

    @property
    def layer_norm_eps(self) -> float:
        """Of the backbone."""
        return self.backbone.norm.eps

    # ------------------------------------------------------------------ frozen prefix

    @property
    def cacheable(self) -> bool:
        """Whether there is a frozen, unconditioned prefix that is the same for a clip in every
        epoch (given the same spectrogram); the embedding alone is not worth it."""
        free = not (self.methods.whole_input or self.methods.hears)
        return self.cut not in (None, Cut()) and free

    def frozen_prefix(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> [B, N, D] tokens at the cut; [B, 2, D] when the cut lies after the last
        block's attention, of whose result only CLS and DIST are read. Never differentiated."""
        if self.cut is None:
            raise ValueError("nothing is frozen, so there is no frozen prefix")
        with torch.no_grad():
            return self.backbone.prefix(spectrogram, self.cut)

    def prefix_fingerprint(self) -> str:
        """Hash of everything in the model that `frozen_prefix` depends on, to name a cache by."""
        if self.cut is None:
            raise ValueError("nothing is frozen, so there is no frozen prefix")
        backbone = self.backbone
        sha = hashlib.sha256(repr((self.cut, backbone.input_size, backbone.grid)).encode())
        sha.update(repr(backbone.patch_embed.proj.stride).encode())  # two may give one grid
        sha.update(repr((backbone.blocks[0].attn.num_heads, backbone.norm.eps)).encode())
        later = tuple(f"blocks.{i}." for i in range(backbone.frozen_blocks, backbone.depth))
        for name, parameter in backbone.named_parameters():  # of LoRA's blocks all but adapters
            if not parameter.requires_grad and not name.startswith(later):
                sha.update(name.encode())
                sha.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        return sha.hexdigest()

    # ------------------------------------------------------------------ optimisation

    def parameter_groups(self) -> list[ParameterGroup]:
        """All trainable parameters, each in exactly one group."""
        groups = [
            ParameterGroup(name, [p for p in part.parameters() if p.requires_grad])
            for name, part in (("backbone", self.backbone), ("head", self.head))
        ]
        return groups + self.conditioner.parameter_groups() + self.methods.parameter_groups()
