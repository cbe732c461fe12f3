"""Write a trained model as a folder that anyone can open, and send it to the Hugging Face hub.

    python -m utils.share --checkpoint checkpoints/softfilm_best.pt --output DIR
    python -m utils.share --checkpoint FILE --output DIR --push USER/NAME

The folder holds model.safetensors, config.json and a model card, README.md. Every command that
takes --checkpoint takes the folder, or USER/NAME, in place of a file. It opens without the training
data; paths, tracking settings and the names of recordings stay at home.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from models.config import BackboneConfig
from utils.common.cli import command
from utils.common.errors import UserError
from utils.common.files import write_text
from utils.config.schema import MLflowConfig, RunConfig, config_to_dict
from utils.evaluation.render import corpus_line, counts_line, thresholds_line
from utils.evaluation.trained_model import TrainedModel
from utils.training.checkpoint import Checkpoint, content_of
from utils.training.shared_folder import FILES, HUB_NAME, write_folder

CARD = "README.md"
NOT_SHARED = "not-shared"  # in place of a folder's name

HEAD = """---
license: {license}
pipeline_tag: audio-classification
tags: [respiratory-sounds, audio-spectrogram-transformer, {variant}]
---

"""

TAIL = """
## Intended use

Research on the classification of breathing cycles, and comparison with other models under the same
protocol. Not for diagnosis, screening, monitoring or any decision about a person. Not for sounds
other than breathing, nor for parts of a recording that are no breathing cycle, without a test of
one's own.

## How to use it

In a checkout of the code, with this folder (or its name on the hub) as the checkpoint:

    python predict.py --checkpoint FOLDER recording.wav
    python evaluate.py --checkpoint FOLDER --data-folder DIR

`model.safetensors` and `config.json` hold tensors and plain values only; opening them runs no code.

## Licence

The weights in this folder: {license}. {origin}The recordings have terms of their own, and are not
part of this folder.
"""

ORIGIN = {
    "audioset": "They started from the AudioSet weights of the AST authors, whose licence (BSD "
    "3-Clause) goes with them. ",
    "imagenet": "They started from DeiT weights, whose licence (Apache 2.0) goes with them. ",
    "none": "",
}

WITHOUT_REPORT = """# Model card: {title}

**For research only. Not a medical device; not to be used for any decision about a person's
health.**

- **Model**: {title} (`{variant}`), outputs {outputs}; run `{run}`, code revision `{revision}`.
- **Data**: {corpus}, split `{split}`. {counts}
- **Protocol**: `{selection}`: {statement}
- **Decision**: thresholds {thresholds}.
{warnings}
## Metrics

None are given: the run's folder, which holds its report, was not there when this card was written.
`python evaluate.py --checkpoint FOLDER --data-folder DIR` makes a report with 95 % intervals.
"""


def without_places(checkpoint: Checkpoint) -> Checkpoint:
    """A copy that says nothing about the machine it was trained on, or which recordings it saw."""
    config, plain = checkpoint.run_config(), RunConfig()
    dataset, training, backbone = config.dataset, config.training, config.backbone
    for source in {id(s): s for s in (dataset, *dataset.sources)}.values():
        source.data_folder = NOT_SHARED
    dataset.cycle_metadata_path, dataset.cache_dir = None, plain.dataset.cache_dir
    training.output_dir = plain.training.output_dir
    training.checkpoint_dir = plain.training.checkpoint_dir
    if not HUB_NAME.fullmatch(backbone.weights_path or "") or Path(backbone.weights_path).exists():
        backbone.weights_path = BackboneConfig().weights_path
    config.mlflow = MLflowConfig()
    return replace(checkpoint, config=config_to_dict(config), fingerprint={})


def model_card(model: TrainedModel, license: str) -> str:
    """README.md: the run's own model card where it is at hand, with the hub's head and its use."""
    checkpoint, config = model.checkpoint, model.config
    own = model.run_folder
    card = own.path / "model_card.md" if own else None
    if card is not None and card.is_file():
        body = card.read_text(encoding="utf-8")
    else:
        parts = [(name, checkpoint.counts.get(name)) for name in ("train", "val", "test")]
        warnings = ["SYNTHETIC RECORDINGS"] if checkpoint.synthetic else []
        warnings += [checkpoint.partial] if checkpoint.partial else []
        body = WITHOUT_REPORT.format(
            title=model.title,
            variant=config.variant,
            outputs=", ".join(model.task.outputs),
            run=checkpoint.run,
            revision=checkpoint.revision,
            corpus=corpus_line([one.name for one in config.dataset.sources], checkpoint.synthetic),
            split=config.dataset.split_strategy,
            counts=" ".join(f"{n}: {counts_line(c)}." for n, c in parts if c and c["cycles"]),
            selection=model.selection.value,
            statement=model.selection.statement,
            thresholds=thresholds_line(model.thresholds),
            warnings="".join(f"- **{text}**\n" for text in warnings),
        )
    head = HEAD.format(license=license, variant=config.variant.replace("_", "-"))
    return head + body + TAIL.format(license=license, origin=ORIGIN[config.backbone.weights])


def share(model: TrainedModel, folder: Path, license: str = "mit") -> None:
    """Write the folder.

    Raises:
        UserError: it cannot be written.
    """
    model.need_own_weights("sharing")
    write_folder(folder, content_of(without_places(model.checkpoint)))
    write_text(folder / CARD, model_card(model, license))


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Send a written folder to the hub; gives its address.

    Raises:
        UserError: the hub cannot be reached, or does not let us.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[*FILES, CARD],
            commit_message="Model, configuration and card",
        )
    except Exception as error:  # of requests or httpx, by the hub library's version
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{folder} is written, but the Hugging Face hub does not take it as {name} ({reason}); "
            "check the network and `hf auth login`, and run the command again"
        ) from error
    return f"{api.endpoint}/{name}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a trained model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--license", default="mit", metavar="ID", help="the hub's name of one")
    parser.add_argument("--push", metavar="USER/NAME", help="send it to the hub")
    parser.add_argument("--private", action="store_true", help="push: a new model is private")
    options = parser.parse_args(arguments)
    if options.push and not HUB_NAME.fullmatch(options.push):
        parser.error(f"--push {options.push} is no USER/NAME")
    if not re.fullmatch(r"[\w.-]+", options.license):
        parser.error("--license takes one of the hub's names, such as mit or cc-by-4.0")
    return options


@command
def main() -> None:
    options = parse()
    model = TrainedModel.open(options.checkpoint, device="cpu")
    print(model.headline(), flush=True)
    share(model, options.output, options.license)
    print(f"written to {options.output}: {', '.join(FILES)}, {CARD}")
    if options.push:
        print(f"sent to {push(options.output, options.push, private=options.private)}")


if __name__ == "__main__":
    raise SystemExit(main())
