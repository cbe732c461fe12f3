"""Sections of benchmarks.gpu about the model: correctness, matrix rate, step, memory.

Each function gives (name, figures) part by part, the most important first.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.gpu_runner import NeedsCuda, Parts, Setting
from benchmarks.timing import interleave
from data.batch import Metadata

if TYPE_CHECKING:  # importing it takes packages that not every section needs
    from benchmarks.model_step import Size

#: Largest error relative to the largest value that still counts as correct. fp32: well above what
#: rounding adds up to over twelve blocks (some 1e-6) and below what TF32 would do; bf16: steps of
#: 2^-8 in every product.
LIMITS = {"fp32": 1e-4, "bf16": 5e-2}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether fp32 products may use TF32; as before afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# ---------------------------------------------------------------------- matrix products


def matmul(setting: Setting) -> Parts:
    """TFLOP/s of large products, the formats in turn."""
    from benchmarks.model_step import large_matmul

    kinds = {
        "bf16": (torch.bfloat16, False),
        "tf32": (torch.float32, True),
        "fp32": (torch.float32, False),
    }
    for n in (256,) if setting.quick else (16384, 8192):
        calls, flops = {}, 0.0
        for name, (dtype, allowed) in kinds.items():
            product, flops = large_matmul(setting.device, dtype, n)

            def call(product: Callable[[], Tensor] = product, allowed: bool = allowed) -> None:
                with tf32(allowed):
                    product()

            calls[name] = call
        times = interleave(calls, rounds=3 if setting.quick else 10, device=setting.device)
        figures = {
            name: {"tflops_per_second": flops / t.median / 1e12, "spread": t.spread}
            for name, t in times.items()
        }
        yield f"n = {n}", figures


# ---------------------------------------------------------------------- correctness


def difference(value: Tensor, exact: Tensor) -> float:
    """Largest absolute one."""
    return (value.detach().cpu().double() - exact).abs().max().item()


def largest(tensor: Tensor) -> float:
    """Largest absolute value."""
    return tensor.abs().max().item()


def gradient_errors(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Error by parameter, relative to the largest gradient of its part: backbone, conditioner or
    head. (Relative to its own, a gradient that nearly cancels would say nothing.)"""
    scale: dict[str, float] = {}
    for name, gradient in exact.items():
        part = name.split(".")[0]
        scale[part] = max(scale.get(part, 0.0), largest(gradient))
    return {
        n: difference(gradients[n], g) / (scale[n.split(".")[0]] or 1.0) for n, g in exact.items()
    }


