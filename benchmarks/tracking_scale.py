"""Many tracked runs in one SQLite database from several processes: is anything lost?

    python -m benchmarks.tracking_scale [--runs 200] [--processes 4] [--output FOLDER]

The runs train nothing: each writes ten epochs of five metrics, parameters, tags and a file, as a
training does, below one parent. What MLflow has not taken by the end of a run is sent by
`utils.tracking.replay`, as its message says. Exit status 1 if a value is missing afterwards.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.harness import options, table
from utils.common.files import write_text
from utils.config.schema import MLflowConfig
from utils.tracking import replay, start_tracking
from utils.training.runfolder import RunFolder

EPOCHS, METRICS = 10, ("loss", "sp", "se", "score", "auroc")


def track(root: Path, numbers: list[int]) -> None:
    """One process: its runs one after another; what was late is noted."""
    config = MLflowConfig(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    for number in numbers:
        folder = RunFolder(root / f"run-{number:03}")
        folder.path.mkdir(parents=True)
        tracker = start_tracking(
            config,
            folder.path,
            run_name=folder.path.name,
            tags={"number": number},
            params={"seed": number, "lr": 1e-3},
            parent=root / "parent",
        )
        history: list[dict[str, float]] = []
        for epoch in range(EPOCHS):
            row = {f"val_{name}": number + epoch / EPOCHS for name in METRICS}
            history.append({"epoch": float(epoch), **row})
            folder.write_metrics(history)
            tracker.metrics({k.replace("_", "/", 1): v for k, v in row.items()}, epoch + 1)
        tracker.metrics({"test/score": float(number)})
        tracker.artifact(folder.metrics)
        if tracker.finish():
            (root / f"late-{number:03}").touch()


def measure(root: Path, runs: int, processes: int) -> dict[str, Any]:
    """Track, complete, and count what the database holds."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{root / 'mlflow.db'}"
    (root / "parent").mkdir()
    start_tracking(
        MLflowConfig(tracking_uri=uri), root / "parent", run_name="all", tags={}
    ).finish()
    began, context = time.monotonic(), get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.tracking_scale", "mlflow"])
    parts = [list(range(first, runs, processes)) for first in range(processes)]
    workers = [context.Process(target=track, args=(root, part)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.monotonic() - began
    late = sorted(root.glob("late-*"))
    for path in late:
        replay(root / path.name.replace("late", "run"))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("icbhi").experiment_id
    found = client.search_runs([experiment], max_results=2 * runs + 10)
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    numbers = [int(run.data.tags["number"]) for run in children]
    values = [
        point.value == int(run.data.tags["number"]) + (point.step - 1) / EPOCHS
        for run in children
        for name in METRICS
        for point in client.get_metric_history(run.info.run_id, f"val/{name}")
    ]
    return {
        "runs": runs,
        "processes": processes,
        "parents found": len(found) - len(children),
        "children found": len(set(numbers)),
        "found twice": len(numbers) - len(set(numbers)),
        "FINISHED": sum(run.info.status == "FINISHED" for run in children),
        "values of epochs, expected": runs * EPOCHS * len(METRICS),
        "values of epochs, found": sum(values),
        "with their final Score": sum(
            run.data.metrics.get("test/score") == int(run.data.tags["number"]) for run in children
        ),
        "with their file": sum(bool(client.list_artifacts(run.info.run_id)) for run in children),
        "completed afterwards by replay": len(late),
        "seconds": round(seconds),
    }


def main() -> int:
    """Measure, print, and write the result where that is asked for."""
    args = options(__doc__, runs=200, processes=4, output="")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.runs, args.processes)
    command = f"python -m benchmarks.tracking_scale --runs {args.runs}"
    command += f" --processes {args.processes}"
    page = f"# Many runs in one MLflow database, {date.today()}\n\n`{command}`\n\n"
    page += table({key: {"": value} for key, value in result.items()}) + "\n"
    if args.output:
        write_text(Path(args.output, "tracking_scale.md"), page)
    print(f"\n{page}\n{json.dumps(result)}")
    whole = ("children found", "FINISHED", "with their final Score", "with their file")
    sound = all(result[name] == args.runs for name in whole) and result["parents found"] == 1
    lost = result["values of epochs, expected"] - result["values of epochs, found"]
    return 0 if sound and not lost and not result["found twice"] else 1


if __name__ == "__main__":
    sys.exit(main())
