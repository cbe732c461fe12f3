"""Our AST against transformers' AST; each conditioned variant and training method against our AST.

    python -m benchmarks.model_step [--device cpu|cuda] [--batch 1] [--rounds 5] [--threads 2]
                                    [--precision fp32 bf16] [--depth 12] [--compile]
                                    [--groups peers variants methods adapters] [--only add_rsc]
                                    [--bands 128] [--stride 10]

The paper's size (128 x 1,024, 12 blocks of width 768), the same weights, the same input. A step is
forward pass, loss, backward pass and fused AdamW; one of SAM has two forward and backward passes.
Two kinds of work: `same work` computes the last block for all tokens, as transformers does; `ours`
computes there only what the pooled vector needs.
Methods act in training, so that their group has steps only; contrasts need --batch 2 or more.
`flops_over_base` is the arithmetic that a method's `time_over_base` should follow; ADD-RSC has its
own input with `--bands 256 --stride 16`. `state_mib` of adapters are gradients and Adam's moments,
`saved_mib` what the forward pass keeps for the backward one; both are counted, on any device.
A round holds every contestant once and a large matrix product, the measure of what the machine can
do: `of_matmul` is the contestant's FLOP/s (counted by torch) over the product's. `spread` is the
interquartile range of the rounds' ratios over their median. On a machine that runs other jobs the
ratios hold, `of_matmul` suffers.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import ASTConfig, ASTForAudioClassification

from benchmarks.harness import interleave, options, rounded, spread, table
from data.batch import Batch, Metadata
from data.task import FIELDS
from models.build import build_model
from models.conditioned_ast import ConditionedAST
from models.conditioner import Features
from models.config import BackboneConfig
from models.pretrained import Weights, from_transformers, load_into
from models.registry import METHODS, VARIANTS
from utils.training.optim import sharpened

N_MELS, N_OUTPUTS = 128, 2
SAMPLES_PER_FRAME = 160_000 / 1024  # 10 s of 16 kHz are 1,024 frames
#: Of a corpus with four devices and seven sites, as many as ICBHI has.
COUNTS = {"device_counts": (1.0,) * 4 + (0.0,), "site_counts": (1.0,) * 7 + (0.0,)}
SAME_WORK, OURS, SDPA, EAGER, MATMUL = "same work", "ours", "transformers", "eager", "matmul"
#: what the others of a group are compared with
BASE = {"peers": SDPA, "variants": "ast", "methods": "ast", "adapters": "ast"}
COUNTED = ("methods", "adapters")  # groups that differ in arithmetic
#: What torch's counter does not know: a processor's fused attention.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
KERNELS = {
    _ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _BACKWARD: lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v),
}


class Size(NamedTuple):
    """Of the transformer and its input; the defaults are the paper's."""

    depth: int = 12
    embed_dim: int = 768
    heads: int = 12
    n_frames: int = 1024
    n_mels: int = N_MELS
    stride: int = 10


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


class Sharpened(Conditioned):
    """Whose step is one of sharpness-aware minimisation."""


class WithMethod(nn.Module):
    """Our model with a training method, fixed metadata and labels, one fixed draw, and noise in
    place of the waveform where the method hears it."""

    def __init__(self, model: ConditionedAST, batch: Batch):
        super().__init__()
        self.model, self.metadata, self.step = model, batch.metadata, model.draw(batch, 0)
        samples = round(model.backbone.input_size[1] * SAMPLES_PER_FRAME)
        noise = torch.randn(len(batch.metadata), samples) if model.methods.hears else None
        self.register_buffer("waveform", noise)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> logits [B, K] plus the method's loss; every view is the same here."""
        views = spectrogram.repeat(self.model.methods.views, 1, 1, 1)
        out = self.model(Features(views, waveform=self.waveform), self.metadata, self.step)
        return out.logits + out.regularisation


