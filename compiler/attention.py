"""Finding the attention calls of a model, by running its entry points and watching.

Passes that replace attention ask here which module makes which ``scaled_dot_product_attention`` call. No
class and no name of a model is looked at, and of a mask only its values: a mask that is causal, or causal within
a sliding window, counts as what it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from triptych.compiler.attention_masks import CausalBand, read_mask
from triptych.compiler.capture import bound_forward
from triptych.compiler.model import EntryPoint, Model
from triptych.manifest import TensorSignature
from triptych.modules.routing import enter_multi_head_attention


@dataclass(frozen=True)
class AttentionCall:
    """One call: the module whose forward made it, and what it was given ([B, H, S, D] tensors).

    `outside` marks a call made in no module's forward. `mask` is the call's own, where it has one. `attention_calls`
    reads it: a causal mask is no longer `masked` but `causal`, with the sliding `window` in positions that it shows,
    if any (a position attends to itself and to the `window` - 1 before it); for another, `mask_reason` is a phrase
    that says what was seen.
    """

    owner: str
    entry_point: str
    query: Tensor
    key: Tensor
    value: Tensor
    masked: bool
    causal: bool
    dropout: bool
    outside: bool = False
    mask: Tensor | None = None
    window: int | None = None
    mask_reason: str = ""


class _EnoughCallsError(BaseException):
    """Ends a run whose calls have all been seen; no model's own handler of exceptions may take it."""


class _AttentionWatch(TorchFunctionMode):
    """Records attention calls. With `stop_after` calls the run ends, and attention is not computed but replaced.

    The replacement costs next to nothing and still depends on the inputs.
    """

    def __init__(self, entry_point: str, stop_after: int | None) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []
        self.running: list[str] = []
        self._entry_point = entry_point
        self._stop_after = stop_after

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self._record(*args, **(kwargs or {}))
            if self._stop_after is not None:
                return self._replacement()
        elif func is F.multi_head_attention_forward:
            return enter_multi_head_attention(self, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> None:
        owner = self.running[-1] if self.running else ""
        self.calls.append(
            AttentionCall(
                owner,
                self._entry_point,
                query,
                key,
                value,
                attn_mask is not None,
                is_causal,
                dropout_p != 0.0,
                outside=not self.running,
                mask=attn_mask,
            )
        )

    def _replacement(self) -> Tensor:
        if len(self.calls) == self._stop_after:
            raise _EnoughCallsError
        call = self.calls[-1]
        mean = call.value.flatten(0, -2).mean(dim=0)
        return mean.expand(*call.query.shape[:-1], -1)


@contextmanager
def recorded_attention(
    module: nn.Module, entry_point: str = "", *, stop_after: int | None = None
) -> Iterator[list[AttentionCall]]:
    """Record the attention calls made inside, each with the innermost child of `module` then running.

    State that `module` keeps in buffers is written in copies, which are gone at the end. With `stop_after` the code
    inside is left after so many calls, and what it computes before has no meaning.
    """
    watch = _AttentionWatch(entry_point, stop_after)

    def left(*_: object) -> None:
        watch.running.pop()

    handles: list[RemovableHandle] = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_, name=name: watch.running.append(name)))
        handles.append(child.register_forward_hook(left, always_call=True))
    own = [(child, name, buffer) for child in module.modules() for name, buffer in child.named_buffers(recurse=False)]
    copies = {id(buffer): buffer.clone() for _, _, buffer in own}
    for child, name, buffer in own:
        child._buffers[name] = copies[id(buffer)]
    try:
        with watch:
            yield watch.calls
    except _EnoughCallsError:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for child, name, buffer in own:
            child._buffers[name] = buffer


def attention_calls(model: Model, entries: Iterable[EntryPoint]) -> list[AttentionCall]:
    """Run each of `entries` once on its example inputs and return the calls made, in order, with their masks read.

    An entry point that passes masks runs twice more, at the full length of its dynamic dimensions and at one less, on
    other inputs: every window within the context shows there, and so does a mask that depends on the inputs. A call on
    one position shows no window and has that of the same module's longer calls.
    """
    found: list[AttentionCall] = []
    for entry in entries:
        calls = _run(model, entry, entry.example_inputs())
        if any(call.masked and call.query.shape[2] > 1 for call in calls):
            longer_runs = [_run(model, entry, _inputs(model, entry, less), stop_after=len(calls)) for less in (0, 1)]
            calls = _with_masks_read([*longer_runs, calls])
        found += calls
    longer = {call.owner: call for call in reversed(found) if call.query.shape[2] > 1}
    return [_of_one_position(call, longer.get(call.owner)) if call.query.shape[2] == 1 else call for call in found]


