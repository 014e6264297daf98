"""Which rules learn most in a job of the LM head: tried in plain PyTorch, before any is built into the engine.

    python benchmarks/candidates.py --model "$(python examples/models.py smollm2)" --dtype bfloat16
    python benchmarks/candidates.py --model DIR --tasks cb --rows 200 50 56 --contenders "plain; muon; 4 rloo"
    python benchmarks/candidates.py --model DIR --steps 10000            # equal steps in place of equal passes
    python benchmarks/candidates.py --report

Such a job sees its model only through what enters the head, which never changes. So the rows pass through the model
once (minutes; kept in --hidden), and a step is a product of 64 rows with some 62 numbers. All contenders get the same
passes (a row, scored once), the same five step sizes, two eps and eight seeds; all these runs are one tensor. A rule is
compared with `plain`, which is `LoZO(v="activations", interval=10)` with 31 bases, as in the recipe `labels`. In the
table each contender has one step size and eps for all models and tasks: the one with the lowest validation losses on
those tasks that --held-out does not name.

Tasks with one label token an example only. Suffixes of shapes: as in head_rules.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.experiment import ROOT, add_common, add_contenders, check_data, encoded, load, missing, results
from benchmarks.head_rules import (
    Adam,
    Curvature,
    Estimate,
    Kalman,
    LastVisit,
    Meazo,
    Momentum,
    Muon,
    OneSided,
    Rloo,
    Sgd,
    Sign,
    TwoSided,
)
from vllm_zo.methods.leading import OUTPUT
from vllm_zo.methods.step_size import CALIBRATION_STEPS, ENOUGH_ROWS, MEASURED_WALK

SEEDS, FACTORS, EPS = 8, (0.1, 0.3, 1.0, 3.0, 10.0), (1e-3, 1e-2)
GRID = [(factor, eps) for factor in FACTORS for eps in EPS]
LENGTH = 1e-3
"""Of a step of "auto" with the default eps. Here it is that with every eps."""
EVALUATIONS = 10
KEY = ("model", "task", "contender", "passes", "steps_wanted")


# --- what a job sees of a model ---------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """x (rows, D): what enters the head along V. base (rows, C): the labels' logits before any step. gold (rows)."""

    x: Tensor
    base: Tensor
    gold: Tensor


