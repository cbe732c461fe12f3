"""Patch-Mix contrastive learning (Bae et al., Interspeech 2023, arXiv 2305.14032)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import PatchMixConfig
from models.method import Method, Plan, Projector, generator, no_loss


def mix_tokens(patches: Tensor, order: Tensor, taken: Tensor) -> Tensor:
    """Patches [B, N, D] with the taken [N] positions of clip order[i] in place of clip i's."""
    return torch.where(taken[:, None], patches[order], patches)


def n_taken(tokens: int, lam: float) -> int:
    """Token positions that come from the partner; rounded down, in double precision."""
    return int(tokens * (1 - lam))


def patchmix_contrast(
    mixed: Tensor, clean: Tensor, order: Tensor, kept: Tensor, temperature: float
) -> Tensor:
    """Soft-target contrast of mixed projections with clean features, both [B, D].

    Row i of the target has `kept` at i and 1 - kept at order[i]; no gradient reaches `clean`.
    """
    similarity = F.normalize(mixed, dim=1) @ F.normalize(clean.detach(), dim=1).T / temperature
    own = torch.eye(len(mixed), dtype=mixed.dtype, device=mixed.device)
    return F.cross_entropy(similarity, kept * own + (1 - kept) * own[order])


class PatchMix(Method):
    """Tokens of clip pairs are mixed; the mixture is contrasted with both clean clips.

    lam ~ Beta(1, 1), one per micro-batch; k = floor(N (1 - lam)) token positions, the same for
    all clips, come from clip order[i] (a random permutation), before positions, CLS and DIST;
    kept = 1 - k / N. With z = P(pool(mixed)), h = pool(clean) without gradient, n() row
    normalisation and T = kept I + (1 - kept) I[order]:

        L = L_task(clean) + weight * cross_entropy(n(z) n(h)^T / temperature, T)

    `loss: ce` is the paper's Patch-Mix CE: no contrast, the mixed rows alone are classified with
    L = kept L_task(y) + (1 - kept) L_task(y[order]). The mixed row keeps clip i's metadata.
    The authors' position embeddings are transposed; ours are not.
    """

    mixes = True

    def __init__(self, config: PatchMixConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.adds_mix = config.loss == "contrast"
        self.projector = Projector(embed_dim) if self.adds_mix else None

    def draw(self, clips: int, tokens: int, seed: int) -> dict[str, Tensor]:
        rng = generator(seed)
        beta = torch.full((1,), float(self.config.beta))
        gammas = torch._standard_gamma(beta.repeat(2), generator=rng)
        lam = (gammas[0] / gammas.sum()).item()
        count = n_taken(tokens, lam)
        order = torch.randperm(clips, generator=rng)
        taken = torch.zeros(tokens, dtype=torch.bool)
        taken[torch.randperm(tokens, generator=rng)[:count]] = True
        return {"order": order, "taken": taken, "kept": torch.tensor(1 - count / tokens)}

    def mix(self, patches: Tensor, plan: Plan) -> Tensor:
        return mix_tokens(patches, plan["order"], plan["taken"])

    def targets(self, label: Tensor, plan: Plan) -> list[tuple[Tensor | float, Tensor]]:
        if self.adds_mix:
            return [(1.0, label)]
        kept = plan["kept"]
        return [(kept, label), (1 - kept, label[plan["order"]])]

    def loss(self, features, aside, plan, evidence):
        if not self.adds_mix:
            return None
        clean, mixed = features[0], features[-1]
        if len(clean) < 2:
            return no_loss(self, features)
        contrast = patchmix_contrast(
            self.projector(mixed), clean, plan["order"], plan["kept"], self.config.temperature
        )
        return self.config.weight * contrast


def build(config: PatchMixConfig, *, embed_dim: int, **_: int) -> PatchMix:
    """The method for a backbone of width embed_dim."""
    return PatchMix(config, embed_dim)
