"""SG-SCL, stethoscope-guided contrastive learning (Kim et al., ICASSP 2024, arXiv 2312.09603)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import SGSCLConfig
from models.method import Method, Projector, no_loss


def device_contrast(
    first: Tensor, second: Tensor, device: Tensor, known: Tensor, temperature: float
) -> Tensor:
    """Supervised contrast of two views [B, D] with the device [B] as the label.

    Z = [n(first); n(S(second))], S the stop-gradient; over the 2 B rows

        L = -mean_i mean_{j != i, dev j = dev i} log softmax_{k != i}(Z_i Z_k / temperature)_j

    Rows whose device is not known are neither anchors nor positives; they stay in the denominator.
    """
    rows = F.normalize(torch.cat([first, second.detach()]), dim=1)
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    similarity = (rows @ rows.T / temperature).masked_fill(own, float("-inf"))
    log_share = similarity.log_softmax(dim=1).masked_fill(own, 0.0)
    device, known = device.repeat(2), known.repeat(2)
    positive = (device[:, None] == device) & known[:, None] & known & ~own
    mean = (log_share * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return -mean.sum() / known.sum().clamp(min=1)


class SGSCL(Method):
    """Two augmentation draws per clip; projections of one device's clips attract each other.

    As the authors' code has it: the first view is classified, the second one's projection has no
    gradient, and gradient reversal plays no part. Their second view masks the first one's
    spectrogram again; here the draws are independent.
    """

    views = 2

    def __init__(self, config: SGSCLConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.projector = Projector(embed_dim)

    def loss(self, features, aside, plan, evidence):
        if features.shape[1] < 2:
            return no_loss(self, features)
        first, second = self.projector(features[0]), self.projector(features[1])
        contrast = device_contrast(
            first, second, aside.device, aside.device_known, self.config.temperature
        )
        return self.config.weight * contrast


def build(config: SGSCLConfig, *, embed_dim: int, **_: int) -> SGSCL:
    """The method for a backbone of width embed_dim."""
    return SGSCL(config, embed_dim)
