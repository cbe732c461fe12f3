"""ADD-RSC: adaptive frequency filter, differential denoising and bias-denoising loss (Dong et al.,
Interspeech 2025, arXiv 2506.02505; differential attention: Ye et al., ICLR 2025, arXiv 2410.05258).

As the authors' public code has it; what only their text has is a key. B clips, T frames, F mel
bands, H heads, K logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ADDRSCConfig
from models.method import Method
from models.precision import full_precision

BLOCKS = HEADS = 8  # of the filter's weights; of the attention
LAYER = 6  # their attention starts as one in layer 6 of differential transformers would
SMOOTHING = 0.2  # of the label in the bias-denoising loss


class FrequencyFilter(nn.Module):
    """x + irfft(softshrink(MLP(rfft(x)))) over time; the complex MLP of two layers has one block of
    weights per eighth of the bands. Zero weights leave x as it is. With `multiply` the MLP gives a
    mask: x + irfft(softshrink(MLP(rfft(x))) * rfft(x))."""

    def __init__(self, bands: int, threshold: float, multiply: bool = False, blocks: int = BLOCKS):
        super().__init__()
        self.threshold, self.multiply = threshold, multiply
        size = bands // blocks
        self.w1, self.w2 = (nn.Parameter(torch.empty(2, blocks, size, size)) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(torch.zeros(2, blocks, size)) for _ in range(2))
        for weight in (self.w1, self.w2):
            nn.init.kaiming_uniform_(weight, nonlinearity="relu")  # of fan-in blocks * size^2

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, T, F] float32."""
        with full_precision(x):
            x = x.float()
            # along the last dimension: of others the compiler assumes another layout than FFTs give
            spectrum = torch.fft.rfft(x.mT.contiguous(), norm="ortho")  # [B, F, T / 2 + 1]
            blocks = torch.view_as_real(spectrum).unflatten(1, (self.w1.shape[1], -1))
            parts = blocks.permute(0, 3, 1, 4, 2).flatten(3)  # [B, T / 2 + 1, blocks, re | im]
            parts = _complex(_complex(parts, self.w1, self.b1).relu(), self.w2, self.b2)
            parts = F.softshrink(parts, self.threshold).unflatten(-1, (2, -1))
            parts = parts.permute(0, 2, 4, 1, 3).flatten(1, 2).contiguous()  # [B, F, T / 2 + 1, 2]
            found = torch.view_as_complex(parts)
            if self.multiply:
                found = found * spectrum
            return x + torch.fft.irfft(found, n=x.shape[1], norm="ortho").mT


