"""Front end and model step of this checkout against another one, in turn: A B A B.

    python -m benchmarks.against REVISION_OR_PATH [--rounds 3] [--threads 1] [--depth 2]

Each round runs `benchmarks.frontend` and `benchmarks.model_step` (fp32, forward and step) once in
either checkout, as processes of their own; the first of a round alternates. `ratio` is our time
over theirs, `over_peer` the same with both times divided by that of the peer in their own process
(torchaudio, transformers), which a busy machine disturbs less; both are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import measurement, rounded, spread, table

ROOT = Path(__file__).resolve().parent.parent


def times_of(tree: Path, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """What -> (s, times the peer's s), measured with the code in `tree`."""
    threads = ["--threads", str(args.threads)]

    def run(name: str, *words: str) -> dict:
        command = [sys.executable, "-m", f"benchmarks.{name}", *threads, *words]
        out = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
        return json.loads(out.stdout.splitlines()[-1])

    front, found = run("frontend", "--rounds", "5"), {}
    for label, key in (("log-mel", "clips_per_s"), ("front end", "forward_clips_per_s")):
        found[label] = (1 / front[key], front["torchaudio_clips_per_s"] / front[key])
    words = ["--precision", "fp32", "--rounds", "3", "--depth", str(args.depth)]
    step = run("model_step", *words, "--device", "cpu")
    for kind in ("forward", "step"):
        peers, variants = step[f"peers_{kind}_fp32"], step[f"variants_{kind}_fp32"]
        peer = peers["transformers"]["seconds_per_clip"]
        for label in ("same work", "ours", *(variants.keys() - {"matmul"})):
            seconds = {**variants, **peers}[label]["seconds_per_clip"]
            found[f"{label}, {kind}"] = (seconds, seconds / peer)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", help="a revision, or the path of another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the transformer")
    args = parser.parse_args()
    other, git = Path(args.other), ["git", "-C", str(ROOT), "worktree"]
    temporary = None if other.is_dir() else Path(tempfile.mkdtemp()) / "checkout"
    if temporary:
        subprocess.run([*git, "add", "--detach", str(temporary), args.other], check=True)
        other = temporary
    try:
        runs: dict[Path, list[dict]] = {ROOT: [], other: []}
        for number in range(args.rounds):
            for tree in (ROOT, other) if number % 2 == 0 else (other, ROOT):
                runs[tree].append(times_of(tree, args))
    finally:
        if temporary:
            subprocess.run([*git, "remove", "--force", str(temporary)], check=True)
    rows = {}
    for what in sorted(runs[ROOT][0].keys() & runs[other][0].keys()):
        pairs = [(a[what], b[what]) for a, b in zip(runs[ROOT], runs[other], strict=True)]
        ratio, over = (measurement(a[k] / b[k] for a, b in pairs) for k in (0, 1))
        rows[what] = {"ratio": ratio.median, "over_peer": over.median, "spread": spread(ratio)}
    print(table(rows))
    print(json.dumps(rounded(rows)))


if __name__ == "__main__":
    main()
