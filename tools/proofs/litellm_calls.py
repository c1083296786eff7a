"""Run by the interpreter that has litellm (openai_clients.py): asks by its providers, and prints what was answered."""

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for one as it is imported

import litellm


def main() -> None:
    asked = json.loads(sys.argv[1])
    messages = [{"role": "user", "content": asked["prompt"]}]
    limits: dict[str, Any] = {"max_tokens": asked["max_tokens"], "temperature": asked["temperature"]}
    openai: dict[str, Any] = {"api_base": asked["openai_url"], "api_key": "none", **limits}
    triton: dict[str, Any] = {"model": "triton/ensemble", "api_base": asked["generate_url"], "messages": messages}
    triton |= {**limits, "allowed_openai_params": ["temperature"]}
    model = f"openai/{asked['model']}"
    answers = {
        "openai/ chat": litellm.completion(model=model, messages=messages, **openai).choices[0].message.content,
        "openai/ chat, streamed": joined(litellm.completion(model=model, messages=messages, stream=True, **openai)),
        "openai/ completion": litellm.text_completion(
            model=f"text-completion-openai/{asked['model']}", prompt=asked["prompt"], **openai
        )
        .choices[0]
        .text,
        "triton/ generate": litellm.completion(**triton).choices[0].message.content,
        "triton/ generate, streamed": joined(litellm.completion(**triton, stream=True)),
    }
    try:
        litellm.completion(model="openai/another", messages=messages, max_retries=0, **openai)
        error = "none"
    except Exception as caught:
        error = type(caught).__name__
    print(json.dumps({"answers": answers, "error": error}))


def joined(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


if __name__ == "__main__":
    main()
