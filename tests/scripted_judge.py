"""A fake judge: a real HTTP server on loopback that gives scripted replies in the format of OpenAI's chat completions."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ScriptedJudge:
    """Replies with what `reply(prompt)` gives: a text, an HTTP status to fail with, or a body's bytes. Keeps what was asked."""

    def __init__(self, reply: Callable[[str], str | int | bytes]) -> None:
        self.reply = reply
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge._lock:
                    judge.requests.append(request)
                    judge.keys.append(self.headers["Authorization"])
                    said = judge.reply(request["messages"][-1]["content"])
                if isinstance(said, int):
                    self.answer(said, {"error": {"message": f"scripted failure {said}", "type": "scripted"}})
                    return
                if isinstance(said, bytes):
                    self.send(200, said)
                    return
                message = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
                self.answer(
                    200,
                    {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [message]},
                )

            def answer(self, status, body):
                self.send(status, json.dumps(body).encode())

            def send(self, status, content):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Retry-After-Ms", "1")  # the client waits no longer than it is told
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@contextmanager
def scripted_judge(reply: Callable[[str], str | int | bytes]):
    """A scripted judge that serves while the block runs."""
    judge = ScriptedJudge(reply)
    thread = threading.Thread(target=judge.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.server.shutdown()
        judge.server.server_close()
        thread.join()
