"""PAFA, patient-aware feature alignment (Jeong & Kim, Interspeech 2025, arXiv 2505.23834)."""

from __future__ import annotations

from torch import Tensor, nn

from models.config import PAFAConfig
from models.method import Method


def patient_losses(z: Tensor, patient: Tensor) -> tuple[Tensor, Tensor]:
    """(PCSL, GPAL) of projections z [B, D] and patients [B].

    With centroids c_p of the P patients, W = sum_p sum_{i in p} |z_i - c_p|^2:
    PCSL = W / (sum_{p<q} |c_p - c_q|^2 + 1e-6), GPAL = mean_p |c_p - mean_p c|^2; both 0 when
    P = 1. Computed without a list of the patients, whose number changes from batch to batch: row
    i stands for its patient with weight 1 / n_i, n_i the clips of its patient.
    """
    same = (patient[:, None] == patient).to(z.dtype)  # [B, B]
    clips = same.sum(dim=1)  # [B]
    centroid = same @ z / clips[:, None]  # [B, D]: of each row's patient
    within = (z - centroid).square().sum()
    patients = (1 / clips).sum()  # P
    mean = (centroid / clips[:, None]).sum(dim=0) / patients
    spread = ((centroid - mean).square().sum(dim=1) / clips).sum()  # sum_p |c_p - mean|^2
    several = (patients > 1.5).to(z.dtype)
    # sum over pairs of |c_p - c_q|^2 = P * sum_p |c_p - mean|^2
    return several * within / (patients * spread + 1e-6), several * spread / patients


class PAFA(Method):
    """L = L_task + pcsl_weight * PCSL + gpal_weight * GPAL on z = Linear, LN, ReLU, Linear (D wide)
    of the pooled features. Needs batches that hold several clips of a patient (the authors: 32)."""

    def __init__(self, config: PAFAConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.projector = nn.Sequential(
            nn.Linear(embed_dim, embed_dim),
            nn.LayerNorm(embed_dim),
            nn.ReLU(),
            nn.Linear(embed_dim, embed_dim),
        )

    def loss(self, features, aside, plan, evidence):
        pcsl, gpal = patient_losses(self.projector(features[0]), aside.patient)
        return self.config.pcsl_weight * pcsl + self.config.gpal_weight * gpal


def build(config: PAFAConfig, *, embed_dim: int, **_: int) -> PAFA:
    """The method for a backbone of width embed_dim."""
    return PAFA(config, embed_dim)
