"""Push the bundle to the Hugging Face Hub, whose part a server on this machine plays.

Run: python run_hugging_face.py folder_of_the_bundle name. The last line printed is JSON.
"""

import base64
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

REPO = "somebody/hippocampus"


class Hub(BaseHTTPRequestHandler):
    """Answers what a push asks, and keeps what it was given."""

    requests, files, tags = [], {}, []

    def do_POST(self):
        encoded = self.headers.get("Transfer-Encoding") == "chunked"
        body = (
            self.read_chunks()
            if encoded
            else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        )
        path = self.path.split("?")[0]
        self.requests.append(path)
        answer = {}
        if path == "/api/repos/create":
            answer = {"url": f"{os.environ['HF_ENDPOINT']}/{REPO}", "name": REPO}
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            answer["files"] = [
                {"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for n in names
            ]
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            answer = {
                "commitOid": "0" * 40,
                "commitUrl": f"{os.environ['HF_ENDPOINT']}/{REPO}/commit/0",
            }
        elif "/tag/" in path:
            self.tags.append(json.loads(body)["tag"])
        self.answer(answer)

    def do_GET(self):
        self.requests.append(self.path)
        self.answer({})

    def read_chunks(self):
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def main(bundle_dir, name):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    from monai.bundle import push_to_hf_hub  # reads HF_ENDPOINT

    push_to_hf_hub(
        REPO, name, bundle_dir, token="hf_x", version="0.1.0", tag_as_latest_version=True
    )
    os.makedirs("pushed")
    for path, content in Hub.files.items():
        os.makedirs(os.path.dirname(f"pushed/{path}"), exist_ok=True)
        with open(f"pushed/{path}", "wb") as file:
            file.write(content)
    print(json.dumps({"requests": Hub.requests, "tags": Hub.tags}))


if __name__ == "__main__":
    main(*sys.argv[1:])
