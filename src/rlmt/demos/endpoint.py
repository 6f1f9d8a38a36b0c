"""An OpenAI-compatible endpoint on this machine that answers by rule, as a teacher and as a judge.

`python -m rlmt.demos.endpoint PORT`. With it, runs that ask a teacher or a judge work without a network; the answers
have the right form, and no meaning.
"""

from __future__ import annotations

import json
import re
import sys
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_WORDS = [
    "first",
    "take",
    "a",
    "look",
    "at",
    "the",
    "question",
    "then",
    "gather",
    "ideas",
    "weigh",
    "them",
    "and",
    "write",
    "it",
    "down",
    "in",
    "a",
    "few",
    "clear",
    "words",
]


_TRAITS = [
    "Gathers ideas: The thought collects ideas before it chooses among them.",
    "Weighs options: The thought compares two ways to answer.",
    "Checks the draft: The thought reads its answer again.",
]


def answer(messages: list[dict[str, str]]) -> str:
    """Returns a demonstration, a list of planning traits or a verdict, as the last message asks for.

    A verdict has the form of every benchmark and of `rlmt traits`. The same messages have the same answer.

    Args:
        messages: The messages of the request.
    """
    text = messages[-1]["content"]
    seed = blake2b(json.dumps(messages).encode(), digest_size=8).digest()
    if "</think>" in text:
        words = [_WORDS[byte % len(_WORDS)] for byte in seed]
        return f"<think>\n{' '.join(words)}\n</think>\n\n{' '.join(reversed(words[:4]))}"
    if "End with a list" in text:
        return "\n".join(f"- {trait}" for trait in _TRAITS)
    winner, loser = "AB" if seed[0] % 2 else "BA"
    ranks = [{"model": winner, "rank": 1}, {"model": loser, "rank": 2}]
    criteria = re.findall(r"^- (.+)$", text, re.MULTILINE)
    scores = [f"{name}: {seed[number % len(seed)] % 21}" for number, name in enumerate(criteria)]
    verdict = json.dumps({"choice": f"{winner}+", "output": ranks})
    more = ("A", "B", "tie")[seed[1] % 3]
    return "\n".join([verdict, f"[[{winner}>{loser}]]", "[Scores]", *scores, f"More: {more}"])


class _Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # noqa: N802, D102 - named by http.server
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = answer(body["messages"])
        usage = {"prompt_tokens": sum(len(each["content"].split()) for each in body["messages"])}
        usage |= {"completion_tokens": len(text.split()), "total_tokens": usage["prompt_tokens"] + len(text.split())}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        reply = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
        content = json.dumps(reply | {"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:  # noqa: D102 - prints nothing
        pass


def make_server(port: int) -> ThreadingHTTPServer:
    """Returns the server, bound to 127.0.0.1.

    Args:
        port: Its port; 0 chooses a free one.
    """
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads = True
    return server


if __name__ == "__main__":
    with make_server(int(sys.argv[1])) as endpoint:
        print(f"ready: http://127.0.0.1:{endpoint.server_port}/v1", flush=True)
        endpoint.serve_forever()