def _run(
    model: Model, entry: EntryPoint, inputs: Sequence[Tensor], stop_after: int | None = None
) -> list[AttentionCall]:
    with torch.no_grad(), recorded_attention(model.module, entry.name, stop_after=stop_after) as calls:
        bound_forward(model.module, entry)(*inputs)
    return calls


def _inputs(model: Model, entry: EntryPoint, shorter: int) -> tuple[Tensor, ...]:
    """Draw inputs with dynamic dimensions `shorter` than their maximum, at that position and from that seed."""
    generator = torch.Generator().manual_seed(1 + shorter)

    def draw(port: TensorSignature) -> Tensor:
        sizes = [dim if isinstance(dim, int) else max(dim.minimum, dim.maximum - shorter) for dim in port.shape]
        if port.name in entry.examples:
            return _repeated(entry.examples[port.name], sizes)
        dtype = getattr(torch, port.dtype)
        if dtype.is_floating_point:
            return torch.randn(sizes, generator=generator).to(dtype)
        if "tokens" in port.links:
            return torch.randint(0, model.metadata.vocab_size, sizes, generator=generator).to(dtype)
        is_dynamic = any(not isinstance(dim, int) for one in entry.inputs for dim in one.shape)
        return torch.full(sizes, shorter if port.name == "start_pos" and is_dynamic else 0, dtype=dtype)

    return tuple(draw(port) for port in entry.inputs)


def _repeated(example: Tensor, sizes: Sequence[int]) -> Tensor:
    for axis, size in enumerate(sizes):
        example = example.index_select(axis, torch.arange(size) % example.shape[axis])
    return example


def _with_masks_read(runs: Sequence[Sequence[AttentionCall]]) -> list[AttentionCall]:
    """Return the calls of the last run with their masks read from the first, the longest; all runs must agree."""
    read = [list(zip(run, _bands(run), strict=True)) for run in runs]
    found = []
    for index, call in enumerate(runs[-1]):
        seen = [run[index] for run in read if index < len(run)]
        if len(seen) < len(runs) or any(one.owner != call.owner for one, _ in seen):
            reason = "comes with other calls in a longer sequence"
            found.append(dataclasses.replace(call, masked=True, mask_reason=reason))
        elif any(one.mask is not None for one, _ in seen):
            found.append(_with_mask_read(call, seen))
        else:
            found.append(call)
    return found


def _with_mask_read(call: AttentionCall, seen: Sequence[tuple[AttentionCall, CausalBand | str]]) -> AttentionCall:
    """Return `call` with its mask read; `seen` is this call in each run with what its mask shows, the longest first."""
    for _, band in seen:
        if isinstance(band, str):
            return dataclasses.replace(call, masked=True, mask_reason=band)
    longest = seen[0][1]
    assert isinstance(longest, CausalBand)
    if any(band != longest.within(one.query.shape[2]) for one, band in seen):
        return dataclasses.replace(call, masked=True, mask_reason="changes with the inputs")
    return dataclasses.replace(call, masked=False, causal=True, window=longest.window)


def _bands(calls: Sequence[AttentionCall]) -> list[CausalBand | str]:
    """Read the mask of each call; layers share masks, and each is read once."""
    read: dict[object, CausalBand | str] = {}
    for call in calls:
        if _mask_key(call) not in read:
            read[_mask_key(call)] = _band(call)
    return [read[_mask_key(call)] for call in calls]


def _mask_key(call: AttentionCall) -> object:
    return id(call.mask), call.causal, call.query.shape[2], call.key.shape[2]


def _band(call: AttentionCall) -> CausalBand | str:
    if call.mask is not None:
        return read_mask(call.mask.expand(*call.mask.shape[:-2], call.query.shape[2], call.key.shape[2]))
    return CausalBand() if call.causal or call.query.shape[2] == 1 else "is not there at every length"


def _of_one_position(call: AttentionCall, longer: AttentionCall | None) -> AttentionCall:
    if longer is not None and longer.masked:
        return dataclasses.replace(call, masked=True, mask_reason=longer.mask_reason)
    if call.mask is not None:
        band = _band(call)
        if isinstance(band, str):
            return dataclasses.replace(call, mask_reason=band)
    return dataclasses.replace(call, masked=False, window=None if longer is None else longer.window)
