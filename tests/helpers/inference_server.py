"""A server on this machine that answers as vLLM or SGLang do, from a loaded model; it can be made to fail."""

import json
import threading
from http.server import ThreadingHTTPServer

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from tests.helpers.json_handler import JsonHandler

LONGEST = 200  # tokens of a prompt that it takes


class InferenceServer(ThreadingHTTPServer):
    """`url`, `asked` (requests so far), `generations` (bodies that asked for text), and what can be changed: `fails`
    (answers left that are errors of `status`), `lives` (requests after which it is dead), `bends` (temperature counts),
    `silent` (no log-probabilities), `babbles` (no JSON), `most` (largest k), `text_of` (what it says that a token is),
    `key` (that requests must bring), `adapters` (served beside the model), `refuses` (prompt -> status), `change`
    (prompt, answer -> answer).

    Args:
        model: causal language model. tokenizer: its own. kind: vllm or sglang.
    """

    daemon_threads = True

    def __init__(self, model, tokenizer, kind: str = "vllm", name: str = "served", port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.model, self.tokenizer, self.kind, self.name = model, tokenizer, kind, name
        self.asked, self.fails, self.status, self.most = 0, 0, 503, 20
        self.bends = self.silent = self.babbles = False
        self.key, self.adapters, self.adapters_first, self.names_asked = "", [], False, set()
        self.refuses, self.change = lambda ids: 0, lambda ids, content: content
        self.lives, self.generations = 10**9, []
        self.text_of = lambda token: tokenizer.decode([token])
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @torch.inference_mode()
    def logprobs(self, ids: list[int], temperature: float) -> torch.Tensor:
        """[T - 1, V]: of every token but the first."""
        with self.lock:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        return torch.log_softmax(logits / (temperature if self.bends and temperature else 1.0), -1)


class _Handler(JsonHandler):
    server: InferenceServer

    def do_GET(self):
        base = {"id": self.server.name, "root": self.server.name, "max_model_len": LONGEST + 1, "parent": None}
        adapters = [
            {"id": name, "root": f"/adapters/{name}", "max_model_len": None, "parent": self.server.name}
            for name in self.server.adapters
        ]
        models = {"data": [*adapters, base] if self.server.adapters_first else [base, *adapters]}
        found = {
            "vllm": {"/v1/models": models, "/version": {"version": "0.32.0"}},
            "sglang": {
                "/v1/models": models,
                "/get_server_info": {"version": "0.5", "max_req_input_len": LONGEST},
            },
        }[self.server.kind].get(self.path)
        if not self._refused():
            self.say(*((found, 200) if found else ({"detail": "Not Found"}, 404)))

    def _refused(self) -> bool:
        key = self.server.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self.say({"error": f"Incorrect API key provided: {self.headers['Authorization']}"}, 401)
            return True
        if self.server.fails > 0:
            self.server.fails -= 1
            self.say({"message": "not now"}, self.server.status)
            return True
        return False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        if self.server.asked > self.server.lives:
            return self.connection.close()
        if self.server.babbles:
            return self.send(b"<html>", 200)
        if self._refused():
            return None
        if self.path != {"vllm": "/v1/completions", "sglang": "/generate"}[self.server.kind]:
            return self.say({"detail": "Not Found"}, 404)
        ids = body.get("prompt") or body["input_ids"]
        self.server.names_asked.add(body.get("model") or body.get("lora_path"))
        if status := self.server.refuses(ids):
            return self.say({"error": "Out of range float values are not JSON compliant"}, status)
        if "prompt_logprobs" not in body and "return_logprob" not in body:
            return self._generated(ids, body)
        return self._vllm(body) if self.server.kind == "vllm" else self._sglang(body)

    def _generated(self, ids, body):
        """The most likely tokens, up to one of the ends."""
        self.server.generations.append(body)
        options, made = body.get("sampling_params", body), []
        longest = options.get("max_tokens", options.get("max_new_tokens"))
        if len(ids) + longest > LONGEST + 1:
            return self.say({"error": {"message": "the prompt is longer than the maximum model length"}}, 400)
        penalty, stopped = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]), False
        while len(made) < longest and not stopped:
            scores = self.server.logprobs([*ids, *made, 0], 0.0)[-1:]
            made.append(int(penalty(torch.tensor([[*ids, *made]]), scores).argmax()))
            said = self.server.tokenizer.decode(made)
            stopped = made[-1] in options["stop_token_ids"] or any(one in said for one in options["stop"])
        reason = "stop" if stopped else "length"
        text = self.server.tokenizer.decode(made, skip_special_tokens=options["skip_special_tokens"])
        if self.server.kind == "vllm":
            own = {"token_ids": made} if body["return_token_ids"] else {}
            found = {"choices": [{"text": text, "finish_reason": reason, **own}]}
        else:
            found = {"text": text, "output_ids": made, "meta_info": {"finish_reason": {"type": reason}}}
        return self.say(self.server.change(ids, found))

    def _vllm(self, body):
        ids, k = body["prompt"], body["prompt_logprobs"]
        if len(ids) + body["max_tokens"] > LONGEST + 1:
            return self.say({"error": {"message": "the prompt is longer than the maximum model length"}}, 400)
        if k > self.server.most:
            return self.say({"error": {"message": f"Requested prompt logprobs of {k}, which is greater than max"}}, 400)
        if self.server.silent:
            return self.say({"choices": [{"text": "x", "prompt_logprobs": None}]})
        entries = [None]
        for token, row in zip(ids[1:], self.server.logprobs(ids, body["temperature"])):
            top = row.topk(k).indices.tolist()
            rank = int((row > row[token]).sum()) + 1
            ranks = {token: rank, **{other: n for n, other in enumerate(top, 1)}}
            entries.append(
                {
                    str(t): {"logprob": float(row[t]), "rank": r, "decoded_token": self.server.text_of(t)}
                    for t, r in ranks.items()
                }
            )
        return self.say(self.server.change(ids, {"choices": [{"text": "x", "prompt_logprobs": entries}]}))

    def _sglang(self, body):
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        rows = self.server.logprobs(ids, body["sampling_params"]["temperature"])
        text = self.server.text_of if body["return_text_in_logprobs"] else lambda token: None
        own, best = [[None, ids[start], text(ids[start])]], [None]
        for position in range(start + 1, len(ids)):
            row, token = rows[position - 1], ids[position]
            own.append([float(row[token]), token, text(token)])
            best.append([[float(row[t]), t, text(t)] for t in row.topk(k).indices.tolist()])
        meta = {} if self.server.silent else {"input_token_logprobs": own, "input_top_logprobs": best}
        return self.say(self.server.change(ids, {"text": "", "meta_info": meta}))
