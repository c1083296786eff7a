"""How a replica fills its steps and its memory."""

from dataclasses import dataclass, field

from ensemble.config import Admission, Batching, Deployment, StageName
from ensemble.scheduling.decode_policies import DecodePolicySettings


@dataclass(frozen=True, slots=True)
class LoopSettings:
    max_num_prompt_tokens: int  # in a step of prompts alone
    max_num_prompt_tokens_beside: int  # in a step with running sequences
    max_num_seqs: int  # running, in a step
    policy: DecodePolicySettings = field(default_factory=DecodePolicySettings)
    batching: Batching = "mixed"
    admission: Admission = "reserved"
    headroom_blocks: int = 0
    host_kv_bytes: int = 0
    prefix_cache: bool = False
    itl_target_s: float | None = None  # of requests without one of their own
    keeps_gaps: bool = False  # that is of each gap, not of their mean
    adapts: bool = False  # how much of prompts goes beside running sequences, where none of these has a target


def loop_settings(deployment: Deployment, home: StageName) -> LoopSettings:
    decode = deployment.decode
    return LoopSettings(
        max_num_prompt_tokens=deployment.prefill.max_num_batched_tokens,
        max_num_prompt_tokens_beside=deployment.num_prompt_tokens_beside,
        max_num_seqs=deployment.stage(home).max_num_seqs,
        policy=DecodePolicySettings(decode.policy, decode.quantum_s, decode.starvation_s),
        batching=decode.batching,
        admission=decode.admission,
        headroom_blocks=decode.headroom_blocks,
        host_kv_bytes=decode.host_kv_bytes if home == "decode" else 0,
        prefix_cache=deployment.prefill.prefix_cache,
        itl_target_s=deployment.scheduler.itl_target_s,
        keeps_gaps=deployment.scheduler.keeps_gaps,
        adapts=deployment.scheduler.roles == "auto",
    )
