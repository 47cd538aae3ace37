"""Serve a folder with vLLM, ask it through the `openai` client, stop it. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time

import openai

PATIENCE = 300  # seconds until the server must answer


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args()
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", given.folder, "--served-model-name", "lowbit",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "200", "--max-num-seqs", "2",
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    with subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr, env=environment) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit("the server did not come up") from None
                    time.sleep(1)
            done = client.completions.create(
                model="lowbit",
                prompt=given.prompt,
                max_tokens=given.tokens,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            print(json.dumps({"versions": {"openai": openai.__version__}, "text": done.choices[0].text}))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
