"""A conversation of several turns with a running server, and what KVortex did for it.

    vllm serve MODEL --kv-transfer-config "$(kvortex config --ram-pool-gb 32)"
    python chat.py http://localhost:8000 --turns 3

Each turn sends the whole conversation so far, as chat clients do: all of it but the last question
is a prefix that the server has seen.
"""

from __future__ import annotations

import argparse
import time

from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletionMessageParam

QUESTION = "Tell me more about number {number}, in one sentence."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the server, like http://localhost:8000")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    try:
        converse(arguments)
    except OpenAIError as error:  # nobody is there, or the model has no chat template
        raise SystemExit(f"{arguments.url}: {error}") from None


def converse(arguments: argparse.Namespace) -> None:
    client = OpenAI(base_url=f"{arguments.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    conversation: list[ChatCompletionMessageParam] = []
    for number in range(1, arguments.turns + 1):
        conversation.append({"role": "user", "content": QUESTION.format(number=number)})
        began = time.perf_counter()
        answer = client.chat.completions.create(
            model=model,
            messages=conversation,
            max_tokens=arguments.max_tokens,
            temperature=0,
            extra_body={"kv_transfer_params": {"explain": True}},
        )
        took = time.perf_counter() - began
        conversation.append({"role": "assistant", "content": answer.choices[0].message.content})
        told = (answer.model_extra or {}).get("kv_transfer_params") or {}
        print(f"turn {number}: {took:.2f} s, {told.get('kvortex', 'the server has no KVortex')}")


if __name__ == "__main__":
    main()
