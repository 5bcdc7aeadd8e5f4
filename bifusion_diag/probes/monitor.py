"""The Monitor: a step's life, from its batch to its row in the record."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bifusion_diag.errors import UserError
from bifusion_diag.probes.audience import Audience
from bifusion_diag.probes.base import Call, Probe, Reading, Recorder, Subject
from bifusion_diag.probes.catalogue import make_probes
from bifusion_diag.probes.hooks import Hooks
from bifusion_diag.probes.loss_terms import TOLD, LossTerms
from bifusion_diag.probes.modules import bare_model, measured_modules, plain_name
from bifusion_diag.probes.ranks import own_rank, world_size
from bifusion_diag.probes.rows import RowBlock, pack
from bifusion_diag.probes.scene import take_snapshot
from bifusion_diag.record import (
    ModuleInfo,
    RunHeader,
    RunWriter,
    Snapshot,
    TensorBoardSink,
    collect_environment,
    record_folder,
)
from bifusion_diag.record.reader import HEADER_FILE


class Monitor:
    """Measures a model while it trains. It changes no value, no gradient and no random number::

        with Monitor(model, optimizer, probes="all", out="runs/mine") as monitor:
            for batch in loader:
                with monitor.step(batch):
                    losses = model(batch)
                    sum(losses.values()).backward()
                    optimizer.step()

    The order of events, to which a test holds this class::

        with Monitor(...) as monitor:                      # attach: every module gets a hook
            for batch in loader:
                with monitor.step(batch):                  # begin: probes that are due forget the last step
                                                           # batch: they see the batch
                    losses = model(batch)                  # seen: at the end of each module's forward
                    loss.backward()                        # gradient: as it arrives at each output
                                                           # ended: parameter gradients, still unclipped
                    clip_grad_norm_(...)
                    optimizer.step()                       # before: the weights as they were
                                                           # after: and as they are
                                                           # collect: the block's end
                monitor.log("eval/miou", 0.5)              # log: joins the row of the step; also inside the block
                                                           # close: the row is complete; by the next step() too
                                                           # write: a full block goes to the writer
                                                           # and by leaving; what remains is written, hooks removed

    An exception inside the step block leaves that step without a row; all earlier rows are written. Forwards outside a
    step block, such as evaluation, are not measured. What activation checkpointing runs again is not counted again.
    Several forwards and backwards in a step are a step of gradient accumulation. What torch.compile has compiled before
    the Monitor opens is measured at its boundary; compile no module while it is open, as nothing is measured in it.

    A probe that raises is switched off with a warning and an event in the record, and training goes on. What it raises
    when the Monitor opens is raised, and so is a UserError of the first step.

    Where several processes train (torchrun), each opens a Monitor with the same arguments: rank 0 writes `out`, rank 1
    ``<stem>.rank1.record/`` beside its record, and so on. Nothing is sent between them but for parameters that are
    sharded (FSDP2): then every rank must open one, and measure the same steps.

    Args:
        model: any module; DistributedDataParallel may be around it, fully_shard may have been applied to it.
        optimizer: one or several, also as Accelerate has prepared them; without, what happens to weights in an update
            is not measured.
        probes: names of the catalogue, "all", or probes.
        out: folder of the record, or a path that ends in .json: it is written there as `bifusion-diag train` does.
        scaler: the GradScaler of mixed precision; gradients are unscaled before they are measured.
        settings: of the run, for the record: two runs are compared by them too.
        first_step: number of the first step block. After 0, the record that is at `out` goes on there; from 0 it is
            replaced.
        writer: where rows go instead of `out`; its owner finishes it. With neither, only the latest row is kept.
        block: rows a block. One copy from the device to the host is made for each block.
        recorder: judges every step before its update and takes a bad one apart: a
            :class:`~bifusion_diag.replay.FlightRecorder`.

    Raises:
        UserError: unknown probe, two probes of one name, a DataParallel model, no model, no optimiser, or a place that
            cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        probes: Sequence[str | Probe] = "all",
        out: Path | str | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        settings: Mapping[str, Any] | None = None,
        first_step: int = 0,
        writer: RunWriter | None = None,
        block: int = 32,
        recorder: Recorder | None = None,
    ) -> None:
        assert out is None or writer is None, "give out or writer, not both"
        self.model = bare_model(model)
        self.probes = make_probes(probes)
        self.optimizers = _optimizers(optimizer)
        self._scaler = scaler
        self._out = None if out is None else Path(out)
        self._settings = dict(settings or {})
        self._own_writer = out is not None
        self._writer = writer
        self._block = block
        self._rows = RowBlock(writer, block)
        self._recorder = recorder
        watching = self.probes if recorder is None else [*self.probes, recorder.sentinel]
        self._audience = Audience(watching, self._failed)
        self._hooks = Hooks(self._audience, None if recorder is None else recorder.before_update)
        self._trainable: dict[str, list[Tensor]] = {}  # module name → its own that learnt when the Monitor opened
        self._next = first_step
        self._number: int | None = None  # of the step that is or was measured last
        self._measuring = False
        self._open_step: int | None = None
        self._readings: list[Reading] = []
        self._logs: dict[str, float | Tensor] = {}
        self._choices: dict[str, str] = {}  # what a probe has said of itself

    def __enter__(self) -> Monitor:
        assert not self._hooks.attached, "this Monitor is already open"
        modules = measured_modules(self.model)
        subject = Subject(
            self.model, modules, self.optimizers, self._inverse_scale, self._hooks.paused, self._audience.probes
        )
        for path, module in self.model.named_modules():
            name = plain_name(path)
            self._trainable[name] = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        for probe in self._audience.probes:
            probe.attach(subject)
        self._hooks.attach(subject)
        if self._out is not None:
            try:
                self._writer = self._make_writer(self._out)
            except BaseException:
                self._hooks.remove()
                raise
            self._rows = RowBlock(self._writer, self._block)
        if self._recorder is not None:
            folder = (
                None if self._writer is None else self._writer.path.with_name(f"{self._writer.path.stem}.incidents")
            )
            self._recorder.open(self.model, self.optimizers, self._scaler, self._hooks.paused, folder, self._incident)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.remove()
        try:
            self.end_step()
            self._rows.flush()
        finally:
            if self._own_writer and self._writer is not None:
                self._writer.__exit__(kind, error, trace)

    def _make_writer(self, out: Path) -> RunWriter:
        path = out if out.suffix == ".json" else out / "run.json"
        header = RunHeader(
            name=out.stem if path is out else out.absolute().name,
            settings=self._settings,
            environment=collect_environment() | {"threads": torch.get_num_threads()},
            provenance=self._provenance(),
            parameters=self._part_sizes(),
            probes=[probe.name for probe in self.probes],
        )
        rank = own_rank()
        tensorboard = TensorBoardSink(path.with_name(f"{path.stem}.tensorboard")) if rank == 0 else None
        goes_on = self._next > 0 and (record_folder(path, rank) / HEADER_FILE).is_file()
        resume_at = self._next if goes_on else None
        return RunWriter(path, header, resume_at=resume_at, tensorboard=tensorboard, rank=rank, ranks=world_size())

    def _provenance(self) -> dict[str, Any]:
        """What rules ask for: the recorder's policy, and whether several optimisers may pull against each other."""
        found: dict[str, Any] = {} if self._recorder is None else {"flight_recorder": self._recorder.policy}
        return found | ({"optimizers": len(self.optimizers)} if len(self.optimizers) > 1 else {})

    def _part_sizes(self) -> dict[str, dict[str, int]]:
        """Parameters of the model's children: all, and those that learn."""
        sizes: dict[str, dict[str, int]] = {}
        for name, part in self.model.named_children():
            own = list(part.parameters())
            sizes[plain_name(name)] = {"total": _size(own), "trainable": _size(p for p in own if p.requires_grad)}
        return sizes

    def _failed(self, probe: Probe, message: str) -> None:
        """A probe has raised and is off from here on."""
        if self._writer is not None:
            self._writer.event(self._number, "probe", message, probe=probe.name)
        warnings.warn(f"step {self._number}: {message}. Training goes on.", RuntimeWarning, stacklevel=2)

    def _incident(self, step: int, kind: str, message: str, facts: dict[str, Any]) -> None:
        """The recorder has taken a bad step apart."""
        if self._writer is not None:
            self._writer.event(step, kind, message, **facts)
        else:
            warnings.warn(f"step {step}: {message}", RuntimeWarning, stacklevel=2)

    def _inverse_scale(self) -> Tensor | None:
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        scale = self._scaler._scale  # get_scale() would wait for the device
        return None if scale is None else scale.detach().double().reciprocal()

    @contextmanager
    def step(self, batch: Any = None, *, step: int | None = None) -> Iterator[None]:
        """Measure the step inside: forward, backward, and the update of the weights.

        Args:
            batch: shown to the probes that look at data.
            step: its number. None: one more than the last.
        """
        assert self._hooks.attached, "open the Monitor first: with Monitor(...) as monitor"
        assert not self._measuring, "a step block inside a step block"
        self.end_step()
        number = self._next if step is None else step
        self._next = number + 1
        self._number = number
        due = self._audience.due(number)
        if self._recorder is not None:
            self._recorder.begin(number, batch)
        self._audience.tell(due, "begin")
        if batch is not None:
            self._audience.tell(due, "batch", batch)
        self._measuring = True
        self._hooks.begin(due)
        try:
            yield
            self._hooks.end()
            if self._recorder is not None:
                self._recorder.end()
        except BaseException as error:
            if getattr(error, "keeps_row", False):  # the recorder has stopped the run, and the step is measured
                self._hooks.end()
                self._collect(number, due)
                raise
            self._hooks.abandon()
            if self._recorder is not None:
                self._recorder.failed(error)
            self._logs = {}
            raise
        finally:
            self._measuring = False
        self._collect(number, due)

    def _collect(self, number: int, due: tuple[Probe, ...]) -> None:
        """The step was measured: its row is open until the next step begins."""
        self._measuring = False
        self._readings = self._audience.collect(due)
        self._open_step = number
        self._note_choices(due)
        self._end_first_step()

    def _note_choices(self, due: Sequence[Probe]) -> None:
        for probe in due:
            text = probe.describe()
            if text is not None and text != self._choices.get(probe.name):
                self._choices[probe.name] = text
                if self._writer is not None:
                    self._writer.event(self._number, "note", text, probe=probe.name)

    def _end_first_step(self) -> None:
        if self._hooks.looks_for_order and self._hooks.order:
            self._hooks.remove_order()
            if self._writer is not None:
                self._writer.set_modules(self.module_table())

    def losses(
        self,
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float | Tensor] | None = None,
        total: Tensor | None = None,
    ) -> None:
        """Tell the step's loss terms, where no module of the model returns them. Call it before backward(). From then
        on what is told counts, and nothing that a module returns.

        Args:
            terms: () raw terms by name.
            weights: of each term. None: 1.
            total: () what is differentiated. None: the sum of weight × term.

        Raises:
            UserError: no step block is open; a term, a weight or the total has more than one element; a weight is of no
                term.
        """
        if not self._measuring:
            raise UserError("losses(...): no step block is open. Call it inside `with monitor.step(batch)`.")
        self._hooks.tell(Call(TOLD, self.model, (), {}, LossTerms.of(terms, weights, total)))

    def log(self, name: str, value: float | Tensor) -> None:
        """Add a number of the training loop to the row of the step under way, or of the one that has just ended.

        Args:
            name: series name, such as "train/lr".
            value: a number, or a tensor of one element, which is not copied from the device here.

        Raises:
            UserError: there is no such step: before the first, or after end_step().
        """
        if self._open_step is None and not self._measuring:
            raise UserError(f"log({name!r}): no step is open. Call it in a step block or after it, before end_step().")
        self._logs[name] = value

    def snapshot(
        self,
        forward: Callable[[], Any],
        xyz: Tensor | ArrayLike,
        images: Tensor | ArrayLike,
        *,
        name: str = "scene",
        moment: str = "",
        intrinsics: Tensor | ArrayLike | None = None,
        pose: Tensor | ArrayLike | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> Snapshot | None:
        """Record α on a scene as the model weighs it now, for the report's picture of it::

            monitor.snapshot(lambda: model(batch), batch["points"], batch["images"], pose=batch["pose"])

        Call it between steps, of the same scene each time; of more than three a run keeps the first two and the last.
        The forward runs in evaluation mode, and modes, buffers and torch's random numbers are afterwards as they were.

        Args:
            forward: runs the model on that one scene. The first module whose output has `uv` (N, V, 2) [px] and `valid`
                (N,), and the first whose output has `alpha` (N,) or (N, 1), are read; `view` (N,) and `inside` (N, V)
                beside `uv` too, where they are there.
            xyz: (N, 3) the points in world coordinates [m].
            images: (V, 3, H, W) uint8, in whose pixels uv counts.
            name: of the scene.
            moment: which moment this is; a later snapshot of the same moment replaces it. "": none replaces it.
            intrinsics: (V, 3, 3) [px].
            pose: (V, 4, 4) camera-to-world [m]; with it the points are shown from above, as seen from the first camera.
            provenance: what the scene is: "split", "kind", "labels", "flaws".

        Returns:
            The snapshot; None on a rank other than 0.

        Raises:
            UserError: a step block is open, or the forward has not returned what is needed.
        """
        if self._measuring:
            raise UserError("snapshot(...): a step block is open. Call it between two steps.")
        if own_rank():
            return None
        snapshot = take_snapshot(
            self.model,
            forward,
            xyz,
            images,
            done=self._next,
            name=name,
            moment=moment,
            intrinsics=intrinsics,
            pose=pose,
            provenance=provenance,
        )
        if self._writer is not None:
            self._writer.snapshot(snapshot)
        return snapshot

    def end_step(self) -> None:
        """Close the row of the step that was measured. Does nothing where none is open."""
        if self._open_step is not None:
            row = pack(self._open_step, self._readings, self._audience.loop_numbers | self._logs)
            self._open_step, self._readings, self._logs = None, [], {}
            self._rows.add(row)

    def flush(self) -> None:
        """Hand all complete rows to the writer now, as before a checkpoint or before reading the record."""
        self._rows.flush()

    def latest(self) -> dict[str, float | None]:
        """The scalars of the last complete row, None where missing. Waits for the device: for a live display."""
        return self._rows.latest()

    def module_table(self) -> list[ModuleInfo]:
        """The model's modules: first those executed, in order of their first forward, then the others.

        Trainable is what required a gradient when the Monitor opened, before training stages froze any of it.
        A module's part is the longest key of the record's `parameters` that its name begins with, else the first
        component of its name.
        """
        parts = sorted(self._writer.header.parameters, key=len, reverse=True) if self._writer is not None else []
        order, table = self._hooks.order, list[ModuleInfo]()
        modules = list({plain_name(path): module for path, module in self.model.named_modules()}.items())
        last = len(modules)
        modules.sort(key=lambda item: order.get(item[0], last))  # stable: the others keep their order
        for rank, (name, module) in enumerate(modules):
            own = [p for p in module._parameters.values() if p is not None]
            part = next((p for p in parts if name == p or name.startswith(p + ".")), name.split(".")[0])
            total, trainable = _size(own), _size(self._trainable.get(name, []))
            table.append(ModuleInfo(name, type(module).__name__, rank, part, total, trainable))
        return table


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> tuple[Optimizer, ...]:
    if given is None:
        return ()
    if isinstance(given, Optimizer) or not isinstance(given, Iterable):
        return (_that_steps(given),)
    return tuple(map(_that_steps, given))


def _that_steps(optimizer: Any) -> Optimizer:
    """An optimiser that takes hooks: Accelerate's takes none, and holds one that does."""
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            kind = type(optimizer).__name__
            raise UserError(f"a {kind} was given as the optimizer; give a torch.optim.Optimizer, or several of them")
    assert isinstance(inner, Optimizer)
    return inner


def _size(parameters: Iterable[Tensor]) -> int:
    """Elements of parameters; a lazy one has none before its first forward."""
    return sum(p.numel() for p in parameters if not is_lazy(p))
