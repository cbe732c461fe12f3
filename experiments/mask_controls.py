"""How small the overlap of SoftFiLM's masks becomes without any data.

    python -m experiments.mask_controls

Masks of the paper's size (768 dimensions, init scale 2, tau 1) are trained on the overlap
regulariser alone, with the shipped schedule (100 epochs of 259 steps of 16 cycles, warm-up over 10,
cosine to 0) and the shipped AdamW learning rate times the masks' multiplier. Whatever a trained
model's overlap is, it says something about the data only beyond these.
"""

from __future__ import annotations

from benchmarks.harness import options, print_result
from models.masks import SoftMasks, mask_controls
from utils.config.schema import load_config
from utils.training.optim import lr_factor

CONFIG = "configs/ast_film_soft_config.yaml"
TRAIN_CYCLES = 4142  # official training half


def main() -> None:
    """Print percentages, and JSON as the last line."""
    options(__doc__)
    config = load_config([CONFIG])
    model, training = config.model, config.training
    per_epoch = -(-TRAIN_CYCLES // config.dataset.batch_size)
    warmup, total = round(training.warmup_epochs * per_epoch), training.epochs * per_epoch
    result = {}
    for multiplier in (1, 3, 10):
        masks = SoftMasks(("device", "site", "rest"), config.backbone.embed_dim, model)
        found = mask_controls(
            masks,
            lr=training.lr * multiplier,
            steps=total,
            steps_per_epoch=per_epoch,
            schedule=lambda step: lr_factor(step, warmup, total),
        )
        result["initial overlap, %"] = 100 * found["overlap_initial_same_temperature"]
        shipped = " (shipped)" if multiplier == model.mask_lr_multiplier else ""
        key = f"regulariser alone, lr x {multiplier}{shipped}, %"
        result[key] = 100 * found["overlap_regularisers_only"]
    print_result(result)


if __name__ == "__main__":
    main()
