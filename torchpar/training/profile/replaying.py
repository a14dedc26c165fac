# SPDX-License-Identifier: MIT
"""`replay`: record a few steps of any training loop, and write the page that plays them."""

import linecache
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchpar.data import samples
from torchpar.decorating import context_manager
from torchpar.errors import ConfigError, check_writable
from torchpar.ops import environment
from torchpar.training import fused
from torchpar.training.profile.marks import Boxes
from torchpar.training.profile.messages import MessageWatch, Sent
from torchpar.training.profile.phases import Phases
from torchpar.training.profile.record import WARM_UP
from torchpar.training.profile.recorded_ranks import (
    Explained,
    Key,
    RankSteps,
    RecordedStep,
)
from torchpar.training.profile.replay_trace import check_name, recording, write
from torchpar.training.profile.step_memory import Memory, dense_parts

if TYPE_CHECKING:
    from torchpar.parallel.launch.world import World

STEPS = 3  # that are recorded; as many steps without records are timed beside them
TOO_FEW = f"nothing was recorded, no more than {WARM_UP + 2} steps were trained; train more"
AROUND = 8  # lines to show on each side of one that a box names
PINGS = 32  # messages there and back, of which the fastest one compares the clocks of two ranks
# Files that are no lines of the program: these packages' and Python's own.
_OTHERS = *(sys.modules[name].__path__[0] for name in ("torch", "torchpar")), "<"
_PYTHON = sysconfig.get_path("stdlib")
# What each backward pass calls, also in exact arithmetic, which copies `torch.autograd.backward`.
_ENGINE = "_engine_run_backward"

# What a layer computes, by the name of its class.
_OF_INPUT = "dL/dx = dL/dz·W, "
_OF_WEIGHTS = "dL/dW = (dL/dz)ᵀ·x, dL/db = Σ dL/dz over the samples"
_FORWARD = {
    "Linear": "y = z = x·Wᵀ + b",
    "LinearSigmoid": "y = σ(z), z = x·Wᵀ + b",
    "LinearReLU": "y = max(z, 0), z = x·Wᵀ + b",
    "LinearTanh": "y = tanh(z), z = x·Wᵀ + b",
    "LinearMaxout": "y = max(z₁, z₂), z = x·Wᵀ + b",
    "ColumnParallelLinear": "y_r = act(z_r), z_r = x·W_rᵀ + b_r, by the rows W_r of this rank",
    "RowParallelLinear": "y = act(z), z = Σ_r x_r·W_rᵀ + b: the ranks' products are added",
}


class _Marked(partial[Any]):
    """A module's forward function, with marks. Copies of the module have the function without them.

    A copy whose function were this one would compute with the weights of the recorded module.
    """

    module: torch.nn.Module
    forward: Callable[..., Any]

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.forward, _Marked):
            return self.forward.__reduce__()
        if isinstance(self.forward, MethodType) and self.forward.__self__ is self.module:
            return getattr, (self.module, "forward")
        return partial, (self.forward,)


