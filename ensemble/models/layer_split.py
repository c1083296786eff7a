"""Which layers each place of a pipeline has: as its stage says, or so that the slowest place is as fast as can be.

Times are predicted, for a step as the stage usually has it, from what is read and computed: every rank finds the same
split by itself, and so does who only says where the ranks are. The input embedding reads a row a token: nothing.
"""

from ensemble.config import PrefillConfig, StageConfig
from ensemble.models.spec import ModelSpec
from ensemble.parallel.shares import share_layers

# Rows whose products take as long as reading their weights, by the rates that an H100 was measured at: 690 TFLOP/s and
# 3.0 TB/s, two operations and two bytes a number. An H200 has 165, an A100 150.
_ROWS_OF_A_READ = 230
# A decode step as docs/results/parallel.json has it.
_DECODE_ROWS, _DECODE_CONTEXT = 64, 512


def split_layers(spec: ModelSpec, stage: StageConfig) -> list[range]:
    """Of each place, in order. Raises ConfigError for a split of which the model has no layers."""
    return share_layers(spec.num_layers, stage.pipeline_parallel_size, head_cost(spec, stage), stage.pipeline_layers)


def head_cost(spec: ModelSpec, stage: StageConfig) -> float:
    """What the output projection takes of a step of the stage, in layers.

    All tokens of a prompt pass the layers and one of them the projection, so it costs little there; of a decode step
    it costs what its weights are of a layer's and of the KV that a layer reads.
    """
    attention = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    mlp = (3 if spec.architecture == "llama" else 2) * spec.intermediate_size
    layer_weights = (attention + mlp) * spec.hidden_size
    head_weights = spec.vocab_size * (spec.embedding_size or spec.hidden_size)
    if isinstance(stage, PrefillConfig):
        return _numbers(head_weights, 1) / _numbers(layer_weights, stage.max_num_batched_tokens)
    rows = min(_DECODE_ROWS, stage.max_num_seqs)
    kv = rows * _DECODE_CONTEXT * 2 * spec.num_kv_heads * spec.head_dim
    return _numbers(head_weights, rows) / (_numbers(layer_weights, rows) + kv)


def _numbers(num_weights: int, rows: int) -> float:
    """What a product with weights takes, in numbers read. Near the border neither part hides the other."""
    return float(num_weights * (1 + (rows / _ROWS_OF_A_READ) ** 3) ** (1 / 3))
