"""Every private name of torch that gradwatch uses, each with what replaces it.

torch 2.6 to 2.13 have all of them; a later torch that lacks one loses what the
docstring says, and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

graph_task_id: Callable[[], int] = getattr(
    torch._C, "_current_graph_task_id", lambda: -1
)
"""Return the number of the backward pass in progress, -1 outside one.

Without the private call: -1, and gradients are read in the optimizer's hooks alone.
"""


class AfterBackward:
    """Calls back once the backward pass in progress has finished, DDP's part included.

    The callback is queued from a queued callback: what is queued directly runs before
    DDP has averaged the gradients.

    Args:
        callback: It is kept alive by the last pass.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        engine = getattr(torch.autograd.Variable, "_execution_engine", None)
        self._queue: Any = getattr(engine, "queue_callback", None)

    def __call__(self) -> bool:
        """Have it called; False where there is no such queue, or no pass."""
        if self._queue is None or graph_task_id() == -1:
            return False
        self._queue(self._again)
        return True

    def _again(self) -> None:
        try:
            self._queue(self._callback)
        except Exception:  # too early is better than never
            self._callback()


flattened: Callable[[list[Tensor]], Tensor] = getattr(
    torch._C._nn, "flatten_dense_tensors", None
) or (lambda tensors: torch.cat([tensor.reshape(-1) for tensor in tensors]))
"""Return the entries of several tensors in one.

Without the private call: by public ones, which take a little longer.
"""


def holds_values(tensor: Tensor) -> bool:
    """Tell whether a tensor is a real one: not traced, exported or transformed.

    Without the private calls: those of torch.jit.trace and torch.func are taken for
    real ones.
    """
    tracing = getattr(torch._C, "_get_tracing_state", lambda: None)
    if type(tensor) not in (Tensor, nn.Parameter) or tracing() is not None:
        return False
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is None or not wrapped(tensor)


def flat_weights(module: nn.Module) -> list[Tensor] | None:
    """Return the weights that the last forward of an ``nn.RNNBase`` used, in its order.

    Reading this list runs no parametrization; reading ``module.weight_hh_l0`` does.
    Without the private list: None, and attributes are read.
    """
    flat = getattr(module, "_flat_weights", None)
    return flat if isinstance(flat, list) else None


def flat_weight_names(module: nn.Module) -> list[str]:
    """Return the names that belong to :func:`flat_weights`."""
    return list(getattr(module, "_flat_weights_names", ()))


