"""From metadata fields to vectors: embeddings, missing values, the enabled subset of fields.

B batch, E embedding width, H hidden width, S enabled scalars.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.batch import Metadata
from data.task import FIELDS, SCALARS
from models.conditioner import Conditioner
from models.config import ConditionedConfig

#: The three metadata factors; "rest" is the vector of scalars.
FACTORS: tuple[str, ...] = ("device", "site", "rest")


def activation(name: str) -> nn.Module:
    """relu | gelu (exact)."""
    return {"relu": nn.ReLU, "gelu": nn.GELU}[name]()


class MetadataEmbeddings(nn.Module):
    """Device and site embeddings and the vector of scalars, with a meaning for "unknown".

    Each table has one row more than its vocabulary. Without metadata dropout the unknown row, and
    any row whose value no training cycle has, is the frequency-weighted mean of the trained rows,
    set by `finalise`; with dropout each field of each clip is hidden with its probability in
    training, or all fields of a clip together, so the unknown row is learned. An unknown scalar is
    z = 0, the training mean.

    Args:
        config: widths, dropout and the enabled fields; nothing is built for the others.
        device_counts, site_counts: training cycles per value, as long as the vocabularies with
            their unknown entry.
    """

    def __init__(
        self,
        config: ConditionedConfig,
        device_counts: Sequence[float],
        site_counts: Sequence[float],
    ):
        super().__init__()
        fields, self.joint = config.metadata_fields, config.metadata_dropout_joint
        self.hidden = [config.hidden(name) for name in FIELDS]
        self.register_buffer("_hidden", torch.tensor(self.hidden), persistent=False)
        self.fields = tuple(name for name in FIELDS if name in fields)
        self.scalars = tuple(name for name in SCALARS if name in fields)
        self._scalar_columns = [SCALARS.index(name) for name in self.scalars]
        #: factor -> width, enabled ones only, in the order of FACTORS
        self.widths: dict[str, int] = {}
        for name, width, counts in (
            ("device", config.dev_embed_dim, device_counts),
            ("site", config.site_embed_dim, site_counts),
        ):
            if name in fields:
                if sum(counts) <= 0:
                    raise ValueError(f"{name}_counts {counts}: no cycle at all")
                setattr(self, name, nn.Embedding(len(counts), width))
                self.widths[name] = width
                self.register_buffer(f"{name}_counts", torch.tensor([float(c) for c in counts]))
        if self.scalars:
            self.widths["rest"] = len(self.scalars)

    def forward(self, metadata: Metadata) -> dict[str, Tensor]:
        """Factor name -> [B, E] (device, site) or [B, S] (rest); enabled factors only.

        A field that `known` says is missing is unknown whatever its value.
        """
        known = metadata.known
        if self.training and any(self.hidden):
            known = known & (torch.rand(known.shape, device=known.device) >= self._hidden)
        if self.training and self.joint > 0:
            known = known & (torch.rand(len(known), 1, device=known.device) >= self.joint)
        out = {}
        for column, name in enumerate(("device", "site")):
            if name in self.widths:
                table = getattr(self, name)
                index = torch.where(
                    known[:, column], getattr(metadata, name), table.num_embeddings - 1
                )
                out[name] = table(index)
        if "rest" in self.widths:
            rest = torch.where(known[:, 2:], metadata.rest, 0.0)
            if len(self.scalars) < len(SCALARS):
                rest = torch.stack([rest[:, column] for column in self._scalar_columns], dim=1)
            out["rest"] = rest
        return out

    @torch.no_grad()
    def finalise(self) -> None:
        """Give every untrained row its meaning; rows that have been trained stay as they are."""
        for name in ("device", "site"):
            if name not in self.widths:
                continue
            table, counts = getattr(self, name).weight, getattr(self, f"{name}_counts")
            # the unknown row is learned with dropout; otherwise it is as frequent as in the data
            learned = self.hidden[FIELDS.index(name)] > 0 or self.joint > 0
            substitute = table[-1] if learned else (counts @ table) / counts.sum()
            table.copy_(torch.where((counts > 0)[:, None], table, substitute))


class FactorEncoder(nn.Module):
    """h = act(W2 Drop(act(W1 LN(e)))): [B, width] -> [B, H]; LN only where `norm`."""

    def __init__(self, width: int, hidden: int, *, dropout: float, act: str, norm: bool = True):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width) if norm else nn.Identity(),
            nn.Linear(width, hidden),
            activation(act),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            activation(act),
        )

    def forward(self, e: Tensor) -> Tensor:
        return self.net(e)


class ScalarEncoder(nn.Module):
    """Scalars [B, S] -> [B, 32]: each by its own (Linear 1->10, LN, act, Dropout); concatenated;
    Linear 10 S -> 32, LN, act, Dropout, Linear 32 -> 32.

    No LayerNorm across the raw scalars: it would erase their scale.
    """

    PER_SCALAR, WIDTH = 10, 32

    def __init__(self, n_scalars: int, *, dropout: float, act: str):
        super().__init__()
        width, per = self.WIDTH, self.PER_SCALAR
        self.each = nn.ModuleList(
            nn.Sequential(
                nn.Linear(1, per), nn.LayerNorm(per), activation(act), nn.Dropout(dropout)
            )
            for _ in range(n_scalars)
        )
        self.joint = nn.Sequential(
            nn.Linear(per * n_scalars, width),
            nn.LayerNorm(width),
            activation(act),
            nn.Dropout(dropout),
            nn.Linear(width, width),
        )

    def forward(self, rest: Tensor) -> Tensor:
        encoded = [net(rest[:, i : i + 1]) for i, net in enumerate(self.each)]
        return self.joint(torch.cat(encoded, dim=1))


class MetadataConditioner(Conditioner):
    """A conditioner that looks at the metadata through `MetadataEmbeddings`."""

    def __init__(self, embeddings: MetadataEmbeddings):
        super().__init__()
        self.embeddings = embeddings

    def finalise(self) -> None:
        self.embeddings.finalise()

    def probe(self) -> Metadata:
        """Every device with every site that training cycles have, at the mean age, BMI and
        duration: [n devices * n sites] rows on the conditioner's device."""

        def seen(name: str) -> Tensor:
            counts = getattr(self.embeddings, f"{name}_counts", None)
            if counts is None:  # the field is not used
                return torch.zeros(1, dtype=torch.int64, device=self.zero.device)
            return torch.nonzero(counts[:-1] > 0).flatten()

        pairs = torch.cartesian_prod(seen("device"), seen("site"))
        n = len(pairs)
        known = torch.ones(n, len(FIELDS), dtype=torch.bool, device=pairs.device)
        rest = torch.zeros(n, len(SCALARS), device=pairs.device)
        return Metadata(device=pairs[:, 0], site=pairs[:, 1], rest=rest, known=known)
