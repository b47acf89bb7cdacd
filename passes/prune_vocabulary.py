"""``prune-vocabulary``: tokens that are not kept leave the embedding table and the projection to the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from triptych.compiler.capture import output_signatures
from triptych.compiler.derived_weights import DerivedWeights
from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import Metadata
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Method, Program
from triptych.errors import PipelineError
from triptych.manifest import token_ids, token_text

aten = torch.ops.aten
LOGITS_KINDS: Final = ("prefill", "prefill_first", "decode", "score")
VIEWS: Final = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default)
DEQUANTIZE: Final = "torchao.dequantize_affine.default"
"""By name: a program read from disk may call it where torchao was never imported."""
ROW_CHOICES: Final = (aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.unsqueeze.default)


@dataclass(frozen=True)
class PruneVocabulary(ProgramPass):
    """Keep the rows of some tokens; ids stay what they are outside.

    1. The ids in the file `keep` stay (numbers and ranges such as ``0-255``, between white space or commas), or the
       `top` lowest ids, which in vocabularies made by merging are the most frequent. BOS, EOS, the tokens for and
       around images, and those added to the tokenizer (a chat template's) always stay.
    2. Every ``embedding`` of tokens reads a table of the kept rows, at rows that a table of int32 [V] gives. A token
       that was not kept has no row: the runtime refuses a prompt that has one.
    3. The ``linear`` behind ``logits`` gives those of the kept tokens. The others get the least finite number, so the
       output is [1, V] as before, and no sampler can draw them.
    4. Tied tables stay one. Of quantized ones the integers are sliced with their scales and zero points.

    Everything or nothing: where a table or a projection cannot be sliced, the pass leaves the program alone.
    """

    name: ClassVar[str] = "prune-vocabulary"
    indivisible: ClassVar[bool] = True
    after: ClassVar[frozenset[str]] = frozenset({"last-token-logits"})
    before: ClassVar[frozenset[str]] = frozenset({"greedy-token"})

    keep: str | None = None
    top: int | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.top is None):
            raise PipelineError("prune-vocabulary needs keep=FILE or top=N, and not both")
        if self.top is not None and self.top < 1:
            raise PipelineError(f"prune-vocabulary: top is {self.top}; expected at least 1")
        # Read now, so that a wrong file fails before any work, and so that its ids are a part of the pass.
        object.__setattr__(self, "_listed", _read(Path(self.keep)) if self.keep is not None else None)

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Slice every table and projection; raises `PipelineError` for ids outside the vocabulary."""
        metadata = program.metadata
        kept = self._kept(metadata)
        if metadata.kept_tokens is not None or len(kept) == metadata.vocab_size:
            reason = "it was pruned before" if metadata.kept_tokens is not None else "every token is to be kept"
            log.refused("the program", reason)
            return program
        derived = DerivedWeights(program.state)
        edits = [
            _Edit(name, method, GraphEditor(method.exported, self.name, derived), metadata.vocab_size)
            for name, method in program.methods.items()
        ]
        refusals = [(place, reason) for edit in edits for place, reason in edit.refusals()]
        for place, reason in refusals:
            log.refused(place, reason)
        if refusals:
            return program
        chosen = [log.match(place) for edit in edits for place in edit.places]
        if not all(chosen):
            return program
        rows = torch.full((metadata.vocab_size,), len(kept), dtype=torch.int32)
        rows[kept] = torch.arange(len(kept), dtype=torch.int32)
        methods = {edit.name: edit.applied(torch.tensor(kept), rows) for edit in edits}
        return Program.build(methods, dataclasses.replace(metadata, kept_tokens=token_text(kept)))

    def _kept(self, metadata: Metadata) -> list[int]:
        listed: list[int] | None = vars(self)["_listed"]
        chosen = range(min(self.top or 0, metadata.vocab_size)) if listed is None else listed
        outside = [one for one in chosen if not 0 <= one < metadata.vocab_size]
        if outside:
            raise PipelineError(
                f"prune-vocabulary: {self.keep} lists token {outside[0]}; the vocabulary has 0 to "
                f"{metadata.vocab_size - 1}"
            )
        special = {*metadata.special_ids, *metadata.eos_ids}
        special |= {metadata.bos_id} if metadata.bos_id is not None else set()
        if metadata.image is not None:
            special |= {metadata.image.token_id, *metadata.image.prefix, *metadata.image.suffix}
        return sorted({*chosen, *(one for one in special if one < metadata.vocab_size)})


def _read(path: Path) -> list[int]:
    try:
        return token_ids(",".join(path.read_text(encoding="utf-8").replace(",", " ").split()))
    except OSError as error:
        raise PipelineError(
            f"prune-vocabulary: {path} cannot be read ({error.strerror}); give a file of ids"
        ) from error
    except ValueError as error:
        raise PipelineError(
            f"prune-vocabulary: {path} is no list of token ids ({error}); expected numbers and ranges such as 0-255"
        ) from error


class _Edit:
    """One method: where its tokens become rows and its rows logits, and what is done there."""

    def __init__(self, name: str, method: Method, editor: GraphEditor, vocab_size: int) -> None:
        self.name = name
        self._method = method
        self._editor = editor
        self._size = vocab_size
        self._lookups = [node for node in editor.graph.nodes if self._is_lookup(node)]
        names = [port.name for port in method.outputs]
        gives_logits = "logits" in names and any(role.kind in LOGITS_KINDS for role in method.roles)
        self._index = names.index("logits") if gives_logits else None
        self._projection = None if self._index is None else _projection(editor.user_outputs[self._index])

    @property
    def places(self) -> list[Node]:
        """The nodes that will be changed."""
        return [*self._lookups, *([self._projection] if isinstance(self._projection, Node) else [])]

    def refusals(self) -> Iterator[tuple[Node, str]]:
        """Yield the places that cannot be changed, and why."""
        for node in self._lookups:
            if _source(_arguments(node)["indices"]) not in self._token_inputs():
                yield node, "its indices are computed from tokens, and what they become is not known"
            reason = self._unsliceable(_table_of(node))
            if reason is not None:
                yield node, reason
        if isinstance(self._projection, str):
            assert self._index is not None
            yield self._editor.user_outputs[self._index], self._projection
        elif self._projection is not None:
            tables = [one for one in self._projection.args[1:] if isinstance(one, Node)]
            reason = next(filter(None, map(self._unsliceable, tables)), None)
            if reason is not None:
                yield self._projection, reason

    def _token_inputs(self) -> list[Node]:
        names = [port.name for port in self._method.inputs if "tokens" in (port.name, *port.links)]
        return [self._editor.input(name) for name in names]

    def _is_lookup(self, node: Node) -> bool:
        """True for rows of a table as long as the vocabulary that depend on tokens."""
        if node.target not in (aten.embedding.default, torch.ops.triptych.quantized_embedding.default):
            return False
        table = _table_of(node).meta["val"]
        return bool(table.shape[0] == self._size) and _depends_on(_arguments(node)["indices"], self._token_inputs())

    def _unsliceable(self, table: Node) -> str | None:
        """Say why rows cannot be taken out of `table`, or None."""
        if table.meta["val"].shape[0] != self._size:
            return f"{table.name} has {table.meta['val'].shape[0]} rows for a vocabulary of {self._size}"
        if self._editor.is_weight(table):
            return None
        if str(table.target) != DEQUANTIZE:
            return f"its table is computed by {table.target}; rows can be taken out of weights alone"
        if table.args[1][0] != 1:  # type: ignore[index]
            return f"its table is quantized in blocks of {table.args[1]}, which rows cannot be taken out of"
        stored = [one for one in table.all_input_nodes if not self._editor.is_weight(one)]
        return f"its table is quantized with {stored[0].name}, which is no weight" if stored else None

    def applied(self, kept: Tensor, rows: Tensor) -> Method:
        """Return the method over the `kept` ids [K]; `rows` [V] gives the row of each id, K where it has none."""
        if not self.places:
            return self._method
        editor = self._editor
        row_table = editor.add_weight("kept_rows", rows)
        for node in self._lookups:
            self._slice(node, kept)
            indices = _arguments(node)["indices"]
            with editor.graph.inserting_before(node):
                known = editor.call(aten.index.Tensor, row_table, [indices], like=node)
                wide = editor.call(aten.to.dtype, known, torch.int64, like=node)
            node.replace_input_with(indices, wide)
            if node.target is aten.embedding.default:
                node.args = node.args[:2]  # a padding index, which only gradients see, would be another row now
        if isinstance(self._projection, Node):
            assert self._index is not None
            self._slice(self._projection, kept)
            logits = editor.user_outputs[self._index]
            traced = editor.trace(_in_place_of_all, (logits, row_table), {})
            with editor.graph.inserting_before(editor.graph.output_node()):
                whole = editor.paste(traced, like=logits)
            editor.replace_user_output(self._index, whole)
        exported = editor.finish()
        outputs = output_signatures(exported, self._method.outputs, self._method.inputs)
        return dataclasses.replace(self._method, exported=exported, outputs=outputs)

    def _slice(self, node: Node, kept: Tensor) -> None:
        """Give a lookup or a projection tables of the kept rows."""
        editor = self._editor
        given = _arguments(node)
        tables = [given.get(name) for name in ("weight", "bias", "scales")]
        for table in [one for one in tables if isinstance(one, Node)]:
            if editor.is_weight(table):
                node.replace_input_with(table, self._kept_rows(table, kept))
            elif isinstance(table.target, torch._ops.OpOverload) and str(table.target) == DEQUANTIZE:
                stored = [self._kept_rows(one, kept) if isinstance(one, Node) else one for one in table.args]
                with editor.graph.inserting_before(node):
                    node.replace_input_with(table, editor.call(table.target, *stored, like=table, **table.kwargs))
        editor.refresh(node)
        editor.refresh_after(node)

    def _kept_rows(self, weight: Node, kept: Tensor) -> Node:
        name = f"{self._editor.tensor_name(weight)}.kept"
        return self._editor.derive_weight(name, [weight], lambda table: table.index_select(0, kept), str(kept.tolist()))


def _in_place_of_all(logits: Tensor, rows: Tensor) -> Tensor:
    """Spread the logits of kept tokens over the whole vocabulary; the others get the least number there is."""
    return F.pad(logits, (0, 1), value=torch.finfo(logits.dtype).min).index_select(logits.dim() - 1, rows)


def _projection(logits: Node) -> Node | str:
    """Return the `linear` whose results reach `logits`, each by itself, or why there is none."""
    node = logits
    while node.target is not aten.linear.default:
        inputs = node.all_input_nodes
        is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        keeps = is_pointwise or node.target in (aten.to.dtype, aten.alias.default, aten.contiguous.default)
        if node.target in ROW_CHOICES:
            keeps = not _is_last_axis(node)
        if not keeps or len(inputs) != 1:
            return f"{node.name} ({node.target}) stands behind the projection; only what treats each logit alike may"
        (node,) = inputs
        if len(node.users) > 1:
            return f"{node.name}, before the logits, is used elsewhere too"
    return node


def _is_last_axis(node: Node) -> bool:
    """True where a choice of rows touches the axis of the vocabulary."""
    axis = _arguments(node).get("dim", 0)
    before = node.all_input_nodes[0].meta["val"].dim()
    return bool(
        axis % (before + (node.target is aten.unsqueeze.default))
        == before - (node.target is not aten.unsqueeze.default)
    )


def _arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a call by their names in the operator's schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [one.name for one in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _table_of(lookup: Node) -> Node:
    table: Node = _arguments(lookup)["weight"]
    return table


def _source(node: Node) -> Node:
    """Return what `node` is a view or a cast of."""
    while node.target in (*VIEWS, aten.to.dtype):
        node = node.all_input_nodes[0]
    return node


def _depends_on(node: Node, sources: list[Node]) -> bool:
    seen: set[Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one in sources:
            return True
        if one not in seen:
            seen.add(one)
            pending += one.all_input_nodes
    return False
