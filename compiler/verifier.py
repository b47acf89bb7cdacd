"""Structural verification of a `Program`: cheap, always on, after every pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.export import ExportedProgram

from triptych.compiler.capture import output_signatures, user_input_values
from triptych.compiler.editing import storage_identity
from triptych.compiler.program import Method, Program
from triptych.errors import VerificationError
from triptych.manifest import CHOSEN_TOKEN, Dim, DynamicDim, TensorSignature


def verify(program: Program, known: Program | None = None) -> None:
    """Check `program`; raises one `VerificationError` that lists everything wrong, method by method.

    Methods that `known`, a program verified before, holds too are not looked into again.

    1. Every `ExportedProgram` is valid and its graph well formed.
    2. Every declared input and output has the dtype and the shape the graph gives it.
    3. Producer and consumer agree: dtype, last dimension, and the range of the sequence dimension.
    4. Shared state has one shape and one storage, and no two rows share a storage.
    5. Metadata agrees with the methods: context bounds, vocabulary, EOS ids, image tokens.
    """
    problems = [
        *_method_problems(program, known.methods if known else {}),
        *_link_problems(program),
        *_state_problems(program),
        *_metadata_problems(program),
    ]
    if problems:
        raise VerificationError("the program is not well formed: " + "; ".join(problems))


def _method_problems(program: Program, known: Mapping[str, Method]) -> Iterator[str]:
    for name, method in program.methods.items():
        if known.get(name) is method:
            continue
        problem = _invalid(method.exported)
        if problem is not None:
            yield f"{name}: {problem}"
            continue
        values = user_input_values(method.exported)
        if list(values) != [port.name for port in method.inputs]:
            yield f"{name}: takes {list(values)}, its signature says {[port.name for port in method.inputs]}"
            continue
        for port in method.inputs:
            yield from _port_problems(f"{name}.{port.name}", port, values[port.name])
        for port, found in zip(method.outputs, _outputs_of(method), strict=False):
            where = f"{name}.{port.name}"
            if port.dtype != found.dtype:
                yield f"{where} is {found.dtype} in the graph and {port.dtype} in its signature"
            if port.shape != found.shape:
                yield f"{where} has shape {list(found.shape)} in the graph and {list(port.shape)} in its signature"


def _outputs_of(method: Method) -> tuple[TensorSignature, ...]:
    return output_signatures(method.exported, method.outputs, method.inputs)


def _invalid(exported: ExportedProgram) -> str | None:
    try:
        exported.graph.lint()
        exported.validate()
    except Exception as error:  # noqa: BLE001 (torch's verifiers raise many kinds; all mean "not valid")
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _port_problems(where: str, port: TensorSignature, value: object) -> Iterator[str]:
    if not isinstance(value, Tensor):
        yield f"{where} is {type(value).__name__}, expected a tensor"
        return
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != port.dtype:
        yield f"{where} is {dtype} in the graph and {port.dtype} in its signature"
    agrees = len(value.shape) == len(port.shape) and all(
        _fits(size, dim) for size, dim in zip(value.shape, port.shape, strict=True)
    )
    if not agrees:
        yield f"{where} has shape {list(value.shape)} in the graph and {list(port.shape)} in its signature"


def _fits(size: object, dim: Dim) -> bool:
    return size == dim if isinstance(size, int) else isinstance(dim, DynamicDim)


def _link_problems(program: Program) -> Iterator[str]:
    for name, method in program.methods.items():
        for port in method.inputs:
            for link in port.links:
                producer_name, _, output_name = link.partition(".")
                if not output_name:
                    continue
                producer = program.methods.get(producer_name)
                output = _output(producer, output_name) if producer else None
                if output is None:
                    yield f"{name}.{port.name} comes from {link}, which does not exist"
                else:
                    yield from _agreement_problems(f"{link} → {name}.{port.name}", output, port)


def _output(method: Method, name: str) -> TensorSignature | None:
    return next((port for port in method.outputs if port.name == name), None)


def _agreement_problems(where: str, produced: TensorSignature, consumed: TensorSignature) -> Iterator[str]:
    if produced.dtype != consumed.dtype:
        yield f"{where}: {produced.dtype} is produced, {consumed.dtype} is taken"
    if produced.shape[-1] != consumed.shape[-1]:
        yield f"{where}: last dimension {produced.shape[-1]} is produced, {consumed.shape[-1]} is taken"
    if len(produced.shape) > 1 and len(consumed.shape) > 1:
        longest, limit = _maximum(produced.shape[-2]), _maximum(consumed.shape[-2])
        if longest > limit and not _gives(produced.shape[-2], consumed.shape[-2]):
            yield f"{where}: up to {longest} rows are produced, at most {limit} are taken"
        both_dynamic = isinstance(produced.shape[-2], DynamicDim) and isinstance(consumed.shape[-2], DynamicDim)
        if both_dynamic and longest != limit:
            yield f"{where}: the dynamic ranges end at {longest} and {limit}"


def _gives(produced: Dim, consumed: Dim) -> bool:
    """True where a producer of any number of rows can be asked for the fixed number that is taken."""
    return isinstance(produced, DynamicDim) and isinstance(consumed, int) and produced.minimum <= consumed


def _maximum(dim: Dim) -> int:
    return dim if isinstance(dim, int) else dim.maximum


def _state_problems(program: Program) -> Iterator[str]:
    owners: dict[int, str] = {}
    for row in program.state.values():
        identity = storage_identity(row.initial)
        if identity in owners:
            yield f"state rows {owners[identity]} and {row.name} share one storage"
        owners[identity] = row.name
        if not row.readers:
            yield f"state row {row.name} is written and never read"
    for weight in program.weights.values():
        identity = storage_identity(weight.uses[0].tensor)
        if identity in owners:
            yield f"state row {owners[identity]} shares its storage with the weight {weight.key}"


def _metadata_problems(program: Program) -> Iterator[str]:
    metadata = program.metadata
    if not 1 <= metadata.max_context <= metadata.model_max_context:
        yield f"max_context is {metadata.max_context}, the model allows 1 to {metadata.model_max_context}"
    for eos in metadata.eos_ids:
        if not 0 <= eos < metadata.vocab_size:
            yield f"EOS id {eos} is outside the vocabulary of {metadata.vocab_size}"
    yield from _language_problems(program)
    for name, method in program.methods_with("encoder"):
        embeds = _output(method, "embeds")
        if metadata.image is not None and embeds is not None and embeds.shape[-2] != metadata.image.tokens:
            yield f"{name}: gives {embeds.shape[-2]} embeddings, the image settings say {metadata.image.tokens}"
    for row in program.state.values():
        if row.layout == "BSHD" and row.shape[1] > metadata.max_context:
            yield f"state row {row.name} has {row.shape[1]} slots for a context of {metadata.max_context}"


def _language_problems(program: Program) -> Iterator[str]:
    for kind in ("prefill", "prefill_first", "decode", "score"):
        for name, method in program.methods_with(kind):
            logits = _output(method, "logits")
            if logits is None and kind == "decode" and _output(method, CHOSEN_TOKEN) is not None:
                continue
            if logits is None or logits.shape[-1] != program.metadata.vocab_size:
                yield f"{name}: role {kind} needs an output 'logits' over {program.metadata.vocab_size} tokens"
    for name, method in program.methods_with("prefill_first"):
        if any(port.name == "start_pos" for port in method.inputs):
            yield f"{name}: role prefill_first begins at position 0, and the method takes a start_pos"
