"""Everything worth knowing on a GPU, measured by one program in less than ten minutes.

    python -m benchmarks.gpu [--output benchmarks/results] [--sections NAME ...] [--minutes 9]
    python -m benchmarks.gpu --device cpu --small --output FOLDER      (tiny sizes: does it run?)

* correctness: logits and gradients of every variant, and log-mel, against float64 on the CPU;
* step: forward pass and training step in bf16, time, memory and share of the matrix rate, against
  transformers' AST and the plain AST;
* buckets: training steps of the plain AST on clips of 10, 5 and 2.5 s;
* training: a short compiled training of every variant, from recordings to weights;
* frontend: log-mel and whole front end, against torchaudio on the CPU, clip by clip;
* resume: runs that were killed and resumed, against one never killed;
* loop: time per batch outside the model.

No network, weights or data set is needed. Contestants of a table take turns. Every section has its
share of the time left and gives its most important part first; after each part
`<date>-<device>.json` and `.md` are written again, so that nothing measured is lost when time runs
out. A section that fails is recorded as failed and the others continue; sections of an earlier call
on the same device and day, with the same torch, stay in the files. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import buckets, frontend, kill_resume, loop, model_step
from benchmarks.data import clips_for_benchmark, paper_frontend
from benchmarks.harness import rounded, table
from benchmarks.model_step import N_MELS, N_OUTPUTS, Size
from models.registry import VARIANTS
from utils.common.cli import command, quiet
from utils.common.errors import UserError
from utils.common.files import write_text
from utils.training.assemble import build_trainer
from utils.training.device import Runtime

ROOT = Path(__file__).resolve().parent.parent
Parts = Iterator[tuple[str, dict[str, Any]]]
#: Largest error relative to the largest value that counts as correct. fp32: well above what
#: rounding adds up to over twelve blocks (1e-6 or so) and below what TF32 would do; bf16: steps of
#: 2^-8 in every product.
LIMITS = {"fp32": 1e-4, "bf16": 5e-2}
#: --small: clips and a transformer that take no time
TINY = [
    *("audio.clip_seconds=1.0", "backbone.freq_stride=100", "backbone.time_stride=100"),
    *("backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=2", "training.epochs=2"),
    "dataset.batch_size=8",
]


@dataclass(frozen=True)
class Setting:
    """Where a section measures, at what size (`small`: figures mean nothing), in which scratch
    folder."""

    device: str
    small: bool
    folder: Path

    @property
    def size(self) -> Size:
        return Size(depth=2, embed_dim=24, heads=2, n_frames=64) if self.small else Size()


# ---------------------------------------------------------------------- correctness


def allow_tf32(allowed: bool) -> None:
    """Whether fp32 products may use TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def difference(value: Tensor, exact: Tensor) -> float:
    """Largest absolute one."""
    return (value.detach().cpu().double() - exact).abs().max().item()


