"""The loop that tunes the encoder's adapter, without a broker: examples log in, verdicts out.

A function of the log, the encoder's name and the configuration: no clock, no randomness. The champion is the workers'
own learner, message by message. From it come the problems that candidates are trained on; a candidate then runs in
shadow: a fork of the champion with the candidate's adapter that learns every message too, and is compared on the
tests that the log marks (`ranked`). A winner is asked for (`wanted`) and takes over when the log says so; from there
on its predecessor runs in shadow, and is asked for again if it proves better. A trial on live users is learnt like all
that the log says: a duel then goes on without the tests of its challenger's users, and a winner waits for its end.

    gather --(round_examples)--> shadow --better--> asked --(the log switches)--> watch --better--> asked --> gather
                                   \\--worse, none--> gather                        \\--worse, none--> gather
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from model import finetune
from model.adapter import SCALE_MAX, Adapter
from model.finetune import FinetuneConfig, Finetuning, Replay
from model.gate import Bets, Duel, level, score_of_rank
from model.learner import LearnerConfig, Outcome, Problem
from streams import examples
from streams.pipeline import ItemLearner, Learnt

STATE_VERSION: Final = 1


@dataclass(frozen=True)
class TuningConfig:
    """When candidates are made and how they are judged."""

    round_examples: int = 2048  # learnt between two candidates
    examples_min: int = 512  # with texts, in the replay before the first: fewer are learnt by heart
    shadow_tests: int = 2000  # a candidate that shows nothing by then is dropped
    watch_tests: int = 1000  # a promotion is watched for so many
    alpha: float = 0.01  # chance that any candidate that is no better is ever promoted
    lengths: tuple[float, ...] = (2.0, 1.0)  # of candidates in turn, in trained scales: the loss cannot tell the length
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


class Decision(NamedTuple):
    """What happened at a position of the log."""

    kind: str  # candidate, promote, drop, switched, kept, rollback
    adapter: Adapter | None  # whom it is about; None: the encoder as it is
    parent: str  # name of the champion's adapter
    position: int
    facts: dict[str, Any]  # losses of the training, evidence of the duel


Trained = Callable[[int, float], None]  # (step, loss)


class Tuning:
    """The loop. Not safe for concurrent use."""

    def __init__(self, base: str, text_dim: int, learner: LearnerConfig, config: TuningConfig) -> None:
        self.text_dim, self.config = text_dim, config
        self._first_base = base
        self._learner_config = learner
        self.champion = ItemLearner(learner, text_dim, base)
        self.learnt: Learnt | None = None  # what the champion made of the last message
        self.replay = Replay(config.finetune.replay_messages, config.finetune.candidates_max)
        self.phase = "gather"  # gather, shadow, asked, watch
        self.rival: ItemLearner | None = None  # the candidate in shadow, or the predecessor under watch
        self.duel: Duel | None = None
        self.wanted: Adapter | None = None  # while asked: whom the log shall switch to
        self.taking_back = False  # while asked: it is a rollback
        self.rounds = 0
        self.watches = 0
        self.examples = 0
        self._gathered = 0  # examples since the last round

    @property
    def base(self) -> str:
        """Name of the encoder in use."""
        return self.champion.encoder

    @property
    def offset(self) -> int:
        """Of the last message that was taken in."""
        return self.champion.offset

    @property
    def current(self) -> Adapter | None:
        """The champion's adapter."""
        return self.champion.learner.matrix.adapter

    @property
    def owes_replay(self) -> bool:
        """Whether the log has removed examples that were learnt: go on with `again`, from the log's beginning."""
        return self.learnt is not None and self.learnt.ends_removal and self.champion.owes_replay

    def again(self) -> "Tuning":
        """A loop that has not begun, and leaves out what the log has removed."""
        fresh = Tuning(self._first_base, self.text_dim, self._learner_config, self.config).counting_on(self)
        fresh.champion = self.champion.again()
        return fresh

    def counting_on(self, before: "Tuning") -> "Tuning":
        """This loop with the numbers of candidates and watches of the one before it: both together have one alpha."""
        self.rounds, self.watches = before.rounds, before.watches
        return self

    def abandoned(self, why: dict[str, Any], instead: Adapter | None = None) -> list[Decision]:
        """The drop of a candidate that nobody decides on any more: the one in shadow, or a winner that waits for its
        switch, unless the log has switched to it (`instead`)."""
        candidate = None
        if self.phase == "shadow" and self.rival is not None:
            candidate = self.rival.learner.matrix.adapter
        elif self.phase == "asked" and not self.taking_back:
            candidate = self.wanted
        if candidate is None or candidate.name == _name(instead):
            return []
        return [Decision("drop", candidate, _name(self.current), self.offset, why)]

    def advance(self, offset: int, message: bytes, trained: Trained = lambda step, loss: None) -> list[Decision]:
        """Takes in the message at this offset of the examples log; what was decided by it."""
        if examples.read_header(message)[0] == examples.KIND_ADAPTER:
            return self._try_out(offset, message) if examples.is_trial(message) else self._switch(offset, message)
        before = self.base, self.current
        mine = self.learnt = self.champion.learn(offset, message)
        if self.base != before[0]:
            return self._move(*before)
        if mine.examples:
            problem = self.champion.learner.problem()
            if problem is not None:
                self.replay.offer(offset, problem)
        if self.rival is not None:
            theirs = self.rival.learn(offset, message)
            self._compare(mine, theirs)
        self.examples += mine.examples
        self._gathered += mine.examples
        if self.duel is not None and self.duel.verdict is not None:
            return [self._decide(self.duel)]
        ready = self._gathered >= self.config.round_examples and self.replay.examples >= self.config.examples_min
        if self.phase == "gather" and ready:
            return [self._try(self.train(trained))]
        return []

    def train(self, trained: Trained = lambda step, loss: None) -> tuple[Adapter, dict[str, Any]]:
        """A candidate of the replay as it is, and its losses on it before and after."""
        e = self.champion.learner.matrix.arrays.e
        problems = self.replay.problems()
        config = FinetuneConfig(**{**asdict(self.config.finetune), "seed": self.config.finetune.seed + self.rounds})
        tuning = Finetuning(self.base, problems, e, config)
        for number, step in enumerate(tuning.steps()):
            trained(number, step.loss)
        length = self.config.lengths[self.rounds % len(self.config.lengths)]
        adapter = replace(tuning.adapter, scale=min(length * tuning.adapter.scale, SCALE_MAX))
        facts = {
            "messages": len(problems),
            "examples": sum(len(problem.words) for problem in problems),
            "loss_frozen": finetune.loss_of(None, problems, e),
            "loss_champion": finetune.loss_of(self.current, problems, e),
            "loss": finetune.loss_of(adapter, problems, e),
            "scale": adapter.scale,
            "seed": config.seed,
        }
        return adapter, facts

    def challenge(self, adapter: Adapter) -> None:
        """Puts a candidate into shadow, from wherever it comes."""
        self.rounds += 1
        self._gathered = 0
        self.rival = self._fork()
        self.rival.learner.adapt(adapter)
        self.duel = Duel.new(level(self.config.alpha, self.rounds), self.config.shadow_tests)
        self.phase = "shadow"

    def _try(self, made: tuple[Adapter, dict[str, Any]]) -> Decision:
        adapter, facts = made
        self.challenge(adapter)
        return Decision("candidate", adapter, _name(self.current), self.offset, facts)

    def _compare(self, mine: Learnt, theirs: Learnt) -> None:
        if mine.outcome is None or theirs.outcome is None or self.duel is None:
            return
        both = (mine.outcome.candidates > 0) & (theirs.outcome.candidates > 0)
        if mine.challengers is not None:  # both compare these users' texts through the trial's adapter
            both &= ~mine.challengers
        self.duel.observe(_scores(theirs.outcome, both), _scores(mine.outcome, both))

    def _decide(self, duel: Duel) -> Decision:
        assert self.rival is not None
        rival, won = self.rival.learner.matrix.adapter, duel.verdict == "better"
        kind = {"shadow": ("promote", "drop"), "watch": ("rollback", "kept")}[self.phase][not won]
        about = rival if self.phase == "shadow" or won else self.current  # the candidate, or who is in use afterwards
        decision = Decision(kind, about, _name(self.current), self.offset, duel.evidence())
        self.taking_back = kind == "rollback"
        self.wanted = rival if won else None
        self.phase = "asked" if won else "gather"
        self.rival = self.duel = None
        return decision

    def _move(self, base: str, adapter: Adapter | None) -> list[Decision]:
        """The log has moved from this encoder, and adapter, to another: adapters, and their replay, begin anew."""
        facts = {"moved_from": base, "moved_to": self.base}
        decisions = [dropped._replace(parent=_name(adapter)) for dropped in self.abandoned(facts)]
        if adapter is not None:
            decisions.append(Decision("switched", None, _name(adapter), self.offset, {"taken_back": False, **facts}))
        self.replay = Replay(self.config.finetune.replay_messages, self.config.finetune.candidates_max)
        self.wanted, self.taking_back, self.rival, self.duel = None, False, None, None
        self.phase, self._gathered = "gather", 0
        return decisions

    def _switch(self, offset: int, message: bytes) -> list[Decision]:
        """The log says that another adapter is in use: a promotion is watched, what was taken back is not."""
        adapter, taken_back = examples.unpack_adapter(message)
        before = _name(self.current)
        yields = examples.yields(message) and self.champion.learner.matrix.trial is not None
        if yields or (adapter is not None and adapter.base != self.base):
            self.champion.learn(offset, message)  # which passes it over, or raises
            return []
        if _name(adapter) == before:
            self.champion.learn(offset, message)
            if self.rival is not None:
                self.rival.end_trial()
            return []
        predecessor = self._fork()
        predecessor.end_trial()
        dropped = self.abandoned({"switched_to": _name(adapter)}, adapter)
        self.champion.learn(offset, message)
        self.wanted, self.taking_back = None, False
        self.rival = self.duel = None
        self._gathered = 0
        self.phase = "gather"
        if not taken_back:
            self.watches += 1
            self.rival, self.phase = predecessor, "watch"
            self.duel = Duel.new(level(self.config.alpha, self.watches), self.config.watch_tests)
        return [*dropped, Decision("switched", adapter, before, offset, {"taken_back": taken_back})]

    def _try_out(self, offset: int, message: bytes) -> list[Decision]:
        """A trial begins or ends: nobody's promotion, so that nothing is decided and nothing watched."""
        for learner in (self.champion, self.rival):
            if learner is not None:
                learner.learn(offset, message)
        return []

    def adopt(self, rows: dict[bytes, bytes], offset: int) -> None:
        """Begins with a learner's rows, as of this offset of the log, where the log's own beginning is gone."""
        self.champion = self._learner_of(rows.items(), offset)

    def request(self) -> bytes | None:
        """The message that the log must get, while one is asked for; a promotion, which would end a trial, waits, and
        yields to one that the log got meanwhile."""
        waits = self.champion.learner.matrix.trial is not None and not self.taking_back
        if self.phase != "asked" or waits:
            return None
        return examples.pack_adapter(self.wanted, self.taking_back, yields=not self.taking_back)

    def _fork(self) -> ItemLearner:
        fork = ItemLearner(self._learner_config, self.text_dim, self._first_base)
        fork.load(self.champion.all_rows())
        fork.offset = self.champion.offset
        return fork

    # --- stop and go on ---

    def save(self) -> bytes:
        """The whole loop; `load` of it goes on as if nothing had been."""
        saved = _Saved(
            STATE_VERSION, self._identity(), self.offset, list(self.champion.all_rows()),
            None if self.rival is None else list(self.rival.all_rows()), self.phase,
            None if self.duel is None else asdict(self.duel), None if self.wanted is None else self.wanted.pack(),
            self.taking_back, (self.rounds, self.watches, self.examples, self._gathered),
            [(position, _pack_problem(problem)) for position, problem in self.replay.kept.items()],
        )  # fmt: skip
        return msgspec.msgpack.encode(saved)

    def load(self, packed: bytes) -> None:
        """Goes on from a saved loop. Raises ValueError for one of another version, encoder or configuration."""
        try:
            saved = msgspec.msgpack.decode(packed, type=_Saved)
        except msgspec.DecodeError as problem:
            raise ValueError(f"the trainer's saved state is torn or of another version: {problem}") from problem
        if saved.version != STATE_VERSION or saved.identity != self._identity():
            raise ValueError("the trainer's saved state is of another version, encoder or configuration")
        self.champion = self._learner_of(saved.champion, saved.offset)
        self.rival = None if saved.rival is None else self._learner_of(saved.rival, saved.offset)
        self.phase, self.taking_back = saved.phase, saved.taking_back
        self.duel = None if saved.duel is None else _duel_of(saved.duel)
        self.wanted = None if saved.wanted is None else Adapter.unpack(saved.wanted)
        self.rounds, self.watches, self.examples, self._gathered = saved.counts
        self.replay.kept = {position: _unpack_problem(problem) for position, problem in saved.replay}

    def _learner_of(self, rows: Iterable[tuple[bytes, bytes]], offset: int) -> ItemLearner:
        learner = ItemLearner(self._learner_config, self.text_dim, self._first_base)
        learner.load(rows)
        learner.offset = offset
        return learner

    def _identity(self) -> str:
        return msgspec.json.encode([self._first_base, asdict(self._learner_config), asdict(self.config)]).decode()


