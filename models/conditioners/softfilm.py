"""SoftFiLM-AST: FiLM factorised over metadata factors that share the features by soft masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.batch import Metadata
from models.conditioner import ConditionState, Modulation, ParameterGroup
from models.config import SoftFiLMConfig
from models.encoders import FactorEncoder, MetadataEmbeddings
from models.masks import SoftMasks, mask_controls
from models.modulation import Generators, ModulatingConditioner


class SoftFiLM(ModulatingConditioner):
    """gamma_l = 1 + sum_k w_k * dg_{k,l}, beta_l = sum_k w_k * b_{k,l}; k in device, site, rest.

    [dg_{k,l}; b_{k,l}] = G_{k,l} h_k, h_k = act(W2 Drop(act(W1 LN(e_k)))), without that LN for the
    three raw z-scored scalars (it would erase their scale). w_k: `SoftMasks`. Generators start
    Xavier-uniform with gain 0.1: at zero the masks would get no gradient. Loss = task +
    mask_overlap_lambda * mean of the pairwise mean(w_i w_j)
    + mask_coverage_lambda * mean(1 - max_k w_k).
    """

    GENERATOR_GAIN = 0.1

    def __init__(
        self,
        embeddings: MetadataEmbeddings,
        config: SoftFiLMConfig,
        *,
        embed_dim: int,
        depth: int,
    ):
        super().__init__(embeddings, config, depth)
        layers, hidden = len(self.conditioned_layers), config.film_hidden_dim
        sets = layers if config.per_layer_masks else 1
        self.masks = SoftMasks(tuple(embeddings.widths), embed_dim, config, n_sets=sets)
        self.mask_lr_multiplier = config.mask_lr_multiplier
        self.encoders = nn.ModuleDict(
            {
                name: FactorEncoder(
                    width,
                    hidden,
                    dropout=config.dropout_in_encoders,
                    act=config.activation,
                    norm=name != "rest",
                )
                for name, width in embeddings.widths.items()
            }
        )
        self.generators = nn.ModuleDict(
            {
                name: Generators(layers, hidden, embed_dim, gain=self.GENERATOR_GAIN)
                for name in embeddings.widths
            }
        )

    @property
    def factors(self) -> tuple[str, ...]:
        """Enabled factors, in the order of the masks."""
        return self.masks.factors

    def contributions(self, metadata: Metadata) -> Tensor:
        """w_k * [dg_{k,l}; b_{k,l}]: [K, B, L, 2, D]."""
        parts, weights = self.embeddings(metadata), self.masks()
        return torch.stack(
            [
                weights[k].unsqueeze(1) * self.generators[name](self.encoders[name](parts[name]))
                for k, name in enumerate(self.factors)
            ]
        )

    def encode(self, metadata: Metadata) -> ConditionState:
        out = self.contributions(metadata).sum(dim=0)  # [B, L, 2, D]
        scale, shift = out.unsqueeze(3).unbind(2)  # [B, L, 1, D] each
        return self.state(map(Modulation, scale.unbind(1), shift.unbind(1)))

    def regularisation(self) -> Tensor:
        return self.masks.regularisation()

    def on_epoch(self, epoch: int) -> None:
        self.masks.set_epoch(epoch)

    def parameter_groups(self) -> list[ParameterGroup]:
        rest = [p for name, p in self.named_parameters() if name != "masks.logits"]
        return [
            ParameterGroup("conditioner", rest),
            ParameterGroup("masks", [self.masks.logits], self.mask_lr_multiplier, 0.0),
        ]

    def diagnostics(self) -> dict[str, float]:
        return {**super().diagnostics(), **self.masks.diagnostics()}

    def controls(
        self, *, lr: float, steps: int, steps_per_epoch: int, schedule: Callable[[int], float]
    ) -> dict[str, float]:
        """The overlaps that small trained ones must be compared with: `mask_controls`."""
        found = mask_controls(
            self.masks,
            lr=lr * self.mask_lr_multiplier,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            schedule=schedule,
        )
        return {f"masks/{name}": value for name, value in found.items()}

    @torch.no_grad()
    def factor_effects(
        self, metadata: Metadata, part: str = "both", centred: bool = False
    ) -> Tensor:
        """Size of each factor's effect in each conditioned block: [K, L].

        Mean over cycles of || w_k * [dg_{k,l}; b_{k,l}] || (2-norm over D, without dropout).

        Args:
            part: "scale" (dg only), "shift" (b only) or "both".
            centred: subtract the mean over the cycles first, so that only what differs between
                cycles counts, not a constant that every cycle receives.
        """
        mode = self.training
        self.eval()
        try:
            out = self.contributions(metadata)  # [K, B, L, 2, D]
        finally:
            self.train(mode)
        out = {"scale": out[..., :1, :], "shift": out[..., 1:, :], "both": out}[part]
        if centred:
            out = out - out.mean(dim=1, keepdim=True)
        return out.flatten(3).norm(dim=-1).mean(dim=1)


def build(config: SoftFiLMConfig, *, embed_dim, depth, device_counts, site_counts) -> SoftFiLM:
    embeddings = MetadataEmbeddings(config, device_counts, site_counts)
    return SoftFiLM(embeddings, config, embed_dim=embed_dim, depth=depth)