class Transformers(nn.Module):
    """transformers' model behind our input layout."""

    def __init__(self, size: Size, attention: str):
        super().__init__()
        config = ASTConfig(
            num_hidden_layers=size.depth,
            hidden_size=size.embed_dim,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.embed_dim,
            max_length=size.n_frames,
            num_labels=N_OUTPUTS,
            attn_implementation=attention,
        )
        self.model = ASTForAudioClassification(config)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, T] -> logits [B, K]."""
        return self.model(spectrogram[:, 0].transpose(1, 2)).logits


def our_model(
    variant: str,
    size: Size,
    activation: str = "relu",
    methods: Collection[str] = (),
    **backbone: Any,
) -> ConditionedAST:
    """A variant with random weights; all blocks are trainable unless `backbone` says otherwise."""
    sizes = {"embed_dim": size.embed_dim, "depth": size.depth, "num_heads": size.heads}
    sizes |= {"freq_stride": size.stride, "time_stride": size.stride}
    return build_model(
        variant,
        VARIANTS[variant].config_class(activation=activation),
        BackboneConfig(weights="none", **{**sizes, "trainable_blocks": size.depth, **backbone}),
        n_mels=size.n_mels,
        n_frames=size.n_frames,
        n_outputs=N_OUTPUTS,
        **COUNTS,
        methods={name: METHODS[name].config_class() for name in methods},
    )


def without_casts(model: ConditionedAST, x: Tensor, metadata: Metadata) -> tuple[Tensor, Tensor]:
    """(logits [B, K], regularisation) as `model(x, metadata)`, in the parameters' own precision."""
    state = model.conditioner.encode(metadata)
    pooled = model.backbone(x, state.modulation)
    return model.head(model.conditioner.fuse(pooled, state)), model.conditioner.regularisation()


def make_models(
    group: str, size: Size, metadata: Metadata, only: Collection[str] = METHODS
) -> dict[str, nn.Module]:
    """`variants`: every one there is. `methods`: the plain AST without and with each of `only`.
    `adapters`: the plain AST, with LoRA, with SAM. `peers`: our AST with both kinds of work and
    transformers' with both kinds of attention, all with the same backbone weights."""
    if group == "variants":
        return {name: Conditioned(our_model(name, size), metadata) for name in VARIANTS}
    if group == "adapters":
        lora = Conditioned(our_model("ast", size, adapter="lora"), metadata)
        plain, sam = (kind(our_model("ast", size), metadata) for kind in (Conditioned, Sharpened))
        return {BASE[group]: plain, "lora": lora, "sam": sam}
    if group == "methods":
        batch = some_batch(metadata)
        models = {name: our_model("ast", size, methods=[name]) for name in only}
        with_method = {name: WithMethod(model, batch) for name, model in models.items()}
        return {BASE[group]: Conditioned(our_model("ast", size), metadata), **with_method}
    sdpa, eager = Transformers(size, "sdpa"), Transformers(size, "eager")
    eager.load_state_dict(sdpa.state_dict())
    same, ours = our_model("ast", size), our_model("ast", size)
    state = from_transformers(sdpa.model.base_model.state_dict())
    for model in (same, ours):
        weights = Weights(state, 1e-12, model.backbone.grid, size.heads, "transformers")
        load_into(model.backbone, weights)
    return {SAME_WORK: AllTokens(same), OURS: Conditioned(ours, metadata), SDPA: sdpa, EAGER: eager}


def some_metadata(batch: int, device: str) -> Metadata:
    """Metadata of `batch` clips, all fields known."""
    return Metadata(
        device=torch.arange(batch) % (len(COUNTS["device_counts"]) - 1),
        site=torch.arange(batch) % (len(COUNTS["site_counts"]) - 1),
        rest=torch.zeros(batch, 3),
        known=torch.ones(batch, len(FIELDS), dtype=torch.bool),
    ).to(device)


