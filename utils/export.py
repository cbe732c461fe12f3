"""Export a trained model to files that run without this code.

    python -m utils.export --checkpoint checkpoints/softfilm_best.pt --format onnx --output DIR
    python -m utils.export --checkpoint FILE --format onnx --int8 --output DIR --recordings a.wav

log_mel.onnx takes normalised log-mel spectrograms, waveform.onnx the samples themselves (padding
and log-mel are inside); both give probabilities for metadata in their own units. With --format
torch they are .pt2 files for torch.export.load. model.json says what goes in and what comes out:
names, vocabularies, statistics, thresholds, versions. A model with audio.buckets has a file for
each, named by its seconds: a cycle goes into the shortest that holds it. Every file is compared
with PyTorch, on random input and on real recordings, before it gets its name.

B clips, S samples, F mel bands, T frames, K outputs.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics as robust
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.task import EVENTS
from models.registry import METHODS
from utils.common.cli import command
from utils.common.errors import UserError
from utils.common.files import plain, write_error, write_json
from utils.evaluation.exported import Case, Form, forms_of, random_case, real_cases
from utils.evaluation.trained_model import TrainedModel
from utils.training.checkpoint import versions

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # largest difference in probability between a file and PyTorch
NEEDED = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}

Call = Callable[[dict[str, Tensor]], np.ndarray]


def difference(call: Call, names: Sequence[str], cases: Sequence[Case]) -> float:
    """Largest difference in probability."""
    found = [call({n: one.inputs[n] for n in names}) for one in cases]
    pairs = zip(found, cases, strict=True)
    return max(float(np.abs(p - one.probability).max()) for p, one in pairs)


def latency(call: Call, inputs: dict[str, Tensor], repeats: int = 5) -> float:
    """Median milliseconds of a call, after one to warm up."""
    call(inputs)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(inputs)
        seconds.append(time.perf_counter() - start)
    return 1000 * robust.median(seconds)


# ---------------------------------------------------------------------- files


def write_form(form: Form, example: Case, path: Path, about: dict[str, Any]) -> None:
    """Trace a form with dynamic axes and write it as .onnx or .pt2, by the name of `path`."""
    arguments = tuple(example.inputs[name] for name in form.axes)
    dynamic = [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in form.axes.values()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own internals
        program = torch.export.export(form.module, arguments, dynamic_shapes=tuple(dynamic))
        if path.suffix == ".pt2":
            torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
            return
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            dynamic_shapes=form.axes,
            input_names=list(form.axes),
            output_names=["probability"],
        )
    about |= {"opset": onnx.model.opset_imports[""]}
    onnx.model.metadata_props.update({k: json.dumps(plain(v)) for k, v in about.items()})
    onnx.save(path)


def quantise(path: Path, to: Path) -> None:
    """int8 weights, activations quantised as they come; float64 (the front end) stays as it is."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path).graph
    double = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.DOUBLE}
    exact = [node.name for node in graph.node if double.intersection(node.input)]
    logging.disable(logging.WARNING)  # it recommends a step that changes nothing here
    try:
        quantize_dynamic(path, to, weight_type=QuantType.QInt8, nodes_to_exclude=exact)
    finally:
        logging.disable(logging.NOTSET)


def opened(path: Path) -> Call:
    """What runs an exported file, on the CPU."""
    if path.suffix == ".pt2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about a buffer that it only reads
            module = torch.export.load(path).module()
        return lambda inputs: module(*inputs.values()).detach().numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {k: v.numpy() for k, v in inputs.items()})[0]


def describe(model: TrainedModel, packages: Sequence[str]) -> dict[str, Any]:
    """model.json but for the files: all that a program needs in addition to them."""
    checkpoint, config, task = model.checkpoint, model.config, model.task
    if task.exclusive:
        rule = "abnormal if 1 - p(normal) >= threshold; without thresholds the largest wins"
    else:
        rule = "an output is present if its probability >= its threshold"
        rule += f"; {' and '.join(EVENTS)} together are both" if task.n_cls == 4 else ""
    return {
        "run": checkpoint.run,
        "title": model.title,
        "trained_on": checkpoint.partial or "the whole corpus",
        "synthetic": checkpoint.synthetic,
        "selection": model.selection.value,
        "outputs": task.outputs,
        "classes": task.classes,
        "thresholds": model.thresholds,
        "decision": rule,
        "inputs": {
            "waveform": "float32 [batch, samples], mono, mean removed, at audio.sample_rate",
            "length": "int64 [batch], samples of each row that count",
            "log_mel": f"float32 [batch, 1, {config.dataset.h}, {config.dataset.w}], normalised; "
            "where audio.buckets is set, of a file's share of these frames",
            "device_index": "int64 [batch], position in devices; -1: unknown",
            "site_index": "int64 [batch], position in sites; -1: unknown",
            "scalars": "float32 [batch, 3], age (years), BMI (kg/m2), duration (s); NaN: unknown",
        },
        "devices": model.statistics.devices,
        "sites": model.statistics.sites,
        "statistics": model.statistics.to_dict(),
        "audio": vars(config.audio),
        "methods": list(config.methods),
        "versions": versions() | {name: version(name) for name in packages},
        "revision": checkpoint.revision,
    }


