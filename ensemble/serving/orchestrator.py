"""The life of a request, from the queue to its last token. One thread owns all state and takes all decisions.

    submit -> queued -> prefill -> bridge -> decode -> finished          (PrefillScheduler, DecodeAdmission)
                |          |          |         |
                +----------+----------+---------+--> cancelled or failed, in every state

Everything else (calls into the stages, event polls, sends to clients) happens on other threads, which report back by
putting a function into the inbox.
"""

import contextlib
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import msgspec

from ensemble.cache.prefix_cache import block_hashes
from ensemble.config import Deployment
from ensemble.errors import (
    Cancelled,
    DeadlineExceeded,
    DistServeError,
    ErrorCode,
    InternalError,
    InvalidRequest,
    StageUnavailable,
)
from ensemble.request import FinishReason, Request, TokenLogProbs
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.deadlines import Deadlines
from ensemble.scheduling.estimates import OutputEstimate
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import Limits, PrefillScheduler
from ensemble.scheduling.prefix_index import PrefixIndex
from ensemble.serving.metrics import Ended, Gauges, Labels
from ensemble.serving.replicas import Replicas
from ensemble.serving.stage_calls import MAX_BATCHES_IN_FLIGHT, CallModel, StageCalls, StageName
from ensemble.serving.streams import ClientStream, SenderPool
from ensemble.workers.messages import (
    AttachPeer,
    CancelRequests,
    Command,
    Detached,
    DetachPeer,
    Joined,
    LocalPrefilled,
    PrefillAnswer,
    PrefillResult,
    PrefixReport,
    Released,
    ReplicaDown,
    ReplicaUp,
    Reserved,
    StepTokens,
    SwapReport,
    WorkerEvent,
)

# A decode replica launches a step before it reads the one before, and answers that one then: with three it never waits.
MAX_LOCAL_BATCHES_IN_FLIGHT = 3
MAX_STRANDED_S = 30.0  # what waits in the bridge gives a dead decode stage this long to come back
BY_CLIENT = "the client cancelled the request"


