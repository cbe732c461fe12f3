"""Several trained models as one: gated fusion of their features, or the mean of their answers.

Gated fusion is MVST's (He et al., "Multi-View Spectrogram Transformer for Respiratory Sound
Classification", ICASSP 2024, arXiv 2311.09655), there of five patch shapes; any models will do.
The models themselves are not part of it: it takes what they gave, computed once per cycle.

B batch, V fused models, D width, K logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import Batch, Metadata
from models.conditioner import Conditioner, Features, ModelOutput, ParameterGroup
from models.method import Methods, Step


class FusionModel(nn.Module):
    """What the loop asks of a model, over the features of V others."""

    layer_norm_eps = 1e-6  # it has no norm

    def __init__(self):
        super().__init__()
        self.conditioner, self.methods = Conditioner(), Methods()

    def draw(self, batch: Batch, seed: int, features: Features | None = None) -> Step | None:
        """No method is at work."""

    def merge(self) -> None:
        """There are no adapters."""

    def embed(self, values: Tensor) -> Tensor:
        """What was fused, [B, V, W] -> [B, W]."""
        raise NotImplementedError

    def logits(self, values: Tensor) -> Tensor:
        """[B, V, W] -> [B, K]."""
        raise NotImplementedError

    def forward(
        self, features: Features | Tensor, metadata: Metadata, step: Step | None = None
    ) -> ModelOutput:
        """Features [B, V, W] -> logits [B, K] float32; the metadata are in the features."""
        values = features.values if isinstance(features, Features) else features
        with torch.autocast(values.device.type, enabled=False):
            return ModelOutput(self.logits(values.float()), self.conditioner.regularisation())


class GatedFusion(FusionModel):
    """y = head(sum_i sigmoid(x_i W_i) * x_i), over pooled features x_i [B, D].

    W_i start Kaiming normal, the head with sd 0.01, as in the public code.
    """

    def __init__(self, members: int, dim: int, n_outputs: int):
        super().__init__()
        self.gates = nn.Parameter(torch.empty(members, dim, dim))
        for gate in self.gates.data:
            nn.init.kaiming_normal_(gate)
        self.head = nn.Linear(dim, n_outputs)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def embed(self, values: Tensor) -> Tensor:
        gates = torch.sigmoid(torch.einsum("bvd,vde->bve", values, self.gates))
        return (gates * values).sum(dim=1)

    def logits(self, values: Tensor) -> Tensor:
        return self.head(self.embed(values))

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup("gates", [self.gates]),
            ParameterGroup("head", list(self.head.parameters())),
        ]


class MeanFusion(FusionModel):
    """Logits of the mean probability, from logits [B, V, K]: the control of every other fusion.

    The weights of the mean are equal and stay so (learning rate 0); they are parameters so that
    the same loop chooses its thresholds.

    exclusive: the K outputs are one softmax, not K sigmoids.
    """

    def __init__(self, members: int, exclusive: bool):
        super().__init__()
        self.exclusive = exclusive
        self.weights = nn.Parameter(torch.zeros(members))

    def _mean(self, log_probability: Tensor) -> Tensor:
        weights = F.log_softmax(self.weights, dim=0)[:, None]
        return torch.logsumexp(log_probability + weights, dim=1)

    def logits(self, values: Tensor) -> Tensor:
        if self.exclusive:
            return self._mean(F.log_softmax(values, dim=-1))
        return self._mean(F.logsigmoid(values)) - self._mean(F.logsigmoid(-values))

    embed = logits

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("equal weights", [self.weights], lr_multiplier=0.0)]
