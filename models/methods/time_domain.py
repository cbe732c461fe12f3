"""Time domain: CLS and DIST attend to the tokens of wav2vec 2.0, which hears the waveform itself.

After Dong et al., "Respiratory sounds classification by fusing the time-domain and 2D spectral
features", Biomedical Signal Processing and Control 2025, PII S1746809425003015, but not as their
public code: no convolution of width 230 over the spectrogram's tokens, and the attended values are
not scrambled by a reshape; wav2vec 2.0 gives keys and values here, CLS and DIST the queries. No
figure of theirs is claimed. wav2vec 2.0: Baevski et al., NeurIPS 2020, arXiv 2006.11477.

B clips, S samples, M tokens of the waveform, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.config import TimeDomainConfig
from models.method import Method
from utils.common.errors import UserError


class TimeDomain(Method):
    """special += Out(softmax(Q K^T / sqrt(D)) V), Out zero at the start: then it is the AST."""

    hears = True

    def __init__(self, config: TimeDomainConfig, dim: int):
        super().__init__()
        self.encoder = encoder(config)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.tokens = nn.Linear(config.embed_dim, dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def wave(self, waveform: Tensor) -> Tensor:
        sound = waveform - waveform.mean(dim=1, keepdim=True)
        sound = sound / (sound.square().mean(dim=1, keepdim=True) + 1e-7).sqrt()
        return self.tokens(self.norm(self.encoder(sound).last_hidden_state))

    def attend(self, special: Tensor, wave: Tensor) -> Tensor:
        heard = F.scaled_dot_product_attention(
            self.query(special), self.key(wave), self.value(wave)
        )
        return special + self.out(heard)


def encoder(config: TimeDomainConfig) -> nn.Module:
    """wav2vec 2.0 with the pretrained weights, or random ones where none are named.

    Its own masking and LayerDrop are off: all randomness of a run must come back when it resumes.
    """
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": 4 * config.embed_dim,
        "conv_dim": [config.conv_dim] * 7,
    }
    off = {"layerdrop": 0.0, "apply_spec_augment": False}
    off |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    own = Wav2Vec2Config(**sizes, **off)
    if config.weights is None:
        return Wav2Vec2Model(own)
    try:
        found = Wav2Vec2Config.from_pretrained(config.weights)
        differing = [k for k, v in sizes.items() if getattr(found, k) != getattr(own, k)]
        if not differing:
            return Wav2Vec2Model.from_pretrained(config.weights, config=own).float()
    except (OSError, ValueError) as error:
        raise UserError(
            f"methods.time_domain.weights: {config.weights} cannot be had "
            f"({type(error).__name__}); name a local folder with config.json and "
            "model.safetensors of a wav2vec2-base, or null for random weights"
        ) from error
    key = {"hidden_size": "embed_dim", "intermediate_size": "embed_dim", "conv_dim": "conv_dim"}
    key |= {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    raise UserError(
        f"methods.time_domain.weights: {config.weights} has {differing[0]} "
        f"{getattr(found, differing[0])}; set methods.time_domain.{key[differing[0]]} accordingly"
    )


def build(config: TimeDomainConfig, *, embed_dim: int, **_: int) -> TimeDomain:
    return TimeDomain(config, embed_dim)
