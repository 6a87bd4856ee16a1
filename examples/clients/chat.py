"""Two chat requests with OpenAI's client: one answered whole, one as a stream.

Needs:   pip install openai (comes with SGLang); a server. Nothing of this package.
Prints:  the answer and the tokens it took; then another answer, word by word.
Hangs:   curl URL/health must answer; a proxy from the environment may stand between (NO_PROXY).

Usage:   python chat.py [URL] [PROMPT]
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str = "http://127.0.0.1:30000", prompt: str = "Why is the sky blue?") -> None:
    """Ask twice."""
    # SGLang serves one model; any key does unless the server has --api-key.
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": prompt}]

    whole = client.chat.completions.create(
        model=model, messages=messages, max_tokens=64, temperature=0
    )
    print(whole.choices[0].message.content)
    assert whole.usage is not None
    print(f"({whole.usage.prompt_tokens} tokens in, {whole.usage.completion_tokens} out)")

    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=64, temperature=0, stream=True
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
