"""transformers as the oracle of what the server says."""

from pathlib import Path

import torch


def greedy_by_transformers(
    path: Path, prompts: list[list[int]], max_tokens: int, dtype: torch.dtype
) -> list[list[int]]:
    """Each prompt's greedy continuation of exactly `max_tokens` tokens, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


class GreedyJudge:
    """Judges greedy tokens in fp32: equal up to the first where the two best log-probabilities are closer than 1e-3."""

    MARGIN = 1e-3

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def first_fault(self, prompt: list[int], output: list[int]) -> str | None:
        """None if the output is right; else what was wrong with it. One forward pass: all tokens before are equal."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        best = torch.log_softmax(logits, dim=-1).topk(2, dim=-1)
        for position, token_id in enumerate(output):
            if token_id == int(best.indices[position, 0]):
                continue
            margin = float(best.values[position, 0] - best.values[position, 1])
            if margin < self.MARGIN:
                return None
            return f"token {position} is {token_id}, not {int(best.indices[position, 0])} (margin {margin:.4f})"
        return None