@torch.no_grad()
def hidden_states(model_dir: str, task: Any, dtype: str) -> dict[str, Tensor]:
    """What enters the head for the label of each row, the right labels, and the labels' rows of the head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    found: dict[str, Tensor] = {}
    for part in ("train", "validation", "test"):
        examples = encoded(task, part, tokenizer)
        if any(len(example.sequences) > 1 for example in examples):
            raise SystemExit(f"skipped: {task.name} scores texts, and this bench needs one label token an example")
        tokens = [list(example.sequences[0].token_ids) for example in examples]
        states = [model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].float() for ids in tokens]
        found[part], found[f"{part} gold"] = torch.stack(states), torch.tensor([e.gold for e in examples])
    labels = list(examples[0].sequences[0].label_ids)
    return {**found, "head": model.get_output_embeddings().weight[labels].float()}


def along(states: dict[str, Tensor], v: Tensor) -> dict[str, Rows]:
    def part(name: str) -> Rows:
        rows = states[name].double()
        return Rows((rows @ v).float(), (rows @ states["head"].double().T).float(), states[f"{name} gold"])

    return {name: part(name) for name in ("train", "validation", "test")}


def measured_v(rows_BI: Tensor, directions: int, whiten: float, centred: bool) -> Tensor:
    """(I, D) the leading directions, mixed at random. whiten: 1 makes all as large as the first, 0 leaves them."""
    rows = rows_BI.double() - (rows_BI.double().mean(0) if centred else 0.0)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(rows.T @ rows))
    count = min(directions, int((values > values[0] * 1e-6).sum()))
    sizes = OUTPUT * (len(rows) / values[:count]).sqrt() * (values[:count] / values[0]) ** ((1 - whiten) / 2)
    return vectors[:, :count] * sizes @ torch.linalg.qr(normal(count, count, seed=7).double())[0]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- contenders -------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "3 times at first": lambda done: (1 - done) * (3 - 2 * min(1.0, 4 * done)),
}


@dataclass(frozen=True)
class Contender:
    """`plain` is what it is without arguments.

    Attributes:
        estimator: makes one, from the losses (rows,) before the first step.
        exact: the gradient itself, which no probes can tell.
        average: over which share of the run the state is averaged that an evaluation sees; 0: none.
        restart: go back to the best state at each evaluation that is worse, with half the step.
    """

    estimator: Callable[[Tensor], TwoSided] = lambda lost: TwoSided()
    rule: Callable[[], Sgd] = Sgd
    batch: int = 64
    rank: int = 2
    interval: int = 10
    schedule: str = "linear"
    directions: int = 62
    whiten: float = 1.0
    centred: bool = False
    drawn: bool = False
    exact: bool = False
    average: float = 0.0
    restart: bool = False


CONTENDERS = {
    "plain": Contender(),
    "the gradient itself": Contender(exact=True),
    "constant": Contender(schedule="constant"),
    "cosine": Contender(schedule="cosine"),
    "3 times at first": Contender(schedule="3 times at first"),
    "restart": Contender(restart=True),
    "constant, restart": Contender(schedule="constant", restart=True),
    "average": Contender(average=0.1),
    "constant, average": Contender(schedule="constant", average=0.1),
    "16 rows": Contender(batch=16),
    "256 rows": Contender(batch=256),
    "4 two-sided": Contender(lambda lost: TwoSided(4)),
    "4 one-sided": Contender(lambda lost: OneSided(4)),
    "16 one-sided": Contender(lambda lost: OneSided(16)),
    "4 rloo": Contender(lambda lost: Rloo(4)),
    "16 rloo": Contender(lambda lost: Rloo(16)),
    "last visit": Contender(LastVisit),
    "curvature": Contender(lambda lost: Curvature()),
    "interval 1": Contender(interval=1),
    "interval 2": Contender(interval=2),
    "interval 50": Contender(interval=50),
    "rank 1": Contender(rank=1),
    "rank 4": Contender(rank=4),
    "all bases at once": Contender(rank=62),
    "momentum": Contender(rule=Momentum),
    "momentum .99": Contender(rule=lambda: Momentum(0.99)),
    "adam": Contender(rule=Adam),
    "meazo": Contender(rule=Meazo),
    "sign": Contender(rule=Sign),
    "muon": Contender(rule=Muon),
    "kalman": Contender(rule=lambda: Kalman(400)),
    "kalman, all bases": Contender(rule=lambda: Kalman(400), rank=62),
    "30 directions": Contender(directions=30),
    "126 directions": Contender(directions=126),
    "whitened by half": Contender(whiten=0.5),
    "not whitened": Contender(whiten=0.0),
    "mean removed": Contender(centred=True),
    "V drawn": Contender(drawn=True),
    "4 rloo, constant": Contender(lambda lost: Rloo(4), schedule="constant"),
    "4 rloo, whitened by half": Contender(lambda lost: Rloo(4), whiten=0.5),
    "constant, whitened by half": Contender(schedule="constant", whiten=0.5),
    "30 directions, constant": Contender(directions=30, schedule="constant"),
}


# --- runs -------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Of each run (S, G), in its state with the lowest validation loss."""

    loss: Tensor
    accuracy: Tensor
    test: Tensor


