"""The steps of a replica that have been launched and whose tokens have not been read, in the order of their launch.

On a GPU one is launched before the tokens of the one before are read; in a pipeline there are as many as places.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ensemble.engine.batch import Batch
from ensemble.engine.engine import Engine, Launched
from ensemble.replicas.followers import Followers
from ensemble.request import Sequence, TokenLogProbs
from ensemble.scheduling.estimator import StepShape, TimedStep
from ensemble.scheduling.placement import NUM_MEAN_STEPS


@dataclass(frozen=True, slots=True)
class Step:
    launched: Launched
    batch_ids: list[int]  # of prompts, that have run to their ends with it
    shape: StepShape
    began: float

    @property
    def sequences(self) -> list[Sequence]:
        batch = self.launched.batch
        return [row.sequence for row in batch.prefills] + batch.decodes

    @property
    def finished_prompts(self) -> list[Sequence]:
        return [row.sequence for row in self.launched.batch.prefills if row.finishes_prompt]


class LaunchedSteps:
    """Launches them, has them run by the followers too, and commits them."""

    def __init__(
        self,
        engine: Engine,
        followers: Followers | None,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._followers = followers
        self._clock = clock
        self._steps: deque[Step] = deque()
        self._num_committed = 0
        self._committed_at = 0.0  # the last one
        self.request_ids: set[int] = set()  # of all these
        self.mean_context_len = 0.0  # of the sequences of the last step that had any
        self.last_s: deque[float] = deque(maxlen=NUM_MEAN_STEPS - 1)  # seconds of the last steps with sequences

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def num_places(self) -> int:
        """Of the pipeline: as many steps are in flight, a sequence in one of them. 1: there is none."""
        return self._engine.max_num_unread + 1 if self._engine.is_pipeline else 1

    @property
    def next_is_done(self) -> bool:
        """Whether the first has run."""
        return self._steps[0].launched.handle.is_done

    @property
    def shapes(self) -> list[StepShape]:
        return [step.shape for step in self._steps]

    def launch(self, batch: Batch, batch_ids: list[int]) -> Step:
        shape = StepShape.of(
            [(row.start, row.length) for row in batch.prefills], [sequence.num_tokens for sequence in batch.decodes]
        )
        if batch.decodes:
            self.mean_context_len = shape.num_row_keys / shape.num_rows
        began = self._clock()
        if self._followers is not None:
            self._followers.run(batch, self._num_committed)
        step = Step(self._engine.launch(batch), batch_ids, shape, began)
        self._steps.append(step)
        self.request_ids.update(each.request_id for each in step.sequences)
        return step

    def commit(self) -> tuple[Step, list[Sequence], TimedStep]:
        """The first of them; the sequences that have got a token by it, and the seconds it took."""
        step = self._steps.popleft()
        self.request_ids = {each.request_id for left in self._steps for each in left.sequences}
        sampled = self._engine.commit(step.launched, self._log_probs_of(step))
        self._num_committed += 1
        now = self._clock()
        # Steps that follow one another take what lies between their ends: the host's part of the next is hidden. One
        # that follows none passes all places of a pipeline meanwhile, and what it takes at each is a share of that.
        timed = TimedStep(step.shape, min((now - step.began) / self.num_places, now - self._committed_at))
        self._committed_at = now
        if step.shape.num_rows:
            self.last_s.append(timed.seconds)
        return step, sampled, timed

    def forget(self, request_id: int) -> None:
        """A sequence that none of these has, and no other will have."""
        if self._followers is not None:
            self._followers.forget(request_id)

    def _log_probs_of(self, step: Step) -> Callable[[], dict[int, TokenLogProbs]] | None:
        """Where the last place of a pipeline samples, it has the log-probabilities too."""
        followers, number = self._followers, self._num_committed
        if followers is None or not self._engine.is_pipeline:
            return None
        is_asked = any(each.sampling.num_logprobs is not None for each in step.launched.batch.sampled)
        return lambda: followers.log_probs(number) if is_asked else {}
