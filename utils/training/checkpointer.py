"""The training state on disk: saved at intervals, restored by the same command."""

from __future__ import annotations

import logging
import threading
from typing import Any

from utils.common.errors import Busy, UserError
from utils.config.schema import config_from_dict, config_hash
from utils.training.checkpoint import load_state, save_state
from utils.training.fingerprint import difference
from utils.training.runfolder import RunFolder

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes and reads `checkpoints/last.pt` of a run folder.

    Args:
        folder: the run folder.
        config: the run's configuration as a plain dictionary.
        fingerprint: of the run's data (`utils.training.fingerprint`).
        lost: set when another process has taken the folder over.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: dict[str, Any],
        fingerprint: dict[str, Any],
        lost: threading.Event | None = None,
    ):
        self.folder, self.lost = folder, lost
        self.origin = {"config": config, "fingerprint": fingerprint}

    def save(self, state: dict[str, Any]) -> None:
        """Replace last.pt.

        Raises:
            UserError: it cannot be written, or the folder belongs to another process by now.
        """
        if self.lost is not None and self.lost.is_set():
            raise Busy(f"{self.folder.path} was taken over by another process; this one stops")
        save_state(self.folder.last, {"origin": self.origin, **state})

    def restore(self, trainer: Any) -> bool:
        """Give a trainer its state from last.pt if there is one; every process reads it.

        Raises:
            UserError: it belongs to another configuration, other data or other code.
        """
        path = self.folder.last
        if not path.is_file():
            return False
        state = load_state(path)
        try:
            self._check_origin(state.pop("origin"))
            trainer.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{path} does not fit this code ({reason}); use the revision that wrote it, or "
                "start from scratch with training.resume=never"
            ) from error
        progress = trainer.progress
        logger.info("resuming after epoch %d, step %d (%s)", progress.epoch, progress.step, path)
        return True

    def _check_origin(self, origin: dict[str, Any]) -> None:
        """Only the same configuration on the same data may be resumed."""
        now, then = (config_hash(config_from_dict(o["config"])) for o in (self.origin, origin))
        if now != then:
            raise UserError(
                f"{self.folder.last} belongs to another configuration ({then}, not {now}); start "
                "from scratch with training.resume=never"
            )
        differs = difference(origin["fingerprint"], self.origin["fingerprint"])
        if differs:
            raise UserError(
                f"the data has changed since {self.folder.last} was written: {differs}; restore "
                "it, or start from scratch with training.resume=never"
            )
