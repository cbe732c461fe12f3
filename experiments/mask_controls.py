"""How small the overlap of SoftFiLM's masks becomes without any data.

    python -m experiments.mask_controls

Masks of the paper's size (768 dimensions, init scale 2, tau 1) are trained on the overlap
regulariser alone, with the shipped schedule (100 epochs of 259 steps of 16 cycles, warm-up over 10,
cosine to 0) and the shipped AdamW learning rate times the masks' multiplier. Whatever a trained
model's overlap is, it says something about the data only beyond these.
"""

from __future__ import annotations

import json

from models.masks import SoftMasks, mask_controls
from utils.config.schema import load_config
from utils.training.optim import lr_factor

CONFIG = "configs/ast_film_soft_config.yaml"
TRAIN_CYCLES = 4142  # official training half
MULTIPLIERS = (1.0, 3.0, 10.0)


def main() -> None:
    """Print a table, and JSON as the last line."""
    config = load_config([CONFIG])
    model, training = config.model, config.training
    per_epoch = -(-TRAIN_CYCLES // config.dataset.batch_size)
    warmup, total = round(training.warmup_epochs * per_epoch), training.epochs * per_epoch
    rows = {}
    for multiplier in MULTIPLIERS:
        masks = SoftMasks(("device", "site", "rest"), config.backbone.embed_dim, model)
        rows[multiplier] = mask_controls(
            masks,
            lr=training.lr * multiplier,
            steps=total,
            steps_per_epoch=per_epoch,
            schedule=lambda step: lr_factor(step, warmup, total),
        )
    start = next(iter(rows.values()))["overlap_initial_same_temperature"]
    print(f"at initialisation                              overlap {100 * start:.2f} %")
    for multiplier, found in rows.items():
        shipped = "  <- shipped" if multiplier == model.mask_lr_multiplier else ""
        value = 100 * found["overlap_regularisers_only"]
        print(
            f"regulariser alone, learning rate x {multiplier:<11g} overlap {value:.2f} %{shipped}"
        )
    print(json.dumps({f"x{m:g}": found["overlap_regularisers_only"] for m, found in rows.items()}))


if __name__ == "__main__":
    main()
