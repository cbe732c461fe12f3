"""FiLM-AST: the metadata scales and shifts the features of every conditioned block,
all tokens in the same way (models/conditioners/film.py).

Perez et al., "FiLM: Visual reasoning with a general conditioning layer", AAAI 2018.

    python ast_film_train.py \\
        --config configs/ast_film_config.yaml \\
        --mlflow-config configs/mlflow.yaml

--config takes several files, merged in order (add configs/demo.yaml for the small preset); dotted
key=value words override single keys; --print-config shows what would run.
"""

from utils.common.cli import command
from utils.runs.start import start

VARIANT = "ast_film"


@command
def main() -> None:
    for run in start(VARIANT, __doc__):
        with run:
            data = run.data()  # cycle table, split, metadata, waveforms
            model = run.model(data)  # backbone, conditioner, head
            trainer = run.fit(model, data)  # train; keep the epoch that the protocol chooses
            run.test(trainer)  # open the test half once; predictions, report, checkpoint


if __name__ == "__main__":
    raise SystemExit(main())