class _Saved(msgspec.Struct, array_like=True):
    version: int
    identity: str
    offset: int
    champion: list[tuple[bytes, bytes]]
    rival: list[tuple[bytes, bytes]] | None
    phase: str
    duel: dict[str, Any] | None
    wanted: bytes | None
    taking_back: bool
    counts: tuple[int, int, int, int]
    replay: list[tuple[int, list[bytes]]]


def _name(adapter: Adapter | None) -> str:
    return "" if adapter is None else adapter.name


def _scores(outcome: Outcome, rows: Any) -> Any:
    return score_of_rank(outcome.rank[rows])


def _duel_of(stored: dict[str, Any]) -> Duel:
    return Duel(stored["alpha"], stored["tests_max"], Bets(**stored["better"]), Bets(**stored["worse"]))


def _pack_problem(problem: Problem) -> list[bytes]:
    arrays = (problem.words, problem.target, problem.candidate, problem.offset, problem.offset_target)
    return [*(array.tobytes() for array in arrays), np.float64(problem.log_weight).tobytes()]


def _unpack_problem(packed: list[bytes]) -> Problem:
    words, target, candidate, offset, offset_target, weight = packed
    n, k = len(target) // 4, len(candidate) // 4
    return Problem(
        np.frombuffer(words, np.float16).reshape(n, -1), np.frombuffer(target, np.int32),
        np.frombuffer(candidate, np.int32), np.frombuffer(offset, np.float16).reshape(n, k),
        np.frombuffer(offset_target, np.float32), float(np.frombuffer(weight, np.float64)[0]),
    )  # fmt: skip
