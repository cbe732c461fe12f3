"""Our AST against transformers' AST, and each conditioned variant against our AST.

    python -m benchmarks.model_step [--device cpu|cuda] [--batch 1] [--rounds 5] [--threads 2]
                                    [--precision fp32 bf16] [--depth 12] [--compile]

The paper's size (128 x 1,024, 12 blocks of width 768), the same weights, the same input. A step is
forward pass, loss, backward pass and fused AdamW. Two kinds of work: `same work` computes the last
block for all tokens, as transformers does; `ours` computes there only what the pooled vector needs.
A round holds every contestant once and a large matrix product, the measure of what the machine can
do: `of matmul` is the contestant's FLOP/s (utils.runs.model_summary) over the product's.
Ratios are medians over the rounds; +- is their interquartile range over the median. On a machine
that does other things too the ratios hold, `of matmul` suffers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification

from benchmarks.timing import Timing, interleave
from data.batch import DEVICES, FIELDS, SITES, Metadata
from models.build import build_model
from models.conditioned_ast import ConditionedAST
from models.pretrained import Weights, from_transformers, load_into
from models.registry import VARIANTS
from utils.runs.model_summary import Flops, backbone_flops, small_parts_flops

N_MELS, N_OUTPUTS = 128, 2
SAME_WORK, OURS, SDPA, EAGER, MATMUL = "same work", "ours", "transformers", "eager", "matmul"


class Size(NamedTuple):
    """Of the transformer and its input; the defaults are the paper's."""

    depth: int = 12
    embed_dim: int = 768
    heads: int = 12
    n_frames: int = 1024


class AllTokens(nn.Module):
    """Our model with the last block computed for all tokens."""

    def __init__(self, model: ConditionedAST):
        super().__init__()
        self.model = model

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> logits [B, K]."""
        return self.model.head(self.model.backbone.tokens(spectrogram)[:, :2].mean(dim=1))


class Conditioned(nn.Module):
    """Our model with fixed metadata."""

    def __init__(self, model: ConditionedAST, metadata: Metadata):
        super().__init__()
        self.model, self.metadata = model, metadata

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> logits [B, K]; the regularisation is added so that it costs too."""
        out = self.model(spectrogram, self.metadata)
        return out.logits + out.regularisation


class Transformers(nn.Module):
    """transformers' model behind our input layout."""

    def __init__(self, model: ASTForAudioClassification):
        super().__init__()
        self.model = model

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> logits [B, K]."""
        return self.model(spectrogram[:, 0].transpose(1, 2)).logits


def our_model(
    variant: str,
    size: Size,
    *,
    trainable_blocks: int | None = None,
    gradient_checkpointing: bool = False,
    activation: str = "relu",
) -> ConditionedAST:
    """A variant with random weights, all blocks trainable unless told otherwise."""
    return build_model(
        variant,
        VARIANTS[variant].config_class(activation=activation),
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=4.0,
        patch_size=16,
        freq_stride=10,
        time_stride=10,
        n_mels=N_MELS,
        n_frames=size.n_frames,
        n_outputs=N_OUTPUTS,
        weights="none",
        weights_path=None,
        trainable_blocks=size.depth if trainable_blocks is None else trainable_blocks,
        gradient_checkpointing=gradient_checkpointing,
    )


def transformers_model(size: Size, attention: str) -> ASTForAudioClassification:
    """The published configuration, at another size perhaps."""
    config = ASTConfig(
        num_hidden_layers=size.depth,
        hidden_size=size.embed_dim,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.embed_dim,
        max_length=size.n_frames,
        num_labels=N_OUTPUTS,
        attn_implementation=attention,
    )
    return ASTForAudioClassification(config)


def peers(size: Size, metadata: Metadata) -> dict[str, nn.Module]:
    """Our AST with both kinds of work and transformers' with both kinds of attention; all of them
    hold the same backbone weights."""
    sdpa, eager = transformers_model(size, "sdpa"), transformers_model(size, "eager")
    eager.load_state_dict(sdpa.state_dict())
    same, ours = our_model("ast", size), our_model("ast", size)
    state = from_transformers(sdpa.state_dict())
    for model in (same, ours):
        weights = Weights(state, 1e-12, model.backbone.grid, size.heads, "transformers")
        load_into(model.backbone, weights)
    return {
        SAME_WORK: AllTokens(same),
        OURS: Conditioned(ours, metadata),
        SDPA: Transformers(sdpa),
        EAGER: Transformers(eager),
    }


def variants(size: Size, metadata: Metadata) -> dict[str, nn.Module]:
    """Every variant there is."""
    return {name: Conditioned(our_model(name, size), metadata) for name in VARIANTS}


def some_metadata(batch: int, device: str) -> Metadata:
    """Metadata of `batch` clips, all fields known."""
    return Metadata(
        device=torch.arange(batch) % len(DEVICES),
        site=torch.arange(batch) % len(SITES),
        rest=torch.zeros(batch, 3),
        known=torch.ones(batch, len(FIELDS), dtype=torch.bool),
    ).to(device)


def large_matmul(
    device: str, dtype: torch.dtype, n: int | None = None
) -> tuple[Callable[[], Tensor], float]:
    """A product of two n x n matrices and its FLOPs; long enough to drown what a call costs."""
    n = n or (16384 if torch.device(device).type == "cuda" else 3072)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * n**3


@contextlib.contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Autocast for bf16; plain float32 otherwise."""
    kind = torch.device(device).type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=name == "bf16"):
        yield