def _complex(parts: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Complex linear layer of each block on [..., blocks, real | imaginary] of real numbers."""
    real, imaginary = weight
    rows = [torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)]
    out = torch.einsum("bthi,hio->btho", parts, torch.cat(rows, dim=-2))
    return out + torch.cat([bias[0], bias[1]], dim=-1)


class DifferentialAttention(nn.Module):
    """[softmax(q1 k1^T / sqrt d) - lambda softmax(q2 k2^T / sqrt d)] v per head, RMS-normalised and
    scaled by 1 - lambda_init; lambda = exp(lq1 lk1) - exp(lq2 lk2) + lambda_init, one per head.

    By linearity two fused attentions, without a T x T matrix. q1 and q2 are padded with zeros
    instead of cutting k = (k1, k2), as the fused kernels want q, k and v of one width.
    """

    def __init__(self, dim: int, heads: int = HEADS, layer: int = LAYER):
        super().__init__()
        self.heads, size = heads, dim // heads
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(heads, size)))
            nn.init.kaiming_uniform_(getattr(self, name), nonlinearity="relu")
        self.q, self.k, self.v = (nn.Linear(dim, 2 * dim, bias=False) for _ in range(3))
        self.norm = nn.RMSNorm(2 * size, eps=1e-5)
        self.out = nn.Linear(2 * dim, dim, bias=False)
        for layer_ in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(layer_.weight)

    def weight(self) -> Tensor:
        """lambda, [H]."""
        first = (self.lambda_q1 * self.lambda_k1).sum(1).exp()
        return first - (self.lambda_q2 * self.lambda_k2).sum(1).exp() + self.lambda_init

    def difference(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, H, T, 2 F / H], before the norm."""
        split = (self.heads, 2 * self.lambda_q1.shape[1])
        q, k, v = (part(x).unflatten(2, split).transpose(1, 2) for part in (self.q, self.k, self.v))
        first, second = q.chunk(2, dim=-1)
        size = first.shape[-1]
        queries = F.pad(first, (0, size)), F.pad(second, (size, 0))
        a, b = (F.scaled_dot_product_attention(one, k, v, scale=size**-0.5) for one in queries)
        return a - self.weight()[:, None, None] * b

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, T, F]."""
        out = self.norm(self.difference(x).float()) * (1 - self.lambda_init)
        return self.out(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """(silu(x G) * (x U)) D, twice as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*sizes) for sizes in ((dim, 2 * dim), (dim, 2 * dim), (2 * dim, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def bias_denoising(logits: Tensor, label: Tensor) -> Tensor:
    """KL divergence of the prediction from the smoothed class (0.8, and 0.2 shared by the others),
    mean over the clips: logits [B, 4] of the classes or [B, 1] of abnormal, label [B, C]."""
    if logits.shape[1] == 1:
        logits = F.pad(logits, (1, 0))
    class_ = label[:, 0] + (2 * label[:, 1] if label.shape[1] > 1 else 0)
    others = SMOOTHING / (logits.shape[1] - 1)
    target = others + (1 - SMOOTHING - others) * F.one_hot(class_.long(), logits.shape[1])
    return F.kl_div(logits.log_softmax(dim=1), target, reduction="batchmean")


class ADDRSC(Method):
    """Learned input filter: x1 = FrequencyFilter(x); y = x1 + A(RMS(x1)); the transformer sees
    y + SwiGLU(RMS(y)), in training and in prediction.

    L = (1 - weight) L_task + weight * bias_denoising(Linear(mean of frames 0 and 1 of x1)), the
    four classes whatever the task loss is (two classes: one logit). These two frames are the
    authors' choice, after CLS and DIST of a transformer; `evidence: all` takes the mean over time.
    """

    filters = True

    def __init__(self, config: ADDRSCConfig, n_mels: int, n_outputs: int):
        super().__init__()
        self.config = config
        multiply = config.spectrum == "multiplied"
        self.first = FrequencyFilter(n_mels, config.softshrink, multiply)
        self.classifier = nn.Linear(n_mels, 1 if n_outputs == 1 else 4)
        self.norm1, self.norm2 = (nn.RMSNorm(n_mels, eps=1e-5) for _ in range(2))
        self.attention, self.feedforward = DifferentialAttention(n_mels), SwiGLU(n_mels)
        self.second = None
        if config.second_filter:
            self.second = FrequencyFilter(n_mels, config.softshrink, multiply)

    def filter(self, spectrogram: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.first(spectrogram.squeeze(1).transpose(1, 2))  # [B, T, F]
        frames = x[:, :2] if self.config.evidence == "first" else x
        evidence = self.classifier(frames.mean(dim=1))
        x = x + self.attention(self.norm1(x))
        x = x + self.feedforward(self.norm2(x))
        if self.second is not None:
            x = self.second(x)
        return x.transpose(1, 2).unsqueeze(1), evidence

    def loss(self, features, aside, plan, evidence):
        return self.config.weight * bias_denoising(evidence.float(), aside.label)

    def weigh(self, losses, aside):
        return (1 - self.config.weight) * losses

    def diagnostics(self) -> dict[str, float]:
        return {"add_rsc/lambda": self.attention.weight().mean().item()}


def build(config: ADDRSCConfig, *, n_mels: int, n_outputs: int, **_: int) -> ADDRSC:
    """The method for spectrograms of so many bands and a model of so many logits."""
    return ADDRSC(config, n_mels, n_outputs)
