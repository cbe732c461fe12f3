"""AST: the plain Audio Spectrogram Transformer, the baseline that sees no metadata.

Gong, Chung & Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021, arXiv 2104.01778.

    python ast_train.py \\
        --config configs/ast_config.yaml \\
        --mlflow-config configs/mlflow.yaml

--config takes several files, merged in order (add configs/demo.yaml for the small preset); dotted
key=value words override single keys; --print-config shows what would run.
"""

from utils.common.cli import command
from utils.runs.start import start

VARIANT = "ast"


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
