"""What identifies a capture, and how it is finished: `skipped.jsonl`, the tokenizer, `manifest.json`."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.identity import Identity, library_versions
from fusechat_fuse.store.files import write_atomic
from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.tokenizers import save_tokenizer
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.conversations import Conversation, ReadReport, count_reasons
from fusechat_fuse.text.templates import OTHER_TEMPLATE, check_template
from fusechat_fuse.text.tokens import tokenizer_hash

logger = logging.getLogger(__name__)
MAX_NON_FINITE_SHARE = 0.01


@dataclass(frozen=True)
class Capture:
    """What a representation is made from.

    conversations and report: as `read_conversations` returns them. encoder: makes token ids of them. model: whose
    distributions these are. template_of: name of the model or file that the chat template comes from.
    """

    conversations: list[Conversation]
    report: ReadReport
    encoder: ConversationEncoder
    model: Identity
    template_of: str

    def identity(self, options: dict, data: str) -> dict[str, Any]:
        """What determines the content of the directory; `data` is a digest of the conversations."""
        encoder = self.encoder
        return {
            "model": {"fingerprint": self.model["fingerprint"]},
            "options": options,
            "tokenizer": tokenizer_hash(encoder.tokenizer),
            "template": {"name": encoder.template.name, "sha256": encoder.template.sha256},
            "bos": encoder.bos,
            "end_of_turn_id": encoder.end_of_turn_id,
            "data": data,
        }


def check_finite(skipped: list[dict], total: int) -> None:
    """Raise RuntimeError where too many of the conversations have logits that are not finite."""
    found = [entry for entry in skipped if entry["reason"] == "non_finite"]
    if len(found) > MAX_NON_FINITE_SHARE * total:
        raise RuntimeError(
            f"{len(found)} of {total} conversations have logits that are not finite ({len(found) / total:.1%}; at most "
            f"{MAX_NON_FINITE_SHARE:.0%} are left out), the first: {found[0]['detail']}. Run the model in bfloat16 or "
            "float32, or check its weights or its server."
        )


def finish(writer: ShardWriter, num_shards: int, capture: Capture) -> None:
    """Write the files about all shards once all are there; `manifest.json` is the last."""
    report = capture.report
    infos = [writer.info(n)["info"] for n in range(num_shards)]
    skipped = report.skipped + [entry for info in infos for entry in info["skipped"]]
    by_reason = count_reasons(skipped)
    if not any(writer.info(n)["rows"] for n in range(num_shards)):
        got = f"{', '.join(f'{count} {reason}' for reason, count in by_reason.items())}: {skipped[0]['detail']}"
        raise InputError(
            f"data for {writer.path}: expected at least one usable conversation, got none ({got}). Mend the data or "
            "the options."
        )
    entries = [{"action": "skipped", **e} for e in skipped] + [{"action": "repaired", **e} for e in report.repaired]
    lines = [json.dumps(entry, ensure_ascii=True, sort_keys=True) + "\n" for entry in entries]
    write_atomic(writer.path / "skipped.jsonl", "".join(lines).encode())
    check_finite(skipped, report.rows - len(report.skipped))
    check_template(skipped, report.rows - len(report.skipped))
    save_tokenizer(capture.encoder.tokenizer, writer.path)
    manifest = _manifest(writer.identity, capture, infos, by_reason)
    writer.finish(num_shards, manifest)
    _log_outcome(writer, capture.encoder, skipped, manifest["counts"])


def _log_outcome(writer: ShardWriter, encoder: ConversationEncoder, skipped: list[dict], counts: dict) -> None:
    if share := counts["skipped"].get("non_finite", 0) / max(counts["rows_read"], 1):
        logger.warning(
            "%.2f %% of the conversations have logits that are not finite and are left out here; no later pass that "
            "filters NaN is needed.",
            100 * share,
        )
    if answers := counts["context_answers"]:
        logger.warning(
            "%d answers are context only: the chat template renders them otherwise once the conversation goes on. %s.",
            *(answers, OTHER_TEMPLATE),
        )
    if turns := counts["tool_call_turns"]:
        logger.info("%d turns that call tools are context only: nothing of a call is predicted.", turns)
    if counts["ends_kept"] < counts["ends"] / 10:
        logger.warning(
            "The model's end-of-turn token %r is among its %d most likely tokens at only %d of %d ends of turn: it may "
            "be a base model, or end its turns differently (check template and tokenizer). Where a source does not "
            "have it there, training takes the label alone.",
            *(encoder.end_of_turn, writer.identity["options"]["top_k"], counts["ends_kept"], counts["ends"]),
        )
    for detail, count in Counter(e["detail"] for e in skipped if e["reason"] == "template").most_common(1):
        logger.warning("%d conversations skipped, as %s. %s.", count, detail, OTHER_TEMPLATE)
    if skipped:
        rows = counts["rows_read"]
        logger.warning("%d of %d rows skipped: %s (see skipped.jsonl)", len(skipped), rows, counts["skipped"])
    logger.info("%s: padding %.1f %% of the tokens run", writer.path, 100 * counts["padding_share"])


def _manifest(identity: dict, capture: Capture, infos: list[dict], skipped: dict[str, int]) -> dict[str, Any]:
    """What made the representation, and counts; infos: as kept beside each shard."""
    encoder, tokenizer, report = capture.encoder, capture.encoder.tokenizer, capture.report
    ends, ends_kept = np.sum([info["ends"] for info in infos], axis=0).tolist()
    counted = ("truncated", "context_answers", "tool_call_turns")
    sums = {name: sum(info.get(name, 0) for info in infos) for name in counted}
    run, padded = (sum(info[name] for info in infos) for name in ("run_tokens", "padded_tokens"))
    return {
        "options": {**identity["options"], "template": identity["template"]["name"]},
        "model": {**capture.model, "vocab_size": infos[0]["vocab_size"]},
        "tokenizer": {
            "sha256": identity["tokenizer"],
            "class": type(tokenizer).__name__,
            "bos_id": tokenizer.bos_token_id,
            "eos_id": tokenizer.eos_token_id,
            "end_of_turn_id": encoder.end_of_turn_id,
        },
        "template": {
            **identity["template"],
            "of": capture.template_of,
            "built_in": encoder.template.built_in,
            "source": encoder.template.source,
        },
        "data": identity["data"],
        "datasets": report.data,
        "versions": library_versions(),
        "counts": {
            "rows_read": report.rows,
            "skipped": skipped,
            "repaired": count_reasons(report.repaired),
            **sums,
            "ends": ends,
            "ends_kept": ends_kept,
            "padding_share": round(1 - run / max(padded, 1), 4),
        },
    }