def some_batch(metadata: Metadata) -> Batch:
    """A batch without sounds, on the metadata's device; two cycles per patient."""
    rows = torch.arange(len(metadata), device=metadata.device.device)
    label = torch.stack([rows % 2, rows // 2 % 2], dim=1).float()
    return Batch(label[:, :0], rows, metadata, label, rows, rows // 2)


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


def action(module: nn.Module, x: Tensor, kind: str, name: str, device: str) -> Callable[[], None]:
    """What is timed: one forward pass without gradients, or one training step."""

    def forward() -> None:
        with torch.no_grad(), precision(name, device):
            module(x)

    def add_gradients() -> None:
        with precision(name, device):
            loss = module(x).float().square().mean()
        loss.backward()

    def step() -> None:
        add_gradients()
        if isinstance(module, Sharpened):
            with sharpened(module.parameters(), 0.05):
                add_gradients()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    if kind == "forward":
        return forward
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    return step


def flops(module: nn.Module, x: Tensor, kind: str, computed: bool = False) -> float:
    """Of one forward pass, or of one training step (without the optimiser).

    computed: count real operations, of which fused attention's backward pass computes a product
        again, and not those on meta tensors, which know no autocast.
    """
    if not computed:
        module, x = copy.deepcopy(module).to("meta"), x.to("meta")
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        if isinstance(module, Conditioned):
            logits, _ = without_casts(module.model, x, module.metadata.to(x.device))
        else:
            logits = module(x)
        if kind == "step":
            logits.sum().backward()
    module.zero_grad(set_to_none=True)
    passes = 2 if kind == "step" and isinstance(module, Sharpened) else 1
    return float(passes * counter.get_total_flops())


def memory(module: nn.Module, x: Tensor, name: str) -> dict[str, float]:
    """MiB of gradients and Adam's moments, and of what autograd keeps in addition to weights."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, precision(name, x.device.type):
        out = module(x)  # held, so that no storage is used again
    state = 3 * sum(p.nbytes for p in module.parameters() if p.requires_grad)
    del out
    return {"state_mib": state / 2**20, "saved_mib": sum(saved.values()) / 2**20}


def compare(
    group: str,
    kind: str,
    name: str,
    size: Size,
    batch: int,
    device: str,
    *,
    rounds: int,
    warmup: int = 1,
    compiled: Collection[str] | None = (),
    only: Collection[str] = METHODS,
    matmul_size: int | None = None,
) -> dict[str, dict[str, Any]]:
    """One table: the models of a group and the matrix product in turn.

    Args:
        kind, name: "forward" or "step"; "fp32" or "bf16".
        compiled: labels that torch.compile gets too, as further contestants; None: all, in place
            of the eager ones.
        only: methods of the group `methods`.

    `activations_gib` (CUDA): what a call needs beyond weights and optimiser, gradients included.
    """
    models = make_models(group, size, some_metadata(batch, device), only)
    x = torch.randn(batch, 1, size.n_mels, size.n_frames, device=device)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    calls, cost, rows, peaks = {}, {}, {}, {}
    for label, module in models.items():
        module.to(device).train(kind == "step")
        cost[label] = flops(module, x, kind, computed=group == "methods")
        if group == "adapters":
            peaks[label] = memory(module, x, name)
        eager = torch.compile(module) if compiled is None else module
        calls[label] = action(eager, x, kind, name, device)
        if label in (compiled or ()):
            cost[f"{label}, compiled"] = cost[label]
            calls[f"{label}, compiled"] = action(torch.compile(module), x, kind, name, device)
    for label, call in list(calls.items()):
        try:
            call()  # the optimiser's state comes with the first step
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                peak = torch.cuda.max_memory_allocated() - before
                peaks.setdefault(label, {})["activations_gib"] = peak / 2**30
        except torch.OutOfMemoryError:
            rows[label] = {"note": "out of memory"}
            del calls[label]
            torch.cuda.empty_cache()
    calls[MATMUL], cost[MATMUL] = large_matmul(device, dtype, matmul_size)
    times, base = interleave(calls, rounds=rounds, warmup=warmup), BASE[group]
    for label, own in times.items():
        over = times[base].faster(own)
        rows[label] = {
            "seconds_per_clip": own.clock.median / (1 if label == MATMUL else batch),
            "gflops_per_second": cost[label] / own.clock.median / 1e9,
            # (flops / time) / (product flops / product time), round by round
            "of_matmul": cost[label] / cost[MATMUL] * own.faster(times[MATMUL]).median,
            "time_over_base": over.median,
            "spread": spread(over),
            "seconds_spread": spread(own.clock),
            **({"flops_over_base": cost[label] / cost[base]} if group in COUNTED else {}),
            **peaks.get(label, {}),
        }
    return rows


def main() -> None:
    """Measure, print one table per comparison, and all of them as JSON in the last line."""
    args = options(
        __doc__,
        **{
            "batch": 1,
            "rounds": 5,
            "warmup": 1,
            "depth": 12,
            "frames": 1024,
            "bands": N_MELS,
            "stride": 10,
            "compile": False,
            "tf32": False,
        },
        device="cuda" if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
        precision=["fp32", "bf16"],
        kind=["forward", "step"],
        groups=list(BASE),
        only=list(METHODS),
    )
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{key: getattr(args, key) for key in ("batch", "depth", "compile", "rounds")},
    }
    for group in args.groups:
        for name in args.precision:
            for kind in args.kind:
                if group in COUNTED and kind == "forward":
                    continue
                rows = compare(
                    group,
                    kind,
                    name,
                    Size(args.depth, n_frames=args.frames, n_mels=args.bands, stride=args.stride),
                    args.batch,
                    args.device,
                    rounds=args.rounds,
                    warmup=args.warmup,
                    compiled=None if args.compile else (),
                    only=args.only,
                )
                result[f"{group}_{kind}_{name}"] = rows
                title = f"{group}, {kind}, {name}, batch {args.batch}, base {BASE[group]}"
                print(f"\n{title}\n\n{table(rows)}", flush=True)
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
