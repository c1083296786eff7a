"""The default split of layers, judged by what steps of the places take by rates that were measured on GPUs."""

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from ensemble.config import DecodeConfig, PrefillConfig, StageConfig
from ensemble.models.layer_split import split_layers
from ensemble.models.spec import ModelSpec, load_model_spec
from ensemble.scheduling.estimator import StepShape
from tools.simulation.costs import GPUS, ModelSize, model_size, step_s

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-2-13B": LLAMA
    | {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40, "max_position_embeddings": 4096},
    "LLaMA-3-8B": LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "OPT-1.3B": {"architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 50272, "hidden_size": 2048}
    | {"ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "max_position_embeddings": 2048},
}
PROMPT, ROWS = StepShape.of([(0, 2048)], []), StepShape.of([], [544] * 64)


@pytest.fixture(params=MODELS)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[request.param]))
    return load_model_spec(tmp_path)


def slowest_s(spec: ModelSpec, counts: list[int], shape: StepShape, gpu: str) -> float:
    """Seconds of a step at the slowest place; of a prompt's tokens one passes the output projection."""
    whole = model_size(spec)
    head = spec.vocab_size * spec.hidden_size

    def part(num_layers: int, num_weights: int) -> ModelSize:
        return ModelSize(
            num_layers, whole.hidden_size, whole.num_heads, whole.num_kv_heads, whole.head_dim, num_weights, 2
        )

    layer = (whole.num_weights - head) // spec.num_layers
    of_head = StepShape(num_rows=shape.num_rows or 1)
    of_places = [step_s(part(count, count * layer), GPUS[gpu], shape, 1) for count in counts]
    of_places[-1] += step_s(part(0, head), GPUS[gpu], of_head, 1) - GPUS[gpu].launch_s
    return max(of_places)


@pytest.mark.parametrize("num_places", [2, 3])
@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_no_split_is_much_faster_than_the_default(spec: ModelSpec, gpu: str, num_places: int) -> None:
    devices = ["cpu"] * num_places
    sides: list[tuple[StageConfig, StepShape]] = [
        (PrefillConfig(pp=num_places, devices=devices), PROMPT),
        (DecodeConfig(pp=num_places, devices=devices), ROWS),
    ]
    for stage, shape in sides:
        chosen = [len(layers) for layers in split_layers(spec, stage)]
        splits = [[0, *cut, spec.num_layers] for cut in combinations(range(1, spec.num_layers), num_places - 1)]
        best = min(slowest_s(spec, [end - start for start, end in pairwise(each)], shape, gpu) for each in splits)
        assert slowest_s(spec, chosen, shape, gpu) <= 1.02 * best


def test_a_large_vocabulary_costs_decode_layers_and_prefill_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["LLaMA-3-8B"]))
    spec, devices = load_model_spec(tmp_path), ["cpu"] * 2
    assert split_layers(spec, PrefillConfig(pp=2, devices=devices)) == [range(16), range(16, 32)]
    assert split_layers(spec, DecodeConfig(pp=2, devices=devices)) == [range(17), range(17, 32)]
