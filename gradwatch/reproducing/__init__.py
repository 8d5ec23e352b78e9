"""Running the step again that was not finite, to say where it breaks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch import console
from gradwatch.before.trial import same_randomness, subject
from gradwatch.recorder import FORMAT
from gradwatch.recorder.state import digest, set_randomness
from gradwatch.reproducing.tracing import Traced, backward_of, tracing
from gradwatch.trees import mapped, tensors_in

LossFn = Callable[..., Tensor]
_TRUSTED: Final[list[Any]] = [PackedSequence]


@dataclass(frozen=True)
class Reproduction:
    """What running a recorded step again has shown.

    Attributes:
        step: Which one.
        place: ``input``, ``weights``, ``forward``, ``backward``, ``loss``, or
            ``nothing`` where all was finite this time.
        what: Where it breaks, in words: ``input[3, 2, 1] is NaN``.
        repeats: Whether it broke at the same place twice; if not, it is neither the
            data nor the model, but the hardware or a race.
        exact: Whether all gradients are those of the recording, bit for bit; None where
            there was no backward.
    """

    step: int
    place: str
    what: str
    repeats: bool
    exact: bool | None

    def __str__(self) -> str:
        """Return it in two lines."""
        again = "twice" if self.repeats else "once, and not when it was run again"
        if self.place == "nothing":
            again = "twice"
        lines = [f"step {self.step}: {self.what} ({again})"]
        if not self.repeats:
            lines.append("what does not repeat is no fault of data or model")
        elif self.place == "nothing":
            lines.append(
                "the fault is not in what was recorded: the loss's own lines (pass "
                "loss_fn), the hardware, or a race"
            )
        if self.exact is not None:
            same = "are" if self.exact else "are not"
            lines.append(f"the gradients {same} those of the recording, bit for bit")
        return "\n".join(lines)


def reproduce(
    recording: str | os.PathLike[str],
    *,
    model: nn.Module,
    loss_fn: LossFn | None = None,
    trusted: bool = False,
) -> Reproduction:
    """Run the step again that a flight recorder has written, and say where it breaks.

    Args:
        recording: A run folder, for its last recording; or the file
            ``incidents/<step>-nonfinite.pt`` itself.
        model: A model of the same make; a copy of it gets the recorded weights.
        loss_fn: ``loss_fn(output, *args, **kwargs)``: from the output and the arguments
            of the model's forward to the loss. None: backward begins with the gradients
            that were recorded at the output.
        trusted: Whether the file may hold objects of your own classes. To read those is
            to run code from the file.

    Returns:
        What was found; it is printed as well, by the logger ``gradwatch``.

    Raises:
        FileNotFoundError: If there is no recording.
        ValueError: If it cannot be read, or the model does not take its weights.
    """
    path = _found(Path(recording))
    content = _read(path, trusted=trusted)
    if "arguments" not in content:
        why = content.get("without", "the model's own forward was never called")
        raise ValueError(
            f"{path} holds no arguments ({why}), so the step cannot be run again. Its "
            f"tensors with NaN or Inf: {', '.join(content.get('nonfinite', [])[:5])}."
        )
    first, exact = _once(content, model, loss_fn)
    second, _ = _once(content, model, loss_fn)
    found = Reproduction(
        step=content["step"],
        place=first[0],
        what=first[1],
        repeats=first == second,
        exact=exact,
    )
    console.say(str(found))
    return found


def _found(path: Path) -> Path:
    if path.is_file():
        return path.with_suffix(".pt") if path.suffix == ".json" else path
    inside = sorted(
        (path / "incidents").glob("*-nonfinite.pt"), key=lambda p: p.stat().st_mtime_ns
    )
    if not inside:
        raise FileNotFoundError(
            f"{path} holds no recording; they are made by gradwatch.watch(model, "
            "recorder=100), in the run folder's incidents."
        )
    return inside[-1]


def _read(path: Path, *, trusted: bool) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_TRUSTED):
            content = torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:
        said = str(error).splitlines()[0][:200]
        hint = (
            ""
            if trusted
            else " If it holds objects of your own classes, and you trust the file: "
            "trusted=True."
        )
        raise ValueError(f"{path} cannot be read ({said}).{hint}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no recording of this version of gradwatch.")
    return content


def _once(
    content: Mapping[str, Any], model: nn.Module, loss_fn: LossFn | None
) -> tuple[tuple[str, str], bool | None]:
    """Return where it breaks and how, and whether gradients are those recorded."""
    with same_randomness(), subject(model, ()) as given, ExitStack() as stack:
        net = given.model
        try:
            net.load_state_dict(content["weights"])
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"the model does not take the weights: {said}") from error
        for name, module in net.named_modules():
            module.training = content["training"].get(name, module.training)
        device = next(net.parameters()).device
        args, kwargs = mapped(content["arguments"], lambda t: t.to(device))
        set_randomness(content["randomness"])
        for kind, dtype in content["autocast"].items():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        if said := _in_tensors("input", args, kwargs):
            return ("input", said), None
        if said := _in_weights(net):
            return ("weights", said), None
        with tracing(net) as traced:
            output = net(*args, **kwargs)
            loss = None if loss_fn is None else loss_fn(output, *args, **kwargs)
        return _judged(content, net, traced, output, loss)


def _judged(
    content: Mapping[str, Any],
    net: nn.Module,
    traced: Traced,
    output: Any,
    loss: Tensor | None,
) -> tuple[tuple[str, str], bool | None]:
    roots = [t for t in tensors_in(output) if t.requires_grad]
    ends = [loss] if loss is not None else roots
    broken = not all(bool(t.detach().isfinite().all()) for t in ends)
    operation = traced.forward or traced.infinite
    if broken:
        return ("forward", str(operation or "an operation outside torch")), None
    if loss is not None:
        backward_of([loss], [None], traced)
    else:
        known = content["grads"]
        places = [i for i, t in enumerate(tensors_in(output)) if i in known]
        outputs = tensors_in(output)
        grads = [known[i].to(outputs[i]) for i in places]
        if not all(bool(g.isfinite().all()) for g in grads):
            what = (
                "the gradient that arrived at the output is not finite: the loss, or "
            )
            return ("loss", f"{what}what it compares with (pass loss_fn)"), None
        if not grads:
            return ("nothing", "no gradient arrived at the output"), None
        backward_of([outputs[i] for i in places], grads, traced)
    digests = content["digests"]
    named = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    exact = {n: digest(g) for n, g in named.items()} == digests
    if traced.backward is not None:
        return ("backward", f"the backward of {traced.backward}"), exact
    if all(bool(g.isfinite().all()) for g in named.values()):
        return ("nothing", "everything is finite this time"), exact
    return ("backward", "gradients that add up beyond what the type holds"), exact


def _in_tensors(name: str, args: Any, kwargs: Any) -> str:
    """Return the first entry of the arguments that is not finite; empty for none."""
    several = len(tensors_in(args)) > 1
    named = itertools.chain(
        ((f"{name} {i}" if several else name, v) for i, v in enumerate(args)),
        ((f"{name} {key}", v) for key, v in kwargs.items()),
    )
    for called, value in named:
        for tensor in tensors_in(value):
            if said := _entry(called, tensor):
                return said
    return ""


def _in_weights(net: nn.Module) -> str:
    for name, tensor in _values(net):
        if said := _entry(name, tensor):
            return said
    return ""


def _values(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from net.named_parameters()
    yield from net.named_buffers()


def _entry(name: str, tensor: Tensor) -> str:
    """Return the first entry of a tensor that is not finite, in words."""
    if not tensor.is_floating_point():
        return ""
    bad = ~tensor.detach().isfinite()
    if not bool(bad.any()):
        return ""
    place = bad.nonzero()[0].tolist()
    value = float(tensor.detach()[tuple(place)])
    word = "NaN" if value != value else "Inf" if value > 0 else "-Inf"
    return f"{name}{place} is {word}"


__all__: Sequence[str] = ["Reproduction", "reproduce"]
