"""What is the case now, for the metrics."""

from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

from ensemble.router.dispatch import Dispatch
from ensemble.router.fleet import Fleet
from ensemble.router.lives import Lives

Labels: TypeAlias = tuple[tuple[str, str], ...]
Gauges = Mapping[tuple[str, Labels], float]  # (name, labels) |-> value; of counters, the total so far
Totals: TypeAlias = Counter[tuple[str, Labels]]


def gauges(lives: Lives, fleet: Fleet, dispatch: Dispatch, totals: Totals) -> Gauges:
    levels: dict[tuple[str, Labels], float] = {
        ("vllm:num_requests_waiting", ()): dispatch.prefill.num_waiting,
        ("vllm:num_requests_running", ()): lives.num_attempts - dispatch.prefill.num_waiting,
        ("distserve:num_requests_bridge", ()): dispatch.admission.num_bridge_seqs,
        ("distserve:num_tokens_waiting", ()): dispatch.prefill.num_waiting_tokens,
        ("vllm:num_requests_swapped", ()): sum(replica.num_swapped_seqs for replica in fleet.up_ones()),
        **totals,
    }
    for result, number in dispatch.prefix_moves.results.items():
        levels["distserve:prefix_fetches_total", (("result", result),)] = number
    for replica in fleet:
        labels = (("stage", replica.home), ("replica", str(replica.id)))
        is_up, num_blocks = replica.is_up, replica.credits.num_blocks
        levels["distserve:replica_up", labels] = int(is_up)
        levels["distserve:replica_requests", labels] = replica.credits.num_requests if is_up else 0
        levels["distserve:step_prediction_error", labels] = replica.step_error
        levels["distserve:kv_blocks", labels] = num_blocks if is_up else 0
        levels["distserve:kv_blocks_free", labels] = replica.num_free_blocks if is_up else 0
        levels["vllm:kv_cache_usage_perc", labels] = 1 - replica.num_free_blocks / num_blocks if is_up else 0
        levels["distserve:host_kv_blocks", labels] = replica.num_host_blocks if is_up else 0
        levels["distserve:host_kv_blocks_free", labels] = replica.num_free_host_blocks if is_up else 0
        levels["distserve:prefix_cache_blocks", labels] = dispatch.prefixes.num_blocks(replica.id)
    for (role, state), number in Counter((replica.role, replica.state) for replica in fleet).items():
        levels["distserve:replicas", (("role", role), ("state", state))] = number
    return levels
