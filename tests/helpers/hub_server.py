"""A Hub on this machine that takes uploads: the routes huggingface_hub calls, every file inside the commit."""

import base64
import json
import threading
from http.server import ThreadingHTTPServer

from tests.helpers.json_handler import JsonHandler


class HubServer(ThreadingHTTPServer):
    """`endpoint` for HF_ENDPOINT; `files` is path -> content as the last of `commits` left them, `repos` what was made.

    Args:
        refuses: answer uploads with 403.
    """

    def __init__(self, refuses: bool = False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.repos: list[dict] = []
        self.commits = 0
        self.refuses = refuses

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(JsonHandler):
    server: HubServer

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            return self.say({"name": "user", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        return self.say({"error": "not here"}, 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.repos.append(asked)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            return self.say({"url": f"{self.server.endpoint}/{name}", "name": name})
        if self.server.refuses:
            return self.say({"error": "Forbidden: the token may not write."}, 403)
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.say({"files": files})
        if "/commit/" in self.path:
            self.server.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            name = self.path.removeprefix("/api/models/").split("/commit/")[0]
            return self.say({"commitUrl": f"{self.server.endpoint}/{name}/commit/0", "commitOid": "0" * 40})
        return self.say({"error": "not here"}, 404)