def actions(module: nn.Module, x: Tensor, kind: str, name: str, device: str) -> Callable[[], None]:
    """What is timed: one forward pass without gradients, or one training step."""
    if kind == "forward":

        def forward() -> None:
            with torch.no_grad(), precision(name, device):
                module(x)

        return forward
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with precision(name, device):
            loss = module(x).float().square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def flops_of(models: dict[str, nn.Module], size: Size) -> dict[str, Flops]:
    """FLOPs per clip of each contestant; transformers does the same work as `same work`."""
    flops = {}
    for label, module in models.items():
        model = models[SAME_WORK].model if isinstance(module, Transformers) else module.model
        everything = label in (SAME_WORK, SDPA, EAGER)
        flops[label] = backbone_flops(model.backbone, all_tokens=everything)
        if not everything:
            with torch.device("meta"):
                name = label if label in VARIANTS else "ast"
                flops[label] += small_parts_flops(our_model(name, size))
    return flops


def contestants(
    models: dict[str, nn.Module],
    kind: str,
    name: str,
    *,
    size: Size,
    batch: int,
    device: str,
    compiled: Collection[str] = (),
    matmul_size: int | None = None,
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What takes turns: every model's forward pass or step, and the matrix product.

    Args:
        kind, name: "forward" or "step"; "fp32" or "bf16".
        compiled: labels of the models that torch.compile shall have.

    Returns:
        Calls by label (`matmul` among them), and FLOPs per call by label.
    """
    x = torch.randn(batch, 1, N_MELS, size.n_frames, device=device)
    flops = {
        label: batch * (f.forward if kind == "forward" else f.training)
        for label, f in flops_of(models, size).items()
    }
    calls: dict[str, Callable[[], object]] = {}
    for label, module in models.items():
        module.to(device).train(kind == "step")
        called = torch.compile(module) if label in compiled else module
        calls[label] = actions(called, x, kind, name, device)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    calls[MATMUL], flops[MATMUL] = large_matmul(device, dtype, matmul_size)
    return calls, flops


def report(
    title: str, timings: dict[str, Timing], flops: dict[str, float], base: str, batch: int
) -> dict[str, dict[str, float]]:
    """Print one table, times relative to `base`; give its figures back."""
    product = timings[MATMUL]
    print(f"\n{title}")
    print(f"{'':22}{'s/clip':>10}{'GFLOP/s':>10}{'of matmul':>11}{f'time / {base}':>22}{'+-':>7}")
    rows = {}
    for label, timing in timings.items():
        per_call = flops[label]
        # (flops / time) / (product flops / product time), round by round
        share = per_call / flops[MATMUL] * timing.ratio(product)
        rows[label] = {
            "seconds_per_clip": timing.median / (1 if label == MATMUL else batch),
            "gflops_per_second": per_call / timing.median / 1e9,
            "of_matmul": share,
            "time_over_base": timings[base].ratio(timing),
            "spread": timings[base].ratio_spread(timing),
            "seconds_spread": timing.spread,
        }
        seconds = "" if label == MATMUL else f"{rows[label]['seconds_per_clip']:.4g}"
        relative = "" if label == MATMUL else f"{rows[label]['time_over_base']:.3f}"
        spread = "" if label == MATMUL else f"{rows[label]['spread']:.3f}"
        print(
            f"{label:22}{seconds:>10}{rows[label]['gflops_per_second']:>10.1f}"
            f"{share:>11.1%}{relative:>22}{spread:>7}",
            flush=True,
        )
    return rows


def run(options: argparse.Namespace) -> dict:
    """All tables; the figures by table and contestant."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.backends.cudnn.allow_tf32 = options.tf32
    if options.threads:
        torch.set_num_threads(options.threads)
    metadata = some_metadata(options.batch, options.device)
    size = Size(depth=options.depth)
    results: dict = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch": options.batch,
        "depth": options.depth,
        "compile": options.compile,
        "rounds": options.rounds,
    }
    groups = {"peers": (peers, SDPA), "variants": (variants, "ast")}
    for group in options.groups:
        make, base = groups[group]
        for name in options.precision:
            for kind in options.kind:
                models = make(size, metadata)
                calls, flops = contestants(
                    models,
                    kind,
                    name,
                    size=size,
                    batch=options.batch,
                    device=options.device,
                    compiled=models if options.compile else (),
                )
                timings = interleave(
                    calls, rounds=options.rounds, warmup=options.warmup, device=options.device
                )
                title = f"{group}, {kind}, {name}, batch {options.batch}"
                key = f"{group}_{kind}_{name}"
                results[key] = report(title, timings, flops, base, options.batch)
                del models, calls
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1, help="clips per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--depth", type=int, default=12, help="blocks; fewer for a quick look")
    for name, values in (
        ("precision", ["fp32", "bf16"]),
        ("kind", ["forward", "step"]),
        ("groups", ["peers", "variants"]),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=values, choices=values)
    parser.add_argument("--compile", action="store_true", help="torch.compile for all contestants")
    parser.add_argument("--tf32", action="store_true", help="let fp32 products use TF32 (CUDA)")
    return parser.parse_args(arguments)


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    print(json.dumps(_rounded(run(parse()))))


if __name__ == "__main__":
    main()