def gradients(output: tuple[Tensor, Tensor], weight: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of the logits' sum weighted by [B, K], plus regularisation."""
    logits, regularisation = output
    ((logits * weight).sum() + regularisation).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def model_errors(variant: str, setting: Setting, n_frames: int) -> dict[str, dict[str, Any]]:
    """A variant on the device against float64 on the CPU, its conditioner away from its start.

    A gradient's error is relative to the largest gradient of its part (backbone, conditioner or
    head): relative to its own, one that nearly cancels would say nothing. The small parts have
    GELU here: a ReLU unit near zero switches under any rounding, and its gradient jumps.
    """
    torch.manual_seed(0)
    model = model_step.our_model(variant, setting.size._replace(n_frames=n_frames), "gelu").eval()
    with torch.no_grad():
        for parameter in model.conditioner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    n = 1 if n_frames > 512 else 2  # float64 takes its time
    x, weight = torch.randn(n, 1, N_MELS, n_frames), torch.randn(n, N_OUTPUTS)
    metadata = replace(model_step.some_metadata(n, "cpu"), rest=torch.randn(n, 3))
    double = copy.deepcopy(model).double()
    doubled = replace(metadata, rest=metadata.rest.double())
    output = model_step.without_casts(double, x.double(), doubled)
    exact, scale = gradients(output, weight.double(), double), Counter()
    for name, gradient in exact.items():
        part = name.split(".")[0]
        scale[part] = max(scale[part], gradient.abs().max().item())
    figures = {}
    for name, limit in LIMITS.items():
        own = copy.deepcopy(model).to(setting.device)
        with model_step.precision(name, setting.device):
            found = own(x.to(setting.device), metadata.to(setting.device))
            own_gradients = gradients(found, weight.to(setting.device), own)
        worst = {
            n: difference(own_gradients[n], g) / (scale[n.split(".")[0]] or 1.0)
            for n, g in exact.items()
        }
        logits = difference(found.logits, output[0]) / output[0].abs().max().item()
        largest = max(worst.values())
        met = max(logits, largest) <= limit
        figures[name] = {"logits": logits, "gradients": largest, "limit": limit, "met": met}
    return figures


def correctness(setting: Setting) -> Parts:
    """The front end; every variant at a small and at the paper's token count."""
    allow_tf32(False)
    clips, _ = clips_for_benchmark(2)
    found = frontend.errors(paper_frontend().to(setting.device), clips, setting.device)
    ours, theirs = (max(row[k] / row[2] for row in found) for k in (0, 1))
    limit = max(theirs, 1e-6)  # what torchaudio's own float32 arithmetic does to the same signals
    yield "log-mel", {"": {"error": ours, "limit": limit, "met": ours <= limit}}
    for n_frames in (64,) if setting.small else (64, 1024):
        for variant in VARIANTS:
            yield f"{variant}, {n_frames} frames", model_errors(variant, setting, n_frames)


# ---------------------------------------------------------------------- step


def step(setting: Setting) -> Parts:
    """Our AST against transformers', the variants against ours: bf16, by kind and batch."""
    allow_tf32(True)
    plan = [("peers", "step", 64), ("variants", "step", 64), ("peers", "forward", 64)]
    plan += [("peers", "step", 16), ("variants", "forward", 64), ("variants", "step", 16)]
    if setting.small:
        plan = [("peers", "step", 2), ("variants", "forward", 2)]
    for group, kind, batch in plan:
        compiled = () if setting.device == "cpu" else (model_step.OURS, "ast", "ast_softfilm")
        torch._dynamo.reset()  # compile for these shapes alone
        rows = model_step.compare(
            *(group, kind, "bf16", setting.size, batch, setting.device),
            rounds=2 if setting.small else 7,
            warmup=2,
            compiled=compiled,
            matmul_size=256 if setting.small else None,
        )
        yield f"{group}, {kind}, batch {batch}", rows


def buckets_section(setting: Setting) -> Parts:
    """Steps of each clip length, bf16, by batch."""
    for batch in (2,) if setting.small else (64, 16):
        rounds = 2 if setting.small else 7
        found, _ = buckets.steps(setting.size, batch, rounds, setting.device, "bf16")
        yield f"batch {batch}", found


# ---------------------------------------------------------------------- front end and loop


def frontend_section(setting: Setting) -> Parts:
    """Clips/s of 10 s clips, by batch."""
    for batch in (2,) if setting.small else (64, 16, 256):
        rounds = 2 if setting.small else 10
        yield f"batch {batch}", frontend.measure(setting.device, batch, rounds)


def loop_section(setting: Setting) -> Parts:
    """Time per batch around a model without work."""
    config = loop.configure("ast", setting.folder)
    runtime, rounds = Runtime(setting.device, "fp32", "false"), 2 if setting.small else 10
    yield "stub", loop.overhead(config, loop.corpus(config), runtime, rounds)


# ---------------------------------------------------------------------- training and resuming


def training(setting: Setting) -> Parts:
    """Some epochs of each variant with the real loop: waveforms, augmentation, compiled step.

    Random weights and a synthetic corpus: a rate, a memory, a loss that falls, and nothing about
    how well anything classifies. The first epoch, with the compilation, does not count in the rate.
    """
    data = loop.corpus(loop.configure("ast", setting.folder))
    data = loop.some_rows(data, 32 if setting.small else 1024)
    words = (f"training.device={setting.device}", "training.lr=1e-4", "training.epochs=4")
    for name in ("ast", "ast_fus", "ast_film", "ast_tafilm", "ast_film_soft"):
        config = loop.configure(name, setting.folder, *words)
        if setting.small:
            all_blocks = [f"models.{config.variant}.conditioned_layers=all"]
            tiny = TINY + all_blocks * hasattr(config.model, "conditioned_layers")
            config = loop.configure(name, setting.folder, *words, *tiny)
        torch._dynamo.reset()
        runtime = Runtime(setting.device, "auto", "auto")
        torch._dynamo.utils.counters.clear()
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        history = build_trainer(config, data, runtime).fit().history
        losses = [row["train_loss"] for row in history]
        rates = [row["train_clips_per_s"] for row in history[1:]]
        frames = torch._dynamo.utils.counters["frames"]
        figures = {
            "clips_per_s": statistics.median(rates),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "seconds_in_total": time.perf_counter() - began,
            "precision": runtime.precision,
            "frames_compiled": f"{frames['ok']} of {frames['total']}" if frames else "none",
        }
        if setting.device == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        yield config.variant, figures


def resume(setting: Setting) -> Parts:
    """Kill a SoftFiLM run on the device, resume it, and compare with one never killed."""
    words = (f"training.device={setting.device}", "training.compile=false")
    commands = kill_resume.Commands(setting.folder, *words)
    kills = 1 if setting.small else 4
    yield "SoftFiLM", kill_resume.kill_and_compare(kills, commands, kinds=("plain",))


# ---------------------------------------------------------------------- the program

#: section -> share of the time, in seconds when all sections have nine minutes
SECTIONS: dict[str, tuple[Callable[[Setting], Parts], float]] = {
    "correctness": (correctness, 60),
    "step": (step, 170),
    "buckets": (buckets_section, 20),
    "training": (training, 140),
    "frontend": (frontend_section, 30),
    "resume": (resume, 60),
    "loop": (loop_section, 35),
}


def measure(
    function: Callable[[Setting], Parts],
    setting: Setting,
    seconds: float,
    record: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Fill `record` (status, message, seconds, results) part by part; never raises an Exception.

    No part is started once the section's seconds are over.
    """
    began = time.monotonic()
    record |= {"status": "done", "message": "", "seconds": 0.0, "results": {}}
    try:
        for name, figures in function(setting):
            record["results"][name] = figures
            save()
            if time.monotonic() - began > seconds:
                record |= {"status": "stopped", "message": f"its {seconds:.0f} s were over"}
                break
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0]
        record |= {"status": "failed", "message": f"{type(error).__name__}: {reason}"}
    record["seconds"] = time.monotonic() - began
    save()
    gc.collect()
    torch.cuda.empty_cache()


def to_markdown(content: dict[str, Any]) -> str:
    """The whole page: one table for flat parts, one each for parts of several rows."""
    lines = [f"# {content['device']}, {content['date']}", ""]
    lines += [f"torch {content['torch']}, CUDA {content['cuda']}, Python {content['python']}."]
    if content["small"]:
        lines += ["", "**Tiny sizes (--small): this shows that the program runs, and no speed.**"]
    lines += ["", *sorted({f"`{section['command']}`" for section in content["sections"].values()})]
    lines += ["", "Times are medians; `spread` is an interquartile range over the median."]
    for name, section in content["sections"].items():
        lines += ["", f"## {name}: {section['status']} ({section['seconds']:.0f} s)"]
        lines += ["", section["message"]] if section["message"] else []
        parts = section["results"]
        flat = {k: v for k, v in parts.items() if not any(isinstance(x, dict) for x in v.values())}
        lines += ["", table(flat)] if flat else []
        for part in (name for name in parts if name not in flat):
            lines += ["", f"{part}:", "", table(parts[part])]
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, refused where nothing could be measured or figures would mislead."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device was found, so there is nothing to measure; to see that the program "
            "runs: python -m benchmarks.gpu --device cpu --small --output FOLDER"
        )
    if (options.device == "cpu" or options.small) and not (options.small and options.output):
        raise UserError(
            "figures of a CPU or of --small mean nothing; add --small and --output FOLDER, to see "
            "that the program runs"
        )
    options.output = options.output or ROOT / "benchmarks" / "results"
    return options


@quiet()
def main(arguments: list[str] | None = None) -> None:
    """Measure section after section."""
    given = sys.argv[1:] if arguments is None else arguments
    options, began = parse(arguments), time.monotonic()
    cuda = options.device == "cuda"
    card = torch.cuda.get_device_properties(0) if cuda else None
    content: dict[str, Any] = {
        "program": "benchmarks.gpu",
        "device": card.name if cuda else "cpu",
        "memory_gib": card.total_memory / 2**30 if cuda else None,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "small": options.small,
        "sections": {},
    }
    slug = re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")
    path = options.output / f"{content['date']}-{slug}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(found[key] == content[key] for key in ("torch", "small")):
            content["sections"] = found["sections"]

    def save() -> None:
        write_text(path, json.dumps(rounded(content), indent=1) + "\n")
        write_text(path.with_suffix(".md"), to_markdown(content))

    for number, section in enumerate(options.sections):
        function, share = SECTIONS[section]
        shares = sum(SECTIONS[later][1] for later in options.sections[number:])
        left = 60 * options.minutes - (time.monotonic() - began)
        record = {"command": " ".join(["python -m benchmarks.gpu", *given])}
        content["sections"][section] = record
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(options.device, options.small, Path(folder))
            measure(function, setting, left * share / shares, record, save)
    print(f"{to_markdown(content)}\nWritten: {path} and .md\n{json.dumps(rounded(content))}")


if __name__ == "__main__":
    sys.exit(command(main)())
