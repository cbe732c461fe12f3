"""Where and how precisely a run computes."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Device, precision and the other processes of a run.

    Attributes:
        accelerator: accelerate's view of the processes (started by torchrun, or just one).
        device: of this process.
        precision: fp32 | bf16 | fp16, "auto" resolved.
        compiled: whether models are compiled.
    """

    def __init__(self, device: str = "auto", precision: str = "auto", compile: str = "auto"):
        # Precision is decided here, not by an `accelerate config` that the user may have. Buffers
        # never differ between the processes, and gradients need no copy beside the buckets.
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
        self.precision = precision
        wanted = on_cuda if compile == "auto" else compile == "true"
        self.compiled = wanted and self._compiler_works()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        if on_cuda:
            # fp32 products (front end apart) may use TF32: what "fp32" training means on a GPU.
            torch.set_float32_matmul_precision("high")

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
        """Try a trifle, forward and backward: without a compiler torch would fail much later, in
        the first backward pass."""
        x = torch.ones(8, device=self.device, requires_grad=True)
        try:
            torch.compile(lambda x: (x.sin() * x).sum())(x).backward()
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            logger.warning("torch.compile does not work here, going on without it: %s", reason)
            return False
        return True

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for forward passes; nothing in fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move to the device, compile by key, and wrap for several processes.

        The model passed in shares its weights with the returned one; use it for everything but
        the training step.
        """
        model.to(self.device)
        if self.compiled:
            # Where a backend can not compile a part, dynamo warns and runs that part as it is.
            torch._dynamo.config.suppress_errors = True
            model.compile()
        return self.accelerator.prepare_model(model) if self.world > 1 else model

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