class Replay:
    """Record a few steps of a training on this rank.

    After `record.WARM_UP` steps, one step is looked at closely: shapes, names of tensors, lines,
    bytes. Its times do not count. Then steps with records and steps without take turns, so that
    the page can compare them. A step lasts from the making of its batch until the optimizer
    has stepped; without `torchpar.data`'s batches it begins where the step before it ended.

    A layer is a module without modules in it, or with parameters of its own. It begins where the
    layer before it has ended. Its forward pass ends where its function returns, and its backward
    pass where the gradient of its last parameter is there; so a layer without parameters counts as
    part of the next one in the backward pass, and the gradient of the loss as part of the last
    layer. Passes of the model under `torch.no_grad` are left out, and so are layers of compiled
    code: where no layer of a pass is seen, the pass is one box. PyTorch refuses to compute
    gradients by `torch.func` while activations are counted, so loops with it cannot be recorded.

    On a CPU times are the clock's, and on a GPU those of CUDA events of the current stream.
    Messages are noticed where PyTorch dispatches them, and nothing waits for them.

    Args:
        model: this rank's part of the model.
        optimizer: over its parameters; its step ends a step of the training.
        world: its mesh names the dimensions of messages. Without it all ranks are on "dp".
        steps: how many to record.

    Raises:
        ConfigError: on entry, another recording is active in this process.
    """

    _recording: ClassVar["Replay | None"] = None

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        world: "World | None" = None,
        steps: int = STEPS,
    ):
        self._model, self._optimizer, self._world = model, optimizer, world
        self._layers = [(n, m) for n, m in model.named_modules() if _is_layer(m)]
        first = next(model.parameters(), None)
        self._device = first.device if first is not None else torch.device("cpu")
        self._memory = Memory(model, optimizer)
        self._watch = MessageWatch(self._now, self._message, self._wait, world)
        self._schedule = WARM_UP + 1 + 2 * steps
        self._taken = 0
        # What is active within the context, until the last recorded step, and within a step.
        self._active, self._watching, self._hooks = ExitStack(), ExitStack(), ExitStack()
        self._is_close = False  # in the step that is looked at closely
        self._is_within = False  # the model's forward pass
        self._has_batch = False  # in this step
        self._running = ""  # what runs, in words
        self._line = ""  # of the present backward pass
        self._texts: dict[int, str] = {}  # on the backward passes of layers
        self._marks: list[tuple[str, Any, Any]] = []  # of `Mark`s, which take longer to make
        self._sent: list[Sent] = []
        self._explained: dict[Key, Explained] = {}
        self._places: dict[int, str] = {}  # names of tensors by their addresses
        self._inputs: list[Tensor] = []
        self._counts: Counter[tuple[str, Any]] = Counter()
        self._began = time.perf_counter()
        self._base: Any = None
        self._steps: list[RecordedStep] = []
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    # The clock

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _resolved(self, mark: Any) -> float:
        if isinstance(mark, float):
            return mark
        zero, event = self._base
        return float(zero + event.elapsed_time(mark) / 1e3)

    # What begins and ends

    def __enter__(self) -> Self:
        if Replay._recording is not None:
            raise ConfigError("replay: another recording is active, expected one at a time; end it")
        with ExitStack() as undo:
            undo.push(self.__exit__)  # if this fails half-way
            self._enter()
            undo.pop_all()
        return self

    def _enter(self) -> None:
        self._active.callback(setattr, Replay, "_recording", None)
        Replay._recording = self
        if dist.is_initialized():
            self._watching.enter_context(self._watch)
        for kind in ("pre", "post"):
            register = getattr(self._optimizer, f"register_step_{kind}_hook")
            hook = self._optimizer_begins if kind == "pre" else self._optimizer_ended
            self._active.callback(register(hook).remove)
        self._watching.callback(setattr, samples, "watch", samples.watch)
        samples.watch = self._batch
        self._begin_step()

    def __exit__(self, *error: object) -> None:
        with self._active, self._watching, self._hooks:  # each ends, also after another's error
            pass

    @property
    def _is_recorded(self) -> bool:
        return WARM_UP <= self._taken < self._schedule and (self._taken - WARM_UP) % 2 == 0

    def _batch(self, began: float) -> None:
        if not torch.is_grad_enabled():
            return
        if self._has_batch:  # the step adds up the gradients of several
            self._mark("begin", None, began)
        else:
            self._clear()
            self._began, self._has_batch = began, True
        if self._is_close:
            self._explain("batch", None, "", "")
        self._mark("batch", None, time.perf_counter())

    def _begin_step(self) -> None:
        self._clear()
        self._has_batch = False
        self._watch.is_on = self._is_recorded
        if self._is_recorded:
            self._attach()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._base = time.perf_counter(), self._now()
        self._began = time.perf_counter()  # without what attaching takes

    def _clear(self) -> None:
        self._marks.clear()
        self._sent.clear()
        self._counts.clear()
        self._watch.new_step()

    def _attach(self) -> None:
        self._is_close = self._taken == WARM_UP
        for i, (_, module) in enumerate(self._layers):
            self._follow(i, module)
        self._follow_model()
        hooks = self._hooks.callback
        watched: list[tuple[Any, str, Any]] = [
            (torch.autograd, _ENGINE, self._backward(getattr(torch.autograd, _ENGINE))),
            (fused, "watch", self._by_hand),
        ]
        if Phases.active is None:  # it measures the phase "backward" of `FusedGradients`, too
            watched.append((Phases, "active", self))
        for where, name, ours in watched:
            hooks(_restore, where, name, ours, getattr(where, name))
            setattr(where, name, ours)
        if self._is_close:
            self._hooks.enter_context(self._memory.measure())

    def _end_step(self) -> None:
        end = self._now()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        was_recorded = self._is_recorded
        self._hooks.close()
        if self._taken > WARM_UP:
            self._seconds[was_recorded].append(self._resolved(end) - self._began)
        if was_recorded and not self._is_close:
            names = [self._name(i) for i in range(len(self._layers))]
            boxes = Boxes(names, self._explained, self._resolved, self._is_last_stage())
            stop = self._resolved(end)
            self._steps.append(boxes.step(self._began, stop, self._marks, self._sent))
        self._is_close = False
        self._places.clear()
        self._inputs.clear()
        self._taken += 1
        self._watch.is_on = False

    def _is_last_stage(self) -> bool:
        names = self._world.mesh.mesh_dim_names or () if self._world is not None else ()
        if self._world is None or "pp" not in names:
            return False
        stages = self._world.mesh["pp"]
        return stages.size() > 1 and stages.get_local_rank() == stages.size() - 1

    # Marks, in the order of their times

    def _mark(self, kind: str, what: Any, when: Any = None) -> None:
        self._marks.append((kind, what, self._now() if when is None else when))

    def _follow_model(self) -> None:
        """Mark where the model's forward pass begins and ends."""
        forward = self._model.forward

        def marked(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if self._is_close:
                self._explain("begin", None, "", "")
                self._inputs += [t for t in args if isinstance(t, Tensor)]
            self._mark("begin", None)
            self._is_within = True
            try:
                output = forward(*args, **kwargs)
            finally:
                self._is_within = False
            self._mark("ended", None)
            return output

        self._replace_forward(self._model, marked)

    def _replace_forward(self, module: torch.nn.Module, by: Callable[..., Any]) -> None:
        forward, own = module.forward, "forward" in vars(module)
        marked = _Marked(by)
        marked.module, marked.forward = module, forward
        module.forward = marked
        if own:
            self._hooks.callback(setattr, module, "forward", forward)
        else:
            self._hooks.callback(delattr, module, "forward")

    def _follow(self, i: int, module: torch.nn.Module) -> None:
        """Mark the ends of a layer's passes, its backward pass by the gradient of a parameter."""
        # PyTorch calls a hook of the forward pass by a slower path, which takes as long as all of
        # this.
        forward = module.forward
        mark, now, is_close = self._marks.append, self._now, self._is_close

        def marked(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # marks would break its graph
                return forward(*args, **kwargs)
            if is_close:
                self._running = self._name(i)
            output = forward(*args, **kwargs)
            # A model may compute a part of it under `torch.no_grad`.
            if self._is_within or torch.is_grad_enabled():
                if is_close:
                    self._running = ""
                    self._explain_layer(i, module, args, output)
                mark(("forward", i, now()))
            return output

        def accumulated(_: Tensor) -> None:
            if is_close:
                self._explain("backward", i, self._texts.get(i, ""), self._line)
            mark(("backward", i, now()))

        self._replace_forward(module, marked)
        trained = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if trained:
            hook = trained[-1].register_post_accumulate_grad_hook(accumulated)
            self._hooks.callback(hook.remove)

    def _backward(self, engine: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*args: Any, **kwargs: Any) -> Any:
            with self.measure("backward"):
                return engine(*args, **kwargs)

        return backward

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Record the block as a backward pass if ``name`` is "backward", as `Phases` counts it."""
        if name != "backward":
            yield
            return
        if self._is_close:
            self._line = _line()
            self._explain("backward begins", None, "", self._line)
        self._mark("backward begins", None)
        self._running = "backward"
        try:
            yield
        finally:
            self._running = ""
            if self._is_close:
                self._explain("backward ended", None, "", "")
            self._mark("backward ended", None)

    def _by_hand(self, kind: str, i: int) -> None:
        """Record what `FusedGradients` has just computed: a layer's forward pass and so on."""
        if self._is_close:
            _, module = self._layers[i]
            texts = {"forward": _formula(module), "loss": "the loss and its gradient"}
            text = texts.get(kind) or _gradients(module, i > 0)
            self._explain(f"{kind} by hand", i, f"{text}, by hand", _line())
        self._mark(f"{kind} by hand", i)

    def _message(self, sent: Sent) -> None:
        self._sent.append(sent)
        if self._is_close:
            # A sum through shared memory does not say which tensors it adds. A receive is named by
            # its sender.
            text = self._name_of(sent) if sent.tensors else "the gradients of this rank"
            text = "" if sent.operation == "recv" else text
            self._explain("message", (sent.operation, sent.ranks), text, _line())
        self._mark("message", sent, sent.start)

    def _wait(self, sent: Sent, begins: bool) -> None:
        if self._is_close:
            self._explain("wait" if begins else "waited", (sent.operation, sent.ranks), "", _line())
        self._mark("wait" if begins else "waited", sent)

    def _optimizer_begins(self, *_: object) -> None:
        if self._is_recorded:
            if self._is_close:
                self._explain("optimizer", None, self._optimizer_text(), _line())
            self._running = "optimizer"
            self._mark("optimizer", None)

    def _optimizer_ended(self, *_: object) -> None:
        if self._taken >= self._schedule:
            return
        if self._is_close:
            self._explain("end", None, "", "")
        self._end_step()
        if self._taken < self._schedule:
            self._begin_step()
        else:
            self._watching.close()

    # Explanations, in the step that is looked at closely

    def _explain(self, kind: str, what: Any, text: str, line: str) -> None:
        number = self._counts[kind, what]
        self._counts[kind, what] += 1
        memory = self._memory.current()
        self._explained[kind, what, number] = Explained(text, line, memory)

    def _explain_layer(
        self, i: int, module: torch.nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        y = output if isinstance(output, Tensor) else next(iter(_tensors(output)), None)
        shapes = [f"x {_shape(t)}" for t in args if isinstance(t, Tensor)]
        for name, p in module.named_parameters(recurse=False):
            shapes.append(f"{_symbol(name)} {_shape(p)}")
        shapes += [f"y {_shape(y)}"] if y is not None else []
        here = f"On this rank: {', '.join(shapes)}."
        with_input = any(isinstance(t, Tensor) and t.requires_grad for t in args)
        if not with_input:
            here += " x needs no gradient."
        self._explain("forward", i, f"{_formula(module)}. {here}", _line())
        self._texts[i] = f"{_gradients(module, with_input)}. {here}"
        if y is not None:
            self._places[_address(y)] = f"the output of {self._name(i)}, {_shape(y)}"
            self._inputs.append(y)

    def _name_of(self, sent: Sent) -> str:
        """The name of a message's tensors, from where they lie, or ""."""
        parts = []
        for t in sent.tensors:
            start = _address(t)
            if not start:
                continue
            end = start + t.nbytes
            names: dict[str, None] = {}
            for name, p in self._model.named_parameters():
                if p.grad is not None and start <= _address(p.grad) < end:
                    names[f"gradient of {name}"] = None
                elif start <= _address(p) < end:
                    names[name] = None
            if not names and self._running == "backward" and "reduce" in sent.operation:
                names = dict.fromkeys(self._bucket(t))
            known = self._places.get(start)
            for x in self._inputs:
                if x.is_leaf and x.grad is not None and _address(x.grad) == start:
                    known = f"the gradient of the stage's input, {_shape(x)}"
            parts += [known] if known else _listed([*names]) or [self._by_place(t, sent.operation)]
        return "; ".join(parts[:3])

    def _by_place(self, t: Tensor, operation: str) -> str:
        """A name for a tensor that has none, from what runs when it is sent."""
        if self._running == "optimizer":
            return f"what the optimizer exchanges, {_shape(t)}"
        if self._running == "backward":
            # Layers whose weights lie divided over the ranks gather them there, too.
            what = "a gradient" if "reduce" in operation else "a tensor"
            return f"{what} within the backward pass, {_shape(t)}"
        if self._running:
            return f"what {self._running} has computed, {_shape(t)}"
        if t.numel() == sum(p.numel() for p in self._model.parameters() if p.requires_grad):
            return "the gradients of this rank, joined"
        return f"a tensor of {_shape(t)}"

    def _name(self, i: int) -> str:
        name, module = self._layers[i]
        return name or type(module).__name__

    def _bucket(self, t: Tensor) -> list[str]:
        """The gradients that DistributedDataParallel has copied to a bucket, by its size."""
        every = [(n, p.numel()) for n, p in self._model.named_parameters() if p.requires_grad]
        for i in range(len(every)):
            count = 0
            for j in range(i, len(every)):
                count += every[j][1]
                if count == t.numel():
                    return [f"gradient of {name}" for name, _ in every[i : j + 1]]
        return []

    def _optimizer_text(self) -> str:
        kinds = [type(self._optimizer).__name__]
        kinds = [type(o).__name__ for o in getattr(self._optimizer, "optimizers", ())] or kinds
        count = sum(p.numel() for p in self._model.parameters())
        verb = "change" if len(kinds) > 1 else "changes"
        return f"{' and '.join(kinds)} {verb} the {count:,} weights of this rank."

    # The records of all ranks

    def steps(self) -> RankSteps:
        """The steps that this rank has recorded."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        place = {}
        if self._world is not None:
            names = self._world.mesh.mesh_dim_names or ()
            place = {name: self._world.mesh.get_local_rank(name) for name in names}
        parts = [name for name, _ in self._layers if name]
        return RankSteps(
            rank=rank,
            machine=environment.describe(),
            place=place,
            layers=parts,
            steps=self._steps,
            explained=self._explained,
            recorded=self._seconds[True],
            plain=self._seconds[False],
            sources=_sources([one.line for one in self._explained.values() if one.line]),
        )

    def gather(self, title: str = "", remark: str = "") -> dict[str, Any] | None:
        """Return the recording of all ranks on rank 0, None on others. Every rank calls it.

        None, too, where too few steps were taken.
        """
        mine = self.steps()
        offset, error = _clock_offset(mine.machine["host"])
        mine.shift(offset)
        mine.clock_error = error
        ranks = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
        if len(ranks) > 1:
            dist.all_gather_object(ranks, mine)
        if mine.rank or not min(len(one.steps) for one in ranks):
            return None
        return recording(ranks, title, remark)


@context_manager("replay")
def replay(
    path: str | Path,
    model: torch.nn.Module,
    optimizer: Optimizer,
    world: "World | None" = None,
    *,
    title: str = "",
) -> Iterator[Replay]:
    """Record some steps of the loop in the block, and write the page that plays them.

        with replay("step.html", model, optimizer):
            for x, y in batches:
                cross_entropy(model(x), y).backward()
                optimizer.step()

    The page needs no other file and no network. It shows for each rank what it computes, waits for,
    sends and keeps. Beside it a ``.json`` of the same name is written, which is a Chrome trace:
    Perfetto opens it, and ``python -m torchpar replay`` plays two of them side by side. Rank 0
    writes both. The first ``WARM_UP + 1`` steps are not recorded, and of the next six every second
    one is; then nothing is watched any more. See `Replay` for what is recorded.

    Args:
        path: of the page, ``….html``.
        model: this rank's part of the model, without wrappers such as DistributedDataParallel.
        optimizer: over its parameters; its step ends a step of the training.
        world: its mesh names the dimensions of messages.
        title: of the page; by default the name of the program. The number of ranks follows.

    Raises:
        ConfigError: a path that does not end with ".html", or cannot be written; the path is tried
            before the block. Another recording is active. Fewer steps were taken than are needed.
    """
    page = Path(path)
    check_name(page, "replay: the page")
    given_by = "replay's path"
    if not dist.is_initialized() or dist.get_rank() == 0:
        check_writable(page, given_by)
    with Replay(model, optimizer, world) as recorder:
        yield recorder
    found = recorder.gather(title)
    if found is not None:
        write(page, found, given_by=given_by)
    elif not dist.is_initialized() or dist.get_rank() == 0:
        raise ConfigError(f"replay: {TOO_FEW}")


def _restore(where: Any, name: str, ours: Any, before: Any) -> None:
    """Undo what `Replay` has set, unless somebody has set something else meanwhile."""
    if getattr(where, name) is ours:
        setattr(where, name, before)


def _is_layer(module: torch.nn.Module) -> bool:
    # Attention has a module of its weights, and computes with them itself.
    own = next(module.parameters(recurse=False), None)
    return own is not None or not [*module.children()]


def _clock_offset(host: str) -> tuple[float, float]:
    """Return what to add to this rank's clock to get rank 0's, and the error, in seconds.

    Processes of one machine share a clock. Between machines rank 0 sends its time as the answer to
    a message: it lies between this rank's times before and after, by half of them if both ways take
    the same time. The shortest of `PINGS` such exchanges counts.

    Source: Cristian, "Probabilistic clock synchronization", 1989.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0, 0.0
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    best = 0.0, 0.0
    for other in range(1, len(hosts)):
        if hosts[other] != hosts[0] and dist.get_rank() in (0, other):
            measured = [_ping(other) for _ in range(PINGS)]
            if dist.get_rank() == other:
                best = min(measured, key=lambda m: m[1])
    return best


def _ping(other: int) -> tuple[float, float]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    time_of_0 = torch.zeros(1, dtype=torch.float64, device=device)
    if dist.get_rank() == 0:
        dist.recv(time_of_0, other)
        time_of_0.fill_(time.perf_counter())
        dist.send(time_of_0, other)
        return 0.0, 0.0
    before = time.perf_counter()
    dist.send(time_of_0, 0)
    dist.recv(time_of_0, 0)
    there = time_of_0.item()
    after = time.perf_counter()
    return there - (before + after) / 2, (after - before) / 2


def _tensors(value: Any) -> Iterator[Tensor]:
    for one in value if isinstance(value, tuple | list) else ():
        if isinstance(one, Tensor):
            yield one


def _address(t: Tensor) -> int:
    """The place of a tensor in memory; 0 if it has no elements, or no memory."""
    return next((part.data_ptr() for part in dense_parts(t)), 0)


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _symbol(name: str) -> str:
    return {"weight": "W", "bias": "b"}.get(name, name)


def _listed(names: list[str]) -> list[str]:
    """Names in short: those of many tensors as the first, the last and their number."""
    if len(names) <= 4:
        return [", ".join(names)] if names else []
    return [f"{names[0]} to {names[-1]}, {len(names)} tensors"]


def _formula(module: torch.nn.Module) -> str:
    known = _FORWARD.get(type(module).__name__)
    return known or f"{type(module).__name__}({module.extra_repr()})"


def _gradients(module: torch.nn.Module, with_input: bool) -> str:
    if type(module).__name__ not in _FORWARD:
        return f"The gradients of {type(module).__name__}"
    return f"{_OF_INPUT * with_input}{_OF_WEIGHTS}"


def _shown(file: str) -> str:
    """A file's name on the page: within the current folder its path from there."""
    with suppress(ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return Path(file).name


def _sources(lines: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """The lines, with some around each, by file."""
    numbers: dict[str, set[int]] = {}
    for file, _, number in (line.rpartition(":") for line in lines):
        around = range(int(number) - AROUND, int(number) + AROUND + 1)
        numbers.setdefault(file, set()).update(around)
    found = {}
    for module in [*sys.modules.values()]:
        file = getattr(module, "__file__", None) or ""
        if file and (name := _shown(file)) in numbers and name not in found:
            text = linecache.getlines(file)
            kept = sorted(n for n in numbers[name] if 1 <= n <= len(text))
            found[name] = [(n, text[n - 1].rstrip()) for n in kept]
    return found


def _line() -> str:
    """The line of the program that led here: the innermost one outside of PyTorch and torchpar."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((*_OTHERS, _PYTHON)):
            return f"{_shown(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
