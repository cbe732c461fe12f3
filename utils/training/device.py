"""Device, precision and distribution of a run."""

from __future__ import annotations

import logging
import os
import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

logger = logging.getLogger(__name__)

#: Of one width: a full and a smaller batch, in training and evaluation, and some to spare.
GRAPHS = 8
#: What torchrun sets for every process of a group, and what else accelerate takes for a group's.
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
LAUNCHED = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    *(f"{mpi}_COMM_WORLD_{n}" for mpi in ("OMPI", "MV2") for n in ("SIZE", "RANK", "LOCAL_RANK")),
)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Device, precision and the other processes of a run.

    Attributes:
        accelerator: accelerate's view of the processes (started by torchrun, or just one).
        device: of this process.
        precision: fp32 (exact) | tf32 | bf16 | fp16; "auto" resolved.
        compiled: whether models are compiled.
        by_block: whether each block of a model is compiled by itself.
    """

    def __init__(self, device: str = "auto", precision: str = "auto", compile: str = "auto"):
        launched = [name for name in LAUNCHED if name in os.environ]
        missing = [name for name in TORCHRUN if name not in os.environ]
        if launched and missing:  # as batch systems leave them in a job
            names = ", ".join(launched)
            logger.warning("%s without %s: not started by torchrun, runs alone", names, missing[0])
            for name in launched:
                del os.environ[name]
        # Precision is decided here, not by an `accelerate config` that the user may have. Buffers
        # never differ between the processes, and gradients can live in the buckets.
        exchange = DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.accelerator = Accelerator(
            cpu=device == "cpu" or not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[exchange],
        )
        self.device = self.accelerator.device
        on_cuda = self.device.type == "cuda"
        if precision == "auto":
            # torch emulates bf16 on older cards, at a fraction of the speed of fp32
            native = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if native else "fp32"
        self.precision = precision if on_cuda or precision != "tf32" else "fp32"
        enabled = on_cuda if compile == "auto" else compile != "false"
        self.compiled = enabled and self._compiler_works()
        self.by_block = compile == "blocks"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        if on_cuda:  # TF32 rounds the factors of a product to 10 bits; the front end never uses it
            exact = precision == "fp32"
            torch.set_float32_matmul_precision("highest" if exact else "high")
            torch.backends.cudnn.allow_tf32 = not exact

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _compiler_works(self) -> bool:
        """Try a tiny function, forward and backward: without a compiler torch would fail much
        later, in the first backward pass."""
        x = torch.ones(8, device=self.device, requires_grad=True)
        try:
            torch.compile(lambda x: (x.sin() * x).sum())(x).backward()
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            logger.warning("torch.compile does not work here, continuing without it: %s", reason)
            return False
        return True

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for forward passes: bf16 and fp16 only."""
        if self.precision not in AUTOCAST:
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.precision])

    def prepare(self, model: torch.nn.Module, widths: int = 1) -> torch.nn.Module:
        """Move to the device, compile by key, and wrap for several processes.

        The model passed in shares its weights with the returned one; use it for everything but
        the training step.

        widths: of spectrograms that there will be; each of several gets graphs of its own shape.
        """
        model.to(self.device)
        if self.compiled:
            if widths > 1:
                torch._dynamo.config.automatic_dynamic_shapes = False
                torch._dynamo.config.recompile_limit = max(
                    torch._dynamo.config.recompile_limit, GRAPHS * widths
                )
            for part in model.backbone.blocks if self.by_block else [model]:
                part.compile()
        return self.accelerator.prepare_model(model) if self.world > 1 else model

    def exchange(self, wrapped: torch.nn.Module, *, when: bool) -> AbstractContextManager:
        """Backward passes inside exchange gradients between the processes only `when` it is true:
        once per step, after its last micro-batch."""
        return nullcontext() if when or self.world == 1 else wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, scaled for fp16. Data parallelism takes the mean over the
        processes; the loss is this process's share of a sum."""
        self.scaler.scale(loss * self.world).backward()

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[Tensor],
        grad_clip: float,
        loss: Tensor,
    ) -> Tensor:
        """Clip the gradients, step and clear them, without a host sync.

        Args:
            grad_clip: largest gradient norm; 0: no limit.
            loss: of the step, a scalar on the device.

        Returns:
            A scalar on the device: 1 if the gradient was not finite and the update was skipped.
        """
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf"))
        if self.scaler.is_enabled():
            # fp16: the scaler skips overflowing updates by itself; only a bad loss is an error.
            nonfinite = (~torch.isfinite(loss)).float()
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            nonfinite = (~torch.isfinite(norm)).float()
            optimizer.found_inf = nonfinite  # the fused kernel skips the update by it
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return nonfinite

    def gather(self, tensor: Tensor, fill: float) -> Tensor:
        """Rows of all processes, one below the other; shorter parts are padded with `fill`."""
        if self.world == 1:
            return tensor
        padded = self.accelerator.pad_across_processes(tensor, dim=0, pad_index=fill)
        return self.accelerator.gather(padded.contiguous())

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


def describe(runtime: Runtime) -> str:
    """One line for the log."""
    if runtime.device.type == "cuda":
        name = torch.cuda.get_device_name(runtime.device)
    else:
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    processes = f", {runtime.world} processes" if runtime.world > 1 else ""
    compiled = ", compiled" if runtime.compiled else ""
    return f"{name}, {runtime.precision}{compiled}{processes}"


def generator_states() -> dict[str, Any]:
    """States of every random generator a library might use, as tensors and plain numbers."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one, whoever uses it
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: dict[str, Any]) -> None:
    """Restore what `generator_states` gave."""
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