def check_packages(form: str) -> None:
    """Refuse a format whose packages are not there."""
    if missing := [name for name in NEEDED[form] if find_spec(name) is None]:
        raise UserError(
            f"--format {form} needs {', '.join(missing)}: python -m pip install "
            f"{' '.join(missing)} -c constraints.txt"
        )


def export(
    model: TrainedModel,
    form: str,
    output: Path,
    *,
    int8: bool = False,
    recordings: Sequence[str] = (),
) -> dict[str, Any]:
    """Write and check all files of a model that is open on the CPU; what model.json holds.

    Raises:
        UserError: a package is missing, a file differs from PyTorch, the folder cannot be written.
    """
    check_packages(form)
    model.need_own_weights("export")
    hearing = [name for name in model.config.methods if METHODS[name].hears]
    if hearing:
        raise UserError(
            f"{model.path}: methods.{hearing[0]} hears the waveform next to the spectrogram, for "
            "which there is no export; use predict.py"
        )
    model.config.training.precision = "fp32"
    audio, suffix = model.config.audio, {"onnx": ".onnx", "torch": ".pt2"}[form]
    real, about, files = real_cases(model, recordings), describe(model, NEEDED[form]), {}
    buckets = audio.buckets or [audio.clip_seconds]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as staging:
            for bucket, (low, high) in enumerate(pairwise([0.0, *buckets])):  # s
                example = random_case(model, 3, high, 0)
                one = random_case(model, 1, (low + high) / 2, 1)
                found = [real[bucket]] if bucket in real else []
                cases = {"random": [example, one], "real": found}
                for name, shape in forms_of(model, bucket).items():
                    stem = f"{name}_{high:g}s" if audio.buckets else name
                    path = Path(staging, stem + suffix)
                    write_form(shape, example, path, about)
                    own = {name: one.inputs[name] for name in shape.axes}
                    eager = latency(lambda i, m=shape.module: m(*i.values()).detach().numpy(), own)
                    files[f"PyTorch, {stem}"] = {"latency_ms": eager}
                    files[path.name] = judge(path, shape, cases, own)
                    if int8:
                        small = path.with_name(f"{stem}_int8{suffix}")
                        quantise(path, small)
                        files[small.name] = judge(small, shape, cases, own, tolerance=None)
            for path in Path(staging).iterdir():
                path.replace(output / path.name)
    except OSError as error:
        raise write_error(output, error) from error
    about = plain(about | {"files": files})
    write_json(output / "model.json", about)
    return about


def judge(
    path: Path,
    form: Form,
    cases: dict[str, list[Case]],
    own: dict[str, Tensor],
    tolerance: float | None = TOLERANCE,
) -> dict[str, Any]:
    """Size, differences and speed of a file; without a tolerance any difference is accepted."""
    call = opened(path)
    found = {kind: difference(call, list(form.axes), some) for kind, some in cases.items() if some}
    if tolerance is not None and not max(found.values()) <= tolerance:
        raise UserError(
            f"{path.name} differs from PyTorch by {max(found.values()):.1e} in probability, more "
            f"than {tolerance:g}; it is not kept. Try the versions in constraints.txt"
        )
    size = path.stat().st_size
    return {"bytes": size, "difference": found, "latency_ms": latency(call, own)}


# ---------------------------------------------------------------------- command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a trained model")
    parser.add_argument("--format", choices=tuple(NEEDED), required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--int8", action="store_true", help="onnx: quantised files as well")
    parser.add_argument(
        "--recordings", nargs="+", default=[], metavar="WAV", help="compared in addition to noise"
    )
    options = parser.parse_args(arguments)
    if options.int8 and options.format != "onnx":
        parser.error("--int8 is for --format onnx")
    return options


def lines(about: dict[str, Any]) -> Iterator[str]:
    """The files as a table of at most 100 columns."""
    yield f"{'':24}{'size':>10}{'largest difference in probability':>36}{'one clip':>12}"
    yield f"{'':24}{'MB':>10}{'random input':>18}{'recordings':>18}{'CPU, ms':>12}"
    for name, row in about["files"].items():
        size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
        found = [row.get("difference", {}).get(kind) for kind in ("random", "real")]
        shown = "".join(f"{'' if x is None else f'{x:.1e}':>18}" for x in found)
        yield f"{name:24}{size:>10}{shown}{row['latency_ms']:>12.1f}"


@command
def main() -> None:
    options = parse()
    check_packages(options.format)
    model = TrainedModel.open(options.checkpoint, device="cpu")
    print(model.headline(), flush=True)
    if model.config.methods:
        logger.info(
            "methods of the training: %s; what they filter is in the files, what they do in "
            "training only is not", ", ".join(model.config.methods),
        )  # fmt: skip
    about = export(
        model, options.format, options.output, int8=options.int8, recordings=options.recordings
    )
    print("\n".join(lines(about)))
    if not any("real" in row.get("difference", {}) for row in about["files"].values()):
        print("no recordings at hand: name some with --recordings to compare on real sound as well")
    print(f"\nwritten to {options.output}: {', '.join(n for n in about['files'] if '.' in n)}, "
          "model.json")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