def loss_scale(scaler: Any) -> Tensor | None:
    """Return a copy of a GradScaler's present factor; None where there is none yet.

    A copy, because ``scaler.update()`` changes it before it would be read.
    Without the private tensor: the factor as the public ``get_scale`` gives it.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    scale = getattr(scaler, "_scale", None)
    if isinstance(scale, Tensor):
        return scale.detach().clone()
    return torch.tensor(scaler.get_scale())


def scaler_stage(scaler: Any, optimizer: Any) -> str | None:
    """Return how far a GradScaler is with an optimizer's gradients in this step.

    Returns:
        ``READY``: still scaled; ``UNSCALED``; ``STEPPED``. None where it does not
        scale, and without the private table.
    """
    if not scaler.is_enabled():
        return None
    known = getattr(scaler, "_per_optimizer_states", None)
    if not isinstance(known, dict):
        return None
    stage = known[id(optimizer)]["stage"] if id(optimizer) in known else None
    return getattr(stage, "name", "READY")


def fused_scale(optimizer: Any) -> Tensor | None:
    """Return the factor that a fused optimizer is to divide its gradients by itself.

    A GradScaler puts it on the optimizer for the time of its step; else None.
    """
    factor = getattr(optimizer, "grad_scale", None)
    return factor if isinstance(factor, Tensor) else None


def refuses_inf(optimizer: Any) -> bool:
    """Tell whether a fused optimizer leaves the weights alone if a gradient is Inf.

    A GradScaler puts what it has found on the optimizer for the time of its step.
    """
    return isinstance(getattr(optimizer, "found_inf", None), Tensor)


def has_pre_hooks(optimizer: Any) -> bool:
    """Tell whether an optimizer has step pre-hooks of its own.

    Without the private dict: yes, so that ours is put behind any.
    """
    return bool(getattr(optimizer, "_optimizer_step_pre_hooks", True))


_SCALER_FILE = torch.amp.GradScaler.step.__code__.co_filename


def calling_scaler(depth: int = 16) -> Any | None:
    """Return the GradScaler among the callers of this function, or None.

    ``scaler.step(optimizer)`` calls the optimizer, whose hook calls us: the scaler is
    the ``self`` of a frame above. Without frames (no CPython): None, and the user
    passes ``scaler=``.
    """
    frame = getattr(sys, "_getframe", lambda: None)()
    while frame is not None and depth:
        # Reading f_locals of a user's frame would keep its variables alive, before
        # Python 3.13: only a frame of the scaler's own code is asked.
        if frame.f_code.co_filename == _SCALER_FILE:
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.amp.GradScaler):
                return owner
        frame, depth = frame.f_back, depth - 1
    return None


_BACKWARD = torch.autograd.backward.__code__
_ABOVE: Final = 64
"""Frames above a call of backward in which one is looked for that it runs inside of."""
_frame: Callable[[], Any] = getattr(sys, "_getframe", lambda: None)


def backward_call(*, elsewhere: bool) -> tuple[Any, Any, bool] | None:
    """Return the outermost call of backward that this runs in, if it can be told.

    Without frames, or the names in torch's own: None.

    Args:
        elsewhere: Whether it may be in another thread: the one that calls backward, if
            it is the only one that does.

    Returns:
        What it was called on; the gradients that were given for these, None for none;
        and whether whoever asks runs in another call, inside this one.
    """
    frame, found, nested, left = _frame(), None, False, _ABOVE
    while frame is not None and left:
        if frame.f_code is _BACKWARD:
            found, nested, left = frame, found is not None, _ABOVE
        frame, left = frame.f_back, left - 1
    if found is None and elsewhere:
        found = _only_backward()
    if found is None:
        return None
    known = found.f_locals  # of torch's own frame: it dies with the call
    try:
        return known["tensors"], known["grad_tensors"], nested
    except KeyError:
        return None


def _only_backward() -> Any:
    """Return the frame of the one call of backward in progress in all threads."""
    found = []
    for frame in getattr(sys, "_current_frames", dict)().values():
        own = None
        while frame is not None:
            own = frame if frame.f_code is _BACKWARD else own
            frame = frame.f_back
        if own is not None:
            found.append(own)
    return found[0] if len(found) == 1 else None


next_function: Callable[[], int] = getattr(
    torch._C._autograd, "_get_sequence_nr", lambda: 0
)
"""Return the number that the next function of the graph made by this thread gets.

Without the private call: 0, and no function is older than that.
"""


def function_number(function: Any) -> int:
    """Return the number of a function of the graph.

    Without the private call: a number that no function has.
    """
    number: int = function._sequence_nr() if hasattr(function, "_sequence_nr") else -1
    return number


def made_before(tensor: Tensor, number: int) -> bool:
    """Tell whether a tensor was made by a function with a smaller number."""
    function = tensor.grad_fn
    return function is not None and -1 < function_number(function) < number


def saved(function: Any, name: str, default: Any) -> Any:
    """Return a number that a function of the graph has kept, even once it has run.

    Without the private attribute: the default.
    """
    return getattr(function, f"_saved_{name}", default)


_GIL: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
_references_without = -1
"""To the class of checkpointing's frames, where no object was one of them."""


def recomputes() -> bool:
    """Tell whether some graph holds no tensors and makes them again when asked.

    That is checkpointing, which may be asked once. Each of its frames is a reference to
    their class: where there are as many as when all objects were gone through and none
    was a frame, there is none. To go through them takes .1 us an object.
    """
    global _references_without
    frame = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)
    if frame is None:
        return True
    references = sys.getrefcount(frame)
    if references == _references_without and _GIL():
        return False
    found = any(type(one) is frame for one in gc.get_objects())
    if not found and sys.getrefcount(frame) == references:
        _references_without = references
    return found


def kept_tensors(function: Any) -> list[Tensor]:
    """Return the tensors that a function of the graph keeps for its backward.

    Without the private attributes, and once it has run: none.
    """
    found: list[Tensor] = []
    for name in dir(function):
        if not name.startswith("_saved_"):
            continue
        try:
            kept = getattr(function, name)
        except RuntimeError:  # freed: it has run
            return []
        found += [kept] if isinstance(kept, Tensor) else []
        if isinstance(kept, tuple | list):
            found += [one for one in kept if isinstance(one, Tensor)]
    return found


def parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a model with their names; of shards, the shards.

    From a forward to the end of backward ``fully_shard`` has whole weights in their
    place, whose memory is freed in between.
    Without the private names: what the module holds.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    shards: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if not isinstance(module, kind):
            continue
        state = getattr(module, "_get_fsdp_state", _none)()
        for group in getattr(state, "_fsdp_param_groups", ()):
            for one in group.fsdp_params:
                for name in ("_unsharded_param", "_sharded_post_forward_param"):
                    shards[id(getattr(one, name, None))] = one.sharded_param
    return [(name, shards.get(id(p), p)) for name, p in model.named_parameters()]


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is spread over processes."""
    return hasattr(tensor, "to_local")


def is_freed(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory has been given back while the tensor lives.

    ``fully_shard`` does that with whole weights between their uses; to read one then
    ends the process.
    """
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in pairs)
    return tensor.untyped_storage().nbytes() < (last + 1) * tensor.itemsize


def made_shapes(function: Any) -> list[tuple[int, ...]]:
    """Return the shapes of what a function of the graph has made.

    Without the private attribute: none.
    """
    made: Any = getattr(function, "_input_metadata", ())
    return [tuple(int(n) for n in one.shape) for one in made]


_HOOKED_STEP = (torch.optim.Optimizer.profile_hook_step.__code__.co_filename, "wrapper")


def running_steps() -> int:
    """Return how many optimizer steps are in progress among the callers.

    An optimizer's hooks are called by a wrapper around its step, one frame for each
    that is in progress. Without frames, or the wrapper's name: 0.
    """
    frame, found = getattr(sys, "_getframe", lambda: None)(), 0
    while frame is not None:
        code = frame.f_code
        found += (code.co_filename, code.co_name) == _HOOKED_STEP
        frame = frame.f_back
    return found


@contextlib.contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Have recurrent functions run without cuDNN, on the GPU.

    It wants the weights in one chunk of memory and warns where they are not. Not by
    ``torch.backends.cudnn.flags``: that asks for settings which newer ones bar.
    """
    cudnn = torch.backends.cudnn
    if device.type != "cuda" or not cudnn.enabled:
        yield
        return
    cudnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled = True


_SLOT = "_compiled_call_impl"


def call_slot(module: nn.Module) -> Any:
    """Return what runs in place of a module's call; None for nothing.

    ``module.compile()`` puts something there. Without the private name: what
    :func:`set_call_slot` has put there is never called, and no call is seen.
    """
    return vars(module).get(_SLOT)


def set_call_slot(module: nn.Module, call: Any) -> None:
    """Have something run in place of a module's call; None for nothing."""
    if call is None:
        vars(module).pop(_SLOT, None)
    else:
        vars(module)[_SLOT] = call


def changes_arguments(module: nn.Module) -> bool:
    """Tell whether a forward may be given other arguments than the call was.

    Without the private dict: no.
    """
    return bool(getattr(module, "_forward_pre_hooks", None))


def store() -> Any | None:
    """Return the store by which this process has met the others.

    Without the private name: None, and sharded weights are not measured.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return getattr(torch.distributed.distributed_c10d, "_get_default_store", _none)()


def _none() -> None:
    """Stand in for what is not there."""


def compiles() -> bool:
    """Tell whether anything has been compiled in this process.

    Without the private counters: no.
    """
    utils = sys.modules.get("torch._dynamo.utils")
    return bool(getattr(utils, "counters", {}).get("frames"))


def _compiler_at_work() -> Any:
    """Return what compiles the functions that are called now; None for nothing.

    Without the private call: something, once the compiler has been imported. So too
    before torch 2.13: that of 2.6 drops a reference that it does not own, and what was
    between was not tried.
    """
    global compiler
    if "torch._dynamo" not in sys.modules:
        return None
    frames: Any = getattr(torch._C._dynamo, "eval_frame", None)
    owned = torch.__version__ >= "2.13"  # compares as versions do
    compiler = getattr(frames if owned else None, "get_eval_frame_callback", _always)
    return compiler()


def _always() -> bool:
    return True


compiler: Callable[[], Any] = _compiler_at_work
"""The same; torch's own function, once there is one."""


class OutOfGraphs:
    """A function that a compiler leaves alone, where one is at work.

    ``torch.compiler.disable`` imports the compiler, which takes seconds.
    """

    __slots__ = ("_disabled", "_function")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._disabled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if compiler() is None:
            return self._function(*args, **kwargs)
        if self._disabled is None:
            try:
                self._disabled = torch.compiler.disable(self._function)
            except Exception:  # the compiler then looks at a function of ours
                self._disabled = self._function
        return self._disabled(*args, **kwargs)