class Orchestrator:
    """`submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        deployment: Deployment,
        call_model: CallModel,
        senders: SenderPool,
        on_ended: Callable[[Ended], None] = lambda ended: None,
    ) -> None:
        self._senders = senders
        self._on_ended = on_ended
        num_replicas: dict[StageName, int] = {
            "prefill": deployment.prefill.num_replicas,
            "decode": deployment.decode.num_replicas,
        }
        self._replicas = Replicas(num_replicas)
        self._prefixes = PrefixIndex(deployment.block_size) if deployment.prefill.prefix_cache else None
        self._hashes: dict[int, list[bytes]] = {}  # request_id |-> of its prompt's blocks
        self.prefill = PrefillScheduler(
            block_size=deployment.block_size,
            max_num_batched_tokens=deployment.prefill.max_num_batched_tokens,
            max_num_seqs=deployment.prefill.max_num_seqs,
            max_batches_in_flight=MAX_BATCHES_IN_FLIGHT,
            max_queue_requests=deployment.scheduler.max_queue_requests,
            max_queue_tokens=deployment.scheduler.max_queue_tokens,
            policy=QueuePolicy(
                deployment.scheduler.policy,
                deployment.scheduler.max_wait_s,
                deployment.scheduler.aging_s,
                deployment.scheduler.ttft_target_s,
            ),
            max_long_tokens=deployment.prefill.max_long_tokens,
            num_cached_tokens=self._num_cached_tokens,
        )
        # To the prefill scheduler, decode replicas that compute prompts too come after the prefill replicas.
        self._first_local = deployment.prefill.num_replicas
        self._local_limits = None
        if deployment.local_prefill_tokens:
            self._local_limits = Limits(
                deployment.local_prefill_tokens,
                MAX_LOCAL_BATCHES_IN_FLIGHT,
                deployment.max_local_prompt_len,
                is_decoding=True,
            )
        self._output_estimate = OutputEstimate()
        self.admission = DecodeAdmission(
            block_size=deployment.block_size,
            max_num_bridge_seqs=deployment.prefill.max_num_bridge_seqs,
            expected_kv_tokens=self._output_estimate.num_kv_tokens,
            watermark=deployment.decode.watermark,
        )
        self._stranded_at: float | None = None  # when the bridge gives up waiting for a decode replica
        self._stranded_reason = ""
        self._streams: dict[int, ClientStream] = {}  # request_id |-> live request
        self._unanswered: dict[int, ClientStream] = {}  # request_id |-> one with all its tokens, which are being sent
        self._deadlines = Deadlines()  # by time.monotonic()
        self._totals: Counter[tuple[str, Labels]] = Counter()  # of what the workers counted
        self._early: list[tuple[Request, ClientStream]] = []  # came before the stages reported for the first time
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._calls = StageCalls(call_model, num_replicas, self)
        self._thread = threading.Thread(target=self._run, name="orchestrator", daemon=True)
        self._thread.start()

    # ---- from any thread

    def submit(self, request: Request, stream: ClientStream) -> None:
        self._inbox.put(lambda: self._arrive(request, stream))

    def cancel(self, request_id: int) -> None:
        """Ends a request wherever it is; its client gets CANCELLED."""
        self._inbox.put(lambda: self._cancel(request_id))

    def answered(self, request_id: int) -> None:
        """Ends a request whose last response was sent, after its last token or a stop string."""
        self._inbox.put(lambda: self._answered(request_id))

    def prefilled(self, replica: int, answer: PrefillAnswer) -> None:
        self._inbox.put(lambda: self._on_prefilled(replica, answer))

    def events(self, stage: StageName, replica: int, events: list[WorkerEvent]) -> None:
        self._inbox.put(lambda: self._on_events(stage, replica, events))

    def lost(self, stage: StageName, replica: int, epoch: int, reason: str) -> None:
        self._inbox.put(lambda: self._replica_down(stage, replica, epoch, reason))

    def live_streams(self) -> list[ClientStream]:
        return list(self._streams.copy().values())

    def gauges(self) -> Gauges:
        """What is the case now, for the metrics; empty if the orchestrator is too busy to tell within a second."""
        answer: queue.SimpleQueue[Gauges] = queue.SimpleQueue()
        self._inbox.put(lambda: answer.put(self._gauges()))
        try:
            return answer.get(timeout=1.0)
        except queue.Empty:
            return {}

    def close(self) -> None:
        """Ends every request with an error, then the threads."""
        self._closing.set()
        self._inbox.put(lambda: self._fail_all(StageUnavailable("scheduler", "the server is stopping")))
        self._thread.join(timeout=2.0)
        self._calls.close()

    # ---- the orchestrator's thread

    def _run(self) -> None:
        while not (self._closing.is_set() and self._inbox.empty()):
            next_deadline = self._deadlines.next
            timeout_s = 1.0 if next_deadline is None else min(1.0, max(0.0, next_deadline - time.monotonic()))
            work: list[Callable[[], None]] = [self._expire, self._dispatch]
            with contextlib.suppress(queue.Empty):
                work = [self._inbox.get(timeout=timeout_s), *work]
                while not self._inbox.empty():
                    work.insert(-2, self._inbox.get())
            for each in work:
                try:
                    each()
                except Exception:  # a fault of ours; all others' requests depend on this thread
                    traceback.print_exc()

    def _expire(self) -> None:
        """Requests whose time is up leave at once, wherever they are."""
        if self._stranded_at is not None and time.monotonic() > self._stranded_at:
            self._fail_stranded(StageUnavailable("decode", self._stranded_reason), is_queued_only=False)
        for request_id in self._deadlines.take_expired(time.monotonic()):
            self._totals["distserve:deadline_exceeded_total", ()] += 1
            self._fail(request_id, DeadlineExceeded("deadline exceeded: the request's timeout_ms has passed"))

    def _dispatch(self) -> None:
        """Everything that can start now, starts: first what has waited in the bridge."""
        while submission := self.admission.next_submission():
            now = time.time_ns()
            for handoff in submission.handoffs:
                timeline = self._streams[handoff.request.request_id].timeline
                timeline.decode_submitted_ns, timeline.decode_replica = now, submission.replica
            self._send("decode", submission)
        while batch := self.prefill.next_batch(time.monotonic(), self._may_start):
            now = time.time_ns()
            is_local = batch.replica >= self._first_local
            for chunk in batch.chunks:
                if chunk.request is not None:
                    timeline = self._streams[chunk.request_id].timeline
                    timeline.first_scheduled_ns = now
                    timeline.prefill_replica = -1 if is_local else batch.replica
                    if is_local:
                        timeline.decode_replica = batch.replica - self._first_local
            if is_local:
                self._send("decode", msgspec.structs.replace(batch, replica=batch.replica - self._first_local))
            else:
                self._send("prefill", batch)

    def _may_start(self, replica: int, request: Request) -> bool:
        if replica >= self._first_local:
            return self.admission.try_start_at(replica - self._first_local, request)
        return self.admission.try_promise(request)

    def _arrive(self, request: Request, stream: ClientStream) -> None:
        missing = self._replicas.missing_stage()
        if missing is not None:
            stage, reason = missing
            if reason is None:
                self._early.append((request, stream))
            else:
                self._refuse(stream, StageUnavailable(stage, reason))
            return
        try:
            self.admission.check(request)
            self.prefill.add(request, time.monotonic(), self._with_cached_tokens(request, stream.hints))
        except DistServeError as error:
            self._hashes.pop(request.request_id, None)
            self._refuse(stream, error)
        else:
            self._streams[request.request_id] = stream
            if stream.deadline is not None:
                self._deadlines.add(request.request_id, stream.deadline)

    def _with_cached_tokens(self, request: Request, hints: Hints) -> Hints:
        if self._prefixes is None:
            return hints
        hashes = block_hashes(request.prompt_token_ids, self._prefixes.block_size)
        self._hashes[request.request_id] = hashes
        return replace(hints, num_cached_tokens=self._prefixes.best(hashes, request.prompt_len))

    def _num_cached_tokens(self, replica: int, request: Request) -> int:
        if self._prefixes is None:
            return 0
        return self._prefixes.num_cached_tokens(replica, self._hashes[request.request_id], request.prompt_len)

    def _on_events(self, stage: StageName, replica: int, events: list[WorkerEvent]) -> None:
        for event in events:
            known = self._replicas.get(stage, replica)
            if known is not None and isinstance(event, Reserved | LocalPrefilled | StepTokens | Released):
                known.num_free_blocks = event.num_free_blocks
            match event:
                case StepTokens():
                    self._on_tokens(event)
                case Released(request_ids=request_ids):
                    if stage == "prefill":
                        self.prefill.released(replica, request_ids)
                    else:
                        self.admission.released(replica, request_ids)
                        self.prefill.released(self._first_local + replica, request_ids)
                case Reserved():
                    pass
                case LocalPrefilled(batch_ids=batch_ids, results=results):
                    for batch_id in batch_ids:
                        self.prefill.batch_done(self._first_local + replica, batch_id)
                    self._on_results(results)
                case Joined():
                    self._on_joined(event)
                case SwapReport():
                    self._on_swaps(replica, event)
                case PrefixReport():
                    self._on_prefixes(replica, event)
                case Detached(address=address):
                    self._start_prefill(self._replicas.detached(address, replica))
                case ReplicaUp():
                    self._replica_up(stage, event)
                case ReplicaDown(epoch=epoch, reason=reason):
                    self._replica_down(stage, replica, epoch, reason)
                case _:
                    raise InternalError(f"{stage} replica {replica} sent {type(event).__name__}")

    def _on_prefilled(self, replica: int, answer: PrefillAnswer) -> None:
        self.prefill.batch_done(replica, answer.batch_id)
        self._on_results(answer.results)

    def _on_results(self, results: list[PrefillResult]) -> None:
        for result in results:
            if result.request_id not in self._streams:
                continue  # cancelled meanwhile: the replica was told and ends the lease
            self._streams[result.request_id].timeline.first_token_ns = time.time_ns()
            if result.handoff is None:
                self.admission.withdraw(result.request_id)
            else:
                self.admission.arrive(result.handoff)
            self._emit(result.request_id, result.token_id, result.finish_reason, result.log_probs)

    def _on_tokens(self, step: StepTokens) -> None:
        for request_id, token_id in zip(step.request_ids, step.token_ids, strict=True):
            if request_id in self._streams:
                finish_reason = step.finished.get(request_id)
                self._emit(request_id, token_id, finish_reason, step.log_probs.get(request_id))

    def _on_joined(self, joined: Joined) -> None:
        now = time.time_ns()
        for request_id, seconds, num_bytes in zip(
            joined.request_ids, joined.transfer_s, joined.transfer_bytes, strict=True
        ):
            if request_id in self._streams:
                timeline = self._streams[request_id].timeline
                timeline.decode_joined_ns = now
                timeline.kv_transfer_ns, timeline.kv_transfer_bytes = int(seconds * 1e9), num_bytes

    def _on_swaps(self, replica: int, report: SwapReport) -> None:
        known = self._replicas.get("decode", replica)
        if known is not None:
            known.num_swapped_seqs = report.num_swapped_seqs
        self._totals["vllm:num_preemptions_total", ()] += report.num_preemptions
        for direction, num_bytes in (("out", report.bytes_out), ("in", report.bytes_in)):
            self._totals["distserve:swap_bytes_total", (("direction", direction),)] += num_bytes

    def _on_prefixes(self, replica: int, report: PrefixReport) -> None:
        if self._prefixes is not None and self._replicas.get("prefill", replica) is not None:
            self._prefixes.update(replica, report.stored, report.evicted)
        self._totals["vllm:prefix_cache_queries_total", ()] += report.num_queried_tokens
        self._totals["vllm:prefix_cache_hits_total", ()] += report.num_hit_tokens

    def _emit(
        self, request_id: int, token_id: int, finish_reason: FinishReason | None, log_probs: TokenLogProbs | None
    ) -> None:
        stream = self._streams[request_id]
        self.prefill.charge(stream.hints.tenant, 1)
        if finish_reason is not None:
            stream.timeline.last_token_ns = time.time_ns()
            self._unanswered[request_id] = self._streams.pop(request_id)
            self._deadlines.remove(request_id)
            self._hashes.pop(request_id, None)
        self._senders.push(stream, token_id, finish_reason, log_probs)

    def _refuse(self, stream: ClientStream, error: DistServeError) -> None:
        self._senders.fail(stream, error)
        self._ended(stream, error.code, is_error=True)

    def _ended(self, stream: ClientStream, outcome: FinishReason | ErrorCode, is_error: bool) -> None:
        num_tokens = stream.num_prompt_tokens, stream.num_output_tokens
        self._on_ended(Ended(stream.timeline, *num_tokens, outcome, is_error, stream.targets))

    def _fail(self, request_id: int, error: DistServeError) -> None:
        """Ends a live request with an error, wherever it is, and has its blocks freed."""
        stream = self._withdraw(request_id)
        if stream is not None:
            self._refuse(stream, error)

    def _cancel(self, request_id: int) -> None:
        live = self._streams.get(request_id) or self._unanswered.get(request_id)
        if live is not None and live.is_answered:
            return  # the client has what it wanted, and closed before we were told
        for early in self._early:
            if early[0].request_id == request_id:
                self._early.remove(early)
                self._refuse(early[1], Cancelled(BY_CLIENT))
                return
        stream = self._withdraw(request_id) or self._unanswered.pop(request_id, None)
        if stream is not None:
            self._refuse(stream, Cancelled(BY_CLIENT))

    def _answered(self, request_id: int) -> None:
        stream = self._withdraw(request_id) or self._unanswered.pop(request_id, None)
        if stream is not None and stream.finish_reason is not None:
            stream.num_output_tokens = stream.num_sent_tokens
            self._output_estimate.observe(stream.request, stream.num_output_tokens)
            self._ended(stream, stream.finish_reason, is_error=False)

    def _withdraw(self, request_id: int) -> ClientStream | None:
        """Takes a live request out, wherever it is, and has its blocks freed; None if it has ended already."""
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return None
        self._deadlines.remove(request_id)
        self._hashes.pop(request_id, None)
        where = self.admission.cancel(request_id)
        if where is not None and where[0] == "decode":
            self.prefill.cancel(request_id)  # chunks of a prompt that is computed there
            self._send("decode", CancelRequests(replica=where[1], request_ids=[request_id]))
        else:
            self._cancel_prefill(request_id)
        return stream

    def _cancel_prefill(self, request_id: int) -> None:
        """Ends what the request still holds at a prefill replica, if anything."""
        replica = self.prefill.cancel(request_id)
        if isinstance(replica, int):
            self._send("prefill", CancelRequests(replica=replica, request_ids=[request_id]))

    def _fail_all(self, error: DistServeError) -> None:
        for request_id in list(self._streams):
            self._fail(request_id, error)
        early, self._early = self._early, []
        for _, stream in early:
            self._refuse(stream, error)

    def _gauges(self) -> Gauges:
        return {
            ("vllm:num_requests_waiting", ()): self.prefill.num_waiting,
            ("vllm:num_requests_running", ()): len(self._streams) - self.prefill.num_waiting,
            ("distserve:num_requests_bridge", ()): self.admission.num_bridge_seqs,
            **dict(self._replicas.gauges()),
            **self._totals,
        }

    def _replica_up(self, stage: StageName, up: ReplicaUp) -> None:
        self._replicas.up(stage, up)
        if stage == "decode":
            self._stranded_at = None
        if stage == "prefill":
            for request_id in self.prefill.replica_up(up.replica, up.num_blocks):
                self._fail(request_id, InvalidRequest("text_input", "prompt", "no prefill pool holds it"))
        else:
            self.admission.replica_up(up.replica, up.num_blocks, up.max_num_seqs, up.num_host_blocks)
            if self._local_limits is not None:
                place = self._first_local + up.replica
                refused = self.prefill.replica_up(place, up.num_blocks, self._local_limits, up.num_host_blocks)
                for request_id in refused:
                    self._fail(request_id, InvalidRequest("text_input", "prompt", "no pool holds it"))
        if stage == "prefill":
            for index in self._replicas.of_stage("decode"):
                self._send("decode", AttachPeer(replica=index, address=up.peer_address))
        else:
            for other in self._replicas.of_stage("prefill").values():
                self._send("decode", AttachPeer(replica=up.replica, address=other.peer_address))
        early, self._early = self._early, []
        for request, stream in early:
            self._arrive(request, stream)

    def _replica_down(self, stage: StageName, replica: int, epoch: int, reason: str) -> None:
        dead = self._replicas.down(stage, replica, epoch, reason)
        if dead is None:
            return
        if stage == "prefill":
            readers = self._replicas.detach(dead.peer_address, replica)
            for index in readers:
                self._send("decode", DetachPeer(replica=index, address=dead.peer_address))
            self._start_prefill(None if readers else replica)
        else:
            for prefill_replica in self._replicas.reader_down(replica):
                self._start_prefill(prefill_replica)
        if stage == "prefill" and self._prefixes is not None:
            self._prefixes.replica_down(replica)
        error = StageUnavailable(stage, reason)
        lost = (self.prefill if stage == "prefill" else self.admission).replica_down(replica)
        if stage == "decode":
            self.prefill.replica_down(self._first_local + replica)
        for request_id in lost:
            stream = self._streams.get(request_id)
            if stage == "prefill" and stream is not None and stream.timeline.decode_joined_ns:
                continue  # its KV has arrived in decode; only the end of its lease was still to be told
            self._fail(request_id, error)
            if stage == "decode":
                self._cancel_prefill(request_id)  # also of a cancelled request, whose reader is dead now
        if not self._replicas.of_stage(stage):
            self._fail_stranded(error, is_queued_only=True)
            if stage == "decode":
                self._stranded_at, self._stranded_reason = time.monotonic() + MAX_STRANDED_S, reason

    def _fail_stranded(self, error: DistServeError, is_queued_only: bool) -> None:
        """Ends what needs a stage without a live replica: the queue at once, the bridge after MAX_STRANDED_S."""
        self._stranded_at = None
        for stream in self.live_streams():
            if not (is_queued_only and stream.timeline.first_scheduled_ns):
                self._fail(stream.request_id, error)

    def _start_prefill(self, replica: int | None) -> None:
        """The next life of a dead prefill worker may begin: nobody maps its pool any more."""
        if replica is not None:
            self._calls.start_worker(replica)

    def _send(self, stage: StageName, command: Command) -> None:
        numbered = self._replicas.numbered(stage, command)
        if numbered is not None:  # else it went down: its requests have been failed
            self._calls.send(stage, numbered)