class Runs:
    """All runs of a contender on a task: for each seed, step size and eps one.

    Args:
        passes: rows that each may score, if `steps` is 0.
    """

    def __init__(self, contender: Contender, states: dict[str, Tensor], passes: int, steps: int = 0) -> None:
        self._of = contender
        v = measured_v(states["train"], contender.directions, contender.whiten, contender.centred)
        self._parts = along(states, normal(*v.shape, seed=7).double() if contender.drawn else v)
        train = self._parts["train"]
        self._theta = torch.zeros(SEEDS, len(GRID), len(states["head"]), v.shape[1])
        first = cross_entropy(train.base, train.gold)
        self._estimator, self._rule = contender.estimator(first), contender.rule()
        self._batch = min(contender.batch, len(train.gold))
        self.steps = steps or passes // (self._batch * self._estimator.probes)
        self._share = min(1.0, math.sqrt(MEASURED_WALK * min(1.0, len(train.gold) / ENOUGH_ROWS) / self.steps))
        self._factors, self._eps = (torch.tensor(column)[:, None] for column in zip(*GRID, strict=True))
        self._generator = torch.Generator().manual_seed(1000)
        self._order, self._squares = torch.empty(SEEDS, 0, dtype=torch.long), torch.zeros(())
        self._average, self._halved = self._theta, torch.ones(SEEDS, len(GRID), 1)
        self._kept, self._curve = self._theta, list[Outcome]()

    def run(self) -> Outcome:
        for step in range(1, self.steps + 1):
            self._step(step)
            if step > CALIBRATION_STEPS and step % max(1, self.steps // EVALUATIONS) == 0:
                self._evaluate()
        loss, accuracy, test = (torch.stack(list(found)) for found in zip(*self._curve, strict=True))
        best = loss.argmin(0, keepdim=True)
        return Outcome(*(found.gather(0, best)[0] for found in (loss, accuracy, test)))

    def _step(self, step: int) -> None:
        estimate = self._estimate(step)
        if step <= CALIBRATION_STEPS:
            self._squares = self._squares + estimate.coefficients.square().sum(2, keepdim=True) / CALIBRATION_STEPS
            return
        rate = LENGTH * self._share * SCHEDULES[self._of.schedule](step / self.steps) * self._factors * self._halved
        if not self._rule.scale_free:
            rate = rate * math.sqrt(self._estimator.directions) / estimate.usual
        taken = step - CALIBRATION_STEPS
        self._theta = self._theta - rate[..., None] * self._rule(estimate, taken)
        memory = max(1 / taken, 1 / (self._of.average * self.steps)) if self._of.average else 1.0
        self._average = self._average + memory * (self._theta - self._average)

    def _estimate(self, step: int) -> Estimate:
        rows = self._next_rows()
        batch = Rows(*(part[rows] for part in self._parts["train"]))
        directions = self._directions(step)
        if self._of.exact:
            gradient = gradient_of(batch, self._theta)
            w = gradient.square().mean((-1, -2)).sqrt()[..., None]
        else:
            probes = directions[:, None] * self._eps[..., None, None]
            theta = self._theta[:, :, None]
            w = self._estimator(lambda moved: losses(batch, theta + moved), probes, self._eps, rows)
            gradient = torch.einsum("sgk,skcd->sgcd", w, directions)
        return Estimate(gradient, w, directions, self._squares.sqrt())

    def _next_rows(self) -> Tensor:
        """(S, B) indices: each seed has its order of an epoch, and drops what is left of it."""
        if self._order.shape[1] < self._batch:
            count = len(self._parts["train"].gold)
            self._order = torch.stack([torch.randperm(count, generator=self._generator) for _ in range(SEEDS)])
        rows, self._order = self._order[:, : self._batch], self._order[:, self._batch :]
        return rows

    def _directions(self, step: int) -> Tensor:
        """(S, K, C, D): normal in the columns of the basis whose turn it is, and 0 elsewhere."""
        labels, dims = self._theta.shape[2:]
        rank = min(self._of.rank, dims)
        begin = step // self._of.interval % (dims // rank) * rank
        directions = torch.zeros(SEEDS, self._estimator.directions, labels, dims)
        directions[..., begin : begin + rank].normal_(generator=self._generator)
        return directions

    def _evaluate(self) -> None:
        loss, accuracy = scores(self._parts["validation"], self._average)
        loss = loss.nan_to_num(math.inf)  # a run that diverged
        better = loss < torch.stack([found.loss for found in self._curve]).amin(0) if self._curve else loss < math.inf
        self._curve.append(Outcome(loss, accuracy, scores(self._parts["test"], self._average)[1]))
        if self._of.restart:
            self._kept = torch.where(better[..., None, None], self._average, self._kept)
            self._theta, self._halved = self._kept, torch.where(better[..., None], self._halved, self._halved / 2)


def losses(rows: Rows, theta: Tensor) -> Tensor:
    """(S, G, K, B) of states (S, G, K, C, D), the rows (S, B, ...)."""
    seeds, grid, states, labels, dims = theta.shape
    moved = torch.bmm(rows.x, theta.view(seeds, -1, dims).transpose(1, 2)).view(seeds, -1, grid, states, labels)
    return cross_entropy(moved.permute(0, 2, 3, 1, 4) + rows.base[:, None, None], rows.gold[:, None, None])


def gradient_of(rows: Rows, theta: Tensor) -> Tensor:
    probabilities = (torch.einsum("sbd,sgcd->sgbc", rows.x, theta) + rows.base[:, None]).softmax(-1)
    wrong = probabilities - one_hot(rows.gold, theta.shape[2])[:, None]
    return torch.einsum("sgbc,sbd->sgcd", wrong, rows.x) / rows.x.shape[1]


def cross_entropy(found: Tensor, gold: Tensor) -> Tensor:
    return found.logsumexp(-1) - found.gather(-1, gold.expand(found.shape[:-1])[..., None])[..., 0]


def scores(rows: Rows, theta: Tensor) -> tuple[Tensor, Tensor]:
    """(S, G) loss and accuracy of states (S, G, C, D)."""
    found = torch.einsum("bd,sgcd->sgbc", rows.x, theta) + rows.base
    return cross_entropy(found, rows.gold).mean(-1), (found.argmax(-1) == rows.gold).float().mean(-1)


# --- runs and their table ---------------------------------------------------------------------------------------------


def states_of(args: argparse.Namespace, name: str) -> dict[str, Tensor]:
    """The hidden states of a task, from --hidden or the model."""
    path = args.hidden / f"{Path(args.model).name}-{name}-{'-'.join(map(str, args.rows))}.pt"
    if not path.exists():
        check_data(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(hidden_states(args.model, load(args, name), args.dtype), path)
    states: dict[str, Tensor] = torch.load(path)
    return states


def run(args: argparse.Namespace, name: str, label: str, states: dict[str, Tensor]) -> dict[str, Any]:
    began, runs = time.process_time(), Runs(CONTENDERS[label], states, args.passes, args.steps)
    outcome = runs.run()
    return {
        "model": Path(args.model).name, "task": name, "contender": label, "passes": args.passes,
        "steps_wanted": args.steps, "rows": list(args.rows), "steps": runs.steps,
        "spent": time.process_time() - began,
        **{kind: found.T.tolist() for kind, found in outcome._asdict().items()},
    }  # fmt: skip


def report(lines: list[dict[str, Any]], held_out: Sequence[str]) -> str:
    """A table for each number of passes or steps, then what the search took."""
    budgets = sorted({(line["passes"], line["steps_wanted"]) for line in lines})
    tables = [table([line for line in lines if (line["passes"], line["steps_wanted"]) == b], held_out) for b in budgets]
    return "\n\n".join([*tables, f"The search took {sum(line['spent'] for line in lines):.0f} CPU seconds."])


def table(lines: list[dict[str, Any]], held_out: Sequence[str]) -> str:
    """The contenders by their validation losses on the tasks they were tuned on, as a share of those of `plain`.

    Cells: validation loss and test accuracy, means of the seeds.
    """
    cells = sorted({(line["task"], line["model"]) for line in lines}, key=lambda cell: (cell[0] in held_out, *cell))
    tuned = sum(task not in held_out for task, _ in cells) or len(cells)
    rows, plain = [], list[float]()
    for label in CONTENDERS:
        of = {(line["task"], line["model"]): line for line in lines if line["contender"] == label}
        if len(of) < len(cells):
            continue
        found = [of[cell] for cell in cells]
        place = min(range(len(GRID)), key=lambda g: sum(log_loss(line, g) for line in found[:tuned]))
        logs = [log_loss(line, place) for line in found]
        plain = plain or logs
        ratios = [
            f"{math.exp(mean(logs[part]) - mean(plain[part])):.3f}" if logs[part] else ""
            for part in (slice(tuned), slice(tuned, None))
        ]
        texts = [f"{mean(line['loss'][place]):.3f}, {mean(line['test'][place]):.3f}" for line in found]
        rows.append([label, *(f"{value:g}" for value in GRID[place]), *ratios, *texts])
    budget = f"{lines[0]['steps_wanted']} steps" if lines[0]["steps_wanted"] else f"{lines[0]['passes']} passes"
    heading = [budget, "step", "eps", "loss / plain", "held out", *(f"{task}, {model}" for task, model in cells)]
    rows.sort(key=lambda row: row[3])
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows])


def log_loss(line: dict[str, Any], place: int) -> float:
    """Of the mean validation loss of a line's seeds at a place of the grid; what diverged is infinite."""
    loss = mean(line["loss"][place])
    return math.log(loss) if math.isfinite(loss) else math.inf


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "sst2,trec", "candidates.jsonl")
    add_contenders(parser, CONTENDERS)
    parser.add_argument("--passes", type=int, default=320_000, help="rows that a run scores")
    parser.add_argument("--steps", type=int, default=0, help="of each run, in place of --passes")
    parser.add_argument("--held-out", default=["trec"], type=lambda s: s.split(","), help="tasks that tune nothing")
    parser.add_argument("--hidden", type=Path, default=ROOT / "benchmarks" / "results" / "hidden")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.report:
        torch.set_num_threads(1)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for name in args.tasks:
            states = states_of(args, name)
            cells = [(name, label, args.passes, args.steps) for label in args.contenders]
            for _, label, *_ in missing(args, KEY, cells):
                line = run(args, name, label, states)
                with args.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{name}, {label}: {line['steps']} steps, {line['spent']:.0f} s", flush=True)
    print(report(results(args.output), args.held_out))


if __name__ == "__main__":
    main()