def logits_and_gradients(
    model: nn.Module, x: Tensor, metadata: Metadata, weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [B, K], and the gradients of their sum weighted by [B, K] plus regularisation."""
    if x.dtype == torch.float64:  # `forward` computes the head in float32
        state = model.conditioner.encode(metadata)
        pooled = model.backbone(x, state.modulation)
        logits = model.head(model.conditioner.fuse(pooled, state))
        regularisation = model.conditioner.regularisation()
    else:
        logits, regularisation = model(x, metadata)
    ((logits * weight).sum() + regularisation).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def errors(variant: str, size: Size, device: str) -> dict[str, dict]:
    """A variant on the device against float64 on the CPU, its conditioner away from its start.

    The small parts have GELU here: a ReLU unit near zero switches under any rounding, and its
    gradient jumps.
    """
    from benchmarks.model_step import N_MELS, N_OUTPUTS, our_model, precision, some_metadata

    torch.manual_seed(0)
    model = our_model(variant, size, activation="gelu").eval()  # without dropout
    with torch.no_grad():
        for parameter in model.conditioner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = 1 if size.n_frames > 512 else 2
    x = torch.randn(batch, 1, N_MELS, size.n_frames)
    metadata = replace(some_metadata(batch, "cpu"), rest=torch.randn(batch, 3))
    weight = torch.randn(batch, N_OUTPUTS)
    exact, exact_gradients = logits_and_gradients(
        copy.deepcopy(model).double(),
        x.double(),
        replace(metadata, rest=metadata.rest.double()),
        weight.double(),
    )
    figures = {}
    for name, limit in LIMITS.items():
        own = copy.deepcopy(model).to(device)
        with tf32(False), precision(name, device):
            logits, gradients = logits_and_gradients(
                own, x.to(device), metadata.to(device), weight.to(device)
            )
        worst = gradient_errors(gradients, exact_gradients)
        at = max(worst, key=worst.get)
        figures[name] = {
            "logits": difference(logits, exact) / largest(exact),
            "gradients": worst[at],
            "worst_parameter": at,
            "limit": limit,
        }
    return figures


def correctness(setting: Setting) -> Parts:
    """Every variant at a small and at the paper's token count, then the front end."""
    from benchmarks.model_step import Size
    from models.registry import VARIANTS

    sizes = [quick_size()] if setting.quick else [Size(n_frames=64), Size()]
    for size in sizes:
        for variant in VARIANTS:
            name = f"{variant}, {size.n_frames} frames"
            yield name, errors(variant, size, setting.device)
    yield "front end", {"log-mel": log_mel_error(setting.device)}


def log_mel_error(device: str) -> dict[str, float]:
    """Our log-mel on the device and torchaudio's in float32 against torchaudio's in float64."""
    from benchmarks.frontend import signals, torchaudio_log_mel
    from benchmarks.recordings import clips_for_benchmark
    from data.frontend import AudioFrontend

    front = AudioFrontend().to(device)
    ours, theirs = 0.0, 0.0
    for clip in signals(clips_for_benchmark(2)[0]):
        exact = torchaudio_log_mel(clip.double())
        scale = largest(exact)
        ours = max(ours, difference(front.log_mel(clip[None].to(device))[0], exact) / scale)
        theirs = max(theirs, difference(torchaudio_log_mel(clip), exact) / scale)
    # no larger than what torchaudio's own float32 arithmetic does to the same signals
    return {"log_mel": ours, "torchaudio_fp32": theirs, "limit": max(theirs, 1e-6)}


# ---------------------------------------------------------------------- model step


def quick_size() -> Size:
    """A transformer that takes no time."""
    from benchmarks.model_step import Size

    return Size(depth=2, embed_dim=24, heads=2, n_frames=64)


def usable(calls: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
    """Call each once; those that work, and the reason of each that does not."""
    working, failed = {}, {}
    for label, call in calls.items():
        try:
            call()
            working[label] = call
        except torch.OutOfMemoryError:
            failed[label] = "out of memory"
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if failed.get(label) and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return working, failed


def model_step(setting: Setting) -> Parts:
    """Our AST against transformers', the variants against ours: bf16, by kind and batch."""
    if setting.quick:
        yield _turns(setting, "peers", "step", 2)
        yield _turns(setting, "variants", "forward", 2)
        return
    yield _turns(setting, "peers", "step", 64)
    yield _turns(setting, "variants", "step", 64)
    yield _turns(setting, "variants", "step", 64, compiled=True)
    yield _turns(setting, "peers", "forward", 64)
    yield _turns(setting, "peers", "step", 16)
    yield _turns(setting, "peers", "forward", 16)
    yield _turns(setting, "variants", "forward", 64)
    yield _turns(setting, "variants", "step", 16)
    yield _turns(setting, "variants", "step", 16, compiled=True)


def _turns(
    setting: Setting, group: str, kind: str, batch: int, compiled: bool = False
) -> tuple[str, dict]:
    """One table: contestants and the matrix product in turn. What can not run says why.

    Of the peers "ours" runs eager and compiled; the variants all run the one way or the other.
    """
    from benchmarks import model_step as step

    size = quick_size() if setting.quick else step.Size()
    torch.manual_seed(0)
    metadata = step.some_metadata(batch, setting.device)
    models = getattr(step, group)(size, metadata)
    base = step.SDPA if group == "peers" else "ast"
    labels = tuple(models) if compiled else ()
    if group == "peers" and not setting.quick:  # compiling takes longer than a look may
        labels = (f"{step.OURS}, compiled",)
        models[labels[0]] = models[step.OURS]
    if labels:  # for these shapes alone, and with no silent way back to eager
        torch._dynamo.reset()
        torch._dynamo.config.suppress_errors = False
    with tf32(True):
        calls, flops = step.contestants(
            models,
            kind,
            "bf16",
            size=size,
            batch=batch,
            device=setting.device,
            compiled=labels,
            matmul_size=256 if setting.quick else None,
        )
        calls, failed = usable(calls)
        times = interleave(
            calls, rounds=2 if setting.quick else 7, warmup=2, device=setting.device
        )  # fmt: skip
    title = f"{group}, {kind}, batch {batch}{', compiled' if compiled else ''}"
    if base not in times:
        raise RuntimeError(f"{title}: {base}, which the others are compared with: {failed[base]}")
    rows = step.report(title, times, flops, base, batch)
    for label, reason in failed.items():
        rows[label] = {"note": reason}
    return title, rows


# ---------------------------------------------------------------------- memory


def memory(setting: Setting) -> Parts:
    """Peak allocated GiB of a bf16 training step by batch, until it does not fit; eager."""
    if setting.device != "cuda":
        raise NeedsCuda
    from benchmarks import model_step as step

    size = quick_size() if setting.quick else step.Size()
    half = size.depth // 2
    cases = {
        "all blocks trained": lambda: step.our_model("ast", size),
        "with gradient checkpointing": lambda: step.our_model(
            "ast", size, gradient_checkpointing=True
        ),
        "no block trained": lambda: step.our_model("ast", size, trainable_blocks=0),
        "SoftFiLM, all blocks trained": lambda: step.our_model("ast_softfilm", size),
        f"last {half} blocks trained": lambda: step.our_model("ast", size, trainable_blocks=half),
        "transformers (sdpa)": lambda: step.transformers_model(size, "sdpa"),
    }
    for name, make in cases.items():
        yield name, _peak_by_batch(make(), size)


def _peak_by_batch(model: nn.Module, size: Size, device: str = "cuda") -> dict[str, float | str]:
    """Batch -> GiB, of weights, optimiser and activations together."""
    from benchmarks import model_step as step

    figures: dict[str, float | str] = {}
    gc.collect()
    before = torch.cuda.memory_allocated()
    for batch in (8, 16, 32, 64, 128, 256):
        if hasattr(model, "conditioner"):
            module = step.Conditioned(model, step.some_metadata(batch, device))
        else:
            module = step.Transformers(model)
        try:
            module.to(device).train()
            x = torch.randn(batch, 1, step.N_MELS, size.n_frames, device=device)
            call = step.actions(module, x, "step", "bf16", device)
            torch.cuda.reset_peak_memory_stats()
            for _ in range(2):  # the optimiser's state comes with the first step
                call()
            torch.cuda.synchronize()
            figures[f"batch {batch}"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        except torch.OutOfMemoryError:
            figures[f"batch {batch}"] = "does not fit"
            break
        finally:
            call = x = None
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    return figures
