"""What replicas of a model take on the GPUs of a cluster, for every pair of degrees."""

from dataclasses import dataclass
from statistics import median

import msgspec

from ensemble.models.spec import ModelSpec
from tools.planning.phases import Phase
from tools.planning.search import Cluster
from tools.simulation.costs import Costs, Gpu, costs_by_rates, kv_tokens, model_size, step_s
from tools.simulation.noise import SENDERS

UTILIZATION = 0.9
MIN_KV_TOKENS = 2048  # a model that leaves less room does not fit


@dataclass(frozen=True, slots=True)
class ReplicaCosts:
    """`budget`: prompt tokens of a step. `measured`: of one GPU; None: all is predicted from the GPU's rates."""

    spec: ModelSpec
    gpu: Gpu
    cluster: Cluster
    budget: int
    measured: Costs | None = None
    endpoint: str = "ensemble"  # that clients ask

    def of(self, tp: int, pp: int = 1) -> Costs | None:
        """Steps of the whole model on tp GPUs, KV of tp x pp; None: the model does not fit these."""
        size = model_size(self.spec)
        num_kv_tokens = kv_tokens(size, self.gpu, tp * pp, UTILIZATION)
        if num_kv_tokens < MIN_KV_TOKENS:
            return None
        predicted = costs_by_rates(size, self.gpu, tp, num_kv_tokens, self.budget, self.spec.max_model_len)
        found = msgspec.structs.replace(predicted, num_senders=SENDERS[self.endpoint])
        if self.measured is None:
            return found
        if tp == pp == 1:
            return msgspec.structs.replace(
                self.measured,
                num_kv_tokens=num_kv_tokens,
                step_ratios=found.step_ratios,
                out_s=found.out_s,
                response_s=found.response_s,
                num_senders=found.num_senders,
            )
        ratios = [step.seconds / step_s(size, self.gpu, step.shape, 1) for step in self.measured.steps]
        return found.scaled(median(ratios))

    def phase(self, tp: int, pp: int) -> Phase | None:
        """The same for the search; None: the model does not fit."""
        costs = self.of(tp, pp)
        return None if costs is None else Phase(tp, pp, costs.times, costs.num_kv_tokens)

    def of_a_place(self, tp: int, pp: int) -> Costs:
        """Of a replica that fits, by what a place of its pipeline takes."""
        costs = self.of(tp, pp)
        assert costs is not None, "it fits"
        return costs.scaled(1 / pp)

    def handoff_s(self, affinity: str, prompt_len: int) -> float:
        rate = self.gpu.link_rate if affinity == "low" else min(self.gpu.link_rate, self.cluster.network_rate)
        return model_size(self.spec).kv_token_bytes * prompt_len / (0.8 * rate)
